"""The folder that parts of a job share: what it says of the job, and who may be there.

OUT/.quantkit holds a journal of each part, `job.json`: which plan it is, of how many parts, from which source; and
`files.json`: which files they write to.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from quantkit.checkpoint.header import fsync_directory
from quantkit.checkpoint.journal import FOLDER
from quantkit.checkpoint.shared import PAUSE, listed, open_or_create, read_if_there, write_once
from quantkit.checkpoint.writer import PARTIAL, ShardWriter
from quantkit.errors import InputError, OutputError, SourceError
from quantkit.layouts import Checkpoint
from quantkit.output import FILES, JOB, part_journals, was_finished, without
from quantkit.plans import Plan
from quantkit.recipe import Recipe, build_recipe
from quantkit.runner import file_layouts
from quantkit.sharing import Part

PATIENCE = 600.0  # seconds


def job_of(plan: Plan, checkpoint: Checkpoint, count: int) -> dict[str, Any]:
    """What all parts of a job have in common, and others have not."""
    source = plan.recipe.source
    if (place := Path(source).expanduser()).exists():
        source = str(place.resolve())
    return {
        "plan": plan.hash,
        "parts": count,
        "stamps": {f.name: list(f.stamp) for f in checkpoint.files},
        "recipe": plan.recipe.to_yaml(source, plan.recipe.revision),
    }


def read_job(out: Path) -> dict[str, Any] | None:
    """What `begin` left; None if there is none. files: none as long as nobody has made them. OutputError if it is
    damaged."""
    path = out / FOLDER / JOB
    try:
        found, files = read_if_there(path), read_if_there(out / FOLDER / FILES)
    except SourceError as e:
        raise _damaged(e.where) from None
    if found is None:
        return None
    return {**_whole(found, path), "files": {} if files is None else _whole(files, out / FOLDER / FILES)}


def _summed(content: Mapping[str, Any]) -> dict[str, Any]:
    """With a checksum: an altered digit would send parts away for what they have not done."""
    return {**content, "crc": zlib.crc32(json.dumps(content).encode())}


def _whole(found: dict[str, Any], path: Path) -> dict[str, Any]:
    """Without it. OutputError if it is not what `_summed` gave."""
    content = {key: value for key, value in found.items() if key != "crc"}
    if found != _summed(content):
        raise _damaged(str(path))
    return content


def _damaged(where: str) -> OutputError:
    return OutputError("the job's description is damaged", where=where, hint="delete the folder, and begin again")


def check_same_job(known: Mapping[str, Any], job: Mapping[str, Any], out: Path) -> None:
    """OutputError if a folder holds parts of another job than this, SourceError if they are from other weight files."""
    if known["plan"] != job["plan"]:
        raise OutputError(
            "the output folder holds parts of another plan", where=str(out),
            hint="use the command that they were made by, and the source as it was then, folder's name included",
        )  # fmt: skip
    if known["parts"] != job["parts"]:
        raise OutputError(
            f"this job is in {known['parts']} parts, not {job['parts']}", where=str(out),
            hint=f"--part 1/{known['parts']} and so on, or as many ranks of torchrun, or name another -o",
        )  # fmt: skip
    if known["stamps"] != job["stamps"]:
        raise SourceError(
            "these are not the source's files that the first part read, or they have changed since", where=str(out),
            hint="give all parts the same files, or begin in another folder",
        )  # fmt: skip


def no_parts(out: Path) -> OutputError:
    """Of a folder that does not say what job it is of."""
    if out.exists() and not out.is_dir():
        return OutputError("that is a file, not a folder", where=str(out), hint="name what --part wrote to")
    if not out.is_dir():
        return OutputError("there is no such folder", where=str(out), hint="name the one that --part wrote to")
    if part_journals(out) or FILES in listed(out / FOLDER):
        return without(JOB, out)
    return OutputError(
        "there are no parts in this folder", where=str(out), hint="run `quantkit … --part 1/N` to N/N first"
    )


def job_recipe(out: Path, source: str | None) -> Recipe:
    """What the parts in a folder are of, from `source` if that lies elsewhere here. OutputError if there are none."""
    job = read_job(out)
    if job is None:
        raise no_parts(out)
    try:
        table = yaml.safe_load(job["recipe"])
        return build_recipe({**table, "output": str(out), **({"source": source} if source else {})})
    except (InputError, yaml.YAMLError, TypeError, AttributeError):
        raise _damaged(str(out / FOLDER / JOB)) from None


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Of all parts, one is here at a time. OutputError if that takes too long."""
    fd = open_or_create(out / FOLDER / "lock", 0o644)
    end = time.monotonic() + PATIENCE
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise OutputError(
                        f"other parts have been beginning for {PATIENCE:g} seconds", where=str(out),
                        hint="see whether one of them hangs, and start this one again",
                    ) from None  # fmt: skip
                time.sleep(0.02)
        yield
    finally:
        os.close(fd)


