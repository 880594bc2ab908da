"""The layer loop: what every linear sees of the calibration text, one decoder layer in memory at a time.

Two models are followed: the quantized one, whose inputs the linears are fitted to, and, where asked for, the
full-precision one, whose outputs they should give. Between layers both are hidden states on disk.

    for each layer: its weights in
        for each group of linears with one input: statistics over all rows → solve → go on with the new weights
        hidden states out, to the other one of two files; the layer is done when they are synced
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from quantkit.calibration.hidden import HiddenStates
from quantkit.calibration.rows import Linears, Pass, apply_linear
from quantkit.calibration.skeleton import Call, Place, Skeleton, Weights
from quantkit.errors import RunError

EXCLUDED = 0.1  # of the rows may be left out for what is not finite; more is a fault of the model or of the text


@dataclass
class Statistics:
    """What linears with one input saw: sums over the tokens of all rows, float32.

    hessian: Σ x xᵀ [in, in], x from the quantized stream. cross: by linear, Σ y xᵀ [out, in], y the output of the
    unquantized linear in the full-precision stream; empty without that stream. tokens: how many were summed.
    """

    hessian: torch.Tensor
    cross: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens: int = 0


Solve = Callable[[tuple[str, ...], Statistics, Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Linear:
    """A linear to solve: where its weight belongs, whether it lies on disk [in, out], whether it is one of a layer's
    experts. Tokens are routed otherwise in the two streams, so an expert's outputs there cannot be compared."""

    place: Place
    transposed: bool
    expert: bool


