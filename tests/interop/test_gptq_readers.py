"""Real loaders, each in an environment of its own (`make interop` builds them), read the folders that we write: the
weights that their layers apply are ours, and so are the logits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_gptq import build, recipe  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM

import quantkit
from quantkit.layouts import open_checkpoint
from quantkit.restored import RestoredWeights, open_files

pytestmark = pytest.mark.interop

ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
EVERY = [
    {"bits": bits, "group_size": group, **more}
    for bits in (2, 3, 4, 8)
    for group in (-1, 32, 64, 128)
    for more in ({}, {"sym": False}, {"act_order": "group"})
    if not (group == -1 and "act_order" in more)
]
V2 = [{"bits": bits, "group_size": 64, "sym": False, "checkpoint_format": "gptq_v2"} for bits in (2, 3, 4, 8)]
COMPRESSED = [
    {"bits": bits, "group_size": group, "sym": sym, "format": "compressed-tensors"}
    for bits in (2, 3, 4, 8)
    for group in (-1, 32, 128)
    for sym in (True, False)
]
# Environment, reader, what it reads, and how far its layers may be from ours, relative to the largest weight.
READERS: dict[str, tuple[str, str, list[dict[str, Any]], float]] = {
    # It computes in fp16, and takes version 1 with zero points only from itself.
    "gptqmodel": ("gptqmodel", "gptqmodel", [c for c in EVERY if c.get("sym", True)] + V2, 2e-3),
    # Its kernels for some widths compute in bf16.
    "transformers and optimum": ("gptqmodel", "transformers", EVERY + V2, 1e-2),
    # It rounds scale times zero to fp16.
    "auto-gptq 0.7.1": ("autogptq", "autogptq", EVERY, 2e-3),
    "compressed-tensors": ("llmcompressor", "transformers", COMPRESSED, 1e-6),
}


def python_of(environment: str) -> Path:
    path = ROOT / ".interop" / environment / "bin" / "python"
    if not path.exists():
        pytest.skip(f"no environment .interop/{environment}: `make interop` builds it")
    return path


def name_of(options: dict[str, Any]) -> str:
    return "-".join(f"{k}_{v}" for k, v in options.items()).replace("-1", "row")


def run_reader(environment: str, reader: str, out: Path, folders: list[Path]) -> None:
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2", "TOKENIZERS_PARALLELISM": "false"}
    variables.pop("PYTHONPATH", None)
    script = Path(__file__).with_name("readers") / "read.py"
    command = [str(python_of(environment)), "-W", "ignore", str(script), reader, str(out), *map(str, folders)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def ours(source: Path, folder: Path) -> tuple[dict[str, Any], Any]:
    """Weights by module, and the logits of the dense model that they make."""
    checkpoint = open_checkpoint(folder)
    with open_files(checkpoint) as files:
        weights = RestoredWeights(checkpoint, files)
        restored = {n: weights.read(n) for n in weights.names}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model.load_state_dict(restored, strict=False)
    with torch.no_grad():
        logits = model(torch.arange(3, 35)[None]).logits.numpy()
    return {n.removesuffix(".weight"): w.numpy() for n, w in restored.items() if n in weights.packed}, logits


@pytest.mark.parametrize("name", READERS)
def test_reads_what_we_write(tmp_path: Path, name: str) -> None:
    environment, reader, cases, tolerance = READERS[name]
    python_of(environment)
    source = build(tmp_path / "source", **SIZES)
    legacy(source)
    folders = []
    for options in cases:
        folders.append(tmp_path / name_of(options))
        quantkit.quantize(str(source), folders[-1], recipe(source, samples=4, **options))
    out = tmp_path / "out"
    out.mkdir()
    run_reader(environment, reader, out, folders)
    for folder in folders:
        theirs = np.load(out / f"{folder.name}.npz")
        weights, logits = ours(source, folder)
        for module, weight in weights.items():
            assert np.abs(theirs[module] - weight).max() <= tolerance * np.abs(weight).max(), (folder.name, module)
        assert np.abs(theirs["logits"] - logits).max() <= 10 * tolerance * np.abs(logits).max(), folder.name


@pytest.mark.parametrize("environment", ["gptqmodel"])
@pytest.mark.parametrize("reader", ["gptqmodel", "transformers"])
def test_layers_left_dense(tmp_path: Path, environment: str, reader: str) -> None:
    """A kind of layer that is skipped everywhere is told to both readers."""
    python_of(environment)
    source = build(tmp_path / "source", **SIZES)
    table = recipe(source, samples=4)
    table["quantize"]["skip"] = ["mlp.down_proj"]
    quantkit.quantize(str(source), tmp_path / "skipped", table)
    run_reader(environment, reader, tmp_path, [tmp_path / "skipped"])
    theirs = np.load(tmp_path / "skipped.npz")
    weights, logits = ours(source, tmp_path / "skipped")
    assert not any("down_proj" in module for module in weights)
    assert np.abs(theirs["logits"] - logits).max() <= 0.1 * np.abs(logits).max()


def test_experts_in_gptqmodel(tmp_path: Path) -> None:
    python_of("gptqmodel")
    source = build(tmp_path / "source", "mixtral", **SIZES, num_local_experts=4, num_experts_per_tok=2)
    quantkit.quantize(str(source), tmp_path / "experts", recipe(source, samples=8))
    run_reader("gptqmodel", "gptqmodel", tmp_path, [tmp_path / "experts"])
    theirs = np.load(tmp_path / "experts.npz")["logits"]
    checkpoint = open_checkpoint(tmp_path / "experts")
    text = str(source / "calib.txt")
    assert quantkit.evaluate(tmp_path / "experts", text, windows=2, length=64).perplexity > 0
    assert checkpoint.config["num_local_experts"] == 4
    assert np.isfinite(theirs).all()


def legacy(source: Path) -> None:
    """What readers of transformers 4 look for in config.json, beside what transformers 5 writes."""
    import json

    path = source / "config.json"
    config = json.loads(path.read_text())
    config |= {"torch_dtype": "float32", "rope_theta": config.get("rope_parameters", {}).get("rope_theta", 10000.0)}
    path.write_text(json.dumps(config))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
