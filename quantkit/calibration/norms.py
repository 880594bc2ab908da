"""The layer loop for what only asks how large inputs are, as Wanda does (Sun et al. 2023).

Attention's linears are looked at one after the other, as for GPTQ: each sees what comes through the linears before it
as they will be, and attention is run once. Those of the feed-forward part are looked at together, in one pass with its
old weights. (The paper does so with the whole layer, and runs all of it again.) What gate and up cost what they feed,
when half of their weights are gone, is noise by which down is better not judged.

Experts come one by one, for the sums with the old weights, and once more to be given new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch

from quantkit.calibration.experts import Routed, through_expert
from quantkit.calibration.hidden import HiddenStates
from quantkit.calibration.layers import Experts, Layer
from quantkit.calibration.rows import Group, Passes
from quantkit.calibration.stream import Stream, at_experts
from quantkit.solvers.threads import in_threads, parts


@dataclass(frozen=True)
class Norms:
    """What a linear saw: its weight [out, in], Σ x² of its inputs float32 [in], over how many tokens."""

    weight: torch.Tensor
    squares: torch.Tensor
    tokens: int


class Sums:
    """Σ x² float32 [columns] of rows of inputs [..., columns], and over how many tokens."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.squares, self.tokens = torch.zeros(columns, device=device), 0

    def count(self, squares: torch.Tensor, tokens: int) -> None:
        self.squares += squares.to(self.squares.device)
        self.tokens += tokens


Look = Callable[[str, Norms], torch.Tensor]
Part = tuple[torch.Tensor, int]  # Σ x² of what a linear gets of a row, and of how many tokens
Parts = dict[str, Part]  # by the first linear of a group
Visit = Callable[[str, Norms], None]
Every = Callable[[Visit], None]  # hands over linears by name, as often as it is called


@dataclass(frozen=True)
class Seen:
    """What a stage saw: sums by the first linear of each group; what modules of experts were called with."""

    sums: dict[str, Sums] = field(default_factory=dict)
    routed: dict[str, Routed] = field(default_factory=dict)


