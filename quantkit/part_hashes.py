"""Hashes of the files that no part of a job has whole: of each, by the part that is the last to be done with it.

A hash cannot be handed over, so it begins when all who write to a file are done. Left to `finish` alone, one process
would read again nearly all that many parts have written; it does so for what is left where a part broke off, where two
that ended at the same moment did not see each other, or where a file was written to since.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from quantkit.checkpoint.journal import FOLDER, Journal, read_journal
from quantkit.checkpoint.reader import SourceFiles
from quantkit.checkpoint.writer import ShardWriter, TrailingHash
from quantkit.console import Console
from quantkit.kept import Kept
from quantkit.memory import HASH_BUFFER
from quantkit.part_folder import journal_name
from quantkit.plans import Plan, Shard
from quantkit.runner import Share, layouts
from quantkit.sharing import Part
from quantkit.witness import Witness, written_sums


def is_done(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether nothing that a part had done is known to be altered since."""
    last = [key for e in entries for key in ("done", "altered") if key in e][-1:]
    return last == ["done"]


def unchanged(kept: Kept, writer: ShardWriter) -> Kept:
    """Without the hashes of files that somebody has written to since: they are hashed again, and compared."""
    shards = {
        name: digest
        for name, digest in kept.shards.items()
        if name in writer.layouts and kept.stamps.get(name) == writer.stamp(name)
    }
    return replace(kept, shards=shards)


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
            if head is None or head.get("job") != job or not is_done(found):
                complete -= theirs
    if not complete:
        return
    # Opened anew: of a file that is open, a machine may remember what it was before others wrote to it.
    with closing(ShardWriter(out, [f for f in layouts(plan) if f.name in complete], shared=True)) as writer:
        kept = unchanged(Kept.read(entries), writer)
        # A torch file gets its CRC-32s before it is hashed, from `finish`.
        left = [s for s in plan.shards if s.name in complete - kept.shards.keys() and s.zip is None]
        hash_files(plan, left, None, writer, journal, kept, console)


def hash_files(
    plan: Plan,
    shards: Sequence[Shard],
    files: SourceFiles | None,
    writer: ShardWriter,
    journal: Journal,
    kept: Kept,
    console: Console,
) -> tuple[Kept, list[Witness]]:
    """Hashes these weight files, and source files that nobody has hashed, several at once. With `kept`, what the
    witnesses found: the hash of what is not on disk as it was written is neither journalled nor returned."""
    left = {("source", f.name): (partial(files.pread, f.name), f.nbytes)
            for f in files.files.values() if f.name not in kept.sources} if files is not None else {}  # fmt: skip
    sums = written_sums(plan.units, kept.sums)
    witnesses = {s.name: Witness(s, writer.folder, sums) for s in shards}
    left |= {("shard", s.name): (partial(writer.read_into, s.name), s.nbytes) for s in shards}

    def digest(key: tuple[str, str]) -> str:
        (kind, name), (read, nbytes) = key, left[key]
        look = witnesses[name].look if kind == "shard" else None
        return TrailingHash(read, nbytes, memoryview(bytearray(HASH_BUFFER)), look).hexdigest()

    found: dict[tuple[str, str], str] = {}
    pool = ThreadPoolExecutor(plan.memory.threads, thread_name_prefix="hash")
    try:
        with console.progress(sum(nbytes for _, nbytes in left.values())) as progress:
            largest_first = sorted(left, key=lambda key: -left[key][1])
            futures = {pool.submit(digest, key): key for key in largest_first}
            for future in as_completed(futures):
                kind, name = key = futures[future]
                digest_of = future.result()
                progress.advance(left[key][1])
                if kind == "source" or not witnesses[name].altered:
                    found[key] = digest_of
                    stamp = {} if kind == "source" else {"stamp": writer.stamp(name)}
                    journal.append([{kind: name, "sha256": digest_of, **stamp}])
    finally:
        pool.shutdown(cancel_futures=True)
    sources = {name: digest for (kind, name), digest in found.items() if kind == "source"}
    hashed = {name: digest for (kind, name), digest in found.items() if kind == "shard"}
    more = replace(kept, sources={**kept.sources, **sources}, shards={**kept.shards, **hashed})
    return more, list(witnesses.values())
