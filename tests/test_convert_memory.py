"""The peak that the plan of a conversion states is kept by the run, for every way in which tensors are put together and
for every tokenizer. Measured twice, as in test_memory: by the program itself and by the kernel."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenization.samples import SHARED, real_file
from wide_models import MEASURE, Shapes, mistral
from wide_models import write as write_hf

from quantkit.checkpoint.header import DTYPE_BITS, TensorSpec, build_header
from quantkit.memory import MIB

PTH = ("--to", "mistral", "--weights-format", "pth", "--no-tokenizer")
MISTRAL, HF = ("--to", "mistral", "--no-tokenizer"), ("--to", "hf", "--no-tokenizer")


def params_of(
    dim: int, hidden: int, key_value: int, vocabulary: int, *, layers: int = 1, experts: int = 0, head_dim: int = 128
) -> dict[str, Any]:
    table: dict[str, Any] = {
        "dim": dim, "n_layers": layers, "head_dim": head_dim, "hidden_dim": hidden, "n_heads": dim // head_dim,
        "n_kv_heads": key_value // head_dim, "norm_eps": 1e-5, "vocab_size": vocabulary, "rope_theta": 1e6,
    }  # fmt: skip
    return table | ({"moe": {"num_experts": experts, "num_experts_per_tok": 2}} if experts else {})


def shapes_of(params: dict[str, Any], *, stacked: bool = False) -> Shapes:
    """Names and shapes of a native model; experts one by one, or a layer's in one tensor."""
    dim, hidden, experts = params["dim"], params["hidden_dim"], params.get("moe", {}).get("num_experts", 0)
    rows, kv = params["n_heads"] * params["head_dim"], params["n_kv_heads"] * params["head_dim"]
    shapes: Shapes = {"tok_embeddings.weight": (params["vocab_size"], dim)}
    for i in range(params["n_layers"]):
        p = f"layers.{i}."
        shapes |= {p + "attention.wq.weight": (rows, dim), p + "attention.wk.weight": (kv, dim),
                   p + "attention.wv.weight": (kv, dim), p + "attention.wo.weight": (dim, rows),
                   p + "attention_norm.weight": (dim,), p + "ffn_norm.weight": (dim,)}  # fmt: skip
        each = {"w1.weight": (hidden, dim), "w2.weight": (dim, hidden), "w3.weight": (hidden, dim)}
        if stacked:
            shapes |= {f"{p}block_sparse_moe.w{n}": (experts * hidden, dim) for n in (1, 2, 3)}
            shapes[p + "block_sparse_moe.gate.weight"] = (experts, dim)
        elif experts:
            shapes |= {f"{p}feed_forward.experts.{e}.{w}": s for e in range(experts) for w, s in each.items()}
            shapes[p + "feed_forward.gate.weight"] = (experts, dim)
        else:
            shapes |= {f"{p}feed_forward.{w}": shape for w, shape in each.items()}
    return shapes | {"norm.weight": (dim,), "output.weight": (params["vocab_size"], dim)}


def write(folder: Path, params: dict[str, Any], shapes: Shapes, *, fp8: bool = False, rows: bool = False) -> Path:
    """params.json and consolidated.safetensors, of random bytes that no kernel looks into; with `fp8` all but norms and
    embeddings are F8_E4M3, with one scale, or one for each of the `rows`."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    specs = []
    for name, shape in shapes.items():
        small = fp8 and name.startswith("layers.") and len(shape) == 2
        specs.append(TensorSpec(name, "F8_E4M3" if small else "BF16", shape))
        if small:
            scale = name.removesuffix("weight") + "qscale_weight"
            specs.append(TensorSpec(scale, "F32", (shape[0],) if rows else ()))
    pool = np.random.default_rng(0).integers(0, 0x3F, 8_000_003, np.uint8)
    with (folder / "consolidated.safetensors").open("wb") as f:
        f.write(build_header(specs)[0])
        for spec in specs:
            nbytes = spec.numel * DTYPE_BITS[spec.dtype] // 8
            if spec.dtype == "F32":
                f.write(np.full(spec.numel, 0.5, np.float32))
                continue
            for left in range(nbytes, 0, -pool.size):
                f.write(pool[: min(left, pool.size)])
    return folder


def write_meta(folder: Path, params: dict[str, Any], shapes: Shapes, shards: int) -> Path:
    """Meta's layout: what each device has of every matrix in a file of its own."""
    folder.mkdir()
    kept = {k: params[k] for k in ("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps")}
    (folder / "params.json").write_text(json.dumps({**kept, "multiple_of": 256, "vocab_size": -1}))
    for i in range(shards):
        part = {}
        for name, shape in shapes.items():
            columns = name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight"))
            if len(shape) == 2:
                shape = (shape[0], shape[1] // shards) if columns else (shape[0] // shards, shape[1])
            part[name] = torch.empty(shape, dtype=torch.bfloat16).fill_(0.5 + i * (len(shape) == 2))
        torch.save(part, folder / f"consolidated.{i:02}.pth")
    return folder


def planned(source: Path, *options: str) -> int:
    line = [sys.executable, "-m", "quantkit", "convert", str(source), *options, "--dry-run", "--json", "--quiet"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout)["memory"]["peak"])


