"""The calibrated part of a run: layer after layer through the stream, each linear solved, packed and written.

Beside the tensors, a layer's end is journalled, once its tensors and the hidden states behind it are on disk. A run
that was interrupted goes on with the layer that it was at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.architectures import hidden_width
from quantkit.checkpoint.journal import FOLDER
from quantkit.checkpoint.reader import SourceFiles
from quantkit.checkpoint.writer import ShardWriter
from quantkit.committer import Committer
from quantkit.console import Progress
from quantkit.layouts import Checkpoint
from quantkit.methods.base import Array, Report
from quantkit.plans import Plan, Unit

if TYPE_CHECKING:
    import torch

    from quantkit.calibration.statistics import Statistics

REPORT_ROWS = 64  # of a weight, compared at a time


@dataclass(frozen=True)
class LayersDone:
    """What the journal says of an earlier run: how many layers are finished, which rows were left out by then, and the
    dtype that linears computed in."""

    layers: int = 0
    excluded: frozenset[int] = frozenset()
    compute: str = ""

    @classmethod
    def read(cls, entries: list[dict[str, Any]]) -> LayersDone:
        found = [e for e in entries if "layer" in e]
        last = found[-1] if found else None
        return cls() if last is None else cls(int(last["layer"]) + 1, frozenset(last["excluded"]), last["compute"])


def scratch(out: Path) -> Path:
    """Where hidden states lie while a run is under way."""
    return out / FOLDER / "hidden"


def can_resume(plan: Plan, out: Path, done: LayersDone) -> bool:
    """Whether the hidden states that the next layer needs are there."""
    if plan.tokens is None:
        return True
    nbytes = plan.tokens.ids.size * hidden_width(plan.config) * 4
    files = [scratch(out) / f"{name}-{done.layers % 2}" for name in plan.streams]
    return all(file.is_file() and file.stat().st_size == nbytes for file in files)


class LayerRun:
    """The layers of one run. `check` looks through a weight for what is not finite, and says how many values it set to
    zero; `reports`: what was solved, by tensor; `done`: how far it is."""

    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        files: SourceFiles,
        writer: ShardWriter,
        committer: Committer,
        progress: Progress,
        check: Callable[[Unit, int, Array], int],
    ) -> None:
        self.plan, self.checkpoint, self.files = plan, checkpoint, files
        self.writer, self.committer, self.progress = writer, committer, progress
        self.check = check
        self.units = {u.weight.module: u for u in plan.units if u.calibrated and u.weight is not None}
        self.zeroed: dict[str, int] = {}
        self.reports: dict[str, Report] = {}
        self.done = LayersDone()

    def run(self, out: Path, done: LayersDone) -> None:
        """All layers from the first that is not finished."""
        import torch

        from quantkit.calibration.skeleton import Skeleton
        from quantkit.calibration.stream import Linear, Stream
        from quantkit.torch_setup import fast_dtype, torch_settings

        plan, self.done = self.plan, done
        quantize, tokens = plan.recipe.quantize, plan.tokens
        assert quantize is not None
        assert tokens is not None
        weights = _Checked(self)
        skeleton = Skeleton(
            self.checkpoint.config, self.checkpoint.tensors, self.checkpoint.folder, plan.recipe.resources.device
        )
        places = {p.name: p for layer in skeleton.inside for p in layer}
        layers: list[dict[str, Linear]] = [{} for _ in skeleton.layers]
        for name, unit in self.units.items():
            assert unit.linear is not None
            linear = Linear(places[unit.name], unit.linear.transposed, unit.linear.expert)
            layers[unit.linear.layer][name] = linear
        folder = scratch(out)
        folder.mkdir(exist_ok=True)
        compute = fast_dtype(skeleton.device)
        ids = torch.from_numpy(tokens.ids.copy())
        with (
            torch_settings(plan.memory.threads),
            closing(
                Stream(skeleton, weights, ids, layers, folder, full="full" in plan.streams, compute=compute)
            ) as stream,
        ):
            stream.excluded = set(done.excluded)
            stream.begin(done.layers)
            for index in range(done.layers, len(layers)):
                stream.layer(index, self._solve)
                note = {"layer": index, "excluded": sorted(stream.excluded), "compute": str(compute).split(".")[1]}
                self.committer.note(note)
                self.committer.check()
                self.done = LayersDone.read([note])

    def _solve(self, group: tuple[str, ...], found: Statistics) -> Mapping[str, torch.Tensor]:
        import torch

        from quantkit.torch_setup import give_back_beside

        quantize = self.plan.recipe.quantize
        assert quantize is not None
        method, params = quantize.implementation, quantize.params
        restored: dict[str, torch.Tensor] = {}
        give_back_beside(found.hessian.nbytes)
        assert method.solve is not None
        for name, solved in method.solve(found, params):
            unit = self.units[name]
            assert unit.weight is not None
            assert method.pack is not None
            packed = method.pack(solved.coded, unit.weight, params)
            for info in unit.outputs:
                self.writer.write(info.file, info.offset, packed.pop(info.name))
            value = torch.from_numpy(solved.coded.restore())
            report = _report(found.weights[name], value, solved, self.zeroed.get(unit.name, 0))
            restored[name] = value
            self.reports[unit.name] = report
            self.committer.put(unit, report)
            self.progress.advance(unit.source.nbytes)
            self.progress.unit(unit.name, unit.source.nbytes)
            give_back_beside(found.hessian.nbytes)
        return restored


class _Checked:
    """The source's tensors, linears looked through for what is not finite as they are read."""

    def __init__(self, run: LayerRun) -> None:
        from quantkit.calibration.weights import CheckpointWeights

        self.run, self.inner = run, CheckpointWeights(run.checkpoint, run.files)
        self.units = {u.name: u for u in run.plan.units}

    @property
    def names(self) -> Any:
        return self.inner.names

    def read(self, name: str) -> torch.Tensor:
        def look(flat: Array) -> None:
            if (unit := self.units.get(name)) is not None and unit.calibrated:
                self.run.zeroed[name] = self.run.check(unit, 0, flat)

        return self.inner.read(name, look)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return self.inner.read_rows(name, rows)


def _report(weight: torch.Tensor, restored: torch.Tensor, solved: Any, zeroed: int) -> Report:
    error = norm = 0.0
    weight = weight.cpu()
    for start in range(0, len(weight), REPORT_ROWS):
        w, r = weight[start : start + REPORT_ROWS], restored[start : start + REPORT_ROWS]
        error += float((w.float() - r).double().square().sum())
        norm += float(w.double().square().sum())
    return Report(
        error,
        norm,
        zeroed,
        output_error=None if solved.report.fallback else solved.report.loss,
        fallback=solved.report.fallback,
    )
