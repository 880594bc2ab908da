"""The peak that a plan states is kept by the run. Measured twice: by the program itself and by the kernel.

Every run compiles its kernels anew (an empty NUMBA_CACHE_DIR, Numba's own switch), as the first run of a user does.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, make_tiny
from eval_models import build, text_of
from wide_models import MEASURE, Shapes, mistral, write

import quantkit
from quantkit.checkpoint.header import TensorInfo
from quantkit.checkpoint.views import plain
from quantkit.errors import UsageError
from quantkit.layouts import open_checkpoint
from quantkit.memory import MIB, MemoryPlan, Work, plan_memory


def gpt2(hidden: int, layers: int) -> tuple[dict[str, Any], Shapes]:
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": hidden, "n_layer": layers, "n_head": 16,
        "n_positions": 64, "vocab_size": 1000,
    }  # fmt: skip
    shapes: Shapes = {"transformer.wte.weight": (1000, hidden), "transformer.wpe.weight": (64, hidden)}
    for i in range(layers):
        p = f"transformer.h.{i}."
        for name, (rows, columns) in {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4),
                                      "mlp.c_proj": (4, 1)}.items():  # fmt: skip
            shapes |= {f"{p}{name}.weight": (rows * hidden, columns * hidden), f"{p}{name}.bias": (columns * hidden,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{p}{name}.weight": (hidden,), f"{p}{name}.bias": (hidden,)}
    return config, shapes | {"transformer.ln_f.weight": (hidden,), "transformer.ln_f.bias": (hidden,)}


def write_bin(folder: Path, config: dict[str, Any], shapes: Shapes) -> Path:
    import torch

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02) for name, shape in shapes.items()}
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def planned(source: Path, *options: str) -> int:
    line = [sys.executable, "-m", "quantkit", "plan", str(source), *options, "--json"]
    done = subprocess.run(line, capture_output=True, text=True, check=True, timeout=60)
    return int(json.loads(done.stdout)["memory"]["peak"])


def measured(source: Path, work: Path, *options: str, anew: bool = False) -> int:
    """Peak RSS of a run, the larger of what it says and of what the kernel says; anew: kernels are compiled, too."""
    environment = {**os.environ, **({"NUMBA_CACHE_DIR": str(work / "numba")} if anew else {})}
    line = [sys.executable, "-c", MEASURE, "quantize", str(source), "-o", str(work / "out"), *options, "--json",
            "--quiet"]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    result, kernel = done.stdout.splitlines()
    own, outside = json.loads(result)["peak_rss"], int(kernel)
    assert abs(own - outside) < 16 * MIB, "the run does not know its own peak"
    return max(own, outside)


def check(source: Path, work: Path, *options: str, anew: bool = False) -> tuple[int, int]:
    """(measured, planned) bytes of a run that keeps to its plan."""
    peak, plan = measured(source, work, *options, anew=anew), planned(source, *options)
    print(f"{source.name} {' '.join(options)}: measured {peak / MIB:.0f} MiB, planned {plan / MIB:.0f} MiB")
    assert peak <= plan
    return peak, plan


@pytest.fixture(scope="session")
def mistral_7b_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.7 GB in bf16: one layer of Mistral-7B, half its vocabulary."""
    return write(tmp_path_factory.mktemp("memory") / "7b", *mistral(4096, 14336, 1024, 16000), "BF16")


