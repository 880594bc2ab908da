"""Behind the workers: what is complete is synced, journalled and hashed, while the rest is still under way."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from quantkit.checkpoint.journal import Journal
from quantkit.checkpoint.reader import SourceFiles
from quantkit.checkpoint.torch_zip_writer import member_crc
from quantkit.checkpoint.writer import ShardWriter, TrailingHash
from quantkit.kept import shard_entry
from quantkit.memory import HASH_BUFFER
from quantkit.methods.base import Array, Report
from quantkit.plans import Plan, Shard, Unit
from quantkit.witness import Witness, check_unaltered, written_sums

STRETCH = 256 << 20  # bytes that are hashed before it is looked whether something is to be journalled


class Committer(threading.Thread):
    """Makes finished units durable, in batches: data synced, then journalled, then hashed. Its failure is the run's:
    kept, and raised where the main thread looks."""

    def __init__(
        self,
        plan: Plan,
        shards: Sequence[Shard],
        writer: ShardWriter,
        journal: Journal,
        done: set[str],
        sums: Mapping[str, int],
        checksums: ZipChecksums,
        *,
        watchful: bool,
        in_parts: bool,
    ) -> None:
        """shards: those to be hashed. done: units on disk already; sums: by tensor, of what was written of these.
        watchful: whether what is written now is compared when it is hashed, too, and not only what was written before.
        in_parts: whether hashes are journalled, for whoever goes on with the file.
        """
        super().__init__(name="committer", daemon=True)
        self.failure: BaseException | None = None
        self.writer, self.journal, self.checksums, self.in_parts = writer, journal, checksums, in_parts
        self.given_up = False
        self.queue: queue.SimpleQueue[_Done | _Note | None] = queue.SimpleQueue()
        self.outputs = outputs = {t.name: u.name for u in plan.units for t in u.outputs}
        buffer = memoryview(bytearray(HASH_BUFFER))
        self.done, self.sums, self.watchful = done, dict(sums), watchful
        self.frontiers = [
            _Frontier(s, writer, outputs, buffer, checksums, Witness(s, writer.folder, self.sums)) for s in shards
        ]

    def put(self, unit: Unit, report: Report, sums: Sequence[int]) -> None:
        """sums: what `ShardWriter.write` said of each of the unit's outputs."""
        self.queue.put(_Done(unit, report, sums))

    def note(self, entry: Mapping[str, Any]) -> None:
        """Journals an entry after all that was put before it, and waits until it is on disk."""
        note = _Note(entry, threading.Event())
        self.queue.put(note)
        while not note.written.wait(0.2):
            self.check()
            if not self.is_alive():
                break
        self.check()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as e:
            self.failure = e

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _work(self) -> None:
        last, behind = False, True  # behind: whether more can be hashed, of what an earlier run wrote, say
        while not last:
            batch = [] if behind else [self.queue.get()]
            while not self.queue.empty():
                batch.append(self.queue.get())
            last = None in batch
            finished = [entry for entry in batch if isinstance(entry, _Done)]
            if finished:
                self.writer.sync({t.file for f in finished for t in f.unit.outputs})
                self.journal.append(
                    {
                        "unit": f.unit.name,
                        "report": f.report.row(),
                        "sums": list(f.sums),
                        **self.checksums.entry(f.unit),
                    }
                    for f in finished
                )
                if self.watchful:
                    self.sums |= written_sums([f.unit for f in finished], {f.unit.name: f.sums for f in finished})
                self.done |= {f.unit.name for f in finished}
            for note in batch:
                if isinstance(note, _Note):
                    self.journal.append([dict(note.entry)])
                    note.written.set()
            if finished or behind:
                behind = self._hash()
        while not self.given_up and self._hash():
            pass

    def _hash(self) -> bool:
        """Hashes what can be, or a stretch of it; whether there is more."""
        left = STRETCH
        for frontier in self.frontiers:
            if left > 0:
                left -= frontier.advance(self.done, left)
        check_unaltered((frontier.witness for frontier in self.frontiers), self.outputs)
        if self.in_parts and (hashed := [e for frontier in self.frontiers if (e := frontier.entry()) is not None]):
            self.journal.append(hashed)
        return left <= 0

    def finish(self) -> dict[str, str]:
        """Waits until all is durable; SHA-256 by file name."""
        self._end()
        self.check()
        return {f.shard.name: f.hash.hexdigest() for f in self.frontiers}

    def stop(self) -> None:
        """Whatever is still to be hashed."""
        self.given_up = True
        self._end()

    def _end(self) -> None:
        if self.is_alive():
            self.queue.put(None)
            self.join()


@dataclass(frozen=True)
class _Done:
    unit: Unit
    report: Report
    sums: Sequence[int]


@dataclass(frozen=True)
class _Note:
    entry: Mapping[str, Any]
    written: threading.Event


