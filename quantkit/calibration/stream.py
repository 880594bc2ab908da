"""The layer loop: what every linear sees of the calibration text, one decoder layer in memory at a time.

Two models are followed: the quantized one, whose inputs the linears are fitted to, and, where asked for, the
full-precision one, whose outputs they should give. Between layers both are hidden states on disk.

    for each layer: its weights in
        for each group of linears with one input: statistics over all rows → solve → go on with the new weights
        hidden states out, to the other one of two files; the layer is done when they are synced
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.calibration.hidden import HiddenStates
from quantkit.calibration.rows import Linears, Passes, apply_linear
from quantkit.calibration.skeleton import Call, Place, Skeleton, Weights
from quantkit.calibration.statistics import Row, Statistics
from quantkit.errors import RunError

HELD_OUT = 8
EXCLUDED = 0.1  # of the rows may be left out for what is not finite; more is a fault of the model or of the text


Solve = Callable[[tuple[str, ...], Statistics], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Linear:
    """A linear to solve: where its weight belongs, whether it lies on disk [in, out], whether it is one of a layer's
    experts. Tokens are routed otherwise in the two streams, so an expert's outputs there cannot be compared."""

    place: Place
    transposed: bool
    expert: bool


@dataclass(frozen=True)
class _Layer:
    """A layer's linears, and the weights of those not yet solved, [out, in]: as they are on disk, and as passes compute
    with them. The other parameters are in their modules."""

    linears: Linears
    weights: dict[str, torch.Tensor]
    ready: dict[str, torch.Tensor]

    def drop(self, group: Sequence[str]) -> None:
        for name in group:
            del self.weights[name], self.ready[name]


