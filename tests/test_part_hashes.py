"""Files that no part has whole are hashed by the part that is done with them last, and not all by `finish`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import warm
from resuming import OPTIONS, digests, flip, make_source

import quantkit
from quantkit import api, parts
from quantkit.checkpoint.journal import read_journal
from quantkit.checkpoint.writer import ShardWriter, TrailingHash
from quantkit.console import Console
from quantkit.errors import RunError
from quantkit.parts import shares
from quantkit.plans import Plan
from quantkit.recipe import build_recipe


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


@pytest.fixture
def left_to_finish(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Of each `finish` in this process, which files it hashes."""
    found: list[set[str]] = []
    hash_shards = parts.hash_shards

    def look(plan: Plan, shards: Sequence[Any], *more: Any) -> Any:
        found.append({s.name for s in shards})
        return hash_shards(plan, shards, *more)

    monkeypatch.setattr(parts, "hash_shards", look)
    return found


def hashed(out: Path, number: int, count: int) -> dict[str, str]:
    """By file, what a part's journal says."""
    _, entries = read_journal(out / ".quantkit" / f"part-{number}-of-{count}")
    return {e["shard"]: e["sha256"] for e in entries if "shard" in e}


def theirs(plan: Plan, count: int) -> Mapping[int, set[str]]:
    """By part, which files it writes to."""
    return {n: {t.file for u in s.units for t in u.outputs} for n, s in enumerate(shares(plan, count), 1)}


