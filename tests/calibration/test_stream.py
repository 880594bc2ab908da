"""The layer stream against the whole model with hooks: what every linear sees, and what leaves the last layer."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_models import KINDS, build, quiet_transformers
from torch import nn
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.calibration.hidden import HiddenStates
from quantkit.calibration.skeleton import Skeleton
from quantkit.calibration.statistics import Statistics
from quantkit.calibration.stream import Linear, Stream
from quantkit.calibration.weights import CheckpointWeights
from quantkit.checkpoint.reader import SourceFiles
from quantkit.layouts import open_checkpoint

ROWS, LENGTH = 10, 24


class Run:
    """A folder's stream over random rows. `seen`: by linear, what it was shown of its inputs."""

    def __init__(
        self, source: Path, scratch: Path, change: float, *, full: bool, compute: torch.dtype = torch.float32
    ) -> None:
        plan = quantkit.plan(str(source), recipe())
        checkpoint = open_checkpoint(source)
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, 250, (ROWS, LENGTH), generator=generator, dtype=torch.int32)
        self.change, self.seen, self.weights = change, {}, {}
        self.tokens: dict[str, int] = {}
        with quiet_transformers(), SourceFiles(checkpoint.folder, checkpoint.files) as files:
            skeleton = Skeleton(checkpoint.config, checkpoint.tensors, checkpoint.folder)
            places = {p.name: p for layer in skeleton.inside for p in layer}
            linears: list[dict[str, Linear]] = [{} for _ in skeleton.layers]
            for unit in plan.units:
                if unit.calibrated and unit.linear is not None:
                    found = Linear(places[unit.name], unit.linear.transposed, unit.linear.expert)
                    linears[unit.linear.layer][unit.linear.module] = found
            self.experts = {name for layer in linears for name, x in layer.items() if x.expert}
            weights = CheckpointWeights(checkpoint, files)
            stream = Stream(skeleton, weights, self.ids, linears, scratch, full=full, compute=compute)
            stream.begin()
            for index in range(len(linears)):
                stream.layer(index, self.solve)
            self.hidden = torch.cat([stream.states["quantized"][len(linears) % 2].read(r) for r in range(ROWS)])
            stream.close()

    def solve(self, group: tuple[str, ...], found: Statistics) -> Mapping[str, torch.Tensor]:
        partial = found.hessian.clone()
        cross = {name: part.clone() for name, part in found.cross.items()}
        found.complete()
        for name in group:
            self.seen[name] = (found.hessian.clone(), cross.get(name), partial)
            self.tokens[name] = found.tokens
            self.weights[name] = found.weights[name] * (1 + self.change)
        return {name: self.weights[name] for name in group}


def recipe() -> dict[str, Any]:
    calibration = {"samples": 1, "length": 16}
    return {"quantize": {"method": "gptq", "bits": 4, "group_size": 32}, "calibration": calibration}


def hooked(source: Path, ids: torch.Tensor, changed: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], torch.Tensor]:
    """Σ x·xᵀ by linear over all rows, of the whole model with some weights exchanged; and the hidden
    states that leave the last layer."""
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    hessians: dict[str, Any] = {}
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    with torch.no_grad():
        for name, weight in changed.items():
            module = model.get_submodule(name)
            module.weight.copy_(weight.T if module.weight.shape != weight.shape or transposed(module) else weight)
    last: list[torch.Tensor] = []

    def leaves(_module: nn.Module, _args: Any, output: Any) -> None:
        last[:] = [output[0] if isinstance(output, tuple) else output]

    layers[-1].register_forward_hook(leaves)
    for name in changed:

        def sees(_module: nn.Module, args: Any, name: str = name) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            hessians[name] = x.T @ x

        model.get_submodule(name).register_forward_pre_hook(sees)
    with torch.no_grad():
        model(ids.long())
    return hessians, last[0]


def transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


