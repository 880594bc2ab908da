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
from quantkit.calibration.rows import Linears, Pass, apply_linear
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


class Stream:
    """Hidden states of all rows, and the layers that take them further.

    ids: int32 [rows, length]. linears: of each layer, those to solve. full: follow the full-precision model, too.
    held: so many rows keep their stopped passes in memory (faster), the others run the layer again up to where they
    stopped (less memory). It changes no bit of the result.
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
        held: int = 0,
    ) -> None:
        self.skeleton, self.weights, self.ids, self.linears = skeleton, weights, ids, linears
        self.folder, self.full, self.held = folder, full, held
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
        with self._loaded(index) as (linears, weights):
            groups = self._groups(index, linears, weights)
            targets = self._follow_full(index, linears, weights, groups) if self.full else {}
            new: dict[str, torch.Tensor] = {}
            passes = {r: Pass(linears, self._begin(index, "quantized", r), new) for r in self.rows}
            for group in groups:
                target = targets.pop(group, None)
                statistics = self._look(index, group, passes, weights, target)
                new |= {name: w.to(self.skeleton.device) for name, w in solve(group, statistics).items()}
                del statistics
                for name in group:
                    del weights[name]
                if target is not None:
                    target.remove()
                for row in passes.values():
                    row.go_past(group)
            for name in list(weights):  # nothing calls it: nothing is known of its inputs
                own = {name: weights.pop(name)}
                columns = own[name].shape[1]
                solve((name,), Statistics(own, torch.zeros(columns, columns, device=self.skeleton.device)))
            out = self.states["quantized"][(index + 1) % 2]
            for r, row in passes.items():
                out.write(r, row.finish())
            out.sync()

    def _begin(self, index: int, stream: str, row: int) -> Callable[[], torch.Tensor]:
        states, device = self.states[stream][index % 2], self.skeleton.device
        return lambda: self.skeleton.run(index, states.read(row, device), self.calls[index])

    def _groups(self, index: int, linears: Linears, weights: Mapping[str, torch.Tensor]) -> list[tuple[str, ...]]:
        return linears.groups(self._begin(index, "quantized", self.rows[0]), weights)

    def _follow_full(
        self,
        index: int,
        linears: Linears,
        weights: Mapping[str, torch.Tensor],
        groups: Sequence[tuple[str, ...]],
    ) -> dict[tuple[str, ...], HiddenStates]:
        """Takes the full-precision stream through the layer. Returns what each group of linears gets there, on disk."""
        length = self.ids.shape[1]
        aimed = [g for g in groups if not self.linears[index][g[0]].expert]
        inputs = {
            g: HiddenStates(self.folder / f"input-{i}", len(self.ids), length, weights[g[0]].shape[1])
            for i, g in enumerate(aimed)
        }
        first = {g[0]: states for g, states in inputs.items()}
        out = self.states["full"][(index + 1) % 2]
        for r in self.rows:

            def answer(name: str, x: torch.Tensor, row: int = r) -> torch.Tensor:
                if name in first:
                    first[name].write(row, x.reshape(1, length, -1))
                return apply_linear(x, weights[name])

            linears.answer = answer
            out.write(r, self._begin(index, "full", r)())
        out.sync()
        return inputs

    def _look(
        self,
        index: int,
        group: tuple[str, ...],
        passes: dict[int, Pass],
        weights: Mapping[str, torch.Tensor],
        target: HiddenStates | None,
    ) -> Statistics:
        """Statistics of one group over all rows. Rows with a value that is not finite are left out from here on."""
        columns, device = weights[group[0]].shape[1], self.skeleton.device
        found = Statistics({name: weights[name] for name in group}, torch.zeros(columns, columns, device=device))
        if target is not None:
            found.aim()
        held_out = self.held_out if target is not None else frozenset()
        places = {row: place for place, row in enumerate(passes)}

        def inputs(row: int) -> Row:
            x = passes[row].stop(group[0]).reshape(-1, columns)
            return x, None if target is None else target.read(row, device).reshape(-1, columns)

        def let_go(row: int) -> None:
            if places[row] >= self.held:
                passes[row].drop()

        def apart() -> Iterator[Row]:
            for row in passes:
                if row in held_out:
                    yield inputs(row)
                    let_go(row)

        for row in list(passes):
            x, wanted = inputs(row)
            if not all(bool(torch.isfinite(t).all()) for t in (x, wanted) if t is not None):
                self.excluded.add(row)
                passes.pop(row).drop()
                continue
            if row not in held_out:
                found.add(x, wanted)
            let_go(row)
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
            weights[name] = value.float()
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
