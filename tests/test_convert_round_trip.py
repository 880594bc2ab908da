"""Conversion moves every byte to where the other layout has it, and back: tensors and configurations come back equal.

What is written is read by safetensors and torch alone, and compared with a mapping of names and rows of our own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, make_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle.mistral import read_weights
from oracle.native_models import make_native, random_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantkit as package
from quantkit.errors import QuantkitError, UsageError

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


def typed(value: Any) -> Any:
    """1e6 and 1000000 are not the same line in a file."""
    return json.dumps(value, sort_keys=True)


# --- native → HF → native ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_native_comes_back(generation: str, files: Any, tmp_path: Path) -> None:
    dtype = DTYPES[(list(GENERATIONS).index(generation) + FILES.index(files)) % 3]
    source = make_native(tmp_path / "native", files=files, dtype=dtype, **GENERATIONS[generation])
    native, params = read_weights(source), params_of(source)
    ways = {"20kB": [(None, "safetensors"), ("20kB", None)], None: [(None, None), (None, "pth")]}
    for size in SIZES:
        hf = convert(source, tmp_path / f"hf {size}", "hf", shard_size=size)
        assert (len(weight_files(hf)) > 1) == (size is not None)
        assert_same(hf_weights(hf), expected_hf(native, params["head_dim"]))
        assert_sound(hf, source)
        for size_back, form in ways[size]:
            back = convert(
                hf, tmp_path / f"{size} {size_back} {form}", "mistral", shard_size=size_back, weights_format=form
            )
            assert_same(read_weights(back), native)
            # The one key that is added: without it, today's programs would take a million.
            assert typed(params_of(back)) == typed({"rope_theta": 1e4, **params})
            assert {p.suffix for p in weight_files(back)} == {".pth" if form == "pth" else ".safetensors"}
            assert (len(weight_files(back)) > 1) == (size_back is not None)
            # read_weights has looked into it
            assert (back / "consolidated.safetensors.index.json").exists() == (size_back is not None)
            assert_sound(back, hf)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("files", FILES)
def test_the_first_release_comes_back_with_its_nine_keys(files: Any, dtype: str, tmp_path: Path) -> None:
    source = make_native(tmp_path / "native", files=files, dtype=dtype, params_extra=V01)
    hf = convert(source, tmp_path / "hf", "hf")
    back = convert(hf, tmp_path / "back", "mistral", profile="one-file-ref-2023")
    assert params_of(back) == params_of(source)
    assert list(params_of(back)) == [
        "dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size",
        "sliding_window",
    ]  # fmt: skip
    assert [p.name for p in weight_files(back)] == ["consolidated.00.pth"]
    assert_same(read_weights(back), read_weights(source))
    assert_sound(back, hf)
    # and by itself, without the detour
    straight = convert(source, tmp_path / "straight", "mistral", profile="one-file-ref-2023")
    assert params_of(straight) == params_of(source)
    assert_same(read_weights(straight), read_weights(source))
    assert_sound(straight, source)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_native_from_one_kind_of_file_into_another(generation: str, tmp_path: Path) -> None:
    for files, form in product(FILES, ("safetensors", "pth")):
        source = make_native(tmp_path / files, files=files, **GENERATIONS[generation])
        out = convert(source, tmp_path / f"{files} {form}", "mistral", weights_format=form)
        one = "consolidated.00.pth" if form == "pth" else "consolidated.safetensors"
        assert [p.name for p in weight_files(out)] == [one]
        assert_same(read_weights(out), read_weights(source))
        assert typed(params_of(out)) == typed({"rope_theta": 1e4, **params_of(source)})
        assert_sound(out, source)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    n_kv_heads = draw(st.integers(1, 3))
    experts = draw(st.sampled_from([0, 0, 2, 3, 4]))
    return {
        "n_kv_heads": n_kv_heads,
        "n_heads": n_kv_heads * draw(st.integers(1, 4)),
        "head_dim": 2 * draw(st.integers(1, 32)),
        "dim": draw(st.integers(1, 40)),
        "hidden_dim": draw(st.integers(1, 40)),
        "n_layers": draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(1, 70)),
        "experts": experts,
        "experts_per_token": draw(st.integers(1, max(1, experts))),
        "megablocks": bool(experts) and draw(st.booleans()),
        "tied": draw(st.booleans()),
        "dtype": draw(st.sampled_from(DTYPES)),
        "files": draw(st.sampled_from(FILES)),
        "seed": draw(st.integers(0, 1000)),
        "params_extra": {"rope_theta": draw(st.sampled_from([1e4, 500.0, 1e6, 123456.75]))},
    }


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes(), st.sampled_from([None, 1000, 5000]), st.sampled_from([None, 1000, 5000]), st.booleans())
def test_any_shape_comes_back(
    tmp_path: Path, shape: dict[str, Any], size: int | None, size_back: int | None, pth: bool
) -> None:
    shutil.rmtree(tmp_path)
    source = make_native(tmp_path / "native", **shape)
    apart = make_native(tmp_path / "apart", **{**shape, "megablocks": False})  # the same numbers
    hf = convert(source, tmp_path / "hf", "hf", shard_size=size)
    assert_same(hf_weights(hf), expected_hf(read_weights(apart), shape["head_dim"]))
    assert_sound(hf, source)
    form, size_back = ("pth", None) if pth else (None, size_back)
    back = convert(hf, tmp_path / "back", "mistral", shard_size=size_back, weights_format=form)
    assert_same(read_weights(back), read_weights(apart))
    assert params_of(back) == params_of(source)
    assert_sound(back, hf)
    again = convert(back, tmp_path / "again", "hf", shard_size=size)
    assert_same(hf_weights(again), hf_weights(hf))
    assert typed(config_of(again)) == typed(config_of(hf))


# --- HF → native → HF -------------------------------------------------------------------------------------------------

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


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model as transformers saves it, by its name in HF_MODELS."""
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


