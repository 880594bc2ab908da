"""Conversions, and the other program's view of what they write: what the tests share that compare folders byte by byte.

What is written is read by safetensors and torch alone, and compared with a mapping of names and rows of our own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, make_tiny
from safetensors.torch import load_file
from torch import Tensor

import quantkit as package

Weights = dict[str, Tensor]
FILES = ("safetensors", "pth", "pt-shards", "safetensors-shards")
SIZES = ("20kB", None)  # many files, or one
DTYPES = ("bfloat16", "float16", "float32")
V01 = {"sliding_window": 4096}
# What make_native gets, in the words of each generation. Keys of runtimes are in some, in the files' own order.
GENERATIONS: dict[str, dict[str, Any]] = {
    "v0.1": {"params_extra": V01},
    "v0.2": {"params_extra": {"rope_theta": 1e6, "max_batch_size": 4}},
    "v0.3": {"vocab_size": 320, "params_extra": {"rope_theta": 1e6, "model_type": "transformer"}},
    "Mixtral": {"experts": 3, "params_extra": {"rope_theta": 1e6}},
    "Nemo": {"dim": 40, "params_extra": {"rope_theta": 1e6, "max_seq_len": 1024}},
    "Ministral": {"n_layers": 4, "params_extra": {"rope_theta": 1e8, "_sliding_window": [None, 5]}},
    "tied": {"tied": True, "params_extra": {"rope_theta": 1e5}},
    "all heads alike": {"n_kv_heads": 4, "head_dim": 8, "params_extra": {"rope_theta": 1e4}},
}

# --- the other program's view of a folder -----------------------------------------------------------------------------


def hf_weights(folder: Path) -> Weights:
    """Every tensor of an HF folder, its index checked."""
    weights: Weights = {}
    where: dict[str, str] = {}
    files = sorted([*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")])
    for file in files:
        part = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        assert not weights.keys() & part.keys()
        weights.update(part)
        where.update(dict.fromkeys(part, file.name))
    indexes = list(folder.glob("*.index.json"))
    assert len(indexes) == (len(files) > 1)
    for index in indexes:
        assert json.loads(index.read_text())["weight_map"] == where
    return weights


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


def in_halves(weight: Tensor, head_dim: int) -> Tensor:
    """HF row c · D/2 + j is native row 2j + c, head by head."""
    rows = torch.empty_like(weight)
    for first in range(0, len(weight), head_dim):
        for j in range(head_dim // 2):
            for c in (0, 1):
                rows[first + c * (head_dim // 2) + j] = weight[first + 2 * j + c]
    return rows


LAYER = {
    "attention_norm.weight": "input_layernorm.weight", "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight", "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight", "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight", "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight", "feed_forward.gate.weight": "block_sparse_moe.gate.weight",
}  # fmt: skip
TOP = {
    "tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}  # fmt: skip


def expected_hf(native: Weights, head_dim: int) -> Weights:
    """The HF layout of native tensors, experts one by one."""
    found: Weights = {}
    for name, tensor in native.items():
        if name in TOP:
            found[TOP[name]] = tensor
            continue
        _, i, rest = name.split(".", 2)
        new = LAYER.get(rest) or rest.replace("feed_forward.", "block_sparse_moe.")
        if rest in ("attention.wq.weight", "attention.wk.weight"):
            tensor = in_halves(tensor, head_dim)
        found[f"model.layers.{i}.{new}"] = tensor
    return found


# --- conversions ------------------------------------------------------------------------------------------------------


def recipe_of(**keys: Any) -> dict[str, Any]:
    """convert(profile=…, weights_format=…) and the rest of a recipe in one row of keywords; without a tokenizer."""
    block: dict[str, Any] = {"tokenizer": False}
    for key in ("profile", "weights_format", "check", "to", "tokenizer"):
        if key in keys:
            block[key] = keys.pop(key)
    return {"convert": {k: v for k, v in block.items() if v is not None}, **{k: v for k, v in keys.items() if v}}


def convert(source: Path, out: Path, to: Any, **keys: Any) -> Path:
    outcome = package.convert(str(source), out, to, recipe_of(**keys))
    assert outcome.checked or keys.get("check") is False
    return out


def assert_sound(out: Path, source: Path) -> None:
    found = package.verify(out, source=str(source))
    assert found.problems == ()
    assert found.compared == found.tensors > 0


def params_of(folder: Path) -> dict[str, Any]:
    params = json.loads((folder / "params.json").read_text())
    assert isinstance(params, dict)
    return params


def config_of(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    assert isinstance(config, dict)
    return config


def weight_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".pth", ".pt", ".bin"))


# --- sources ----------------------------------------------------------------------------------------------------------

HF_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {}),
    "mistral, window": ("mistral", {"sliding_window": 6, "rms_norm_eps": 1e-5}),
    "mistral, tied": ("mistral", {"tie_word_embeddings": True}),
    "mixtral": ("mixtral", {}),
    "llama": ("llama", {}),
    "llama, tied, all heads alike": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "ministral": ("ministral", {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256, "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    }),
}  # fmt: skip


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model as transformers saves it, by its name in HF_MODELS. Read only: shared by all tests."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            model_type, changes = HF_MODELS[name]
            dtype = DTYPES[list(HF_MODELS).index(name) % 3]
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(TINY, "ministral", {})
                made[name] = make_tiny(model_type, tmp_path_factory.mktemp("saved") / "model", dtype=dtype, **changes)
        return made[name]

    return get


def meta_shards(folder: Path, weights: Weights, shards: int, params: dict[str, Any], *, columns: bool) -> Path:
    """consolidated.0i.pth as Meta's programs share a model out among devices, norms and rotations whole in each."""
    folder.mkdir()
    axes = {"wo.weight": 1, "w2.weight": 1, "tok_embeddings.weight": int(columns)}
    for i in range(shards):
        part: Weights = {}
        for name, tensor in weights.items():
            if tensor.dim() == 1:
                part[name] = tensor
                continue
            axis = next((axis for end, axis in axes.items() if name.endswith(end)), 0)
            part[name] = tensor.chunk(shards, axis)[i].clone(memory_format=torch.contiguous_format)
        part["rope.freqs"] = torch.ones(params["dim"] // params["n_heads"] // 2, dtype=torch.bfloat16)
        torch.save(part, folder / f"consolidated.{i:02}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    return folder
