"""A conversion whose disk is full, or whose source changes under way, says so in three lines and leaves no model. With
more space the same command ends in the same bytes; after a change of the source only --force begins anew."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from convert_jobs import KINDS, Job, assert_finished, errors, finish, kinds, start, stop_at
from resuming import assert_three_lines, at, digests, journal_lines, lines, modify, replace, truncate


@pytest.fixture(params=KINDS)
def job(request: pytest.FixtureRequest, jobs: Callable[[str], Job]) -> Job:
    return jobs(request.param)


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """tmpfs(n) is a disk of n bytes, the same one with each call."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(nbytes: int) -> Path:
        how = ["-o", f"remount,size={nbytes}"] if folder.is_mount() else ["-t", "tmpfs", "-o", f"size={nbytes}"]
        try:
            done = subprocess.run(["mount", *how, "tmpfs", str(folder)], capture_output=True, text=True)
        except OSError as e:
            pytest.skip(f"there is no mount program: {e}")
        if done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        return folder

    yield sized
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def planned(job: Job) -> dict[str, Any]:
    line = [sys.executable, "-m", "quantkit", "convert", str(job.source), *job.options, "--dry-run", "--json"]
    table: dict[str, Any] = json.loads(subprocess.run(line, capture_output=True, check=True, text=True).stdout)
    return table


@kinds("hf to pth")
def test_disk_too_small(job: Job, tmpfs: Callable[[int], Path]) -> None:
    size = planned(job)["disk_bytes"]
    out = tmpfs(size // 2) / "out"
    full = finish(job, out)
    assert full.returncode == 1
    assert_three_lines(errors(full.stderr), "No space left", "free some space", str(out))
    assert journal_lines(out) == 1, "no work is done in vain: the space is asked for first"
    assert not [p for p in out.iterdir() if p.name.endswith((".safetensors", ".pth", ".json"))]
    tmpfs(size + (4 << 20))
    assert_finished(job, out)


@kinds("hf to pth", "pth to hf")
def test_disk_fills_up_under_way(job: Job, tmpfs: Callable[[int], Path]) -> None:
    """The weights have their space from the start; journal, manifest and card do not."""
    folder = tmpfs(planned(job)["disk_bytes"] + (16 << 20))
    out = folder / "out"
    process = start(job, out)
    at(process, out, lines(2), signal.SIGSTOP)
    free = os.statvfs(folder)
    with (folder / "somebody else's").open("wb") as f:
        os.posix_fallocate(f.fileno(), 0, free.f_bavail * free.f_frsize)
    process.send_signal(signal.SIGCONT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert_three_lines(errors(stderr), "No space left", "free some space")
    assert not (out / job.last).exists()
    os.unlink(folder / "somebody else's")
    assert_finished(job, out)


# --- the source -------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(job: Job, tmp_path: Path) -> Job:
    """The job on a copy under the same name, so that it has the same plan, to do harm to."""
    folder = tmp_path / "copy" / job.source.name
    shutil.copytree(job.source, folder)
    return job._replace(source=folder)


def weight_file(source: Path) -> Path:
    return max([*source.glob("*.safetensors"), *source.glob("*.pth")])


@kinds("pth to hf")
@pytest.mark.parametrize("harm", [truncate, modify, replace])
def test_source_changes_under_way(harm: Callable[[Path], None], own: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(own, out)
    at(process, out, lines(1), signal.SIGSTOP)
    harm(weight_file(own.source))
    process.send_signal(signal.SIGCONT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    changed = f"{weight_file(own.source).name} changed while it was being read"
    assert_three_lines(errors(stderr), changed, str(own.source), "--force")
    assert not (out / own.last).exists()
    again = finish(own, out)
    assert again.returncode == 2
    assert not (out / own.last).exists()


@kinds("pth to hf")
def test_source_changed_before_resuming(own: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_at(own, out, lines(10), signal.SIGKILL)
    os.utime(weight_file(own.source))
    refused = finish(own, out)
    assert refused.returncode == 2
    assert_three_lines(errors(refused.stderr), "the source changed", str(own.source), "--force")
    restarted = finish(own, out, "--force", "--json")
    assert json.loads(restarted.stdout)["reused"] == 0
    assert digests(out) == own.reference
