"""bitsandbytes 4-bit: encode and decode blocks of 64 weights, and the 8-bit coding of their absmax.

Bit-identical to bitsandbytes 0.50.2 on a CPU (its arithmetic is described in `docs/formats.md`); the slow, obvious
twin is `tests/oracle/bnb.py`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
from numba import njit

from quantkit.kernels.bnb4_tables import (
    NESTED_BLOCK,
    ORDERS,
    TABLES,
    ZERO_CODE,
    F32Array,
    dynamic_map,
    thresholds,
)
from quantkit.kernels.floats import KIND, Bits, widen

F64Array = npt.NDArray[np.float64]
U8Array = npt.NDArray[np.uint8]


@njit(nogil=True, cache=True)
def _encode_blocks(x, kind, bounds, order, table, packed, absmax, sums):  # type: ignore[no-untyped-def]
    # Thresholds as scalars and plain sums of comparisons: the form that LLVM turns into vector compares.
    t0, t1, t2, t3, t4 = bounds[0], bounds[1], bounds[2], bounds[3], bounds[4]
    t5, t6, t7, t8, t9 = bounds[5], bounds[6], bounds[7], bounds[8], bounds[9]
    t10, t11, t12, t13, t14 = bounds[10], bounds[11], bounds[12], bounds[13], bounds[14]
    reorder = order[0] != 0
    bits = np.empty(64, np.uint32)
    values = bits.view(np.float32)
    codes = np.empty(64, np.int32)
    absmax_bits = absmax.view(np.uint32)
    for b in range(absmax.size):
        widen(x[b * 64 : b * 64 + 64], kind, bits)
        top = np.uint32(0)
        for i in range(64):
            top = max(top, bits[i] & np.uint32(0x7FFFFFFF))
        absmax_bits[b] = top
        # The reciprocal first, then a product: a division rounds differently in about one weight of a million.
        inverse = np.float32(1) / max(absmax[b], np.float32(1e-38))
        for i in range(64):
            s = values[i] * inverse
            codes[i] = (
                np.int32(s > t0) + np.int32(s > t1) + np.int32(s > t2) + np.int32(s > t3) + np.int32(s > t4)
                + np.int32(s > t5) + np.int32(s > t6) + np.int32(s > t7) + np.int32(s > t8) + np.int32(s > t9)
                + np.int32(s > t10) + np.int32(s > t11) + np.int32(s > t12) + np.int32(s > t13) + np.int32(s > t14)
            )  # fmt: skip
        if reorder:
            for i in range(64):
                codes[i] = np.int32(order[codes[i]])
        out = packed[b * 32 : b * 32 + 32]
        for i in range(32):
            out[i] = np.uint8((codes[2 * i] << 4) | codes[2 * i + 1])
        if b % 16 == 0:
            # fp64: the square of a float32 above 1.8e19 is no float32, nor is that of one below 1e-19.
            ww, wt, tt = 0.0, 0.0, 0.0
            for i in range(64):
                w, t = np.float64(values[i]), np.float64(table[codes[i]])
                ww += w * w
                wt += w * t
                tt += t * t
            sums[b // 16, 0] = ww
            sums[b // 16, 1] = wt
            sums[b // 16, 2] = tt


def encode_blocks(x: Bits, dtype: str, quant_type: str, packed: U8Array, absmax: F32Array, sums: F64Array) -> None:
    """Encodes whole blocks.

    x: bit patterns of `dtype`, [64·B]. Written: `packed` uint8 [32·B], the first weight of a pair in the high nibble;
    `absmax` fp32 [B]; `sums` fp64 [ceil(B/16), 3]: Σw², Σw·t, Σt² of every 16th block, t the table values chosen, from
    which `squared_errors` computes the error for any reconstructed absmax.
    """
    tables = thresholds(quant_type), ORDERS[quant_type], TABLES[quant_type]
    _encode_blocks(x, KIND[dtype], *tables, packed, absmax, sums)


def encode_tail(values: F32Array, quant_type: str) -> tuple[U8Array, np.float32, F64Array]:
    """The last, partial block: `values` fp32 [1..63]. Returns packed bytes, absmax, and its three sums [1, 3].

    bitsandbytes divides here instead of multiplying with a reciprocal, and clamps the absmax that it stores.
    """
    absmax = max(np.abs(values).max(), np.float32(1e-38))
    scaled = np.clip(values / absmax, -1, 1)
    codes = ORDERS[quant_type][np.searchsorted(thresholds(quant_type), scaled)]
    w, t = values.astype(np.float64), TABLES[quant_type][codes].astype(np.float64)
    sums = np.array([[(w * w).sum(), (w * t).sum(), (t * t).sum()]])
    if codes.size % 2:
        codes = np.append(codes, np.uint8(ZERO_CODE[quant_type]))
    return (codes[::2] << 4 | codes[1::2]).astype(np.uint8), np.float32(absmax), sums


def squared_errors(sums: F64Array, absmax: F32Array) -> tuple[float, float]:
    """(Σ(w − absmax·t)², Σw²) over the blocks that `sums` [n, 3] describes, with their reconstructed absmax [n]."""
    a = absmax.astype(np.float64)
    error = sums[:, 0] - 2 * a * sums[:, 1] + a * a * sums[:, 2]
    return float(np.maximum(error, 0).sum()), float(sums[:, 0].sum())


@njit(nogil=True, cache=True)
def _decode(packed, table, absmax, out):  # type: ignore[no-untyped-def]
    for i in range(out.size):
        byte = packed[i >> 1]
        code = (byte & np.uint8(15)) if i & 1 else (byte >> np.uint8(4))
        out[i] = table[code] * absmax[i >> 6]


def decode_blocks(packed: U8Array, quant_type: str, absmax: F32Array, n: int) -> F32Array:
    """fp32 [n] from packed bytes that begin at a block boundary and the fp32 absmax of their blocks."""
    out = np.empty(n, np.float32)
    _decode(packed, TABLES[quant_type], absmax, out)
    return out


@cache
def _dynamic_lut() -> U8Array:
    """[65536] nearest map entry of each bin centre: bitsandbytes' CPU code rounds to these bins first."""
    table = dynamic_map()
    centres = (np.float32(-1) + np.float32(2) * np.arange(65536, dtype=np.float32) / np.float32(65535)).astype(
        np.float32
    )
    middles = (table[1:] + table[:-1]) * np.float32(0.5)
    return np.searchsorted(middles, centres).astype(np.uint8)


