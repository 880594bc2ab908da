"""The folder to write: whose it is, whether it is finished, and what may be replaced in it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantkit.checkpoint.journal import FOLDER, Journal
from quantkit.checkpoint.reader import read_json
from quantkit.checkpoint.shared import listed
from quantkit.checkpoint.writer import PARTIAL
from quantkit.errors import OutputError, SourceError
from quantkit.layouts import Checkpoint
from quantkit.plans import CARD, WEIGHTS, Plan
from quantkit.plots import LAYERS

PARTIALS = (".safetensors" + PARTIAL, ".pth" + PARTIAL)
COMMITS = ("config.json", "params.json")  # written last, one or the other: see layouts.Target.config_file
EVALUATION = "evaluation.json"
JOB, FILES = "job.json", "files.json"  # in OUT/.quantkit: the job is done in parts, and these are its files
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf")


def open_output(out: Path, plan: Plan, checkpoint: Checkpoint, *, force: bool) -> Journal | None:
    """The journal to write `plan` into `out` under, its entries those of an unfinished run of the same plan; None if
    the folder holds the finished result already. Raises OutputError; nothing is touched then."""
    check_place(out, checkpoint.folder, force=force)
    names = _names(out)
    unfinished = (out / FOLDER / "journal").exists()
    if not unfinished and not force and is_finished(out, plan):
        return None
    ours = _ours(out, plan, unfinished=unfinished)
    foreign = [n for n in names if n.endswith(WEIGHT_SUFFIXES) and n not in ours]
    if force and foreign:
        raise OutputError(
            f"{foreign[0]} is a weight file that quantkit did not write; --force does not delete it",
            where=str(out), hint="name another -o, or remove the file yourself",
        )  # fmt: skip
    try:
        out.mkdir(parents=True, exist_ok=True)
        journal = Journal(out)
    except OSError as e:
        raise OutputError(
            f"the output folder cannot be written: {e.strerror}",
            where=str(out),
            hint="check its permissions, or name another -o",
        ) from None
    head = {"plan": plan.hash, "stamps": {f.name: list(f.stamp) for f in checkpoint.files}}
    try:
        begun = any(name.endswith(PARTIALS) for name in names)  # which no run has before its journal's first line
        if journal.head is None and (journal.damage or begun) and not force:
            raise OutputError(
                "the first line of an unfinished run's journal, which says of what plan it is, is gone or altered",
                where=str(journal.path), hint="discard what it did with --force, or name another -o",
            )  # fmt: skip
        if journal.head is not None and not force:
            if journal.head.get("plan") != plan.hash:
                raise OutputError(
                    "the output folder holds an unfinished run of another plan", where=str(out),
                    hint="finish it with its own command, name another -o, or discard it with --force",
                )  # fmt: skip
            if journal.head != head:
                raise SourceError(
                    "the source changed since the unfinished run began", where=str(checkpoint.folder),
                    hint="start over with --force",
                )  # fmt: skip
            return journal
        if force:
            journal.start({})  # first: no journal outlives the data that it vouches for
            _clear(out, ours)
        journal.start(head)
    except BaseException:
        journal.close()
        raise
    return journal


def without(name: str, out: Path) -> OutputError:
    """Of a folder of parts that has lost one of the files that describe the job."""
    hint = "delete the folder, and begin again"
    return OutputError(f"the folder holds parts, and not {name}, which says of what", where=str(out), hint=hint)


def part_journals(out: Path) -> list[Path]:
    """Those that parts of a job have left in a folder."""
    return [out / FOLDER / name for name in listed(out / FOLDER) if name.startswith("part-")]


def is_finished(out: Path, plan: Plan) -> bool:
    """Whether a folder without an unfinished run in it is the plan's result. OutputError if it is another one's, or is
    damaged."""
    if _finished_hash(out) == plan.hash:
        sizes = {f.name: f.nbytes for f in plan.files if f.role != CARD}
        _check_sizes(out, sizes, "write it again with --force")
        with suppress(OSError):  # a crash at the very last step may have left the journal's folder, empty
            (out / FOLDER).rmdir()
        return True
    if _names(out):
        raise _occupied(out, "holds the result of another plan")
    return False


def was_finished(out: Path) -> bool:
    """Whether a folder is the result of some plan, with nothing left to do."""
    return _finished_hash(out) is not None and not {JOB, "journal"} & set(listed(out / FOLDER))


def check_whole(out: Path) -> None:
    """OutputError if a finished folder has not all files of its manifest's, by their sizes."""
    sizes: dict[str, int] = {}
    with suppress(SourceError, KeyError, TypeError, ValueError):
        sizes = {str(row["name"]): int(row["bytes"]) for row in read_json(out / "quantkit.json")["files"]}
    sizes.pop("README.md", None)  # it is made anew where something is measured
    _check_sizes(out, sizes, "delete the folder, and make it again")