@pytest.mark.parametrize(
    "options",
    [
        ("--bits", "4"),
        pytest.param(("--bits", "8"), marks=pytest.mark.slow),
        pytest.param(("--quant-type", "fp4", "--no-double-quant"), marks=pytest.mark.slow),
        pytest.param(("--threads", "8"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_7b_stays_under_its_plan_and_a_gigabyte(
    options: tuple[str, ...], mistral_7b_layer: Path, tmp_path: Path
) -> None:
    peak, plan = check(mistral_7b_layer, tmp_path, *options, anew=True)
    assert plan < 10**9
    assert plan < 1.6 * peak, "a plan that asks for far more than the run takes turns small machines away"


@pytest.mark.parametrize("bits", ["4", pytest.param("8", marks=pytest.mark.slow)])
def test_transposed_float32(bits: str, tmp_path: Path) -> None:
    """GPT-2 stores [in, out]: its matrices, 37 MB here, are read whole."""
    source = write(tmp_path / "gpt2", *gpt2(1536, 3), "F32")
    check(source, tmp_path, "--bits", bits)


@pytest.mark.slow
def test_float32(tmp_path: Path) -> None:
    source = write(tmp_path / "f32", *mistral(2048, 8192, 512, 1000), "F32")
    check(source, tmp_path)


@pytest.mark.slow
def test_torch_file(tmp_path: Path) -> None:
    """A .bin is read by byte range, without torch."""
    source = write_bin(tmp_path / "bin", *mistral(2048, 8192, 512, 1000))
    check(source, tmp_path)


@pytest.mark.slow
def test_architecture_that_transformers_must_describe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It imports torch for that, and the plan says so."""
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 16, "vocab_size": 256}
    monkeypatch.setitem(TINY, "gptj", {**sizes, "bos_token_id": 0, "eos_token_id": 0})
    check(make_tiny("gptj", tmp_path / "gptj"), tmp_path)


def test_max_memory_is_kept(mistral_7b_layer: Path, tmp_path: Path) -> None:
    free = planned(mistral_7b_layer)
    limit = f"{free // MIB - 20}MiB"
    assert planned(mistral_7b_layer, "--max-memory", limit) < free
    peak, plan = check(mistral_7b_layer, tmp_path, "--max-memory", limit)
    assert peak <= plan <= (free // MIB - 20) * MIB


def test_max_memory_too_small(mistral_7b_layer: Path, tmp_path: Path) -> None:
    """Refused before anything is written, with the amount that would do, and that amount does."""
    line = [sys.executable, "-m", "quantkit", "quantize", str(mistral_7b_layer), "-o", str(tmp_path / "out")]
    refused = subprocess.run([*line, "--max-memory", "100MB"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert "--max-memory 95 MiB is too little" in refused.stderr
    assert not (tmp_path / "out").exists()
    enough = refused.stderr.partition("allow ")[2].partition(",")[0]
    assert planned(mistral_7b_layer, "--max-memory", enough) < planned(mistral_7b_layer)


def model(
    shape: tuple[int, int], *, transposed: bool = False, limit: int | None = None, derived: bool = False
) -> MemoryPlan:
    weight = plain(TensorInfo("x.weight", "BF16", shape, "model.safetensors", 0))
    work = [Work(weight, 0 if transposed else 1024, encoded=True, copies=1.5 if transposed else 0.5)]
    return plan_memory(work, tensors=6, threads=4, limit=limit, device="cpu", derived=derived)


def test_model_counts_transformers_where_it_is_asked() -> None:
    assert model((64, 64), derived=True).peak > model((64, 64)).peak + 300 * MIB


def test_model_shrinks_step_by_step() -> None:
    """First the slabs, then the threads; what is left at the end is the least."""
    steps = [model((4096, 4096))]
    steps += [model((4096, 4096), limit=steps[-1].peak - 1)]
    steps += [model((4096, 4096), limit=steps[-1].peak - 1)]
    assert [(p.threads, p.slab // MIB) for p in steps] == [(4, 4), (4, 1), (1, 1)]
    with pytest.raises(UsageError, match="too little"):
        model((4096, 4096), limit=steps[-1].peak - 1)


def test_model_counts_transposed_tensors_whole() -> None:
    rows, whole = model((8192, 8192)), model((8192, 8192), transposed=True)
    assert whole.slabs >= (whole.in_flight + whole.threads) * 2 * 8192 * 8192
    assert whole.in_flight < rows.in_flight, "fewer buffers, where each is as large as a tensor"


def test_a_layer_that_is_skipped_is_followed_all_the_same(tmp_path: Path) -> None:
    """In float32, as all that is not solved."""
    source = build(tmp_path / "source", "deepseek_v3", intermediate_size=8192)  # of the first layer
    text = tmp_path / "text.txt"
    text.write_text(text_of(2000))
    recipe = {
        "quantize": {"method": "gptq", "group_size": 32, "skip": ["model.layers.0"]},
        "calibration": {"text": str(text), "samples": 2, "length": 32},
    }
    layers = quantkit.plan(str(source), recipe).memory.layers
    shapes = [t.shape for name, t in open_checkpoint(source).tensors.items() if name.startswith("model.layers.0.")]
    assert layers is not None
    assert layers.weights == 4 * sum(map(math.prod, shapes))