class _Frontier:
    """How far one shard is complete from its start, and the hash that follows."""

    def __init__(
        self,
        shard: Shard,
        writer: ShardWriter,
        outputs: dict[str, str],
        buffer: memoryview,
        checksums: ZipChecksums,
        witness: Witness,
    ) -> None:
        self.shard, self.outputs, self.writer, self.witness = shard, outputs, writer, witness
        self.checksums = checksums
        self.stamp: int | None = None  # once all is written
        self.journalled = False
        self.waiting = deque((t.name, start) for t, start in zip(shard.tensors, _starts(shard), strict=True))
        self.hash = TrailingHash(partial(writer.read_into, shard.name), shard.nbytes, buffer, witness.look)

    def advance(self, done: set[str], most: int) -> int:
        """Hashes what is complete; how many bytes that were, `most` at most."""
        while self.waiting and self.outputs[self.waiting[0][0]] in done:
            self.waiting.popleft()
        if not self.waiting and self.stamp is None:
            self.checksums.end(self.shard)
            self.stamp = self.writer.stamp(self.shard.name)
        before = self.hash.position
        complete = self.waiting[0][1] if self.waiting else self.shard.nbytes
        self.hash.advance(min(complete, before + most))
        self.writer.forget(self.shard.name, before, self.hash.position)
        return self.hash.position - before

    def entry(self) -> dict[str, Any] | None:
        """For the journal, once, when all is hashed, and nobody has written to the file meanwhile."""
        name, stamp = self.shard.name, self.stamp
        if self.journalled or stamp is None or self.hash.position < self.shard.nbytes:
            return None
        self.journalled = True
        return shard_entry(name, self.hash.hexdigest(), stamp) if self.writer.stamp(name) == stamp else None


def _starts(shard: Shard) -> Iterable[int]:
    """Where that begins which is not written before a tensor is: in a torch file, the CRC-32 in its header."""
    if shard.zip is None:
        return [t.offset for t in shard.tensors]
    return map(shard.zip.crc_offset, range(len(shard.tensors)))


class ZipChecksums:
    """The CRC-32s of torch files: of each tensor into its header once it is complete, of all into the file's end.

    Nothing is written that is there already: when a file was last written to tells whether its hash still holds.
    """

    def __init__(self, plan: Plan, writer: ShardWriter, known: Mapping[str, int]) -> None:
        self.writer = writer
        self.crcs = dict(known)  # by unit, which has one output here
        self.places = {
            u.name: (shard, i)
            for shard in plan.shards
            if shard.zip is not None
            for i, u in enumerate(_in_order(plan.units, shard))
        }
        for name in known:
            self._write(name)

    def tensor(self, unit: Unit) -> None:
        if unit.name not in self.places:
            return
        (main,) = unit.outputs
        buffer = memoryview(bytearray(min(HASH_BUFFER, max(1, main.nbytes))))
        self.crcs[unit.name] = member_crc(partial(self.writer.read_into, main.file), main.offset, main.nbytes, buffer)
        self._write(unit.name)

    def _write(self, name: str) -> None:
        shard, i = self.places[name]
        if shard.zip is not None:
            self._put(shard.name, shard.zip.crc_offset(i), np.array([self.crcs[name]], "<u4").view(np.uint8))

    def _put(self, file: str, offset: int, raw: Array) -> None:
        there = np.empty_like(raw)
        self.writer.read_back(file, offset, there)
        if not np.array_equal(there, raw):
            self.writer.write(file, offset, raw)

    def entry(self, unit: Unit) -> dict[str, int]:
        """What the journal keeps, so that a resumed run needs not read the tensor again."""
        return {"crc": self.crcs[unit.name]} if unit.name in self.crcs else {}

    def end(self, shard: Shard) -> None:
        if shard.zip is None:
            return
        crcs = {i: self.crcs[name] for name, (s, i) in self.places.items() if s is shard}
        offset, raw = shard.zip.ending([crcs[i] for i in range(len(crcs))])
        self._put(shard.name, offset, np.frombuffer(raw, np.uint8))
        self.writer.sync([shard.name])


def _in_order(units: Sequence[Unit], shard: Shard) -> list[Unit]:
    """The units of a shard, as its tensors lie."""
    by_output = {u.outputs[0].name: u for u in units}
    return [by_output[t.name] for t in shard.tensors]


class SourceHashes:
    """SHA-256 of every source file, fed with what the run reads; what it skips is read for the hash alone. Files that
    an earlier run hashed are not hashed again. wanted: those to hash, if not all of them."""

    def __init__(
        self, files: SourceFiles, journal: Journal, known: Mapping[str, str], wanted: Collection[str] | None = None
    ) -> None:
        self.journal, self.digests = journal, dict(known)
        buffer = memoryview(bytearray(HASH_BUFFER))
        self.open = {
            name: TrailingHash(partial(files.pread, name), file.nbytes, buffer)
            for name, file in files.files.items()
            if name not in known and (wanted is None or name in wanted)
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
