"""Packing codes: equal to a slow twin that writes out every bit, and to words known from GPTQ's readers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.kernels.bitstream import pack_columns, pack_rows, unpack_columns, unpack_rows

BITS = (2, 3, 4, 8)
Codes = npt.NDArray[np.uint8]


def slow_words(codes: list[int], bits: int) -> list[int]:
    """The stream as text, one character a bit, cut into words."""
    text = "".join(format(code, f"0{bits}b")[::-1] for code in codes)
    assert len(text) % 32 == 0
    return [int(text[i : i + 32][::-1], 2) for i in range(0, len(text), 32)]


def random_codes(bits: int, *shape: int, seed: int = 0) -> Codes:
    return np.random.default_rng(seed).integers(0, 2**bits, shape, np.uint8)


@settings(deadline=None)  # a first call compiles
@given(st.sampled_from(BITS), st.integers(1, 5), st.integers(1, 7), st.integers(0, 2**32), st.booleans())
def test_equal_to_the_slow_twin(bits: int, periods: int, streams: int, seed: int, turned: bool) -> None:
    codes = random_codes(bits, 32 * periods, streams, seed=seed)
    if turned:  # as it lies where the solver made it
        codes = np.ascontiguousarray(codes.T).T
    rows = pack_rows(codes, bits)
    assert (rows.dtype, rows.shape) == (np.int32, (bits * periods, streams))
    for s in range(streams):
        assert rows[:, s].view(np.uint32).tolist() == slow_words(codes[:, s].tolist(), bits)
    columns = pack_columns(codes.T, bits)
    assert (columns.dtype, columns.shape) == (np.int32, (streams, bits * periods))
    assert np.array_equal(columns, rows.T)
    for back in (unpack_rows(rows, bits), unpack_columns(columns, bits).T, unpack_columns(rows.T, bits).T):
        assert back.dtype == np.uint8
        assert np.array_equal(back, codes)


@settings(deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32))
def test_every_word_is_some_codes(bits: int, periods: int, streams: int, seed: int) -> None:
    words = np.random.default_rng(seed).integers(0, 2**32, (bits * periods, streams), np.uint32).view(np.int32)
    assert np.array_equal(pack_rows(unpack_rows(words, bits), bits), words)
    assert np.array_equal(pack_columns(unpack_columns(words.T, bits), bits), words.T)


# A zero point of the middle, 32 times, as the two versions of GPTQ's format hold it.
MIDDLE = {
    2: ([0x55555555] * 2, [0xAAAAAAAA] * 2),
    3: ([0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D], [0x24924924, 0x49249249, 0x92492492]),
    4: ([0x77777777] * 4, [0x88888888] * 4),
    8: ([0x7F7F7F7F] * 8, [0x80808080] * 8),
}


@pytest.mark.parametrize("bits", BITS)
def test_words_of_the_middle(bits: int) -> None:
    for less, words in zip((1, 0), MIDDLE[bits], strict=True):
        codes = np.full((1, 32), 2 ** (bits - 1) - less, np.uint8)
        assert pack_columns(codes, bits).view(np.uint32).tolist() == [words]


def test_literal_words() -> None:
    """Written down by hand from the rule."""
    ramp = np.arange(32, dtype=np.uint8)[None]
    assert pack_columns(ramp % 4, 2).view(np.uint32).tolist() == [[0xE4E4E4E4] * 2]
    assert pack_columns(ramp % 16, 4).view(np.uint32).tolist() == [[0x76543210, 0xFEDCBA98] * 2]
    assert pack_columns(ramp[:, :8], 8).view(np.uint32).tolist() == [[0x03020100, 0x07060504]]
    # Eight codes 0 … 7 are the three bytes of 0o76543210.
    stream = bytes.fromhex("88c6fa") * 4
    assert pack_columns(ramp % 8, 3).tobytes() == stream


def test_codes_across_words() -> None:
    """Of 3 bits, code 10 has two in the first word and one in the second, code 21 one and two."""
    codes = np.zeros((32, 1), np.uint8)
    codes[10] = 7
    assert pack_rows(codes, 3).view(np.uint32)[:, 0].tolist() == [0xC0000000, 1, 0]
    codes[10], codes[21] = 0, 7
    assert pack_rows(codes, 3).view(np.uint32)[:, 0].tolist() == [0, 0x80000000, 3]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_less_than_32_codes_that_fill_words(bits: int) -> None:
    n = 3 * 32 // bits
    codes = random_codes(bits, n, 2)
    words = pack_rows(codes, bits)
    assert [words[:, s].view(np.uint32).tolist() for s in range(2)] == [slow_words(codes[:, s], bits) for s in range(2)]
    assert np.array_equal(unpack_rows(words, bits), codes)


def test_into_a_part_of_a_larger_array() -> None:
    codes, words = random_codes(3, 64, 5), np.zeros((6, 9), np.int32)
    assert pack_rows(codes, 3, words[:, 2:7]) is not words
    assert np.array_equal(words[:, 2:7], pack_rows(codes, 3))
    assert not words[:, :2].any()
    assert not words[:, 7:].any()
    turned = np.zeros((9, 6), np.int32)
    pack_columns(codes.T, 3, turned[2:7])
    assert np.array_equal(turned.T, words)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fill words"):
        pack_rows(np.zeros((31, 1), np.uint8), 4)
    with pytest.raises(ValueError, match="do not fill words"):
        pack_columns(np.zeros((1, 40), np.uint8), 3)
    with pytest.raises(ValueError, match="whole codes"):
        unpack_rows(np.zeros((4, 1), np.int32), 3)
    codes = np.zeros((32, 2), np.uint8)
    codes[5, 1] = 8
    with pytest.raises(ValueError, match="larger than 3 bits"):
        pack_rows(codes, 3)
    pack_rows(codes, 4)
