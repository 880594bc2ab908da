"""One job in parts, by processes that share a folder: the same bytes as one process writes, whoever dies on the way;
and whoever does not belong to the job is sent away."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
from eval_models import build, text_of
from hypothesis import given
from hypothesis import strategies as st
from resuming import OPTIONS, SIGNAL_AFTER_RENAME, assert_three_lines, digests, make_source

import quantkit
import quantkit.api
from quantkit.parts import shares
from quantkit.recipe import load_recipe
from quantkit.sharing import runs

CHECKED = "--no-tokenizer"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("parts") / "source")


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("reference") / "out"
    assert quantize(source, out).returncode == 0
    return digests(out)


def cli(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return warm.run(words, cwd=cwd)


def quantize(
    source: Path | str, out: Path | str, *options: str, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return cli("quantize", str(source), "-o", str(out), *OPTIONS, *options, cwd=cwd)


def start(source: Path, out: Path, part: str) -> warm.Process:
    return warm.start(["quantize", str(source), "-o", str(out), *OPTIONS, "--part", part])


@pytest.fixture
def out(tmp_path: Path, source: Path) -> Path:
    """A folder with the first of two parts."""
    done = quantize(source, tmp_path / "out", "--part", "1/2")
    assert done.returncode == 0, done.stderr
    return tmp_path / "out"


def refused(done: subprocess.CompletedProcess[str], what: str, code: int = 2) -> None:
    assert done.returncode == code, done.stderr
    assert what in done.stderr
    assert_three_lines(done.stderr)


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=60), st.integers(1, 12))
def test_runs_are_runs_of_about_the_same_cost(costs: list[int], count: int) -> None:
    owners = runs(costs, count)
    assert owners == sorted(owners)
    assert set(owners) <= set(range(count))
    for n in range(count):
        mine = sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == n)
        assert mine <= sum(costs) / count + max(costs) + 1


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100])
def test_shares_are_the_plan(source: Path, count: int) -> None:
    plan = quantkit.plan(source, {"shard_size": "12MB"})
    found = shares(plan, count)
    assert [u for share in found for u in share.units] == list(plan.units)
    for kind in ("sources", "shards"):
        named = [name for share in found for name in getattr(share, kind)]
        assert len(named) == len(set(named)), "two parts hash the same file"
    if count == 1:
        assert found[0].shards == {s.name for s in plan.shards}
        assert found[0].sources == {u.source.file for u in plan.units}


def test_four_at_once(source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    processes = [start(source, out, f"{n}/4") for n in (3, 1, 4, 2)]
    for process in processes:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
    assert not (out / "config.json").exists(), "it is no model yet"
    few = ["bash", "-c", 'ulimit -S -n 16; exec "$@"', "bash", sys.executable, "-m", "quantkit"]  # files at once
    done = subprocess.run([*few, "finish", str(out), "--quiet"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert digests(out) == reference
    (out / sorted(reference)[-2]).unlink()
    refused(cli("finish", str(out), "--quiet"), f"{sorted(reference)[-2]} is missing or of another size")


def test_twenty_kills(source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    out, kills, rng = tmp_path / "out", 0, random.Random(3)
    while kills < 20:
        process = start(source, out, f"{rng.randint(1, 4)}/4")
        try:
            process.communicate(timeout=rng.uniform(0.03, 0.5))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
        else:
            shutil.rmtree(out)  # it is done: from the beginning, to have something to kill
    for n in range(1, 5):
        done = quantize(source, out, "--part", f"{n}/4")
        assert done.returncode == 0, done.stderr
    line = [sys.executable, "-c", SIGNAL_AFTER_RENAME, "3", str(int(signal.SIGKILL)), "finish", str(out), "--quiet"]
    assert subprocess.run(line, capture_output=True, timeout=60).returncode == -signal.SIGKILL
    assert cli("finish", str(out), "--quiet").returncode == 0
    assert digests(out) == reference


def test_hosts_with_working_folders_of_their_own(source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    """The same model and the same output, by other paths."""
    shared = tmp_path / "shared"
    shared.mkdir()
    for n in (1, 2):
        host = tmp_path / f"host{n}"
        host.mkdir()
        (host / "work").symlink_to(shared)
        (host / "model").symlink_to(source)
        assert quantize("model", "work/out", "--part", f"{n}/2", cwd=host).returncode == 0
    done = cli("finish", "work/out", "--source", "model", "--quiet", cwd=tmp_path / "host2")
    assert done.returncode == 0, done.stderr
    assert digests(shared / "out") == reference
    for n in (1, 2):
        assert cli("verify", str(shared / "out"), "--source", str(source), "--part", f"{n}/2").returncode == 0


@pytest.mark.parametrize("options", [("--to", "mistral"), ("--to", "mistral", "--weights-format", "pth")])
def test_conversions(source: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    line = ("convert", str(source), *options, CHECKED, "--quiet")
    assert cli(*line, "-o", str(tmp_path / "whole")).returncode == 0
    for n in (2, 3, 1):
        done = cli(*line, "-o", str(tmp_path / "out"), "--part", f"{n}/3")
        assert done.returncode == 0, done.stderr
        assert "mapped back" in done.stdout
    assert cli("finish", str(tmp_path / "out"), "--quiet").returncode == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_part_again(out: Path, source: Path) -> None:
    done = quantize(source, out, "--part", "1/2")
    assert done.returncode == 0
    assert "kept from an earlier run" in done.stdout
    found = json.loads(quantize(source, out, "--part", "1/2", "--json").stdout)
    assert found["part"] == "1/2"
    assert found["reused"] == found["units"]


def test_late(out: Path, source: Path, reference: dict[str, str]) -> None:
    assert quantize(source, out, "--part", "2/2").returncode == 0
    assert cli("finish", str(out), "--quiet").returncode == 0
    late = quantize(source, out, "--part", "2/2")
    assert late.returncode == 0
    assert "finished already" in late.stdout
    again = cli("finish", str(out))
    assert (again.returncode, "finished already" in again.stdout) == (0, True)
    assert digests(out) == reference
    refused(cli("finish", str(out.parent)), "no parts")
    refused(cli("finish", str(out / "nowhere")), "no such folder")


def test_duplicate(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(source, out, "1/2")
    journal = out / ".quantkit" / "part-1-of-2"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    try:
        refused(quantize(source, out, "--part", "1/2"), "another process has part 1/2")
        refused(cli("finish", str(out)), "part 1/2 is under way")
    finally:
        process.send_signal(signal.SIGCONT)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_one_that_hangs(out: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkit import part_folder
    from quantkit.errors import OutputError

    monkeypatch.setattr(part_folder, "PATIENCE", 0.1)
    with (out / ".quantkit" / "lock").open() as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="beginning for"):
            quantkit.api.run_recipe(
                load_recipe(None, options={"source": str(source), "output": str(out), "shard_size": "12MB"}), part="2/2"
            )


def test_duplicate_where_nothing_is_locked(out: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As over some networks: whoever finds a line in its journal that it did not write stops."""
    from quantkit.checkpoint.journal import Journal
    from quantkit.errors import RunError

    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    one, other = Journal(out, "part-1-of-2"), Journal(out, "part-1-of-2")
    one.append([{"unit": "a"}])
    with pytest.raises(RunError, match="another process"):
        other.append([{"unit": "b"}])
    one.close(), other.close()


