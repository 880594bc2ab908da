"""What a plan takes on so many machines: arithmetic that can be checked by hand, and rates that a machine measured."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_models import build, quiet_transformers, text_of
from hypothesis import given
from hypothesis import strategies as st
from resuming import assert_three_lines

import quantkit
from quantkit import rates as measured
from quantkit.cli import cli
from quantkit.errors import OutputError, RunError, UsageError
from quantkit.forecast import forecast
from quantkit.rates import Cost, Rates, read_rates

ONE = Cost(1e-9, 0.0)
RATES = Rates(
    threads=2, device="cpu", start_copy=1.0, start=5.0, read=2e9, write=1e9, sha256=1e9,
    encode={"nf4": 1e9, "int8": 1e9, "rtn": 1e8, "magnitude": 2e8, "convert": 5e8}, linear=ONE, sums=ONE, aim=ONE,
    factor=ONE, solve={"gptq": ONE, "exl2": ONE, "sparsegpt": ONE, "mask": ONE}, around=0.0, attention=0.0, hidden=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with quiet_transformers():
        folder = build(tmp_path_factory.mktemp("model") / "source", num_hidden_layers=3)
    (folder / "calib.txt").write_text(text_of(3000))
    return folder


def planned(source: Path, method: str = "gptq", device: str = "cpu", **more: Any) -> Any:
    calibration = {"text": str(source / "calib.txt"), "samples": 8, "length": 32}
    recipe = {"quantize": {"method": method, "bits": 4, **more}, "calibration": calibration}
    return quantkit.plan(source, {**recipe, "resources": {"device": device}})


@given(st.floats(1e-15, 1e3), st.floats(1e-15, 1e3))
def test_a_cost_goes_through_what_was_measured(first: float, second: float) -> None:
    cost = Cost.through({500: first, 2000: second})
    assert cost.always >= 0
    assert cost.once >= 0
    assert cost.at(2000) == pytest.approx(second)
    if second <= first <= 3 * second:
        assert cost.at(500) == pytest.approx(first)


def test_without_a_text(source: Path) -> None:
    job = quantkit.plan(source, {"quantize": {"bits": 4}})
    alone, four = (forecast(job, n, 0, RATES) for n in (1, 4))
    assert alone.ram == four.ram == job.memory.peak
    assert (alone.read, four.read) == (job.source_bytes, job.source_bytes // 4)
    linears = sum(u.source.nbytes for u in job.encoded)
    work = linears / 1e9 + (job.source_bytes - linears) / 5e8
    assert alone.seconds == pytest.approx({"start": 1.0, "work": work})
    assert four.seconds["work"] == pytest.approx(work / 4)
    assert four.seconds["finish"] == pytest.approx(1.0 + max(s.nbytes for s in job.shards) / 1e9)
    slow = forecast(job, 1, 0, replace(RATES, read=1e3))
    assert slow.seconds["disk"] == pytest.approx(job.source_bytes / 1e3, rel=1e-3)


def test_along_a_text(source: Path) -> None:
    """By hand: a layer has q, o [64, 64], k, v [32, 64], gate, up [128, 64], down [64, 128]; rows 8 · 32 tokens."""
    job = planned(source, group_size=32)
    found = forecast(job, 1, 0, RATES)
    tokens, layers = 256, 3
    q, kv, gate = 64 * 64, 32 * 64, 128 * 64
    every = 2 * q + 2 * kv + 3 * gate
    assert found.seconds["passes"] == pytest.approx(layers * tokens * (2 * every + 2 * q) * 1e-9)
    factors = 2 * (3 * 64**3 + 128**3)
    assert found.seconds["factors"] == pytest.approx(layers * factors * 1e-9)
    solved = 64 * (2 * q + 2 * kv + 2 * gate) + 128 * gate
    probed = 2 * (tokens / 8) * every
    assert found.seconds["solving"] == pytest.approx(layers * (2 * solved + probed) * 1e-9)
    assert found.network == 0
    assert found.total == pytest.approx(sum(found.seconds.values()))


def test_many_share_what_they_share(source: Path) -> None:
    job = planned(source, group_size=32)
    alone, four, three = (forecast(job, n, 0, RATES, 1e6) for n in (1, 4, 3))
    assert four.seconds["passes"] == pytest.approx(alone.seconds["passes"] / 4)
    assert three.seconds["passes"] == pytest.approx(alone.seconds["passes"] * 3 / 8)  # eight rows
    assert four.seconds["solving"] == pytest.approx(alone.seconds["solving"] / 4)
    assert four.seconds["factors"] == alone.seconds["factors"]  # small ones each finds for itself
    assert four.seconds["network"] == pytest.approx(four.network / 1e6)
    assert four.network > 0
    assert alone.scratch == four.scratch == job.scratch


def test_experts_get_their_part_of_the_tokens(tmp_path: Path) -> None:
    with quiet_transformers():
        source = build(tmp_path / "source", "qwen3_moe", num_hidden_layers=1)
    (source / "calib.txt").write_text(text_of(3000))
    found = forecast(planned(source, group_size=32), 1, 0, RATES)
    attention = 2 * (128 * 64) + 2 * (64 * 64)
    experts = 4 * 3 * 64 * 64
    assert found.seconds["passes"] == pytest.approx(256 * (2 * attention + 2 * 128 * 64 + 2 * experts / 2) * 1e-9)


def test_what_does_not_go_together_is_refused(source: Path) -> None:
    job = planned(source, group_size=32)
    with pytest.raises(UsageError, match="for CPUs"):
        forecast(job, 1, 2, None)
    with pytest.raises(UsageError, match="the profile is of"):
        forecast(job, 1, 0, replace(RATES, device="NVIDIA H200"))
    cuda = planned(source, device="cuda", group_size=32)
    with pytest.raises(UsageError, match="for a GPU"):
        forecast(cuda, 1, 0, None)
    found = forecast(cuda, 2, 4, None)
    assert found.gpu > cuda.memory.layers.at_work > 0
    assert cuda.memory.layers.peak == cuda.memory.layers.base + cuda.memory.layers.weights  # numbers are on the GPU
    assert found.seconds == {}
    assert found.total is None
    assert found.nodes * found.ranks == 8


def test_a_profile_is_read_as_it_was_written(tmp_path: Path) -> None:
    RATES.save(tmp_path / "rates.json")
    assert read_rates(tmp_path / "rates.json") == RATES
    assert "SHA-256" in RATES.text()


@pytest.mark.parametrize("broken", [
    "", "{}", "[1]", '{"quantkit-rates": 1}', None, {"read": 0.0}, {"read": "fast"}, {"linear": {"always": 1}},
    {"solve": {"gptq": {"always": -1.0, "once": 0.0}}}, {"more": 1}, {"encode": []}, {"solve": {}},
    {"encode": {"nf4": 1e9}}, {"start": 10**400}, {"start": 1e308}, {"read": True}, {"read": 1e-320}, {"threads": 2.5},
    {"threads": True, "read": None},
])  # fmt: skip
def test_what_is_no_profile_is_refused(tmp_path: Path, source: Path, broken: Any) -> None:
    path = tmp_path / "rates.json"
    if isinstance(broken, dict):
        path.write_text(json.dumps({"quantkit-rates": 1, **asdict(RATES), **broken}))
    elif broken is not None:
        path.write_text(broken)
    from click.testing import CliRunner

    done = CliRunner().invoke(cli, ["plan", str(source), "--profile", str(path)])
    assert isinstance(done.exception, quantkit.errors.QuantkitError), done.exception
    assert_three_lines(f"error: {done.exception}\n")


def test_plan_says_it(source: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    RATES.save(tmp_path / "rates.json")
    words = ["plan", str(source), "--nodes", "3", "--profile", str(tmp_path / "rates.json")]
    said = CliRunner().invoke(cli, words).output
    assert "3 parts" in said
    assert "time" in said
    found = json.loads(CliRunner().invoke(cli, [*words, "--json"]).output)["forecast"]
    assert found["nodes"] == 3
    assert found["total_seconds"] == pytest.approx(sum(found["seconds"].values()))
    without = json.loads(CliRunner().invoke(cli, ["plan", str(source), "--nodes", "2", "--json"]).output)["forecast"]
    assert without["seconds"] == {}
    assert without["total_seconds"] is None


def test_rates_are_measured(tmp_path: Path) -> None:
    """Small matrices, but by the functions that a run calls; `make test-slow` measures all of it."""
    device = torch.device("cpu")
    with torch.inference_mode():
        found = measured._matrices(128, device)
        around, attention = measured._layer(device)
        hidden = measured._hidden(tmp_path, device)
    assert found.keys() == {"linear", "sums", "aim", "factor", "gptq", "exl2", "sparsegpt", "mask"}
    assert all(0 < value < np.inf for value in found.values())
    assert min(around, hidden) > 0
    assert attention >= 0
    assert not list(tmp_path.iterdir())


def test_a_machine_on_which_no_job_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured.sys, "executable", shutil.which("false"))
    with pytest.raises(RunError, match="a job to measure by failed: exit code 1"):
        measured._starts(tmp_path, "cpu")


def test_nothing_else_is_written_over(tmp_path: Path) -> None:
    from click.testing import CliRunner

    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere")
    for place in (tmp_path, tmp_path / "notes.txt", tmp_path / "link.json", ""):
        done = CliRunner().invoke(cli, ["doctor", "--calibrate", str(place)])
        assert isinstance(done.exception, UsageError), done.exception
        assert done.exception.where
        assert done.exception.hint
    done = CliRunner().invoke(cli, ["doctor", "--calibrate", str(tmp_path / "no" / "rates.json")])
    assert isinstance(done.exception, OutputError), done.exception
    assert (tmp_path / "notes.txt").read_text() == "mine"
    RATES.save(tmp_path / "rates.json")
    measured.check_target(tmp_path / "rates.json")
    measured.check_target(tmp_path / "new.json")


@pytest.mark.slow
def test_a_machine_is_measured_and_a_job_forecast(tmp_path: Path, source: Path) -> None:
    from click.testing import CliRunner

    profile = tmp_path / "machine.json"
    done = CliRunner().invoke(cli, ["doctor", "--calibrate", str(profile), "--quiet"])
    assert done.exit_code == 0, done.output
    found = forecast(planned(source, group_size=32), 1, 0, read_rates(profile))
    assert found.total is not None
    assert 0 < found.total < 60
    assert [path.name for path in tmp_path.iterdir()] == ["machine.json"]
