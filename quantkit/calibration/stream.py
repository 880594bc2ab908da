"""The layer loop: what every linear sees of the calibration text, one decoder layer in memory at a time.

Two models are followed: the quantized one, whose inputs the linears are fitted to, and, where asked for, the
full-precision one, whose outputs they should give. Between layers both are hidden states on disk.

    for each layer: its weights in
        for each group of linears with one input: statistics over all rows → solve → go on with the new weights
        hidden states out, to the other one of two files; the layer is done when they are synced
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from quantkit.calibration.hidden import HiddenStates
from quantkit.calibration.rows import Group, Linears, Passes, apply_linear, in_stages
from quantkit.calibration.skeleton import Call, Place, Skeleton, Weights
from quantkit.calibration.statistics import Row, Statistics
from quantkit.errors import RunError
from quantkit.solvers.team import ALONE, Team

HELD_OUT = 8
EXCLUDED = 0.1  # of the rows may be left out for what is not finite; more is a fault of the model or of the text


Solve = Callable[[Group, Statistics], Mapping[str, torch.Tensor]]
Watch = Callable[[Group, int, torch.Tensor], None]  # a group, a row, and what the group gets of it [tokens, in]


@dataclass(frozen=True)
class Linear:
    """A linear to solve: where its weight belongs, whether it lies on disk [in, out], whether it is one of a layer's
    experts. Tokens are routed otherwise in the two streams, so an expert's outputs there cannot be compared."""

    place: Place
    transposed: bool
    expert: bool


