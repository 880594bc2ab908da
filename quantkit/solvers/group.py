"""Linears with one input, solved together: one factor for all of them, each aimed at what it should give.

The input x of a linear in the quantized model is not the x̃ that it was trained on: everything before it is quantized,
too. So it is not W that is rounded but W + α·D, where D is the least-squares step that makes W·x into W·x̃ on the
calibration text (with a ridge). α is chosen on rows that D was not computed from, and at most STRENGTH: taken all the
way, the corrections of one layer after the other feed on each other, and the model comes apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from torch import Tensor

from quantkit.solvers.factor import Factor
from quantkit.solvers.gptq import Report, Restorable, Settings, Solved, factor_for, ridge_factor, solve, step_toward
from quantkit.solvers.grids import Grid, rtn
from quantkit.solvers.team import ALONE, Team
from quantkit.torch_setup import give_back_beside

Effort = Literal["low", "default", "high"]

# Fewer tokens than this say too little of a weight's use: it is rounded to nearest (an expert that few tokens chose).
FEWEST_TOKENS = 128
STRENGTH = 0.5
RIDGE = 0.05  # of the mean diagonal


def settings_for(settings: Settings, effort: Effort) -> Settings:
    """What an effort stands for, beside following the full-precision model (all but "low")."""
    if effort == "high":
        return replace(settings, passes=2, refits=4)
    return settings


class Solver(Protocol):
    """A kind of codes, and for each linear the grid they are on. factor: of a Hessian, for all linears with these
    inputs. nearest: without one."""

    def factor(self, hessian: Tensor, team: Team = ALONE) -> Factor | None: ...

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
    ) -> Solved[Restorable]: ...

    def nearest(self, name: str, weight: Tensor, hessian: Tensor) -> Restorable: ...


@dataclass(frozen=True)
class GptqSolver:
    """Codes of GPTQ's kind. grids: of linears that are on another than the settings' own."""

    settings: Settings
    grids: Mapping[str, Grid] = field(default_factory=dict)

    def factor(self, hessian: Tensor, team: Team = ALONE) -> Factor | None:
        return factor_for(hessian, self.settings, team)

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
    ) -> Solved[Restorable]:
        return solve(weight, hessian, self._own(name), target=target, keep=keep, factor=factor, team=team)

    def nearest(self, name: str, weight: Tensor, hessian: Tensor) -> Restorable:
        return rtn(weight, self._own(name).grid)

    def _own(self, name: str) -> Settings:
        return replace(self.settings, grid=self.grids.get(name, self.settings.grid))


class Statistics(Protocol):
    """calibration.statistics.Statistics, as far as it is needed here."""

    weights: Mapping[str, Tensor]
    hessian: Tensor
    cross: dict[str, Tensor]
    tokens: int
    team: Team

    def probe(self, steps: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]: ...

    def complete(self) -> None: ...


Masks = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]  # targets → masks, of those that are pruned


def aim(found: Statistics) -> dict[str, Tensor]:
    """What each weight that has a cross is aimed at, float32 [out, in]; afterwards the sums are complete, and no cross
    is left."""
    steps: dict[str, Tensor] = {}
    factor = ridge_factor(found.hessian, RIDGE, found.team) if found.cross else None
    for name in list(found.cross):
        steps[name] = step_toward(found.weights[name], found.hessian, found.cross.pop(name), factor, found.team)
    factor = None  # as large as the Hessian
    sums = found.probe(steps)
    targets = {name: step.mul_(strength(*sums[name])).add_(found.weights[name]) for name, step in steps.items()}
    found.complete()
    give_back_beside(found.hessian.nbytes)
    return targets


def solve_group(
    found: Statistics, solver: Solver, targets: dict[str, Tensor], masks: Masks | None = None
) -> Iterator[tuple[str, Solved[Restorable]]]:
    """(name, Solved) of each of the weights [out, in] of linears that share their inputs, once the sums are complete.
    targets: what they are aimed at, from `aim`, taken out as they are used; one without is aimed at its own weight.
    masks: bool [out, in], false where a weight is pruned, from what is aimed at."""
    weights = found.weights
    keep = {} if masks is None else dict(masks(targets))
    if found.tokens < FEWEST_TOKENS:
        for name, weight in weights.items():
            pruned = weight if name not in keep else weight.masked_fill(~keep[name], 0)
            yield name, Solved(solver.nearest(name, pruned, found.hessian), Report(None, None, 0.0, True, False, 0))
        return
    factor = solver.factor(found.hessian, found.team)
    last = [*weights][-1]
    for name, weight in weights.items():
        target, kept = targets.pop(name, None), keep.pop(name, None)
        solved = solver.solve(name, weight, found.hessian, target=target, keep=kept, factor=factor, team=found.team)
        if name == last:
            factor = None  # as large as the Hessian: not to be held while the last weight is packed
        yield name, solved


def strength(gain: float, energy: float) -> float:
    """How far to go along a step, from what `probe` says of it: the best on rows it does not know, within bounds."""
    return min(max(gain / energy, 0.0), STRENGTH) if energy > 0 else 0.0
