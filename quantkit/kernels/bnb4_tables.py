"""The constants of bitsandbytes' 4-bit formats. No Numba here: planning and checking need tables, not kernels."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

BLOCK = 64
NESTED_BLOCK = 256
ERROR_STRIDE = 16  # the reconstruction error is summed over every 16th block: exact enough, and nearly free

F32Array = npt.NDArray[np.float32]

# fmt: off
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)
FP4 = np.array([
    0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
    0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25],
    np.float32)
# Codes by rising value. Between the zeros, codes 0 and 8, lies the threshold 0.0: bitsandbytes on a CPU sorts so.
FP4_ORDER = np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], np.uint8)
# fmt: on
TABLES = {"nf4": NF4, "fp4": FP4}
ORDERS = {"nf4": np.arange(16, dtype=np.uint8), "fp4": FP4_ORDER}
ZERO_CODE = {"nf4": 7, "fp4": 0}


@cache
def thresholds(quant_type: str) -> F32Array:
    """[15] fp32 midpoints of neighbouring table values; the code is the number of thresholds strictly below."""
    values = TABLES[quant_type][ORDERS[quant_type]]
    middles: F32Array = ((values[1:] + values[:-1]) / np.float32(2)).astype(np.float32)
    return middles


@cache
def dynamic_map() -> F32Array:
    """[256] the signed dynamic map: for e = 0..6, the 2^e midpoints of linspace(0.1, 1) times 10^(e−6), both signs,
    with 0 and 1 (bitsandbytes `create_dynamic_map`)."""
    values = [np.float32(0), np.float32(1)]
    for e in range(7):
        edges = _linspace(2**e + 1)
        middles = (edges[1:] + edges[:-1]) / np.float32(2)
        for m in middles:
            v = np.float32(10.0 ** (e - 6)) * m
            values += [v, -v]
    return np.sort(np.array(values, np.float32))


def _linspace(n: int) -> F32Array:
    # torch's fp32 linspace(0.1, 1, n) counts from both ends towards the middle, each value one fused multiply-add:
    # here the product is taken in fp64, where it is exact, and rounded once.
    step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(n - 1))
    low = np.float64(np.float32(0.1)) + step * np.arange(n // 2)
    high = 1.0 - step * np.arange(n - n // 2 - 1, -1, -1)
    return np.concatenate([low, high]).astype(np.float32)
