"""The sum of bytes at their places, beside one that takes byte after byte."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.kernels.sums import MODULUS, ROW, WEIGHTS, position_sum


def slow(data: bytes, offset: int) -> int:
    found = 0
    for i, byte in enumerate(data, offset):
        row, column = divmod(i // 4, ROW)
        found += (byte << 8 * (i % 4)) * (2 * row + 1) * int(WEIGHTS[column])
    return found % MODULUS


def fast(data: bytes, offset: int) -> int:
    return position_sum(np.frombuffer(data, np.uint8), offset)


@given(st.binary(max_size=100), st.integers(0, 1 << 45))
def test_it_is_the_sum(data: bytes, offset: int) -> None:
    assert fast(data, offset) == slow(data, offset)


def test_of_many_words() -> None:
    data = np.random.default_rng(0).integers(0, 256, 300_007, np.uint8).tobytes()
    for offset in (0, 13, 4 * ROW - 2, 4 * ROW * 1000 + 8):
        assert fast(data, offset) == slow(data, offset)


def test_weights_are_the_same_everywhere() -> None:
    """Parts of a job on several machines sum alike."""
    assert [int(w) for w in WEIGHTS[:2]] == [0x9E3779B9E17D05AD, 0x3C6EF372C2FA0B59]
    assert all(WEIGHTS % 2 == 1)
    assert len(set(WEIGHTS.tolist())) == ROW


@pytest.mark.parametrize("bit", [0, 13, 31])
def test_the_same_bit_of_many_words(bit: int) -> None:
    """As a faulty line of memory, or of a cable, would turn it."""
    words = np.random.default_rng(1).integers(0, 1 << 32, 4 * ROW, np.uint32)
    before = position_sum(words.view(np.uint8), 0)
    for step in (1, 2, 16, 1024, ROW, 2 * ROW):
        changed = words.copy()
        changed[::step] ^= np.uint32(1 << bit)
        assert position_sum(changed.view(np.uint8), 0) != before
    assert position_sum(words[::-1].copy().view(np.uint8), 0) != before
    for a, b in ((0, 1), (1, ROW), (ROW + 2, 2 * ROW + 1)):
        changed = words.copy()
        changed[[a, b]] = changed[[b, a]]
        assert position_sum(changed.view(np.uint8), 0) != before


@given(st.binary(min_size=1, max_size=200), st.integers(0, 1 << 45), st.randoms(use_true_random=False))
def test_pieces_in_any_order_add_up(data: bytes, offset: int, chance: random.Random) -> None:
    cuts = sorted({0, len(data), *(chance.randrange(len(data)) for _ in range(4))})
    pieces = list(pairwise(cuts))
    chance.shuffle(pieces)
    assert sum(fast(data[a:b], offset + a) for a, b in pieces) % MODULUS == fast(data, offset)


@given(st.binary(min_size=1, max_size=64), st.integers(0, 1 << 45), st.data())
def test_no_change_of_one_byte_goes_unseen(data: bytes, offset: int, draw: st.DataObject) -> None:
    at, by = draw.draw(st.integers(0, len(data) - 1)), draw.draw(st.integers(1, 255))
    assert fast(data[:at] + bytes([data[at] ^ by]) + data[at + 1 :], offset) != fast(data, offset)
