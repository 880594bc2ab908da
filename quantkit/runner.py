"""Drives a Plan: reads the source once, encodes on all cores, writes every byte where it belongs, commits, resumes.

    readers        read slab after slab, ahead of the rest
    main thread    hashes them in file order and hands them on
    workers        check a slab → encode it → write it at its offset; the last of a tensor finishes it
    committer      syncs what is complete → journals it → hashes the output behind the frontier

Slabs in flight are few and of one size, so memory does not grow with the model. What is hashed is what is encoded, so
one pass over the source is enough: a second read would cost as much as encoding does.
"""

from __future__ import annotations

import ctypes
import hashlib
import queue
import resource
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from quantkit.checkpoint.header import DTYPE_BITS, FLOATS, TensorInfo, fsync_directory
from quantkit.checkpoint.journal import Journal
from quantkit.checkpoint.reader import SourceFiles
from quantkit.checkpoint.system import PAGE, page_buffer
from quantkit.checkpoint.writer import FileLayout, ShardWriter, TrailingHash, copy_file, write_error, write_file
from quantkit.console import Console, Progress
from quantkit.errors import Interrupted, RunError, SourceError
from quantkit.layouts import Checkpoint
from quantkit.layouts.hf import CONFIG, index_text
from quantkit.memory import HASH_BUFFER
from quantkit.methods.base import Array, Encoder, Report
from quantkit.output import open_output
from quantkit.planner import config_text, weight_map
from quantkit.plans import CARD, COPY, INDEX, MANIFEST, Plan, Shard, Unit
from quantkit.publication import Measured, finish_manifest, manifest_text, render_from_manifest

READERS = 2  # so that the disk always has a request to work on


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
        lost = {u.name for u in plan.units if any(t.file in writer.fresh for t in u.outputs)}
        done = {name: report for name, report in done.items() if name not in lost}
        try:
            with SourceFiles(checkpoint.folder, checkpoint.files) as files:
                measured = _Run(plan, files, writer, journal, console, done, sources).run()
                files.check_unchanged()
            writer.commit()
        finally:
            writer.close()
        _publish(plan, checkpoint, out, measured)
        journal.remove()
    except KeyboardInterrupt:
        again = "the same command without --force" if force else "the same command"
        raise Interrupted(
            "interrupted; what is finished is kept", where=str(out), hint=f"{again} takes up where it stopped"
        ) from None
    except OSError as e:
        raise write_error(e, Path(e.filename or out)) from None
    finally:
        journal.close()
    return _outcome(out, plan, started, len(done))


def _outcome(out: Path, plan: Plan, started: float, reused: int, *, already: bool = False) -> Outcome:
    return Outcome(out, already, time.monotonic() - started, _peak_rss(), len(plan.units), reused)


