"""One job shared out to several processes, on one machine or on many that see the same folder.

Every part makes the same plan, takes its units of it, and writes them where they belong in files that all of them open.
What is done is in a journal of each part's own. `finish` reads all journals and makes a model of the folder.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from quantkit.checkpoint.journal import FOLDER, Journal
from quantkit.checkpoint.reader import SourceFiles
from quantkit.checkpoint.shared import (
    GONE,
    PAUSE,
    RETRIES,
    make_folder,
)
from quantkit.checkpoint.writer import ShardWriter, write_error, writing
from quantkit.console import Console
from quantkit.errors import Interrupted, NotFiniteError, OutputError, RunError, UsageError
from quantkit.kept import Kept
from quantkit.layouts import Checkpoint
from quantkit.outcome import Outcome, outcome_of
from quantkit.output import FILES, JOB, check_place, is_finished, was_finished, without
from quantkit.part_folder import (
    begin,
    check_files,
    check_same_job,
    finished_meanwhile,
    forget,
    has_journals,
    job_of,
    journal_name,
    locked,
    no_parts,
    read_job,
)
from quantkit.part_hashes import hash_completed, hash_shards, hash_sources, is_done
from quantkit.plans import Plan, Unit
from quantkit.recipe import Recipe
from quantkit.runner import Run, Share, file_layouts, publish
from quantkit.sharing import Part, runs
from quantkit.witness import AlteredError, check_unaltered

NEAR = 0.1  # of a part's cost: so far a part may begin from where it should, if a source file ends there


def shares(plan: Plan, count: int) -> list[Share]:
    """The plan's units in `count` runs, in their order, of about the same cost; each a share, which may be empty.

    A run is cut where a source file ends if one does nearby, so that most are hashed by who reads them.
    """
    costs = [_cost(unit) for unit in plan.units]
    ends = {u.source.file: end for u, end in zip(plan.units, accumulate(costs), strict=True)}
    owned: list[list[Unit]] = [[] for _ in range(count)]
    for unit, owner in zip(plan.units, runs(costs, count, list(ends.values()), NEAR), strict=True):
        owned[owner].append(unit)
    first = {u.source.file: u.name for u in reversed(plan.units)}
    return [_share(plan, tuple(units), first) for units in owned]


def _cost(unit: Unit) -> int:
    """Bytes read, written, and worked on."""
    written = sum(t.nbytes for t in unit.outputs)
    return unit.source.nbytes * (2 if unit.linear is not None else 1) + written + 1


def _share(plan: Plan, units: tuple[Unit, ...], first: Mapping[str, str]) -> Share:
    """first: of each source file, the unit whose part hashes it: all of it, as a hash cannot be handed over."""
    theirs = {u.name for u in units}
    written = {t.file for u in plan.units if u.name not in theirs for t in u.outputs}
    sources = {u.source.file for u in units if first[u.source.file] in theirs}
    return Share(units, frozenset(sources), frozenset(t.file for u in units for t in u.outputs) - written)


def check_recipe(recipe: Recipe) -> None:
    """Raises UsageError for what cannot be done in parts, whatever the model and the text are."""
    if recipe.needs != "nothing":
        raise UsageError(
            "what looks at a text cannot be done in parts: a layer's tensors depend on the layers before",
            where="--part",
            hint="leave --part out",
        )


def check_part(plan: Plan, part: Part) -> None:
    """Raises UsageError if it is no part of this plan."""
    check_recipe(plan.recipe)
    if plan.allocation is not None:
        raise UsageError(
            "mixed bits are not written in parts", where="--part", hint="leave it out, or use --bits 4 or 8"
        )
    if part.count > len(plan.units):
        raise UsageError(
            f"{part.count:,} parts are too many for {len(plan.units):,} tensors", where="--part", hint="take fewer"
        )


def execute_part(plan: Plan, checkpoint: Checkpoint, out: Path, part: Part, console: Console) -> Outcome:
    """Does a part of a plan, or what is left of it. Raises what `runner.execute` does; OutputError if OUT is of
    another job, or another process has this part."""
    started = time.monotonic()
    check_part(plan, part)
    if _over(out, plan, checkpoint):
        return outcome_of(out, plan, started, len(plan.units), None)
    for warning in plan.warnings:
        console.warn(warning)
    every = shares(plan, part.count)
    share = every[part.index - 1]
    with _kept_if_it_breaks_off(out), ExitStack() as stack:
        try:
            opened = stack.enter_context(_opened(plan, checkpoint, out, part))
        except OSError as e:
            if e.errno not in GONE or not finished_meanwhile(out) or not is_finished(out, plan):
                raise
            opened = None
        if opened is None:
            return outcome_of(out, plan, started, len(plan.units), None)
        writer, journal, job = opened
        if journal.damage:
            console.warn(journal.damage)
        kept = Kept.read(journal.entries).unchanged(writer.stamps)
        writer.write_fixed(share.shards - kept.shards.keys())
        files = stack.enter_context(SourceFiles(checkpoint.folder, checkpoint.files))
        run = Run(plan, checkpoint, files, writer, journal, console, kept, share)
        try:
            with _blamed(plan, {part: journal}):
                measured = run.run(out)
        except NotFiniteError as e:  # with another recipe, all parts are others
            hint = f"delete {out}, and begin again: {e.hint}"
            raise NotFiniteError(e.what, where=e.where, hint=hint) from None
        files.check_unchanged()
        journal.append([{"done": True}])
        try:
            hash_completed(plan, every, out, job, part, journal, console)
        except (OSError, RunError) as e:  # nothing is lost: the part is done
            what = e.what if isinstance(e, RunError) else e.strerror or e
            console.warn(f"a file that others wrote to as well could not be hashed, which is left to `finish`: {what}")
    return outcome_of(out, plan, started, len(kept.reports), measured, part=share.units)


@contextmanager
def _kept_if_it_breaks_off(out: Path) -> Iterator[None]:
    """Interrupted or RunError for what the user or the machine did."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted; what is finished is kept", where=str(out), hint="the same command takes up where it stopped"
        ) from None
    except OSError as e:
        raise write_error(e, Path(e.filename or out)) from None


