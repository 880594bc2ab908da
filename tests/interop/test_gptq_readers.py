"""Real loaders, each in an environment of its own (`make interop` builds them), read the folders that we write: the
weights that their layers apply are ours, and so are the logits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
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
COMPRESS = {"format": "compressed-tensors"}
COMPRESSED = [
    {"bits": bits, "group_size": group, "sym": sym, **COMPRESS}
    for bits in (2, 3, 4, 8)
    for group in (-1, 32, 128)
    for sym in (True, False)
]
FORMS = {"q_proj": "4_32", "k_proj": "4_32", "v_proj": "4_32", "o_proj": "8_128", "mlp.gate_proj": "3_64",
         "mlp.up_proj": "3_64", "down_proj": "2_32"}  # fmt: skip
MIXED = {"bits": 9.0, "group_size": None, "mixes": FORMS}  # linears that differ in bits and group size
WRONG = {"bits": 4, "group_size": -1, "sym": False}
# Environment, reader, what it reads, and how far its layers may be from ours, relative to the largest weight.
READERS: dict[str, tuple[str, str, list[dict[str, Any]], float]] = {
    # It computes in fp16, and takes version 1 with zero points only from itself.
    "gptqmodel": ("gptqmodel", "gptqmodel", [c for c in EVERY if c.get("sym", True)] + V2 + [MIXED], 2e-3),
    # Its kernels for some widths compute in bf16, and that for 4 bits with one asymmetric group a row is wrong.
    "transformers and optimum": ("gptqmodel", "transformers", [c for c in EVERY if c != WRONG] + V2, 1e-2),
    # It rounds scale times zero to fp16.
    "auto-gptq 0.7.1": ("autogptq", "autogptq", EVERY, 2e-3),
    "compressed-tensors": ("llmcompressor", "transformers", [*COMPRESSED, MIXED | COMPRESS], 1e-6),
}


def python_of(environment: str) -> Path:
    path = ROOT / ".interop" / environment / "bin" / "python"
    if not path.exists():
        pytest.skip(f"no environment .interop/{environment}: `make interop` builds it")
    return path


def name_of(options: dict[str, Any]) -> str:
    return "-".join(k if k == "mixes" else f"{k}_{v}" for k, v in options.items()).replace("-1", "row")


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
    dense = folder.with_name(f"{folder.name}-dense")
    shutil.copytree(source, dense, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({n: w.contiguous() for n, w in restored.items()}, dense / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
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
    apart = {}
    for folder in folders:
        theirs = np.load(out / f"{folder.name}.npz")
        weights, logits = ours(source, folder)
        worst = max(float(np.abs(theirs[m] - w).max() / np.abs(w).max()) for m, w in weights.items())
        predicted = float(np.abs(theirs["logits"] - logits).max() / np.abs(logits).max())
        if worst > tolerance or predicted > 10 * tolerance:
            apart[folder.name] = (worst, predicted)
    assert not apart


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


OTHERS = ("qwen3", "gemma3_text", "phi3", "bloom", "gpt2", "falcon", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3")


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures(tmp_path: Path, kind: str) -> None:
    """The program that the card names loads the folder and predicts what we do; those that it warns of do not."""
    python_of("gptqmodel")
    source = build(tmp_path / "source", kind, vocab_size=320)  # room for a token that gptqmodel adds
    plan = quantkit.plan(str(source), recipe(source, samples=4))
    named = plan.draft["result"]["loader"]
    quantkit.quantize(str(source), tmp_path / "out", recipe(source, samples=4))
    _, logits = ours(source, tmp_path / "out")
    right = {}
    for reader in ("gptqmodel", "transformers"):
        place = tmp_path / reader
        place.mkdir()
        try:
            run_reader("gptqmodel", reader, place, [tmp_path / "out"])
        except AssertionError:
            right[reader] = False
            continue
        # The median: with fp16 a token near the edge may go to another expert.
        apart = np.abs(np.load(place / "out.npz")["logits"] - logits)
        right[reader] = bool(np.median(apart) < 2e-3 * np.abs(logits).max())
    default = kind in ("qwen3", "gemma3_text", "bloom")
    assert right == {reader: default or reader == named for reader in right}


def legacy(source: Path) -> None:
    """What readers of transformers 4 look for in config.json, beside what transformers 5 writes."""
    import json

    path = source / "config.json"
    config = json.loads(path.read_text())
    config |= {"torch_dtype": "float32", "rope_theta": config.get("rope_parameters", {}).get("rope_theta", 10000.0)}
    path.write_text(json.dumps(config))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