@dataclass(frozen=True)
class Layer:
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
    compute: the dtype in which linears multiply; all else is float32. team: who shares the work; each takes some of the
    rows through the layers, and all see what linears get of every row.
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
        team: Team = ALONE,
    ) -> None:
        self.team = team
        self.skeleton, self.weights, self.ids, self.linears = skeleton, weights, ids, linears
        self.folder, self.full, self.compute = folder, full, compute
        rows, length = ids.shape
        width = hidden_width(skeleton)
        names = ("quantized", "full") if full else ("quantized",)
        self.states = {n: [HiddenStates(folder / f"{n}-{i}", rows, length, width) for i in (0, 1)] for n in names}
        self.excluded: set[int] = set()
        self.calls: list[Call] = []
        self.watch: Watch = lambda group, row, x: None  # is told of every row that linears get
        self.apart: frozenset[int] = frozenset()  # rows that no statistics are made of

    def begin(self, layer: int = 0) -> None:
        """Prepares for layer `layer`; for the first one, by embedding the text."""
        with self.skeleton.embedded(self.weights, self.ids) as (hidden, self.calls):
            if layer == 0:
                for i, row in enumerate(hidden):
                    for states in self.states.values() if i in self.mine else ():
                        states[0].write(i, row)
                for states in self.states.values():
                    states[0].share(self.team)

    @property
    def rows(self) -> list[int]:
        return [r for r in range(len(self.ids)) if r not in self.excluded]

    @property
    def mine(self) -> list[int]:
        """The rows that this process takes through the layers."""
        return [r for r in self.rows if r % self.team.size == self.team.rank]

    @torch.inference_mode()
    def layer(self, index: int, solve: Solve) -> None:
        """Takes all rows through one layer. `solve` gets each group's statistics, and returns the weights to go on
        with."""
        experts = frozenset(name for name, linear in self.linears[index].items() if linear.expert)
        with self._loaded(index) as layer, ExitStack() as files:
            groups = layer.linears.groups(lambda: self._run(index, "quantized", self.rows[0]), layer.ready)
            targets = self._follow_full(index, layer, groups, files) if self.full else {}
            passes = Passes(layer.linears, lambda row: self._run(index, "quantized", row))
            for number, stage in enumerate(in_stages(groups, experts)):
                inputs = self._file(f"input-{index}-{number}", layer.weights[stage[0][0]].shape[1], files, len(stage))
                if len(stage) > 1:
                    self._collect(stage, passes, layer, inputs, experts)
                new: dict[str, torch.Tensor] = {}
                for place, group in enumerate(stage):
                    target = targets.pop(group, None)
                    found = self._look(index, group, passes, layer, inputs, target, place if len(stage) > 1 else None)
                    if passes.keeps(group):
                        passes.keep(group, inputs)
                    new |= {n: w.to(self.skeleton.device, self.compute) for n, w in solve(group, found).items()}
                    del found
                    layer.drop(group)
                    if target is not None:
                        self.team.meet()
                        target.remove()
                passes.weights |= new
                if not any(map(passes.keeps, stage)):
                    self.team.meet()
                    inputs.remove()
            for name in list(layer.weights):  # nothing calls it: nothing is known of its inputs
                columns = layer.weights[name].shape[1]
                nothing = torch.zeros((), device=self.skeleton.device).expand(columns, columns)
                solve((name,), Statistics({name: layer.weights[name]}, {}, nothing))
                layer.drop((name,))
            out = self.states["quantized"][(index + 1) % 2]
            for row in self.mine:
                out.write(row, passes.finish(row))
            out.sync()
            out.share(self.team)

    @torch.inference_mode()
    def head(self, name: str, linear: Linear, solve: Solve) -> None:
        """Looks at what the head gets, a linear behind the last layer, and has it solved."""
        weight = self.weights.read(linear.place.name).to(self.skeleton.device)
        inputs = self.skeleton.head_inputs(self.weights)
        states, columns = self.states["quantized"][len(self.linears) % 2], weight.shape[1]
        zeros = torch.zeros(columns, columns, device=self.skeleton.device)
        found = Statistics({name: weight}, {name: weight}, zeros)
        for row in self.rows:
            x = inputs(states.read(row, self.skeleton.device)).reshape(-1, columns)
            if _finite(x):
                found.add(x, None)
            else:
                self.excluded.add(row)
        self._check_excluded(len(self.linears))
        found.finish_sums()
        solve((name,), found)

    def _file(self, name: str, width: int, files: ExitStack, times: int = 1) -> HiddenStates:
        """Room for what linears get of all rows, `times` times; gone with `files`."""
        rows, length = self.ids.shape
        states = HiddenStates(self.folder / name, times * rows, length, width, self.compute)
        files.callback(states.remove)
        return states

    def _collect(
        self,
        stage: Sequence[Group],
        passes: Passes,
        layer: Layer,
        inputs: HiddenStates,
        experts: frozenset[str],
    ) -> None:
        """Writes what experts get, one group of linears after the other."""
        outputs = {name: len(weight) for name, weight in layer.weights.items() if name in experts}
        for row in self.mine:
            wanted = {group[0]: partial(inputs.write, place * len(self.ids) + row) for place, group in enumerate(stage)}
            passes.collect(row, wanted, outputs)
        inputs.share(self.team)

    def _run(self, index: int, stream: str, row: int) -> torch.Tensor:
        before = self.states[stream][index % 2].read(row, self.skeleton.device)
        return self.skeleton.run(index, before, self.calls[index])

    def _follow_full(
        self, index: int, layer: Layer, groups: Sequence[Group], files: ExitStack
    ) -> dict[Group, HiddenStates]:
        """Takes the full-precision stream through the layer. Returns what each group of linears gets there, on disk."""
        inputs = {
            group: self._file(f"target-{index}-{number}", layer.weights[group[0]].shape[1], files)
            for number, group in enumerate(groups)
            if not self.linears[index][group[0]].expert
        }
        first = {group[0]: states for group, states in inputs.items()}
        out = self.states["full"][(index + 1) % 2]
        for r in self.mine:

            def answer(name: str, x: torch.Tensor, row: int = r) -> torch.Tensor:
                if name in first:
                    first[name].write(row, x)
                return apply_linear(x, layer.ready[name])

            layer.linears.answer = answer
            out.write(r, self._run(index, "full", r))
        out.sync()
        for states in (out, *inputs.values()):
            states.share(self.team)
        return inputs

    def _look(
        self,
        index: int,
        group: Group,
        passes: Passes,
        layer: Layer,
        inputs: HiddenStates,
        target: HiddenStates | None,
        place: int | None,
    ) -> Statistics:
        """Statistics of one group over all rows, of inputs that are in a file, as the `place`-th of those there, or, if
        that is None, are to be seen in passes, and written where they are needed again, or others of a team need them.
        Rows with a value that is not finite are left out from here on."""
        columns, device = inputs.shape[2], self.skeleton.device
        weights = {name: layer.weights[name] for name in group}
        ready = {name: layer.ready[name] for name in group}
        found = Statistics(weights, ready, torch.zeros(columns, columns, device=device), team=self.team)
        if target is not None:
            found.aim()
        held_out = self.held_out if target is not None else frozenset()
        first = (place or 0) * len(self.ids)

        def wanted(row: int) -> torch.Tensor | None:
            return None if target is None else target.read(row, device).reshape(-1, columns)

        def apart() -> Iterator[Row]:
            for row in self.rows:
                if row in held_out:
                    yield inputs.read(first + row, device).reshape(-1, columns), wanted(row)

        def look(row: int) -> torch.Tensor:
            x = passes.stop(row, group[0]).to(self.compute)
            if row in held_out or passes.keeps(group) or not self.team.alone:
                inputs.write(row, x)
            return x

        def seen(row: int) -> torch.Tensor:
            if place is not None or not self.team.alone:
                return inputs.read(first + row, device)
            return look(row)

        if place is None and not self.team.alone:
            for row in self.mine:
                look(row)
            inputs.share(self.team)
        for row in self.rows:
            x, aim = seen(row).reshape(-1, columns), wanted(row)
            if not (_finite(x) and (aim is None or _finite(aim))):
                self.excluded.add(row)
            elif row not in held_out:
                if row not in self.apart:
                    found.add(x, aim)
                self.watch(group, row, x)
        self._check_excluded(index)
        found.finish_sums()
        found.held_out = apart
        return found

    @property
    def held_out(self) -> frozenset[int]:
        """Every eighth row, and one of fewer: what a step toward the full-precision model is judged by. With a single
        row there is no such step."""
        rows = len(self.ids)
        return frozenset(range(min(HELD_OUT, rows) - 1, rows, HELD_OUT)) if rows > 1 else frozenset()

    def _check_excluded(self, layer: int) -> None:
        if len(self.excluded) > EXCLUDED * len(self.ids):
            raise RunError(
                f"activations are not finite in {len(self.excluded)} of {len(self.ids)} calibration rows",
                where=f"layer {layer}",
                hint="the model overflows on this text, or holds such values; try another --calib, or --method rtn",
            )

    def _loaded(self, index: int) -> AbstractContextManager[Layer]:
        return loaded(self.skeleton, self.weights, index, self.linears[index], self.compute)

    def close(self) -> None:
        for states in self.states.values():
            for state in states:
                state.close()


