"""The part of the column solver that no matrix product can do: one column after another inside a block.

Rows are independent of each other, so that a caller may share them out to threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit

# Adding and subtracting 1.5 · 2^23 rounds a float32 below 2^22 to an integer, halves to even, in two vector
# instructions. No fast-math here: it would cancel the two.
ROUND = np.float32(12582912.0)


@njit(nogil=True, cache=True, inline="always")
def nearest(level, low, high):  # type: ignore[no-untyped-def]
    """The integer next to a float32 among low … high, low for a NaN: whatever happens, a code is one."""
    level = level if level > low else low
    level = level if level < high else high
    return (level + ROUND) - ROUND


@njit(nogil=True, cache=True)
def add_products(a, b, first, times, out):  # type: ignore[no-untyped-def]
    """out[r] += times · Σ a[r]·b[r, first:], a float32 [rows, width], b float32 [rows, n]; out float64 [rows]."""
    for r in range(a.shape[0]):
        total = 0.0
        for i in range(a.shape[1]):
            total += np.float64(a[r, i]) * np.float64(b[r, first + i])
        out[r] += times * total


@njit(nogil=True, cache=True)
def take_block(weight, column, lower, first, target, triangle):  # type: ignore[no-untyped-def]
    """Copies what `round_block` reads of a block of positions: `target` float32 [rows, width] from `weight` float32
    [rows, n], position p being column[p]; `triangle` float32 [width, width] from `lower` float32 [n, n]."""
    width = target.shape[1]
    for r in range(target.shape[0]):
        for k in range(width):
            target[r, k] = weight[r, column[first + k]]
    for k in range(width):
        for j in range(width):
            triangle[k, j] = lower[first + k, first + j]


@njit(nogil=True, cache=True)
def subtract_levels(target, codes, scales, zeros, group, out):  # type: ignore[no-untyped-def]
    """out = target − (code − zero) · scale, float32 [rows, n]; codes uint8, group int32 [n], the rest by group."""
    for r in range(target.shape[0]):
        for k in range(target.shape[1]):
            g = group[k]
            out[r, k] = target[r, k] - (np.float32(codes[r, k]) - zeros[r, g]) * scales[r, g]


@njit(nogil=True, cache=True)
def round_block(  # type: ignore[no-untyped-def]
    shifted, target, lower, first, column, group, top, scales, zeros, masked, keep, codes, errors
):
    """Rounds one block of columns, from its last column to its first.

    `first` is the block's first position in processing order; position p is column[p] of the weight, of group[p], with
    codes 0 … top[p]. Read: `shifted` float32 [rows, n] by position, the target plus what columns already rounded ask
    of it, changed inside the block; `target` float32 [rows, block]; `lower` float32 [block, block], the factor's unit
    lower triangle; `scales`, `zeros` float32 [rows, groups]; `keep` bool [rows, n] by column if `masked`, false where
    the code must be the zero point. Written: `codes` uint8 [rows, n] by column; `errors` float32 [rows, block].
    """
    width = target.shape[1]
    for r in range(target.shape[0]):
        row = shifted[r, first : first + width]
        for k in range(width - 1, -1, -1):
            p = first + k
            scale = scales[r, group[p]]
            zero = zeros[r, group[p]]
            level = np.float32(0)
            if not masked or keep[r, column[p]]:
                level = nearest(row[k] / scale, -zero, top[p] - zero)
            codes[r, column[p]] = np.uint8(level + zero)
            error = target[r, k] - level * scale
            errors[r, k] = error
            below = lower[k]
            for j in range(k):
                row[j] += error * below[j]


@njit(nogil=True, cache=True)
def round_rows(weight, group, top, scales, zeros, masked, keep, codes):  # type: ignore[no-untyped-def]
    """The nearest code for every weight, each for itself. Columns in their natural order.

    weight: float32 [rows, n]. group: int32 [n]; top: float32 [n], the largest code. scales, zeros: float32
    [rows, groups]. keep: bool [rows, n] if `masked`. Written: `codes` uint8 [rows, n].
    """
    for r in range(weight.shape[0]):
        for k in range(weight.shape[1]):
            scale = scales[r, group[k]]
            zero = zeros[r, group[k]]
            level = np.float32(0)
            if not masked or keep[r, k]:
                level = nearest(weight[r, k] / scale, -zero, top[k] - zero)
            codes[r, k] = np.uint8(level + zero)
