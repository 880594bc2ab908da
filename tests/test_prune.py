"""Pruning, end to end on small models: masks, exact zeros, what is untouched, one solve with a quantizer, resume."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from eval_models import KINDS, quiet_transformers
from eval_models import build as build_model
from oracle import wanda_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.errors import QuantkitError
from quantkit.layouts import open_checkpoint
from quantkit.restored import RestoredWeights, open_files

TEXT = " ".join(f"{a} {b} of the {c}." for a in ("red", "old", "far") for b in "abcdefgh" for c in range(60))


def build(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    build_model(folder, kind, **changes)
    (folder / "calib.txt").write_text(TEXT)
    return folder


def recipe(source: Path, *, samples: int = 8, length: int = 64, quantize: Any = None, **prune: Any) -> dict[str, Any]:
    table: dict[str, Any] = {"prune": prune, "resources": {"threads": 1}}
    if quantize is not None:
        table["quantize"] = quantize
    if prune.get("method") != "magnitude" or (quantize or {}).get("method") == "gptq":
        table["calibration"] = {"text": str(source / "calib.txt"), "samples": samples, "length": length}
    return table


def run(source: Path, out: Path, table: dict[str, Any]) -> dict[str, Any]:
    """The manifest of what was written. Every file has the planned size, and verify finds no fault."""
    table = dict(table)
    plan = quantkit.plan(str(source), table)
    quantkit.prune(str(source), out, table)
    zeros, total = plan.to_prune
    sizes = {f.name: f.nbytes for f in plan.files}
    assert {p.name: p.stat().st_size for p in out.iterdir()} == sizes
    found = quantkit.verify(out, source=str(source))
    assert not found.problems
    assert found.pruned is not None
    assert found.pruned.tensors == len(plan.pruned)
    assert quantkit.verify(out).pruned == found.pruned
    loaded: dict[str, Any] = json.loads((out / "quantkit.json").read_text())
    assert sum(row["weights"] for row in loaded["sparsity"]) == total
    if zeros is not None:
        assert sum(row["pruned"] for row in loaded["sparsity"]) == zeros
    return loaded


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors as a loader sees them."""
    checkpoint = open_checkpoint(folder)
    with open_files(checkpoint) as files:
        restored = RestoredWeights(checkpoint, files)
        return {name: restored.read(name).clone() for name in restored.names}


def pruned_names(manifest: dict[str, Any]) -> list[str]:
    return [row["name"] for row in manifest["tensors"] if row.get("pruned")]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_transformers():
        yield


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


@pytest.mark.parametrize("quantize", [
    {"method": "gptq", "group_size": 32}, {"method": "gptq", "group_size": 32, "sym": False, "bits": 3},
    {"method": "gptq", "effort": "high", "act_order": "group", "group_size": 32},
    {"method": "gptq", "format": "compressed-tensors", "sym": False, "group_size": 32, "effort": "low"},
    {"method": "rtn", "group_size": 32}, {"method": "rtn", "group_size": 32, "sym": False},
    {"method": "bnb"}, {"method": "bnb", "quant_type": "fp4", "double_quant": False}, {"method": "bnb", "bits": 8},
])  # fmt: skip
@pytest.mark.parametrize("prune", [
    {"pattern": "2:4"}, {"method": "sparsegpt", "sparsity": 0.6}, {"method": "magnitude", "pattern": "4:8"},
])  # fmt: skip
def test_one_solve_keeps_every_zero(tmp_path: Path, quantize: dict[str, Any], prune: dict[str, Any]) -> None:
    source = build(tmp_path / "source")
    made = run(source, tmp_path / "out", recipe(source, quantize=quantize, **prune))
    after, rows = weights(tmp_path / "out"), {row["name"]: row for row in made["tensors"]}
    n, m = map(int, prune.get("pattern", "0:1").split(":"))
    for name in pruned_names(made):
        zero = after[name] == 0
        assert rows[name]["quantized"]
        assert int(zero.sum()) == rows[name]["zeros"] >= rows[name]["masked"]
        assert rows[name]["masked"] == pytest.approx(prune.get("sparsity", 0.5) * zero.numel(), abs=1)
        assert (zero.reshape(-1, m).sum(1) >= n).all()


def test_part_of_a_model_is_pruned_and_another_quantized(tmp_path: Path) -> None:
    """Linears that share an input may be pruned, quantized, both or neither."""
    source = build(tmp_path / "source")
    for method in ("wanda", "sparsegpt"):
        for name in ("gptq", "bnb"):
            quantize = {"method": name, "skip": ["k_proj", "up_proj", "layers.1.self_attn"]}
            table = recipe(source, method=method, pattern="2:4", skip=["v_proj", "layers.1.mlp"], quantize=quantize)
            made = run(source, tmp_path / f"{method}-{name}", table)
            after = weights(tmp_path / f"{method}-{name}")
            kinds = {row["name"]: (row.get("pruned", False), row["quantized"]) for row in made["tensors"]}
            assert kinds["model.layers.0.self_attn.q_proj.weight"] == (True, True)
            assert kinds["model.layers.0.self_attn.k_proj.weight"] == (True, False)
            assert kinds["model.layers.0.self_attn.v_proj.weight"] == (False, True)
            assert kinds["model.layers.1.mlp.up_proj.weight"] == (False, False)
            for kind, (pruned, _) in kinds.items():
                if pruned:
                    assert ((after[kind] == 0).reshape(-1, 4).sum(1) >= 2).all()


