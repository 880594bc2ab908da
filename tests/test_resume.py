"""What survives: kill -9 at any moment, signals, a full disk, a source that changes. The same command always ends in
the same bytes, and until then no loader takes the folder for a model."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
from resuming import (
    OPTIONS,
    SIGNAL_AFTER_RENAME,
    UNITS,
    Moment,
    assert_three_lines,
    at,
    delay,
    digests,
    journal_lines,
    lines,
    make_source,
    modify,
    replace,
    stamps,
    truncate,
)

import quantkit
from quantkit import committer
from quantkit.checkpoint.journal import Journal
from quantkit.committer import _Frontier
from quantkit.errors import OutputError


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Read only; whoever changes it takes a copy. That quantkit did not change it is checked at the end."""
    folder = make_source(tmp_path_factory.mktemp("resume") / "source")
    before = stamps(folder)
    yield folder
    assert stamps(folder) == before


@pytest.fixture(scope="session")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """SHA-256 of every file that an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("reference") / "out"
    assert finish(source, out).returncode == 0
    files = digests(out)
    assert {"README.md", "quantkit.json", "config.json", "tokenizer.json"} < set(files)
    assert sum(name.endswith(".safetensors") for name in files) >= 4
    return files


def command(source: Path, out: Path, *options: str) -> list[str]:
    return ["quantize", str(source), "-o", str(out), *OPTIONS, *options]


def start(source: Path, out: Path, *options: str) -> warm.Process:
    return warm.start(command(source, out, *options))


def finish(source: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return warm.run(command(source, out, *options))


def signal_after_rename(n: int, what: signal.Signals, source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", SIGNAL_AFTER_RENAME, str(n), str(int(what)), *command(source, out)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


def stop_at(source: Path, out: Path, moment: Moment, what: signal.Signals, *options: str) -> tuple[int, str]:
    """Exit code and stderr of a run that met a signal."""
    process = start(source, out, *options)
    at(process, out, moment, what)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


def assert_no_model(out: Path, finished: dict[str, str]) -> None:
    """No loader takes `out` for a model, or else it is the finished one."""
    if (out / "config.json").exists():
        assert finished.items() <= digests(out).items()


def assert_finished(source: Path, out: Path, wanted: dict[str, str]) -> None:
    """The same command again ends well, and in these bytes."""
    done = finish(source, out)
    assert done.returncode == 0, done.stderr
    assert digests(out) == wanted


# --- kill -9 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(seed: int, source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    """Five kills a chain, each in the run that takes up what the one before had left."""
    chance = random.Random(seed)
    out = tmp_path / "out"
    counts = sorted(chance.sample(range(1, UNITS), 3))
    moments = [delay(chance.uniform(0, 0.25)), *map(lines, counts), delay(chance.uniform(0.2, 0.8))]
    killed = 0
    for moment in moments:
        code, stderr = stop_at(source, out, moment, signal.SIGKILL)
        assert code in (0, -signal.SIGKILL), stderr
        killed += code != 0
        assert_no_model(out, reference)
    assert killed >= 3
    assert_finished(source, out, reference)


def test_killed_after_renames(source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    """The finishing phase, exactly: after the first shard, the last, the index, a tokenizer, the manifest, the card,
    and after config.json, when only the journal is left to remove."""
    out = tmp_path / "out"
    shards = [name for name in reference if name.endswith(".safetensors")]
    stages = [shards[0], shards[-1], "model.safetensors.index.json", "tokenizer.json", "quantkit.json", "README.md",
              "config.json"]  # fmt: skip
    order = [*shards, *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"),
             "quantkit.json", "README.md", "config.json"]  # fmt: skip
    renamed = 0  # shards are renamed once and for all; the small files are written again by each run
    for last in stages:
        n = order.index(last) + 1 - renamed
        killed = signal_after_rename(n, signal.SIGKILL, source, out)
        assert killed.returncode == -signal.SIGKILL, (last, killed.stderr)
        assert (out / last).exists()
        assert (out / "config.json").exists() == (last == "config.json")
        assert_no_model(out, reference)
        renamed = max(renamed, min(order.index(last) + 1, len(shards)))
    assert_finished(source, out, reference)


def test_resuming_keeps_what_was_done(source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_at(source, out, lines(UNITS // 2), signal.SIGKILL)
    sources = (out / ".quantkit" / "journal").read_text().count('"source"')
    kept = journal_lines(out) - 1 - sources
    result = json.loads(finish(source, out, "--json").stdout)
    assert result["reused"] == kept >= UNITS // 2 - 4
    assert result["units"] == UNITS
    assert digests(out) == reference


# --- signals ----------------------------------------------------------------------------------------------------------


def test_what_was_done_is_not_hashed_first(
    source: Path, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That may take minutes, of a large model, and what is done meanwhile must be kept."""
    out = tmp_path / "out"
    stop_at(source, out, lines(25), signal.SIGKILL)
    known = journal_lines(out)
    plan = quantkit.plan(source, {"shard_size": "12MB"})
    journal = (out / ".quantkit" / "journal").read_text()
    kept = sum(t.nbytes for u in plan.units for t in u.outputs if f'"unit": "{u.name}"' in journal)
    advance, hashed = _Frontier.advance, dict[str, int]()
    before: list[int] = []  # bytes hashed before each look that saw something new

    def slow(self: _Frontier, done: set[str], most: int) -> int:
        time.sleep(0.03)
        if journal_lines(out) > known:
            before.append(sum(hashed.values()))
        n = advance(self, done, most)
        hashed[self.shard.name] = hashed.get(self.shard.name, 0) + n
        return n

    monkeypatch.setattr(committer, "STRETCH", 1 << 19)
    monkeypatch.setattr(_Frontier, "advance", slow)
    quantkit.quantize(source, out, {"shard_size": "12MB", "resources": {"threads": 1}})
    assert before[0] < kept / 2
    assert digests(out) == reference


