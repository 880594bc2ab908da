"""The layer loop for what only asks how large inputs are: a layer is run twice, with its weights as they were, and with
those that it gets from there. All its linears are looked at in one pass, as Wanda does (Sun et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch

from quantkit.calibration.rows import Linears, Stop, apply_linear, irregular
from quantkit.calibration.stream import Stream
from quantkit.solvers.threads import in_threads, parts


@dataclass(frozen=True)
class Norms:
    """What a linear saw: its weight [out, in], Σ x² of its inputs float32 [in], over how many tokens."""

    weight: torch.Tensor
    squares: torch.Tensor
    tokens: int


Look = Callable[[str, Norms], torch.Tensor]


class BlockStream(Stream):
    """A stream of one model. What experts get of a text does not depend on what other linears of their layer become."""

    @torch.inference_mode()
    def block(self, index: int, look: Look) -> None:
        """Takes all rows through one layer; `look` gives the weight to go on with, for one linear after the other."""
        with self._loaded(index) as layer:
            found = self._norms(index, layer.linears, layer.weights, layer.ready, write=False)
            new: dict[str, torch.Tensor] = {}
            for name in list(layer.weights):
                new[name] = look(name, found.pop(name)).to(self.skeleton.device, self.compute)
                layer.drop((name,))
            if index == len(self.linears) - 1:
                return  # nothing comes after it
            out = self.states["quantized"][(index + 1) % 2]
            layer.linears.answer = lambda name, x: apply_linear(x, new[name])
            for row in self.rows:
                out.write(row, self._run(index, "quantized", row))
            out.sync()

    @torch.inference_mode()
    def survey(self, index: int, look: Callable[[Mapping[str, Norms]], None]) -> None:
        """Takes all rows through one layer that stays as it is. `look` gets all of its linears."""
        with self._loaded(index) as layer:
            look(self._norms(index, layer.linears, layer.weights, layer.ready, write=True))
            self.states["quantized"][(index + 1) % 2].sync()

    def _norms(
        self,
        index: int,
        linears: Linears,
        weights: Mapping[str, torch.Tensor],
        ready: Mapping[str, torch.Tensor],
        *,
        write: bool,
    ) -> dict[str, Norms]:
        """Of all linears, over all rows. Rows with a value that is not finite are left out from here on."""
        sums = {name: torch.zeros(weight.shape[1], device=weight.device) for name, weight in weights.items()}
        tokens = dict.fromkeys(weights, 0)
        seen: dict[str, tuple[torch.Tensor, int]] = {}
        last: tuple[torch.Tensor, torch.Tensor] | None = None

        def answer(name: str, x: torch.Tensor) -> torch.Tensor:
            nonlocal last
            if last is None or last[0] is not x:  # linears that share their input follow one another
                last = x, squares(x.reshape(-1, x.shape[-1]))
            count = x.numel() // x.shape[-1]
            before = seen.get(name)
            if before is not None and not self.linears[index][name].expert:
                raise irregular(f"{name} is called more than once for a text")
            seen[name] = (last[1], count) if before is None else (before[0] + last[1], before[1] + count)
            if len(seen) == len(weights) and not write and not whole:  # the first row shows what is called again
                raise Stop(name, x)  # nothing is left to see, and what the last linear gives is of no use
            return apply_linear(x, ready[name])

        linears.answer = answer
        whole = True
        for row in self.rows:
            seen.clear()
            after = None
            with suppress(Stop):
                after = self._run(index, "quantized", row)
            last, whole = None, False
            if not all(bool(torch.isfinite(part).all()) for part, _ in seen.values()):
                self.excluded.add(row)
                self._check_excluded(index)
                continue
            for name, (part, count) in seen.items():
                sums[name] += part
                tokens[name] += count
            if after is not None and write:
                self.states["quantized"][(index + 1) % 2].write(row, after)
        return {name: Norms(weight, sums[name], tokens[name]) for name, weight in weights.items()}


def squares(x: torch.Tensor) -> torch.Tensor:
    """Σ x² float32 [columns] of x [tokens, columns]."""
    found = torch.empty(x.shape[1], device=x.device)

    def some(columns: slice) -> None:
        part = x[:, columns].float()
        torch.sum(part * part, 0, out=found[columns])

    in_threads(some, parts(x.shape[1], x.device, max(len(x), 1)), x.device)
    return found
