"""Folders to convert, the ways to spoil them, and the program that must refuse them: what test_convert_*.py share."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bad_inputs
import pytest
import torch
from bad_inputs import Refusal, Spoil, contents
from oracle.native_models import make_native
from safetensors.torch import load_file, save_file
from tokenization.protobuf import spm
from torch import Tensor

from quantkit.cli import main

HEADS, KEY_VALUE, HEAD_DIM, DIM, VOCABULARY = 4, 2, 16, 64, 320

GONE = object()  # a key to take out

INDEX = "consolidated.safetensors.index.json"

SPM = spm()  # 259 pieces

FP8 = torch.float8_e4m3fn

SHARD = "consolidated-0000{}-of-00003.safetensors"


def parse(stderr: str) -> tuple[list[str], Refusal]:
    """Warnings, and then the lines of the refusal."""
    lines = stderr.splitlines()
    warned = [line for line in lines if line.startswith("warning: ")]
    assert all(line.isprintable() for line in warned)
    return warned, bad_inputs.parse("\n".join(lines[len(warned) :]))


def is_pipe(folder: Path) -> bool:
    return any(p.is_fifo() for p in folder.iterdir())


class Program:
    """The command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def run(self, *arguments: object) -> tuple[int, str, str]:
        self.capsys.readouterr()  # what the test itself wrote, or a library it uses
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        assert isinstance(stop.value.code, int)
        return stop.value.code, *self.capsys.readouterr()

    def refuses(self, source: Path, out: Path, *options: object) -> Refusal:
        """`convert SOURCE -o OUT options` is refused with exit code 2, and touches nothing."""
        before = {} if is_pipe(source) else contents(source)
        there = contents(out) if out.is_dir() else None
        code, stdout, stderr = self.run("convert", source, "-o", out, *options, "--quiet")
        _, refusal = parse(stderr)
        assert (code, stdout) == (2, "")
        assert before == ({} if is_pipe(source) else contents(source))
        assert there == (contents(out) if out.is_dir() else None)
        return refusal

    def converts(self, source: Path, out: Path, *options: object) -> str:
        """The same, expected to work. What it warned of."""
        before = contents(source)
        code, _, stderr = self.run("convert", source, "-o", out, *options, "--quiet")
        assert code == 0, stderr
        assert before == contents(source)
        assert all(line.startswith("warning: ") and line.isprintable() for line in stderr.splitlines())
        return stderr


@pytest.fixture
def program(_signals: None, capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


LAYERS = {
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip

WHOLE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}

THETA = {"rope_theta": 1e6}

SIZES = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "intermediate_size": "hidden_dim",
         "num_attention_heads": "n_heads", "vocab_size": "vocab_size", "rms_norm_eps": "norm_eps"}  # fmt: skip


def hf_name(native: str) -> str:
    stem = native.removesuffix(".weight")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.weight"
    _, layer, rest = stem.split(".", 2)
    return f"model.layers.{layer}.{LAYERS[rest]}.weight"


