"""GPTQ: weights and the Hessian of their inputs in, codes that disturb the layer's output least out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quantkit.solvers.coded import Coded
from quantkit.solvers.columns import solve_columns
from quantkit.solvers.factor import Factor, factorize, mean_diagonal
from quantkit.solvers.grids import Columns, Grid, coded, search_scales
from quantkit.solvers.projection import Projection, residual, round_all, uniform
from quantkit.solvers.quadratic import row_losses, total
from quantkit.solvers.refine import descend, refit
from quantkit.solvers.team import ALONE, Team
from quantkit.solvers.threads import parts, runs
from quantkit.solvers.triangular import solve_symmetric

COLUMNS = 1024  # of a Hessian in one product: oneDNN copies what it reads of it, for each thread
Order = Literal["static", "none", "group"]


@dataclass(frozen=True)
class Settings:
    """How a weight is solved.

    grid: the codes. order, in which columns are rounded: "static", by falling diagonal of the Hessian, while groups
    remain runs of columns; "none", from the first to the last; "group", by falling diagonal, and groups are runs of
    that order (desc_act: a reader looks up the group of every column). damp: added to the diagonal, in units of its
    mean. refits: how often the scales are fitted to the codes afterwards. passes: visits of coordinate descent to every
    code after each refit; or once, if there are no refits.

    The defaults lost least on inputs not seen for the time they take (SmolLM2-135M, 12 matrices, group size 64; loss
    relative to refits=0): 0.953 at 4 bits and 0.952 at 3; refits=4, passes=2 reaches 0.940 and 0.936 in twice the time,
    refits=8 no more. damp=0.01 loses 0.8 % more at either, 0.06 as little as 0.03.
    """

    grid: Grid
    order: Order = "static"
    damp: float = 0.03
    passes: int = 1
    refits: int = 2


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


class Restorable(Protocol):
    """Codes of whatever kind (`Coded`, `Exl2Coded`)."""

    def restore(self) -> npt.NDArray[np.float32]: ...


C = TypeVar("C", bound=Restorable, covariant=True)


@dataclass(frozen=True)
class Solved(Generic[C]):
    """A weight's codes, and how they came about."""

    coded: C
    report: Report


def processing_order(hessian: Tensor, order: Order) -> Tensor:
    """int64 [columns]: the columns, the one to be rounded first in front."""
    if order == "none":
        return torch.arange(hessian.shape[0], device=hessian.device)
    return hessian.diagonal().argsort(descending=True, stable=True)


def factor_for(hessian: Tensor, settings: Settings, team: Team = ALONE) -> Factor | None:
    """What `solve` would compute from the Hessian: for several weights with the same inputs, once. None: a fallback."""
    with torch.no_grad():
        return factorize(hessian, processing_order(hessian, settings.order), settings.damp, team)


def solve(
    weight: Tensor,
    hessian: Tensor,
    settings: Settings,
    *,
    target: Tensor | None = None,
    keep: Tensor | None = None,
    factor: Factor | None = None,
    team: Team = ALONE,
) -> Solved[Coded]:
    """The codes of a linear layer.

    weight: [rows = out, columns = in] of any float type, finite. hessian: float32 [columns, columns], contiguous, of
    inputs x Σ x·xᵀ in any unit; left as it is; beside it one more matrix of its size is held. target: as the weight,
    what to come near to instead of it. keep: bool like the weight, false where it is pruned: its code is the zero
    point. factor: from `factor_for` of the same Hessian and settings. team: who shares the rows. All on one device.
    Never raises for what the Hessian holds.
    """
    target = weight if target is None else target
    assert hessian.dtype == torch.float32
    with torch.no_grad():
        return _solve(weight.detach(), hessian, settings, target.detach(), keep, factor, team)


class _Rows:
    """What is found row by row: codes, scales, zeros; what each row loses with them, and rounded to nearest on the
    scales that were searched. Made as a whole: results of parts would lie scattered between freed memory of others."""

    def __init__(self, weight: Tensor, groups: int) -> None:
        rows, columns = weight.shape
        self.codes = torch.empty((rows, columns), dtype=torch.uint8, device=weight.device)
        self.scales = torch.empty((rows, groups), dtype=torch.float16, device=weight.device)
        self.zeros = torch.empty((rows, groups), dtype=torch.uint8, device=weight.device)
        self.losses, self.nearest_losses, self.sizes = torch.zeros((3, rows), dtype=torch.float64, device=weight.device)