@njit(nogil=True, cache=True)
def _sum_lanes(x, lanes):  # type: ignore[no-untyped-def]
    # Four interleaved accumulators of `lanes` floats, cascaded over four levels.
    width = 4 * lanes
    rows = x.size // width
    levels = np.zeros((4, width), np.float32)
    log2_rows = 0
    while (1 << log2_rows) < rows:
        log2_rows += 1
    power = max(4, log2_rows // 4)
    step = 1 << power
    i = 0
    while i + step <= rows:
        for _ in range(step):
            for k in range(width):
                levels[0, k] += x[i * width + k]
            i += 1
        for j in range(1, 4):
            for k in range(width):
                levels[j, k] += levels[j - 1, k]
                levels[j - 1, k] = 0
            if i & ((step - 1) << (j * power)):
                break
    while i < rows:
        for k in range(width):
            levels[0, k] += x[i * width + k]
        i += 1
    for j in range(1, 4):
        for k in range(width):
            levels[0, k] += levels[j, k]
    for r in range(rows * 4, x.size // lanes):
        for k in range(lanes):
            levels[0, k] += x[r * lanes + k]
    for j in range(1, 4):
        for k in range(lanes):
            levels[0, k] += levels[0, j * lanes + k]
    total = np.float32(0)
    for k in range(x.size // lanes * lanes, x.size):
        total += x[k]
    for k in range(lanes):
        total += levels[0, k]
    return total


def mean(x: F32Array) -> np.float32:
    """fp32 mean in the order of torch 2.13's sum on one thread of an x86 CPU (8 lanes, four chains, four levels).

    One fixed order on every machine: torch's own result changes with the number of threads above 32,768 numbers.
    """
    return np.float32(_sum_lanes(x, 8 if x.size >= 8 else 1) / np.float32(x.size))


def encode_absmax(absmax: F32Array) -> tuple[U8Array, F32Array, np.float32]:
    """Double quantization: codes uint8 [B], nested_absmax fp32 [ceil(B/256)], offset (the mean).

    Where the maxima add up to more than a float32, the offset is infinite: refuse it.
    """
    offset = mean(absmax)
    residual = absmax - offset
    blocks = -(-residual.size // NESTED_BLOCK)
    padded = np.zeros(blocks * NESTED_BLOCK, np.float32)
    padded[: residual.size] = residual
    grid = padded.reshape(blocks, NESTED_BLOCK)
    nested = np.abs(grid).max(axis=1)
    with np.errstate(over="ignore", invalid="ignore"):  # a subnormal maximum has no reciprocal: bitsandbytes, too
        inverse = np.divide(np.float32(1), nested, out=np.zeros_like(nested), where=nested > 0)
        scaled = np.clip(np.nan_to_num(grid * inverse[:, None], nan=-1), -1, 1)
    bins = ((scaled + np.float32(1)) * np.float32(0.5) * np.float32(65535) + np.float32(0.5)).astype(np.int32)
    codes = _dynamic_lut()[np.clip(bins, 0, 65535)]
    codes[nested == 0] = 0
    return codes.reshape(-1)[: residual.size], nested, offset


def decode_absmax(codes: U8Array, table: F32Array, nested: F32Array, offset: float) -> F32Array:
    """fp32 [B] from the nested form."""
    scale = np.repeat(nested, NESTED_BLOCK)[: codes.size]
    return (table[codes] * scale + np.float32(offset)).astype(np.float32)
