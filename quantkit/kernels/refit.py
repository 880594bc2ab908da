"""Scales fitted to the codes that a group of columns has: what is done row by row."""

from __future__ import annotations

import numpy as np
from numba import njit

from quantkit.kernels.descent import MARGIN, add_product
from quantkit.kernels.scales import to_half

NOTHING = np.float32(2.0**-25)  # the largest number of which the nearest float16 is 0


@njit(nogil=True, cache=True)
def take_levels(codes, zeros, group, columns, levels):  # type: ignore[no-untyped-def]
    """levels[r, k] = code − zero point of a group's columns. codes: uint8 [rows, n]; zeros: float32 [rows, groups];
    columns: int64 [width]; levels: float32 [rows, width]."""
    for r in range(codes.shape[0]):
        zero = zeros[r, group]
        for k in range(columns.size):
            levels[r, k] = np.float32(codes[r, columns[k]]) - zero


@njit(nogil=True, cache=True)
def fit_group(  # type: ignore[no-untyped-def]
    gradient, products, levels, ridge, group, columns, middles, allowed, scales, errors
):
    """The best scale of a group in every row, all others fixed, taken where the loss falls.

    gradient, products: float32 [rows, width], the errors and the levels, times H of these columns, without the ridge,
    a float32. levels: as `take_levels` gives them. group: its number; columns: int64 [width]. allowed: float32 [m], the
    scales that can be written, rising, and middles: float64 [m − 1], what lies between them; m = 0: the float16 next to
    what is best is taken, unless it is 0. Changed: `scales` float32 [rows, groups] and `errors` float32 [rows, n].
    """
    one = np.empty(1, np.float32)
    bits = one.view(np.uint32)
    for r in range(levels.shape[0]):
        slope, bend = 0.0, 0.0
        for k in range(columns.size):
            level = levels[r, k]
            slope += np.float64(add_product(gradient[r, k], ridge, errors[r, columns[k]])) * np.float64(level)
            bend += np.float64(add_product(products[r, k], ridge, level)) * np.float64(level)
        if not bend > 0:
            continue
        scale = scales[r, group]
        wanted = np.float64(scale) + slope / bend
        if allowed.size:
            place = 0
            while place < middles.size and middles[place] < wanted:
                place += 1
            better = allowed[place]
        else:
            one[0] = wanted
            if abs(one[0]) <= NOTHING:
                continue
            to_half(one, bits)
            better = one[0]
        move = better - scale
        far = np.float64(move)
        if better != 0 and 2 * far * slope > (1.0 + np.float64(MARGIN)) * far * far * bend:
            scales[r, group] = better
            for k in range(columns.size):
                errors[r, columns[k]] -= levels[r, k] * move
