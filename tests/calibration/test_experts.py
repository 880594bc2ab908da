"""Experts that come one by one: whose weights are in memory, which rows they see, and what is told of them."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_models import build, quiet_transformers, text_of
from mixed_models import linears_to_solve
from safetensors.torch import load_file, save_file
from torch import nn

import quantkit
from quantkit.calibration.layers import Linear
from quantkit.calibration.norms import Norms, NormStream
from quantkit.calibration.rows import Linears
from quantkit.calibration.sensitivity import Sensitivity
from quantkit.calibration.skeleton import Skeleton
from quantkit.calibration.statistics import Statistics
from quantkit.calibration.stream import Stream
from quantkit.calibration.trials import Trials, kind_of
from quantkit.calibration.weights import CheckpointWeights
from quantkit.checkpoint.reader import SourceFiles
from quantkit.layouts import open_checkpoint
from quantkit.pruning import in_attention

ROWS, LENGTH, ODD = 12, 16, 5  # of the rows, the one with a token that is unlike all others
EXPERT = re.compile(r"(.*\.experts\.\d+)\.")


class Watched(CheckpointWeights):
    """Of experts, which tensors are alive, as they were read and as they were made."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.alive: list[tuple[str, weakref.ref[torch.Tensor]]] = []
        self.together: set[frozenset[str]] = set()
        self.reads: list[str] = []

    def read(self, name: str) -> torch.Tensor:
        tensor = super().read(name)
        self.reads.append(name)
        self.note(name, tensor)
        return tensor

    def note(self, name: str, tensor: torch.Tensor) -> None:
        if found := EXPERT.match(name):
            self.alive.append((found[1], weakref.ref(tensor)))
            self.alive = [(owner, ref) for owner, ref in self.alive if ref() is not None]
            self.together.add(frozenset(owner for owner, _ in self.alive))


