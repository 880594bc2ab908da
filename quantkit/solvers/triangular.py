"""Cholesky's factor in place, and systems of equations with it: matrix products, and kernels for what is left."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.kernels.cholesky import factor_corner, substitute_unit
from quantkit.kernels.cholesky import substitute as kernel
from quantkit.solvers.projection import arrays
from quantkit.solvers.team import ALONE, Team
from quantkit.solvers.threads import in_threads, runs

PANEL = 512  # columns that are factored before the next ones are looked at
STEP = 128  # columns that are factored by a kernel
ROWS = 256  # rows of a panel to a thread
WORTH = 1024  # columns from which on a team shares a factor: what a smaller one takes is less than to wait for others


def cholesky(matrix: Tensor, team: Team = ALONE) -> bool:
    """The lower factor in place of the matrix, float32 [n, n], zeros above; False, and rubbish, where there is none.
    team: whose processes all have this matrix.

    Reads the lower triangle. Holds a panel beside the matrix, where torch's own holds one or two copies.
    """
    n = matrix.shape[0]
    if n < WORTH or matrix.device.type != "cpu":
        team = ALONE
    for left in range(0, n, PANEL):
        right = min(left + PANEL, n)
        done, panel = matrix[left:right, :left], matrix[:, left:right]

        def update(rows: slice, done: Tensor = done, panel: Tensor = panel, left: int = left) -> None:
            panel[rows].addmm_(matrix[rows, :left], done.mT, alpha=-1)

        def finish(rows: slice, panel: Tensor = panel, left: int = left, right: int = right) -> None:
            if left:
                update(rows)
            panel[rows] = substitute(matrix[left:right, left:right].mT, panel[rows])

        if left:
            team.compute(update, runs(left, right, STEP, matrix.device), [panel], matrix.device)
        if not in_threads(_corner, [matrix[left:right, left:right]], matrix.device)[0]:
            return False
        team.compute(finish, runs(right, n, ROWS, matrix.device), [panel], matrix.device)
    in_threads(lambda rows: matrix[rows].tril_(rows.start), runs(0, n, ROWS, matrix.device), matrix.device)
    return True


def _corner(matrix: Tensor) -> bool:
    """The lower factor of one panel's corner in its place, zeros above."""
    if matrix.device.type != "cpu":
        factor, info = torch.linalg.cholesky_ex(matrix)
        matrix.copy_(factor)
        return int(info) == 0
    n = matrix.shape[0]
    for start in range(0, n, STEP):
        stop = min(start + STEP, n)
        corner = matrix[start:stop, start:stop].contiguous()
        if not factor_corner(*arrays(corner)):
            return False
        matrix[start:stop, start:stop] = corner
        below = substitute(corner.mT, matrix[stop:, start:stop])
        matrix[stop:, start:stop] = below
        matrix[stop:, stop:].addmm_(below, below.mT, alpha=-1)
    matrix.tril_()
    return True


def substitute(upper: Tensor, right: Tensor) -> Tensor:
    """X with X·upper = right, a new float32 [rows, n]. upper: float32 [n, n], upper triangular."""
    if right.device.type != "cpu":
        solved: Tensor = torch.linalg.solve_triangular(upper, right, upper=True, left=False)
        return solved
    x = right.clone(memory_format=torch.contiguous_format)
    for start in range(0, upper.shape[0], STEP):
        stop = min(start + STEP, upper.shape[0])
        block = x[:, start:stop].contiguous()
        kernel(*arrays(upper[start:stop, start:stop].contiguous(), block))
        x[:, start:stop] = block
        x[:, stop:].addmm_(block, upper[start:stop, stop:], alpha=-1)
    return x


def solve_symmetric(lower: Tensor, pivots: Tensor, right: Tensor) -> None:
    """X with X·(L·D²·Lᵀ) = right, in place of `right`, float32 [rows, n].

    lower: L, float32 [n, n], unit lower triangular; pivots: D, float32 [n].
    """
    n = lower.shape[0]
    solve = _block_numba if right.device.type == "cpu" else _block_torch
    for start in range(0, n, STEP):  # Y·Lᵀ = right
        stop = min(start + STEP, n)
        solve(lower, right, start, stop, False)
        right[:, stop:].addmm_(right[:, start:stop], lower[stop:, start:stop].mT, alpha=-1)
    right /= pivots.square()
    for stop in range(n, 0, -STEP):  # X·L = Y, a block's columns from the last to the first
        start = max(0, stop - STEP)
        solve(lower, right, start, stop, True)
        right[:, :start].addmm_(right[:, start:stop], lower[start:stop, :start], alpha=-1)


def _block_numba(lower: Tensor, right: Tensor, start: int, stop: int, backward: bool) -> None:
    substitute_unit(*arrays(lower, right), start, stop, backward)


def _block_torch(lower: Tensor, right: Tensor, start: int, stop: int, backward: bool) -> None:
    block, own = right[:, start:stop], lower[start:stop, start:stop]
    if backward:
        block.copy_(substitute(own.flip(0, 1), block.flip(1)).flip(1))
    else:
        block.copy_(substitute(own.mT, block))
