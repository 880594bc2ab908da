"""Drives a Plan: reads the source once, encodes on all cores, writes every byte where it belongs, commits, resumes.

    readers        read slab after slab, ahead of the rest
    main thread    hashes them in file order and hands them on
    workers        check a slab → encode it → write it at its offset; the last of a tensor finishes it
    committer      syncs what is complete → journals it → hashes the output behind the frontier

Slabs in flight are few and of one size, so memory does not grow with the model. What is hashed is what is encoded, so
one pass over the source is enough: a second read would cost as much as encoding does.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from quantkit.checkpoint.header import DTYPE_BITS, FLOATS, fsync_directory
from quantkit.checkpoint.journal import Journal
from quantkit.checkpoint.reader import SourceFiles, not_finite, runs_buffer, safe_path
from quantkit.checkpoint.system import PAGE, page_buffer
from quantkit.checkpoint.views import SourceTensor, same_bytes
from quantkit.checkpoint.writer import (
    PARTIAL,
    FileLayout,
    ShardWriter,
    copy_file,
    missing_files,
    write_error,
    write_file,
)
from quantkit.committer import Committer, SourceHashes, ZipChecksums
from quantkit.console import Console, Progress
from quantkit.errors import Interrupted, NotFiniteError, RunError, SourceError
from quantkit.kept import Kept
from quantkit.kernels.rope import to_halves, to_pairs
from quantkit.kernels.sums import MODULUS
from quantkit.layer_runner import LayerRun, LayersDone, Nowhere, Written, can_resume, scratch
from quantkit.layouts import Checkpoint, open_checkpoint
from quantkit.layouts.hf import index_text
from quantkit.memory import slab_elements
from quantkit.methods.base import Array, Encoder, Report
from quantkit.outcome import Outcome, outcome_of
from quantkit.output import abandon, open_output
from quantkit.planner import config_text, weight_map
from quantkit.plans import CARD, COPY, GENERATED, INDEX, MANIFEST, Plan, Unit
from quantkit.publication import Measured, finish_manifest, manifest_text, render_from_manifest
from quantkit.witness import AlteredError, written_sums

if TYPE_CHECKING:
    from quantkit.solvers.team import Team

READERS = 2  # so that the disk always has a request to work on


def execute(
    plan: Plan, checkpoint: Checkpoint, out: Path, console: Console, *, force: bool = False, team: Team | None = None
) -> Outcome:
    """Runs the plan into `out`, with a team, if it leads one, whose others run `help_with`.

    Raises OutputError or SourceError before anything is written; NotFiniteError for weights that cannot be quantized,
    and then nothing is left; SourceError where the source changes, RunError when the machine fails, Interrupted on
    Ctrl-C: these three can be resumed.
    """
    started = time.monotonic()
    journal = open_output(out, plan, checkpoint, force=force)
    if journal is None:
        if team is not None:
            team.tell(None)
        return outcome_of(out, plan, started, len(plan.units), None)
    for warning in plan.warnings:
        console.warn(warning)
    again = "the same command without --force" if force else "the same command"
    try:
        if journal.damage and not force:
            console.warn(journal.damage)
        kept, layers = _left(plan, out, journal, console)  # before files that are gone are made anew
        writer = ShardWriter(out, file_layouts(plan))
        try:
            with SourceFiles(checkpoint.folder, checkpoint.files) as files:
                run = Run(plan, checkpoint, files, writer, journal, console, kept, team=team)
                measured = run.run(out, layers)
                files.check_unchanged()
            writer.commit()
        finally:
            writer.close()
        publish(plan, checkpoint, out, measured)
        shutil.rmtree(scratch(out), ignore_errors=True)
        journal.remove()
    except NotFiniteError:
        shutil.rmtree(scratch(out), ignore_errors=True)
        abandon(out, plan, journal)
        raise
    except AlteredError as e:
        journal.append({"altered": name} for name in sorted(e.units))
        solved = any(u.calibrated for u in plan.units if u.name in e.units)
        e.hint = f"run {again} again: {'all layers are solved' if solved else 'it is written'} anew"
        raise
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted; what is finished is kept", where=str(out), hint=f"{again} takes up where it stopped"
        ) from None
    except OSError as e:
        raise write_error(e, Path(e.filename or out)) from None
    finally:
        journal.close()
    return outcome_of(out, plan, started, len(kept.reports), measured)


def _left(plan: Plan, out: Path, journal: Journal, console: Console) -> tuple[Kept, LayersDone]:
    """What an earlier run did and still holds. What holds no more is journalled: otherwise, if this run is killed, the
    next one would believe it."""
    gone = missing_files(out, file_layouts(plan))
    kept, layers = Kept.read(journal.entries), LayersDone.read(journal.entries)
    lost = {u.name for u in plan.units if any(t.file in gone for t in u.outputs)} & kept.reports.keys()
    if lost:
        journal.append({"altered": name} for name in sorted(lost))
        file = next(t.file for u in plan.units if u.name in lost for t in u.outputs if t.file in gone)
        console.warn(f"{file}{PARTIAL} is gone, or of another size: what was in it is done again")
    kept = kept.without(lost)
    solved = {u.name for u in plan.units if u.calibrated and u.linear and 0 <= u.linear.layer < layers.layers}
    missing = solved - kept.reports.keys()
    if layers.layers and (missing or not can_resume(plan, out, layers)):
        what = "weights that were solved are" if missing else f"the hidden states behind layer {layers.layers - 1} are"
        console.warn(f"{what} gone or altered: all layers are solved again")
        journal.append([LayersDone().entry()])
        layers = LayersDone(sparsities=layers.sparsities)
    # Tensors of a layer that is not finished are solved again: what follows in the layer needs them.
    half = {u.name for u in plan.units if u.calibrated and u.linear and u.linear.layer >= layers.layers}
    return kept.without(half), layers


def file_layouts(plan: Plan) -> list[FileLayout]:
    return [FileLayout(s.name, s.fixed, s.nbytes) for s in plan.shards]


@dataclass(frozen=True)
class Share:
    """What a run does of a plan: units, and files, read and written, of which it has all and which it hashes."""

    units: tuple[Unit, ...]
    sources: frozenset[str]
    shards: frozenset[str]


_Slab = tuple[list[Array], Array]  # the bytes of each run, and the buffer that holds them


class _Open:
    """A unit whose slabs are under way."""

    def __init__(self, unit: Unit, encoder: Encoder | None, size: int, slabs: int) -> None:
        self.unit, self.encoder, self.size = unit, encoder, size
        self._left, self._nonfinite = slabs, 0
        self.sum = 0  # of what was written of its first output
        self._lock = threading.Lock()

    def count(self, start: int) -> int:
        """Elements in the slab that begins at `start`."""
        return min(self.size, self.unit.source.numel - start)

    def slab_done(self, nonfinite: int, written: int) -> int | None:
        """Counts a slab. For the last one: how many values of the whole unit were not finite."""
        with self._lock:
            self._left -= 1
            self._nonfinite += nonfinite
            self.sum = (self.sum + written) % MODULUS
            return None if self._left else self._nonfinite


@dataclass(frozen=True)
class _Watch:
    """How what is written is watched until it is hashed.

    |                    | written now                                  | written by an earlier run |
    |--------------------|----------------------------------------------|---------------------------|
    | a run of a moment  | nothing happens to it: summed for the next   | copies are mapped back,   |
    |                    | run, but for copies that are mapped back     | all else by its sums      |
    | in parts, or along | it may be long, and others write beside it:  | the same                  |
    | a text (`long`)    | all is summed, and compared when it's hashed |                           |
    """

    again: frozenset[str]  # units that an earlier run copied, to be mapped back once more
    long: bool
    copies_summed: bool


def _watch(plan: Plan, units: Iterable[Unit], kept: Kept, *, in_parts: bool, again: bool) -> _Watch:
    """again: whether what was compared with the source before is compared once more."""
    copied = {u.name for u in units if plan.checked and again and u.linear is None and not u.cast}
    long = in_parts or any(u.calibrated for u in units)
    # Copying is so fast that summing would show.
    return _Watch(frozenset(copied & kept.reports.keys()), long, long or not plan.checked)


class Run:
    """One process's work on a plan: all of it, or a share."""

    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        files: SourceFiles,
        writer: ShardWriter,
        journal: Journal,
        console: Console,
        kept: Kept,
        share: Share | None = None,
        *,
        again: bool = True,
        team: Team | None = None,
    ) -> None:
        """share: what of the plan is to be done. again: see `_watch`. team: whom layers are solved with."""
        self.team = team
        self.plan, self.checkpoint, self.files, self.writer, self.console = plan, checkpoint, files, writer, console
        self.share = share
        self.reports = dict(kept.reports)
        units = plan.units if share is None else share.units
        self.watch = _watch(plan, units, kept, in_parts=share is not None, again=again)
        done = self.reports.keys() - self.watch.again
        # Those to be solved among them: a fault in the last layer should not be found after hours.
        self.pending = [u for u in units if u.name not in done]
        self.checksums = ZipChecksums(plan, writer, {name: crc for name, crc in kept.crcs.items() if name in done})
        shards = [s for s in plan.shards if s.name not in kept.shards and (share is None or s.name in share.shards)]
        self.known = kept.sums
        sums = written_sums((u for u in plan.units if u.name in done), kept.sums)
        self.committer = Committer(
            plan, shards, writer, journal, set(done), sums, self.checksums,
            watchful=self.watch.long, in_parts=share is not None,
        )  # fmt: skip
        self.hashes = SourceHashes(files, journal, kept.sources, None if share is None else share.sources)
        self.shards = kept.shards

    def run(self, out: Path, layers: LayersDone | None = None) -> Measured:
        """layers: how far what is calibrated has come."""
        layers = layers or LayersDone()
        calibrated = any(u.calibrated for u in self.pending)
        total = sum(u.source.nbytes for u in self.pending)
        # Each slab owns a buffer. Reusing them matters: the kernel zeroes fresh memory page by page.
        count = self.plan.memory.in_flight
        free = [page_buffer(0) for _ in range(count)]
        ahead: deque[tuple[_Open, int, Future[_Slab]]] = deque()
        in_flight: deque[tuple[_Open, Future[bool], Array]] = deque()
        readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        workers = ThreadPoolExecutor(self.plan.memory.threads, thread_name_prefix="slab")
        slabs = self._slabs()
        self.committer.start()
        try:
            with self.console.progress(total) as progress:
                while True:
                    while free and (slab := next(slabs, None)) is not None:
                        state, start, n = slab
                        ahead.append(
                            (state, start, readers.submit(self._read, state.unit.source, start, n, free.pop()))
                        )
                    if not ahead and not in_flight:
                        break
                    if ahead:
                        state, start, reading = ahead.popleft()
                        raw, buffer = reading.result()
                        for run, data in zip(state.unit.source.runs(start, state.count(start)), raw, strict=True):
                            self.hashes.feed(run.file, run.offset, data)
                        in_flight.append((state, workers.submit(self._slab, state, start, raw), buffer))
                    # Half of the buffers are for slabs read ahead, half for those being encoded.
                    if len(in_flight) > count // 2 or not ahead:
                        free.append(self._reap(in_flight, progress))
                free.clear()
                done = self._layers(out, layers, progress) if calibrated else layers
                if self.team is not None and not calibrated:
                    self.team.tell(None)
            outputs = {**self.shards, **self.committer.finish()}
            sources = self.hashes.finish()
        finally:
            readers.shutdown(cancel_futures=True)
            workers.shutdown(cancel_futures=True)
            self.committer.stop()
        return Measured(
            {u.name: self.reports[u.name] for u in self.plan.encoded if u.name in self.reports},
            outputs,
            sources,
            len(done.excluded),
            done.compute,
        )

    def _layers(self, out: Path, layers: LayersDone, progress: Progress) -> LayersDone:
        """What is solved layer by layer."""
        from quantkit.solvers.team import ALONE  # it takes torch

        team = self.team or ALONE
        sink = Written(self.writer, self.committer, progress)
        check = partial(check_finite, self.plan, self.files)
        run = LayerRun(self.plan, self.checkpoint, self.files, sink, check, team)
        team.tell(layers)
        try:
            run.run(out, layers)
        finally:
            self.reports |= run.reports
        return run.done

    def _slabs(self) -> Iterator[tuple[_Open, int, int]]:
        """(unit, first element, number of elements) of every slab to do, in file order."""
        for unit in self.pending:
            size = slab_elements(unit.source, unit.granule, self.plan.memory.slab)
            encoder: Encoder | None = None
            quantize = self.plan.recipe.quantize
            if unit.pruned and not unit.calibrated:
                from quantkit.encoding import WholeEncoder  # it takes torch

                encoder = WholeEncoder(self.plan.recipe, unit)
            elif unit.weight is not None and quantize is not None and not unit.calibrated:
                encoder = quantize.implementation.encoder(
                    unit.weight, quantize.params, self.plan.recipe.resources.device
                )
            starts = range(0, unit.source.numel, size) if size else ()
            state = _Open(unit, encoder, size, max(1, len(starts)))
            for start in starts or (0,):
                yield state, start, state.count(start)

    def _read(self, source: SourceTensor, start: int, count: int, buffer: Array) -> _Slab:
        """The bytes of a run of elements, as they are stored, in `buffer` or a larger one."""
        runs = source.runs(start, count)
        if buffer.size < sum((run.nbytes // PAGE + 2) * PAGE for run in runs):
            buffer = runs_buffer(runs)
        return self.files.read_runs(buffer, runs, max(1, DTYPE_BITS[source.stored] // 8)), buffer

    def _slab(self, state: _Open, start: int, raw: list[Array]) -> bool:
        """Arranges, encodes or copies, and writes one slab, in a worker. Finishes the unit with its last one, and says
        so. What is solved later is only looked through."""
        unit, source = state.unit, state.unit.source
        x = source.arrange(raw, start)
        main = unit.outputs[0]
        zeroed = written = 0
        if self.plan.encoded and source.dtype in FLOATS:
            zeroed = check_finite(self.plan, self.files, unit, start, x)
        if unit.calibrated:
            return False
        if state.encoder is None:
            offset = main.offset + start * DTYPE_BITS[main.dtype] // 8
            if unit.cast:
                written = self.writer.write(main.file, offset, self._cast(unit, start, x))
            elif not (unit.name in self.watch.again and self._maps_back(unit, raw, x, offset)):
                y = to_pairs(x, unit.head_dim, source.columns) if unit.head_dim else x
                written = self.writer.write(main.file, offset, y, summed=self.watch.copies_summed)
                if self.plan.checked and not self._maps_back(unit, raw, x, offset):
                    raise RunError(
                        f"tensor {unit.name!r}, mapped back, is not what was read: a fault of quantkit or of the disk",
                        where=f"{self.writer.folder}/{main.file}", hint="run the same command again",
                    )  # fmt: skip
        else:
            if unit.linear is not None and unit.linear.transposed:
                x = np.ascontiguousarray(x.reshape(source.shape).T).reshape(-1)
            offset = main.offset + state.encoder.main_offset(start)
            written = self.writer.write(main.file, offset, state.encoder.encode(x, start))
        nonfinite = state.slab_done(zeroed, written)
        if nonfinite is None:
            return False
        report, sums = Report(0.0, 0.0), [state.sum]
        if state.encoder is not None:
            companions, measured = state.encoder.finish()
            sums += [self.writer.write(t.file, t.offset, companions[t.name]) for t in unit.outputs[1:]]
            report = replace(measured, nonfinite=nonfinite)
        elif unit.name in self.watch.again:  # nothing may have been written of it
            sums = list(self.known.get(unit.name, ()))
        elif not (unit.cast or self.watch.copies_summed):
            sums = []
        self.reports[unit.name] = report
        self.checksums.tensor(unit)
        self.committer.put(unit, report, sums)
        return True

    def _cast(self, unit: Unit, start: int, x: Array) -> Array:
        """Elements in fp16. NotFiniteError for one that it cannot hold."""
        from quantkit.kernels.floats import first_nonfinite, to_float16

        found = to_float16(x, unit.source.dtype)
        at = first_nonfinite(found, "F16")
        if at >= 0 and not self.plan.recipe.allow_nonfinite:
            index = ", ".join(map(str, np.unravel_index(start + at, unit.source.shape)))
            raise NotFiniteError(
                f"tensor {unit.name!r} holds a number at [{index}] that fp16 cannot, and the format has no other",
                where=f"{self.files.folder}/{unit.source.file}", hint="use --method gptq or bnb",
            )  # fmt: skip
        return to_pairs(found, unit.head_dim, unit.source.columns) if unit.head_dim else found

    def _maps_back(self, unit: Unit, raw: list[Array], x: Array, offset: int) -> bool:
        """Reads a slab that was written, undoes every step, and compares with the bytes that were read. FP8 has no way
        back: there, what was decoded is compared."""
        source = unit.source
        back = np.empty(x.nbytes, np.uint8)
        self.writer.read_back(unit.outputs[0].file, offset, back)
        y = back.view(x.dtype)
        if unit.head_dim:
            y = to_halves(y, unit.head_dim, source.columns)
        pairs = [(y, x)] if source.scales is not None else zip(source.restore(y, raw), raw, strict=True)
        return all(same_bytes(a, b) for a, b in pairs)

    def _reap(self, in_flight: deque[tuple[_Open, Future[bool], Array]], progress: Progress) -> Array:
        """Waits for the oldest slab, raises what went wrong anywhere, and returns the slab's buffer."""
        state, future, buffer = in_flight.popleft()
        finished = future.result()
        self.committer.check()
        source = state.unit.source
        if finished:
            progress.advance(source.nbytes)
            progress.unit(source.name, source.nbytes)
        return buffer


def check_finite(plan: Plan, files: SourceFiles, unit: Unit, start: int, x: Array) -> int:
    """SourceError at a NaN or an infinity; where they are allowed, sets those of a weight to encode to zero and returns
    how many they were. A copied tensor keeps them."""
    from quantkit.kernels.floats import first_nonfinite, zero_nonfinite

    dtype = unit.source.dtype
    at = first_nonfinite(x, dtype)
    if at < 0:
        return 0
    if not plan.recipe.allow_nonfinite:
        raise not_finite(unit.source, start + at, files.folder)
    return zero_nonfinite(x, dtype) if unit.weight is not None else 0


def help_with(plan: Plan, checkpoint: Checkpoint, out: Path, team: Team) -> None:
    """The part of a team's others: they solve layers with the leader, who runs `execute`, and writes."""
    layers: LayersDone | None = team.hear()
    if layers is not None:
        with SourceFiles(checkpoint.folder, checkpoint.files) as files:
            LayerRun(plan, checkpoint, files, Nowhere(), partial(check_finite, plan, files), team).run(out, layers)


def _reopen(plan: Plan, out: Path) -> None:
    """Reads the written folder as a stranger's, by its own layout: the same tensors must come out of it. RunError if
    not, and then no loader takes the folder for a model."""
    wanted = {u.name: (u.source.dtype, u.source.shape) for u in plan.units}
    try:
        found = open_checkpoint(out, prefer="hf" if plan.layout == "hf" else "mistral").tensors
        fault = "" if {n: (t.dtype, t.shape) for n, t in found.items()} == wanted else "its tensors are others"
    except SourceError as e:
        fault = e.what
    if fault:
        (out / plan.config_file).unlink()
        raise RunError(
            f"the written folder does not hold the model: {fault}; a fault of quantkit or of the disk",
            where=str(out), hint="begin anew, in another folder or with --force",
        )  # fmt: skip


def publish(plan: Plan, checkpoint: Checkpoint, out: Path, measured: Measured) -> None:
    """Everything but the weights; config.json (or params.json) last: with it, the folder is a model. What was converted
    is then read again."""
    digests = dict(measured.outputs)
    sizes = {f.role: f.nbytes for f in plan.files}
    contents = {**plan.generated, plan.config_file: config_text(plan.config)}
    if len(plan.shards) > 1:
        contents[plan.index_file] = index_text(weight_map(plan), plan.weight_bytes)
    copies = {file.name: file for file in plan.copies}
    for file in plan.files:
        if file.role == COPY:
            source = safe_path(checkpoint.folder, copies[file.name].source)
            digests[file.name] = copy_file(source, out / file.name)
            if (out / file.name).stat().st_size != file.nbytes:
                raise RunError(f"{source.name} changed while the run was under way", where=str(checkpoint.folder))
        elif file.role in (INDEX, GENERATED):
            write_file(out / file.name, contents[file.name])
    digests |= {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    manifest = finish_manifest(plan.draft, replace(measured, outputs=digests), plan.files)
    write_file(out / "quantkit.json", manifest_text(manifest, sizes[MANIFEST]))
    card = render_from_manifest(manifest, plan.config).encode()
    if len(card) != sizes[CARD]:
        raise RunError(f"the card has {len(card)} bytes, the plan says {sizes[CARD]}: a fault of quantkit")
    write_file(out / "README.md", card)
    fsync_directory(out)
    write_file(out / plan.config_file, contents[plan.config_file])
    fsync_directory(out)
    if plan.checked and plan.recipe.quantize is None:
        _reopen(plan, out)
