"""The calibrated part of a run: layer after layer through the stream, each linear pruned, solved, packed and written.

Beside the tensors, a layer's end is journalled, once its tensors and the hidden states behind it are on disk. A run
that was interrupted goes on with the layer that it was at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from quantkit.architectures import hidden_width
from quantkit.checkpoint.journal import FOLDER
from quantkit.checkpoint.reader import SourceFiles
from quantkit.checkpoint.writer import ShardWriter
from quantkit.committer import Committer
from quantkit.console import Progress
from quantkit.layouts import Checkpoint
from quantkit.methods.base import Array, Report
from quantkit.plans import Plan, Unit
from quantkit.pruning import Prune, in_attention

if TYPE_CHECKING:
    import torch

    from quantkit.calibration.norms import Every, Norms, NormStream
    from quantkit.calibration.statistics import Statistics
    from quantkit.calibration.stream import Stream
    from quantkit.encoding import Encoding, Made
    from quantkit.solvers.team import Team

S = TypeVar("S", bound="Stream")


@dataclass(frozen=True)
class LayersDone:
    """What the journal says of an earlier run: how many layers are finished, which rows were left out by then, and the
    dtype that linears computed in; where each layer has its own, their sparsities; and by stream, sums of the hidden
    states that enter the next one."""

    layers: int = 0
    excluded: frozenset[int] = frozenset()
    compute: str = ""
    sparsities: tuple[float, ...] = ()
    hidden: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, entries: list[dict[str, Any]]) -> LayersDone:
        found = [e for e in entries if "layer" in e]
        last = found[-1] if found else None
        own = next((tuple(map(float, e["sparsities"])) for e in entries if "sparsities" in e), ())
        if last is None:
            return cls(sparsities=own)
        return cls(int(last["layer"]) + 1, frozenset(last["excluded"]), last["compute"], own, last["hidden"])

    def entry(self) -> dict[str, Any]:
        """The journal's."""
        return {
            "layer": self.layers - 1, "excluded": sorted(self.excluded), "compute": self.compute,
            "hidden": dict(self.hidden),
        }  # fmt: skip


def scratch(out: Path) -> Path:
    """Where hidden states lie while a run is under way."""
    return out / FOLDER / "hidden"


def can_resume(plan: Plan, out: Path, done: LayersDone) -> bool:
    """Whether the hidden states that the next layer needs are there, as they were written."""
    left = any(u.calibrated and u.linear is not None and u.linear.layer >= done.layers for u in plan.units)
    if plan.tokens is None or not left:
        return True
    from quantkit.calibration.hidden import sum_on_disk

    rows, length = plan.tokens.ids.shape
    shape, used = (rows, length, hidden_width(plan.config)), [r for r in range(rows) if r not in done.excluded]
    found = {n: sum_on_disk(scratch(out) / f"{n}-{done.layers % 2}", shape, used) for n in plan.streams}
    return None not in found.values() and all(found[name] == wanted for name, wanted in done.hidden.items())


