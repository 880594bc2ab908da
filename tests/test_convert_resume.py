"""A conversion that is killed or interrupted: the same command ends in the same bytes, and until then no loader takes
the folder for a model. A finished folder is left alone, and so is one of another plan or of a run that goes on."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import warm
from convert_jobs import KINDS, Job, assert_finished, command, errors, finish, kinds, start, stop_at
from resuming import SIGNAL_AFTER_RENAME, UNITS, assert_three_lines, at, delay, digests, journal_lines, lines, stamps


@pytest.fixture(params=KINDS)
def job(request: pytest.FixtureRequest, jobs: Callable[[str], Job]) -> Job:
    return jobs(request.param)


def signal_after_rename(n: int, what: signal.Signals, job: Job, out: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", SIGNAL_AFTER_RENAME, str(n), str(int(what)), *command(job, out)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


def assert_no_model(job: Job, out: Path) -> None:
    """No loader takes `out` for a model, or else it is the finished one."""
    if (out / job.last).exists():
        assert job.reference.items() <= digests(out).items()


def assert_sound(out: Path) -> None:
    """A torch file that zip tools and torch take for whole."""
    path = out / "consolidated.00.pth"
    with zipfile.ZipFile(path) as z:
        assert z.testzip() is None
    assert len(torch.load(path, weights_only=True, mmap=True)) == UNITS


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def chain(job: Job, out: Path, seed: int, kills: int) -> int:
    """Kills, each in the run that takes up what the one before had left. How many met a run."""
    chance = random.Random(seed)
    counts = sorted(chance.sample(range(1, UNITS), kills - 2))
    met = 0
    for moment in [delay(chance.uniform(0, 0.3)), *map(lines, counts), delay(chance.uniform(0.1, 0.6))]:
        code, stderr = stop_at(job, out, moment, signal.SIGKILL)
        assert code in (0, -signal.SIGKILL), stderr
        met += code != 0
        assert_no_model(job, out)
    return met


def test_killed_at_random_moments(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert chain(job, out, seed=0, kills=4) >= 2
    assert_finished(job, out)
    if "pth" in job.options:
        assert_sound(out)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_killed_at_many_random_moments(seed: int, job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert chain(job, out, seed, kills=6) >= 2
    assert_finished(job, out)
    if "pth" in job.options:
        assert_sound(out)


@kinds("pth to hf")
def test_killed_after_renames(job: Job, tmp_path: Path) -> None:
    """The finishing phase, exactly: after the first weight file, the last, the index, the manifest, the card, and after
    config.json or params.json, when only the look at the whole and the removal of the journal are left."""
    out = tmp_path / "out"
    shards = sorted(job.weights)
    index = [n for n in job.reference if n.endswith(".index.json")]
    order = [*shards, *index, "quantkit.json", "README.md", job.last]
    renamed = 0  # weight files are renamed once and for all; the small files are written again by each run
    for last in dict.fromkeys([shards[0], shards[-1], *index, "quantkit.json", "README.md", job.last]):
        n = order.index(last) + 1 - renamed
        killed = signal_after_rename(n, signal.SIGKILL, job, out)
        assert killed.returncode == -signal.SIGKILL, (last, killed.stderr)
        assert (out / last).exists()
        assert (out / job.last).exists() == (last == job.last)
        assert_no_model(job, out)
        renamed = max(renamed, min(order.index(last) + 1, len(shards)))
    assert assert_finished(job, out) == UNITS


@kinds("hf to pth", "pth to hf")
def test_resuming_keeps_what_was_done(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_at(job, out, lines(UNITS // 2), signal.SIGKILL)
    sources = (out / ".quantkit" / "journal").read_text().count('"source"')
    kept = journal_lines(out) - 1 - sources
    assert UNITS > assert_finished(job, out) == kept > 0
    if "pth" in job.options:
        assert_sound(out)


def test_a_torch_file_is_none_before_its_end(jobs: Callable[[str], Job], tmp_path: Path) -> None:
    job, out = jobs("hf to pth"), tmp_path / "out"
    stop_at(job, out, lines(UNITS // 2), signal.SIGKILL)
    (partial,) = out.glob("consolidated*")
    assert partial.name == "consolidated.00.pth.partial"
    assert not zipfile.is_zipfile(partial)


# --- signals ----------------------------------------------------------------------------------------------------------


@kinds("hf to pth")
@pytest.mark.parametrize("what", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(what: signal.Signals, job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stderr = stop_at(job, out, lines(6), what)
    assert code == 130
    assert_three_lines(stderr, "interrupted", str(out), "the same command")
    assert not (out / job.last).exists()
    assert assert_finished(job, out) > 0


@kinds("pth to hf")
def test_interrupted_in_the_finishing_phase(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped = signal_after_rename(len(job.weights) + 1, signal.SIGTERM, job, out)
    assert stopped.returncode == 130
    assert_three_lines(errors(stopped.stderr), "interrupted", str(out), "the same command")
    assert not (out / job.last).exists()
    assert assert_finished(job, out) == UNITS


# --- the finished folder, and the journal -----------------------------------------------------------------------------


@kinds("hf to pth")
def test_finished_folder_is_left_alone(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert assert_finished(job, out) == 0
    before = stamps(out)
    again = finish(job, out)
    assert (again.returncode, stamps(out)) == (0, before)
    assert "finished already" in again.stdout
    assert json.loads(finish(job, out, "--json").stdout)["already_done"] is True


@kinds("hf to pth")
def test_the_check_changes_no_weight(job: Job, tmp_path: Path) -> None:
    unchecked = finish(job, tmp_path / "out", "--no-check", "--json")
    assert unchecked.returncode == 0, unchecked.stderr
    assert json.loads(unchecked.stdout)["checked"] == ""
    found = digests(tmp_path / "out")
    assert job.weights.items() <= found.items()
    differ = {n for n in job.reference if job.reference[n] != found[n]}
    assert differ <= {"quantkit.json", "README.md"}


@kinds("pth to hf")
def test_the_number_of_threads_changes_nothing(job: Job, tmp_path: Path) -> None:
    done = finish(job, tmp_path / "out", "--threads", "5")
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "out") == job.reference


def test_torn_journal(jobs: Callable[[str], Job], tmp_path: Path) -> None:
    """Of a torch file it also keeps the CRC-32s."""
    job, out = jobs("hf to pth"), tmp_path / "out"
    stop_at(job, out, lines(8), signal.SIGKILL)
    journal = out / ".quantkit" / "journal"
    journal.write_bytes(journal.read_bytes()[:-7])
    assert_finished(job, out)
    assert_sound(out)


def test_another_plan_does_not_take_over(jobs: Callable[[str], Job], tmp_path: Path) -> None:
    """Not the other format, nor the other direction, nor quantizing."""
    job, out = jobs("hf to mistral"), tmp_path / "out"
    stop_at(job, out, lines(4), signal.SIGKILL)
    before = stamps(out)
    quantize = ["quantize", str(job.source), "-o", str(out), "--quiet"]
    others = [partial(start, jobs(kind), out) for kind in ("hf to pth", "pth to hf")]
    for begin in (*others, partial(warm.start, quantize)):
        other = begin()  # one by one: two at once find each other there
        _, stderr = other.communicate(timeout=60)
        assert other.returncode == 2
        assert_three_lines(errors(stderr), "unfinished run of another plan", "--force")
    assert stamps(out) == before
    pth = jobs("hf to pth")
    assert finish(pth, out, "--force").returncode == 0
    assert digests(out) == pth.reference, "nothing is left of the other"


@kinds("hf to pth")
def test_two_runs_on_one_folder(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start(job, out)
    at(first, out, lines(2), signal.SIGSTOP)
    try:
        second = finish(job, out)
        assert second.returncode == 2
        assert_three_lines(errors(second.stderr), "another run is writing", str(out))
        assert finish(job, out, "--force").returncode == 2
    finally:
        first.send_signal(signal.SIGCONT)
        first.communicate(timeout=60)
    assert first.returncode == 0
    assert digests(out) == job.reference
