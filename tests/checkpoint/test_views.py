"""A tensor put together from files in any way, run by run, is the tensor put together whole; and comes apart again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.checkpoint.header import TensorInfo
from quantkit.checkpoint.views import SourceTensor, plain, same_bytes
from quantkit.kernels.rope import to_halves

CHANCE = np.random.default_rng(0)


def stored(shape: tuple[int, ...], files: int = 1) -> tuple[dict[str, bytes], list[TensorInfo], list[np.ndarray]]:
    """Files with a U16-like BF16 tensor of that shape in each, at an odd offset; where it lies; its bits."""
    contents, infos, arrays = {}, [], []
    for i in range(files):
        x = CHANCE.integers(0, 2**16, shape).astype(np.uint16)
        contents[f"f{i}"] = b"x" * (7 + i) + x.tobytes() + b"tail"
        infos.append(TensorInfo("t", "BF16", shape, f"f{i}", 7 + i))
        arrays.append(x)
    return contents, infos, arrays


def read(tensor: SourceTensor, contents: dict[str, bytes], size: int) -> np.ndarray:
    """All elements, in runs of about `size` that fit the granule; every run is taken apart again and compared."""
    granule = tensor.granule or tensor.numel
    size = max(granule, size // granule * granule)
    found = []
    for start in range(0, tensor.numel, size):
        runs = tensor.runs(start, min(size, tensor.numel - start))
        raw = [np.frombuffer(contents[r.file][r.offset : r.offset + r.nbytes], np.uint8) for r in runs]
        x = tensor.arrange(raw, start)
        back = tensor.restore(x, raw)
        assert all(same_bytes(a, b) for a, b in zip(back, raw, strict=True))
        found.append(x)
    return np.concatenate(found) if found else np.empty(0, tensor.word)


sizes = st.integers(1, 3000)


@given(st.integers(1, 9), st.integers(1, 9), sizes)
def test_plain(rows: int, columns: int, size: int) -> None:
    contents, (info,), (x,) = stored((rows, columns))
    assert np.array_equal(read(plain(info), contents, size), x.reshape(-1))


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), sizes)
def test_rows_in_pairs_below_each_other(heads: int, half: int, columns: int, files: int, size: int) -> None:
    contents, infos, arrays = stored((heads * 2 * half, columns), files)
    shape = (files * heads * 2 * half, columns)
    tensor = SourceTensor("t", "BF16", shape, tuple(infos), head_dim=2 * half)
    whole = np.concatenate(arrays)
    assert np.array_equal(read(tensor, contents, size), to_halves(whole.reshape(-1), 2 * half, columns))
    unturned = replace(tensor, head_dim=0)
    assert np.array_equal(read(unturned, contents, size), whole.reshape(-1))


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), sizes)
def test_side_by_side(rows: int, columns: int, files: int, size: int) -> None:
    contents, infos, arrays = stored((rows, columns), files)
    tensor = SourceTensor("t", "BF16", (rows, columns * files), tuple(infos), axis=1)
    assert np.array_equal(read(tensor, contents, size), np.concatenate(arrays, axis=1).reshape(-1))


def test_turned() -> None:
    contents, (info,), (x,) = stored((5, 3))
    tensor = SourceTensor("t", "BF16", (3, 5), (info,), turned=True)
    assert tensor.granule == 0
    assert np.array_equal(read(tensor, contents, 1), x.T.reshape(-1))


@pytest.mark.parametrize("shape", [(0,), (0, 4), ()])
def test_empty_and_scalar(shape: tuple[int, ...]) -> None:
    contents, (info,), (x,) = stored(shape)
    assert np.array_equal(read(plain(info), contents, 8), x.reshape(-1))
    assert len(plain(info).runs(0, x.size)) == 1


@given(st.binary(max_size=40), st.integers(0, 40), st.integers(0, 7))
def test_same_bytes(raw: bytes, at: int, shift: int) -> None:
    """Aligned or not, whatever the length, and a single bit is seen."""
    a = np.frombuffer(b"." * shift + raw, np.uint8)[shift:]
    b: Any = np.frombuffer(raw, np.uint8).copy()
    assert same_bytes(a, b)
    assert not same_bytes(a, np.append(b, 0).astype(np.uint8))
    if raw:
        b[at % len(raw)] ^= 1
        assert not same_bytes(a, b)