def _check_sizes(out: Path, sizes: Mapping[str, int], hint: str) -> None:
    for name, nbytes in sizes.items():
        if not _has_size(out / name, nbytes):
            raise OutputError(
                f"the folder was finished once, but {name} is missing or of another size now", where=str(out), hint=hint
            )


def check_place(
    out: Path, source: Path, *, force: bool, quantize: Mapping[str, Any] | None = None, parts: bool = False
) -> None:
    """OutputError where nothing can be written, whatever the plan. quantize: keys of the recipe's block that are known
    before there is a plan: a folder that was made with others holds another one's result. parts: whether a part of a
    job is to be written; only such may be added to others."""
    _check_apart(out, source)
    if os.path.exists(out / FOLDER / JOB):  # false for a name that is too long
        if parts:
            return
        raise OutputError(
            "the output folder holds parts of a job", where=str(out),
            hint="do the others with --part and then `quantkit finish`, name another -o, or delete the folder",
        )  # fmt: skip
    if parts and (out / FOLDER / "journal").exists():
        raise OutputError(
            "the output folder holds an unfinished run of a whole job", where=str(out),
            hint="finish it without --part, name another -o, or discard it with --force and no --part",
        )  # fmt: skip
    if os.path.exists(out) and not out.is_dir():
        raise OutputError(f"{out.name!r} is a file, not a folder", where=str(out.parent), hint="name another -o")
    names = _names(out)
    if names and parts and (part_journals(out) or FILES in listed(out / FOLDER)) and _finished_hash(out) is None:
        raise without(JOB, out)
    if names and not force and _finished_hash(out) is None and not (out / FOLDER / "journal").exists():
        what = f"is not empty ({', '.join(names[:3])})"
        whole = any(n.endswith(WEIGHT_SUFFIXES) for n in names) and "quantkit.json" not in names
        if parts or whole:  # which may not use --force, or that does not delete
            raise OutputError(f"the output folder {what}", where=str(out), hint="name another -o, or empty it")
        raise _occupied(out, what)
    if quantize is not None and not force and _finished_hash(out) is not None:
        made = read_json(out / "quantkit.json").get("recipe", {}).get("quantize") or {}
        if any(made.get(key) != value for key, value in quantize.items()):
            raise _occupied(out, "holds the result of another plan")


def _occupied(out: Path, how: str) -> OutputError:
    return OutputError(f"the output folder {how}", where=str(out), hint="name another -o, or replace it with --force")


def abandon(out: Path, plan: Plan, journal: Journal) -> None:
    """Takes away what a run that can never end has left, so that another may be started here."""
    for shard in plan.shards:
        for name in (shard.name, shard.name + PARTIAL):
            (out / name).unlink(missing_ok=True)
    journal.remove()
    with suppress(OSError):  # what else is in it is not ours
        out.rmdir()


def _check_apart(out: Path, source: Path) -> None:
    target, origin = Path(os.path.realpath(out)), Path(os.path.realpath(source))  # resolve() raises on a loop
    if target == origin or target.is_relative_to(origin) or origin.is_relative_to(target):
        raise OutputError(
            "the output folder and the source folder contain each other",
            where=str(out),
            hint="write to a folder beside it",
        )


def _names(out: Path) -> list[str]:
    try:
        return sorted(p.name for p in out.iterdir() if p.name != FOLDER) if out.is_dir() else []
    except OSError as e:
        raise OutputError(
            f"the output folder cannot be read: {e.strerror}", where=str(out), hint="name another -o"
        ) from None


def _has_size(path: Path, nbytes: int) -> bool:
    return path.is_file() and path.stat().st_size == nbytes


def _finished_hash(out: Path) -> str | None:
    if not any((out / name).exists() for name in COMMITS) or not (out / "quantkit.json").exists():
        return None
    try:
        return str(read_json(out / "quantkit.json").get("plan_hash"))
    except SourceError:
        return None


def _ours(out: Path, plan: Plan, *, unfinished: bool) -> set[str]:
    """What --force may replace: what an earlier run lists as its own, and the files that this plan writes; of the
    weights among these only those of an unfinished run, for anybody's model may lie in a model.safetensors."""
    ours = {f.name for f in plan.files if unfinished or f.role != WEIGHTS}
    with suppress(SourceError, KeyError, TypeError):
        ours |= {str(row["name"]) for row in read_json(out / "quantkit.json")["files"]} | {EVALUATION, LAYERS}
    partial = {n for n in _names(out) if n.startswith(("model", "consolidated")) and n.endswith(PARTIALS)}
    return ours | {name + PARTIAL for name in ours} | partial


def _clear(out: Path, ours: set[str]) -> None:
    # config.json first: from then on no loader takes the folder for a model.
    for name in [*sorted(ours & set(COMMITS)), *sorted(ours - set(COMMITS))]:
        path = out / name
        if path.parent == out and path.is_file():
            path.unlink()