def _over(out: Path, plan: Plan, checkpoint: Checkpoint) -> bool:
    """Whether the folder is the plan's result. OutputError if it is no place for a part."""
    for _ in range(RETRIES):
        try:
            check_place(out, checkpoint.folder, force=False, parts=True)
            return not (out / FOLDER / JOB).exists() and is_finished(out, plan)
        except OutputError:  # or a job began this moment: its files were seen, and its description not yet
            if not os.path.isdir(out / FOLDER):
                raise
            time.sleep(PAUSE)
    check_place(out, checkpoint.folder, force=False, parts=True)
    return not (out / FOLDER / JOB).exists() and is_finished(out, plan)


@contextmanager
def _opened(
    plan: Plan, checkpoint: Checkpoint, out: Path, part: Part
) -> Iterator[tuple[ShardWriter, Journal, str] | None]:
    """The files that all parts write to, this part's journal, and the job's id; None if all was finished just now."""
    job = job_of(plan, checkpoint, part.count)
    make_folder(out / FOLDER)
    with ExitStack() as stack:
        writer = None
        with locked(out):
            known = read_job(out)
            if known is not None:
                check_same_job(known, job, out)
            elif was_finished(out):
                forget(out)
                if is_finished(out, plan):
                    yield None
                    return
            if known is None or not known["files"]:  # nobody has written yet
                known, writer = begin(plan, out, job)
                stack.callback(writer.close)
            journal = Journal(out, journal_name(part), f"another process has part {part}")
            stack.callback(journal.close)
        if writer is None:
            check_files(plan, out, known["files"])
            writer = ShardWriter(out, file_layouts(plan), shared=True)
            stack.callback(writer.close)
        if journal.head != (head := {"job": known["id"], "part": str(part)}):  # of a job before this one
            journal.start(head)
        yield writer, journal, known["id"]


