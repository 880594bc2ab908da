"""Drives a Plan: reads runs of tensors, encodes them on all cores, writes them where they belong, commits, resumes.

Three kinds of thread share the work, none of which holds more than a slab:

    workers    read a slab → check → encode → write it at its offset       (as many as --threads, and one)
    committer  sync what is complete → journal → hash the output behind the frontier
    hasher     reads the source once from end to end for its SHA-256: for the workers, that is read-ahead

The main thread hands out slabs in file order, and finishes a tensor when its last slab is done.
"""

from __future__ import annotations

import hashlib
import queue
import resource
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from quantkit.checkpoint.header import DTYPE_BITS, FLOATS, fsync_directory
from quantkit.checkpoint.journal import Journal
from quantkit.checkpoint.reader import SourceFiles, run_of
from quantkit.checkpoint.writer import FileLayout, ShardWriter, TrailingHash, copy_file, write_file
from quantkit.console import Console, Progress
from quantkit.errors import Interrupted, RunError, SourceError
from quantkit.layouts import Checkpoint
from quantkit.layouts.hf import CONFIG, index_text
from quantkit.memory import HASH_BUFFER
from quantkit.methods.base import Array, Encoder, Report
from quantkit.output import open_output
from quantkit.plan import CARD, COPY, INDEX, MANIFEST, Plan, Shard, Unit
from quantkit.planner import config_text, weight_map
from quantkit.publication import Measured, finish_manifest, manifest_text, render_from_manifest


@dataclass(frozen=True)
class Outcome:
    """How a run went. `reused` counts the units that an earlier, interrupted run had committed."""

    out: Path
    already_done: bool
    seconds: float
    peak_rss: int
    units: int
    reused: int


def execute(plan: Plan, checkpoint: Checkpoint, out: Path, console: Console, *, force: bool = False) -> Outcome:
    """Runs the plan into `out`. Raises OutputError or SourceError before anything is written, SourceError for weights
    that cannot be quantized, RunError when the machine fails, Interrupted on Ctrl-C: the last three can be resumed."""
    started = time.monotonic()
    journal = open_output(out, plan, checkpoint, force=force)
    if journal is None:
        return _outcome(out, plan, started, len(plan.units), already=True)
    try:
        done = {str(e["unit"]): Report(*e["report"]) for e in journal.entries if "unit" in e}
        sources = {str(e["source"]): str(e["sha256"]) for e in journal.entries if "source" in e}
        layouts = [FileLayout(s.name, s.header, s.nbytes) for s in plan.shards]
        writer = ShardWriter(out, layouts)
        try:
            with SourceFiles(checkpoint.folder, checkpoint.files) as files:
                measured = _Run(plan, files, writer, journal, console, done, sources).run()
                files.check_unchanged()
            writer.commit()
        finally:
            writer.close()
        _publish(plan, checkpoint, out, measured)
        journal.remove()
    except BaseException:
        journal.close()
        raise
    return _outcome(out, plan, started, len(done))


def _outcome(out: Path, plan: Plan, started: float, reused: int, *, already: bool = False) -> Outcome:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Outcome(out, already, time.monotonic() - started, peak, len(plan.units), reused)


@dataclass
class _Open:
    """A unit whose slabs are under way."""

    unit: Unit
    encoder: Encoder | None
    slabs: int
    nonfinite: int = 0
    started: float = field(default_factory=time.monotonic)


