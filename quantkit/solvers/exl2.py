"""EXL2 weights solved: GPTQ's loop over groups of other widths, on scales that are 4-bit parts of a group's maximum.

What differs from solvers.gptq is the grid. A group is of some inputs and all outputs, so that its maximum is chosen for
all rows at once; and a scale can be refitted only to one of the sixteen that its maximum allows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from quantkit.kernels.exl2_scales import LEVELS
from quantkit.solvers.columns import solve_columns
from quantkit.solvers.exl2_coded import Exl2Coded, Groups, real_scales
from quantkit.solvers.exl2_scales import search_alike, search_group
from quantkit.solvers.factor import Factor, factorize
from quantkit.solvers.gptq import Solved, processing_order, report_of
from quantkit.solvers.grids import normalized
from quantkit.solvers.projection import Projection, residual, round_all
from quantkit.solvers.quadratic import row_losses
from quantkit.solvers.refine import descend, middles, refit
from quantkit.solvers.team import ALONE, Team
from quantkit.solvers.threads import parts

AT_ONCE = 2**18  # scales that a GPU searches for at once: 200 MB of losses and places


@dataclass(frozen=True)
class Work:
    """How often scales are refitted, and how often every code is visited after that, or at all."""

    refits: int = 2
    passes: int = 1


def positions(hessian: Tensor) -> Tensor:
    """int64 [columns]: at which place of the stream each column is, the most active first."""
    return processing_order(hessian, "static").argsort()


@dataclass(frozen=True)
class _Scales:
    """codes uint8 [rows, groups], maxima fp16 [groups], and what they stand for, float32 [rows, groups]. levels:
    float32 [groups, 16], the scales that each maximum allows."""

    codes: Tensor
    maxima: Tensor
    real: Tensor
    levels: Tensor

    @staticmethod
    def of(codes: Tensor, maxima: Tensor) -> _Scales:
        every = np.arange(LEVELS, dtype=np.uint8)[:, None].repeat(len(maxima), 1)
        levels = torch.from_numpy(real_scales(every, maxima.cpu().numpy()).T.copy()).to(maxima.device)
        real = levels.gather(1, codes.T.long()).T.contiguous()
        return _Scales(codes, maxima, real, levels)


def nearest_level(levels: Tensor, wanted: Tensor) -> Tensor:
    """int64 [rows]: of rising levels, the one nearest to each number wanted."""
    return torch.searchsorted(middles(levels), wanted.double().contiguous())


def search(weight: Tensor, groups: Groups, group: Tensor, importance: Tensor | None, team: Team = ALONE) -> _Scales:
    """Scales for float32 [rows, columns], by column the group, on which rounding to nearest loses least, columns
    weighed by `importance` float32 [columns]."""
    weighing = normalized(importance, group)
    codes = torch.empty((len(groups.bits), weight.shape[0]), dtype=torch.uint8, device=weight.device)
    maxima = torch.empty(len(groups.bits), dtype=torch.float16, device=weight.device)

    by_group = group.long().argsort(stable=True)

    def some(run: slice) -> None:
        columns, bits = by_group[groups.starts[run.start] : groups.starts[run.stop]], groups.bits[run.start]
        own, count = weight[:, columns], run.stop - run.start
        if weight.device.type == "cpu":
            maxima[run], codes[run.start] = search_group(own, weighing[columns], bits)
        else:
            alike = own.reshape(len(own), count, -1).transpose(0, 1).contiguous()
            maxima[run], codes[run] = search_alike(alike, weighing[columns].reshape(count, -1), bits)

    most = 1 if weight.device.type == "cpu" else max(AT_ONCE // len(weight), 1)
    team.compute(some, _alike(groups, most), [codes, maxima], weight.device)
    return _Scales.of(codes.T.contiguous(), maxima)


def _alike(groups: Groups, most: int) -> list[slice]:
    """Runs of at most so many groups of one width and one size."""
    found: list[slice] = []
    kinds = list(zip(groups.bits, groups.rows, strict=True))
    for number, kind in enumerate(kinds):
        run = found[-1] if found else slice(0, 0)
        if run.stop and kinds[run.start] == kind and run.stop - run.start < most:
            found[-1] = slice(run.start, number + 1)
        else:
            found.append(slice(number, number + 1))
    return found


def nearest(weight: Tensor, groups: Groups, position: Tensor) -> Exl2Coded:
    """Every weight rounded for itself. weight: [rows, columns] of any float type; position: int64 [columns]."""
    group = _group(groups, position)
    scales = search(weight.float(), groups, group, None)
    codes = round_all(weight.float(), _projection(groups, group, scales, None))
    return _coded(groups, codes, scales, position)


def solve(
    weight: Tensor,
    hessian: Tensor,
    groups: Groups,
    factor: Factor | None,
    *,
    target: Tensor | None = None,
    keep: Tensor | None = None,
    work: Work = Work(),
    damp: float = 0.03,
    team: Team = ALONE,
) -> Solved[Exl2Coded]:
    """The codes of a linear layer; see `solvers.gptq.solve`. factor: of the Hessian's columns by falling diagonal,
    which is the order of the stream, too; None: a fallback, rounding to nearest."""
    position, device = positions(hessian), weight.device
    group = _group(groups, position)
    aim = (weight if target is None else target).detach()
    importance = None if factor is None else hessian.diagonal() / factor.scale + damp
    masked = aim.float() if keep is None else aim.float() * keep
    scales = search(masked, groups, group, importance, team)
    del masked
    projection = _projection(groups, group, scales, keep)
    rows, columns = weight.shape
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=device)
    real = torch.empty_like(scales.real)
    lost, nearest_lost, sizes = torch.zeros((3, rows), dtype=torch.float64, device=device)
    unit = 1.0 if factor is None else factor.scale

    def some(part: slice, factor: Factor | None) -> None:
        own, wanted = projection.rows(part), aim[part].float()
        found = round_all(wanted, own)
        sizes[part] = row_losses(weight[part].float(), hessian, unit)
        nearest_lost[part] = row_losses(residual(wanted, found, own), hessian, unit)
        if factor is not None:
            found = solve_columns(wanted, factor, own)
            ridge = factor.damp * factor.scale
            for _ in range(max(work.refits, 1)):
                if work.refits:
                    own = refit(wanted, hessian, own, found, ridge, scales.levels)
                for _ in range(work.passes):
                    descend(wanted, hessian, own, found, ridge)
            lost[part] = row_losses(residual(wanted, found, own), hessian, unit)
        codes[part], real[part] = found, own.scales

    every = parts(rows, device, columns)
    made = (codes, real, lost, nearest_lost, sizes)
    team.compute(partial(some, factor=factor), every, made, device)
    report = report_of(sizes, lost, nearest_lost, hessian, factor)
    if report.kept_rtn:
        team.compute(partial(some, factor=None), every, made, device)
    by_group = [nearest_level(scales.levels[g], real[:, g]) for g in range(real.shape[1])]
    final = _Scales.of(torch.stack(by_group, 1).to(torch.uint8), scales.maxima)
    return Solved(_coded(groups, codes, final, position), report)


def _group(groups: Groups, position: Tensor) -> Tensor:
    """int32 [columns]"""
    of_place = torch.arange(len(groups.rows)).repeat_interleave(torch.tensor(groups.rows))
    return of_place.to(position.device)[position].to(torch.int32)


def _projection(groups: Groups, group: Tensor, scales: _Scales, keep: Tensor | None) -> Projection:
    middles = torch.tensor([2.0 ** (b - 1) for b in groups.bits], device=group.device)
    zeros = middles.expand(len(scales.real), -1).contiguous()
    return Projection(scales.real, zeros, group, (2 * middles - 1)[group.long()].contiguous(), keep)


def _coded(groups: Groups, codes: Tensor, scales: _Scales, position: Tensor) -> Exl2Coded:
    here = (codes, scales.codes, scales.maxima, position.to(torch.int32))
    return Exl2Coded(groups, *(part.cpu().numpy() for part in here))


@dataclass(frozen=True)
class Exl2Solver:
    """solvers.group.Solver of EXL2's codes. groups: of a linear, from its name and its inputs."""

    groups: Callable[[str, int], Groups]
    work: Work
    damp: float

    def factor(self, hessian: Tensor, team: Team = ALONE) -> Factor | None:
        with torch.no_grad():
            return factorize(hessian, processing_order(hessian, "static"), self.damp, team)

    def solve(
        self,
        name: str,
        weight: Tensor,
        hessian: Tensor,
        *,
        target: Tensor | None,
        keep: Tensor | None,
        factor: Factor | None,
        team: Team = ALONE,
    ) -> Solved[Exl2Coded]:
        groups, work, damp = self.groups(name, weight.shape[1]), self.work, self.damp
        with torch.no_grad():
            return solve(weight, hessian, groups, factor, target=target, keep=keep, work=work, damp=damp, team=team)

    def nearest(self, name: str, weight: Tensor, hessian: Tensor) -> Exl2Coded:
        return nearest(weight, self.groups(name, weight.shape[1]), positions(hessian))