@pytest.mark.parametrize("kind", [k for k in KINDS if "moe" not in k and k != "mixtral"])
def test_every_linear_is_shown_what_it_gets_in_the_quantized_model(tmp_path: Path, kind: str) -> None:
    """Weights are changed on the way: a linear must see what the changed ones before it make, not the old ones."""
    source = build(tmp_path / "source", kind)
    run = Run(source, tmp_path, 0.1, full=False)
    hessians, hidden = hooked(source, run.ids, run.weights)
    assert run.seen.keys() == hessians.keys()
    for name, (hessian, *_) in run.seen.items():
        torch.testing.assert_close(hessian, hessians[name], rtol=1e-4, atol=1e-4 * float(hessians[name].abs().max()))
    torch.testing.assert_close(run.hidden, hidden, rtol=1e-4, atol=1e-4 * float(hidden.abs().max()))


def test_attention_that_is_done_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a row for the inputs of what comes behind it, and once a layer to see in which order linears are called."""
    source = build(tmp_path / "source")
    attention, calls = nn.functional.scaled_dot_product_attention, []

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return attention(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
    Run(source, tmp_path, 0.1, full=False)
    assert len(calls) == 2 * (ROWS + 1)


def test_linears_in_bfloat16_see_nearly_the_same(tmp_path: Path) -> None:
    source = build(tmp_path / "source", "qwen3")
    exact = Run(source, tmp_path, 0.1, full=True)
    fast = Run(source, tmp_path, 0.1, full=True, compute=torch.bfloat16)
    for name, (hessian, cross, _) in exact.seen.items():
        assert fast.seen[name][0].dtype == torch.float32
        for a, b in ((hessian, fast.seen[name][0]), (cross, fast.seen[name][1])):
            assert 0 < (a - b).norm() / a.norm() < 0.02
    assert 0 < (exact.hidden - fast.hidden).norm() / exact.hidden.norm() < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back_as_they_were_written(tmp_path: Path, dtype: torch.dtype) -> None:
    states = HiddenStates(tmp_path / "states", 3, 4, 5, dtype)
    rows = [torch.randn(1, 4, 5), torch.randn(2, 5), torch.empty(0, 5)]
    for i in (2, 0, 1):
        states.write(i, rows[i])
    for i in (1, 2, 0):
        assert torch.equal(states.read(i), rows[i].to(dtype))
    states.remove()
    assert not (tmp_path / "states").exists()


def test_wanted_outputs_are_those_of_the_full_model(tmp_path: Path) -> None:
    """With nothing changed both streams are one, and so Σ y·xᵀ = W·Σ x·xᵀ over the rows not held out."""
    source = build(tmp_path / "source")
    run = Run(source, tmp_path, 0.0, full=True)
    for name, (hessian, cross, partial) in run.seen.items():
        assert run.tokens[name] == ROWS * LENGTH
        assert hessian.trace() > partial.trace()
        expected = run.weights[name] @ partial
        torch.testing.assert_close(cross, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_an_expert_sees_the_tokens_sent_to_it(tmp_path: Path, kind: str) -> None:
    source = build(tmp_path / "source", kind)
    run = Run(source, tmp_path, 0.0, full=True)
    ups = sorted(n for n in run.experts if n.endswith(("up_proj", "w3")) and ".0." in n)
    assert ups
    layer = [n for n in ups if n.split("layers.")[1].startswith("0.")]
    assert sum(run.tokens[n] for n in layer) == 2 * ROWS * LENGTH  # two experts a token
    assert all(run.seen[n][1] is None for n in run.experts)


def test_no_hessian_and_no_weight_waits_for_the_garbage_collector(tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    alive: list[weakref.ref[torch.Tensor]] = []

    class Watched(Run):
        def solve(self, group: tuple[str, ...], found: Statistics) -> Mapping[str, torch.Tensor]:
            solved = {name: weight.clone() for name, weight in found.weights.items()}
            alive.extend(weakref.ref(t) for t in (found.hessian, *found.weights.values(), *solved.values()))
            return solved

    gc.collect()
    gc.disable()
    try:
        Watched(source, tmp_path, 0.0, full=True)
        assert len(alive) == 2 * (4 + 2 * 7)  # two layers of four groups and seven linears
        assert not [a for a in alive if a() is not None]
    finally:
        gc.enable()
