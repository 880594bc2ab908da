"""The layer stream against the whole model with hooks: what every linear sees, and what leaves the last layer."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_models import KINDS, SIZES, build, quiet_transformers
from mixed_models import linears_to_solve
from torch import nn
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.calibration.hidden import HiddenStates
from quantkit.calibration.rows import Linears, Passes
from quantkit.calibration.skeleton import Skeleton
from quantkit.calibration.statistics import Statistics
from quantkit.calibration.stream import HELD_OUT, Stream
from quantkit.calibration.weights import CheckpointWeights
from quantkit.checkpoint.reader import SourceFiles
from quantkit.derived_architecture import plain_config
from quantkit.errors import RunError, SourceError
from quantkit.layouts import open_checkpoint
from quantkit.modules import Names

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
        self.change, self.seen, self.weights, self.original = change, {}, {}, {}
        self.tokens: dict[str, int] = {}
        with quiet_transformers(), SourceFiles(checkpoint.folder, checkpoint.files) as files:
            skeleton = Skeleton(checkpoint.config, checkpoint.tensors, checkpoint.folder)
            linears = linears_to_solve(plan, skeleton)
            self.experts = {name for layer in linears for name, x in layer.items() if x.expert}
            weights = CheckpointWeights(checkpoint, files)
            with closing(Stream(skeleton, weights, self.ids, linears, scratch, full=full, compute=compute)) as stream:
                stream.begin()
                for index in range(len(linears)):
                    stream.layer(index, self.solve)
                self.hidden = torch.cat([stream.states["quantized"][len(linears) % 2].read(r) for r in range(ROWS)])

    def solve(self, group: tuple[str, ...], found: Statistics) -> Mapping[str, torch.Tensor]:
        partial = found.hessian.clone()
        cross = {name: part.clone() for name, part in found.cross.items()}
        found.complete()
        for name in group:
            self.seen[name] = (found.hessian.clone(), cross.get(name), partial)
            self.tokens[name] = found.tokens
            self.original[name] = found.weights[name]
            self.weights[name] = found.weights[name] * (1 + self.change)
        return {name: self.weights[name] for name in group}


def recipe() -> dict[str, Any]:
    calibration = {"samples": 1, "length": 16}
    return {"quantize": {"method": "gptq", "bits": 4, "group_size": 32}, "calibration": calibration}


Inputs = dict[str, torch.Tensor]


def whole_model(source: Path) -> nn.Module:
    """transformers' own; of a mixture of experts, with single linears for experts, all weights in place."""
    checkpoint = open_checkpoint(source)
    with quiet_transformers():
        if "experts" not in " ".join(checkpoint.tensors):
            return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        with SourceFiles(checkpoint.folder, checkpoint.files) as files:
            skeleton = Skeleton(checkpoint.config, checkpoint.tensors, checkpoint.folder)
            places = [*skeleton.outside, *(p for layer in skeleton.inside for p in layer)]
            skeleton.fill(places, CheckpointWeights(checkpoint, files))
            return skeleton.model


def hooked(source: Path, ids: torch.Tensor, changed: Mapping[str, torch.Tensor]) -> tuple[list[Inputs], torch.Tensor]:
    """For each row what every linear gets [tokens, in], of the whole model with some weights exchanged; and the hidden
    states that leave the last layer."""
    model = whole_model(source)
    names = Names(model)
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    rows: list[Inputs] = []
    last: list[torch.Tensor] = []

    def leaves(_module: nn.Module, _args: Any, output: Any) -> None:
        last.append(output[0] if isinstance(output, tuple) else output)

    layers[-1].register_forward_hook(leaves)
    for name, weight in changed.items():
        module = model.get_submodule(names.linear(name) if names.mergers or names.renamings else name)
        with torch.no_grad():
            module.weight.copy_(weight.T if module.weight.shape != weight.shape or transposed(module) else weight)

        def sees(_module: nn.Module, args: Any, name: str = name) -> None:
            rows[-1][name] = args[0].reshape(-1, args[0].shape[-1])

        module.register_forward_pre_hook(sees)
    with torch.no_grad():
        for row in ids.long():
            rows.append({})
            model.base_model(row[None], use_cache=False)
    return rows, torch.cat(last)