def _solve(
    weight: Tensor,
    hessian: Tensor,
    settings: Settings,
    target: Tensor,
    keep: Tensor | None,
    factor: Factor | None,
    team: Team,
) -> Solved[Coded]:
    grid = settings.grid
    order = processing_order(hessian, settings.order)
    factor = factorize(hessian, order, settings.damp) if factor is None else factor
    importance = None if factor is None else hessian.diagonal() / factor.scale + settings.damp
    group = grid.natural(weight.shape[1], weight.device)
    if settings.order == "group":
        group = torch.empty_like(group).index_copy(0, order, group)
    columns = Columns.of(grid, group, importance)
    scale = mean_diagonal(hessian)
    found = _Rows(weight, grid.groups(weight.shape[1]))

    def some(rows: slice, factor: Factor | None) -> None:
        aim, kept = target[rows].float(), None if keep is None else keep[rows]
        scales, found.zeros[rows] = search_scales(aim if kept is None else aim * kept, grid, columns)
        projection = uniform(grid.bits, scales, found.zeros[rows], group, kept)
        codes = round_all(aim, projection)
        found.sizes[rows] = row_losses(weight[rows].float(), hessian, scale)
        found.nearest_losses[rows] = row_losses(residual(aim, codes, projection), hessian, scale)
        if factor is not None:
            projection, codes = _refined(aim, hessian, projection, factor, settings)
            found.losses[rows] = row_losses(residual(aim, codes, projection), hessian, scale)
        found.codes[rows], found.scales[rows] = codes, projection.scales.half()

    def solve_rows(factor: Factor | None) -> None:
        rows = parts(weight.shape[0], weight.device, weight.shape[1])
        made = (found.codes, found.scales, found.zeros, found.losses, found.nearest_losses, found.sizes)
        team.compute(partial(some, factor=factor), rows, made, weight.device)

    solve_rows(factor)
    report = report_of(found.sizes, found.losses, found.nearest_losses, hessian, factor)
    if report.kept_rtn:
        solve_rows(None)
    return Solved(coded(grid, found.codes, found.scales, found.zeros, group), report)


def report_of(sizes: Tensor, losses: Tensor, nearest_losses: Tensor, hessian: Tensor, factor: Factor | None) -> Report:
    """From float64 [rows] each: w·H·wᵀ of the weight, and what is lost as it was solved and rounded to nearest."""
    size, loss, rtn_loss = total(sizes), total(losses), total(nearest_losses)
    ours = factor is not None and loss < rtn_loss
    unit, known = size if size > 0 else 1.0, size < float("inf")
    return Report(
        loss=(loss if ours else rtn_loss) / unit if known else None,
        rtn_loss=rtn_loss / unit if known else None,
        damp=0.0 if factor is None else factor.damp,
        fallback=factor is None,
        kept_rtn=factor is not None and not ours,
        dead=int((hessian.diagonal() == 0).sum()),
    )


def _refined(
    target: Tensor, hessian: Tensor, projection: Projection, factor: Factor, settings: Settings
) -> tuple[Projection, Tensor]:
    codes = solve_columns(target, factor, projection)
    ridge = factor.damp * factor.scale
    for _ in range(max(settings.refits, 1)):
        if settings.refits:
            projection = refit(target, hessian, projection, codes, ridge)
        for _ in range(settings.passes):
            descend(target, hessian, projection, codes, ridge)
    return projection, codes


def ridge_factor(hessian: Tensor, ridge: float, team: Team = ALONE) -> Factor | None:
    """What `step_toward` needs of a Hessian, for all weights with these inputs."""
    with torch.no_grad():
        return factorize(hessian, torch.arange(hessian.shape[0] - 1, -1, -1, device=hessian.device), ridge, team)


def step_toward(weight: Tensor, hessian: Tensor, cross: Tensor, factor: Factor | None, team: Team = ALONE) -> Tensor:
    """(G − W·H)·(H + ridge·mean(diag H)·I)⁻¹, float32 [rows, columns], in place of G: how far the weight must go to
    make up for inputs that are not those it was trained on.

    cross: G float32 [rows, columns], contiguous, Σ y·xᵀ of the outputs y wanted and the inputs x there are, in the unit
    of H = Σ x·xᵀ. factor: of `ridge_factor`; nothing where there is none.
    """
    with torch.no_grad():
        if factor is None:
            return cross.zero_()

        def part(rows: slice) -> None:
            missing, own = cross[rows], weight[rows].float()
            for columns in runs(0, len(hessian), COLUMNS, hessian.device):
                missing[:, columns].addmm_(own, hessian[:, columns], alpha=-1)
            missing.div_(factor.scale)
            missing[:, factor.dead] = 0
            solve_symmetric(factor.lower, factor.pivots, missing)

        team.compute(part, parts(weight.shape[0], weight.device, weight.shape[1]), [cross], weight.device)
        return cross