class Sink(Protocol):
    """Where solved linears and notes of finished layers go."""

    def put(self, unit: Unit, tensors: dict[str, Array], report: Report) -> None: ...

    def note(self, entry: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Written:
    """To disk."""

    writer: ShardWriter
    committer: Committer
    progress: Progress

    def put(self, unit: Unit, tensors: dict[str, Array], report: Report) -> None:
        sums = [self.writer.write(info.file, info.offset, tensors.pop(info.name)) for info in unit.outputs]
        self.committer.checksums.tensor(unit)
        self.committer.put(unit, report, sums)
        self.progress.advance(unit.source.nbytes)
        self.progress.unit(unit.name, unit.source.nbytes)

    def note(self, entry: Mapping[str, Any]) -> None:
        self.committer.note(entry)


class Nowhere:
    """Another of the team writes."""

    def put(self, unit: Unit, tensors: dict[str, Array], report: Report) -> None:
        pass

    def note(self, entry: Mapping[str, Any]) -> None:
        pass


class LayerRun:
    """The layers of one run. `check` looks through a weight for what is not finite, and says how many values it set to
    zero; `reports`: what was solved, by tensor; `done`: how far it is."""

    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        files: SourceFiles,
        sink: Sink,
        check: Callable[[Unit, int, Array], int],
        team: Team,
    ) -> None:
        self.plan, self.checkpoint, self.files = plan, checkpoint, files
        self.sink, self.check, self.team = sink, check, team
        self.encoding: Encoding
        self.units = {u.weight.module: u for u in plan.units if u.calibrated and u.weight is not None}
        self.zeroed: dict[str, int] = {}
        self.reports: dict[str, Report] = {}
        self.done = LayersDone()

    def run(self, out: Path, done: LayersDone) -> None:
        """All layers from the first that is not finished."""
        import torch

        from quantkit.calibration.layers import Linear
        from quantkit.calibration.norms import NormStream
        from quantkit.calibration.room import Room
        from quantkit.calibration.skeleton import Skeleton
        from quantkit.calibration.stream import Stream
        from quantkit.calibration.weights import CheckpointWeights
        from quantkit.encoding import Encoding
        from quantkit.torch_setup import fast_dtype, torch_settings

        plan, self.done = self.plan, done
        prune, tokens = plan.recipe.prune, plan.tokens
        assert tokens is not None
        weights = CheckpointWeights(self.checkpoint, self.files, self._look)
        device = plan.recipe.resources.device
        skeleton = Skeleton(self.checkpoint.config, self.checkpoint.tensors, self.checkpoint.folder, device)
        places = {p.name: p for layer in skeleton.inside for p in layer}
        layers: list[dict[str, Linear]] = [{} for _ in skeleton.layers]
        head: dict[str, Linear] = {}  # behind the last layer
        places |= {p.name: p for p in skeleton.outside}
        for name, unit in self.units.items():
            assert unit.linear is not None
            linear = Linear(places[unit.name], unit.linear.transposed, unit.linear.expert)
            of_layer = layers[unit.linear.layer] if unit.linear.layer < len(layers) else head
            of_layer[name] = linear
        folder = scratch(out)
        if self.team.leads:
            folder.mkdir(exist_ok=True)
            for left in (*folder.glob("input-*"), *folder.glob("target-*")):  # of a layer that was not finished
                left.unlink()
        self.team.meet()
        compute = fast_dtype(skeleton.device)
        ids = torch.from_numpy(tokens.ids.copy())
        assert plan.memory.layers is not None
        needed = plan.memory.layers.at_work

        def stream(kind: type[S], *, full: bool) -> S:
            room, team = Room.beside(skeleton.device, needed), self.team
            return kind(skeleton, weights, ids, layers, folder, full=full, compute=compute, team=team, room=room)

        with torch_settings(plan.memory.threads):
            if prune is not None and prune.owl and not done.sparsities:
                with closing(stream(NormStream, full=False)) as first:
                    done = self._survey(first, prune, len(layers))
            self.encoding = Encoding(plan.recipe, self.units, done.sparsities, written=self.team.leads)
            whole = "full" in plan.streams
            hessian = plan.recipe.needs == "hessian"
            made: Stream = stream(Stream, full=whole) if hessian else stream(NormStream, full=False)
            with closing(made):
                made.excluded = set(done.excluded)
                made.begin(done.layers)
                made.check(done.layers, done.hidden)
                for index in range(done.layers, len(layers) + len(head)):
                    if isinstance(made, NormStream):
                        made.norms(index, self._encode, in_attention)
                    elif index < len(layers):
                        made.layer(index, self._solve)
                    else:
                        made.head(*next(iter(head.items())), self._solve)
                    hidden = made.sums(index + 1)  # and what all have written is on disk
                    excluded, dtype = frozenset(made.excluded), str(compute).split(".")[1]
                    now = LayersDone(index + 1, excluded, dtype, done.sparsities, hidden)
                    self.sink.note(now.entry())
                    self.done = now
        self.files.check_unchanged()  # by each of its own machine's, before the leader commits
        self.team.meet()

    def _survey(self, stream: NormStream, prune: Prune, layers: int) -> LayersDone:
        """How much of each layer goes, by its outliers in the model as it is."""
        from quantkit.solvers.masks import by_outliers, outlier_part

        outliers: list[float] = []
        sizes: list[int] = []

        def look(every: Every) -> None:
            def pruned(visit: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
                every(lambda name, norms: visit(norms.weight, norms.squares) if self.units[name].pruned else None)

            part, size = outlier_part(pruned, prune.outlier)
            outliers.append(part)
            sizes.append(size)

        stream.begin()
        for index in range(layers):
            stream.survey(index, look)
        assert prune.sparsity is not None
        found = by_outliers(outliers, sizes, prune.sparsity, prune.range)
        self.sink.note({"sparsities": found})
        return LayersDone(sparsities=tuple(found))

    def _look(self, name: str, flat: Array) -> None:
        """Linears are looked through for what is not finite as they are read."""
        unit = self.units.get(name.removesuffix(".weight"))
        if unit is not None:
            self.zeroed[unit.name] = self.check(unit, 0, flat)

    def _encode(self, name: str, norms: Norms) -> torch.Tensor:
        made = self.encoding.alone(name, norms)
        self._write(self.units[name], made)
        return made.weight

    def _solve(self, group: tuple[str, ...], found: Statistics) -> Mapping[str, torch.Tensor]:
        from quantkit.torch_setup import give_back_beside

        restored: dict[str, torch.Tensor] = {}
        give_back_beside(found.hessian.nbytes)
        for unit, made in self.encoding.group(found):
            assert unit.weight is not None
            self._write(unit, made)
            restored[unit.weight.module] = made.weight
            give_back_beside(found.hessian.nbytes)
        return restored

    def _write(self, unit: Unit, made: Made) -> None:
        report = replace(made.report, nonfinite=self.zeroed.get(unit.name, 0))
        self.reports[unit.name] = report
        self.sink.put(unit, made.tensors, report)
