"""Files that no part has whole are hashed by the part that is done with them last, and not all by `finish`."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import warm
from resuming import OPTIONS, digests, make_source

import quantkit
from quantkit.checkpoint.journal import read_journal
from quantkit.parts import shares
from quantkit.plans import Plan


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("hashes") / "source")


@pytest.fixture(scope="module")
def plan(source: Path) -> Plan:
    return quantkit.plan(source, {"shard_size": "12MB"})


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("reference") / "out"
    assert quantize(source, out).returncode == 0
    return digests(out)


def quantize(source: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return warm.run(["quantize", str(source), "-o", str(out), *OPTIONS, *options])


def parts_done(source: Path, out: Path, numbers: Sequence[int], count: int) -> None:
    for n in numbers:
        done = quantize(source, out, "--part", f"{n}/{count}")
        assert done.returncode == 0, done.stderr


def hashed(out: Path, number: int, count: int) -> dict[str, str]:
    """By file, what a part's journal says."""
    _, entries = read_journal(out / ".quantkit" / f"part-{number}-of-{count}")
    return {e["shard"]: e["sha256"] for e in entries if "shard" in e}


def theirs(plan: Plan, count: int) -> Mapping[int, set[str]]:
    """By part, which files it writes to."""
    return {n: {t.file for u in s.units for t in u.outputs} for n, s in enumerate(shares(plan, count), 1)}


@pytest.mark.parametrize("numbers", [(1, 2, 3, 4), (4, 2, 1, 3), tuple(range(13, 0, -1))], ids=str)
def test_by_the_last_of_its_parts(
    numbers: tuple[int, ...], source: Path, plan: Plan, reference: dict[str, str], tmp_path: Path
) -> None:
    out, count = tmp_path / "out", len(numbers)
    files = theirs(plan, count)
    assert any(len([n for n in files if s.name in files[n]]) > 1 for s in plan.shards), "none is shared"
    for position, n in enumerate(numbers):
        parts_done(source, out, [n], count)
        unfinished = set[str]().union(*(files[m] for m in numbers[position + 1 :]))
        assert hashed(out, n, count).keys() == files[n] - unfinished
    found = {name: digest for n in numbers for name, digest in hashed(out, n, count).items()}
    assert found == {s.name: reference[s.name] for s in plan.shards}
    assert warm.run(["finish", str(out), "--quiet"]).returncode == 0
    assert digests(out) == reference


def test_what_was_altered_is_left_to_finish(
    source: Path, plan: Plan, reference: dict[str, str], tmp_path: Path
) -> None:
    """A part is not stopped by what happened to another's tensors; `finish` knows whose they are."""
    out = tmp_path / "out"
    files = theirs(plan, 2)
    (name,) = files[1] & files[2]
    tensor = next(t for u in shares(plan, 2)[0].units for t in u.outputs if t.file == name)
    parts_done(source, out, [1], 2)
    with (out / f"{name}.partial").open("r+b") as f:
        f.seek(tensor.offset)
        (byte,) = f.read(1)
        f.seek(tensor.offset)
        f.write(bytes([byte ^ 1]))
    parts_done(source, out, [2], 2)
    assert name not in hashed(out, 2, 2)
    done = warm.run(["finish", str(out), "--quiet"])
    assert done.returncode == 1
    assert "run part 1/2 again" in done.stderr
    parts_done(source, out, [1], 2)
    assert hashed(out, 1, 2)[name] == reference[name]
    assert warm.run(["finish", str(out), "--quiet"]).returncode == 0
    assert digests(out) == reference


def test_one_that_was_killed_before_it_had_hashed(
    source: Path, plan: Plan, reference: dict[str, str], tmp_path: Path
) -> None:
    """Run again, it does that, and so does `finish`."""
    out, files = tmp_path / "out", theirs(plan, 2)
    (name,) = files[1] & files[2]
    parts_done(source, out, [1, 2], 2)
    journal = out / ".quantkit" / "part-2-of-2"

    def kill() -> None:
        lines = journal.read_bytes().splitlines(keepends=True)
        assert b'"done"' in lines[-2]
        journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
        assert name not in hashed(out, 2, 2)

    kill()
    parts_done(source, out, [2], 2)
    assert hashed(out, 2, 2)[name] == reference[name]
    kill()
    assert warm.run(["finish", str(out), "--quiet"]).returncode == 0
    assert digests(out) == reference
