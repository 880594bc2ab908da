"""params.json ↔ Facts ↔ config.json by themselves: no torch, no transformers. test_mistral_config_transformers.py has
what transformers makes of the configs, test_mistral_bad_config.py what is refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import SourceError
from quantkit.layouts.mistral_config import (
    Facts,
    Yarn,
    config_of_facts,
    context_of_config,
    context_of_params,
    default_context,
    facts_of_config,
    facts_of_params,
    generation,
    native_quantization,
    params_of_facts,
    restore_config,
    restore_params,
)

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"

Json = dict[str, Any]

V01: Json = {
    "dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
    "norm_eps": 1e-05, "sliding_window": 4096, "vocab_size": 32000,
}  # fmt: skip
V02: Json = {**{k: v for k, v in V01.items() if k != "sliding_window"}, "rope_theta": 1e6}
V03: Json = {**V02, "vocab_size": 32768}
CODESTRAL: Json = {**V03, "dim": 6144, "n_layers": 56, "hidden_dim": 16384, "n_heads": 48}
LARGE2: Json = {**V03, "dim": 12288, "n_layers": 88, "hidden_dim": 28672, "n_heads": 96}
MIXTRAL: Json = {**V02, "moe": {"num_experts": 8, "num_experts_per_tok": 2}}
MIXTRAL_8X22B: Json = {**CODESTRAL, "moe": {"num_experts": 8, "num_experts_per_tok": 2}}
NEMO: Json = {**V02, "dim": 5120, "n_layers": 40, "vocab_size": 131072}
SMALL3: Json = {**NEMO, "hidden_dim": 32768, "rope_theta": 1e8}
SMALL31: Json = {**SMALL3, "rope_theta": 1e9, "vision_encoder": {"hidden_size": 1024, "image_token_id": 10}}
MINISTRAL_8B: Json = {
    **V02, "n_layers": 36, "hidden_dim": 12288, "vocab_size": 131072, "rope_theta": 1e8,
    "sliding_window": [None, 32768, 32768, 32768],
}  # fmt: skip
MINISTRAL_3: Json = {
    **V02, "n_layers": 34, "vocab_size": 131072, "tied_embeddings": True, "max_position_embeddings": 262144,
    "yarn": {"factor": 16, "original_max_position_embeddings": 16384, "beta": 32, "alpha": 1, "apply_scale": False},
    "llama_4_scaling": {"original_max_position_embeddings": 16384, "beta": 0.1},
    "quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"},
}  # fmt: skip


def facts_of(params: Json, **options: Any) -> Facts:
    return facts_of_params(params, where="params.json", **options)[0]


# --- every generation -------------------------------------------------------------------------------------------------

# params, its name, context, whether that is assumed, and the essentials of its config.json
GOLDEN = [
    (V01, "7B v0.1", 32768, True, {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "rope_theta": 10000.0, "sliding_window": 4096,
        "rms_norm_eps": 1e-5, "vocab_size": 32000, "head_dim": 128, "num_key_value_heads": 8}),
    (V02, "7B v0.2", 32768, True, {"model_type": "mistral", "rope_theta": 1e6, "sliding_window": None}),
    (V03, "v0.3 family", 32768, True, {"rope_theta": 1e6, "sliding_window": None, "vocab_size": 32768}),
    (CODESTRAL, "v0.3 family", 32768, True, {"hidden_size": 6144, "num_hidden_layers": 56, "head_dim": 128}),
    (LARGE2, "v0.3 family", 131072, True, {"hidden_size": 12288, "num_attention_heads": 96}),
    (MIXTRAL, "Mixtral", 32768, True, {
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8,
        "num_experts_per_tok": 2, "rope_theta": 1e6, "sliding_window": None}),
    (MIXTRAL_8X22B, "Mixtral", 65536, True, {"model_type": "mixtral", "intermediate_size": 16384}),
    (NEMO, "Nemo / Small 3", 131072, True, {"hidden_size": 5120, "head_dim": 128, "num_attention_heads": 32}),
    (SMALL3, "Nemo / Small 3", 32768, True, {"rope_theta": 1e8, "intermediate_size": 32768}),
    (MINISTRAL_8B, "Ministral 8B", 131072, True, {
        "model_type": "ministral", "architectures": ["MinistralForCausalLM"], "sliding_window": 32768,
        "layer_types": (["full_attention"] + ["sliding_attention"] * 3) * 9}),
    (MINISTRAL_3, "Ministral 3", 262144, False, {
        "model_type": "ministral3", "architectures": ["Ministral3ForCausalLM"], "tie_word_embeddings": True,
        "sliding_window": None, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
            "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1}}),
]  # fmt: skip


@pytest.mark.parametrize(("params", "name", "context", "assumed", "essentials"), GOLDEN)
def test_every_generation(params: Json, name: str, context: int, assumed: bool, essentials: Json) -> None:
    facts = facts_of(params)
    assert generation(facts) == name
    assert default_context(facts) == (context, assumed)
    config = config_of_facts(facts, dtype="BF16", context=context)
    assert {key: config[key] for key in essentials} == essentials
    assert facts_of_config(config, where="config.json") == (facts, [])


def test_every_generation_comes_back_as_the_file_it_was() -> None:
    for params, *_ in GOLDEN:
        expected = {**params, "rope_theta": params.get("rope_theta", 1e4)}
        expected.pop("quantization", None)  # the weights say that
        facts = facts_of(params)
        written, _ = params_of_facts(facts, profile="current", context=default_context(facts)[0])
        assert written == expected


def test_the_config_is_complete() -> None:
    config = config_of_facts(facts_of(V01), dtype="F16", context=32768)
    assert list(config) == sorted(config)
    assert config == {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "dtype": "float16",
        "eos_token_id": 2, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True,
        "vocab_size": 32000,
    }  # fmt: skip
    assert "dtype" not in config_of_facts(facts_of(V01), dtype=None, context=1)


@pytest.mark.parametrize("name", ["stories15m-mistral-src", "stories260k-mistral-src"])
def test_real_params(name: str) -> None:
    path = SHARED / name / "params.json"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    params = json.loads(path.read_text())
    facts, notes = facts_of_params(params, where=str(path))
    assert facts.rope_theta == 10000.0
    assert len(notes) == ("rope_theta" not in params)
    assert generation(facts) == "other"
    assert params_of_facts(facts, profile="current", context=None)[0] == {**params, "rope_theta": 10000.0}


@pytest.mark.parametrize(("name", "kind"), [("mixtral-8x7b", "Mixtral"), ("mistral-7b-lily", "7B v0.2")])
def test_real_configs(name: str, kind: str) -> None:
    path = SHARED / "configs" / name / "config.json"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    config = json.loads(path.read_text())
    facts, notes = facts_of_config(config, where=str(path))
    assert (generation(facts), notes) == (kind, [])
    assert facts == facts_of(MIXTRAL if name == "mixtral-8x7b" else V02)
    assert context_of_config(config, where=str(path)) == 32768
    params, notes = params_of_facts(facts, profile="current", context=32768)
    assert notes == []
    assert facts_of_params(params, where="params.json") == (facts, [])
    fresh = config_of_facts(facts, dtype="BF16", context=32768)
    restored = {key: value for key, value in config.items() if key != "_name_or_path"}
    restored["torch_dtype"] = "bfloat16"  # Lily says float32, and holds the other
    assert restore_config(facts, config, fresh) == (restored, True)


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, quantkit.layouts.mistral_config; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert {"torch", "transformers", "numba"}.isdisjoint(out.split())


# --- round trips ------------------------------------------------------------------------------------------------------

sizes = st.integers(1, 2**20)
numbers = st.floats(1e-12, 1e12)


@st.composite
def yarns(draw: st.DrawFn) -> Yarn:
    return Yarn(
        factor=draw(st.floats(1.01, 1e4)),
        original_context=draw(sizes),
        beta=draw(st.floats(0.1, 1e4)),
        alpha=draw(st.floats(0.1, 1e4)),
        apply_scale=draw(st.booleans()),
        query_beta=draw(st.none() | st.floats(1e-6, 10)),
    )


@st.composite
def models(draw: st.DrawFn) -> Facts:
    """Any model that both files can say."""
    period, repeats = draw(st.integers(1, 5)), draw(st.integers(1, 8))
    window = draw(sizes)
    pattern = draw(st.lists(st.sampled_from([None, window]), min_size=period, max_size=period))
    n = next(d for d in range(1, period + 1) if period % d == 0 and pattern[:d] * (period // d) == pattern)
    windows = () if pattern[:n] == [None] else tuple(pattern[:n])
    yarn = draw(st.none() | yarns())
    experts = 0
    if len(windows) < 2 and not (yarn and yarn.query_beta):
        experts = draw(st.sampled_from([0, 1, 8, 64]))
    elif yarn and len(windows) > 1:
        yarn = Yarn(yarn.factor, yarn.original_context, yarn.beta, yarn.alpha, yarn.apply_scale)
    kv = draw(st.integers(1, 64))
    return Facts(
        dim=draw(sizes), n_layers=period * repeats, head_dim=2 * draw(sizes), hidden_dim=draw(sizes),
        n_heads=kv * draw(st.integers(1, 16)), n_kv_heads=kv, norm_eps=draw(numbers), vocab_size=draw(sizes),
        rope_theta=draw(numbers), windows=windows, experts=experts, experts_per_token=min(experts, draw(st.just(2))),
        tied=draw(st.booleans()), yarn=yarn,
    )  # fmt: skip


def through_json(value: Json) -> Json:
    loaded: Json = json.loads(json.dumps(value, allow_nan=False))
    return loaded


@given(models())
@settings(max_examples=300, deadline=None)
def test_params_and_back(facts: Facts) -> None:
    params, _ = params_of_facts(facts, profile="current", context=None)
    assert facts_of_params(through_json(params), where="params.json") == (facts, [])


@given(models(), st.sampled_from(["BF16", "F16", "F32", None]))
@settings(max_examples=300, deadline=None)
def test_config_and_back(facts: Facts, dtype: str | None) -> None:
    config = config_of_facts(facts, dtype=dtype, context=default_context(facts)[0])
    assert facts_of_config(through_json(config), where="config.json") == (facts, [])
    assert len(facts.layer_windows) == facts.n_layers


@given(models())
@settings(max_examples=100, deadline=None)
def test_the_profile_of_2023_says_the_same_or_refuses(facts: Facts) -> None:
    try:
        params, _ = params_of_facts(facts, profile="one-file-ref-2023", context=4096)
    except SourceError:
        assert facts.rope_theta != 1e4 or facts.tied or facts.experts or facts.yarn or facts.mixed_windows
        return
    assert params.keys() == V01.keys()
    back = facts_of(params)
    assert back == facts or (not facts.windows and back.windows == (4096,))


# --- what params.json leaves unsaid -----------------------------------------------------------------------------------


def test_theta_of_the_first_release_was_a_constant() -> None:
    facts, notes = facts_of_params(V01, where="params.json")
    assert facts.rope_theta == 10000.0
    assert notes == [
        "rope_theta is not in params.json: 10000 is taken, because a sliding_window without it is the file of 7B v0.1 "
        "(--rope-theta says otherwise)"
    ]


@pytest.mark.parametrize("change", [{}, {"sliding_window": None}, {"sliding_window": [None, 64]}, {"rope_theta": None}])
def test_theta_otherwise_is_a_million_and_a_warning(change: Json) -> None:
    params = {key: value for key, value in V02.items() if key != "rope_theta"} | change
    facts, notes = facts_of_params(params, where="params.json")
    assert facts.rope_theta == 1e6
    (note,) = notes
    assert note.startswith("rope_theta is not in params.json: 1000000 is taken")


def test_theta_as_the_user_says() -> None:
    assert facts_of_params(V01, where="params.json", rope_theta=5e5) == (Facts(
        4096, 32, 128, 14336, 32, 8, 1e-5, 32000, 5e5, windows=(4096,)), [])  # fmt: skip
    assert facts_of(V02, rope_theta=1000000) == facts_of(V02)


def test_heads_that_are_not_said() -> None:
    params = {key: value for key, value in V02.items() if key not in ("n_kv_heads", "head_dim")}
    facts, notes = facts_of_params(params, where="params.json")
    assert (facts.n_kv_heads, facts.head_dim) == (32, 128)
    assert [note.split(" is not")[0] for note in notes] == ["n_kv_heads", "head_dim"]


@pytest.mark.parametrize(
    ("written", "windows"),
    [
        (4096, (4096,)),
        ([4096], (4096,)),
        ([4096, 4096], (4096,)),
        ([None], ()),
        ([None, None], ()),
        (None, ()),
        ([None, 8, None, 8], (None, 8)),
        ([8, None], (8, None)),
        ([None, 8, 8, 8], (None, 8, 8, 8)),
    ],
)
@pytest.mark.parametrize("key", ["sliding_window", "_sliding_window"])
def test_windows_in_their_shortest_form(key: str, written: object, windows: tuple[int | None, ...]) -> None:
    assert facts_of({**V02, key: written}).windows == windows


def test_two_names_for_the_window_may_agree() -> None:
    assert facts_of({**V02, "sliding_window": [64, 64], "_sliding_window": 64}).windows == (64,)


def test_layer_windows() -> None:
    assert facts_of(MINISTRAL_8B).layer_windows == (None, 32768, 32768, 32768) * 9
    assert facts_of(V01).layer_windows == (4096,) * 32
    assert facts_of(V02).layer_windows == (None,) * 32


def test_keys_that_change_nothing() -> None:
    more = {"max_batch_size": 4, "lora": None, "model_type": "transformer", "activation": "silu", "use_biases": False,
            "dtype": "bfloat16", "vision_encoder": None, "moe": None, "yarn": None, "tied_embeddings": False,
            "quantization": None, "max_seq_len": 32768}  # fmt: skip
    assert facts_of_params({**V02, **more}, where="params.json") == (facts_of(V02), [])


def test_yarn_that_scales_or_does_not_say() -> None:
    params = copy.deepcopy(MINISTRAL_3)
    del params["yarn"]["apply_scale"], params["llama_4_scaling"]
    facts, notes = facts_of_params(params, where="params.json")
    assert facts.yarn == Yarn(16.0, 16384, 32.0, 1.0, apply_scale=True)
    assert notes == ["yarn.apply_scale is not said: true is taken, as vLLM does"]
    config = config_of_facts(facts, dtype=None, context=262144)
    assert config["model_type"] == "mistral"
    assert config["rope_parameters"].keys().isdisjoint({"attention_factor", "mscale", "mscale_all_dim"})
    assert config["rope_scaling"] == config["rope_parameters"]
    params["llama_4_scaling"] = {"original_max_position_embeddings": 16384, "beta": 0}
    assert facts_of(params) == facts


def test_a_vision_model_as_text_only() -> None:
    facts, notes = facts_of_params(SMALL31, where="params.json", text_only=True)
    assert facts == facts_of({key: value for key, value in SMALL31.items() if key != "vision_encoder"})
    assert notes == ["vision_encoder was left aside: only the language model is taken"]
    assert default_context(facts) == (131072, True)
    assert facts_of_params(V02, where="params.json", text_only=True) == (facts_of(V02), [])


def test_context_of_params() -> None:
    assert context_of_params(V01, where="params.json") is None
    assert context_of_params({"max_seq_len": 8192}, where="params.json") == 8192
    assert context_of_params({"max_seq_len": 1, "max_position_embeddings": 2}, where="params.json") == 2


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        (None, None),
        ({}, None),
        ({"qformat_weight": "fp8_e4m3"}, "fp8_e4m3 weights"),
        (MINISTRAL_3["quantization"], "fp8_e4m3 weights, one stored scale per activation"),
        ({"qformat_weight": "fp8_e4m3", "qscheme_act": "NO_SCALES"}, "fp8_e4m3 weights, no stored scales"),
        ({"qformat_weight": "fp8_e4m3", "qscheme_act": []}, "fp8_e4m3 weights, activations []"),
        ({"quant_method": "x\x1b[1m"}, "'x\\x1b[1m' weights"),
        ("int8", "quantized (quantization 'int8')"),
    ],
)
def test_native_quantization(quantization: object, words: str | None) -> None:
    assert native_quantization({**V02, "quantization": quantization}) == words
    assert facts_of({**V02, "quantization": quantization}) == facts_of(V02)


def test_other_models_have_no_name() -> None:
    for change in ({"n_layers": 24}, {"rope_theta": 5e5}, {"tied_embeddings": True, "vocab_size": 32001}):
        facts = facts_of({**V02, **change})
        assert generation(facts) == "other"
        assert default_context(facts) == (32768, True)


# --- what is written --------------------------------------------------------------------------------------------------


def test_the_nine_keys_of_2023() -> None:
    assert params_of_facts(facts_of(V01), profile="one-file-ref-2023", context=None) == (V01, [])
    assert params_of_facts(facts_of(V01), profile="current", context=None) == ({**V01, "rope_theta": 1e4}, [])


def test_2023_without_a_window_gets_the_whole_context() -> None:
    facts = facts_of({**V02, "rope_theta": 1e4})
    params, notes = params_of_facts(facts, profile="one-file-ref-2023", context=2048)
    assert params == {**V01, "sliding_window": 2048}
    (note,) = notes
    assert "2048 was written, the whole context" in note
    _, notes = params_of_facts(facts, profile="one-file-ref-2023", context=131072)
    assert notes[1:] == ["the code of 2023 ends at 128000 tokens"]


def test_who_can_read_it_is_said() -> None:
    _, notes = params_of_facts(facts_of(MINISTRAL_3), profile="current", context=262144)
    assert any("mistral-inference 1.6 ignores yarn" in note for note in notes)
    assert any("mistral-inference 1.6 misses output.weight" in note for note in notes)


# --- config.json as others write it -----------------------------------------------------------------------------------

HF: Json = {
    "model_type": "mistral", "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 96,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 100, "rms_norm_eps": 1e-5,
    "sliding_window": None, "rope_theta": 1e6,
}  # fmt: skip
TINY = Facts(64, 4, 16, 96, 8, 4, 1e-5, 100, 1e6)


def read(**changes: Any) -> Facts:
    return facts_of_config({**HF, **changes}, where="config.json")[0]


def test_a_config_is_read() -> None:
    assert read() == TINY
    assert read(model_type="llama") == TINY
    assert read(model_type="llama", attention_bias=False, mlp_bias=False, hidden_act="silu", pretraining_tp=1) == TINY
    assert read(tie_word_embeddings=True).tied
    assert read(model_type="mixtral", num_experts=4, num_experts_per_tok=2).experts == 4
    assert read(quantization_config={"quant_method": "fp8"}) == TINY


def test_both_generations_of_rope() -> None:
    without = {key: value for key, value in HF.items() if key != "rope_theta"}
    for rope in (
        {"rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "type": "default"}, "rope_theta": 1e6},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6},
        {"rope_theta": 1e6, "rope_scaling": None},
        {"rope_theta": 1e6, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 1e6, "factor": None}, "rope_scaling": {"rope_theta": 1e6}},
    ):
        assert facts_of_config({**without, **rope}, where="config.json") == (TINY, [])


def test_yarn_as_published() -> None:
    """mscale and mscale_all_dim cancel each other; attention_factor goes before them."""
    rope = {"rope_type": "yarn", "type": "yarn", "rope_theta": 1e6, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "original_max_position_embeddings": 16384, "mscale": 1.0, "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1, "max_position_embeddings": 262144}  # fmt: skip
    yarn = Yarn(16.0, 16384, 32.0, 1.0, apply_scale=False, query_beta=0.1)
    assert read(model_type="ministral3", rope_parameters=rope).yarn == yarn
    plain = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 8192}
    assert read(rope_scaling=plain).yarn == Yarn(4.0, 8192, 32.0, 1.0, apply_scale=True)
    assert read(rope_scaling={**plain, "attention_factor": 1.0}).yarn == Yarn(4.0, 8192, 32.0, 1.0, apply_scale=False)
    usual = {**plain, "attention_factor": 1.1386294361119891}
    assert read(rope_scaling=usual).yarn == Yarn(4.0, 8192, 32.0, 1.0, apply_scale=True)
    split = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": None}
    assert read(rope_scaling=split, original_max_position_embeddings=8192) == read(rope_scaling=plain)
    assert read(rope_scaling=plain, rope_parameters={**plain, "rope_theta": 1e6}) == read(rope_scaling=plain)
    assert default_context(read(rope_scaling=plain)) == (32768, False)
    assert default_context(read(rope_scaling={**plain, "factor": 1e308})) == (2**31 - 1, False)
    assert read(rope_scaling={**plain, "mscale": 0, "mscale_all_dim": 1}).yarn == read(rope_scaling=plain).yarn


def test_windows_of_a_config() -> None:
    types = ["full_attention", "sliding_attention"] * 2
    assert read(sliding_window=64).windows == (64,)
    assert read(sliding_window=64, use_sliding_window=True).windows == (64,)
    assert read(use_sliding_window=False).windows == ()
    assert read(sliding_window=64, layer_types=["sliding_attention"] * 4).windows == (64,)
    assert read(layer_types=["full_attention"] * 4).windows == ()
    assert read(model_type="ministral", sliding_window=64, layer_types=types).windows == (None, 64)
    assert read(model_type="ministral", sliding_window=64, layer_types=["full_attention"] * 4).windows == ()
    assert read(model_type="ministral", sliding_window=64).windows == (64,)


def test_defaults_of_the_class_count_and_are_said() -> None:
    bare = {key: HF[key] for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
                                     "vocab_size")}  # fmt: skip
    expected = {
        "mistral": (Facts(64, 4, 8, 96, 8, 8, 1e-6, 100, 1e4, windows=(4096,)), 4),
        "mixtral": (Facts(64, 4, 8, 96, 8, 8, 1e-5, 100, 1e6, experts=8, experts_per_token=2), 5),
        "ministral": (Facts(64, 4, 8, 96, 8, 8, 1e-6, 100, 1e4, windows=(4096,)), 4),
        "ministral3": (Facts(64, 4, 128, 96, 8, 8, 1e-5, 100, 1e6,
                             yarn=Yarn(16.0, 16384, 32.0, 1.0, apply_scale=False, query_beta=0.1)), 4),
        "llama": (Facts(64, 4, 8, 96, 8, 8, 1e-6, 100, 1e4), 2),
    }  # fmt: skip
    for model_type, (facts, count) in expected.items():
        found, notes = facts_of_config({**bare, "model_type": model_type}, where="config.json")
        assert found == facts, model_type
        assert len(notes) == count, notes
    assert notes[0] == "rms_norm_eps is not in config.json: 1e-06 is what llama means by that"


def test_null_is_not_absent() -> None:
    assert read(num_attention_heads=16, num_key_value_heads=None).n_kv_heads == 16
    assert read(head_dim=None).head_dim == 8
    assert read(model_type="ministral3", head_dim=None, rope_parameters={"rope_type": "default"}).head_dim == 8


def test_a_vision_config_as_text_only() -> None:
    for tied, said in ((True, {}), (False, {"tie_word_embeddings": False})):
        config = {
            "model_type": "mistral3",
            "vision_config": {},
            "tie_word_embeddings": True,
            "text_config": {**HF, **said},
        }
        facts, notes = facts_of_config(config, where="config.json", text_only=True)
        assert (facts.dim, facts.tied) == (64, tied)
        assert notes == ["the image encoder was left aside: only the language model is taken"]
    assert context_of_config({**config, "text_config": {**HF, "max_position_embeddings": 7}}, where="c") == 7


def test_context_of_config() -> None:
    assert context_of_config({**HF, "max_position_embeddings": 99}, where="config.json") == 99
    assert context_of_config(HF, where="config.json") == 131072
    assert context_of_config({**HF, "model_type": "llama"}, where="config.json") == 2048


# --- carried over -----------------------------------------------------------------------------------------------------


def fresh_of(facts: Facts) -> tuple[Json, Json]:
    return config_of_facts(facts, dtype="BF16", context=1024), params_of_facts(facts, profile="current", context=None)[
        0
    ]


def test_a_recorded_config_comes_back_whole() -> None:
    fresh, _ = fresh_of(TINY)
    recorded = {**HF, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "pad_token_id": 3,
                "my": {"own": [1]}, "eos_token_id": [2, 32000], "torch_dtype": "float32",
                "max_position_embeddings": 2048}  # fmt: skip
    # All but the dtype: loaders cast to it, so it is that of the weights.
    wanted = {**recorded, "torch_dtype": fresh["torch_dtype"]}
    assert wanted != recorded
    assert restore_config(TINY, recorded, fresh) == (wanted, True)
    assert list(restore_config(TINY, recorded, fresh)[0]) == list(recorded)
    code = {**recorded, "auto_map": {"AutoModel": "evil.py"}, "_name_or_path": "/home/me", "nested": {"auto_map": 1}}
    assert restore_config(TINY, code, fresh) == ({**wanted, "nested": {}}, True)
    assert "auto_map" in code


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 10000.0},
        {"hidden_size": 128},
        {"sliding_window": 8},
        {"num_key_value_heads": 8},
        {"num_key_value_heads": "4"},
        {"rms_norm_eps": float("nan")},
        {"model_type": "gpt2"},
        {"model_type": ["llama"]},
        {"hidden_act": "gelu"},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"max_position_embeddings": "32768"},
        {"max_position_embeddings": -1},
        {"use_cache": "yes"},
        {"use_cache": None},
        {"torch_dtype": "float4"},
        {"dtype": ["float16"]},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [1]},
        {"eos_token_id": "2"},
        {"eos_token_id": [2, -1]},
        {"initializer_range": {}},
        {"other": float("inf")},
        {"other": {1, 2}},
        {"text_config": 3},
    ],
)
def test_a_recorded_config_that_is_broken_or_means_another_model_is_not_used(change: Json) -> None:
    fresh, _ = fresh_of(TINY)
    assert restore_config(TINY, {**HF, **change}, fresh) == (fresh, False)


@pytest.mark.parametrize("recorded", [None, {}, [], "x", 3, {"model_type": "mistral"}])
def test_a_record_that_is_none(recorded: Any) -> None:
    config, params = fresh_of(TINY)
    assert restore_config(TINY, recorded, config) == (config, False)
    assert restore_params(TINY, recorded, params) == (params, False)


def test_recorded_params_come_back_whole() -> None:
    facts = facts_of(V01)
    _, fresh = fresh_of(facts)
    recorded = {**V01, "max_batch_size": 3, "max_seq_len": 4096}
    assert restore_params(facts, recorded, fresh) == ({**recorded, "rope_theta": 1e4}, True)
    assert restore_params(facts, {**recorded, "rope_theta": None}, fresh) == ({**recorded, "rope_theta": 1e4}, True)
    assert restore_params(facts, {**V01, "rope_theta": 10000, "sliding_window": [4096]}, fresh)[1]
    assert "rope_theta" not in recorded


def test_recorded_params_in_the_profile_of_2023_have_its_keys() -> None:
    facts = facts_of(V01)
    fresh, _ = params_of_facts(facts, profile="one-file-ref-2023", context=None)
    shuffled = dict(sorted(V01.items()))
    assert restore_params(facts, shuffled, fresh) == (shuffled, True)
    assert restore_params(facts, {**V01, "rope_theta": 1e4}, fresh) == (fresh, False)
    assert restore_params(facts, {**V01, "max_batch_size": 3}, fresh) == (fresh, False)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 1e6},
        {"n_layers": 31},
        {"n_layers": True},
        {"sliding_window": "4096"},
        {"unknown": 1},
        {"quantization": {"qformat_weight": "fp8_e4m3"}},
        {"vision_encoder": {}},
        {"lora": {"rank": 8, "scaling": 1.0}},
        {"max_batch_size": "3"},
        {"max_seq_len": 0},
        {"norm_eps": float("inf")},
        {"moe": {"num_experts": 8, "num_experts_per_tok": 2}},
    ],
)
def test_recorded_params_that_are_broken_or_mean_another_model_are_not_used(change: Json) -> None:
    facts = facts_of(V01)
    _, fresh = fresh_of(facts)
    assert restore_params(facts, {**V01, **change}, fresh) == (fresh, False)
