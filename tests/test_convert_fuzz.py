"""Whatever strangers' JSON says: refused, or converted right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from convert_inputs import (
    DIM,
    ESCAPES,
    FP8,
    HEAD_DIM,
    HEADS,
    KEY_VALUE,
    NORM,
    SIZES,
    THETA,
    VISION,
    VOCABULARY,
    W1,
    WO,
    WQ,
    assert_same,
    base_config,
    canonical,
    hf_name,
    written,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit import api
from quantkit.errors import InputError, QuantkitError

fuzz = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

odd_text = st.text(st.characters(), max_size=6) | st.sampled_from(["", "\ud800", ESCAPES, "fp8_e4m3", "auto_map"])

odd_number = (
    st.integers(-2, 130) | st.sampled_from([2**31 - 1, 2**31, 2**63, 10**30, 10**400, 1e-9, 1e6, 1e308]) | st.floats()
)

json_value = st.recursive(
    st.none() | st.booleans() | odd_number | odd_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_text, inner, max_size=3),
    max_leaves=5,
)

PARAMS = {"dim": DIM, "n_layers": 2, "head_dim": HEAD_DIM, "hidden_dim": 96, "n_heads": HEADS, "n_kv_heads": KEY_VALUE,
          "norm_eps": 1e-5, "vocab_size": VOCABULARY, **THETA}  # fmt: skip

MORE_PARAMS = ("sliding_window", "_sliding_window", "moe", "yarn", "llama_4_scaling", "tied_embeddings", "max_seq_len",
               "max_position_embeddings", "vision_encoder", "multimodal", "quantization", "quantization_config",
               "model_type", "activation", "use_biases", "max_batch_size", "lora", "dtype", "torch_dtype",
               "multiple_of", "ffn_dim_multiplier", "q_lora_rank", "hidden_size")  # fmt: skip

params_key = st.sampled_from([*PARAMS, *MORE_PARAMS])

MORE_CONFIG = ("rope_parameters", "rope_scaling", "layer_types", "attention_bias", "mlp_bias", "quantization_config",
               "partial_rotary_factor", "num_local_experts", "num_experts_per_tok", "text_config", "vision_config",
               "use_sliding_window", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "auto_map",
               "_attn_implementation", "attention_dropout", "use_cache", "per_layer_config")  # fmt: skip

config_key = st.sampled_from([*base_config(), *MORE_CONFIG])

yarn = st.fixed_dictionaries(
    {"factor": odd_number, "original_max_position_embeddings": odd_number, "beta": odd_number, "alpha": odd_number},
    optional={"apply_scale": st.booleans() | json_value},
)

windows = st.lists(st.sampled_from([None, 16, 32]), min_size=1, max_size=2)


def windows_of(table: Mapping[str, Any]) -> list[int | None]:
    """Of each layer, by params.json."""
    given = next((table[k] for k in ("sliding_window", "_sliding_window") if table.get(k) is not None), None)
    return (given if isinstance(given, list) else [given]) * 2


def windows_of_config(table: Mapping[str, Any]) -> list[int | None]:
    types = table.get("layer_types") or ["sliding_attention"] * table["num_hidden_layers"]
    return [table.get("sliding_window") if t == "sliding_attention" else None for t in types]


def theta_of(table: Mapping[str, Any]) -> float:
    if table.get("rope_theta") is not None:
        return float(table["rope_theta"])
    return 1e4 if type(table.get("sliding_window")) is int else 1e6


def theta_of_config(table: Mapping[str, Any]) -> float:
    tables = (table, table.get("rope_parameters") or {}, table.get("rope_scaling") or {})
    (theta,) = {float(t["rope_theta"]) for t in tables if t.get("rope_theta") is not None}
    return theta


def assert_facts(native: Mapping[str, Any], table: Mapping[str, Any]) -> None:
    """params.json and config.json say the same, and neither says anything else that counts."""
    for hf, key in SIZES.items():
        assert type(table[hf]) in (int, float)
        assert table[hf] == native[key]
    heads, kv = native["n_heads"], native.get("n_kv_heads") or native["n_heads"]
    assert (table.get("num_key_value_heads") or heads) == kv
    head_dim = native.get("head_dim") or native["dim"] // heads
    assert (table.get("head_dim") or table["hidden_size"] // heads) == head_dim
    assert theta_of(native) == theta_of_config(table)
    layers = native["n_layers"]
    assert (windows_of(native) * layers)[:layers] == windows_of_config(table)
    assert bool(native.get("tied_embeddings")) == bool(table.get("tie_word_embeddings"))
    stretched = native.get("yarn")
    for rope in (table.get("rope_parameters"), table.get("rope_scaling")):
        kind = (rope or {}).get("rope_type", (rope or {}).get("type", "default"))
        assert kind == ("yarn" if stretched and rope else "default")
        if stretched and rope:
            ours = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
            theirs = ("factor", "original_max_position_embeddings", "beta", "alpha")
            assert [float(rope[k]) for k in ours] == [float(stretched[k]) for k in theirs]
    assert table.get("hidden_act", "silu") == "silu"
    for key in ("attention_bias", "mlp_bias", "quantization_config", "vision_config", "per_layer_config"):
        assert not table.get(key)
    assert table.get("partial_rotary_factor") in (None, 1)
    for key in ("moe", "lora", "quantization", "quantization_config", "vision_encoder", "multimodal", "use_biases"):
        assert not native.get(key)
    assert native.get("activation") in (None, "silu")
    context = native.get("max_position_embeddings") or native.get("max_seq_len")
    said = table.get("max_position_embeddings")
    assert context is None or said == context
    assert said is None or (type(said) is int and 0 < said < 2**31)
    for key in ("auto_map", "_attn_implementation", "attn_implementation", "_name_or_path"):
        assert f'"{key}": ' not in json.dumps(table)


def convert(source: Path, out: Path, to: Any) -> bool:
    """Whether it was converted. Anything but success and a QuantkitError escapes."""
    shutil.rmtree(out, ignore_errors=True)
    refusal: QuantkitError | None = None
    try:
        api.convert(str(source), out, to, {"convert": {"tokenizer": False}})
    except QuantkitError as e:
        refusal = e
    if refusal is not None:
        assert len(str(refusal)) < 5000
        assert refusal.where
        assert refusal.hint
        assert isinstance(refusal, InputError)
        assert not out.exists(), "refused, and yet written"
        return False
    manifest = written(out, "quantkit.json")
    assert not api.verify(out, source=str(source)).problems
    assert manifest["result"]["layout"] == to
    return True


WEIGHT_NAMES = ("tok_embeddings.weight", "norm.weight", "output.weight", W1, NORM, WQ, WO)


def without_computed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what is no weight: buffers, and scales of what is not in FP8."""
    ends = ("rope.freqs", ".rotary_emb.inv_freq", ".qscale_weight", ".qscale_act")
    return {n: x for n, x in weights.items() if not n.endswith(ends)}