def _peak_rss() -> int:
    """Most RAM that this process had. Not ru_maxrss where it can be helped: that begins with what our parent had."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


_Slab = tuple[Array, int, Array, Array]  # elements, offset in the file, the same as bytes, the buffer


class _Open:
    """A unit whose slabs are under way."""

    def __init__(self, unit: Unit, encoder: Encoder | None, slabs: int) -> None:
        self.unit, self.encoder = unit, encoder
        self._left, self._nonfinite = slabs, 0
        self._lock = threading.Lock()

    def slab_done(self, nonfinite: int) -> int | None:
        """Counts a slab. For the last one: how many values of the whole unit were not finite."""
        with self._lock:
            self._left -= 1
            self._nonfinite += nonfinite
            return None if self._left else self._nonfinite


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
        self.hashes = _SourceHashes(files, journal, sources)

    def run(self) -> Measured:
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
                        x, offset, raw, buffer = reading.result()
                        self.hashes.feed(state.unit.source.file, offset, raw)
                        in_flight.append((state, workers.submit(self._slab, state, start, x), buffer))
                    # Half of the buffers are for slabs read ahead, half for those being encoded.
                    if len(in_flight) > count // 2 or not ahead:
                        free.append(self._reap(in_flight, progress))
            outputs = self.committer.finish()
            sources = self.hashes.finish()
        finally:
            readers.shutdown(cancel_futures=True)
            workers.shutdown(cancel_futures=True)
            self.committer.stop()
        return Measured({u.name: self.reports[u.name] for u in self.plan.encoded}, outputs, sources)

    def _slabs(self) -> Iterator[tuple[_Open, int, int]]:
        """(unit, first element, number of elements) of every slab to do, in file order."""
        method, params = self.plan.recipe.quantize.implementation, self.plan.recipe.quantize.params
        for unit in self.pending:
            # A multiple of 8 elements begins and ends at a byte, whatever the dtype.
            size = max(8, self.plan.memory.slab // DTYPE_BITS[unit.source.dtype] * 8)
            encoder = None
            if unit.weight is not None and unit.linear is not None:
                encoder = method.encoder(unit.weight, params, self.plan.recipe.resources.device)
                granule = method.granule(unit.weight)
                size = unit.source.numel if unit.linear.transposed else max(granule, size // granule * granule)
            starts = range(0, unit.source.numel, size) or range(1)
            state = _Open(unit, encoder, len(starts))
            for start in starts:
                yield state, start, min(size, unit.source.numel - start)

    def _read(self, source: TensorInfo, start: int, count: int, buffer: Array) -> _Slab:
        """Elements as bit patterns, where they lie in the file and as bytes, and the buffer that holds them. Types that
        are not floats come as bytes."""
        bits = DTYPE_BITS[source.dtype]
        offset, nbytes = source.offset + start * bits // 8, count * bits // 8
        if buffer.size < (nbytes // PAGE + 2) * PAGE:
            buffer = page_buffer(nbytes)
        raw = self.files.read_aside(buffer, source.file, offset, nbytes)
        if source.dtype not in FLOATS:
            return raw, offset, raw, buffer
        if offset % (bits // 8):  # a header of odd length leaves every tensor askew; kernels want them aligned
            ctypes.memmove(buffer.ctypes.data, raw.ctypes.data, nbytes)  # within the buffer: no copy that no plan knows
            raw = buffer[:nbytes]
        return raw.view(f"u{bits // 8}"), offset, raw, buffer

    def _slab(self, state: _Open, start: int, x: Array) -> bool:
        """Checks, encodes and writes one slab, in a worker. Finishes the unit with its last one, and says so."""
        unit, source = state.unit, state.unit.source
        zeroed = self._check_finite(unit, start, x) if source.dtype in FLOATS else 0
        main = unit.outputs[0]
        if state.encoder is None:
            self.writer.write(main.file, main.offset + start * DTYPE_BITS[source.dtype] // 8, x)
        else:
            if unit.linear is not None and unit.linear.transposed:
                x = np.ascontiguousarray(x.reshape(source.shape).T).reshape(-1)
            offset = main.offset + state.encoder.main_offset(start)
            self.writer.write(main.file, offset, state.encoder.encode(x, start))
        nonfinite = state.slab_done(zeroed)
        if nonfinite is None:
            return False
        report = Report(0.0, 0.0)
        if state.encoder is not None:
            companions, measured = state.encoder.finish()
            for info in unit.outputs[1:]:
                self.writer.write(info.file, info.offset, companions[info.name])
            report = Report(measured.squared_error, measured.squared_norm, nonfinite)
        self.reports[unit.name] = report
        self.committer.put(unit, report)
        return True

    def _check_finite(self, unit: Unit, start: int, x: Array) -> int:
        """SourceError at a NaN or an infinity; where they are allowed, sets those of a weight to encode to zero and
        returns how many they were. A copied tensor keeps them."""
        from quantkit.kernels.floats import first_nonfinite, zero_nonfinite

        dtype = unit.source.dtype
        at = first_nonfinite(x, dtype)
        if at < 0:
            return 0
        if not self.plan.recipe.allow_nonfinite:
            index = ", ".join(map(str, np.unravel_index(start + at, unit.source.shape)))
            raise SourceError(
                f"tensor {unit.name!r} holds a NaN or an infinity at [{index}]",
                where=f"{self.files.folder}/{unit.source.file}",
                hint="fetch or train the model again; --allow-nonfinite quantizes such values as zero, or copies them",
            )
        return zero_nonfinite(x, dtype) if unit.weight is not None else 0

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


class _Committer(threading.Thread):
    """Makes finished units durable, in batches: data synced, then journalled, then hashed. Its failure is the run's:
    kept, and raised where the main thread looks."""

    def __init__(self, plan: Plan, writer: ShardWriter, journal: Journal, done: set[str]) -> None:
        super().__init__(name="committer", daemon=True)
        self.failure: BaseException | None = None
        self.writer, self.journal = writer, journal
        self.queue: queue.SimpleQueue[tuple[Unit, Report] | None] = queue.SimpleQueue()
        outputs = {t.name: u.name for u in plan.units for t in u.outputs}
        buffer = memoryview(bytearray(HASH_BUFFER))
        self.frontiers = [_Frontier(s, writer, outputs, buffer) for s in plan.shards]
        self.done = done

    def put(self, unit: Unit, report: Report) -> None:
        self.queue.put((unit, report))

    def run(self) -> None:
        try:
            self._work()
        except BaseException as e:
            self.failure = e

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _work(self) -> None:
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
        self.shard, self.outputs, self.writer = shard, outputs, writer
        self.waiting = deque(shard.tensors)
        self.hash = TrailingHash(partial(writer.read_into, shard.name), shard.nbytes, buffer)

    def advance(self, done: set[str]) -> None:
        while self.waiting and self.outputs[self.waiting[0].name] in done:
            self.waiting.popleft()
        before = self.hash.position
        self.hash.advance(self.waiting[0].offset if self.waiting else self.shard.nbytes)
        self.writer.forget(self.shard.name, before, self.hash.position)


class _SourceHashes:
    """SHA-256 of every source file, fed with what the run reads; what it skips is read for the hash alone. Files that
    an earlier run hashed are not hashed again."""

    def __init__(self, files: SourceFiles, journal: Journal, known: dict[str, str]) -> None:
        self.journal, self.digests = journal, dict(known)
        buffer = memoryview(bytearray(HASH_BUFFER))
        self.open = {
            name: TrailingHash(partial(files.pread, name), file.nbytes, buffer)
            for name, file in files.files.items()
            if name not in known
        }

    def feed(self, file: str, offset: int, data: Array) -> None:
        if file in self.open:
            self.open[file].feed(offset, data.data)
            if self.open[file].position == self.open[file].nbytes:
                self._close(file)

    def _close(self, file: str) -> None:
        self.digests[file] = self.open.pop(file).hexdigest()
        self.journal.append([{"source": file, "sha256": self.digests[file]}])

    def finish(self) -> dict[str, str]:
        for file in list(self.open):
            self._close(file)
        return self.digests


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