def begin(plan: Plan, out: Path, job: dict[str, Any]) -> tuple[dict[str, Any], ShardWriter]:
    """A new job, and its files. Journals of an earlier one have another id, and do not count. Where another part has
    begun it, and this machine has not seen that yet, it is that one's."""
    ours = {**job, "id": uuid.uuid4().hex}
    begun = _whole(write_once(out / FOLDER / JOB, _summed(ours)), out / FOLDER / JOB)  # without it, files are nobody's
    check_same_job(begun, job, out)
    if begun == ours:
        (out / FOLDER / FILES).unlink(missing_ok=True)  # of an earlier job
    elif has_journals(out, begun["id"]):
        raise without(FILES, out)
    writer = ShardWriter(out, file_layouts(plan), reserve=False)
    try:
        files = _whole(write_once(out / FOLDER / FILES, _summed(writer.inodes)), out / FOLDER / FILES)
        check_files(plan, out, files)
        writer.sync(writer.layouts)  # headers: other machines read them
        return {**begun, "files": files}, writer
    except BaseException:
        writer.close()
        raise


def has_journals(out: Path, job: str) -> bool:
    """Whether parts have written for this job: they do only where files.json is there, or was."""
    begins = b""
    for path in part_journals(out):
        with suppress(FileNotFoundError):
            begins += path.read_bytes()[:200]
    return f'"job": "{job}"'.encode() in begins


def check_files(plan: Plan, out: Path, inodes: Mapping[str, int]) -> None:
    """OutputError if files are not those that the job began with: what journals say is in these would not be there."""
    for shard in plan.shards:
        places = [out / (shard.name + PARTIAL), out / shard.name]
        found = next((path.stat() for path in places if path.exists()), None)
        if found is None or found.st_size != shard.nbytes or found.st_ino != inodes.get(shard.name):
            raise OutputError(
                f"{shard.name} was replaced or deleted since the job began", where=str(out),
                hint="delete the folder, and begin again; not on sshfs, where every machine numbers files anew",
            )  # fmt: skip


def journal_name(part: Part) -> str:
    """Of a part's own, in OUT/.quantkit."""
    return f"part-{part.index}-of-{part.count}"


def forget(out: Path) -> None:
    """The folder is a model: journals, and last the job that they are of, are no more needed."""
    folder = out / FOLDER
    # Beside these, what somebody has left who died as he wrote it.
    beside = [folder / name for name in listed(folder) if name.startswith((f"{FILES}.", f"{JOB}."))]
    for path in (*part_journals(out), *beside, folder / "finish", folder / FILES, folder / JOB, folder / "lock"):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()
    fsync_directory(out)


def finished_meanwhile(out: Path) -> bool:
    """Whether another process has finished the folder, which this machine may see a moment later. What this one has put
    there to finish it, too, is taken away."""
    for _ in range(5 if out.is_dir() else 0):
        if was_finished(out):
            if (out / FOLDER).is_dir():
                forget(out)
            return True
        time.sleep(PAUSE)
    return False
