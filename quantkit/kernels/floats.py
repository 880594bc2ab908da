"""Widening stored floats to fp32 inside kernels, and finding those that are not finite.

bf16 and fp16 travel as uint16 (numpy has no bfloat16), fp32 as uint32: a kernel sees bits, so that nothing is rounded
before it should be and so that the largest magnitude is an integer maximum, in which infinities and NaN stand out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Bits = npt.NDArray[Any]

F32, BF16, F16 = 0, 1, 2
KIND = {"F32": F32, "BF16": BF16, "F16": F16}
BITS_DTYPE: dict[str, Any] = {"F32": np.uint32, "BF16": np.uint16, "F16": np.uint16}

# Bit patterns at and above which an absolute value is infinite or NaN.
INFINITE = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}


# Numba's cache on disk does not see a change of this function in the kernels of other files, into which it is inlined:
# after one, delete `__pycache__`.
@njit(inline="always")
def widen(x, kind, bits):  # type: ignore[no-untyped-def]
    """Writes x, as fp32 bit patterns, into `bits` (uint32, same length). Exact for every input."""
    if kind == 1:
        for i in range(x.size):
            bits[i] = np.uint32(x[i]) << np.uint32(16)
    elif kind == 2:
        scratch = bits.view(np.float32)
        for i in range(x.size):
            h = np.uint32(x[i])
            bits[i] = (h & np.uint32(0x7FFF)) << np.uint32(13)
        # One multiplication by 2**112 moves the exponent's bias from 15 to 127 and normalizes subnormals.
        for i in range(x.size):
            scratch[i] = scratch[i] * np.float32(5.192296858534828e33)
        for i in range(x.size):
            h = np.uint32(x[i])
            top = np.uint32(0x7F800000) if (h & np.uint32(0x7C00)) == np.uint32(0x7C00) else np.uint32(0)
            bits[i] |= top | ((h & np.uint32(0x8000)) << np.uint32(16))
    else:
        for i in range(x.size):
            bits[i] = np.uint32(x[i])


@njit(nogil=True, cache=True)
def widen_run(x, kind, out):  # type: ignore[no-untyped-def]
    """x (bits) as float32 into `out`."""
    widen(x, kind, out.view(np.uint32))


@njit(nogil=True, cache=True)
def _first_at_or_above(x, infinite, magnitude):  # type: ignore[no-untyped-def]
    # In chunks: a maximum without an exit inside vectorizes, the search for the culprit is rare.
    for start in range(0, x.size, 4096):
        part = x[start : start + 4096]
        top = x.dtype.type(0)
        for i in range(part.size):
            top = max(top, part[i] & magnitude)
        if top >= infinite:
            for i in range(part.size):
                if (part[i] & magnitude) >= infinite:
                    return start + i
    return -1


def to_float16(x: Bits, dtype: str) -> Bits:
    """Bit patterns of a dtype as those of the nearest fp16 numbers; infinite where they are beyond its range."""
    with np.errstate(over="ignore"):
        found: Bits = to_float32(x, dtype).astype(np.float16).view(np.uint16)
    return found


def first_nonfinite(x: Bits, dtype: str) -> int:
    """Index of the first infinity or NaN in the bit patterns x of that dtype, or -1."""
    infinite = INFINITE[dtype]
    magnitude = infinite | (infinite - 1)  # every bit below the sign
    return int(_first_at_or_above(x, x.dtype.type(infinite), x.dtype.type(magnitude)))


def zero_nonfinite(x: Bits, dtype: str) -> int:
    """Replaces every infinity and NaN in the bit patterns x by 0, in place; returns how many there were."""
    infinite = INFINITE[dtype]
    bad = (x & x.dtype.type(infinite | (infinite - 1))) >= infinite
    x[bad] = 0
    return int(np.count_nonzero(bad))


def to_float32(x: Bits, dtype: str) -> npt.NDArray[np.float32]:
    """Bit patterns of any length and shape as float32."""
    out = np.empty(x.size, np.float32)
    widen_run(x.reshape(-1), KIND[dtype], out)
    return out.reshape(x.shape)
