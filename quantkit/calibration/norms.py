"""The layer loop for what only asks how large inputs are, as Wanda does (Sun et al. 2023).

Linears are looked at in the order of a layer, as for GPTQ: each sees what comes through the linears before it as they
will be. The paper looks at all linears of a layer in one pass with its old weights, and then runs it again with the new
ones; in this order attention is run once instead of twice, and scores are those of inputs that the model will have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch

from quantkit.calibration.hidden import HiddenStates
from quantkit.calibration.rows import Group, Passes, apply_linear, in_stages, irregular
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

    def add(self, x: torch.Tensor) -> bool:
        """Whether they were finite; if not, they are not counted."""
        part = squares(x)
        finite = bool(torch.isfinite(part).all())
        if finite:
            self.count(part, tokens_of(x))
        return finite

    def count(self, squares: torch.Tensor, tokens: int) -> None:
        self.squares += squares
        self.tokens += tokens


Look = Callable[[str, Norms], torch.Tensor]


class NormStream(Stream):
    """A stream of one model."""

    @torch.inference_mode()
    def norms(self, index: int, look: Look) -> None:
        """Takes all rows through one layer; `look` gives the weight to go on with, for one linear after the other."""
        experts = frozenset(name for name, linear in self.linears[index].items() if linear.expert)
        with self._loaded(index) as layer, ExitStack() as files:
            groups = layer.linears.groups(lambda: self._run(index, "quantized", self.rows[0]), layer.ready)
            passes = Passes(layer.linears, lambda row: self._run(index, "quantized", row))
            for number, stage in enumerate(in_stages(groups, experts)):
                keeps = len(stage) == 1 and passes.keeps(stage[0])
                width = layer.weights[stage[0][0]].shape[1]
                inputs = self._file(f"input-{number}", width, files) if keeps else None
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
            for row in self.rows:
                out.write(row, passes.finish(row))
            out.sync()

    def _ask(self, look: Look, layer: Layer, name: str, sums: Sums) -> torch.Tensor:
        new = look(name, Norms(layer.weights[name], sums.squares, sums.tokens))
        layer.drop((name,))
        return new.to(self.skeleton.device, self.compute)

    def _sums(
        self, index: int, stage: Sequence[Group], passes: Passes, layer: Layer, inputs: HiddenStates | None
    ) -> list[Sums]:
        """Of each group of a stage, over all rows. Rows with a value that is not finite are left out from here on.
        inputs: where to write what they get, if it is of use later."""
        found = [Sums(layer.weights[group[0]].shape[1], self.skeleton.device) for group in stage]
        outputs = {name: len(layer.weights[name]) for name in self.linears[index] if name in layer.weights}
        outputs = {name: rows for name, rows in outputs.items() if self.linears[index][name].expert}
        for row in self.rows:
            finite: list[bool] = []
            if len(stage) > 1:  # of experts: one pass tells of all

                def add(sums: Sums, x: torch.Tensor, said: list[bool] = finite) -> None:
                    said.append(sums.add(x))

                wanted = {group[0]: partial(add, sums) for group, sums in zip(stage, found, strict=True)}
                passes.collect(row, wanted, outputs)
            else:
                x = passes.stop(row, stage[0][0])
                finite.append(found[0].add(x))
                if inputs is not None:
                    inputs.write(row, x)
            if not all(finite):
                self.excluded.add(row)
                self._check_excluded(index)
        return found

    @torch.inference_mode()
    def survey(self, index: int, look: Callable[[Mapping[str, Norms]], None]) -> None:
        """Takes all rows through one layer that stays as it is. `look` gets all of its linears."""
        with self._loaded(index) as layer:
            found = {name: Sums(weight.shape[1], self.skeleton.device) for name, weight in layer.weights.items()}
            seen: dict[str, tuple[torch.Tensor, int]] = {}
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
            for row in self.rows:
                seen.clear()
                after = self._run(index, "quantized", row)
                last = None
                if not all(bool(torch.isfinite(part).all()) for part, _ in seen.values()):
                    self.excluded.add(row)
                    self._check_excluded(index)
                    continue
                for name, (part, tokens) in seen.items():
                    found[name].count(part, tokens)
                out.write(row, after)
            out.sync()
            look({name: Norms(layer.weights[name], sums.squares, sums.tokens) for name, sums in found.items()})


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
