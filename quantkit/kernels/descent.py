"""Coordinate descent on codes: the part inside a block of columns."""

from __future__ import annotations

import numpy as np
from numba import njit

from quantkit.kernels.columns import nearest

# A step must win more than rounding errors of the gradient can pretend: a part of its own curvature.
MARGIN = np.float32(1e-3)


@njit(nogil=True, cache=True, inline="always")
def add_product(c, a, b):  # type: ignore[no-untyped-def]
    """c + a · b of three float32, rounded once, as torch's `add_(b, alpha=a)` is."""
    return np.float32(np.float64(c) + np.float64(a) * np.float64(b))


@njit(nogil=True, cache=True, error_model="numpy")  # where bend · scale is nothing, the code is one all the same
def descend_block(  # type: ignore[no-untyped-def]
    gradient, curvature, first, group, top, scales, zeros, masked, keep, codes, errors
):
    """One visit to every column of a block: in every row its code becomes the best one, all others fixed. A column
    without inputs is rounded to nearest.

    Columns first … first + width − 1 of the weight. gradient: float32 [rows, width], errors @ H of these columns,
    changed. curvature: float32 [width, width], H of these columns. group: int32 [n], top: float32 [n]; scales, zeros:
    float32 [rows, groups]; keep: bool [rows, n] if `masked`. Changed: `codes` uint8, `errors` float32, both [rows, n].
    """
    width = gradient.shape[1]
    for r in range(codes.shape[0]):
        slope = gradient[r]
        for k in range(width):
            c = first + k
            bend = curvature[k, k]
            if bend < 0 or (masked and not keep[r, c]):
                continue
            scale = scales[r, group[c]]
            zero = zeros[r, group[c]]
            level = np.float32(codes[r, c]) - zero
            if bend == 0:
                better = nearest(level + errors[r, c] / scale, -zero, top[c] - zero)
                codes[r, c] = np.uint8(better + zero)
                errors[r, c] -= (better - level) * scale
                continue
            better = nearest(level + slope[k] / (bend * scale), -zero, top[c] - zero)
            if better == level:
                continue
            move = (better - level) * scale
            if np.float32(2) * move * slope[k] <= (np.float32(1) + MARGIN) * move * move * bend:
                continue
            codes[r, c] = np.uint8(better + zero)
            errors[r, c] -= move
            beside = curvature[k]
            for j in range(k + 1, width):  # no column is visited twice
                slope[j] -= move * beside[j]


@njit(nogil=True, cache=True)
def damp_block(hessian, errors, first, ridge, gradient, curvature):  # type: ignore[no-untyped-def]
    """What `descend_block` reads of a block of columns, from H and errors @ H, where the loss has a ridge.

    hessian: float32 [n, n]; errors: float32 [rows, n]; ridge: float32. Changed: `gradient` float32 [rows, width].
    Written: `curvature` float32 [width, width].
    """
    width = gradient.shape[1]
    for k in range(width):
        for j in range(width):
            curvature[k, j] = hessian[first + k, first + j]
        curvature[k, k] += ridge
    for r in range(gradient.shape[0]):
        for k in range(width):
            gradient[r, k] = add_product(gradient[r, k], ridge, errors[r, first + k])