class NormStream(Stream):
    """A stream of one model."""

    @torch.inference_mode()
    def norms(self, index: int, look: Look, in_order: Callable[[str], bool]) -> None:
        """Takes all rows through one layer; `look` gives the weight to go on with, for one linear after the other.
        in_order: whether a linear's outputs are to be the new ones before the next one is looked at."""
        last = index == len(self.linears) - 1  # nothing comes after it
        with self._loaded(index) as layer, ExitStack() as files:
            groups = layer.linears.groups(lambda: self._run(index, "quantized", self.rows[0]), layer.ready)
            passes = Passes(layer.linears, lambda row: self._run(index, "quantized", row))
            for number, stage in enumerate(_stages(groups, in_order)):
                name = f"input-{index}-{number}"
                if len(stage) == 1 and stage[0][0] not in layer.experts:
                    found = Seen({stage[0][0]: self._alone(index, name, stage[0], passes, layer, files)})
                else:
                    found = self._together(index, name, stage, passes, layer, files)
                new: dict[str, torch.Tensor] = {}
                for group in stage:
                    if (experts := layer.experts.get(group[0])) is not None:
                        self._renew(experts, found, look, go_on=not last)
                        continue
                    for linear in group:
                        new[linear] = self._ask(look, layer, linear, found.sums[group[0]])
                passes.weights |= new
                passes.totals |= {experts: routed.total for experts, routed in found.routed.items()}
            self._look_at_unseen(groups, layer, look)
            if last:
                return
            out = self.states["quantized"][(index + 1) % 2]
            for row in self.mine:
                out.write(row, passes.finish(row))
            out.sync()
            out.share(self.team)

    def _look_at_unseen(self, groups: Sequence[Group], layer: Layer, look: Look) -> None:
        """Linears that nothing calls: nothing is known of their inputs."""

        def each(layer: Layer) -> None:
            for name in list(layer.weights):
                self._ask(look, layer, name, Sums(layer.weights[name].shape[1], self.skeleton.device))

        for experts in (own for name, own in layer.experts.items() if (name,) not in groups):
            for expert in range(experts.count):
                with experts.read(expert) as one:
                    each(one)
        each(layer)

    def _ask(self, look: Look, layer: Layer, name: str, sums: Sums) -> torch.Tensor:
        new = look(name, Norms(layer.weights[name], sums.squares, sums.tokens))
        layer.drop((name,))
        return new.to(self.skeleton.device, self.compute)

    def _renew(self, experts: Experts, found: Seen, look: Look, *, go_on: bool) -> None:
        """Has new weights made for experts, and, to go on, what they give with these."""
        routed = found.routed[experts.name]
        for expert in range(experts.count):
            with experts.read(expert) as layer:
                passes = through_expert(experts, expert, layer, routed)
                for group in experts.groups(expert):
                    for name in group:
                        passes.weights[name] = self._ask(look, layer, name, found.sums[group[0]])
                for row in self.mine if go_on else ():
                    routed.add(row, expert, passes.finish(row))
                del passes  # and the new weights, before the next one's come

    def _alone(self, index: int, name: str, group: Group, passes: Passes, layer: Layer, files: ExitStack) -> Sums:
        """Of one group, up to which passes go; what it gets is kept if a module ends with it."""
        width = layer.weights[group[0]].shape[1]
        found = Sums(width, self.skeleton.device)
        inputs = self._file(name, width, files) if passes.keeps(group) else None

        def look(row: int) -> Parts:
            x = passes.stop(row, group[0])
            if inputs is not None:
                inputs.write(row, x)
            return {group[0]: (squares(x), tokens_of(x))}

        self._count(index, look, {group[0]: found})
        if inputs is not None:
            passes.keep(group, inputs)
        return found

    def _together(
        self,
        index: int,
        name: str,
        stage: Sequence[Group],
        passes: Passes,
        layer: Layer,
        files: ExitStack,
        out: HiddenStates | None = None,
    ) -> Seen:
        """Of groups that are looked at at once, with their old weights, up to the last of them; or, with `out`, through
        the whole layer and out. Rows with a value that is not finite are left out from here on, and of all groups:
        those before experts that turn out to make one of a row have been counted with it, and are counted again."""
        runs = at_experts(stage, layer)
        while True:
            before, found = len(self.excluded), Seen()
            for number, (groups, experts) in enumerate(runs):
                if experts is None:
                    if groups or out is not None:
                        self._to_the_end(index, groups, passes, layer, found, out)
                    continue
                like = layer.linears.routings[experts]
                count = layer.experts[experts].count
                found.routed[experts] = routed = self._routed(f"{name}-{number}", like, count, files)
                self._to_experts(index, groups, experts, passes, layer, found)
                go_on = out is not None or any(groups or experts for groups, experts in runs[number + 1 :])
                self._through_experts(index, layer.experts[experts], found, go_on=go_on)
                passes.totals[experts] = routed.total
            for experts in found.routed:
                del passes.totals[experts]
            if not found.routed or len(self.excluded) == before:
                return found
            for routed in found.routed.values():
                routed.remove()

    def _to_the_end(
        self,
        index: int,
        groups: Sequence[Group],
        passes: Passes,
        layer: Layer,
        found: Seen,
        out: HiddenStates | None,
    ) -> None:
        def look(row: int) -> Parts:
            seen: Parts = {}
            if out is None:
                passes.watch(row, _noted(groups, seen), layer.ready)
            else:
                out.write(row, passes.through(row, _noted(groups, seen), layer.ready))
            return seen

        self._count(index, look, self._sums(groups, layer, found))

    def _to_experts(
        self, index: int, groups: Sequence[Group], experts: str, passes: Passes, layer: Layer, found: Seen
    ) -> None:
        def look(row: int) -> Parts:
            seen: Parts = {}
            routing = passes.routing(row, experts, _noted(groups, seen), layer.ready)
            found.routed[experts].write(row, routing)
            return seen

        self._count(index, look, self._sums(groups, layer, found))

    def _through_experts(self, index: int, experts: Experts, found: Seen, *, go_on: bool) -> None:
        """go_on: whether somebody asks for what they give."""
        routed = found.routed[experts.name]
        for expert in range(experts.count):
            groups = experts.groups(expert)
            if not (groups or go_on):
                continue
            with experts.read(expert) as layer:
                passes = through_expert(experts, expert, layer, routed)
                look = partial(self._through_one, expert, groups, passes, layer.ready, routed if go_on else None)
                self._count(index, look, self._sums(groups, layer, found))

    def _through_one(
        self,
        expert: int,
        groups: Sequence[Group],
        passes: Passes,
        old: Mapping[str, torch.Tensor],
        routed: Routed | None,
        row: int,
    ) -> Parts:
        """One row; routed: where to count what the expert gives of it, if somebody asks for that."""
        seen: Parts = {}
        if routed is None:
            passes.watch(row, _noted(groups, seen), old)
        else:
            routed.add(row, expert, passes.through(row, _noted(groups, seen), old))
        return seen

    def _sums(self, groups: Sequence[Group], layer: Layer, found: Seen) -> dict[str, Sums]:
        """Room for those of some groups, in `found`, too."""
        own = {group[0]: Sums(layer.weights[group[0]].shape[1], self.skeleton.device) for group in groups}
        found.sums.update(own)
        return own

    def _count(self, index: int, look: Callable[[int], Parts], found: Mapping[str, Sums]) -> None:
        """Counts all rows, in their order, whoever looks at them: as many at a time as there are processes."""
        for first in range(0, len(self.ids), self.team.size):
            row = first + self.team.rank
            seen = look(row) if row in self.mine else {}
            if not self.team.alone:  # others have another GPU
                seen = {name: (part.cpu(), tokens) for name, (part, tokens) in seen.items()}
            for n, parts_ in enumerate(self.team.gather(seen)):
                if not all(bool(torch.isfinite(part).all()) for part, _ in parts_.values()):
                    self.excluded.add(first + n)
                    self._check_excluded(index)
                    continue
                for name, (part, tokens) in parts_.items():
                    found[name].count(part, tokens)

    @torch.inference_mode()
    def survey(self, index: int, look: Callable[[Every], None]) -> None:
        """Takes all rows through one layer that stays as it is. `look` gets all of its linears."""
        with self._loaded(index) as layer, ExitStack() as files:
            groups = layer.linears.groups(lambda: self._run(index, "quantized", self.rows[0]), layer.ready)
            passes = Passes(layer.linears, lambda row: self._run(index, "quantized", row))
            out = self.states["quantized"][(index + 1) % 2]
            found = self._together(index, f"input-{index}", groups, passes, layer, files, out).sums
            out.sync()
            out.share(self.team)
            owners = {
                name: (experts, expert)
                for experts in layer.experts.values()
                for expert, linears in enumerate(experts.wanted)
                for name in linears
            }
            groups += [g for experts in layer.experts.values() for n in range(experts.count) for g in experts.groups(n)]
            first = {name: group[0] for group in groups for name in group}

            def norms(name: str, layer: Layer) -> Norms:
                weight, sums = layer.weights[name], found.get(first.get(name, ""))
                sums = sums or Sums(weight.shape[1], self.skeleton.device)  # nothing calls it
                return Norms(weight, sums.squares, sums.tokens)

            def every(visit: Visit) -> None:
                for owner, names in groupby(self.linears[index], owners.get):
                    with nullcontext(layer) if owner is None else owner[0].read(owner[1]) as one:
                        for name in names:
                            visit(name, norms(name, one))

            look(every)