def in_doubles(value: Any) -> Any:
    """A JSON value with every number as readers of JSON hold it."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: in_doubles(v) for k, v in items}
    return float(value) if type(value) in (int, float) else value


def to_hf_and_back(native: Path, out: Path) -> bool:
    """Whether it could be converted; if so, what was written is right, and so is what is made of that again."""
    if not convert(native, out, "hf"):
        return False
    says = json.loads((native / "params.json").read_text(encoding="utf-8-sig"))
    stored = without_computed(load_file(native / "consolidated.safetensors"))
    wanted = canonical(stored, says.get("head_dim") or says["dim"] // says["n_heads"])
    if says.get("tied_embeddings"):
        wanted.pop("lm_head.weight", None)
        stored.pop("output.weight", None)
    assert_same(load_file(out / "model.safetensors"), wanted)
    table = written(out)
    effective = {**says, "quantization": None, "quantization_config": None, "lora": None}  # of the weights' storage
    assert_facts(effective, table)
    back = out.with_name("back")
    assert convert(out, back, "mistral")
    assert_same(load_file(back / "consolidated.safetensors"), stored)
    again = written(back, "params.json")
    assert_facts(again, table)
    for key in PARAMS:
        if says.get(key) is not None:
            assert in_doubles(again[key]) == in_doubles(says[key])
    return True


@fuzz
@given(json_value | st.dictionaries(params_key | odd_text, json_value, max_size=12))
@example(PARAMS)
@example({**PARAMS, "lora": float("nan")})
@example({**PARAMS, "dtype": {"a": [float("inf")]}})
@example({**PARAMS, "max_batch_size": 10**400})
def test_any_json_as_params(native: Path, out: Path, value: Any) -> None:
    (native / "params.json").write_text(json.dumps(value))
    to_hf_and_back(native, out)


@fuzz
@given(
    params_key | odd_text,
    json_value | yarn | windows | st.sampled_from(["transformer", "silu", 16, 64]),
    st.booleans(),
)
@example("head_dim", None, False)
@example("n_kv_heads", None, False)
@example("sliding_window", [16, None], False)
@example("sliding_window", [None, None], True)
@example("sliding_window", 16, True)
@example("yarn", {"factor": 4, "original_max_position_embeddings": 64, "beta": 32, "alpha": 1}, False)
@example("quantization", {"qformat_weight": "fp8_e4m3"}, False)
@example("model_type", "transformer", False)
def test_one_value_of_params_is_any_other(native: Path, out: Path, key: str, value: Any, silent: bool) -> None:
    """`silent`: without rope_theta, whose default hangs on the rest."""
    table = {**PARAMS, key: value}
    if silent:
        table.pop("rope_theta", None)
    (native / "params.json").write_text(json.dumps(table))
    done = to_hf_and_back(native, out)
    if table == PARAMS:
        assert done


odd_name = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6) | st.sampled_from(
    [*WEIGHT_NAMES, hf_name(WQ), "rope.freqs", "layers.0.attention.rotary_emb.inv_freq", "layers.2.ffn_norm.weight",
     "layers.0.attention.wq.qscale_weight", "layers.0.attention.wq.qscale_act", "layers.01.ffn_norm.weight", VISION,
     "layers.0.block_sparse_moe.w1", "layers.-1.ffn_norm.weight", "layers.9999999999.ffn_norm.weight", "../x"]
)  # fmt: skip

odd_tensor = st.tuples(
    st.lists(st.sampled_from([0, 1, 2, 16, 32, 64, 96, 320]), max_size=3),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float16, torch.int8, FP8, torch.bool]),
)


@fuzz
@given(
    st.dictionaries(odd_name, odd_tensor, max_size=3),
    st.sets(st.sampled_from(WEIGHT_NAMES), max_size=1),
    st.sampled_from(["safetensors", "pth"]),
)
@example({"rope.freqs": ([16], torch.float32)}, set(), "safetensors")
@example({"layers.0.attention.wq.qscale_weight": ([], torch.float32)}, set(), "safetensors")
@example({W1: ([96, 64], torch.int8)}, set(), "safetensors")
@example({NORM: ([64], torch.float32)}, set(), "safetensors")
def test_any_tensors_beside_valid_params(
    models: Path, native: Path, out: Path, more: dict[str, tuple[list[int], torch.dtype]], less: set[str], form: str
) -> None:
    weights = load_file(models / "native/consolidated.safetensors")
    weights = {n: x for n, x in weights.items() if n not in less}
    for name, (shape, dtype) in more.items():
        weights[name] = torch.zeros(shape, dtype=dtype)
    for path in native.glob("consolidated*"):
        path.unlink()
    if form == "safetensors":
        save_file(weights, native / "consolidated.safetensors")
        to_hf_and_back(native, out)
    else:
        torch.save(weights, native / "consolidated.00.pth")
        if convert(native, out, "hf"):
            assert_same(load_file(out / "model.safetensors"), canonical(without_computed(weights), HEAD_DIM))


@fuzz
@given(st.data())
def test_any_record_beside_a_native_folder(models: Path, native: Path, out: Path, data: st.DataObject) -> None:
    """quantkit.json comes from anybody. It may bring back what config.json said besides the facts, and nothing else."""
    changes = data.draw(st.dictionaries(config_key | odd_text, json_value | windows, max_size=2))
    kept = data.draw(json_value | st.just({**base_config(), **changes}))
    extra = data.draw(st.sampled_from([{}, {"sliding_window": 16}, {"sliding_window": [None, 16]}]))
    (native / "params.json").write_text(json.dumps({**PARAMS, **extra}))
    whole = data.draw(json_value | st.just({"recorded": kept}) | st.just({"recorded": {"config.json": kept}}))
    (native / "quantkit.json").write_text(json.dumps(whole))
    assert to_hf_and_back(native, out), "a manifest is not the model: what it says refuses nothing"


@fuzz
@given(st.data())
def test_any_record_beside_a_hugging_face_folder(models: Path, hf: Path, out: Path, data: st.DataObject) -> None:
    changes = data.draw(st.dictionaries(params_key | odd_text, json_value | windows | yarn, max_size=2))
    kept = data.draw(json_value | st.just({**PARAMS, **changes}))
    whole = data.draw(json_value | st.just({"recorded": kept}) | st.just({"recorded": {"params.json": kept}}))
    (hf / "quantkit.json").write_text(json.dumps(whole))
    assert convert(hf, out, "mistral"), "a manifest is not the model: what it says refuses nothing"
    assert_same(load_file(out / "consolidated.safetensors"), load_file(models / "native/consolidated.safetensors"))
    table = json.loads((hf / "config.json").read_text())
    native = written(out, "params.json")
    assert_facts({k: v for k, v in native.items() if k not in ("max_seq_len", "max_position_embeddings")}, table)


LLAMA = {"dim": DIM, "n_layers": 2, "n_heads": HEADS, "n_kv_heads": KEY_VALUE, "multiple_of": 32, "norm_eps": 1e-5,
         "vocab_size": -1}  # fmt: skip

llama_key = st.sampled_from(
    [*LLAMA, "rope_theta", "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor", "max_seq_len",
     "max_batch_size", "ffn_dim_multiplier", "model_parallel_size", "hidden_dim"]
)  # fmt: skip


@fuzz
@given(llama_key | odd_text, json_value, st.booleans())
def test_one_value_of_llamas_params_is_any_other(
    models: Path, llama: Path, out: Path, key: str, value: Any, scaled: bool
) -> None:
    table = {**LLAMA, **({"use_scaled_rope": True, "rope_theta": 5e5} if scaled else {}), key: value}
    (llama / "params.json").write_text(json.dumps(table))
    if convert(llama, out, "hf"):
        assert_same(load_file(out / "model.safetensors"), load_file(models / "hf/model.safetensors"))
        found = written(out)
        context = found["max_position_embeddings"]
        assert type(context) is int
        assert 0 < context < 2**31
        assert 0 < found["rms_norm_eps"] < 1
        assert found["rms_norm_eps"] == table["norm_eps"]
        assert found["num_key_value_heads"] == (table.get("n_kv_heads") or HEADS)
        assert found["rope_theta"] == (table.get("rope_theta") or 10000)
        assert (found["rope_parameters"]["rope_type"] == "llama3") == (table.get("use_scaled_rope") is True)