@contextmanager
def loaded(
    skeleton: Skeleton, source: Weights, index: int, wanted: Mapping[str, Linear], compute: torch.dtype
) -> Iterator[Layer]:
    """A layer with its parameters in memory; `wanted` are its linears, taken over by `Layer.linears`."""
    places = {linear.place for linear in wanted.values()}
    others = [p for p in skeleton.inside[index] if p not in places]
    skeleton.fill(others, source)
    weights: dict[str, torch.Tensor] = {}
    for name, linear in wanted.items():
        value = source.read(linear.place.name).to(skeleton.device)
        value = value.T.contiguous() if linear.transposed else value
        weights[name] = value.float() if compute == torch.float32 else value
    ready = {name: weight.to(compute) for name, weight in weights.items()}
    modules = {name: skeleton.model.get_submodule(x.place.module) for name, x in wanted.items()}
    linears = Linears(skeleton.layers[index], modules)
    try:
        yield Layer(linears, weights, ready)
    finally:
        linears.release()
        skeleton.clear(others)


def hidden_width(skeleton: Skeleton) -> int:
    """Width of the hidden states between layers."""
    config = skeleton.model.config
    return int(getattr(config, "hidden_size", None) or config.n_embd)


def _finite(x: torch.Tensor) -> bool:
    """Whether all numbers are finite; by their sum first, which is not if one of them is not."""
    return bool(torch.isfinite(x.sum(dtype=torch.float32))) or bool(torch.isfinite(x).all())