class Run:
    """A model's layers, with a token in one row that no other has. tokens: by linear, how many it was shown."""

    def __init__(self, skeleton: Skeleton, weights: Watched, layers: list[dict[str, Linear]], scratch: Path) -> None:
        self.parts, self.layers, self.scratch, self.weights = (skeleton, weights), layers, scratch, weights
        self.ids = torch.randint(97, 110, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
        self.ids[ODD, 3] = ord("~")
        self.tokens: dict[str, int] = {}
        self.excluded: set[int] = set()

    def solved(self, *, full: bool = False) -> None:
        with closing(Stream(*self.parts, self.ids, self.layers, self.scratch, full=full)) as stream:
            stream.begin()
            for index in range(len(self.layers)):
                stream.layer(index, self._solve)
            self.excluded = stream.excluded

    def _solve(self, group: tuple[str, ...], found: Statistics) -> Mapping[str, torch.Tensor]:
        found.complete()
        self.tokens |= dict.fromkeys(group, found.tokens)
        return {name: self._new(name, found.weights[name]) for name in group}

    def _new(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        new = weight * 1.1
        self.weights.note(name, new)
        return new

    def normed(self) -> None:
        def look(name: str, norms: Norms) -> torch.Tensor:
            self.tokens[name] = norms.tokens
            return self._new(name, norms.weight)

        self._norms(lambda stream, index: stream.norms(index, look, in_attention))

    def surveyed(self) -> None:
        def look(every: Callable[[Callable[[str, Norms], None]], None]) -> None:
            for _ in range(2):
                every(lambda name, norms: self.tokens.update({name: norms.tokens}))

        self._norms(lambda stream, index: stream.survey(index, look))

    def gone_back(self) -> None:
        squares = Sensitivity(*self.parts, self.ids, self.layers, self.scratch, torch.float32).run()
        assert squares.keys() >= {name for layer in self.layers for name, x in layer.items() if not x.expert}

    def tried(self) -> None:
        kinds = {name: kind_of(name, index) for index, layer in enumerate(self.layers) for name in layer}
        with closing(Trials(*self.parts, self.ids, self.layers, kinds, self.scratch, torch.float32)) as trials:
            trials.begin(0)
            for index, layer in enumerate(self.layers):
                for name, linear in layer.items():
                    trials.keep(name, CheckpointWeights.read(self.weights, linear.place.name) * 1.1)
                trials.layer(index)

    def _norms(self, step: Callable[[NormStream, int], None]) -> None:
        with closing(NormStream(*self.parts, self.ids, self.layers, self.scratch, full=False)) as stream:
            stream.begin()
            for index in range(len(self.layers)):
                step(stream, index)
            self.excluded = stream.excluded

    def of(self, layer: int, leaf: str) -> list[int]:
        """Tokens by expert."""
        names = [n for n, x in self.layers[layer].items() if x.expert and n.endswith(f".{leaf}")]
        return [self.tokens[name] for name in names]


@contextmanager
def streamed(source: Path, skip: Sequence[str] = ()) -> Iterator[Run]:
    method = {"method": "gptq", "bits": 4, "group_size": 32, "skip": [*skip]}
    recipe = {"quantize": method, "calibration": {"samples": 1, "length": 16}}
    with quiet_transformers():
        plan, checkpoint = quantkit.plan(str(source), recipe), open_checkpoint(source)
        with SourceFiles(checkpoint.folder, checkpoint.files) as files:
            skeleton = Skeleton(checkpoint.config, checkpoint.tensors, checkpoint.folder)
            layers = linears_to_solve(plan, skeleton)
            scratch = source.parent / "scratch"
            scratch.mkdir()
            yield Run(skeleton, Watched(checkpoint, files), layers, scratch)


def whole(run: Run) -> None:
    run.solved(full=True)


READS = {"surveyed": 3, "gone_back": 3, "tried": 1}  # there, for what they give, and back


@pytest.mark.parametrize(("kind", "way"), [
    *(("mixtral", way) for way in (whole, Run.normed, Run.surveyed, Run.gone_back, Run.tried)),
    ("qwen2_moe", whole), ("deepseek_v3", whole), ("qwen2_moe", Run.gone_back), ("deepseek_v3", Run.surveyed),
])  # fmt: skip
def test_no_two_experts_are_in_memory_at_a_time(tmp_path: Path, kind: str, way: Callable[[Run], None]) -> None:
    source = build(tmp_path / "source", kind)
    with streamed(source) as run:
        gc.collect()
        gc.disable()
        try:
            way(run)
        finally:
            gc.enable()
        assert {len(owners) for owners in run.weights.together} == {1}
        experts = [name for layer in run.layers for name, linear in layer.items() if linear.expert]
        reads = [run.weights.reads.count(f"{name}.weight") for name in experts]
        assert set(reads) == {READS.get(way.__name__, 2)}  # however many rows there are
        assert not [p for p in run.scratch.iterdir() if p.name.partition("-")[0] not in ("quantized", "full", "trial")]
        assert all(p.device.type == "meta" for p in run.parts[0].layers.parameters())


def poisoned(source: Path, *, inputs: bool) -> None:
    """The odd token alone has something in the first channel, in all layers, and is sent to expert 1, where products of
    what gate and up give of it are too large; or, `inputs`, what experts get is."""
    tensors = load_file(source / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:, 0] = 0
    embedding[ord("~"), 0] = 3
    for name, weight in tensors.items():
        if name.endswith(("o_proj.weight", "w2.weight")):
            weight[0] = 0
    layer = "model.layers.0."
    tensors[f"{layer}block_sparse_moe.gate.weight"][:, 0] = torch.tensor([-20.0, 20.0, -20.0, 10.0])
    if inputs:
        tensors[f"{layer}post_attention_layernorm.weight"][0] = 3e38
    for leaf in () if inputs else ("w1", "w3"):
        tensors[f"{layer}block_sparse_moe.experts.1.{leaf}.weight"][:, 0] = 1e25
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def test_a_row_that_breaks_at_an_expert_is_left_out_behind_it(tmp_path: Path) -> None:
    """What its gate and up make of the row is found when others' have seen it."""
    source = build(tmp_path / "source", "mixtral")
    poisoned(source, inputs=False)
    with streamed(source) as run:
        run.solved()
        gates, downs = run.of(0, "w1"), run.of(0, "w2")
        assert run.excluded == {ODD}
        assert sum(gates) == 2 * ROWS * LENGTH
        assert downs[0] == gates[0]
        assert downs[1] < gates[1]
        assert gates[0] + sum(gates[1:]) - sum(downs) <= 2 * LENGTH
        assert sum(run.of(1, "w1")) == 2 * (ROWS - 1) * LENGTH


def test_a_row_that_breaks_at_an_expert_whose_last_linear_alone_is_solved(tmp_path: Path) -> None:
    source = build(tmp_path / "source", "mixtral")
    poisoned(source, inputs=False)
    with streamed(source, ("*w1", "*w3")) as run:
        run.solved()
        assert run.excluded == {ODD}
        assert sum(run.of(1, "w2")) == 2 * (ROWS - 1) * LENGTH


def test_a_row_that_experts_get_broken_is_left_out_of_all_that_comes_later(tmp_path: Path) -> None:
    source = build(tmp_path / "source", "mixtral")
    poisoned(source, inputs=True)
    with streamed(source) as run:
        run.solved()
        assert run.excluded == {ODD}
        assert sum(run.of(0, "w2")) == 2 * (ROWS - 1) * LENGTH
        assert sum(run.of(0, "w1")) >= sum(run.of(0, "w2"))


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("way", [Run.normed, Run.surveyed])
def test_norms_are_of_rows_that_no_linear_of_the_layer_breaks(
    tmp_path: Path, way: Callable[[Run], None], inputs: bool
) -> None:
    source = build(tmp_path / "source", "mixtral")
    poisoned(source, inputs=inputs)
    with streamed(source) as run:
        way(run)
        assert run.excluded == {ODD}
        for leaf in ("w1", "w2", "w3"):
            assert sum(run.of(0, leaf)) == 2 * (ROWS - 1) * LENGTH


class Mixed(nn.Module):
    """A feed-forward part that adds what experts give to what a linear gives."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.down, self.experts, self.in_place = nn.Linear(8, 8, bias=False), nn.Identity(), in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(x)
        some = self.experts(x, torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1))
        if self.in_place:
            y += some
        return y


@pytest.mark.parametrize("in_place", [False, True])
def test_what_experts_add_to_is_no_end(in_place: bool) -> None:
    mixed = Mixed(in_place)
    layer = nn.Sequential(mixed)
    taken = Linears(layer, {"down": mixed.down}, {"experts": mixed.experts})
    with torch.inference_mode():
        groups = taken.groups(lambda: layer(torch.randn(3, 8)), {"down": mixed.down.weight})
    assert groups == [("down",), ("experts",)]
    assert not taken.ends
    assert taken.routings["experts"].index.shape == (3, 1)
    taken.release()
    assert "forward" not in {*vars(mixed), *vars(mixed.down), *vars(mixed.experts)}


@pytest.mark.parametrize("method", ["gptq", "wanda"])
def test_experts_that_nothing_calls(tmp_path: Path, method: str) -> None:
    """Nothing is known of what they get: they fall back, and that is said."""
    source = build(tmp_path / "source", "mixtral", num_hidden_layers=1)
    (tmp_path / "text.txt").write_text(text_of(3000))
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    recipe: dict[str, Any] = {"calibration": {"text": str(tmp_path / "text.txt"), "samples": 4, "length": 32}}
    recipe |= {"prune": {"sparsity": 0.5}} if method == "wanda" else {"quantize": {"method": "gptq", "bits": 4}}
    with quiet_transformers(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixtralSparseMoeBlock, "forward", lambda self, x: x)
        make = quantkit.prune if method == "wanda" else quantkit.quantize
        make(str(source), tmp_path / "out", recipe)
    rows = json.loads((tmp_path / "out" / "quantkit.json").read_text())["tensors"]
    fallen = {row["name"] for row in rows if row.get("fallback")}
    assert fallen == {row["name"] for row in rows if ".experts." in row["name"]}
    assert len(fallen) == 12


MANY = {"hidden_size": 512, "moe_intermediate_size": 512, "num_hidden_layers": 1, "num_experts": 128}
MEASURE = """
import json, pathlib, sys, quantkit
recipe = json.loads(sys.argv[3])
(quantkit.prune if "prune" in recipe else quantkit.quantize)(sys.argv[1], sys.argv[2], recipe)
print(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("job", [
    {"quantize": {"method": "gptq", "bits": 4, "group_size": 128}}, {"prune": {"sparsity": 0.5}},
    {"prune": {"sparsity": 0.5, "owl": True}},
])  # fmt: skip
def test_the_plan_counts_one_expert_and_is_kept(tmp_path: Path, job: dict[str, Any]) -> None:
    """Peak RSS of a run in a process of its own is below the plan. With the whole layer in memory, 400 MB in float32,
    it would not be."""
    with quiet_transformers():
        source = build(tmp_path / "source", "qwen3_moe", **MANY)
    (tmp_path / "text.txt").write_text(text_of(6000))
    recipe = {**job, "calibration": {"text": str(tmp_path / "text.txt"), "samples": 8, "length": 64}}
    memory = quantkit.plan(str(source), recipe).memory
    assert memory.layers is not None
    layer = 4 * 128 * 3 * 512 * 512
    assert memory.layers.weights < layer / 20
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out"), json.dumps(recipe)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    peak = int(done.stdout.split()[-1]) * 1024
    print(f"measured {peak / 2**20:.0f} MiB, planned {memory.peak / 2**20:.0f} MiB")
    assert peak <= memory.peak < peak + layer
