"""The layer loop for what only asks how large inputs are, as Wanda does (Sun et al. 2023).

Attention's linears are looked at one after the other, as for GPTQ: each sees what comes through the linears before it
as they will be, and attention is run once. Those of the feed-forward part are looked at together, in one pass with its
old weights. (The paper does so with the whole layer, and runs all of it again.) What gate and up cost what they feed,
when half of their weights are gone, is noise by which down is better not judged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch

from quantkit.calibration.hidden import HiddenStates
from quantkit.calibration.rows import Group, Passes, apply_linear, irregular
from quantkit.calibration.stream import Layer, Stream
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
        self.squares += squares
        self.tokens += tokens


Look = Callable[[str, Norms], torch.Tensor]
Part = tuple[torch.Tensor, int]  # Σ x² of what a linear gets of a row, and of how many tokens


class NormStream(Stream):
    """A stream of one model."""

    @torch.inference_mode()
    def norms(self, index: int, look: Look, in_order: Callable[[str], bool]) -> None:
        """Takes all rows through one layer; `look` gives the weight to go on with, for one linear after the other.
        in_order: whether a linear's outputs are to be the new ones before the next one is looked at."""
        with self._loaded(index) as layer, ExitStack() as files:
            groups = layer.linears.groups(lambda: self._run(index, "quantized", self.rows[0]), layer.ready)
            passes = Passes(layer.linears, lambda row: self._run(index, "quantized", row))
            for number, stage in enumerate(_stages(groups, in_order)):
                keeps = len(stage) == 1 and passes.keeps(stage[0])
                width = layer.weights[stage[0][0]].shape[1]
                inputs = self._file(f"input-{index}-{number}", width, files) if keeps else None
                found = self._sums(index, stage, passes, layer, inputs)
                new: dict[str, torch.Tensor] = {}
                for group, sums in zip(stage, found, strict=True):
                    if inputs is not None:
                        passes.keep(group, inputs)
                    for name in group:
                        new[name] = self._ask(look, layer, name, sums)
                passes.weights |= new
            for name in list(layer.weights):  # nothing calls it: nothing is known of its inputs
                self._ask(look, layer, name, Sums(layer.weights[name].shape[1], self.skeleton.device))
            if index == len(self.linears) - 1:
                return  # nothing comes after it
            out = self.states["quantized"][(index + 1) % 2]
            for row in self.mine:
                out.write(row, passes.finish(row))
            out.sync()
            out.share(self.team)

    def _ask(self, look: Look, layer: Layer, name: str, sums: Sums) -> torch.Tensor:
        new = look(name, Norms(layer.weights[name], sums.squares, sums.tokens))
        layer.drop((name,))
        return new.to(self.skeleton.device, self.compute)

    def _sums(
        self, index: int, stage: Sequence[Group], passes: Passes, layer: Layer, inputs: HiddenStates | None
    ) -> list[Sums]:
        """Of each group of a stage, over all rows. Rows with a value that is not finite are left out from here on.
        inputs: where to write what they get, if it is of use later."""
        found = {group[0]: Sums(layer.weights[group[0]].shape[1], self.skeleton.device) for group in stage}

        def look(row: int) -> dict[str, Part]:
            seen: dict[str, Part] = {}

            def note(name: str, x: torch.Tensor) -> None:
                seen[name] = squares(x), tokens_of(x)

            if len(stage) > 1:  # one pass tells of all
                passes.watch(row, {name: partial(note, name) for name in found}, layer.ready)
            else:
                x = passes.stop(row, stage[0][0])
                note(stage[0][0], x)
                if inputs is not None:
                    inputs.write(row, x)
            return seen

        self._count(index, look, found)
        return [found[group[0]] for group in stage]

    def _count(self, index: int, look: Callable[[int], dict[str, Part]], found: Mapping[str, Sums]) -> None:
        """Counts all rows, in their order, whoever looks at them: as many at a time as there are processes."""
        for first in range(0, len(self.ids), self.team.size):
            row = first + self.team.rank
            seen = look(row) if row in self.mine else {}
            for n, parts_ in enumerate(self.team.gather(seen)):
                if not all(bool(torch.isfinite(part).all()) for part, _ in parts_.values()):
                    self.excluded.add(first + n)
                    self._check_excluded(index)
                    continue
                for name, (part, tokens) in parts_.items():
                    found[name].count(part, tokens)

    @torch.inference_mode()
    def survey(self, index: int, look: Callable[[Mapping[str, Norms]], None]) -> None:
        """Takes all rows through one layer that stays as it is. `look` gets all of its linears."""
        with self._loaded(index) as layer:
            found = {name: Sums(weight.shape[1], self.skeleton.device) for name, weight in layer.weights.items()}
            seen: dict[str, Part] = {}
            last: tuple[torch.Tensor, torch.Tensor] | None = None

            def answer(name: str, x: torch.Tensor) -> torch.Tensor:
                nonlocal last
                if name in seen:
                    raise irregular(f"{name} is called more than once for a text")
                if last is None or last[0] is not x:  # linears that share their input follow one another
                    last = x, squares(x)
                seen[name] = last[1], tokens_of(x)
                return apply_linear(x, layer.ready[name])

            layer.linears.answer = answer
            out = self.states["quantized"][(index + 1) % 2]

            def pass_on(row: int) -> dict[str, Part]:
                nonlocal last
                seen.clear()
                out.write(row, self._run(index, "quantized", row))
                last = None
                return seen

            self._count(index, pass_on, found)
            out.sync()
            out.share(self.team)
            look({name: Norms(layer.weights[name], sums.squares, sums.tokens) for name, sums in found.items()})


def _stages(groups: Sequence[Group], in_order: Callable[[str], bool]) -> list[list[Group]]:
    """Groups to look at in one pass, in their order: those in order are each on their own."""
    stages: list[list[Group]] = []
    for alone, run in groupby(groups, lambda group: any(map(in_order, group))):
        several = list(run)
        stages += [[group] for group in several] if alone else [several]
    return stages


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
