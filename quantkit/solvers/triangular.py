"""Cholesky's factor in place, and systems of equations with it: matrix products, and kernels for what is left.

Nothing here depends on the number of threads: products whose inner dimension is a block's do not, and the kernels' sums
have a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.kernels.cholesky import factor_corner
from quantkit.kernels.cholesky import substitute as kernel
from quantkit.solvers.projection import arrays
from quantkit.solvers.threads import over_rows

PANEL = 512  # columns whose updates reach the rest of the matrix in one product
STEP = 128  # columns that are factored at a time


def cholesky(matrix: Tensor) -> bool:
    """The lower factor in place of the matrix, float32 [n, n], zeros above; False, and rubbish, where there is none.

    Reads the lower triangle. Holds a panel beside the matrix, where torch's own holds one or two copies.
    """
    n = matrix.shape[0]
    for left in range(0, n, PANEL):
        right = min(left + PANEL, n)
        for start in range(left, right, STEP):
            stop = min(start + STEP, right)
            corner = matrix[start:stop, start:stop].contiguous()
            if not _corner(corner):
                return False
            matrix[start:stop, start:stop] = corner
            if stop == n:
                break
            below = substitute(corner.mT, matrix[stop:, start:stop])
            matrix[stop:, start:stop] = below
            if stop < right:
                matrix[stop:, stop:right].addmm_(below, below[: right - stop].mT, alpha=-1)
        for start in range(right, n, PANEL):
            stop = min(start + PANEL, n)
            block = matrix[start:, left:right]
            matrix[start:, start:stop].addmm_(block, block[: stop - start].mT, alpha=-1)
    matrix.tril_()
    return True


def _corner(corner: Tensor) -> bool:
    if corner.device.type == "cpu":
        return bool(factor_corner(*arrays(corner)))
    factor, info = torch.linalg.cholesky_ex(corner)
    corner.copy_(factor)
    return int(info) == 0


def substitute(upper: Tensor, right: Tensor) -> Tensor:
    """X with X·upper = right, a new float32 [rows, n]. upper: float32 [n, n], triangular, a block's size."""
    if right.device.type != "cpu":
        solved: Tensor = torch.linalg.solve_triangular(upper, right, upper=True, left=False)
        return solved
    x = right.contiguous() if not right.is_contiguous() else right.clone()
    over_rows(x.shape[0], kernel, *arrays(upper.contiguous(), x))
    return x


def inverse_diagonal(lower: Tensor, pivots: Tensor) -> Tensor:
    """float32 [n], the diagonal of (L·D²·Lᵀ)⁻¹ = L⁻ᵀ·D⁻²·L⁻¹, from panels of L⁻¹ that are not kept.

    lower: L, float32 [n, n], unit lower triangular; pivots: D, float32 [n].
    """
    n = lower.shape[0]
    weights = pivots.square().reciprocal()
    diagonal = torch.empty_like(pivots)
    for left in range(0, n, PANEL):
        right = min(left + PANEL, n)
        inverse = lower.new_zeros((n - left, right - left))  # rows left … n − 1 of columns left … right − 1 of L⁻¹
        inverse.diagonal().fill_(1)
        for start in range(left, n, STEP):
            stop = min(start + STEP, n)
            # X with L·X = B is the transpose of X' with X'·Lᵀ = B'.
            block = substitute(lower[start:stop, start:stop].mT, inverse[start - left : stop - left].mT).mT
            inverse[start - left : stop - left] = block
            inverse[stop - left :].addmm_(lower[stop:, start:stop], block, alpha=-1)
        diagonal[left:right] = inverse.square_().mul_(weights[left:, None]).sum(0)
    return diagonal


def solve_symmetric(lower: Tensor, pivots: Tensor, right: Tensor) -> None:
    """X with X·(L·D²·Lᵀ) = right, in place of `right`, float32 [rows, n].

    lower: L, float32 [n, n], unit lower triangular; pivots: D, float32 [n].
    """
    n = lower.shape[0]
    for start in range(0, n, STEP):  # Y·Lᵀ = right
        stop = min(start + STEP, n)
        block = substitute(lower[start:stop, start:stop].mT, right[:, start:stop])
        right[:, start:stop] = block
        right[:, stop:].addmm_(block, lower[stop:, start:stop].mT, alpha=-1)
    right /= pivots.square()
    for stop in range(n, 0, -STEP):  # X·L = Y, a block's columns from the last to the first
        start = max(0, stop - STEP)
        block = substitute(lower[start:stop, start:stop].flip(0, 1), right[:, start:stop].flip(1)).flip(1)
        right[:, start:stop] = block
        right[:, :start].addmm_(block, lower[start:stop, :start], alpha=-1)