def test_foreign(out: Path, source: Path, tmp_path: Path) -> None:
    before = digests(out)
    refused(quantize(source, out, "--part", "2/3"), "this job is in 2 parts, not 3")
    refused(quantize(source, out, "--part", "2/2", "--bits", "8"), "parts of another plan")
    refused(quantize(source, out), "holds parts of a job")
    refused(quantize(source, out, "--force"), "holds parts of a job")
    refused(quantize(source, out, "--part", "2/2", "--force"), "--force")
    refused(cli("verify", str(out)), "holds parts of a job")
    twin = tmp_path / "twin"
    shutil.copytree(source, twin, copy_function=shutil.copyfile)
    refused(quantize(twin, out, "--part", "2/2", "--set", "card.base_model=x/y"), "parts of another plan")
    os.utime(twin / "model-00001-of-00004.safetensors", (1, 1))
    twin.rename(tmp_path / "source")
    refused(quantize(tmp_path / "source", out, "--part", "2/2"), "not the source's files")
    assert digests(out).keys() - before.keys() == set()


@pytest.mark.parametrize("part", ["a/b", "9/2", "1/500"])
def test_dry_run_of_what_is_no_part(source: Path, tmp_path: Path, part: str) -> None:
    for more in ([], ["--dry-run"]):
        done = quantize(source, tmp_path / "none", "--part", part, *more)
        assert_three_lines(done.stderr)
        assert (done.returncode, done.stdout) == (2, "")
    assert quantize(source, tmp_path / "none", "--part", "1/2", "--dry-run").returncode == 0
    assert not (tmp_path / "none").exists()


def test_a_source_that_has_moved(source: Path, tmp_path: Path, reference: dict[str, str]) -> None:
    place, out = tmp_path / "first" / source.name, tmp_path / "out"
    shutil.copytree(source, place)
    for part in ("1/2", "2/2"):
        assert quantize(place, out, "--part", part).returncode == 0
    moved = shutil.move(place, tmp_path / source.name)
    refused(cli("finish", str(out)), "the model that the parts were made from is gone")
    assert cli("finish", str(out), "--source", str(moved)).returncode == 0
    assert digests(out) == reference