class _Run:
    def __init__(
        self,
        plan: Plan,
        files: SourceFiles,
        writer: ShardWriter,
        journal: Journal,
        console: Console,
        done: dict[str, Report],
        sources: dict[str, str],
    ) -> None:
        self.plan, self.files, self.writer, self.console = plan, files, writer, console
        self.reports = dict(done)
        self.pending = [u for u in plan.units if u.name not in done]
        self.committer = _Committer(plan, writer, journal, set(done))
        self.hasher = _SourceHasher(files, journal, sources)

    def run(self) -> Measured:
        total = sum(u.source.nbytes for u in self.pending)
        workers = self.plan.memory.threads + 1
        pool = ThreadPoolExecutor(workers, thread_name_prefix="slab")
        self.committer.start()
        self.hasher.start()
        in_flight: deque[tuple[_Open, Future[int], int]] = deque()
        try:
            with self.console.progress(total) as progress:
                for state, start, count in self._slabs():
                    in_flight.append((state, pool.submit(self._slab, state, start, count), count))
                    while len(in_flight) >= 2 * workers:
                        self._reap(in_flight, progress)
                while in_flight:
                    self._reap(in_flight, progress)
            outputs = self.committer.finish()
            sources = self.hasher.finish()
        except KeyboardInterrupt:
            raise Interrupted(
                "interrupted; what is finished is kept", hint="the same command takes up where it stopped"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
            self.hasher.stop()
            self.committer.stop()
        return Measured({u.name: self.reports[u.name] for u in self.plan.encoded}, outputs, sources)

    def _slabs(self) -> Iterator[tuple[_Open, int, int]]:
        """(unit, first element, number of elements) of every slab to do, in file order."""
        method, params = self.plan.recipe.quantize.implementation, self.plan.recipe.quantize.params
        for unit in self.pending:
            bits = DTYPE_BITS[unit.source.dtype]
            size = max(1, self.plan.memory.slab * 8 // bits)
            encoder = None
            if unit.weight is not None and unit.linear is not None:
                encoder = method.encoder(unit.weight, params, self.plan.recipe.resources.device)
                granule = method.granule(unit.weight)
                size = unit.source.numel if unit.linear.transposed else max(granule, size // granule * granule)
            starts = range(0, unit.source.numel, size) or range(1)
            state = _Open(unit, encoder, len(starts))
            for start in starts:
                yield state, start, min(size, unit.source.numel - start)

    def _slab(self, state: _Open, start: int, count: int) -> int:
        """Reads, checks, encodes and writes one slab. Runs in a worker. Returns how many values were set to zero."""
        unit, source = state.unit, state.unit.source
        if unit.weight is None or state.encoder is None:
            self._copy_slab(unit, start, count)
            return 0
        from quantkit.kernels.floats import BITS_DTYPE, zero_nonfinite

        x = run_of(source, self.files, start, count, BITS_DTYPE[source.dtype])
        zeroed = 0
        if (at := _first_nonfinite(x, source.dtype)) >= 0:
            if not self.plan.recipe.allow_nonfinite:
                raise _nonfinite_error(unit, start + at)
            zeroed = zero_nonfinite(x, source.dtype)
        if unit.linear is not None and unit.linear.transposed:
            x = np.ascontiguousarray(x.reshape(source.shape).T).reshape(-1)
        main = unit.outputs[0]
        offset = main.offset + state.encoder.main_offset(start)
        self.writer.write(main.file, offset, state.encoder.encode(x, start))
        return zeroed

    def _copy_slab(self, unit: Unit, start: int, count: int) -> None:
        source, target = unit.source, unit.outputs[0]
        item = np.dtype(f"u{DTYPE_BITS[source.dtype] // 8}") if source.dtype in FLOATS else np.dtype(np.uint8)
        if source.dtype not in FLOATS:
            # Elements of any other type are only bytes here, types below a byte included.
            start, count = (n * DTYPE_BITS[source.dtype] // 8 for n in (start, count))
        x = run_of(source, self.files, start, count, item)
        if source.dtype in FLOATS and not self.plan.recipe.allow_nonfinite:
            at = _first_nonfinite(x, source.dtype)
            if at >= 0:
                raise _nonfinite_error(unit, start + at)
        self.writer.write(target.file, target.offset + start * item.itemsize, x)

    def _reap(self, in_flight: deque[tuple[_Open, Future[int], int]], progress: Progress) -> None:
        """Waits for the oldest slab; finishes its tensor if it was the last one."""
        state, future, count = in_flight.popleft()
        state.nonfinite += future.result()
        self.committer.check()
        self.hasher.check()
        state.slabs -= 1
        unit = state.unit
        progress.advance(count * DTYPE_BITS[unit.source.dtype] // 8)
        if state.slabs:
            return
        report = Report(0.0, 0.0)
        if state.encoder is not None:
            companions, measured = state.encoder.finish()
            for info in unit.outputs[1:]:
                self.writer.write(info.file, info.offset, companions[info.name])
            report = Report(measured.squared_error, measured.squared_norm, state.nonfinite)
        self.reports[unit.name] = report
        self.committer.put(unit, report)
        progress.unit(unit.name, unit.source.nbytes, time.monotonic() - state.started)


def _first_nonfinite(x: Array, dtype: str) -> int:
    from quantkit.kernels.floats import first_nonfinite

    return first_nonfinite(x, dtype)


def _nonfinite_error(unit: Unit, element: int) -> SourceError:
    index = ", ".join(map(str, np.unravel_index(element, unit.source.shape)))
    return SourceError(
        f"tensor {unit.name!r} holds a NaN or an infinity at [{index}]",
        where=unit.source.file,
        hint="fetch or train the model again; --allow-nonfinite quantizes such values as zero and says so on the card",
    )


class _Background(threading.Thread):
    """A thread whose failure is the run's failure: kept, and raised where the main thread looks."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.failure: BaseException | None = None

    def work(self) -> None:
        raise NotImplementedError

    def run(self) -> None:
        try:
            self.work()
        except BaseException as e:
            self.failure = e

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure


class _Committer(_Background):
    """Makes finished units durable, in batches: data synced, then journalled, then hashed."""

    def __init__(self, plan: Plan, writer: ShardWriter, journal: Journal, done: set[str]) -> None:
        super().__init__("committer")
        self.writer, self.journal = writer, journal
        self.queue: queue.SimpleQueue[tuple[Unit, Report] | None] = queue.SimpleQueue()
        outputs = {t.name: u.name for u in plan.units for t in u.outputs}
        buffer = memoryview(bytearray(HASH_BUFFER))
        self.frontiers = [_Frontier(s, writer, outputs, buffer) for s in plan.shards]
        self.done = done

    def put(self, unit: Unit, report: Report) -> None:
        self.queue.put((unit, report))

    def work(self) -> None:
        self._hash()
        last = False
        while not last:
            batch = [self.queue.get()]
            while not self.queue.empty():
                batch.append(self.queue.get())
            last = None in batch
            finished = [entry for entry in batch if entry is not None]
            if finished:
                self.writer.sync({t.file for unit, _ in finished for t in unit.outputs})
                self.journal.append(
                    {"unit": unit.name, "report": [r.squared_error, r.squared_norm, r.nonfinite]}
                    for unit, r in finished
                )
                self.done |= {unit.name for unit, _ in finished}
                self._hash()

    def _hash(self) -> None:
        for frontier in self.frontiers:
            frontier.advance(self.done)

    def finish(self) -> dict[str, str]:
        """Waits until all is durable; SHA-256 by file name."""
        self.stop()
        self.check()
        return {f.shard.name: f.hash.hexdigest() for f in self.frontiers}

    def stop(self) -> None:
        if self.is_alive():
            self.queue.put(None)
            self.join()


class _Frontier:
    """How far one shard is complete from its start, and the hash that follows."""

    def __init__(self, shard: Shard, writer: ShardWriter, outputs: dict[str, str], buffer: memoryview) -> None:
        self.shard, self.outputs = shard, outputs
        self.waiting = deque(shard.tensors)
        self.hash = TrailingHash(partial(writer.read_into, shard.name), shard.nbytes, buffer)

    def advance(self, done: set[str]) -> None:
        while self.waiting and self.outputs[self.waiting[0].name] in done:
            self.waiting.popleft()
        self.hash.advance(self.waiting[0].offset if self.waiting else self.shard.nbytes)


class _SourceHasher(_Background):
    """SHA-256 of every source file, in one sequential pass. Files that an earlier run hashed are not read again."""

    def __init__(self, files: SourceFiles, journal: Journal, known: dict[str, str]) -> None:
        super().__init__("hasher")
        self.files, self.journal, self.digests = files, journal, dict(known)
        self._halt = threading.Event()

    def work(self) -> None:
        buffer = memoryview(bytearray(HASH_BUFFER))
        for file in self.files.files.values():
            if file.name in self.digests:
                continue
            trailing = TrailingHash(partial(self.files.pread, file.name), file.nbytes, buffer)
            while trailing.position < file.nbytes:
                if self._halt.is_set():
                    return
                trailing.advance(min(trailing.position + HASH_BUFFER, file.nbytes))
            self.digests[file.name] = trailing.hexdigest()
            self.journal.append([{"source": file.name, "sha256": self.digests[file.name]}])

    def finish(self) -> dict[str, str]:
        self.join()
        self.check()
        return self.digests

    def stop(self) -> None:
        self._halt.set()
        if self.is_alive():
            self.join()


def _publish(plan: Plan, checkpoint: Checkpoint, out: Path, measured: Measured) -> None:
    """Everything but the weights; config.json last: with it, the folder is a model."""
    digests = dict(measured.outputs)
    sizes = {f.role: f.nbytes for f in plan.files}
    contents = {CONFIG: config_text(plan.config)}
    for file in plan.files:
        if file.role == INDEX:
            contents[file.name] = index_text(weight_map(plan), plan.weight_bytes)
            write_file(out / file.name, contents[file.name])
        elif file.role == COPY:
            digests[file.name] = copy_file(checkpoint.folder / file.name, out / file.name)
            if (out / file.name).stat().st_size != file.nbytes:
                raise RunError(f"{file.name} changed while the run was under way", where=str(checkpoint.folder))
    digests |= {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    manifest = finish_manifest(plan.draft, Measured(measured.reports, digests, measured.sources), plan.files)
    write_file(out / "quantkit.json", manifest_text(manifest, sizes[MANIFEST]))
    card = render_from_manifest(manifest, plan.config).encode()
    if len(card) != sizes[CARD]:
        raise RunError(f"the card has {len(card)} bytes, the plan says {sizes[CARD]}: a fault of quantkit")
    write_file(out / "README.md", card)
    fsync_directory(out)
    write_file(out / CONFIG, contents[CONFIG])
    fsync_directory(out)
