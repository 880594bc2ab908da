"""Every kind of source becomes the tensors that it stands for: those that are never written (stacked experts, Meta's
shards, FP8), folders that hold two layouts, and native folders that are quantized at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle.mistral import read_weights
from oracle.native_models import make_native, random_weights
from round_trips import (
    DTYPES,
    FILES,
    GENERATIONS,
    SIZES,
    Weights,
    assert_same,
    assert_sound,
    bits,
    config_of,
    convert,
    expected_hf,
    hf_weights,
    meta_shards,
    params_of,
    weight_files,
)
from safetensors.torch import load_file, save_file

import quantkit as package

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