def old_style(source: Path, folder: Path, *, shards: int) -> Path:
    """The same model as it was published in 2023: pytorch_model.bin with rotary buffers, a config.json of v4."""
    folder.mkdir()
    weights, config = hf_weights(source), config_of(source)
    for i in range(config["num_hidden_layers"]):
        weights[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        where = {}
        for i in range(shards):
            part = dict(list(weights.items())[i::shards])
            file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
            torch.save(part, folder / file)
            where.update(dict.fromkeys(part, file))
        index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": where}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    config |= {
        "torch_dtype": config.pop("dtype"), "rope_theta": config.pop("rope_parameters")["rope_theta"],
        "rope_scaling": None, "transformers_version": "4.36.0", "_name_or_path": "/home/somebody/model",
    }  # fmt: skip
    if config["model_type"] == "llama":
        config.pop("head_dim")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def without_code(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != "_name_or_path"}


@pytest.mark.parametrize("name", HF_MODELS)
def test_hf_comes_back(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    modern = saved(name)
    many = tmp_path / "many"
    assert config_of(modern)["model_type"] == HF_MODELS[name][0]
    package.convert(str(modern), many, "hf", recipe_of(shard_size="50kB"))
    sources = [modern, many] + [old_style(modern, tmp_path / f"old {n}", shards=n) for n in (1, 3)]
    for source in sources:
        original = {k: v for k, v in hf_weights(source).items() if not k.endswith("inv_freq")}
        for size, form, size_back in [(None, "safetensors", "20kB"), (None, "pth", None), ("20kB", None, None)]:
            native = convert(
                source, tmp_path / f"{source.name}, {size} {form}", "mistral", shard_size=size, weights_format=form
            )
            assert_same(expected_hf(read_weights(native), config_of(modern).get("head_dim") or 16), original)
            assert_sound(native, source)
            back = convert(native, tmp_path / f"{native.name} {size_back}", "hf", shard_size=size_back)
            assert_same(hf_weights(back), original)
            assert typed(config_of(back)) == typed(without_code(config_of(source)))
            assert_sound(back, native)


def test_hf_folders_of_the_two_generations_say_the_same_natively(saved: Callable[[str], Path], tmp_path: Path) -> None:
    for name in HF_MODELS:
        new = convert(saved(name), tmp_path / f"{name} new", "mistral")
        old_source = old_style(saved(name), tmp_path / f"{name} source", shards=1)
        old = convert(old_source, tmp_path / f"{name} old", "mistral")
        assert typed(params_of(new)) == typed(params_of(old))
        assert_same(read_weights(new), read_weights(old))


def test_a_second_way_round_changes_nothing(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """What is kept for the way back is handed on: there and back, there and back."""
    folders = [saved("llama")]
    for i in range(4):
        folders.append(convert(folders[-1], tmp_path / str(i), "hf" if i % 2 else "mistral"))
    assert typed(config_of(folders[4])) == typed(config_of(folders[2])) == typed(config_of(folders[0]))
    assert typed(params_of(folders[3])) == typed(params_of(folders[1]))
    assert_same(hf_weights(folders[4]), hf_weights(folders[0]))
    # through a change of the files on the native side, and on the HF side
    native = convert(folders[1], tmp_path / "native", "mistral", weights_format="pth")
    assert typed(config_of(convert(native, tmp_path / "hf", "hf"))) == typed(config_of(folders[0]))


def test_what_was_kept_survives_other_files_of_the_same_layout(tmp_path: Path) -> None:
    """native → HF → HF in many files → native."""
    source = make_native(tmp_path / "source", params_extra={**V01, "max_batch_size": 3})
    hf = convert(source, tmp_path / "one", "hf")
    many = convert(hf, tmp_path / "many", "hf", shard_size="20kB")
    assert params_of(convert(many, tmp_path / "end", "mistral")) == {**params_of(source), "rope_theta": 1e4}


# --- what is kept for the way back is not believed blindly ------------------------------------------------------------


def test_what_was_kept_does_not_return_if_the_model_changed(saved: Callable[[str], Path], tmp_path: Path) -> None:
    native = convert(saved("llama"), tmp_path / "native", "mistral")
    params = params_of(native)
    (native / "params.json").write_text(json.dumps({**params, "rope_theta": 5e5}))
    config = config_of(convert(native, tmp_path / "hf", "hf"))
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 5e5
    assert config["model_type"] == "mistral"
    source = make_native(tmp_path / "source", params_extra={"sliding_window": 6, "max_batch_size": 3})
    hf = convert(source, tmp_path / "there", "hf")
    (hf / "config.json").write_text(json.dumps({**config_of(hf), "sliding_window": 7}))
    back = params_of(convert(hf, tmp_path / "back", "mistral"))
    assert (back["sliding_window"], back["rope_theta"]) == (7, 1e4)
    assert "max_batch_size" not in back


def test_the_users_context_goes_before_what_was_kept(saved: Callable[[str], Path], tmp_path: Path) -> None:
    native = convert(saved("llama"), tmp_path / "native", "mistral")
    kept = config_of(saved("llama"))["max_position_embeddings"]
    assert config_of(convert(native, tmp_path / "kept", "hf"))["max_position_embeddings"] == kept
    said = convert(native, tmp_path / "said", "hf", native={"context": 999})
    assert config_of(said)["max_position_embeddings"] == 999


def test_the_files_context_goes_before_what_was_kept(saved: Callable[[str], Path], tmp_path: Path) -> None:
    native = convert(saved("llama"), tmp_path / "native", "mistral")
    (native / "params.json").write_text(json.dumps({**params_of(native), "max_seq_len": 777}))
    assert config_of(convert(native, tmp_path / "hf", "hf"))["max_position_embeddings"] == 777


# --- layouts that are read alone --------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_stacked_experts_become_the_same_experts(files: Any, dtype: str, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"experts": 3, "dtype": dtype, "params_extra": {"rope_theta": 1e6}}
    apart = make_native(tmp_path / "apart", **shape)
    stacked = make_native(tmp_path / "stacked", megablocks=True, files=files, **shape)
    assert "layers.0.block_sparse_moe.w2" in read_weights(stacked)
    for size in SIZES:
        hf = convert(stacked, tmp_path / f"hf {size}", "hf", shard_size=size)
        assert_same(hf_weights(hf), expected_hf(read_weights(apart), 16))
        assert_sound(hf, stacked)
    assert config_of(hf) == config_of(convert(apart, tmp_path / "other", "hf"))
    native = convert(stacked, tmp_path / "native", "mistral", weights_format="pth")
    assert_same(read_weights(native), read_weights(apart))
    assert_sound(native, stacked)


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


@pytest.mark.parametrize("n_kv_heads", [4, 8])
@pytest.mark.parametrize("columns", [True, False], ids=["Llama 2", "Llama 3"])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_metas_shards_become_one_model(shards: int, columns: bool, n_kv_heads: int, tmp_path: Path) -> None:
    shape: dict[str, Any] = {
        "dim": 64, "n_layers": 2, "head_dim": 8, "hidden_dim": 96, "n_heads": 8, "n_kv_heads": n_kv_heads,
        "vocab_size": 128,
    }  # fmt: skip
    dtype = "float16" if columns else "bfloat16"
    weights = random_weights({**shape, "norm_eps": 1e-5}, dtype, tied=False, megablocks=False, seed=0)
    params = {"dim": 64, "n_layers": 2, "n_heads": 8, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": -1}
    if n_kv_heads != 8:
        params["n_kv_heads"] = n_kv_heads
    if not columns:
        params |= {"rope_theta": 500000.0, "vocab_size": 128, "ffn_dim_multiplier": 1.3}
    source = meta_shards(tmp_path / "meta", weights, shards, params, columns=columns)
    whole = make_native(tmp_path / "whole", dtype=dtype, **shape)
    assert_same(read_weights(whole), weights)
    expected = hf_weights(convert(whole, tmp_path / "expected", "hf"))
    for size in SIZES:
        hf = convert(source, tmp_path / f"hf {size}", "hf", shard_size=size)
        assert_same(hf_weights(hf), expected)
        assert_same(hf_weights(hf), expected_hf(weights, 8))
        assert_sound(hf, source)
    config = config_of(hf)
    theta = 1e4 if columns else 5e5
    sizes = [config[k] for k in ("vocab_size", "intermediate_size", "head_dim", "num_key_value_heads")]
    assert sizes == [128, 96, 8, n_kv_heads]
    assert (config["model_type"], config["rope_theta"], config["rms_norm_eps"]) == ("llama", theta, 1e-5)
    native = convert(source, tmp_path / "native", "mistral")
    assert_same(read_weights(native), weights)
    assert params_of(native) == {**shape, "norm_eps": 1e-5, "rope_theta": theta}
    assert_sound(native, source)


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", ["one scale", "a scale a row", "a scale a row, as a column"])
def test_fp8_is_decoded(rows: str, scale_dtype: str, tmp_path: Path) -> None:
    source = make_native(tmp_path / "native", params_extra={"rope_theta": 1e6})
    plain = read_weights(source)
    stored: Weights = {}
    decoded: Weights = {}
    for name, tensor in plain.items():
        if tensor.dim() == 1 or not name.startswith("layers."):
            stored[name] = decoded[name] = tensor
            continue
        wide = tensor.float() * (1 + torch.arange(len(tensor)))[:, None]  # rows of sizes of their own
        largest = wide.abs().max() if rows == "one scale" else wide.abs().amax(1, keepdim=True)
        scale = (largest / 448).to(getattr(torch, scale_dtype))
        codes = (wide / scale.float()).to(torch.float8_e4m3fn)
        module = name.removesuffix(".weight")
        stored[name] = codes
        stored[f"{module}.qscale_weight"] = scale if "column" in rows else scale.reshape(scale.shape[:1])
        stored[f"{module}.qscale_act"] = torch.tensor(0.5)
        decoded[name] = (codes.to(torch.float32) * scale.float()).to(torch.bfloat16)
    save_file(stored, source / "consolidated.safetensors")
    quantization = {"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}}
    (source / "params.json").write_text(json.dumps({**params_of(source), **quantization}))
    for size in SIZES:
        hf = convert(source, tmp_path / f"hf {size}", "hf", shard_size=size)
        assert_same(hf_weights(hf), expected_hf(decoded, 16))
        assert_sound(hf, source)
    assert "quantization_config" not in config_of(hf)
    assert json.loads((hf / "quantkit.json").read_text())["method"]["decoded"] == 14
    for folder, origin in [(source, source), (hf, hf)]:
        native = convert(folder, tmp_path / f"from {origin.name}", "mistral")
        assert_same(read_weights(native), decoded)
        assert params_of(native).keys() == params_of(source).keys() - {"quantization"}
        assert_sound(native, origin)


def test_every_fp8_code_means_what_torch_means_by_it(tmp_path: Path) -> None:
    """All codes but the two NaNs, subnormal and largest ones included, under scales that round in bf16."""
    source = make_native(tmp_path / "native", dim=256, vocab_size=4, n_layers=1, params_extra={"rope_theta": 1e6})
    weights = read_weights(source)
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[0x7F, 0xFF]] = 0
    name = "layers.0.attention.wv"
    rows = weights[f"{name}.weight"].shape[0]
    fp8 = codes.repeat(rows, 1).view(torch.float8_e4m3fn)
    scale = torch.logspace(-9, 3, rows) * 1.2345
    save_file({**weights, f"{name}.weight": fp8, f"{name}.qscale_weight": scale}, source / "consolidated.safetensors")
    hf = convert(source, tmp_path / "hf", "hf")
    expected = (fp8.to(torch.float32) * scale[:, None]).to(torch.bfloat16)
    assert bits(hf_weights(hf)["model.layers.0.self_attn.v_proj.weight"]) == bits(expected)


@pytest.fixture(scope="module")
def large() -> tuple[dict[str, Any], Weights]:
    """Shape and weights of a model whose matrices have some 10 MB in bf16: three slabs of 4 MiB, or ten of 1."""
    shape = {"dim": 640, "n_layers": 1, "head_dim": 160, "hidden_dim": 7800, "n_heads": 48, "n_kv_heads": 24,
             "vocab_size": 7400}  # fmt: skip
    return shape, random_weights(shape, "bfloat16", tied=False, megablocks=False, seed=0)


@pytest.mark.parametrize("kind", ["plain", "fp8", "Meta 2", "Meta 3"])
def test_tensors_of_many_slabs(kind: str, large: tuple[dict[str, Any], Weights], tmp_path: Path) -> None:
    shape, weights = large
    source = tmp_path / "source"
    if kind.startswith("Meta"):
        params = {"dim": 640, "n_layers": 1, "n_heads": 4, "multiple_of": 8, "norm_eps": 1e-5, "vocab_size": -1}
        meta = {**shape, "n_heads": 4, "n_kv_heads": 4}
        weights = random_weights(meta, "bfloat16", tied=False, megablocks=False, seed=0)
        meta_shards(source, weights, 2, params, columns=kind == "Meta 2")
    else:
        source.mkdir()
        params = {**shape, "norm_eps": 1e-5, "rope_theta": 1e6}
        (source / "params.json").write_text(json.dumps(params))
        stored = dict(weights)
        if kind == "fp8":
            weights = dict(weights)
            for name in [n for n in weights if n.startswith("layers.") and weights[n].dim() > 1]:
                scale = torch.logspace(-6, 3, len(weights[name]))
                stored[name] = (weights[name].float() * 4096).to(torch.float8_e4m3fn)
                stored[name.replace(".weight", ".qscale_weight")] = scale
                weights[name] = (stored[name].to(torch.float32) * scale[:, None]).to(torch.bfloat16)
        save_file(stored, source / "consolidated.safetensors")
    outs = [
        convert(source, tmp_path / str(i), "hf", resources=resources)
        for i, resources in enumerate([{}, {"threads": 1, "max_memory": "160MiB"}])
    ]
    assert (outs[0] / "model.safetensors").read_bytes() == (outs[1] / "model.safetensors").read_bytes()
    assert_same(hf_weights(outs[0]), expected_hf(weights, 160))
    assert_sound(outs[0], source)
    back = convert(outs[0], tmp_path / "back", "mistral", weights_format="pth")
    assert_same(read_weights(back), weights)
    assert_sound(back, outs[0])


def test_experts_of_many_slabs(tmp_path: Path) -> None:
    shape: dict[str, Any] = {
        "dim": 640,
        "hidden_dim": 3700,
        "n_layers": 1,
        "experts": 3,
        "params_extra": {"rope_theta": 1e6},
    }
    apart = make_native(tmp_path / "apart", **shape)
    stacked = make_native(tmp_path / "stacked", megablocks=True, files="pth", **shape)
    hf = convert(stacked, tmp_path / "hf", "hf")
    assert_same(hf_weights(hf), expected_hf(read_weights(apart), 16))
    assert_sound(hf, stacked)


# --- folders that hold two layouts ------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_of_two_layouts_the_one_is_read_that_is_not_written(tmp_path: Path) -> None:
    """As official folders are; here the two are different models, so that it shows."""
    both = make_native(tmp_path / "both", params_extra={"rope_theta": 1e6})
    native = read_weights(both)
    other = make_native(tmp_path / "other", seed=1, params_extra={"rope_theta": 1e6})
    hf = convert(other, tmp_path / "hf", "hf")
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(hf / name, both / name)
    to_hf = convert(both, tmp_path / "to hf", "hf")
    assert_same(hf_weights(to_hf), expected_hf(native, 16))
    assert_sound(to_hf, both)
    to_native = convert(both, tmp_path / "to native", "mistral")
    assert_same(read_weights(to_native), read_weights(other))
    assert_sound(to_native, both)
    package.quantize(str(both), tmp_path / "quantized")
    package.quantize(str(hf), tmp_path / "expected")
    assert load_file(tmp_path / "quantized/model.safetensors").keys()
    assert (tmp_path / "quantized/model.safetensors").read_bytes() == (
        tmp_path / "expected/model.safetensors"
    ).read_bytes()
    assert package.verify(tmp_path / "quantized", source=str(both)).problems == ()
    # no second set of weights travels along
    assert [p.name for p in weight_files(to_hf)] == ["model.safetensors"]
    assert [p.name for p in weight_files(to_native)] == ["consolidated.safetensors"]
    assert not (to_hf / "params.json").exists()
    assert not (to_native / "config.json").exists()


# --- quantize reads native folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [{"bits": 4}, {"bits": 8}], ids=["nf4", "int8"])
@pytest.mark.parametrize("kind", ["safetensors", "pth", "pt-shards", "experts", "megablocks", "Nemo", "Meta"])
def test_quantizing_a_native_folder_gives_the_same_weights(kind: str, method: dict[str, Any], tmp_path: Path) -> None:
    extra = {"params_extra": {"rope_theta": 1e6}}
    if kind == "Meta":
        shape = {"dim": 64, "n_layers": 1, "head_dim": 16, "hidden_dim": 96, "n_heads": 4, "vocab_size": 128}
        weights = random_weights(shape, "bfloat16", tied=False, megablocks=False, seed=0)
        params = {"dim": 64, "n_layers": 1, "n_heads": 4, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": -1}
        source = meta_shards(tmp_path / "native", weights, 2, params, columns=True)
    elif kind in ("experts", "megablocks"):
        source = make_native(tmp_path / "native", experts=2, megablocks=kind == "megablocks", **extra)
    elif kind == "Nemo":
        source = make_native(tmp_path / "native", **GENERATIONS["Nemo"])
    else:
        source = make_native(tmp_path / "native", files=kind, **extra)  # type: ignore[arg-type]
    hf = convert(source, tmp_path / "hf", "hf")
    recipe = {"quantize": method}
    for folder in (source, hf):
        package.quantize(str(folder), tmp_path / f"{folder.name} quantized", recipe)
        assert package.verify(tmp_path / f"{folder.name} quantized", source=str(folder)).problems == ()
    one, other = (load_file(tmp_path / f"{name} quantized/model.safetensors") for name in ("native", "hf"))
    assert any(t.dtype in (torch.uint8, torch.int8) for t in one.values())
    assert_same(one, other)
    if kind not in ("megablocks", "pt-shards"):  # there the tensors lie in another order
        one_file, other_file = (tmp_path / f"{name} quantized/model.safetensors" for name in ("native", "hf"))
        assert one_file.read_bytes() == other_file.read_bytes()
    assert config_of(tmp_path / "native quantized") == config_of(tmp_path / "hf quantized")


# --- verify -----------------------------------------------------------------------------------------------------------


def reseal(folder: Path) -> None:
    """Puts the checksums of what is there now into the manifest, as somebody would who has something to hide."""
    path = folder / "quantkit.json"
    manifest = json.loads(path.read_text())
    for row in manifest["files"]:
        row["sha256"] = hashlib.sha256((folder / row["name"]).read_bytes()).hexdigest()
    path.write_text(json.dumps(manifest))


def rewrite(folder: Path, weights: Weights) -> None:
    """The same tensors at the same places, with other contents."""
    (file,) = weight_files(folder)
    if file.suffix == ".safetensors":
        raw = bytearray(file.read_bytes())
        (size,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + size])
        for name, tensor in weights.items():
            begin, end = header[name]["data_offsets"]
            raw[8 + size + begin : 8 + size + end] = bits(tensor)
        file.write_bytes(raw)
    else:
        torch.save(weights, file)


@pytest.mark.parametrize("way", ["to hf", "to native", "to pth"])
@pytest.mark.parametrize(
    "damage", ["a flipped byte", "two swapped tensors", "q in the other order", "v in another order"]
)
def test_verify_finds(damage: str, way: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    if way == "to hf":
        source = make_native(tmp_path / "source", params_extra={"rope_theta": 1e6})
        out = convert(source, tmp_path / "out", "hf")
        names = {k: f"model.layers.1.self_attn.{k}_proj.weight" for k in "qkv"}
        norms = [f"model.layers.0.{n}.weight" for n in ("input_layernorm", "post_attention_layernorm")]
        weights = hf_weights(out)
    else:
        source = saved("mistral")
        out = convert(source, tmp_path / "out", "mistral", weights_format="pth" if way == "to pth" else None)
        names = {k: f"layers.1.attention.w{k}.weight" for k in "qkv"}
        norms = ["layers.0.attention_norm.weight", "layers.0.ffn_norm.weight"]
        weights = read_weights(out)
    assert_sound(out, source)
    sizes = {p.name: p.stat().st_size for p in out.iterdir()}
    canonical = {k: f"model.layers.1.self_attn.{k}_proj.weight" for k in "qkv"}
    if damage == "a flipped byte":
        flipped = weights[names["k"]].clone()
        flipped.view(torch.uint8)[3, 5] ^= 1
        weights[names["k"]] = flipped
        blamed = {canonical["k"]}
    elif damage == "two swapped tensors":
        k, v = (weights[names[x]] for x in "kv")
        weights |= {names["k"]: v, names["v"]: k}
        blamed = {canonical["k"], canonical["v"]}
    else:
        which = damage[0]
        weights[names[which]] = in_halves(weights[names[which]], 16)
        blamed = {canonical[which]}
    assert norms[0] in weights
    rewrite(out, weights)
    assert {p.name: p.stat().st_size for p in out.iterdir()} == sizes or way == "to pth"
    file = weight_files(out)[0].name
    problems = package.verify(out, source=str(source)).problems
    assert any(p.startswith(file) and ("SHA-256" in p or "bytes" in p) for p in problems)
    assert package.verify(out).problems  # and without the source
    if way == "to pth":  # torch.save makes a file of another size: the manifest must not stumble over that
        manifest = json.loads((out / "quantkit.json").read_text())
        for row in manifest["files"]:
            row["bytes"] = (out / row["name"]).stat().st_size
        (out / "quantkit.json").write_text(json.dumps(manifest))
    reseal(out)
    problems = package.verify(out, source=str(source)).problems
    assert {name for name in weights_of(source) if any(repr(name) in p for p in problems)} == blamed
    assert len(problems) == len(blamed)


def weights_of(source: Path) -> list[str]:
    """Canonical names."""
    if (source / "params.json").exists():
        return list(expected_hf(read_weights(source), 16))
    return list(hf_weights(source))


def test_verify_with_another_source(tmp_path: Path) -> None:
    source = make_native(tmp_path / "source", params_extra={"rope_theta": 1e6})
    other = make_native(tmp_path / "other", seed=1, params_extra={"rope_theta": 1e6})
    for to in ("hf", "mistral"):
        out = convert(source, tmp_path / to, to)
        assert_sound(out, source)
        assert len(package.verify(out, source=str(other)).problems) == 21


# --- the plan ---------------------------------------------------------------------------------------------------------


def assert_planned(source: Path, out: Path, to: str, **keys: Any) -> None:
    recipe = recipe_of(to=to, **keys)
    job = package.plan(str(source), recipe)
    package.convert(str(source), out, to, recipe)  # type: ignore[arg-type]
    written = {p.name: p.stat().st_size for p in out.iterdir()}
    assert written == {f.name: f.nbytes for f in job.files}
    assert len(job.files) == len(written)
    assert sum(written.values()) == job.disk
    assert json.loads((out / "quantkit.json").read_text())["plan_hash"] == job.hash


@pytest.mark.parametrize("generation", [*GENERATIONS, "megablocks"])
def test_sizes_are_planned_to_the_byte(generation: str, tmp_path: Path) -> None:
    shape = GENERATIONS.get(generation) or {**GENERATIONS["Mixtral"], "megablocks": True}
    for files in FILES:
        source = make_native(tmp_path / files, files=files, **shape)
        assert_planned(source, tmp_path / f"{files} hf", "hf")
        assert_planned(source, tmp_path / f"{files} many", "hf", shard_size="20kB")
        assert_planned(source, tmp_path / f"{files} unchecked", "hf", check=False)
    hf = tmp_path / "safetensors many"
    for i, keys in enumerate([{}, {"weights_format": "pth"}, {"shard_size": "20kB"}, {"check": False}]):
        assert_planned(hf, tmp_path / f"native {i}", "mistral", **keys)
    if generation == "v0.1":
        assert_planned(hf, tmp_path / "2023", "mistral", profile="one-file-ref-2023")


@pytest.mark.parametrize("way", ["hf", "mistral", "pth", "2023", "meta"])
def test_two_runs_give_the_same_bytes(way: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    if way == "meta":
        shape = {"dim": 64, "n_layers": 1, "head_dim": 16, "hidden_dim": 96, "n_heads": 4, "vocab_size": 128}
        weights = random_weights(shape, "bfloat16", tied=False, megablocks=False, seed=0)
        params = {"dim": 64, "n_layers": 1, "n_heads": 4, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": -1}
        source = meta_shards(tmp_path / "meta", weights, 2, params, columns=True)
    elif way == "hf":
        source = make_native(tmp_path / "native", experts=3, megablocks=True, files="pt-shards", dtype="float32")
    elif way == "2023":
        source = make_native(tmp_path / "native", params_extra=V01)
    else:
        source = saved("mixtral")
    to = "hf" if way in ("hf", "meta") else "mistral"
    keys = {"pth": {"weights_format": "pth"}, "2023": {"profile": "one-file-ref-2023"}, "hf": {"shard_size": "20kB"}}
    outs = []
    for i, resources in enumerate([{"threads": 1}, {"threads": 2}, {"threads": 2, "max_memory": "300MiB"}]):
        outs.append(convert(source, tmp_path / str(i), to, resources=resources, **keys.get(way, {})))
    assert contents(outs[0]) == contents(outs[1]) == contents(outs[2])


def headers_alone(source: Path, folder: Path) -> Path:
    """The folder of the same name with its weight files cut off after their headers."""
    shutil.copytree(source, folder)
    for file in folder.glob("*.safetensors"):
        with file.open("r+b") as f:
            f.truncate(8 + struct.unpack("<Q", f.read(8))[0])
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "safetensors-shards", "megablocks", "tied", "fp8", "HF", "HF, many"])
def test_headers_alone_give_the_same_plan(kind: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    if kind in ("HF", "HF, many"):
        source, to = saved("mixtral"), "mistral"
        if kind == "HF, many":
            source = convert(source, tmp_path / "model", "hf", shard_size="50kB")
    else:
        files: Any = kind if kind in FILES else "safetensors"
        shape: dict[str, Any] = {"experts": 2, "megablocks": True} if kind == "megablocks" else {"tied": kind == "tied"}
        source, to = make_native(tmp_path / "model", files=files, params_extra={"rope_theta": 1e6}, **shape), "hf"
        if kind == "fp8":
            weights = read_weights(source)
            name = "layers.0.attention.wq"
            weights[f"{name}.weight"] = weights[f"{name}.weight"].to(torch.float8_e4m3fn)
            weights[f"{name}.qscale_weight"] = torch.ones(64)
            save_file(weights, source / "consolidated.safetensors")
    (tmp_path / "cut").mkdir()
    cut = headers_alone(source, tmp_path / "cut" / source.name)
    for recipe in (recipe_of(to=to), recipe_of(to=to, shard_size="20kB"), {"quantize": {"bits": 4}}):
        whole, planned = (package.plan(str(folder), recipe) for folder in (source, cut))
        assert planned.hash == whole.hash
        assert planned.to_json() == whole.to_json()
        assert planned.draft == whole.draft
    with pytest.raises(QuantkitError):
        convert(cut, tmp_path / "out", to)
    assert not (tmp_path / "out" / "config.json").exists()


def test_one_hash_is_one_folder(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """The manifest keeps the source's config.json; so two that differ are two plans."""
    recipe = recipe_of(to="mistral")
    one = package.plan(str(saved("mistral")), recipe)
    other = tmp_path / saved("mistral").name
    shutil.copytree(saved("mistral"), other)
    (other / "config.json").write_text(json.dumps({**config_of(other), "bos_token_id": 7}))
    found = package.plan(str(other), recipe)
    assert found.draft["recorded"] != one.draft["recorded"]
    assert found.hash != one.hash


# --- what is refused --------------------------------------------------------------------------------------------------


def without(folder: Path, name: str) -> Iterator[tuple[str, Weights]]:
    weights = read_weights(folder)
    yield "missing", {k: v for k, v in weights.items() if k != name}
    yield "of another shape", {**weights, name: weights[name][:-1].clone()}
    yield "left over", {**weights, name.replace("layers.0", "layers.0.again"): weights[name].clone()}


def test_a_tensor_missing_misshapen_or_left_over_is_refused(tmp_path: Path) -> None:
    for name in ("layers.0.attention.wk.weight", "layers.0.ffn_norm.weight", "layers.0.feed_forward.w2.weight"):
        source = make_native(tmp_path / name, params_extra={"rope_theta": 1e6})
        for what, weights in without(source, name):
            save_file(weights, source / "consolidated.safetensors")
            with pytest.raises(QuantkitError):
                package.plan(str(source), recipe_of(to="hf"))
            with pytest.raises(QuantkitError):
                convert(source, tmp_path / f"{name} {what}", "hf")


def test_a_layer_too_many_is_refused(tmp_path: Path) -> None:
    """mistral-inference loads strictly. With its config.json, transformers would leave the layer out, and say so in a
    line of its log: a model cut short."""
    source = make_native(tmp_path / "native", n_layers=3, params_extra={"rope_theta": 1e6})
    hf = convert(source, tmp_path / "hf", "hf")
    (source / "params.json").write_text(json.dumps({**params_of(source), "n_layers": 2}))
    with pytest.raises(QuantkitError, match="layer"):
        package.plan(str(source), recipe_of(to="hf"))
    (hf / "config.json").write_text(json.dumps({**config_of(hf), "num_hidden_layers": 2}))
    with pytest.raises(QuantkitError, match="layer"):
        package.plan(str(hf), recipe_of(to="mistral"))


def test_an_expert_too_many_is_refused(tmp_path: Path) -> None:
    source = make_native(tmp_path / "native", experts=2, params_extra={"rope_theta": 1e6})
    weights = read_weights(source)
    more = {
        k.replace("experts.1", "experts.2"): v.clone()
        for k, v in weights.items()
        if "layers.0" in k and "experts.1" in k
    }
    save_file({**weights, **more}, source / "consolidated.safetensors")
    with pytest.raises(QuantkitError, match="expert"):
        package.plan(str(source), recipe_of(to="hf"))


def test_one_file_cannot_be_many(saved: Callable[[str], Path], tmp_path: Path) -> None:
    for keys in ({"weights_format": "pth"}, {"profile": "one-file-ref-2023"}):
        with pytest.raises(UsageError, match="one file"):
            convert(saved("llama"), tmp_path / "out", "mistral", shard_size="20kB", **keys)
    with pytest.raises(UsageError, match="safetensors"):
        convert(saved("llama"), tmp_path / "out", "mistral", profile="one-file-ref-2023", weights_format="safetensors")


def test_a_run_without_the_check_writes_the_same(tmp_path: Path) -> None:
    source = make_native(tmp_path / "native", experts=2, megablocks=True, params_extra={"rope_theta": 1e6})
    checked = convert(source, tmp_path / "checked", "hf")
    unchecked = convert(source, tmp_path / "unchecked", "hf", check=False)
    assert (checked / "model.safetensors").read_bytes() == (unchecked / "model.safetensors").read_bytes()
    assert_sound(unchecked, source)
    assert config_of(checked) == config_of(unchecked)