def measured(source: Path, out: Path, *options: str) -> int:
    """Peak RSS of a run, the larger of what it says and of what the kernel says."""
    line = [sys.executable, "-c", MEASURE, "convert", str(source), "-o", str(out), *options, "--json", "--quiet"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    result, kernel = done.stdout.splitlines()
    own, outside = json.loads(result)["peak_rss"], int(kernel)
    assert abs(own - outside) < 16 * MIB, "the run does not know its own peak"
    return max(own, outside)


def check(source: Path, out: Path, *options: str) -> tuple[int, int]:
    """(measured, planned) bytes of a run that keeps to its plan."""
    peak, plan = measured(source, out, *options), planned(source, *options)
    shutil.rmtree(out)
    print(f"{source.name} {' '.join(options)}: measured {peak / MIB:.0f} MiB, planned {plan / MIB:.0f} MiB")
    assert peak <= plan
    # Of what every run takes, whatever its size, no machine is short.
    assert plan < max(2 * peak, 224 * MIB), "a plan that asks for far more turns small machines away"
    return peak, plan


LAYER = params_of(4096, 14336, 1024, 8000)


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.6 GB in bf16: one layer of Mistral-7B, a quarter of its vocabulary."""
    return write(tmp_path_factory.mktemp("memory") / "native-7b", LAYER, shapes_of(LAYER))


@pytest.fixture(scope="session")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, shapes = mistral(4096, 14336, 1024, 8000)
    return write_hf(tmp_path_factory.mktemp("memory") / "hf-7b", config, shapes, "BF16")


@pytest.mark.parametrize("options", [(), pytest.param(("--no-check",), marks=pytest.mark.slow),
                                     pytest.param(("--threads", "8"), marks=pytest.mark.slow)])  # fmt: skip
@pytest.mark.parametrize("to", [MISTRAL, PTH], ids=["safetensors", "pth"])
def test_a_7b_to_mistrals_layout(to: tuple[str, ...], options: tuple[str, ...], hf: Path, tmp_path: Path) -> None:
    peak, _ = check(hf, tmp_path / "out", *to, *options)
    assert peak < 400_000_000


@pytest.mark.parametrize("options", [(), pytest.param(("--no-check",), marks=pytest.mark.slow),
                                     pytest.param(("--threads", "8"), marks=pytest.mark.slow),
                                     pytest.param(("--max-shard-size", "50MB"), marks=pytest.mark.slow)])  # fmt: skip
def test_a_7b_to_hugging_face(options: tuple[str, ...], native: Path, tmp_path: Path) -> None:
    peak, _ = check(native, tmp_path / "out", *HF, *options)
    assert peak < 400_000_000


@pytest.mark.slow
def test_pth_to_hugging_face(native: Path, tmp_path: Path) -> None:
    measured(native, tmp_path / "native-pth", *PTH)
    peak, _ = check(tmp_path / "native-pth", tmp_path / "out", *HF)
    assert peak < 400_000_000


@pytest.mark.parametrize(
    ("dim", "hidden", "experts"), [(2048, 7168, 4), pytest.param(4096, 14336, 2, marks=pytest.mark.slow)]
)
def test_stacked_experts(dim: int, hidden: int, experts: int, tmp_path: Path) -> None:
    """w2 of the first Mixtral is turned, one expert at a time: 29 MB here, 117 MB in the model of that size."""
    params = params_of(dim, hidden, 1024, 1000, experts=experts)
    check(write(tmp_path / f"stacked-{dim}", params, shapes_of(params, stacked=True)), tmp_path / "out", *HF)


@pytest.mark.slow
@pytest.mark.parametrize("to", [HF, MISTRAL, PTH], ids=["hf", "safetensors", "pth"])
def test_stacked_experts_of_one_thread(to: tuple[str, ...], tmp_path: Path) -> None:
    params = params_of(2048, 7168, 1024, 1000, experts=4)
    source = write(tmp_path / "stacked", params, shapes_of(params, stacked=True))
    check(source, tmp_path / "out", *to, "--threads", "1")


@pytest.mark.slow
def test_single_experts(tmp_path: Path) -> None:
    params = params_of(2048, 7168, 1024, 1000, experts=8)
    check(write(tmp_path / "experts", params, shapes_of(params)), tmp_path / "out", *HF)


@pytest.mark.parametrize("shards", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_metas_shards(shards: int, tmp_path: Path) -> None:
    params = params_of(4096, 11008, 4096, 8000)
    peak, _ = check(write_meta(tmp_path / f"llama-{shards}", params, shapes_of(params), shards), tmp_path / "out", *HF)
    assert peak < 500_000_000


@pytest.mark.parametrize("rows", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_fp8(rows: bool, tmp_path: Path) -> None:
    peak, _ = check(write(tmp_path / "fp8", LAYER, shapes_of(LAYER), fp8=True, rows=rows), tmp_path / "out", *HF)
    assert peak < 500_000_000


@pytest.mark.slow
def test_float32(tmp_path: Path) -> None:
    config, shapes = mistral(2048, 8192, 512, 1000)
    check(write_hf(tmp_path / "f32", config, shapes, "F32"), tmp_path / "out", *MISTRAL)


@pytest.mark.slow
def test_many_small_tensors(tmp_path: Path) -> None:
    """The plan, the journal and the manifest are what is large here: 8,000 tensors."""
    params = params_of(128, 128, 64, 1000, layers=100, experts=26, head_dim=64)
    check(write(tmp_path / "many", params, shapes_of(params)), tmp_path / "out", *HF)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def with_tokenizer(folder: Path, key: str, vocabulary: int) -> Path:
    """A small model beside a real tokenizer: what is made of that is what is large."""
    name, path = real_file(key)
    params = params_of(128, 128, 64, vocabulary, head_dim=64)
    write(folder, params, shapes_of(params))
    shutil.copy(path, folder / name)
    return folder


slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("key", "vocabulary"),
    [("15m", 32000), slow("v1", 32000), slow("v3", 32768), slow("tekken-2407", 131072), slow("tekken-2409", 131072)],
)
@pytest.mark.parametrize("to", ["hf", slow("mistral")])
def test_a_tokenizer(to: str, key: str, vocabulary: int, tmp_path: Path) -> None:
    check(with_tokenizer(tmp_path / key, key, vocabulary), tmp_path / "out", "--to", to)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["tekken-2409", "tekken-2407"])
def test_a_large_tokenizer_beside_large_weights(key: str, tmp_path: Path) -> None:
    """20 MB of JSON become as many again, in Python's objects a few times that; and the slabs are full."""
    name, path = real_file(key)
    params = {**params_of(2048, 7168, 1024, 131072), "tied_embeddings": True}
    shapes = {n: shape for n, shape in shapes_of(params).items() if n != "output.weight"}
    source = write(tmp_path / f"{key}-large", params, shapes)
    shutil.copy(path, source / name)
    check(source, tmp_path / "out", "--to", "hf")


@pytest.mark.parametrize(("key", "to"), [("v3", "hf"), slow("tekken-2409", "hf"), slow("tekken-2409", "mistral")])
def test_max_memory_counts_the_tokenizer(key: str, to: str, tmp_path: Path) -> None:
    """The least that a refusal asks for is enough: reading 20 MB of JSON takes more than the slabs of a small model."""
    source, out = with_tokenizer(tmp_path / key, key, 131072), tmp_path / "out"
    line = [sys.executable, "-m", "quantkit", "convert", str(source), "-o", str(out), "--to", to, "--max-memory"]
    refused = subprocess.run([*line, "40MiB"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert not out.exists()
    least = refused.stderr.partition("allow ")[2].partition(",")[0]
    peak = measured(source, out, "--to", to, "--max-memory", least)
    print(f"{key} --to {to} --max-memory {least}: measured {peak / MIB:.0f} MiB")
    assert peak <= int(least.removesuffix("MiB")) * MIB


@pytest.mark.slow
def test_a_real_model(tmp_path: Path) -> None:
    source = SHARED / "stories15m-mistral-src"
    if not source.exists():
        pytest.skip(f"{source} is not there")
    check(source, tmp_path / "out", "--to", "hf")


# --- --max-memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["native to hf", pytest.param("hf to pth", marks=pytest.mark.slow)])
def test_max_memory_is_kept(way: str, native: Path, hf: Path, tmp_path: Path) -> None:
    source, options = (native, HF) if way == "native to hf" else (hf, PTH)
    free = planned(source, *options)
    limit = f"{free // MIB - 20}MiB"
    assert planned(source, *options, "--max-memory", limit) < free
    peak, plan = check(source, tmp_path / "out", *options, "--max-memory", limit)
    assert peak <= plan <= (free // MIB - 20) * MIB


def test_max_memory_too_small(native: Path, tmp_path: Path) -> None:
    """Refused before anything is written, with the amount that would do, and that amount does."""
    out = tmp_path / "out"
    line = [sys.executable, "-m", "quantkit", "convert", str(native), "-o", str(out), *HF, "--max-memory"]
    refused = subprocess.run([*line, "60MB"], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert "--max-memory 57 MiB is too little" in refused.stderr
    assert not out.exists()
    enough = refused.stderr.partition("allow ")[2].partition(",")[0]
    peak, plan = check(native, out, *HF, "--max-memory", enough)
    assert peak <= plan < planned(native, *HF)


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_memory(native: Path, tmp_path: Path) -> None:
    least = planned(native, *HF, "--threads", "1")
    for out, options in (("a", ()), ("b", ("--threads", "1", "--max-memory", f"{least // MIB}MiB"))):
        measured(native, tmp_path / out, *HF, *options)
    a, b = tmp_path / "a/model.safetensors", tmp_path / "b/model.safetensors"
    assert subprocess.run(["cmp", str(a), str(b)]).returncode == 0