class Stream:
    """Hidden states of all rows, and the layers that take them further.

    ids: int32 [rows, length]. linears: of each layer, those to solve. full: follow the full-precision model, too.
    hold: keep stopped passes in memory (faster), or run them again (less memory). keep: weights in float32 (faster), or
    as they are stored. The last two change no bit of the result.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        weights: Weights,
        ids: torch.Tensor,
        linears: Sequence[Mapping[str, Linear]],
        folder: Path,
        *,
        full: bool,
        hold: bool = True,
        keep: bool = True,
    ) -> None:
        self.skeleton, self.weights, self.ids, self.linears = skeleton, weights, ids, linears
        self.hold, self.keep = hold, keep
        rows, length = ids.shape
        width = hidden_width(skeleton)
        names = ("quantized", "full") if full else ("quantized",)
        self.states = {n: [HiddenStates(folder / f"{n}-{i}", rows, length, width) for i in (0, 1)] for n in names}
        self.excluded: set[int] = set()
        self.calls: list[Call] = []

    def begin(self, layer: int = 0) -> int:
        """Prepares layer `layer`, or the first one if its hidden states are not there. Returns which."""
        if layer and not all(s[layer % 2].complete for s in self.states.values()):
            layer, self.excluded = 0, set()
        rows, self.calls = self.skeleton.embed(self.weights, self.ids)
        for i, hidden in enumerate(rows):
            if layer:
                break
            for states in self.states.values():
                states[0].write(i, hidden)
        return layer

    @property
    def rows(self) -> list[int]:
        return [r for r in range(len(self.ids)) if r not in self.excluded]

    @torch.inference_mode()
    def layer(self, index: int, solve: Solve) -> None:
        """Takes all rows through one layer. `solve` gets each group's statistics and its weights [out, in], and returns
        what to go on with."""
        with self._loaded(index) as (linears, weights):
            new: dict[str, torch.Tensor] = {}
            passes = {name: self._passes(index, name, linears, new if name == "quantized" else weights)
                      for name in self.states}  # fmt: skip
            for group in self._groups(index, linears, weights):
                statistics = self._look(index, group, passes, weights)
                own = {name: weights[name] for name in group}
                new |= {name: w.to(self.skeleton.device) for name, w in solve(group, statistics, own).items()}
                del statistics, own
                for row in passes["quantized"].values():
                    row.go_past(group)
                    if not self.hold:
                        row.drop()
            for name, by_row in passes.items():
                out = self.states[name][(index + 1) % 2]
                for r, row in by_row.items():
                    out.write(r, row.finish())
                out.sync()
            self._check_excluded(index)

    def _passes(
        self, index: int, stream: str, linears: Linears, weights: Mapping[str, torch.Tensor]
    ) -> dict[int, Pass]:
        states = self.states[stream][index % 2]

        def begin(row: int) -> Callable[[], torch.Tensor]:
            device = self.skeleton.device
            return lambda: self.skeleton.run(index, states.read(row, device), self.calls[index])

        return {r: Pass(linears, begin(r), weights) for r in self.rows}

    def _groups(self, index: int, linears: Linears, weights: Mapping[str, torch.Tensor]) -> list[tuple[str, ...]]:
        states, row = self.states["quantized"][index % 2], self.rows[0]
        hidden = states.read(row, self.skeleton.device)
        return linears.groups(lambda: self.skeleton.run(index, hidden, self.calls[index]), weights)

    def _look(
        self,
        index: int,
        group: tuple[str, ...],
        passes: Mapping[str, dict[int, Pass]],
        weights: Mapping[str, torch.Tensor],
    ) -> Statistics:
        """Statistics of one group over all rows. Rows with a value that is not finite are left out from here on."""
        columns = weights[group[0]].shape[1]
        device = self.skeleton.device
        found = Statistics(torch.zeros(columns, columns, device=device))
        full = passes.get("full", {})
        if full:
            aimed = [name for name in group if not self.linears[index][name].expert]
            found.cross = {name: torch.zeros(weights[name].shape, device=device) for name in aimed}
        for r, row in list(passes["quantized"].items()):
            x = row.stop(group[0])
            ready: dict[str, torch.Tensor] = {}
            if full:
                target = full[r].stop(group[0])
                ready = {name: apply_linear(target, weights[name]) for name in group}
            if not all(bool(torch.isfinite(t).all()) for t in (x, *ready.values())):
                self._exclude(r, passes)
                continue
            flat = x.reshape(-1, columns)
            found.hessian.addmm_(flat.T, flat)
            found.tokens += len(flat)
            for name, y in ready.items():
                if name in found.cross:
                    found.cross[name].addmm_(y.reshape(-1, y.shape[-1]).T, flat)
            if full:
                full[r].ready |= ready
                full[r].go_past(group)
            if not self.hold:
                for by_row in passes.values():
                    by_row[r].drop()
        return found

    def _exclude(self, row: int, passes: Mapping[str, dict[int, Pass]]) -> None:
        self.excluded.add(row)
        for by_row in passes.values():
            by_row.pop(row).drop()
        self._check_excluded(-1)

    def _check_excluded(self, layer: int) -> None:
        if len(self.excluded) > EXCLUDED * len(self.ids):
            raise RunError(
                f"activations are not finite in {len(self.excluded)} of {len(self.ids)} calibration rows",
                where=f"layer {layer}" if layer >= 0 else "",
                hint="the model overflows on this text; try another --calib, or --method rtn, which needs none",
            )

    @contextmanager
    def _loaded(self, index: int) -> Iterator[tuple[Linears, dict[str, torch.Tensor]]]:
        """The layer's parameters in memory: those to solve by name, [out, in], the others in their modules."""
        skeleton, wanted = self.skeleton, self.linears[index]
        places = {linear.place for linear in wanted.values()}
        others = [p for p in skeleton.inside[index] if p not in places]
        skeleton.fill(others, self.weights)
        weights: dict[str, torch.Tensor] = {}
        for name, linear in wanted.items():
            value = self.weights.read(linear.place.name).to(skeleton.device)
            value = value.T.contiguous() if linear.transposed else value
            weights[name] = value.float() if self.keep else value
        linears = Linears({name: skeleton.model.get_submodule(x.place.module) for name, x in wanted.items()})
        try:
            yield linears, weights
        finally:
            linears.release()
            skeleton.clear(others)

    def close(self) -> None:
        for states in self.states.values():
            for state in states:
                state.close()


def hidden_width(skeleton: Skeleton) -> int:
    """Width of the hidden states between layers."""
    config = skeleton.model.config
    return int(getattr(config, "hidden_size", None) or config.n_embd)
