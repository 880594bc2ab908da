"""LLM.int8() weights: one scale per output row. Bit-identical to bitsandbytes 0.50.2 on a CPU.

The weight is rounded to fp16 first, whatever it was stored in; SCB is the row's largest magnitude; the code is
round-half-even(w · (127 · (1/SCB))), the reciprocal taken first.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from quantkit.kernels.floats import KIND, Bits, widen

F32Array = npt.NDArray[np.float32]
I8Array = npt.NDArray[np.int8]


@njit(nogil=True, cache=True)
def _encode_rows(x, kind, out, scale, squares, errors):  # type: ignore[no-untyped-def]
    bits = np.empty(x.shape[1], np.uint32)
    values = bits.view(np.float32)
    for r in range(x.shape[0]):
        widen(x[r], kind, bits)
        if kind != 2:
            # To fp16 precision, half to even: keep 10 bits of mantissa, or, below 2^-14, multiples of 2^-24.
            for i in range(values.size):
                u = bits[i]
                rounded = (u + np.uint32(0xFFF) + ((u >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
                v = values[i]
                small = abs(v) + np.float32(0.5) - np.float32(0.5)
                small_bits = np.float32(-small) if v < 0 else np.float32(small)
                if abs(v) < np.float32(6.103515625e-05):
                    values[i] = small_bits
                else:
                    bits[i] = rounded
        top = np.float32(0)
        for i in range(values.size):
            top = max(top, abs(values[i]))
        scale[r] = top
        factor = np.float32(127) * (np.float32(1) / top) if top > 0 else np.float32(0)
        row = out[r]
        for i in range(values.size):
            row[i] = np.int8(np.rint(values[i] * factor))
        if r % 16 == 0:
            back = top / np.float32(127)
            ww, ee = 0.0, 0.0
            for i in range(values.size):
                e = values[i] - np.float32(row[i]) * back
                ww += values[i] * values[i]
                ee += e * e
            squares[r // 16] = ww
            errors[r // 16] = ee


def encode_rows(
    x: Bits,
    dtype: str,
    out: I8Array,
    scale: F32Array,
    squares: npt.NDArray[np.float64],
    errors: npt.NDArray[np.float64],
) -> None:
    """x: bit patterns [R, in]. Written: codes int8 [R, in]; `scale` fp32 [R] (SCB); Σw² and Σ(w−ŵ)² of every 16th
    row, fp64 [ceil(R/16)]. A magnitude of 65520 or more has no fp16 value: SCB becomes 65536 or more, refuse it."""
    _encode_rows(x, KIND[dtype], out, scale, squares, errors)


@njit(nogil=True, cache=True)
def decode_rows(codes, scale, out):  # type: ignore[no-untyped-def]
    """ŵ = code · SCB / 127: codes int8 [R, in], scale fp32 [R] → out fp32 [R, in]."""
    for r in range(codes.shape[0]):
        for i in range(codes.shape[1]):
            out[r, i] = np.float32(codes[r, i]) * scale[r] / np.float32(127)
