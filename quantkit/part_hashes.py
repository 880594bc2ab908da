"""Hashes of the files that no part of a job has whole: of each, by the part that is the last to be done with it.

A hash cannot be handed over, so it begins when all who write to a file are done. Left to `finish` alone, one process
would read again nearly all that many parts have written; it does so for what is left where a part broke off, where two
that ended at the same moment did not see each other, or where a file was written to since.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from quantkit.checkpoint.journal import FOLDER, Journal, read_journal
from quantkit.checkpoint.reader import SourceFiles
from quantkit.checkpoint.writer import ShardWriter, TrailingHash
from quantkit.committer import ZipChecksums
from quantkit.console import Console
from quantkit.kept import Kept, shard_entry
from quantkit.memory import HASH_BUFFER
from quantkit.part_folder import journal_name
from quantkit.plans import Plan, Shard
from quantkit.runner import Share, file_layouts
from quantkit.sharing import Part
from quantkit.witness import Witness, written_sums


def is_done(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether nothing that a part had done is known to be altered since."""
    last = [key for e in entries for key in ("done", "altered") if key in e][-1:]
    return last == ["done"]


def hash_completed(
    plan: Plan, every: Sequence[Share], out: Path, job: str, part: Part, journal: Journal, console: Console
) -> None:
    """At a part's end: hashes what it shares with parts that are all done, unless one of them has. every: all parts'
    shares; job: by its id. What is not on disk as it was written is left to `finish`, which says whose it is."""
    files = [{t.file for u in share.units for t in u.outputs} for share in every]
    complete = files[part.index - 1] - every[part.index - 1].shards
    entries: list[dict[str, Any]] = []
    for n, theirs in enumerate(files, 1):
        if complete & theirs:
            head, found = read_journal(out / FOLDER / journal_name(Part(n, part.count)))
            entries += found
            if head != {"job": job, "part": str(Part(n, part.count))} or not is_done(found):
                complete -= theirs
    if not complete:
        return
    # Opened anew: of a file that is open, a machine may remember what it was before others wrote to it.
    with closing(ShardWriter(out, [f for f in file_layouts(plan) if f.name in complete], shared=True)) as writer:
        kept = Kept.read(entries).unchanged(writer.stamps)
        left = [s for s in plan.shards if s.name in complete - kept.shards.keys()]
        if zipped := [s for s in left if s.zip is not None]:
            checksums = ZipChecksums(plan, writer, kept.crcs)
            for shard in zipped:
                checksums.end(shard)
        hash_shards(plan, left, writer, journal, kept, console)


def hash_shards(
    plan: Plan, shards: Sequence[Shard], writer: ShardWriter, journal: Journal, kept: Kept, console: Console
) -> tuple[dict[str, str], list[Witness]]:
    """SHA-256s of these weight files, which are journalled too, and the witnesses. Of a file that is not on disk as it
    was written, or that was written to meanwhile, there is none."""
    sums = written_sums(plan.units, kept.sums)
    witnesses = {s.name: Witness(s, writer.folder, sums) for s in shards}
    before = writer.stamps
    found: dict[str, str] = {}
    jobs = [_Job(s.name, s.nbytes, partial(writer.read_into, s.name), witnesses[s.name].look) for s in shards]
    for name, digest in _digests(jobs, plan.memory.threads, console):
        if not witnesses[name].altered and writer.stamp(name) == before[name]:
            found[name] = digest
            journal.append([shard_entry(name, digest, before[name])])
    return found, list(witnesses.values())


def hash_sources(
    plan: Plan, files: SourceFiles, journal: Journal, known: Collection[str], console: Console
) -> dict[str, str]:
    """SHA-256s of the source's files but the known ones: no part read anything of them."""
    jobs = [_Job(f.name, f.nbytes, partial(files.pread, f.name)) for f in files.files.values() if f.name not in known]
    found: dict[str, str] = {}
    for name, digest in _digests(jobs, plan.memory.threads, console):
        found[name] = digest
        journal.append([{"source": name, "sha256": digest}])
    return found


@dataclass(frozen=True)
class _Job:
    """A file to hash; look: who is shown its bytes as they go by."""

    name: str
    nbytes: int
    read: Callable[[int, memoryview], int]
    look: Callable[[int, memoryview], None] | None = None

    def digest(self) -> str:
        return TrailingHash(self.read, self.nbytes, memoryview(bytearray(HASH_BUFFER)), self.look).hexdigest()


def _digests(jobs: Sequence[_Job], threads: int, console: Console) -> Iterator[tuple[str, str]]:
    """Names and SHA-256s, several at once, the largest first, as they are found."""
    if not jobs:
        return
    pool = ThreadPoolExecutor(min(threads, len(jobs)), thread_name_prefix="hash")
    try:
        with console.progress(sum(job.nbytes for job in jobs)) as progress:
            futures = {pool.submit(job.digest): job for job in sorted(jobs, key=lambda job: -job.nbytes)}
            for future in as_completed(futures):
                progress.advance(futures[future].nbytes)
                yield futures[future].name, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