@pytest.mark.parametrize("numbers", [(1, 2, 3, 4), (4, 2, 1, 3), tuple(range(13, 0, -1))], ids=str)
def test_by_the_last_of_its_parts(
    numbers: tuple[int, ...],
    source: Path,
    plan: Plan,
    reference: dict[str, str],
    tmp_path: Path,
    left_to_finish: list[set[str]],
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
    for n in (numbers[0], numbers[-1]):  # run again, it finds that nothing is left to do
        before = {n: hashed(out, n, count) for n in numbers}
        parts_done(source, out, [n], count)
        assert {n: hashed(out, n, count) for n in numbers} == before
    api.finish(out)
    assert left_to_finish == [set()]
    assert digests(out) == reference


def test_what_was_altered_is_left_to_finish(
    source: Path, plan: Plan, reference: dict[str, str], tmp_path: Path, left_to_finish: list[set[str]]
) -> None:
    """A part is not stopped by what happened to another's tensors; `finish` knows whose they are."""
    out = tmp_path / "out"
    files = theirs(plan, 2)
    (name,) = files[1] & files[2]
    tensor = next(t for u in shares(plan, 2)[0].units for t in u.outputs if t.file == name)
    parts_done(source, out, [1], 2)
    flip(out / f"{name}.partial", tensor.offset)
    parts_done(source, out, [2], 2)
    assert name not in hashed(out, 2, 2)
    with pytest.raises(RunError, match=r"(?s)is not on disk.*run part 1/2 again"):
        api.finish(out)
    parts_done(source, out, [1], 2)
    assert hashed(out, 1, 2)[name] == reference[name]
    api.finish(out)
    assert left_to_finish == [{name}, set()]
    assert digests(out) == reference


def test_a_hash_of_before_hides_none_of_after(
    source: Path, plan: Plan, reference: dict[str, str], tmp_path: Path, left_to_finish: list[set[str]]
) -> None:
    """Altered once it was hashed, by the second part; written anew and hashed by the first."""
    out = tmp_path / "out"
    (name,) = theirs(plan, 2)[1] & theirs(plan, 2)[2]
    tensor = next(t for u in shares(plan, 2)[0].units for t in u.outputs if t.file == name)
    parts_done(source, out, [1, 2], 2)
    assert name in hashed(out, 2, 2)
    flip(out / f"{name}.partial", tensor.offset)
    with pytest.raises(RunError, match="run part 1/2 again"):
        api.finish(out)
    parts_done(source, out, [1], 2)
    before = read_journal(out / ".quantkit" / "part-1-of-2")
    parts_done(source, out, [1], 2)
    assert [e for e in read_journal(out / ".quantkit" / "part-1-of-2")[1] if "shard" in e] == [
        e for e in before[1] if "shard" in e
    ], "hashed again for nothing"
    api.finish(out)
    assert left_to_finish == [{name}, set()]
    assert digests(out) == reference


@pytest.mark.parametrize("whole", [True, False], ids=["a file of its own", "one that it shares"])
def test_altered_as_soon_as_it_is_hashed(
    whole: bool, source: Path, plan: Plan, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its last byte's hash and the journal's line: no time of the file's may vouch for another's bytes."""
    out = tmp_path / "out"
    shared = theirs(plan, 2)[1] & theirs(plan, 2)[2]
    name = sorted(theirs(plan, 2)[2] - shared if whole else shared)[0]
    tensor = next(t for u in plan.units for t in u.outputs if t.file == name)
    parts_done(source, out, [1], 2)
    forget, advance = ShardWriter.forget, TrailingHash.advance
    altered: list[str] = []

    def alter() -> None:
        if not altered:
            flip(out / f"{name}.partial", tensor.offset)
            altered.append(name)

    def forgotten(self: ShardWriter, file: str, start: int, end: int) -> None:
        if file == name and end == self.layouts[name].nbytes:
            alter()
        forget(self, file, start, end)

    def advanced(self: TrailingHash, to: int) -> None:
        advance(self, to)
        if self.position == self.nbytes == next(s.nbytes for s in plan.shards if s.name == name):
            alter()

    with monkeypatch.context() as patched:
        if whole:
            patched.setattr(ShardWriter, "forget", forgotten)
        else:
            patched.setattr(TrailingHash, "advance", advanced)
        recipe = {"source": str(source), "output": str(out), "shard_size": "12MB"}
        api.run_recipe(build_recipe(recipe), part="2/2")
    assert altered == [name]
    with pytest.raises(RunError, match="is not on disk as it was written"):
        api.finish(out)
    parts_done(source, out, [1, 2], 2)
    api.finish(out)
    assert digests(out) == reference


def test_hashes_of_a_job_before_do_not_count(source: Path, plan: Plan, tmp_path: Path) -> None:
    out = tmp_path / "out"
    parts_done(source, out, [1], 2)
    journal = (out / ".quantkit" / "part-1-of-2").read_bytes()
    for path in (*out.glob("*.partial"), *(out / ".quantkit").iterdir()):
        path.unlink()
    parts_done(source, out, [2], 2)
    (out / ".quantkit" / "part-1-of-2").write_bytes(journal)
    parts_done(source, out, [2], 2)
    assert not hashed(out, 2, 2).keys() & theirs(plan, 2)[1]


def test_a_disk_that_fails_then_stops_no_part(
    source: Path, plan: Plan, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (name,) = theirs(plan, 2)[1] & theirs(plan, 2)[2]
    parts_done(source, out, [1], 2)
    read: Callable[..., int] = ShardWriter.read_into

    def fail(self: ShardWriter, file: str, offset: int, buffer: memoryview) -> int:
        if file == name:
            raise OSError(5, os.strerror(5))
        return read(self, file, offset, buffer)

    said: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "read_into", fail)
        patched.setattr(Console, "warn", lambda self, text: said.append(text))
        recipe = {"source": str(source), "output": str(out), "shard_size": "12MB"}
        api.run_recipe(build_recipe(recipe), part="2/2")
    assert "left to `finish`: Input/output error" in said[-1]
    api.finish(out)
    assert digests(out) == reference


def test_torch_files(source: Path, tmp_path: Path) -> None:
    out, line = tmp_path / "out", ["convert", str(source), "--to", "mistral", "--no-tokenizer", "--quiet"]
    line += ["--weights-format", "pth", "-o"]
    assert warm.run([*line, str(tmp_path / "whole")]).returncode == 0
    for n in (1, 3, 2, 2, 1):
        assert warm.run([*line, str(out), "--part", f"{n}/3"]).returncode == 0
    whole = digests(tmp_path / "whole")
    assert [hashed(out, n, 3) for n in (1, 2, 3)] == [{}, {"consolidated.00.pth": whole["consolidated.00.pth"]}, {}]
    file = out / "consolidated.00.pth.partial"
    before = file.stat().st_mtime_ns
    assert warm.run(["finish", str(out), "--quiet"]).returncode == 0
    assert (out / "consolidated.00.pth").stat().st_mtime_ns == before
    assert digests(out) == whole


def test_one_that_was_killed_before_it_had_hashed(
    source: Path, plan: Plan, reference: dict[str, str], tmp_path: Path, left_to_finish: list[set[str]]
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
    api.finish(out)
    assert left_to_finish == [{name}]
    assert digests(out) == reference