def test_too_early(out: Path) -> None:
    refused(cli("finish", str(out)), "part 2/2 is not finished")
    assert not (out / "config.json").exists()
    assert not (out / ".quantkit" / "part-2-of-2").exists()


def test_files_that_were_deleted(out: Path, source: Path) -> None:
    """Zeros in place of what a journal says is there would be no different from weights."""
    assert quantize(source, out, "--part", "2/2").returncode == 0
    for path in out.glob("*.partial"):
        path.unlink()
    for _ in range(2):
        refused(quantize(source, out, "--part", "1/2"), "replaced or deleted")
        refused(cli("finish", str(out)), "replaced or deleted")
    assert not list(out.glob("*.safetensors*")), "nobody has put others there"


def test_files_that_were_replaced(out: Path, source: Path) -> None:
    shard = next(out.glob("*.partial"))
    size = shard.stat().st_size
    shard.rename(out / "kept")  # so that the new one is another file
    with shard.open("wb") as f:
        f.truncate(size)
    refused(quantize(source, out, "--part", "2/2"), "replaced or deleted")
    refused(cli("finish", str(out)), "replaced or deleted")


def test_what_says_which_files_is_gone(out: Path, source: Path) -> None:
    """Parts would write to other files than those that journals speak of."""
    (out / ".quantkit" / "files.json").unlink()
    next(out.glob("*.partial")).unlink()
    refused(quantize(source, out, "--part", "2/2"), "not files.json")
    refused(cli("finish", str(out)), "not files.json")


def test_what_the_job_was_is_gone(out: Path, source: Path) -> None:
    def refused_both(what: str) -> None:
        """At once: each looks again for seconds, as another machine may be writing it."""
        both = [start(source, out, "2/2"), warm.start(["finish", str(out)])]
        for process in both:
            _, stderr = process.communicate()
            refused(subprocess.CompletedProcess("", process.wait(), "", stderr), what)

    (out / ".quantkit" / "job.json").write_text("[")
    refused_both("damaged")
    (out / ".quantkit" / "job.json").unlink()
    refused_both("not job.json")


def test_more_parts_than_tensors(source: Path, tmp_path: Path) -> None:
    refused(quantize(source, tmp_path / "out", "--part", "1/100000"), "too many")
    assert not (tmp_path / "out").exists()


def test_dead_before_there_were_files(out: Path, source: Path, reference: dict[str, str]) -> None:
    """The first part was killed when it had described the job, and before that, as it wrote another file."""
    (out / ".quantkit" / "files.json").unlink()
    (out / ".quantkit" / "part-1-of-2").unlink()
    (out / ".quantkit" / "job.json.0123456789abcdef").write_text("{")
    refused(cli("finish", str(out)), "part 1/2 is not finished")
    for part in ("1/2", "2/2"):
        assert quantize(source, out, "--part", part).returncode == 0
    assert cli("finish", str(out), "--quiet").returncode == 0
    assert digests(out) == reference
    assert not (out / ".quantkit").exists()


def test_two_finish(out: Path, source: Path, reference: dict[str, str]) -> None:
    assert quantize(source, out, "--part", "2/2").returncode == 0
    line = ["finish", str(out), "--quiet"]
    both = [warm.start(line) for _ in range(2)]
    said = [process.communicate(timeout=60)[1] for process in both]
    codes = {process.returncode for process in both}
    assert 0 in codes
    assert codes == {0} or "another process is finishing" in "".join(said)
    assert digests(out) == reference
    assert not (out / ".quantkit").exists()


def test_journals_of_a_job_before(out: Path, source: Path, reference: dict[str, str]) -> None:
    """`finish` died when it had removed the job and no journal, and somebody emptied the folder but for names with a
    dot: what journals say is there is not."""
    assert quantize(source, out, "--part", "2/2").returncode == 0
    (out / ".quantkit" / "job.json").unlink()
    for path in out.glob("[!.]*"):
        path.unlink()
    for n in (1, 2):
        done = quantize(source, out, "--part", f"{n}/2")
        assert done.returncode == 0, done.stderr
        assert "kept" not in done.stdout
    assert cli("finish", str(out), "--quiet").returncode == 0
    assert digests(out) == reference


