"""Pruning, end to end on small models: masks, exact zeros, what is untouched, sources of all kinds, the same bytes
whatever the threads and after an interruption."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from eval_models import KINDS
from mixed_models import TEXT, build
from oracle import wanda_model
from prune_runs import pruned_names, recipe, run, weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.errors import QuantkitError

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linears compute in float32, so that a slow reference sees the same inputs but for rounding."""
    monkeypatch.setattr("quantkit.torch_setup.fast_dtype", lambda _: torch.float32)


@pytest.mark.usefixtures("_exact")
@pytest.mark.parametrize("sparsity", [0.02, 0.5])
def test_wanda_of_a_whole_model(tmp_path: Path, sparsity: float) -> None:
    source = build(tmp_path / "source", num_hidden_layers=3)
    run(source, tmp_path / "out", recipe(source, sparsity=sparsity))
    model = AutoModelForCausalLM.from_pretrained(source)
    tokens = torch.tensor([ord(c) for c in TEXT[: 8 * 64]]).reshape(8, 64)
    wanda_model.wanda(model, model.model.layers, tokens, sparsity)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, expected in model.state_dict().items():
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prune", [
    {"sparsity": 0.5}, {"method": "sparsegpt", "pattern": "2:4"}, {"method": "magnitude", "pattern": "4:8"},
])  # fmt: skip
def test_every_kind_of_layer(tmp_path: Path, kind: str, prune: dict[str, Any]) -> None:
    source = build(tmp_path / "source", kind)
    made = run(source, tmp_path / "out", recipe(source, **prune))
    before, after = weights(source), weights(tmp_path / "out")
    pruned = pruned_names(made)
    transposed = {row["name"] for row in made["tensors"] if row.get("transposed")}
    assert pruned
    assert all(torch.equal(before[name], after[name]) for name in before if name not in pruned)
    for name in pruned:
        weight = after[name].T if name in transposed else after[name]
        zero = weight == 0
        if "pattern" in prune:
            n, m = map(int, prune["pattern"].split(":"))
            assert (zero.reshape(len(zero), -1, m).sum(2) == n).all()
        else:
            assert (zero.sum(1) == weight.shape[1] // 2).all()
        if prune.get("method") != "sparsegpt":
            assert torch.equal(after[name], before[name].masked_fill(after[name] == 0, 0))


@pytest.mark.parametrize("prune", [
    {"sparsity": 0.02}, {"sparsity": 0.9}, {"sparsity": 0.5, "variant": True},
    {"sparsity": 0.5, "owl": True}, {"sparsity": 0.5, "owl": True, "owl_outlier": 3.0, "owl_range": 0.2},
    {"pattern": "1:4"}, {"pattern": "3:16"}, {"method": "magnitude", "sparsity": 0.5},
    {"method": "magnitude", "sparsity": 0.5, "per_row": True}, {"method": "sparsegpt", "sparsity": 0.02},
    {"method": "sparsegpt", "sparsity": 0.7}, {"method": "sparsegpt", "sparsity": 0.7, "damp": 0.1},
    {"method": "sparsegpt", "sparsity": 0.5, "owl": True},
])  # fmt: skip
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_every_option(tmp_path: Path, prune: dict[str, Any], dtype: str) -> None:
    source = build(tmp_path / "source")
    if dtype == "BF16":
        halved = {n: w.bfloat16() for n, w in load_file(source / "model.safetensors").items()}
        save_file(halved, source / "model.safetensors", metadata={"format": "pt"})
    made = run(source, tmp_path / "out", recipe(source, **prune))
    n, m = map(int, prune.get("pattern", "0:1").split(":"))
    asked = prune.get("sparsity", n / m)
    for row in made["sparsity"]:
        assert row["pruned"] == row["zeros"]
        assert row["zeros"] / row["weights"] == pytest.approx(asked, abs=0.21 if prune.get("owl") else 0.03)


OPTIONS = ({"variant": True}, {"owl": True}, {"owl": True, "owl_range": 0.3}, {"method": "sparsegpt"}, {},
           {"method": "sparsegpt", "damp": 0.5}, {"method": "magnitude"}, {"method": "magnitude", "per_row": True},
           {"targets": ("attention",)}, {"skip": ("layers.0",)})  # fmt: skip


def test_every_option_changes_the_weights(tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    found = set()
    for i, options in enumerate(OPTIONS):
        run(source, tmp_path / str(i), recipe(source, sparsity=0.5, **options))
        found.add((tmp_path / str(i) / "model.safetensors").read_bytes())
    assert len(found) == len(OPTIONS)


def test_owl_leaves_more_where_outliers_are(tmp_path: Path) -> None:
    source = build(tmp_path / "source", num_hidden_layers=4)
    tensors = load_file(source / "model.safetensors")
    for name, weight in tensors.items():
        if ".layers.2." in name and "proj" in name:
            weight[:, 3] *= 30
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    made = run(source, tmp_path / "out", recipe(source, sparsity=0.5, owl=True))
    zeros = [0, 0, 0, 0]
    for row in made["tensors"]:
        if row.get("pruned"):
            zeros[int(row["name"].split(".")[2])] += row["zeros"]
    assert min(zeros) == zeros[2]
    assert max(zeros) / min(zeros) > 1.2
    assert sum(zeros) == pytest.approx(0.5 * sum(r["weights"] for r in made["sparsity"]), rel=0.02)


def test_targets(tmp_path: Path) -> None:
    source = build(tmp_path / "source")

    def names(**prune: Any) -> set[str]:
        return {u.name for u in quantkit.plan(str(source), recipe(source, sparsity=0.5, **prune)).pruned}

    everything = names()
    assert len(everything) == 14
    attention, mlp = names(targets=["attention"]), names(targets="mlp")
    assert attention | mlp == everything
    assert len(attention) == 8
    assert names(targets=["layers.0.mlp"], skip="down_proj") == {
        f"model.layers.0.mlp.{kind}.weight" for kind in ("gate_proj", "up_proj")
    }


def test_experts_that_no_text_chose(tmp_path: Path) -> None:
    """Nothing is known of their inputs: magnitude within rows decides, and that is said."""
    source = build(tmp_path / "source", "mixtral", num_local_experts=8, num_experts_per_tok=1)
    for prune in ({"sparsity": 0.5}, {"method": "sparsegpt", "sparsity": 0.5}):
        out = tmp_path / str(len(prune))
        made = run(source, out, recipe(source, samples=4, **prune))
        fallen = [row["name"] for row in made["tensors"] if row.get("fallback")]
        assert fallen
        assert all("experts" in name for name in fallen)
        assert made["calibration"]["fallbacks"] == len(fallen)
        before, after = weights(source), weights(out)
        for name in fallen:
            size = before[name].abs()
            gone = after[name] == 0
            assert (size.masked_fill(~gone, 0).amax(1) <= size.masked_fill(gone, torch.inf).amin(1)).all()
        assert "fell back to plain magnitude" in (out / "README.md").read_text()


def test_a_source_that_is_sparse_already(tmp_path: Path) -> None:
    """Its zeros are counted apart, and are the first to go."""
    source = build(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    weight[:, ::4] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    made = run(source, tmp_path / "out", recipe(source, sparsity=0.125))
    row = next(row for row in made["sparsity"] if row["kind"] == "mlp.up_proj")
    assert row["source_zeros"] == weight.numel() // 4
    assert row["zeros"] == row["source_zeros"] + weight.numel() // 8  # the other layer's
    assert f"{row['source_zeros']:>15,d} of these weights are zero" in (tmp_path / "out" / "README.md").read_text()
    assert "25.000%" not in quantkit.inspect(str(source)).text()
    counted = {k.kind: k for k in quantkit.inspect(str(source), sparsity=True).sparsity}
    assert counted["mlp.up_proj"].zeros == weight.numel() // 4


def test_an_already_sparse_source_is_reported(tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    run(source, tmp_path / "once", recipe(source, method="magnitude", sparsity=0.25))
    command = ["prune", "once", "-o", "twice", "--method", "magnitude", "--sparsity", "0.5", "--quiet"]
    done = warm.run(command, cwd=tmp_path, torch=True)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"zeros .* in the pruned layers; the source was sparse already, [\d,]+ of them were zero", done.stdout
    )


def test_matrices_that_are_no_known_linears_are_named(tmp_path: Path) -> None:
    """As experts are, of architectures that are derived from transformers' modules."""
    source = build(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.extra.weight"] = torch.ones(512, 512)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (warning,) = (w for w in quantkit.plan(source, recipe(source, sparsity=0.5)).warnings if "not known here" in w)
    assert "'model.layers.0.extra.weight'" in warning


def test_a_value_that_is_not_finite(tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for prune in ({"sparsity": 0.5}, {"method": "magnitude", "sparsity": 0.5}):
        with pytest.raises(QuantkitError, match=r"down_proj.weight' holds a NaN or an infinity at \[3, 4\]"):
            quantkit.prune(str(source), tmp_path / "out", recipe(source, **prune))
        assert not (tmp_path / "out").exists()
        out = tmp_path / str(len(prune))
        run(source, out, {**recipe(source, **prune), "allow_nonfinite": True})
        assert weights(out)["model.layers.1.mlp.down_proj.weight"][3, 4] == 0


def test_the_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    source = build(tmp_path / "source", hidden_size=192, intermediate_size=768)
    for prune in ({"sparsity": 0.5}, {"method": "sparsegpt", "sparsity": 0.5}, {"sparsity": 0.5, "owl": True}):
        made = set()
        for threads in (1, 2, 3):
            out = tmp_path / f"{len(prune)}{prune.get('method')}{threads}"
            quantkit.prune(str(source), out, {**recipe(source, **prune), "resources": {"threads": threads}})
            made.add((out / "model.safetensors").read_bytes())
        assert len(made) == 1


@pytest.mark.parametrize("prune", [
    {"sparsity": 0.5}, {"sparsity": 0.5, "owl": True}, {"method": "sparsegpt", "sparsity": 0.5},
])  # fmt: skip
def test_interrupted_in_a_later_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prune: dict[str, Any]) -> None:
    from quantkit.layer_runner import LayerRun

    source = build(tmp_path / "source", num_hidden_layers=4)
    run(source, tmp_path / "whole", recipe(source, **prune))
    written: list[str] = []
    write, stop_after = LayerRun._write, 18

    def note(self: LayerRun, unit: Any, made: Any) -> None:
        if len(written) == stop_after:
            raise KeyboardInterrupt
        written.append(unit.name)
        write(self, unit, made)

    monkeypatch.setattr(LayerRun, "_write", note)
    with pytest.raises(QuantkitError, match="interrupted"):
        quantkit.prune(str(source), tmp_path / "out", recipe(source, **prune))
    written, stop_after = [], -1
    outcome = quantkit.prune(str(source), tmp_path / "out", recipe(source, **prune))
    assert {int(name.split(".")[2]) for name in written} == {2, 3}
    assert outcome.reused > 14
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert same[0] == same[1]
