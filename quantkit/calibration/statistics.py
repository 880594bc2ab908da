"""Sums over the calibration text: what a solver is told of a linear's inputs.

All are made in parts that do not depend on how many threads there are, each by one thread: neither do the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch.nn.functional import linear

from quantkit.modules import in_64s
from quantkit.solvers.team import ALONE, Team
from quantkit.solvers.threads import in_threads, parts

# What a linear gets: [tokens, in], and the same of the full model; in the dtype that linears compute in.
Row = tuple[torch.Tensor, torch.Tensor | None]
PROBED = 512  # tokens: of a row, how many one process of a team judges a step by


def _none() -> Iterator[Row]:
    return iter(())


@dataclass
class Statistics:
    """What linears with one input saw: sums over the tokens of all rows but those held out, float32.

    With a team, everybody adds the same rows, and makes his part of the sums; `finish_sums` puts them together.
    weights: of the linears, [out, in]; ready: the same as the passes compute with. hessian: Σ x xᵀ [in, in], x from the
    quantized stream. cross: by linear, Σ y xᵀ [out, in], y the output of the unquantized linear in the full-precision
    stream; empty without that stream, and for experts. tokens: how many. held_out: the rows held out, gone through at
    each call.

    They must not be part of a cycle: a Hessian is not to wait for the garbage collector.
    """

    weights: Mapping[str, torch.Tensor]
    ready: Mapping[str, torch.Tensor]
    hessian: torch.Tensor
    cross: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: int = 0
    held_out: Callable[[], Iterator[Row]] = _none
    team: Team = ALONE
    _mixed: torch.Tensor | None = None  # Σ x̃ xᵀ, x̃ from the full-precision stream: all crosses in one

    def aim(self) -> None:
        """Makes room for a cross. As y = w·x̃, it is w·Σ x̃ xᵀ, too, which takes less time and room for many outputs."""
        columns = len(self.hessian)
        if columns < 2 * sum(len(weight) for weight in self.weights.values()):
            self._mixed = torch.zeros_like(self.hessian)
        else:
            self.cross = self._empty()

    def _empty(self) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in self.weights.items()}

    def add(self, x: torch.Tensor, wanted: torch.Tensor | None) -> None:
        """Counts a row: x [tokens, in]; wanted, x̃ of the same tokens. The sums are whole after `finish_sums`."""
        self.tokens += len(x)
        inputs = in_64s(x.float())
        self._add(inputs)
        wanted = None if wanted is None else in_64s(wanted)
        if self._mixed is not None and wanted is not None:
            add_product(self._mixed, wanted.float(), inputs, self.team)
        for name, cross in self.cross.items():
            assert wanted is not None
            _add(cross, partial(_outputs, self.ready[name], wanted), inputs, self.team)

    def _triangle(self) -> tuple[list[slice], list[int]]:
        """The Hessian's rows in runs, of which what is on and below the diagonal is added up, and who adds them."""
        runs = parts(len(self.hessian), self.hessian.device)
        return runs, self.team.owners([(rows.stop - rows.start) * rows.stop for rows in runs])

    def _add(self, x: torch.Tensor) -> None:
        def some(rows: slice) -> None:
            self.hessian[rows, : rows.stop].addmm_(x[:, rows].T, x[:, : rows.stop])

        in_threads(some, self.team.mine(*self._triangle()), x.device)

    def finish_sums(self) -> None:
        """Makes the Hessian whole, and the crosses."""
        self.team.exchange(*self._triangle(), [self.hessian])
        for rows in parts(len(self.hessian), self.hessian.device):
            self.hessian[: rows.start, rows] = self.hessian[rows, : rows.start].T
        if (mixed := self._mixed) is not None:
            exchange_product(mixed, self.team)
            self.cross = self._empty()
            for name, cross in self.cross.items():
                add_product(cross, self.weights[name].T, mixed, self.team)
            self._mixed = None
        for cross in self.cross.values():
            exchange_product(cross, self.team)

    def probe(self, steps: Mapping[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
        """By linear, (Σ ⟨step·x, y − w·x⟩, Σ ‖step·x‖²) over the rows held out, for a step [out, in] of its weight w:
        how far along it y is come nearest to. A team shares out each row's tokens in runs, the same for any team."""
        if not steps:
            return {}
        found: list[tuple[str, int, int, float, float]] = []
        for number, (x, wanted) in enumerate(self.held_out()):
            assert wanted is not None
            units = [(name, start) for name in steps for start in range(0, len(x), PROBED)]
            owners = self.team.owners([len(steps[name]) * len(x[start : start + PROBED]) for name, start in units])
            for (name, start), owner in zip(units, owners, strict=True):
                if (owner + number) % self.team.size == self.team.rank:
                    some = slice(start, start + PROBED)
                    found.append((name, number, start, *self._products(name, steps[name], x[some], wanted[some])))
        sums = dict.fromkeys(steps, (0.0, 0.0))
        for name, _, _, gained, spent in sorted(part for parts_ in self.team.gather(found) for part in parts_):
            sums[name] = (sums[name][0] + gained, sums[name][1] + spent)
        return sums

    def _products(self, name: str, step: torch.Tensor, x: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
        ready = self.ready[name]
        moved = linear(x, step.to(ready.dtype)).float()
        missing = linear(wanted - x, ready).float()
        gained, spent = (moved * missing).sum(1).double().sum(), (moved * moved).sum(1).double().sum()
        return float(gained), float(spent)

    def only(self, names: Collection[str]) -> Statistics:
        """The same of some of the linears, on the same sums: to complete those of one completes those of the other."""
        if len(names) == len(self.weights):
            return self
        some = {n: w for n, w in self.weights.items() if n in names}
        cross = {n: self.cross.pop(n) for n in some if n in self.cross}
        return replace(self, weights=some, cross=cross)

    def complete(self) -> None:
        """Adds the rows held out to the Hessian, once the cross is used up."""
        for x, _ in self.held_out():
            self.tokens += len(x)
            self._add(in_64s(x.float()))
        self.finish_sums()


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, team: Team = ALONE) -> None:
    """total += aᵀ·b; with a team, this process's part of it, until `exchange_product`."""
    _add(total, lambda rows: a[:, rows], b, team)


def _outputs(weight: torch.Tensor, x: torch.Tensor, rows: slice) -> torch.Tensor:
    return linear(x, weight[rows])


def _add(total: torch.Tensor, columns: Callable[[slice], torch.Tensor], b: torch.Tensor, team: Team) -> None:
    """The same of the matrix a that has these columns. Of a team, nobody computes those that others add up."""

    def some(rows: slice) -> None:
        total[rows].addmm_(columns(rows).T.float(), b)

    in_threads(some, team.mine(*_shared(total, team)), total.device)


def exchange_product(total: torch.Tensor, team: Team) -> None:
    team.exchange(*_shared(total, team), [total])


def _shared(total: torch.Tensor, team: Team) -> tuple[list[slice], list[int]]:
    runs = parts(len(total), total.device)
    return runs, team.owners([rows.stop - rows.start for rows in runs])
