"""The head of an EXL2 folder: quantized beside the budget, on the inputs it gets, or left dense; and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_models import quiet_transformers
from mixed_models import build, manifest
from mixed_models import exl2_recipe as recipe
from safetensors.torch import save_file

import quantkit
from quantkit.errors import Interrupted, QuantkitError
from quantkit.layouts import open_checkpoint
from quantkit.restored import RestoredWeights, open_files

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def made(exl2_folder: tuple[Path, Path]) -> tuple[Path, Path]:
    return exl2_folder


@pytest.fixture(scope="module")
def with_head(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model whose head has a matrix of its own that EXL2 can hold, and a folder made of it."""
    work = tmp_path_factory.mktemp("head")
    with quiet_transformers():
        source = build(work / "source", vocab_size=320)
        quantkit.quantize(source, work / "out", recipe(source))
    return source, work / "out"


def read(folder: Path, name: str) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    with open_files(checkpoint) as files:
        return RestoredWeights(checkpoint, files).read(name).float()


def test_head_is_quantized_beside_the_budget(with_head: tuple[Path, Path]) -> None:
    source, out = with_head
    found = manifest(out)
    assert found["recipe"]["quantize"]["mixes"]["lm_head"] == "0.15:8_128/0.85:6_128"
    assert json.loads((out / "config.json").read_text())["quantization_config"]["head_bits"] == 6
    assert found["allocation"]["head"] > 6
    assert found["result"]["bits_per_weight"] <= 4.5
    assert not any("lm_head" in row["kind"] for row in found["allocation"]["rows"])
    assert quantkit.verify(out, source=source).problems == ()
    weight, ours = read(source, "lm_head.weight"), read(out, "lm_head.weight")
    assert 0 < float((weight - ours).norm() / weight.norm()) < 0.05


def test_head_is_solved_on_what_it_gets(with_head: tuple[Path, Path], tmp_path: Path) -> None:
    """Its most active inputs have the most bits: of those that the quantized model gives it, behind the norm."""
    from transformers import AutoModelForCausalLM

    source, out = with_head
    mixes = manifest(out)["recipe"]["quantize"]["mixes"] | {"lm_head": "0.25:3_32/0.75:2_32"}
    quantkit.quantize(source, tmp_path / "out", recipe(source, mixes=mixes))
    dense = shutil.copytree(source, tmp_path / "dense", ignore=shutil.ignore_patterns("*.safetensors"))
    checkpoint = open_checkpoint(tmp_path / "out")
    with open_files(checkpoint) as files:
        weights = RestoredWeights(checkpoint, files)
        save_file({n: weights.read(n).float().contiguous() for n in weights.names}, dense / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    ids = torch.tensor(list((source / "calib.txt").read_bytes()[: 8 * 64])).reshape(8, 64)
    with torch.no_grad():
        inputs = model.model(ids).last_hidden_state.reshape(-1, 64)
    weight, ours = read(source, "lm_head.weight"), read(tmp_path / "out", "lm_head.weight")
    order = (inputs.double() ** 2).sum(0).argsort(descending=True)
    errors = (weight - ours).square().sum(0)[order]
    assert errors[:16].mean() < 0.5 * errors[16:].mean()


def test_head_is_left_dense_where_that_is_asked_for_or_cannot_be_otherwise(with_head: tuple[Path, Path]) -> None:
    source, _ = with_head
    for more in ({"head_bits": 16}, {"skip": ["lm_head"]}):
        plan = quantkit.plan(str(source), recipe(source, **more))
        assert not any(t.name == "lm_head.q_weight" for u in plan.units for t in u.outputs)
        assert plan.config["quantization_config"]["head_bits"] == 16


def test_head_with_other_outputs_is_warned_of(made: tuple[Path, Path]) -> None:
    source, _ = made
    assert any(
        "lm_head" in w and "32 does not divide" in w for w in quantkit.plan(str(source), recipe(source)).warnings
    )


def test_bits_for_a_head_that_is_the_embedding_are_said_to_change_nothing(tmp_path: Path) -> None:
    source = build(tmp_path / "tied", tie_word_embeddings=True)
    for asked, said in (({"head_bits": 6}, True), ({"head_bits": 16}, False), ({}, False)):
        warnings = quantkit.plan(str(source), recipe(source, **asked)).warnings
        assert any("head_bits 6 changes nothing" in w for w in warnings) == said


def test_bits_that_a_head_cannot_have_are_refused(made: tuple[Path, Path]) -> None:
    source, _ = made
    with pytest.raises(QuantkitError, match="head_bits"):
        quantkit.plan(str(source), recipe(source, head_bits=7))


def test_interrupted_at_the_head(with_head: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is solved already is kept, and the bytes are those of a run that was never interrupted."""
    from quantkit.calibration.stream import Stream

    source, out = with_head
    table = recipe(source, measurement=f"{out}.measurement.json")
    layers: list[int] = []
    with monkeypatch.context() as patch:

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(Stream, "head", stop)
        with pytest.raises(Interrupted):
            quantkit.quantize(source, tmp_path / "out", table)
    real = Stream.layer
    monkeypatch.setattr(Stream, "layer", lambda self, index, solve: (layers.append(index), real(self, index, solve)))
    quantkit.quantize(source, tmp_path / "out", table)
    assert layers == []
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