def products(rows: Sequence[Inputs], others: Sequence[Inputs], name: str) -> Any:
    """Σ a·bᵀ over the rows."""
    return sum(a[name].T @ b[name] for a, b in zip(rows, others, strict=True) if name in a)


def transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_is_shown_what_it_gets_in_the_quantized_model(tmp_path: Path, kind: str) -> None:
    """Weights are changed on the way: a linear must see what the changed ones before it make, not the old ones."""
    source = build(tmp_path / "source", kind)
    run = Run(source, tmp_path, 0.1, full=False)
    rows, hidden = hooked(source, run.ids, run.weights)
    assert run.seen.keys() == {name for row in rows for name in row}
    for name, (hessian, *_) in run.seen.items():
        expected = products(rows, rows, name)
        torch.testing.assert_close(hessian, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    torch.testing.assert_close(run.hidden, hidden, rtol=1e-4, atol=1e-4 * float(hidden.abs().max()))


@pytest.mark.parametrize("kind", ["llama", "falcon", "qwen2_moe"])
def test_the_outputs_wanted_are_the_full_models(tmp_path: Path, kind: str) -> None:
    """Σ y·xᵀ, y from the model as it was, x from the changed one, over the rows not held out."""
    source = build(tmp_path / "source", kind)
    run = Run(source, tmp_path, 0.1, full=True)
    quantized, full = hooked(source, run.ids, run.weights)[0], hooked(source, run.ids, run.original)[0]
    known = [row for row in range(ROWS) if row != HELD_OUT - 1]
    for name, (_, cross, partial) in run.seen.items():
        if name in run.experts:
            assert cross is None
            continue
        x, wanted = ([rows[row] for row in known] for rows in (quantized, full))
        expected = run.original[name] @ products(wanted, x, name)
        torch.testing.assert_close(cross, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        hessian = products(x, x, name)
        torch.testing.assert_close(partial, hessian, rtol=1e-4, atol=1e-4 * float(hessian.abs().max()))


@pytest.mark.parametrize(("kind", "size"), [("bloom", "n_layer"), ("falcon", "num_hidden_layers"), ("gptj", "n_layer")])
def test_layers_that_return_tuples_are_followed_however_many_there_are(tmp_path: Path, kind: str, size: str) -> None:
    source = build(tmp_path / "source", kind, **{size: 4})
    run = Run(source, tmp_path, 0.0, full=False)
    hidden = hooked(source, run.ids, run.weights)[1]
    torch.testing.assert_close(run.hidden, hidden, rtol=1e-4, atol=1e-4 * float(hidden.abs().max()))


def test_a_model_whose_layers_are_told_more_is_refused(tmp_path: Path) -> None:
    """Gemma 4 looks tokens up for each layer."""
    more = {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 260, "num_kv_shared_layers": 0}
    source = build(tmp_path / "source", "gemma4_text", **SIZES, head_dim=16, sliding_window=8, **more)
    with pytest.raises(SourceError, match="are told more of a text than hidden states"):
        Run(source, tmp_path, 0.0, full=False)


def test_infinities_in_a_config_are_numbers() -> None:
    inner = {"__float__": "Infinity"}
    assert plain_config({"limit": [0.0, inner], "b": {"a": {"__float__": "-Infinity"}}}) == {
        "limit": [0.0, float("inf")], "b": {"a": float("-inf")},
    }  # fmt: skip


def test_experts_are_run_once_a_row_however_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build(tmp_path / "source", "qwen3_moe", num_experts=8)
    calls: list[str] = []
    answer = Passes._answer

    def counted(self: Passes, name: str, x: torch.Tensor) -> torch.Tensor:
        calls.append(name)
        return answer(self, name, x)

    monkeypatch.setattr(Passes, "_answer", counted)
    run = Run(source, tmp_path, 0.1, full=False)
    gate = next(n for n in run.experts if ".experts.7." in n and n.endswith("gate_proj"))
    assert calls.count(gate) == ROWS  # for what its down_proj gets, which is kept


class Odd(nn.Module):
    """A feed-forward part with a linear at its end, and something about it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.up, self.down, self.way = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way == "linear called twice":
            return self.down(self.up(self.up(x)))
        y: torch.Tensor = self.down(self.up(x))
        if self.way == "changed in place":
            y += x
        if self.way == "another behind it":
            self.up(x + 1)
        return y


def ends_of(way: str) -> tuple[dict[str, nn.Module], Odd]:
    odd = Odd(way)
    layer, linears = nn.Sequential(odd), {"up": odd.up, "down": odd.down}
    weights = {name: module.weight for name, module in linears.items()}
    taken = Linears(layer, linears)
    with torch.inference_mode():
        taken.groups(lambda: layer(torch.randn(1, 3, 8)), weights)
    ends = dict(taken.ends)
    taken.release()
    assert "forward" not in {*vars(odd), *vars(odd.up)}
    return ends, odd


def test_only_what_its_last_linear_gives_ends_a_module() -> None:
    ends, odd = ends_of("plain")
    assert ends == {"down": odd}
    assert ends_of("changed in place")[0] == {}


@pytest.mark.parametrize("way", ["linear called twice", "another behind it"])
def test_a_linear_that_is_called_twice_is_an_error(way: str) -> None:
    with pytest.raises(RunError, match="up is called more than once"):
        ends_of(way)


def test_no_file_is_left_open_or_behind_when_a_solve_fails(tmp_path: Path) -> None:
    class Fails(Run):
        def solve(self, group: tuple[str, ...], found: Statistics) -> Mapping[str, torch.Tensor]:
            if "down" in group[0]:
                raise KeyboardInterrupt
            return super().solve(group, found)

    source, scratch = build(tmp_path / "source"), tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(KeyboardInterrupt):
        Fails(source, scratch, 0.0, full=True)
    assert {path.name[:-2] for path in scratch.iterdir()} == {"quantized", "full"}
    assert not [f for f in Path("/proc/self/fd").iterdir() if str(scratch) in os.path.realpath(f)]


def test_the_embedding_goes_when_a_later_layer_is_begun_with(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(build(tmp_path / "source"))
    with quiet_transformers(), SourceFiles(checkpoint.folder, checkpoint.files) as files:
        skeleton = Skeleton(checkpoint.config, checkpoint.tensors, checkpoint.folder)
        weights = CheckpointWeights(checkpoint, files)
        with closing(Stream(skeleton, weights, torch.ones(1, 4), [{}, {}], tmp_path, full=False)) as stream:
            stream.begin(1)
            assert len(stream.calls) == 2
    assert all(p.device.type == "meta" for p in skeleton.model.parameters())


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


def test_with_nothing_changed_both_streams_are_one(tmp_path: Path) -> None:
    """And so Σ y·xᵀ = W·Σ x·xᵀ over the rows not held out."""
    source = build(tmp_path / "source")
    run = Run(source, tmp_path, 0.0, full=True)
    for name, (hessian, cross, partial) in run.seen.items():
        assert run.tokens[name] == ROWS * LENGTH
        assert hessian.trace() > partial.trace()
        expected = run.weights[name] @ partial
        torch.testing.assert_close(cross, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"])
def test_an_expert_sees_the_tokens_sent_to_it(tmp_path: Path, kind: str) -> None:
    source = build(tmp_path / "source", kind)
    run = Run(source, tmp_path, 0.0, full=True)
    layer = [n for n in run.experts if n.endswith(("up_proj", "w3")) and "layers.1." in n]  # the first may be dense
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


def test_parts_of_a_row_are_read_and_written(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path / "states", 3, 4, 5)
    states.extend()
    assert torch.equal(states.read(2), torch.zeros(1, 4, 5))
    row, changed = torch.randn(4, 5), torch.randn(2, 5)
    states.write(1, row)
    states.write_part(1, 1, changed)
    assert torch.equal(states.read(1), torch.stack([row[0], changed[0], changed[1], row[3]]))
    assert torch.equal(states.read_part(1, 2, 2), torch.stack([changed[1], row[3]]))
    assert states.read_part(0, 1, 0).shape == (0, 5)
    states.remove()