class Stream:
    """Hidden states of all rows, and the layers that take them further.

    ids: int32 [rows, length]. linears: of each layer, those to solve. full: follow the full-precision model, too.
    compute: the dtype in which linears multiply; all else is float32.
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
        compute: torch.dtype = torch.float32,
    ) -> None:
        self.skeleton, self.weights, self.ids, self.linears = skeleton, weights, ids, linears
        self.folder, self.full, self.compute = folder, full, compute
        rows, length = ids.shape
        width = hidden_width(skeleton)
        names = ("quantized", "full") if full else ("quantized",)
        self.states = {n: [HiddenStates(folder / f"{n}-{i}", rows, length, width) for i in (0, 1)] for n in names}
        self.excluded: set[int] = set()
        self.calls: list[Call] = []

    def begin(self, layer: int = 0) -> None:
        """Prepares for layer `layer`; for the first one, by embedding the text."""
        hidden, self.calls = self.skeleton.embed(self.weights, self.ids)
        with closing(hidden):
            if layer:
                return
            for i, row in enumerate(hidden):
                for states in self.states.values():
                    states[0].write(i, row)

    @property
    def rows(self) -> list[int]:
        return [r for r in range(len(self.ids)) if r not in self.excluded]

    @torch.inference_mode()
    def layer(self, index: int, solve: Solve) -> None:
        """Takes all rows through one layer. `solve` gets each group's statistics, and returns the weights to go on
        with."""
        with self._loaded(index) as layer:
            groups = layer.linears.groups(lambda: self._run(index, "quantized", self.rows[0]), layer.ready)
            targets = self._follow_full(index, layer, groups) if self.full else {}
            experts = frozenset(name for name, linear in self.linears[index].items() if linear.expert)
            passes = Passes(layer.linears, lambda row: self._run(index, "quantized", row), experts)
            with closing(passes):
                for number, group in enumerate(groups):
                    width = layer.weights[group[0]].shape[1]
                    inputs = self._file(f"input-{number}", width)
                    target = targets.pop(group, None)
                    found = self._look(index, group, passes, layer, inputs, target)
                    kept = passes.keep(group, inputs)
                    new = solve(group, found)
                    del found
                    layer.drop(group)
                    if target is not None:
                        target.remove()
                    passes.go_past({n: w.to(self.skeleton.device, self.compute) for n, w in new.items()})
                    del new
                    if not kept:
                        inputs.remove()
                for name in list(layer.weights):  # nothing calls it: nothing is known of its inputs
                    columns = layer.weights[name].shape[1]
                    nothing = torch.zeros(columns, columns, device=self.skeleton.device)
                    solve((name,), Statistics({name: layer.weights[name]}, {}, nothing))
                    layer.drop((name,))
                out = self.states["quantized"][(index + 1) % 2]
                for row in self.rows:
                    out.write(row, passes.finish(row))
                out.sync()

    def _file(self, name: str, width: int) -> HiddenStates:
        return HiddenStates(self.folder / name, len(self.ids), self.ids.shape[1], width, self.compute)

    def _run(self, index: int, stream: str, row: int) -> torch.Tensor:
        before = self.states[stream][index % 2].read(row, self.skeleton.device)
        return self.skeleton.run(index, before, self.calls[index])

    def _follow_full(
        self, index: int, layer: _Layer, groups: Sequence[tuple[str, ...]]
    ) -> dict[tuple[str, ...], HiddenStates]:
        """Takes the full-precision stream through the layer. Returns what each group of linears gets there, on disk."""
        inputs = {
            group: self._file(f"target-{number}", layer.weights[group[0]].shape[1])
            for number, group in enumerate(groups)
            if not self.linears[index][group[0]].expert
        }
        first = {group[0]: states for group, states in inputs.items()}
        out = self.states["full"][(index + 1) % 2]
        for r in self.rows:

            def answer(name: str, x: torch.Tensor, row: int = r) -> torch.Tensor:
                if name in first:
                    first[name].write(row, x)
                return apply_linear(x, layer.ready[name])

            layer.linears.answer = answer
            out.write(r, self._run(index, "full", r))
        out.sync()
        return inputs

    def _look(
        self,
        index: int,
        group: tuple[str, ...],
        passes: Passes,
        layer: _Layer,
        inputs: HiddenStates,
        target: HiddenStates | None,
    ) -> Statistics:
        """Statistics of one group over all rows, whose inputs are kept in a file. Rows with a value that is not finite
        are left out from here on."""
        columns, device = inputs.shape[2], self.skeleton.device
        weights = {name: layer.weights[name] for name in group}
        ready = {name: layer.ready[name] for name in group}
        found = Statistics(weights, ready, torch.zeros(columns, columns, device=device))
        if target is not None:
            found.aim()
        held_out = self.held_out if target is not None else frozenset()

        def wanted(row: int) -> torch.Tensor | None:
            return None if target is None else target.read(row, device).reshape(-1, columns)

        def apart() -> Iterator[Row]:
            for row in self.rows:
                if row in held_out:
                    yield inputs.read(row, device).reshape(-1, columns), wanted(row)

        for row in self.rows:
            x = passes.stop(row, group[0]).to(self.compute)
            inputs.write(row, x)
            x, aim = x.reshape(-1, columns), wanted(row)
            if not (_finite(x) and (aim is None or _finite(aim))):
                self.excluded.add(row)
            elif row not in held_out:
                found.add(x, aim)
        self._check_excluded(index)
        found.finish_sums()
        found.held_out = apart
        return found

    @property
    def held_out(self) -> frozenset[int]:
        """Every eighth row: what a step toward the full-precision model is judged by."""
        return frozenset(range(HELD_OUT - 1, len(self.ids), HELD_OUT))

    def _check_excluded(self, layer: int) -> None:
        if len(self.excluded) > EXCLUDED * len(self.ids):
            raise RunError(
                f"activations are not finite in {len(self.excluded)} of {len(self.ids)} calibration rows",
                where=f"layer {layer}",
                hint="the model overflows on this text, or holds such values; try another --calib, or --method rtn",
            )

    @contextmanager
    def _loaded(self, index: int) -> Iterator[_Layer]:
        """The layer's parameters in memory."""
        skeleton, wanted = self.skeleton, self.linears[index]
        places = {linear.place for linear in wanted.values()}
        others = [p for p in skeleton.inside[index] if p not in places]
        skeleton.fill(others, self.weights)
        weights: dict[str, torch.Tensor] = {}
        for name, linear in wanted.items():
            value = self.weights.read(linear.place.name).to(skeleton.device)
            value = value.T.contiguous() if linear.transposed else value
            weights[name] = value.float() if self.compute == torch.float32 else value
        ready = {name: weight.to(self.compute) for name, weight in weights.items()}
        modules = {name: skeleton.model.get_submodule(x.place.module) for name, x in wanted.items()}
        linears = Linears(skeleton.layers[index], modules)
        try:
            yield _Layer(linears, weights, ready)
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


def _finite(x: torch.Tensor) -> bool:
    """Whether all numbers are finite; by their sum first, which is not if one of them is not."""
    return bool(torch.isfinite(x.sum(dtype=torch.float32))) or bool(torch.isfinite(x).all())