def test_late_beside_what_a_dying_finish_left(out: Path, source: Path, reference: dict[str, str]) -> None:
    assert quantize(source, out, "--part", "2/2").returncode == 0
    journal = (out / ".quantkit" / "part-1-of-2").read_bytes()
    assert cli("finish", str(out), "--quiet").returncode == 0
    (out / ".quantkit").mkdir()
    (out / ".quantkit" / "part-1-of-2").write_bytes(journal)
    late = quantize(source, out, "--part", "1/2")
    assert "finished already" in late.stdout
    assert digests(out).items() >= reference.items()


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "1/0", "a/b", "1/2/3", "-1/2"])
def test_what_is_no_part(source: Path, tmp_path: Path, part: str) -> None:
    refused(quantize(source, tmp_path / "out", f"--part={part}"), "not a part")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "what"), [
    (("--method", "gptq", "--group-size", "32"), "looks at a text"), (("--bits", "9"), "mixed bits"),
])  # fmt: skip
def test_what_cannot_be_done_in_parts(tmp_path: Path, options: tuple[str, ...], what: str) -> None:
    model = build(tmp_path / "model")
    (tmp_path / "text.txt").write_text(text_of(9000))
    calibration = ("--calib", str(tmp_path / "text.txt"), "--calib-samples", "4", "--calib-length", "64")
    refused(quantize(model, tmp_path / "out", "--part", "1/2", *options, *calibration), what)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_what_cannot_be_done_in_parts_is_said_before_a_text_is_looked_at(
    source: Path, tmp_path: Path, dry_run: tuple[str, ...]
) -> None:
    (tmp_path / "text.txt").write_text("too short")
    options = ("--method", "gptq", "--calib", str(tmp_path / "text.txt"), *dry_run)
    refused(quantize(source, tmp_path / "out", "--part", "1/2", *options), "looks at a text")


def test_a_nan_stops_its_part_alone(source: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(source, bad)
    index = json.loads((bad / "model.safetensors.index.json").read_text())["weight_map"]
    path = bad / index["lm_head.weight"]
    raw = bytearray(path.read_bytes())
    raw[-2:] = b"\xc0\x7f"  # a NaN in bf16
    path.write_bytes(raw)
    assert quantize(bad, tmp_path / "out", "--part", "1/2").returncode == 0
    refused(quantize(bad, tmp_path / "out", "--part", "2/2"), "NaN")
    refused(cli("finish", str(tmp_path / "out")), "part 2/2 is not finished")
    assert quantize(bad, tmp_path / "out", "--part", "1/2").returncode == 0, "what is done is kept"


def test_a_job_whose_recipe_is_none(out: Path, source: Path) -> None:
    path = out / ".quantkit" / "job.json"
    job = json.loads(path.read_text())
    path.write_text(json.dumps({**job, "recipe": job["recipe"].replace("double_quant", "doUble_quant")}))
    refused(cli("finish", str(out)), "the job's description is damaged")
    assert "delete the folder" in cli("finish", str(out)).stderr


def test_a_part_is_not_told_to_use_force(source: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.partial").write_text("somebody's")
    done = quantize(source, tmp_path, "--part", "1/2")
    refused(done, "is not empty")
    assert "--force" not in done.stderr


def test_a_journal_of_another_part(out: Path, source: Path, reference: dict[str, str]) -> None:
    assert quantize(source, out, "--part", "2/2").returncode == 0
    journals = out / ".quantkit"
    shutil.copy(journals / "part-1-of-2", journals / "part-2-of-2")
    done = cli("finish", str(out), "--quiet")
    refused(done, "the journal of part 2/2 is another part's")
    assert "run part 2/2 again" in done.stderr
    assert quantize(source, out, "--part", "2/2").returncode == 0
    assert cli("finish", str(out), "--quiet").returncode == 0
    assert digests(out) == reference


def test_nothing_says_of_what_they_are(out: Path, source: Path, tmp_path: Path) -> None:
    for name in ("job.json", "part-1-of-2"):
        (out / ".quantkit" / name).unlink()
    for done in (cli("finish", str(out)), quantize(source, out, "--part", "1/2")):
        refused(done, "and not job.json")
        assert "delete the folder" in done.stderr
    (tmp_path / "file").write_text("x")
    refused(cli("finish", str(tmp_path / "file")), "that is a file, not a folder")


def test_below_the_home_folder(source: Path, tmp_path: Path) -> None:
    """A path that no shell has looked at."""
    env = {**os.environ, "HOME": str(tmp_path)}
    words = ["quantize", str(source), "-o", "~/out", *OPTIONS, "--part", "1/1"]
    for line in (words, ["finish", "~/out", "--quiet"], ["verify", "~/out", "--quick", "--quiet"]):
        done = warm.run(line, cwd=tmp_path, env=env)
        assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "config.json").exists()
