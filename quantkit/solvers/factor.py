"""The Hessian's Cholesky factor, in the order in which columns are rounded, within one matrix besides the Hessian."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.solvers.team import ALONE, Team
from quantkit.solvers.threads import in_threads, runs
from quantkit.solvers.triangular import cholesky

CHUNK = 256  # rows at a time


@dataclass(frozen=True)
class Factor:
    """H / mean(diag H) + damp · I = L·D²·Lᵀ by position; the column at the last position is rounded first.

    lower: float32 [n, n], L, unit lower triangular, zero above. pivots: float32 [n], D. position: int64 [n], the column
    at each position. scale: mean(diag H) over live columns, as far as it is positive. damp: what was added in the end.
    dead: int64 [d], the columns without an input: they neither move nor are moved.
    """

    lower: Tensor
    pivots: Tensor
    position: Tensor
    scale: float
    damp: float
    dead: Tensor


def dampings(damp: float) -> Iterator[float]:
    """What is added to a unit mean diagonal, in the order tried: `damp`, then tenfold from at least 1e-4 up to 1000.

    Rounding errors of a sum of squares stay far below the mean, so whatever is left at 1 is no Hessian any more.
    """
    yield damp
    more = max(damp, 1e-5)
    while more < 1e3:
        more = min(more * 10, 1e3)
        yield more


def factorize(hessian: Tensor, order: Tensor, damp: float, team: Team = ALONE) -> Factor | None:
    """The factor of a Hessian Σ x·xᵀ, float32 [n, n], symmetric, which is left as it is; None if there is none.

    order: int64 [n], a permutation; order[0] is rounded first. damp: in units of the mean of the diagonal. team:
    whose processes all have this Hessian, and get this factor.
    Never raises for what a Hessian holds: where it is singular or worse the damping grows as `dampings` says; where a
    number is not finite, or no damping helps, the answer is None. One new n × n matrix.
    """
    dead = hessian.diagonal() == 0
    scale = mean_diagonal(hessian)
    position = order.flip(0)
    lower = torch.empty_like(hessian)
    for more in dampings(damp):
        if not _gather(hessian, position, scale, lower):
            return None
        _isolate(lower, dead[position])
        lower.diagonal().add_(more)
        if cholesky(lower, team):
            pivots = lower.diagonal().clone()
            if _divide(lower, pivots):
                return Factor(lower, pivots, position, scale, more, dead.nonzero().flatten())
    return None


def mean_diagonal(hessian: Tensor) -> float:
    """The mean of the positive part of the diagonal, or 1 where there is none: what damping is measured in."""
    diagonal = hessian.diagonal().double().cpu().numpy()
    live = diagonal[diagonal > 0]
    mean = float(live.mean()) if live.size else 1.0
    return mean if mean > 1e-38 else 1.0


def _gather(hessian: Tensor, position: Tensor, scale: float, out: Tensor) -> bool:
    """out = hessian[position][:, position] / scale, some rows at a time; whether everything is finite."""

    def some(rows: slice) -> bool:
        found = hessian.index_select(0, position[rows])
        torch.index_select(found, 1, position, out=out[rows])
        out[rows] /= scale
        return bool(torch.isfinite(found).all())

    return all(in_threads(some, runs(0, out.shape[0], CHUNK, out.device), out.device))


def _divide(lower: Tensor, pivots: Tensor) -> bool:
    """Every column by its pivot; whether everything is finite."""

    def some(rows: slice) -> bool:
        lower[rows] /= pivots
        return bool(torch.isfinite(lower[rows]).all())

    return all(in_threads(some, runs(0, lower.shape[0], CHUNK, lower.device), lower.device))


def _isolate(matrix: Tensor, dead: Tensor) -> None:
    """Rows and columns of dead inputs become those of the identity."""
    if bool(dead.any()):
        matrix[dead] = 0
        matrix[:, dead] = 0
        matrix.diagonal()[dead] = 1
