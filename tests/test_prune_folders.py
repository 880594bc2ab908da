"""What a pruned folder says, and what others say of it: `inspect`, `verify`, its recipe and its card. It converts, and
the plan keeps its memory."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from mixed_models import build
from prune_runs import recipe, run, weights
from safetensors.torch import load_file, save_file

import quantkit

pytestmark = pytest.mark.usefixtures("quiet")


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


@pytest.fixture
def quantkit_run() -> Any:
    def run_line(line: str, folder: Path) -> None:
        words = shlex.split(line)
        done = warm.run([*words[1:], "--quiet"], cwd=folder, torch=True)
        assert done.returncode == 0, done.stderr

    return run_line


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


@pytest.mark.parametrize("convert", [{"to": "mistral"}, {"to": "mistral", "weights_format": "pth"}])
def test_pruned_into_another_layout_and_back(tmp_path: Path, convert: dict[str, Any]) -> None:
    source = build(tmp_path / "source", "mistral")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").unlink()
    prune = {"method": "magnitude", "pattern": "2:4"}
    run(source, tmp_path / "plain", recipe(source, **prune))
    run(source, tmp_path / "native", {**recipe(source, **prune), "convert": {**convert, "tokenizer": False}})
    quantkit.convert(str(tmp_path / "native"), tmp_path / "back", "hf", {"convert": {"tokenizer": False}})
    first, again = weights(tmp_path / "plain"), weights(tmp_path / "back")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


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