@pytest.mark.parametrize("what", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(what: signal.Signals, source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stderr = stop_at(source, out, lines(6), what)
    assert code == 130
    assert_three_lines(stderr, "interrupted", str(out), "the same command")
    assert not (out / "config.json").exists()
    assert_finished(source, out, reference)


def test_interrupted_in_the_finishing_phase(source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped = signal_after_rename(2, signal.SIGTERM, source, out)
    assert stopped.returncode == 130
    assert_three_lines(stopped.stderr, "interrupted", str(out), "the same command")
    assert not (out / "config.json").exists()
    assert_finished(source, out, reference)


# --- the finished folder, and the journal -----------------------------------------------------------------------------


def test_finished_folder_is_left_alone(source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_finished(source, out, reference)
    before = stamps(out)
    again = finish(source, out)
    assert (again.returncode, stamps(out)) == (0, before)
    assert "finished already" in again.stdout
    assert json.loads(finish(source, out, "--json").stdout)["already_done"] is True


def test_torn_journal(source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_at(source, out, lines(8), signal.SIGKILL)
    journal = out / ".quantkit" / "journal"
    journal.write_bytes(journal.read_bytes()[:-7])
    assert_finished(source, out, reference)


def test_no_journal_beside_files_that_are_whole(source: Path, tmp_path: Path) -> None:
    """--force does not delete weights of which nothing says that they are ours: it is not what helps."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "model-00001-of-00004.safetensors").write_bytes(b"x")
    done = finish(source, out)
    assert done.returncode == 2
    assert_three_lines(done.stderr, "is not empty (model-00001", "name another -o, or empty it")


def test_another_plan_does_not_take_over(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_at(source, out, lines(4), signal.SIGKILL)
    before = stamps(out)
    refused = finish(source, out, "--quant-type", "fp4")
    assert refused.returncode == 2
    assert_three_lines(refused.stderr, "unfinished run of another plan", "--force")
    assert stamps(out) == before
    assert finish(source, out, "--quant-type", "fp4", "--force").returncode == 0
    assert json.loads((out / "config.json").read_text())["quantization_config"]["bnb_4bit_quant_type"] == "fp4"
    assert not list(out.glob("*.partial"))


def test_two_runs_on_one_folder(source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start(source, out)
    at(first, out, lines(2), signal.SIGSTOP)
    try:
        second = finish(source, out)
        assert second.returncode == 2
        assert_three_lines(second.stderr, "another run is writing", str(out))
        assert finish(source, out, "--force").returncode == 2
    finally:
        first.send_signal(signal.SIGCONT)
        first.communicate(timeout=60)
    assert first.returncode == 0
    assert digests(out) == reference


def test_journal_lock_of_a_run_that_just_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run unlinks its journal between our open and our lock: a lock on a file that is no more is none."""
    opened = os.open

    def open_late(path: Any, *rest: Any, **more: Any) -> int:
        fd = opened(path, *rest, **more)
        os.unlink(path)
        return fd

    monkeypatch.setattr("quantkit.checkpoint.journal.os.open", open_late)
    with pytest.raises(OutputError, match="just finished"):
        Journal(tmp_path)


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """disk("10m") mounts a tmpfs of that size, or remounts the one there is with these options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        verb = ["-o", "remount," + options] if folder.is_mount() else ["-t", "tmpfs", "-o", options]
        done = subprocess.run(["mount", *verb, "tmpfs", str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        return folder

    if shutil.which("mount") is None:
        pytest.skip("there is no mount program")
    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


@pytest.fixture(scope="session")
def size(source: Path, reference: dict[str, str]) -> int:
    """Bytes of the finished folder."""
    plan = subprocess.run(
        [sys.executable, "-m", "quantkit", "plan", str(source), *OPTIONS, "--json"], capture_output=True, check=True
    )
    return int(json.loads(plan.stdout)["disk_bytes"])


def test_disk_too_small(disk: Callable[[str], Path], size: int, source: Path, reference: dict[str, str]) -> None:
    out = disk(f"size={size // 2}") / "out"
    full = finish(source, out)
    assert full.returncode == 1
    assert_three_lines(full.stderr, "No space left", "free some space", str(out))
    assert journal_lines(out) == 1, "no work is done in vain: the space is asked for first"
    assert not [p for p in out.iterdir() if p.name.endswith((".safetensors", ".json"))]
    disk(f"size={size + (4 << 20)}")
    assert_finished(source, out, reference)


@pytest.mark.parametrize("spare", [2 << 20, 0], ids=["room for small files", "no room at all"])
def test_disk_fills_up_under_way(
    spare: int, disk: Callable[[str], Path], size: int, source: Path, reference: dict[str, str]
) -> None:
    """The weights have their space from the start. Journal, manifest and card do not: for them the run stops, and
    resumes."""
    folder = disk(f"size={size + (16 << 20)}")
    out = folder / "out"
    process = start(source, out)
    at(process, out, lines(2), signal.SIGSTOP)
    free = os.statvfs(folder)
    with (folder / "somebody else's").open("wb") as f:
        os.posix_fallocate(f.fileno(), 0, free.f_bavail * free.f_frsize - spare)
    process.send_signal(signal.SIGCONT)
    _, stderr = process.communicate(timeout=60)
    if spare:
        assert process.returncode == 0, stderr
    else:
        assert process.returncode == 1
        assert_three_lines(stderr, "No space left", "free some space")
        assert not (out / "config.json").exists()
        os.unlink(folder / "somebody else's")
        assert_finished(source, out, reference)
    assert digests(out) == reference


def test_read_only_disk(disk: Callable[[str], Path], source: Path, reference: dict[str, str]) -> None:
    folder = disk("size=200m")
    stop_at(source, folder / "begun", lines(3), signal.SIGKILL)
    disk("ro")
    for out in (folder / "new", folder / "begun"):
        refused = finish(source, out)
        assert refused.returncode == 2
        assert_three_lines(refused.stderr, "cannot be written: Read-only file system", str(out))
    disk("rw")
    assert_finished(source, folder / "begun", reference)


# --- the source -------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_source(source: Path, tmp_path: Path) -> Path:
    """A copy under the same name, so that it has the same plan, to do harm to."""
    folder = tmp_path / "copy" / source.name
    shutil.copytree(source, folder)
    return folder


@pytest.mark.parametrize("harm", [truncate, modify, replace])
def test_source_changes_under_way(harm: Callable[[Path], None], own_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(own_source, out)
    at(process, out, lines(1), signal.SIGSTOP)
    shard = max(own_source.glob("*.safetensors"))
    harm(shard)
    process.send_signal(signal.SIGCONT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert_three_lines(stderr, f"{shard.name} changed while it was being read", str(own_source), "--force")
    assert not (out / "config.json").exists()
    again = finish(own_source, out)
    assert again.returncode == 2
    assert not (out / "config.json").exists()


def test_source_changed_before_resuming(own_source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_at(own_source, out, lines(10), signal.SIGKILL)
    os.utime(min(own_source.glob("*.safetensors")))
    refused = finish(own_source, out)
    assert refused.returncode == 2
    assert_three_lines(refused.stderr, "the source changed", str(own_source), "--force")
    restarted = finish(own_source, out, "--force", "--json")
    assert json.loads(restarted.stdout)["reused"] == 0
    assert digests(out) == reference
