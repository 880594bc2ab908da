"""Pruned and quantized in one solve: every zero is kept, and less is lost than in two runs, one after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mixed_models import build
from prune_runs import pruned_names, recipe, run, weights

import quantkit

pytestmark = pytest.mark.usefixtures("quiet")


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
