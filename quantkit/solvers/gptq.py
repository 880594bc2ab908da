"""GPTQ: weights and the Hessian of their inputs in, codes that disturb the layer's output least out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantkit.solvers.coded import Coded
from quantkit.solvers.columns import solve_columns
from quantkit.solvers.factor import Factor, factorize, mean_diagonal
from quantkit.solvers.grids import Grid, coded, search_scales
from quantkit.solvers.projection import Projection, residual, round_all, uniform
from quantkit.solvers.quadratic import row_losses, total
from quantkit.solvers.refine import descend, refit
from quantkit.solvers.triangular import solve_symmetric

Order = Literal["static", "none", "group"]


@dataclass(frozen=True)
class Settings:
    """How a weight is solved.

    grid: the codes. order, in which columns are rounded: "static", by falling diagonal of the Hessian, while groups
    remain runs of columns; "none", from the first to the last; "group", by falling diagonal, and groups are runs of
    that order (desc_act: a reader looks up the group of every column). damp: added to the diagonal, in units of its
    mean. passes: visits of coordinate descent to every code afterwards. refits: how often the scales are fitted to the
    codes, before the first, second … of these passes.
    """

    grid: Grid
    order: Order = "static"
    damp: float = 0.01
    passes: int = 0
    refits: int = 0


@dataclass(frozen=True)
class Report:
    """How a weight was solved.

    loss: tr(E·H·Eᵀ) / tr(W·H·Wᵀ) with E = target − ŵ; rtn_loss: the same if every weight is rounded to nearest on the
    scales that were searched. Both are None where the Hessian is not finite, and absolute where W·H is nothing.
    damp: what was added in the end, 0 in a fallback. fallback: the Hessian was of no use, and the weight is rounded to
    nearest. kept_rtn: it was, but rounding to nearest lost less, and is what was returned. dead: columns that never
    had an input; they are rounded to nearest.
    """

    loss: float | None
    rtn_loss: float | None
    damp: float
    fallback: bool
    kept_rtn: bool
    dead: int


@dataclass(frozen=True)
class Solved:
    """A weight's codes, and how they came about."""

    coded: Coded
    report: Report


def processing_order(hessian: Tensor, order: Order) -> Tensor:
    """int64 [columns]: the columns, the one to be rounded first in front."""
    if order == "none":
        return torch.arange(hessian.shape[0], device=hessian.device)
    return hessian.diagonal().argsort(descending=True, stable=True)


def factor_for(hessian: Tensor, settings: Settings) -> Factor | None:
    """What `solve` would compute from the Hessian: for several weights with the same inputs, once. None: a fallback."""
    with torch.no_grad():
        return factorize(hessian, processing_order(hessian, settings.order), settings.damp)


def solve(
    weight: Tensor,
    hessian: Tensor,
    settings: Settings,
    *,
    target: Tensor | None = None,
    keep: Tensor | None = None,
    factor: Factor | None = None,
) -> Solved:
    """The codes of a linear layer.

    weight: float32 [rows = out, columns = in], finite. hessian: float32 [columns, columns], Σ x·xᵀ over inputs x, in
    any unit; left as it is; beside it one more matrix of its size is held. target: float32 like the weight, what to
    come near to instead of it. keep: bool like the weight, false where it is pruned: its code is the zero point.
    factor: from `factor_for` of the same Hessian and settings. All on one device. Never raises for what the Hessian
    holds.
    """
    target = weight if target is None else target
    assert weight.dtype == hessian.dtype == target.dtype == torch.float32
    with torch.no_grad():
        return _solve(weight, hessian, settings, target, keep, factor)


def _solve(
    weight: Tensor, hessian: Tensor, settings: Settings, target: Tensor, keep: Tensor | None, factor: Factor | None
) -> Solved:
    grid = settings.grid
    order = processing_order(hessian, settings.order)
    factor = factorize(hessian, order, settings.damp) if factor is None else factor
    group = grid.natural(weight.shape[1], weight.device)
    if settings.order == "group":
        group = torch.empty_like(group).index_copy(0, order, group)
    # Damped like the Hessian, so that a column without inputs still counts a little.
    importance = None if factor is None else hessian.diagonal() / factor.scale + settings.damp
    scales, zeros = search_scales(target if keep is None else target * keep, grid, importance, group)
    searched = uniform(grid.bits, scales, zeros, group, keep)
    nearest = (searched, round_all(target, searched))
    dead = int((hessian.diagonal() == 0).sum())
    if factor is None:
        chosen, loss, rtn_loss = _better(weight, target, hessian, nearest, nearest)
        report = Report(loss, rtn_loss, 0.0, True, False, dead)
    else:
        codes, damp = solve_columns(target, factor, searched), factor.damp
        del factor  # before what follows asks for memory
        ours = _refined(target, hessian, searched, codes, settings)
        chosen, loss, rtn_loss = _better(weight, target, hessian, ours, nearest)
        report = Report(loss, rtn_loss, damp, False, chosen is nearest, dead)
    return Solved(coded(grid, chosen[1], chosen[0].scales.half(), zeros, group), report)


def _refined(
    target: Tensor, hessian: Tensor, projection: Projection, codes: Tensor, settings: Settings
) -> tuple[Projection, Tensor]:
    for turn in range(max(settings.passes, settings.refits)):
        if turn < settings.refits:
            projection = refit(target, hessian, projection, codes)
        if turn < settings.passes:
            descend(target, hessian, projection, codes)
    return projection, codes


def _better(
    weight: Tensor,
    target: Tensor,
    hessian: Tensor,
    ours: tuple[Projection, Tensor],
    nearest: tuple[Projection, Tensor],
) -> tuple[tuple[Projection, Tensor], float | None, float | None]:
    """The one of less loss; its loss and that of the nearest codes, relative to the weight's own size."""
    scale = mean_diagonal(hessian)
    size = total(row_losses(weight, hessian, scale))
    if not size < float("inf"):
        return nearest, None, None

    def loss(of: tuple[Projection, Tensor]) -> float:
        return total(row_losses(residual(target, of[1], of[0]), hessian, scale)) / (size if size > 0 else 1.0)

    rtn_loss = loss(nearest)
    our_loss = rtn_loss if ours is nearest else loss(ours)
    return (ours, our_loss, rtn_loss) if our_loss < rtn_loss else (nearest, rtn_loss, rtn_loss)


def shift_target(weight: Tensor, hessian: Tensor, cross: Tensor, alpha: float, ridge: float) -> Tensor:
    """W + alpha·(G − W·H)·(H + ridge·mean(diag H)·I)⁻¹, float32 [rows, columns]: where the weight must go to make up
    for inputs that are not those it was trained on.

    cross: G float32 [rows, columns], Σ y·xᵀ of the outputs y wanted and the inputs x there are, in the unit of H = Σ
    x·xᵀ. alpha: the part of the way that is gone. The weight itself where the Hessian has no factor. One more matrix of
    the Hessian's size is held.
    """
    with torch.no_grad():
        factor = factorize(hessian, torch.arange(hessian.shape[0] - 1, -1, -1, device=hessian.device), ridge)
        if factor is None:
            return weight
        missing = torch.addmm(cross, weight, hessian, alpha=-1).div_(factor.scale)
        missing[:, factor.dead] = 0
        solve_symmetric(factor.lower, factor.pivots, missing)
        return torch.add(weight, missing, alpha=alpha)