def finish(plan: Plan, checkpoint: Checkpoint, out: Path, console: Console) -> Outcome:
    """Makes a model of a folder whose parts are all done. Raises OutputError if it is of another plan, or a part is
    being run, or is not finished; RunError if what one wrote was altered. It can be interrupted, and run again."""
    started = time.monotonic()
    job = read_job(out)
    if job is None:
        raise no_parts(out)
    check_same_job(job, job_of(plan, checkpoint, job["parts"]), out)
    parts = [Part(n + 1, job["parts"]) for n in range(job["parts"])]
    entries: list[dict[str, Any]] = []
    journals: dict[Part, Journal] = {}
    with ExitStack() as stack:
        with writing(out / FOLDER / "finish"):
            own = Journal(out, "finish", "another process is finishing this folder")
        stack.callback(own.close)
        if own.damage:
            console.warn(own.damage)
        if not job["files"]:
            raise without(FILES, out) if has_journals(out, job["id"]) else _not_finished(parts[0], out)
        check_files(plan, out, job["files"])
        for part in parts:
            if not (out / FOLDER / journal_name(part)).exists():
                raise _not_finished(part, out)
            journal = Journal(out, journal_name(part), f"part {part} is under way")
            stack.callback(journal.close)
            head = journal.head or {}
            another = head.get("job") == job["id"] and head.get("part") != str(part)
            if journal.damage or another:
                raise OutputError(
                    f"the journal of part {part} " + ("is another part's" if another else "was altered"),
                    where=str(journal.path), hint=f"run part {part} again, by the command that it was run by",
                )  # fmt: skip
            if head.get("job") != job["id"] or not is_done(journal.entries):
                raise _not_finished(part, out)
            entries += journal.entries
            journals[part] = journal
        if own.head is None or own.head.get("job") != job["id"]:
            own.start({"job": job["id"]})
        kept = Kept.read([*entries, *own.entries])
        with _kept_if_it_breaks_off(out), _blamed(plan, journals):
            writer = ShardWriter(out, file_layouts(plan), shared=True)
            stack.callback(writer.close)
            for part, share in zip(parts, shares(plan, len(parts)), strict=True):
                if left := [u.name for u in share.units if u.name not in kept.reports]:
                    raise RunError(
                        f"tensor {left[0]!r} is in no part's journal", where=str(out), hint=f"run part {part} again"
                    )
            with SourceFiles(checkpoint.folder, checkpoint.files) as files:
                kept = kept.unchanged(writer.stamps)
                writer.write_fixed(s.name for s in plan.shards if s.name not in kept.shards)
                sources = hash_sources(plan, files, own, kept.sources, console)
                # A torch file gets its CRC-32s before it is hashed: below.
                unhashed = [s for s in plan.shards if s.name not in kept.shards and s.zip is None]
                shards, witnesses = hash_shards(plan, unhashed, writer, own, kept, console)
                check_unaltered(witnesses, {t.name: u.name for u in plan.units for t in u.outputs})
                kept = replace(kept, sources={**kept.sources, **sources}, shards={**kept.shards, **shards})
                measured = Run(plan, checkpoint, files, writer, own, console, kept, again=False).run(out)
                files.check_unchanged()
            writer.commit()
            publish(plan, checkpoint, out, measured)
        with locked(out):
            forget(out)
    return outcome_of(out, plan, started, 0, measured)


@contextmanager
def _blamed(plan: Plan, journals: Mapping[Part, Journal]) -> Iterator[None]:
    """AlteredError that says which parts are to be run again: those whose tensors are altered on disk. Their journals
    are told."""
    try:
        yield
    except AlteredError as e:
        blamed = []
        every = shares(plan, next(iter(journals)).count)
        for part, journal in journals.items():
            if theirs := [u.name for u in every[part.index - 1].units if u.name in e.units]:
                journal.append({"altered": name} for name in theirs)
                blamed.append(str(part))
        if blamed:
            e.hint = f"run part {', '.join(blamed)} again, by the command that it was run by"
        raise


def _not_finished(part: Part, out: Path) -> OutputError:
    return OutputError(f"part {part} is not finished", where=str(out), hint=f"run it, again if need be: --part {part}")