def halves(x: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from pairs to halves."""
    return x.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def canonical(weights: Mapping[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """A dense native model's tensors as the Hugging Face layout has them."""
    return {hf_name(n): halves(x, head_dim) if n.endswith((".wq.weight", ".wk.weight")) else x
            for n, x in weights.items()}  # fmt: skip


def hf_config(params: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
        **{hf: params[native] for hf, native in SIZES.items()},
        "num_key_value_heads": params["n_kv_heads"], "head_dim": params["head_dim"],
        "rope_theta": params["rope_theta"], "max_position_embeddings": 512, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", **more,
    }  # fmt: skip


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """native, hf, llama (two shards of Meta's): one random model, to be copied before it is spoiled."""
    folder = tmp_path_factory.mktemp("models")
    native = make_native(folder / "native", vocab_size=VOCABULARY, params_extra=THETA)
    (native / "tokenizer.model").write_bytes(SPM)
    (native / "LICENSE").write_text("mine")
    params, weights = json.loads((native / "params.json").read_text()), load_file(native / "consolidated.safetensors")
    (folder / "hf").mkdir()
    save_file(canonical(weights, HEAD_DIM), folder / "hf/model.safetensors", metadata={"format": "pt"})
    (folder / "hf/config.json").write_text(json.dumps(hf_config(params)))
    (folder / "hf/tokenizer.model").write_bytes(SPM)
    make_meta(folder / "llama", weights)
    return folder


def make_meta(folder: Path, weights: Mapping[str, Tensor], *, shards: int = 2) -> Path:
    """Meta's layout: each of the shards has its share of every matrix, and the norms whole."""
    folder.mkdir()
    for i in range(shards):
        part = {}
        for name, x in weights.items():
            axis = 1 if name.endswith(("wo.weight", "w2.weight")) or name.startswith("tok_") else 0
            part[name] = x if x.dim() == 1 else x.chunk(shards, axis)[i].clone()
        torch.save({**part, "rope.freqs": torch.ones(8)}, folder / f"consolidated.{i:02}.pth")
    params = {"dim": DIM, "n_layers": 2, "n_heads": HEADS, "n_kv_heads": KEY_VALUE, "multiple_of": 32,
              "norm_eps": 1e-5, "vocab_size": -1}  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_bytes(SPM)
    return folder


@pytest.fixture
def native(models: Path, tmp_path: Path) -> Path:
    """A v0.3 of its own for each test, to be spoiled."""
    return shutil.copytree(models / "native", tmp_path / "native")


@pytest.fixture
def hf(models: Path, tmp_path: Path) -> Path:
    return shutil.copytree(models / "hf", tmp_path / "hf")


@pytest.fixture
def llama(models: Path, tmp_path: Path) -> Path:
    return shutil.copytree(models / "llama", tmp_path / "llama")


def same(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_same(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, x in wanted.items():
        assert same(got[name], x), name


def edit(file: str, changes: Mapping[str, Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        table = {**json.loads((folder / file).read_text()), **changes}
        (folder / file).write_text(json.dumps({k: v for k, v in table.items() if v is not GONE}))

    return spoil


def params(**changes: Any) -> Spoil:
    return edit("params.json", changes)


def config(**changes: Any) -> Spoil:
    return edit("config.json", changes)


def remove(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    """Changes the one safetensors file of the folder as a dict."""

    def spoil(folder: Path) -> None:
        (path,) = folder.glob("*.safetensors")
        table = load_file(path)
        change(table)
        save_file(table, path, metadata={"format": "pt"})

    return spoil


def shaped(name: str, *shape: int) -> Spoil:
    return tensors(lambda t: t.update({name: torch.zeros(shape, dtype=torch.bfloat16)}))


def added(name: str, *shape: int) -> Spoil:
    return shaped(name, *shape or (DIM,))


def lost(name: str) -> Spoil:
    return tensors(lambda t: t.pop(name))


def renamed(old: str, new: str) -> Spoil:
    return tensors(lambda t: t.update({new: t.pop(old)}))


def cast(name: str, dtype: torch.dtype, **beside: Tensor) -> Spoil:
    """The tensor in another dtype, and others beside it (qscale_weight=…)."""

    def change(table: dict[str, Tensor]) -> None:
        table[name] = table[name].float().to(dtype)
        table.update({name.removesuffix("weight") + leaf: x for leaf, x in beside.items()})

    return tensors(change)


def both(*spoils: Spoil) -> Spoil:
    return lambda folder: [spoil(folder) for spoil in spoils]


def refiled(files: Any, *, without: tuple[str, ...] = (), index: Mapping[str, str] = {}) -> Spoil:
    """The weights in several files, some of which then go, and an index that is then changed."""

    def spoil(folder: Path) -> None:
        (folder / "consolidated.safetensors").unlink()
        make_native(folder, vocab_size=VOCABULARY, params_extra=THETA, files=files)
        for name in without:
            (folder / name).unlink()
        if index:
            table = json.loads((folder / INDEX).read_text())
            table["weight_map"] = {k: v for k, v in {**table["weight_map"], **index}.items() if v}
            (folder / INDEX).write_text(json.dumps(table))

    return spoil


def twice(files: Any, first: str, second: str) -> Spoil:
    def spoil(folder: Path) -> None:
        refiled(files, without=(INDEX,) if files == "safetensors-shards" else ())(folder)
        load, save = (load_file, save_file) if first.endswith(".safetensors") else (torch.load, torch.save)
        one, two = load(folder / first), load(folder / second)
        name = next(iter(one))
        save({**two, name: one[name]}, folder / second)

    return spoil


def pickled(raw: Callable[[Path], bytes] | None = None) -> Spoil:
    """consolidated.00.pth instead of the safetensors file: as torch saves it, or these bytes."""

    def spoil(folder: Path) -> None:
        path = folder / "consolidated.safetensors"
        if raw is None:
            torch.save(load_file(path), folder / "consolidated.00.pth")
        else:
            (folder / "consolidated.00.pth").write_bytes(raw(folder))
        path.unlink()

    return spoil


def truncated(folder: Path) -> None:
    pickled()(folder)
    path = folder / "consolidated.00.pth"
    os.truncate(path, path.stat().st_size - 100)


def enormous(folder: Path) -> None:
    with (folder / "params.json").open("r+b") as f:
        f.truncate((64 << 20) + 1)  # sparse


def elsewhere(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return spoil


def pipe(folder: Path) -> None:
    (folder / "params.json").unlink()
    os.mkfifo(folder / "params.json")


W = "layers.0.attention.{}.weight"

WQ, WO, W1, NORM = W.format("wq"), W.format("wo"), "layers.1.feed_forward.w1.weight", "layers.1.ffn_norm.weight"

ENCODER = {"hidden_size": 64, "image_size": 64}

VISION = "vision_encoder.transformer.layers.0.attention.wq.weight"

ESCAPES = "\x1b[2J\x9b\n\u202e"

PARAMS_FILE, ONE_FILE, PTH = "params.json", "consolidated.safetensors", "consolidated.00.pth"


def written(out: Path, name: str = "config.json") -> dict[str, Any]:
    def refuse(token: str) -> Any:
        raise AssertionError(f"{name} holds {token}, which is no JSON")

    table: dict[str, Any] = json.loads((out / name).read_text(), parse_constant=refuse)
    return table


def base_config() -> dict[str, Any]:
    sizes = {"dim": DIM, "n_layers": 2, "head_dim": HEAD_DIM, "hidden_dim": 96, "n_heads": HEADS,
             "n_kv_heads": KEY_VALUE, "norm_eps": 1e-5, "vocab_size": VOCABULARY, "rope_theta": 1e6}  # fmt: skip
    return hf_config(sizes)
