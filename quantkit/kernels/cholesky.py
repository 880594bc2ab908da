"""The parts of a blocked Cholesky factorization that are not matrix products, each sum in one fixed order.

LAPACK's own give different last digits for different numbers of threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit

TILE = 64


@njit(nogil=True, cache=True)
def factor_corner(corner):  # type: ignore[no-untyped-def]
    """The lower factor L of `corner` = L·Lᵀ, float32 [n, n], in its place, zeros above; whether there is one.

    Reads the lower triangle. Row by row, so that what is subtracted lies side by side.
    """
    n = corner.shape[0]
    for k in range(n):
        for j in range(k):
            corner[j, k] = corner[k, j]
    # Upper form, Rᵀ·R with R = Lᵀ: row k leaves its product with itself in the rows below.
    for k in range(n):
        pivot = corner[k, k]
        if not (pivot > 0 and pivot < np.inf):
            return False
        root = np.sqrt(pivot)
        top = corner[k]
        for j in range(k, n):
            top[j] /= root
        for i in range(k + 1, n):
            part = top[i]
            row = corner[i]
            for j in range(i, n):
                row[j] -= part * top[j]
    for k in range(n):
        for j in range(k):
            corner[k, j] = corner[j, k]
            corner[j, k] = 0
    return True


@njit(nogil=True, cache=True)
def substitute(upper, rows):  # type: ignore[no-untyped-def]
    """X·U = B for every row of B, float32 [rows, n], in place. U: float32 [n, n], upper triangular.

    TILE rows at a time, turned: what is done to a number lies beside what is done to the next row's.
    """
    n = upper.shape[0]
    tile = np.empty((n, TILE), np.float32)
    for first in range(0, rows.shape[0], TILE):
        count = min(TILE, rows.shape[0] - first)
        tile[:, count:] = 0
        for r in range(count):
            for j in range(n):
                tile[j, r] = rows[first + r, j]
        for k in range(n):
            for j in range(k):
                part = upper[j, k]
                for r in range(TILE):
                    tile[k, r] -= part * tile[j, r]
            pivot = upper[k, k]
            for r in range(TILE):
                tile[k, r] /= pivot
        for r in range(count):
            for j in range(n):
                rows[first + r, j] = tile[j, r]


@njit(nogil=True, cache=True)
def substitute_unit(lower, right, first, last, backward):  # type: ignore[no-untyped-def]
    """Columns first … last − 1 of `right` float32 [rows, n], in place: X·Lᵀ = B with this block of L, or X·L = B if
    `backward`. lower: L, float32 [n, n], unit lower triangular. TILE rows at a time, turned, as above."""
    width = last - first
    tile = np.empty((width, TILE), np.float32)
    for start in range(0, right.shape[0], TILE):
        count = min(TILE, right.shape[0] - start)
        tile[:, count:] = 0
        for r in range(count):
            for j in range(width):
                tile[j, r] = right[start + r, first + j]
        if backward:
            for k in range(width - 1, -1, -1):
                for j in range(width - 1, k, -1):
                    part = lower[first + j, first + k]
                    for r in range(TILE):
                        tile[k, r] -= part * tile[j, r]
        else:
            for k in range(width):
                for j in range(k):
                    part = lower[first + k, first + j]
                    for r in range(TILE):
                        tile[k, r] -= part * tile[j, r]
        for r in range(count):
            for j in range(width):
                right[start + r, first + j] = tile[j, r]
