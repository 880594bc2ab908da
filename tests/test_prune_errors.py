"""What cannot be pruned is refused before anything is written, in three lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from eval_models import build

import quantkit
from quantkit.errors import InputError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build(tmp_path_factory.mktemp("prune") / "source", num_hidden_layers=1, intermediate_size=180)
    (folder / "calib.txt").write_text("some words of text " * 400)
    return folder


@pytest.mark.parametrize(("prune", "words"), [
    ({}, "how much is not said"),
    ({"sparsity": 1.0}, "less than 1"),
    ({"sparsity": -0.1}, "greater than or equal to 0"),
    ({"sparsity": 50.0}, "less than 1"),
    ({"sparsity": float("nan")}, "sparsity"),
    ({"sparsity": "half"}, "valid number"),
    ({"pattern": "4:4"}, "nothing is left"),
    ({"pattern": "5:4"}, "nothing is left"),
    ({"pattern": "0:4"}, "no pattern N:M"),
    ({"pattern": "2to4"}, "no pattern N:M"),
    ({"pattern": "1:2000"}, "beyond 1024"),
    ({"pattern": True}, "pattern"),
    ({"pattern": "2:4", "sparsity": 0.3}, "not 0.3|sparsity says 0.3"),
    ({"pattern": "4:8"}, "180 inputs, which groups of 8 do not divide"),
    ({"pattern": "5:12", "method": "sparsegpt", "skip": ("self_attn", "gate_proj", "up_proj")}, "128 columns"),
    ({"pattern": "2:4", "variant": True}, "variant does not go with a pattern"),
    ({"pattern": "2:4", "owl": True}, "owl does not go with a pattern"),
    ({"sparsity": 0.5, "method": "magnitude", "owl": True}, "magnitude does not look at"),
    ({"sparsity": 0.5, "per_row": True}, "per_row is for magnitude"),
    ({"sparsity": 0.5, "damp": 0.1}, "damp is for sparsegpt"),
    ({"sparsity": 0.5, "method": "sparsegpt", "variant": True}, "variant is for wanda"),
    ({"sparsity": 0.5, "owl_range": 0.1}, "are for owl"),
    ({"sparsity": 0.5, "method": "wonda"}, "'wanda', 'sparsegpt' or 'magnitude'"),
    ({"sparsity": 0.5, "targets": ("atention",)}, "matches no linear of the decoder layers"),
    ({"sparsity": 0.5, "skip": ("nothing",)}, "matches no linear of the decoder layers"),
    ({"sparsity": 0.0}, "nothing would be pruned"),
    ({"sparsity": 0.001}, "nothing would be pruned: 0.1 % of 180 inputs is less than one"),
    ({"sparsity": 0.5, "skip": ("layers",)}, "nothing is left to prune"),
    ({"sparsity": 0.5, "targets": ("lm_head",)}, "matches no linear of the decoder layers"),
    ({"sparcity": 0.5}, "unknown key 'prune.sparcity'"),
])  # fmt: skip
def test_refused(source: Path, tmp_path: Path, prune: dict[str, Any], words: str) -> None:
    table: dict[str, Any] = {"prune": prune}
    if prune.get("method") != "magnitude":
        table["calibration"] = {"text": str(source / "calib.txt"), "samples": 2, "length": 32}
    with pytest.raises(InputError, match=words) as error:
        quantkit.prune(str(source), tmp_path / "out", table)
    assert error.value.exit_code == 2
    assert error.value.hint
    assert not (tmp_path / "out").exists()


def test_yaml_reads_2_4_as_a_number(source: Path, tmp_path: Path) -> None:
    """Two hours and four minutes, to YAML 1.1: what was meant is taken."""
    from quantkit.recipe import load_recipe

    (tmp_path / "a.yaml").write_text(f"source: {source}\nprune:\n  method: magnitude\n  pattern: 2:4\n")
    found = load_recipe(tmp_path / "a.yaml").prune
    assert found is not None
    assert found.pattern == "2:4"


@pytest.mark.parametrize(("arguments", "words"), [
    (["--sparsity", "1.5"], "prune.sparsity: input should be less than 1"),
    (["--sparsity", "half"], "'half' is not a valid float"),
    (["--pattern", "4:2"], "nothing is left"),
    ([], "how much is not said"),
    (["--sparsity", "0.5", "--method", "magnitude", "--calib", "x.txt"], "looks at no text"),
    (["--sparsity", "0.5", "--bits", "4"], "No such option"),
    (["--sparsity", "0.5", "--set", "quantize.bits=4"], "the recipe quantizes, too"),
    (["--sparsity", "0.5", "--max-memory", "100MB"], "too little"),
    (["--sparsity", "0.5", "--method", "magnitude", "--device", "cuda", "--dry-run"], "does not compute on"),
])  # fmt: skip
def test_on_the_command_line(source: Path, tmp_path: Path, quantkit: Any, arguments: list[str], words: str) -> None:
    done = quantkit("prune", source, "-o", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_quantized(source: Path, tmp_path: Path) -> None:
    quantkit.quantize(str(source), tmp_path / "packed", {"quantize": {"method": "bnb"}})
    with pytest.raises(InputError, match="quantized already"):
        quantkit.prune(str(tmp_path / "packed"), tmp_path / "out", sparsity=0.5)
