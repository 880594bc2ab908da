"""Models that fit no machine, planned from their configurations alone; docs/scale.md says what is found here."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import large_models
import pytest
from eval_models import build, quiet_transformers, text_of

from quantkit import api, job_memory
from quantkit.forecast import forecast
from quantkit.plans import Plan
from quantkit.recipe import load_recipe

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
GPU_PAGE = PAGE.with_name("gpu.md")
JOBS: dict[str, dict[str, Any]] = {
    "NF4": {"quantize.bits": 4},
    "Wanda": {"prune.method": "wanda", "prune.sparsity": 0.5},
    "GPTQ": {"quantize.method": "gptq", "quantize.bits": 4},
    "EXL2": {"quantize.method": "exl2", "quantize.bits": 4.0},
}
ROWS, LENGTH, NODES = 128, 2048, 16


# What takes longer than seconds: the exact allocation of bits to a thousand linears, and 70,000 experts.
SLOW = {
    ("Mixtral 8x22B", "EXL2"),
    ("Llama 3.1 405B", "EXL2"),
    ("Kimi K2", "NF4"),
    ("Kimi K2", "Wanda"),
    ("Kimi K2", "GPTQ"),
}
CASES = [
    pytest.param(name, job, marks=[pytest.mark.slow] * ((name, job) in SLOW))
    for name in large_models.LARGE
    for job in JOBS
    if name != "Mistral-7B" and (name, job) != ("Kimi K2", "EXL2")  # which is no large one; minutes
]
ON_GPU = [("Mistral-7B", "Wanda"), ("Mistral-7B", "GPTQ"), ("Mixtral 8x22B", "GPTQ"), ("Llama 3.1 405B", "Wanda"),
          ("Llama 3.1 405B", "GPTQ")]  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    work = tmp_path_factory.mktemp("models")
    with quiet_transformers():
        tokens = build(work / "tokens")
    (work / "text.txt").write_text(text_of(120_000) * 20)

    @cache
    def source(name: str) -> Path:
        config, parameters = large_models.LARGE[name]
        folder: Path = work / name.replace(" ", "-")
        assert large_models.write(folder, config) == parameters
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((tokens / file).read_bytes())
        return folder

    return source


def planned(source: Path, job: str, device: str) -> Plan:
    options = {"source": str(source), "resources.threads": 2, "resources.device": device, **JOBS[job]}
    if job != "NF4":
        text = source.parent / "text.txt"
        options |= {"calibration.text": str(text), "calibration.samples": ROWS, "calibration.length": LENGTH}
    return api.plan_recipe(load_recipe(None, options=options))[0]


@pytest.mark.parametrize(("name", "job"), ON_GPU)
def test_memory_of_a_gpu(name: str, job: str, sources: Any) -> None:
    plan = planned(sources(name), job, "cuda")
    gpu, ram, states = (n / 1e9 for n in (plan.memory.gpu, plan.memory.peak, plan.scratch))
    assert f"| {name} | {job} | {gpu:.1f} | {ram:.1f} | {states:.1f} |" in GPU_PAGE.read_text()


@pytest.mark.parametrize(("name", "job"), CASES)
def test_plans_of_large_models(name: str, job: str, sources: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_memory, "multiplies_in_bf16", lambda: True)
    plan = planned(sources(name), job, "cpu")
    _, parameters = large_models.LARGE[name]
    assert plan.parameters == parameters
    found = forecast(plan, NODES, 0, None)
    assert found.ram == plan.memory.peak
    assert found.ram < 64e9
    written, ram, scratch, sent = (n / 1e9 for n in (plan.weight_bytes, found.ram, found.scratch, found.network))
    row = f"| {name} | {job} | {written:,.0f} | {ram:.1f} | {scratch:,.0f} | {sent:,.0f} |"
    assert row in PAGE.read_text()