def test_one_solve_loses_less_than_two(tmp_path: Path) -> None:
    """The model is nearer to the parent than one that is pruned first, and then quantized on its own."""
    source = build(tmp_path / "source", hidden_size=128, intermediate_size=256, num_hidden_layers=1)
    gptq = {"method": "gptq", "group_size": 32, "bits": 3, "effort": "low"}
    joint = run(source, tmp_path / "joint", recipe(source, samples=16, quantize=gptq, pattern="2:4"))
    run(source, tmp_path / "pruned", recipe(source, samples=16, pattern="2:4"))
    stacked = {"quantize": gptq, "calibration": recipe(source, samples=16, pattern="2:4")["calibration"]}
    quantkit.quantize(str(tmp_path / "pruned"), tmp_path / "stacked", stacked)
    against = {"against": str(source), "windows": 8, "length": 64}
    ours, theirs = (
        quantkit.evaluate(tmp_path / name, str(source / "calib.txt"), **against).against
        for name in ("joint", "stacked")
    )
    assert ours is not None
    assert theirs is not None
    assert ours.kl < theirs.kl
    assert joint["sparsity"]


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


def test_quantizing_a_pruned_folder_is_warned_of(tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    pruned = tmp_path / "pruned"
    made = quantkit.prune(source, pruned, recipe(source, pattern="2:4"))
    assert made.zeros == sum(row["zeros"] for row in json.loads((pruned / "quantkit.json").read_text())["sparsity"])
    table = {"quantize": {"method": "rtn"}}
    assert not any("the source is pruned" in w for w in quantkit.plan(pruned, table).warnings)
    (source / "calib.txt").rename(pruned / "calib.txt")
    table = recipe(pruned, quantize={"method": "gptq"})
    del table["prune"]
    (warning,) = (w for w in quantkit.plan(pruned, table).warnings if "the source is pruned" in w)
    assert "Wanda, 2:4" in warning
    assert "zeros are lost" in warning


def test_matrices_that_are_no_known_linears_are_named(tmp_path: Path) -> None:
    """As experts are, of architectures that are derived from transformers' modules."""
    source = build(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.extra.weight"] = torch.ones(512, 512)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (warning,) = (w for w in quantkit.plan(source, recipe(source, sparsity=0.5)).warnings if "not known here" in w)
    assert "'model.layers.0.extra.weight'" in warning


def test_inspect_counts_what_is_there(tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    run(source, tmp_path / "out", recipe(source, pattern="2:4", targets=["mlp"]))
    run(source, tmp_path / "packed", recipe(source, pattern="2:4", quantize={"method": "bnb"}))
    found = quantkit.inspect(str(tmp_path / "out"), sparsity=True)
    assert found.recorded is not None
    assert "Wanda, 2:4" in found.recorded
    for row in found.sparsity:
        assert row.patterns == (("2:4", "4:8") if row.kind.startswith("mlp") else ())
        assert row.sparsity == (0.5 if row.kind.startswith("mlp") else 0)
    assert all("2:4" in row.patterns for row in quantkit.inspect(str(tmp_path / "packed"), sparsity=True).sparsity)


def test_verify_sees_what_was_changed(tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    run(source, tmp_path / "out", recipe(source, pattern="2:4"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weight = tensors[name]
    row, column = map(int, np.argwhere(weight.numpy() == 0)[0])
    other = int(np.argwhere(weight[row].numpy() != 0)[-1][0])
    assert column // 4 != other // 4
    weight[row, column], weight[row, other] = 1.0, 0.0  # as many zeros as before
    weight[5, int(np.argwhere(weight[5].numpy() != 0)[0][0])] += 0.5
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    problems = quantkit.verify(tmp_path / "out", source=str(source)).problems
    assert any("weights that were not pruned are not the source's" in p for p in problems)
    assert any("hold fewer than 2 zeros" in p for p in problems)
    weight[row, column] = 0
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    assert any("weights are zero, the manifest says" in p for p in quantkit.verify(tmp_path / "out").problems)


def test_the_recipe_of_a_folder_makes_it_again(tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    for i, (prune, quantize) in enumerate([
        ({"pattern": "2:4", "targets": ["mlp"]}, None), ({"sparsity": 0.5, "owl": True, "owl_range": 0.1}, None),
        ({"method": "sparsegpt", "pattern": "4:8"}, {"method": "gptq", "group_size": 32}),
    ]):  # fmt: skip
        made = run(source, tmp_path / str(i), recipe(source, quantize=quantize, **prune))
        (tmp_path / "recipe.yaml").write_text(made["recipe_yaml"])
        from quantkit import api
        from quantkit.recipe import load_recipe

        options = {"source": str(source), "calibration.text": str(source / "calib.txt")}
        again, _ = api.plan_recipe(load_recipe(tmp_path / "recipe.yaml", options=options))
        assert again.hash == made["plan_hash"]


def test_the_command_on_the_card_makes_the_folder_again(tmp_path: Path, quantkit_run: Any) -> None:
    source = build(tmp_path / "source")
    cases = [
        ({"sparsity": 0.25, "targets": ["attention"], "skip": ["layers.1"]}, None),
        ({"method": "sparsegpt", "pattern": "2:4"}, {"method": "gptq", "group_size": 32}),
    ]
    for i, (prune, quantize) in enumerate(cases):
        run(source, tmp_path / str(i), recipe(source, quantize=quantize, **prune))
        card = (tmp_path / str(i) / "README.md").read_text()
        command = next(line for line in card.split("\n") if line.startswith("quantkit ") and "OUT" in line)
        quantkit_run(command.replace("-o OUT", f"-o again{i}").replace("calib.txt", "source/calib.txt"), tmp_path)
        same = [(tmp_path / name / "model.safetensors").read_bytes() for name in (str(i), f"again{i}")]
        assert same[0] == same[1]


@pytest.fixture
def quantkit_run() -> Any:
    def run_line(line: str, folder: Path) -> None:
        words = shlex.split(line)
        done = warm.run([*words[1:], "--quiet"], cwd=folder, torch=True)
        assert done.returncode == 0, done.stderr

    return run_line


def test_the_card_says_what_was_measured(tmp_path: Path) -> None:
    source = build(tmp_path / "source", "mistral")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\nIt has Sliding-Window Attention.\n")
    made = run(source, tmp_path / "out", recipe(source, sparsity=0.02))
    card = (tmp_path / "out" / "README.md").read_text()
    zeros, total = (sum(row[key] for row in made["sparsity"]) for key in ("zeros", "weights"))
    for words in (
        f"{zeros:>15,d}", f"{100 * zeros / total:8.3f} %", "Asked for: 2 %, by Wanda, compared within every row",
        "linears of the decoder layers: all", "calib.txt", made["calibration"]["tokens_sha256"],
        "They make the files no smaller", "sets no sliding window", "arxiv.org/abs/2306.11695", "license: apache-2.0",
        'PATH_OR_REPO_ID = "', "8 rows of 64", "quantkit prune source -o OUT --sparsity 0.02 --calib calib.txt",
    ):  # fmt: skip
        assert words in card, words
    assert str(tmp_path) not in card
    assert quantkit.inspect(str(tmp_path / "out")).recorded


WIDE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 4,
    "num_hidden_layers": 1,
}  # fmt: skip


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(("prune", "quantize"), [
    ({"sparsity": 0.5}, {"method": "bnb"}), slow({"sparsity": 0.5}, None),
    slow({"method": "sparsegpt", "sparsity": 0.5}, None), slow({"method": "magnitude", "sparsity": 0.5}, None),
    slow({"method": "magnitude", "sparsity": 0.5}, {"method": "bnb"}),
])  # fmt: skip
def test_the_plan_keeps_its_memory(tmp_path: Path, prune: dict[str, Any], quantize: Any) -> None:
    """Peak RSS of a run in a process of its own is below what the plan says. Matrices are large beside the program."""
    source = build(tmp_path / "source", **WIDE)
    table = recipe(source, samples=4, length=32, quantize=quantize, **prune)
    del table["resources"]  # with all threads
    peak = quantkit.plan(str(source), table).memory.peak
    code = (
        "import sys, json, quantkit, pathlib; quantkit.prune(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]));"
        "print(pathlib.Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "out"), json.dumps(table)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    print(f"measured {int(done.stdout.split()[-1]) / 1024:.0f} MiB, planned {peak / 2**20:.0f} MiB")
    assert int(done.stdout.split()[-1]) * 1024 <= peak


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


@pytest.mark.parametrize("sizes", [{"to": "mistral"}, {"to": "mistral", "weights_format": "pth"}])
def test_pruned_into_another_layout_and_back(tmp_path: Path, sizes: dict[str, Any]) -> None:
    source = build(tmp_path / "source", "mistral")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").unlink()
    convert = {**sizes, "tokenizer": False}
    for prune in ({"method": "magnitude", "pattern": "2:4"},):
        run(source, tmp_path / "plain", recipe(source, **prune))
        run(source, tmp_path / "native", {**recipe(source, **prune), "convert": convert})
        quantkit.convert(str(tmp_path / "native"), tmp_path / "back", "hf", {"convert": {"tokenizer": False}})
        first, again = weights(tmp_path / "plain"), weights(tmp_path / "back")
        assert first.keys() == again.keys()
        assert all(torch.equal(first[name], again[name]) for name in first)
