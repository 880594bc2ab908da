"""EXL2's scales: one maximum for a group of inputs, and for each output a 4-bit part of it.

Groups are independent of each other, so that a caller may share them out to threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from quantkit.kernels.columns import ROUND

LEVELS = 16  # of a scale's code: (s + 1)² / 256 of the maximum
INFINITE = np.float32(3e38)


@njit(nogil=True, cache=True)
def losses(weight, importance, low, high, ratios, base, out):  # type: ignore[no-untyped-def]
    """What each row of a group loses on each of some scales.

    weight: float32 [rows, columns] of the group. importance: float32 [columns]. low, high: the levels, −2**(b − 1) and
    2**(b − 1) − 1. ratios: float32 [tried]. Written: `base` float32 [rows], the largest magnitude over `high`; `out`
    float32 [rows, tried], Σ importance · (w − ŵ)² on the scale base · ratio; 0 for a row of zeros.
    """
    for r in range(weight.shape[0]):
        most = np.float32(0)
        for k in range(weight.shape[1]):
            most = max(most, abs(weight[r, k]))
        base[r] = most / high
        for t in range(ratios.shape[0]):
            total = np.float32(0)
            scale = base[r] * ratios[t]
            if scale > 0:
                inverse = np.float32(1) / scale
                for k in range(weight.shape[1]):
                    level = weight[r, k] * inverse
                    level = level if level > low else low
                    level = level if level < high else high
                    level = (level + ROUND) - ROUND
                    error = weight[r, k] - level * scale
                    total += importance[k] * error * error
            out[r, t] = total


@njit(nogil=True, cache=True)
def choose(table, ratios, base, units, chosen, code):  # type: ignore[no-untyped-def]
    """Of some maxima the one on whose scales all rows lose least together, and the code of each row's scale.

    table, ratios, base: see `losses`, ratios falling; between two of them a loss is interpolated. units: float32
    [maxima], a 256th of each, in fp16. Written: `chosen` int64 [1], `code` uint8 [rows].
    """
    least, tried = np.float64(np.inf), ratios.shape[0]
    own = np.empty(table.shape[0], np.uint8)
    for m in range(units.shape[0]):
        total = np.float64(0)
        for r in range(table.shape[0]):
            best, at = INFINITE, LEVELS - 1
            if base[r] > 0:
                for s in range(LEVELS):
                    ratio = np.float32((s + 1) * (s + 1)) * units[m] / base[r]
                    loss = _between(table[r], ratios, tried, ratio)
                    if loss < best:
                        best, at = loss, s
                total += np.float64(best)
            else:
                at = 0
            own[r] = at
        if total < least:
            least = total
            chosen[0] = m
            code[:] = own


@njit(nogil=True, cache=True, inline="always")
def _between(row, ratios, tried, ratio):  # type: ignore[no-untyped-def]
    """The loss at a ratio: beyond the largest it grows like a step's square, below the smallest it is not known."""
    if ratio >= ratios[0]:
        beyond = ratio / ratios[0]
        return row[0] * beyond * beyond
    if ratio < ratios[tried - 1]:
        return INFINITE
    # Ratios lie at equal distances.
    place = (ratios[0] - ratio) / (ratios[0] - ratios[tried - 1]) * np.float32(tried - 1)
    i = min(int(place), tried - 2)
    part = place - np.float32(i)
    return row[i] + part * (row[i + 1] - row[i])
