"""Processes that torchrun starts, on one job: the same bytes as one process writes, whatever their number, and whoever
dies on the way."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import warm
from eval_models import build, text_of
from hypothesis import given
from hypothesis import strategies as st
from resuming import digests

from quantkit.solvers.team import Team

CALIBRATION = ("--calib-samples", "6", "--calib-length", "64")
JOBS = {
    "gptq": ("quantize", "--method", "gptq", "--bits", "4", "--group-size", "32"),
    "low": ("quantize", "--method", "gptq", "--bits", "3", "--group-size", "32", "--effort", "low"),
    "wanda": ("prune", "--sparsity", "0.5"),
    "owl": ("prune", "--sparsity", "0.5", "--owl"),
    "sparsegpt": ("prune", "--method", "sparsegpt", "--pattern", "2:4"),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("team")
    build(folder / "model")
    build(folder / "experts", "mixtral")
    (folder / "text.txt").write_text(text_of(12_000))
    return folder


def line(job: str, model: str, out: str, *options: str) -> list[str]:
    verb, *rest = JOBS[job]
    return [verb, model, "-o", out, *rest, "--calib", "text.txt", *CALIBRATION, "--quiet", *options]


def alone(work: Path, *words: str) -> None:
    done = warm.run(words, cwd=work, torch=True)
    assert done.returncode == 0, done.stderr


def torchrun(work: Path, size: int, *words: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, "-m", "quantkit", *words], cwd=work, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def together(work: Path, size: int, *words: str) -> tuple[int, str, str]:
    process = torchrun(work, size, *words)
    stdout, stderr = process.communicate(timeout=180)
    return process.returncode, stdout, stderr


def started_by_rank(work: Path, *lines: list[str]) -> list[warm.Process]:
    """Ranks of one team, each with words of its own, as if every one ran on another machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    for rank, words in enumerate(lines):
        team = {"RANK": str(rank), "WORLD_SIZE": str(len(lines)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        env = {**os.environ, **team, "OMP_NUM_THREADS": "1"}
        found.append(warm.start(words, cwd=work, env=env, torch=True))
    return found


def by_rank(work: Path, *lines: list[str]) -> list[subprocess.CompletedProcess[str]]:
    found = started_by_rank(work, *lines)
    said = [process.communicate(timeout=120) for process in found]
    return [subprocess.CompletedProcess("", p.wait(), *s) for p, s in zip(found, said, strict=True)]


@pytest.mark.parametrize(("job", "model", "size"), [("gptq", "model", 4), ("wanda", "experts", 2)])
def test_the_same_bytes(work: Path, job: str, model: str, size: int) -> None:
    """Of processes that are told what torchrun tells them."""
    one, many = f"{job}-{model}-alone", f"{job}-{model}-team"
    alone(work, *line(job, model, one))
    team = by_rank(work, *[line(job, model, many)] * size)
    assert [process.returncode for process in team] == [0] * size, team
    assert "".join(process.stdout for process in team).count("peak RAM") == 1, "one speaks"
    assert digests(work / many) == digests(work / one)


@pytest.mark.slow
@pytest.mark.parametrize(("job", "model", "size"), [
    ("gptq", "model", 4), ("gptq", "experts", 3), ("low", "model", 2), ("wanda", "experts", 2), ("owl", "model", 2),
    ("owl", "experts", 2), ("sparsegpt", "model", 3),
])  # fmt: skip
def test_the_same_bytes_by_torchrun(work: Path, job: str, model: str, size: int) -> None:
    one, many = f"{job}-{model}-one", f"{job}-{model}-many"
    alone(work, *line(job, model, one))
    code, stdout, stderr = together(work, size, *line(job, model, many))
    assert code == 0, stderr
    assert stdout.count("peak RAM") == 1, "one speaks"
    assert digests(work / many) == digests(work / one)


@pytest.mark.slow
def test_exl2_of_a_measurement(work: Path) -> None:
    options = ["--method", "exl2", "--bits", "5", "--calib", "text.txt", *CALIBRATION, "--quiet"]
    code, _, stderr = together(work, 2, "quantize", "model", "-o", "unmeasured", *options)
    assert code != 0
    assert "quantkit measure" in stderr
    measured = ["--method", "exl2", "--calib", "text.txt", *CALIBRATION, "--quiet"]
    alone(work, "measure", "model", "-o", "m.json", *measured)
    code, stdout, stderr = together(work, 2, "measure", "model", "-o", "many.json", *measured)
    assert code == 0, stderr
    assert stdout.count("expected KL") == 1
    assert (work / "many.json").read_bytes() == (work / "m.json").read_bytes()
    assert not (work / "many.json.work").exists()
    options += ["--measurement", "m.json"]
    alone(work, "quantize", "model", "-o", "exl2-one", *options)
    code, _, stderr = together(work, 2, "quantize", "model", "-o", "exl2-many", *options)
    assert code == 0, stderr
    assert digests(work / "exl2-many") == digests(work / "exl2-one")


def test_without_a_text(work: Path) -> None:
    alone(work, "quantize", "model", "-o", "nf4-one", "--bits", "4", "--quiet")
    code, _, stderr = together(work, 3, "quantize", "model", "-o", "nf4-many", "--bits", "4", "--quiet")
    assert code == 0, stderr
    assert digests(work / "nf4-many") == digests(work / "nf4-one")
    again = by_rank(work, *[["quantize", "model", "-o", "nf4-many", "--bits", "4", "--quiet"]] * 2)
    assert [process.returncode for process in again] == [0, 0]
    assert "finished already" in again[0].stdout


@pytest.mark.slow
def test_eval(work: Path) -> None:
    alone(work, "quantize", "model", "-o", "judged", "--bits", "4", "--quiet")
    words = ["eval", "judged", "--text", "text.txt", "--against", "model", "--windows", "5", "--length", "64"]
    words += ["--threads", "1", "--quiet"]
    shutil.copytree(work / "judged", work / "as it was")
    alone(work, *words)
    wanted = digests(work / "judged")
    assert "evaluation.json" in wanted
    shutil.rmtree(work / "judged")
    (work / "as it was").rename(work / "judged")
    code, stdout, stderr = together(work, 2, *words)
    assert code == 0, stderr
    assert stdout.count("KL divergence") == 1
    assert digests(work / "judged") == wanted
    code, _, stderr = together(work, 3, *words, "--windows", "2", "--no-record")
    assert code != 0
    assert stderr.count("too few for 3 processes") == 1


def ranks(launcher: subprocess.Popen[str]) -> list[int]:
    """Process ids of what a launcher has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = status.read_text().partition("PPid:")[2].split()[0]
        except (OSError, IndexError):  # it has ended meanwhile
            continue
        if int(parent) == launcher.pid:
            found.append(int(status.parent.name))
    return sorted(found)


def layers(out: Path) -> int:
    try:
        return (out / ".quantkit" / "journal").read_bytes().count(b'"layer"')
    except OSError:
        return 0


def test_one_goes_on_where_two_were(work: Path) -> None:
    """What these wrote, each a part of the hidden states, is what one must find; and the other way round."""
    build(work / "tall", num_hidden_layers=12)
    alone(work, *line("gptq", "tall", "tall-alone"))
    words, out = line("gptq", "tall", "tall-team"), work / "tall-team"
    for size in (2, 1):
        team = started_by_rank(work, *[words] * size) if size > 1 else [warm.start(words, cwd=work, torch=True)]
        wanted = layers(out) + 2
        while layers(out) < wanted:
            assert team[0].poll() is None
            time.sleep(0.005)
        for process in team:
            process.send_signal(signal.SIGKILL)
        said = [process.communicate(timeout=60)[1] for process in team]
        assert not any("solved again" in stderr for stderr in said), said
    team = by_rank(work, *[words] * 3)
    assert [process.returncode for process in team] == [0] * 3, team
    assert not any("solved again" in process.stderr for process in team)
    assert digests(out) == digests(work / "tall-alone")


@pytest.mark.slow
def test_ranks_that_die(work: Path) -> None:
    """Twenty times one is killed in some layer, the leader as well as others; the next try has another number of
    them."""
    build(work / "deep", num_hidden_layers=24, hidden_size=192, intermediate_size=768)
    more = ("--calib-samples", "64", "--calib-length", "128")
    alone(work, *line("gptq", "deep", "kills-one", *more))
    rng, reached = random.Random(5), []
    for size in (2, 3) * 10:
        process = torchrun(work, size, *line("gptq", "deep", "kills-many", *more))
        wanted = layers(work / "kills-many") + rng.randint(0, 1)
        started = ranks(process)
        while process.poll() is None and (layers(work / "kills-many") < wanted or len(started) < size):
            started = ranks(process)
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        os.kill(rng.choice(ranks(process)), signal.SIGKILL)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode != 0
        assert "solved again" not in stderr
        reached.append(layers(work / "kills-many"))
    assert reached == sorted(reached)
    assert reached[-1] > 0
    assert not (work / "kills-many" / "config.json").exists()
    code, _, stderr = together(work, 2, *line("gptq", "deep", "kills-many", *more))
    assert code == 0, stderr
    assert digests(work / "kills-many") == digests(work / "kills-one")


def test_what_is_wrong_for_all(work: Path) -> None:
    for words in (["model", "--bits", "5.5.5"], ["nowhere", "--bits", "4"]):
        team = by_rank(work, *[["quantize", *words, "-o", "wrong", "--quiet"]] * 2)
        assert all(process.returncode for process in team)
        assert "".join(process.stderr for process in team).count("error: ") == 1
    team = by_rank(work, *[["quantize", "model", "-o", "wrong", "--bits", "4", "--dry-run", "--quiet"]] * 2)
    assert [process.returncode for process in team] == [0, 0], team
    assert "".join(process.stdout for process in team).count("plan hash") == 1
    assert not (work / "wrong").exists()


def test_a_source_that_changes_on_another_machine(work: Path) -> None:
    """Where each has a copy: nobody else can see it."""
    for place in ("here", "there"):
        shutil.copytree(work / "model", work / "copies" / place / "model", copy_function=shutil.copy2)
    started = started_by_rank(work, *[line("gptq", f"copies/{place}/model", "changed") for place in ("here", "there")])
    journal = work / "changed" / ".quantkit" / "journal"
    while not journal.exists() and started[0].poll() is None:
        time.sleep(0.005)
    (file,) = (work / "copies" / "there" / "model").glob("*.safetensors")
    os.utime(file)
    (_, leader), (_, other) = [process.communicate(timeout=120) for process in started]
    assert [process.wait() for process in started] == [1, 1], leader + other
    assert f"{file.name} changed while it was being read" in other
    assert "another process of the team is gone" in leader
    assert not (work / "changed" / "config.json").exists()


def test_another_text_on_another_machine(work: Path) -> None:
    (work / "there").mkdir()
    (work / "there" / "text.txt").write_text(text_of(12_000)[100:])
    here = line("gptq", "model", "mixed-up")
    there = [word if word != "text.txt" else "there/text.txt" for word in here]
    leader, other = by_rank(work, here, there)
    assert leader.returncode == other.returncode == 1
    assert "process 1 of the team has another text than process 0" in leader.stderr
    assert not (work / "mixed-up").exists()


@pytest.mark.parametrize("variables", [{"RANK": "x"}, {"RANK": "2"}, {"WORLD_SIZE": "0"}, {"MASTER_PORT": "99999"}])
def test_variables_that_name_no_process(work: Path, variables: dict[str, str]) -> None:
    team = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999", **variables}
    words = ["quantize", "model", "-o", "none", "--bits", "4", "--quiet"]
    done = warm.run(words, cwd=work, env={**os.environ, **team}, torch=True)
    assert (done.returncode, "name no process" in done.stderr) == (2, True), done.stderr


def test_variables_that_are_missing(work: Path) -> None:
    words = ["quantize", "model", "-o", "single", "--bits", "4", "--quiet"]
    team = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    done = warm.run(words, cwd=work, env={**os.environ, **team}, torch=True)
    assert (done.returncode, "without MASTER_PORT" in done.stderr) == (0, True), done.stderr


def test_one_gpu_for_all(work: Path) -> None:
    line = ["quantize", "model", "-o", "one-gpu", "--quiet", "--device", "cuda:0"]
    leader, other = by_rank(work, line, line)
    assert leader.returncode == other.returncode == 2
    assert "2 processes would all take cuda:0" in leader.stderr
    assert "error" not in other.stderr


def test_no_model_on_another_machine(work: Path) -> None:
    leader, other = by_rank(work, line("gptq", "model", "half"), line("gptq", "nowhere", "half"))
    assert leader.returncode == 1
    assert other.returncode == 2
    assert "process 1 of the team cannot begin" in leader.stderr
    assert "nowhere" in other.stderr
    assert not (work / "half").exists()


@given(st.lists(st.integers(0, 10**9), max_size=40), st.integers(1, 9))
def test_owners_have_about_the_same_to_do(costs: list[int], size: int) -> None:
    owners = Team(0, size).owners(costs)
    loads = [sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(size)]
    assert max(loads) <= sum(costs) / size + max(costs, default=0)


def test_alone_nothing_is_sent() -> None:
    team, total = Team(), torch.zeros(4, 2)

    def one(rows: slice) -> None:
        total[rows] += 1

    team.compute(one, [slice(0, 3), slice(3, 4)], [total], total.device)
    assert torch.equal(total, torch.ones(4, 2))
    assert team.tell(3) == 3
    assert team.gather("x") == ["x"]