def _stages(groups: Sequence[Group], in_order: Callable[[str], bool]) -> list[list[Group]]:
    """Groups to look at in one pass, in their order: those in order are each on their own."""
    stages: list[list[Group]] = []
    for alone, run in groupby(groups, lambda group: any(map(in_order, group))):
        several = list(run)
        stages += [[group] for group in several] if alone else [several]
    return stages


def _noted(groups: Sequence[Group], seen: Parts) -> dict[str, Callable[[torch.Tensor], None]]:
    """What looks at the inputs of groups, for `seen`."""

    def note(name: str, x: torch.Tensor) -> None:
        seen[name] = squares(x), tokens_of(x)

    return {group[0]: partial(note, group[0]) for group in groups}


def squares(x: torch.Tensor) -> torch.Tensor:
    """Σ x² float32 [columns] of x [..., columns]."""
    x = x.reshape(-1, x.shape[-1])
    found = torch.empty(x.shape[1], device=x.device)

    def some(columns: slice) -> None:
        part = x[:, columns].float()
        torch.sum(part * part, 0, out=found[columns])

    in_threads(some, parts(x.shape[1], x.device, max(len(x), 1)), x.device)
    return found


def tokens_of(x: torch.Tensor) -> int:
    return x.numel() // x.shape[-1]
