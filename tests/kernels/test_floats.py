"""Widening, and the search for values that are not finite, over every bit pattern that there is to try."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracle import bnb as oracle

from quantkit.kernels.floats import BITS_DTYPE, first_nonfinite, to_float32, zero_nonfinite

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ALL16 = np.arange(1 << 16, dtype=np.uint16)
# fp32: each sign and exponent, with the mantissas at the ends, in the middle and next to them.
MANTISSAS = [0, 1, 2, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x3FFFFF, 0x400000, 0x400001, 0x7FFFFE, 0x7FFFFF]
SOME32 = np.array([sign << 31 | e << 23 | m for sign in (0, 1) for e in range(256) for m in MANTISSAS], np.uint32)
PATTERNS = {"F32": SOME32, "F16": ALL16, "BF16": ALL16}


def as_torch(bits: np.ndarray, dtype: str) -> torch.Tensor:
    return torch.from_numpy(bits.copy()).view(DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_widening_is_exact(dtype: str) -> None:
    """All 65,536 patterns: the bits of torch's float32, zeros' signs and subnormals among them; NaN stays NaN."""
    bits = PATTERNS[dtype]
    ours, expected = to_float32(bits, dtype), as_torch(bits, dtype).float().numpy()
    nan = np.isnan(expected)
    assert np.isnan(ours[nan]).all()
    np.testing.assert_array_equal(ours[~nan].view(np.uint32), expected[~nan].view(np.uint32))
    slow = oracle.widen(bits, dtype)
    np.testing.assert_array_equal(ours[~nan].view(np.uint32), slow[~nan].view(np.uint32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_widening_keeps_the_shape(dtype: str) -> None:
    bits = np.arange(30, dtype=BITS_DTYPE[dtype]).reshape(2, 3, 5)
    assert to_float32(bits, dtype).shape == (2, 3, 5)
    assert to_float32(bits[:0], dtype).shape == (0, 3, 5)
    np.testing.assert_array_equal(to_float32(bits[:, 1:], dtype), to_float32(bits, dtype)[:, 1:])  # not contiguous


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern_is_found_or_passed_over(dtype: str) -> None:
    finite = torch.isfinite(as_torch(PATTERNS[dtype], dtype)).numpy()
    assert 0 < np.count_nonzero(~finite) < finite.size
    found = [first_nonfinite(PATTERNS[dtype][i : i + 1], dtype) for i in range(finite.size)]
    np.testing.assert_array_equal(np.array(found) == -1, finite)
    assert first_nonfinite(PATTERNS[dtype][finite], dtype) == -1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 4095, 4096, 4097, 10_000])
def test_the_first_is_found_anywhere(dtype: str, size: int) -> None:
    infinite = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}[dtype]
    sign = 1 << (31 if dtype == "F32" else 15)
    for at in {0, size // 2, 4095, 4096, size - 1} & set(range(size)):
        for pattern in (infinite, infinite | sign, infinite + 1, (infinite | sign) + 1):
            x = np.full(size, infinite - 1, BITS_DTYPE[dtype])  # the largest finite number
            x[at] = pattern
            assert first_nonfinite(x, dtype) == at
            x[-1] = pattern
            assert first_nonfinite(x, dtype) == at


def test_nothing_in_nothing() -> None:
    for dtype in DTYPES:
        empty = np.empty(0, BITS_DTYPE[dtype])
        assert first_nonfinite(empty, dtype) == -1
        assert zero_nonfinite(empty, dtype) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeroing_touches_nothing_else(dtype: str) -> None:
    x = PATTERNS[dtype].copy()
    finite = torch.isfinite(as_torch(x, dtype)).numpy()
    assert zero_nonfinite(x, dtype) == np.count_nonzero(~finite)
    assert not x[~finite].any()
    np.testing.assert_array_equal(x[finite], PATTERNS[dtype][finite])
    assert first_nonfinite(x, dtype) == -1
