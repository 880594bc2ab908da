"""The layer loop: what every linear sees of the calibration text, one decoder layer in memory at a time.

Two models are followed: the quantized one, whose inputs the linears are fitted to, and, where asked for, the
full-precision one, whose outputs they should give. Between layers both are hidden states on disk.

    for each layer: its weights in, but for those of experts
        for each group of linears with one input: statistics over all rows → solve → go on with the new weights
            for each expert, where experts are called: its weights in; the same with its groups
        hidden states out, to the other one of two files; the layer is done when they are synced
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path

import torch

from quantkit.calibration.experts import Routed, old_sums, through_expert
from quantkit.calibration.hidden import HiddenStates, sum_on_disk
from quantkit.calibration.layers import Experts, Layer, Linear, Source, hidden_width, loaded_but_experts
from quantkit.calibration.room import Room
from quantkit.calibration.rows import Group, Passes, Routing
from quantkit.calibration.skeleton import Call, Skeleton, Weights
from quantkit.calibration.statistics import Row, Statistics
from quantkit.errors import RunError
from quantkit.kernels.sums import MODULUS
from quantkit.solvers.team import ALONE, Team

HELD_OUT = 8
EXCLUDED = 0.1  # of the rows may be left out for what is not finite; more is a fault of the model or of the text


Solve = Callable[[Group, Statistics], Mapping[str, torch.Tensor]]
Watch = Callable[[Group, int, torch.Tensor], None]  # a group, a row, and what the group gets of it [tokens, in]


class Stream:
    """Hidden states of all rows, and the layers that take them further.

    ids: int32 [rows, length]. linears: of each layer, those to solve. full: follow the full-precision model, too.
    compute: the dtype in which linears multiply; all else is float32. team: who shares the work; each takes some of the
    rows through the layers, and all see what linears get of every row. room: on a GPU, for hidden states; closed with
    the stream.
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
        room: Room | None = None,
    ) -> None:
        self.team = team
        self.room = room if team.alone else None  # others look for rows in files
        self.skeleton, self.weights, self.ids, self.linears = skeleton, weights, ids, linears
        self.folder, self.full, self.compute = folder, full, compute
        rows, length = ids.shape
        width = hidden_width(skeleton)
        names = ("quantized", "full") if full else ("quantized",)
        self.states = {
            n: [HiddenStates(folder / f"{n}-{i}", rows, length, width, room=self.room, lasting=True) for i in (0, 1)]
            for n in names
        }
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
                states[layer % 2].share(self.team)

    def sums(self, layer: int) -> dict[str, int]:
        """By stream, of the hidden states that enter a layer, what `sum_on_disk` must find of all rows that go there.
        Without those of another run's, and behind a last layer that nobody asks for more. To be called by all."""
        return self._of_all({name: states[layer % 2].sum_of(self.mine) for name, states in self.states.items()})

    def check(self, layer: int, sums: Mapping[str, int]) -> None:
        """RunError if rows that enter a layer are not, where their process sees them, what `sums` gave. To be called by
        all; alone, one has looked before."""
        if self.team.alone or not sums:
            return
        files = {name: self.states[name][layer % 2] for name in sums}
        if self._of_all({name: sum_on_disk(file.path, file.shape, self.mine) for name, file in files.items()}) != sums:
            error = RunError(
                "not all processes see the hidden states as they were written", where=str(self.folder),
                hint="wait until all machines see the same files, and run the same command again",
            )  # fmt: skip
            error.said = not self.team.leads
            raise error

    def _of_all(self, own: Mapping[str, int | None]) -> dict[str, int]:
        """Of all processes together; without those that one does not have."""
        each = self.team.gather(dict(own))
        every = {name: [sums[name] for sums in each] for name in own}
        return {name: sum(n or 0 for n in sums) % MODULUS for name, sums in every.items() if None not in sums}

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
        with self._loaded(index) as layer, ExitStack() as files:
            groups = layer.linears.groups(lambda: self._run(index, "quantized", self.rows[0]), layer.ready)
            targets = self._follow_full(index, layer, groups, files) if self.full else {}
            passes = Passes(layer.linears, lambda row: self._run(index, "quantized", row))
            for number, group in enumerate(groups):
                if group[0] in layer.experts:
                    name = f"{index}-{number}"
                    self._solve_experts(index, name, layer.experts[group[0]], layer, passes, files, solve)
                    continue
                inputs = self._file(f"input-{index}-{number}", layer.weights[group[0]].shape[1], files)
                self._solve_group(index, group, layer, passes, inputs, solve, targets.pop(group, None))
            for experts in (own for name, own in layer.experts.items() if (name,) not in groups):
                for expert in range(experts.count):
                    with experts.read(expert) as one:
                        self._solve_unseen(one, solve)
            self._solve_unseen(layer, solve)
            out = self.states["quantized"][(index + 1) % 2]
            for row in self.mine:
                out.write(row, passes.finish(row))
            out.sync()
            out.share(self.team)

    def _solve_group(
        self,
        index: int,
        group: Group,
        layer: Layer,
        passes: Passes,
        inputs: HiddenStates,
        solve: Solve,
        target: HiddenStates | None = None,
        known: Callable[[int], torch.Tensor] | None = None,
    ) -> None:
        """inputs: room for what the group gets. known: what it gets of a row, if that is on disk already."""
        found = self._look(index, group, layer, passes, inputs, target, known)
        if known is None and passes.keeps(group):
            passes.keep(group, inputs)
        passes.weights |= {n: w.to(self.skeleton.device, self.compute) for n, w in solve(group, found).items()}
        del found
        layer.drop(group)
        if target is not None:
            self.team.meet()
            target.remove()
        if inputs not in passes.inputs.values():
            self.team.meet()
            inputs.remove()

    def _solve_unseen(self, layer: Layer, solve: Solve) -> None:
        """Linears that nothing calls: nothing is known of their inputs."""
        for name in list(layer.weights):
            columns = layer.weights[name].shape[1]
            nothing = torch.zeros((), device=self.skeleton.device).expand(columns, columns)
            solve((name,), Statistics({name: layer.weights[name]}, {}, nothing))
            layer.drop((name,))

    def _solve_experts(
        self, index: int, name: str, experts: Experts, layer: Layer, passes: Passes, files: ExitStack, solve: Solve
    ) -> None:
        """Rows that are found to be broken at one expert are left out at all later ones, and of what the experts' last
        linears get from the first expert on."""
        routed = self._routed(f"input-{name}", layer.linears.routings[experts.name], experts.count, files)
        broken: set[int] = set()
        looked_at = torch.tensor(experts.looked_at(), dtype=torch.long, device=self.skeleton.device)
        for row in self.mine:
            routing = passes.routing(row, experts.name)
            routed.write(row, routing)
            seen = torch.isin(routing.index, looked_at).any(1)
            if not _finite(routing.hidden[seen].to(self.compute)):
                broken.add(row)
        routed.share()
        excluded = [set(self.excluded), self.excluded.union(*self.team.gather(broken))]
        for expert in range(experts.count):
            self._solve_expert(index, f"input-{name}-{expert}", experts, expert, routed, excluded, solve)
        self.excluded |= excluded[0]
        passes.totals[experts.name] = routed.total

    def _solve_expert(
        self,
        index: int,
        name: str,
        experts: Experts,
        expert: int,
        routed: Routed,
        excluded: Sequence[set[int]],
        solve: Solve,
    ) -> None:
        """One expert, and what it gives of all rows. excluded: rows left out at its first linears, and at others."""
        with experts.read(expert) as layer, ExitStack() as files:
            passes = through_expert(experts, expert, layer, routed)
            for place, group in enumerate(experts.groups(expert)):
                first = group != (experts.last(expert),)
                self.excluded = excluded[0 if first else 1]
                inputs = self._file(f"{name}-{place}", layer.weights[group[0]].shape[1], files)
                known = partial(routed.inputs, expert=expert) if first else None
                self._solve_group(index, group, layer, passes, inputs, solve, known=known)
            self.excluded = excluded[1]
            for row in self.mine:
                routed.add(row, expert, passes.finish(row))
            self.team.meet()

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

    def _file(self, name: str, width: int, files: ExitStack) -> HiddenStates:
        """Room for what linears get of all rows; gone with `files`."""
        rows, length = self.ids.shape
        states = HiddenStates(self.folder / name, rows, length, width, self.compute, room=self.room)
        files.callback(states.remove)
        return states

    def _routed(self, name: str, like: Routing, count: int, files: ExitStack) -> Routed:
        rows, length = self.ids.shape
        return Routed(self.folder / name, (rows, length), like, count, files, self.skeleton.device, self.team)

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
            if group[0] not in layer.experts and not self.linears[index][group[0]].expert
        }
        passes = Passes(layer.linears, lambda row: self._run(index, "full", row))
        out = self.states["full"][(index + 1) % 2]
        with ExitStack() as beside:
            for number, (before, name) in enumerate(at_experts(groups, layer)):

                def wanted(row: int, before: Sequence[Group] = before) -> dict[str, Callable[[torch.Tensor], None]]:
                    return {g[0]: partial(inputs[g].write, row) for g in before if g in inputs}

                if name is None:
                    for row in self.mine:
                        out.write(row, passes.through(row, wanted(row), layer.ready))
                    continue
                like, count = layer.linears.routings[name], layer.experts[name].count
                routed = self._routed(f"target-{index}-{number}", like, count, beside)
                for row in self.mine:
                    routed.write(row, passes.routing(row, name, wanted(row), layer.ready))
                passes.totals[name] = old_sums(layer.experts[name], routed, self.mine)
                for group in inputs.keys() & before:
                    if passes.keeps(group):
                        passes.keep(group, inputs[group])
                        passes.weights |= {linear: layer.ready[linear] for linear in group}
        out.sync()
        for states in (out, *inputs.values()):
            states.share(self.team)
        return inputs

    def _look(
        self,
        index: int,
        group: Group,
        layer: Layer,
        passes: Passes,
        inputs: HiddenStates,
        target: HiddenStates | None,
        known: Callable[[int], torch.Tensor] | None,
    ) -> Statistics:
        """Statistics of one group over all rows, of inputs that are known, or, if `known` is None, are to be seen in
        passes, and written where they are needed again, or others of a team need them. Rows with a value that is not
        finite are left out from here on."""
        columns, device = inputs.shape[2], self.skeleton.device
        weights = {name: layer.weights[name] for name in group}
        ready = {name: layer.ready[name] for name in group}
        found = Statistics(weights, ready, torch.zeros(columns, columns, device=device), team=self.team)
        if target is not None:
            found.aim()
        held_out = self.held_out if target is not None else frozenset()

        def wanted(row: int) -> torch.Tensor | None:
            return None if target is None else target.read(row, device).reshape(-1, columns)

        def apart() -> Iterator[Row]:
            for row in self.rows:
                if row in held_out:
                    yield inputs.read(row, device).reshape(-1, columns), wanted(row)

        def look(row: int) -> torch.Tensor:
            x = passes.stop(row, group[0]).to(self.compute)
            if row in held_out or passes.keeps(group) or not self.team.alone:
                inputs.write(row, x)
            return x

        def seen(row: int) -> torch.Tensor:
            if known is not None:
                return known(row).to(self.compute)
            return look(row) if self.team.alone else inputs.read(row, device)

        if known is None and not self.team.alone:
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
        return loaded_but_experts(Source(self.skeleton, self.weights, self.compute), index, self.linears[index])

    def close(self) -> None:
        if self.room is not None:
            self.room.close()
        for states in self.states.values():
            for state in states:
                state.close()


def at_experts(groups: Sequence[Group], layer: Layer) -> list[tuple[list[Group], str | None]]:
    """Groups in their order, in runs that end where experts are called, with the experts' name; the last run may be
    empty, and has none."""
    runs: list[tuple[list[Group], str | None]] = []
    before: list[Group] = []
    for group in groups:
        if group[0] in layer.experts:
            runs.append((before, group[0]))
            before = []
        else:
            before.append(group)
    return [*runs, (before, None)]


def _finite(x: torch.Tensor) -> bool:
    """Whether all numbers are finite; by their sum first, which is not if one of them is not."""
    return bool(torch.isfinite(x.sum(dtype=torch.float32))) or bool(torch.isfinite(x).all())
