"""What is refused in params.json and config.json: each time one sentence that names the key, the file, and a hint."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_models import HF, TINY, Json

from quantkit.errors import SourceError
from quantkit.layouts.mistral_config import (
    Facts,
    Yarn,
    config_of_facts,
    context_of_config,
    context_of_params,
    facts_of_config,
    facts_of_params,
    params_of_facts,
)

PARAMS: Json = {"dim": 64, "n_layers": 4, "head_dim": 16, "hidden_dim": 96, "n_heads": 8, "n_kv_heads": 4,
                "norm_eps": 1e-5, "vocab_size": 100, "rope_theta": 1e6}  # fmt: skip
YARN: Json = {"factor": 16, "original_max_position_embeddings": 16384, "beta": 32, "alpha": 1, "apply_scale": False}
SCALING: Json = {"original_max_position_embeddings": 16384, "beta": 0.1}
HF_YARN: Json = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
GONE = object()


def changed(table: Json, change: Json) -> Json:
    return {key: value for key, value in {**table, **change}.items() if value is not GONE}


def refusal(error: SourceError, where: str) -> str:
    assert error.where == where
    assert error.hint
    assert "\n" not in error.what
    return error.what


PARAMS_CASES = [
    # types
    ({"dim": "64"}, "dim is '64', which is no size"),
    ({"dim": 64.0}, "dim is 64.0, which is no size"),
    ({"dim": True}, "dim is True, which is no size"),
    ({"dim": [64]}, "dim is [64], which is no size"),
    ({"n_layers": 0}, "n_layers is 0, which is no size"),
    ({"n_layers": -4}, "n_layers is -4, which is no size"),
    ({"hidden_dim": 2**31}, "hidden_dim is 2147483648, which is no size"),
    ({"n_layers": 2**31 - 1}, "n_layers is 2147483647: no model has so many layers"),
    ({"vocab_size": -1}, "vocab_size is -1, which is no size"),
    ({"norm_eps": "1e-5"}, "norm_eps is '1e-5', which is no positive number"),
    ({"norm_eps": float("nan")}, "norm_eps is nan, which is no positive number"),
    ({"norm_eps": 0}, "norm_eps is 0, which is no positive number"),
    ({"norm_eps": False}, "norm_eps is False, which is no positive number"),
    ({"rope_theta": float("inf")}, "rope_theta is inf, which is no positive number"),
    ({"rope_theta": -1e6}, "rope_theta is -1000000.0, which is no positive number"),
    ({"rope_theta": 10**400}, "rope_theta is 1000"),
    ({"rope_theta": True}, "rope_theta is True, which is no positive number"),
    ({"rope_theta": {}}, "rope_theta is {}, which is no positive number"),
    ({"tied_embeddings": 1}, "tied_embeddings is 1, which is no truth value"),
    # missing
    *(({key: GONE}, f"{key} is missing from params.json")
      for key in ("dim", "n_layers", "hidden_dim", "n_heads", "norm_eps", "vocab_size")),
    ({"dim": None}, "dim is missing from params.json"),
    ({"head_dim": GONE, "dim": 65}, "head_dim is missing from params.json"),
    # together
    ({"head_dim": 15}, "head_dim is 15, an odd number"),
    ({"n_kv_heads": 3}, "n_kv_heads is 3, which does not divide the 8 heads of n_heads"),
    ({"n_kv_heads": 16}, "n_kv_heads is 16, which does not divide the 8 heads of n_heads"),
    # windows
    ({"sliding_window": "4096"}, "sliding_window is '4096', which is no size"),
    ({"sliding_window": 0}, "sliding_window is 0, which is no size"),
    ({"_sliding_window": -1}, "_sliding_window is -1, which is no size"),
    ({"sliding_window": True}, "sliding_window is True, which is no size"),
    ({"sliding_window": []}, "sliding_window is [], which is no list of values"),
    ({"sliding_window": [None, 8, 8]}, "sliding_window has 3 entries, which do not repeat to 4 layers"),
    ({"sliding_window": [None] * 5}, "sliding_window has 5 entries, which do not repeat to 4 layers"),
    ({"sliding_window": [8, 16]}, "sliding_window has windows of 2 sizes"),
    ({"sliding_window": [None, "8"]}, "sliding_window[1] is '8', which is no size"),
    ({"sliding_window": [None, [8]]}, "sliding_window[1] is [8], which is no size"),
    ({"sliding_window": 8, "_sliding_window": 16}, "_sliding_window is 16 but sliding_window is 8"),
    ({"sliding_window": 8, "_sliding_window": [None, 8]}, "_sliding_window is [None, 8] but sliding_window is 8"),
    # experts
    ({"moe": 8}, "moe is 8, which is no table"),
    ({"moe": {}}, "moe.num_experts is missing from params.json"),
    ({"moe": {"num_experts": 8}}, "moe.num_experts_per_tok is missing from params.json"),
    ({"moe": {"num_experts": 2, "num_experts_per_tok": 3}}, "moe.num_experts_per_tok is 3, more than the 2 experts"),
    ({"moe": {"num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1}},
     "unknown key 'moe.num_shared_experts' in params.json"),
    # yarn
    ({"yarn": []}, "yarn is [], which is no table"),
    ({"yarn": {**YARN, "factor": 1}}, "yarn.factor is 1.0, which stretches nothing"),
    ({"yarn": {**YARN, "factor": "16"}}, "yarn.factor is '16', which is no positive number"),
    ({"yarn": {**YARN, "beta": None}}, "yarn.beta is missing from params.json"),
    ({"yarn": {**YARN, "apply_scale": 0}}, "yarn.apply_scale is 0, which is no truth value"),
    ({"yarn": {**YARN, "mscale": 1}}, "unknown key 'yarn.mscale' in params.json"),
    ({"llama_4_scaling": SCALING}, "llama_4_scaling stands without yarn"),
    ({"yarn": YARN, "llama_4_scaling": {"original_max_position_embeddings": 16384}},
     "llama_4_scaling.beta is missing from params.json"),
    ({"yarn": YARN, "llama_4_scaling": {**SCALING, "original_max_position_embeddings": 8192}},
     "llama_4_scaling.original_max_position_embeddings is 8192, and yarn's is 16384"),
    ({"yarn": YARN, "llama_4_scaling": {**SCALING, "gamma": 1}}, "unknown key 'llama_4_scaling.gamma' in params.json"),
    # other computations
    ({"model_type": "mamba"}, "model_type is 'mamba': another computation than Mistral's"),
    ({"activation": "gelu"}, "activation is 'gelu': another computation than Mistral's"),
    ({"use_biases": True}, "use_biases is True: another computation than Mistral's"),
    ({"use_biases": 0}, "use_biases is 0: another computation than Mistral's"),
    ({"kv_lora_rank": 256}, "kv_lora_rank: a model with latent attention (Mistral Large 3)"),
    ({"vision_encoder": {}}, "the model has an image or audio encoder (vision_encoder)"),
    ({"multimodal": {"whisper_model_args": {}}}, "the model has an image or audio encoder (multimodal)"),
    ({"hidden_dim": GONE, "multiple_of": 256}, "multiple_of instead of hidden_dim: this is Meta's layout of Llama"),
    # unknown keys
    ({"rope_thta": 1e4}, "unknown key 'rope_thta' in params.json"),
    ({"\x1b[31m": 1}, "unknown key '\\x1b[31m' in params.json"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "what"), PARAMS_CASES)
def test_params_that_are_refused(change: Json, what: str) -> None:
    with pytest.raises(SourceError) as caught:
        facts_of_params(changed(PARAMS, change), where="/models/x/params.json")
    assert refusal(caught.value, "/models/x/params.json").startswith(what)


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"rope_thta": 1e4}, "did you mean 'rope_theta'?"),
        ({"hidden_size": 64}, "did you mean 'dim'?"),
        ({"num_hidden_layers": 64}, "did you mean 'n_layers'?"),
        ({"slidingwindow": 64}, "did you mean 'sliding_window'?"),
        ({"qqqq": 64}, "take it out, if the model is the same without it"),
        ({"moe": {"num_expert": 1}}, "did you mean 'num_experts'?"),
        ({"yarn": {"beta_fast": 1}}, "did you mean 'beta'?"),
        ({"sliding_window": "4096"}, "it must be a whole number from 1 to 2147483647, without quotes"),
        ({"vision_encoder": {}}, "--text-only takes the language model alone"),
    ],
)
def test_hints(change: Json, hint: str) -> None:
    with pytest.raises(SourceError) as caught:
        facts_of_params({**PARAMS, **change}, where="params.json")
    assert caught.value.hint == hint


def test_a_theta_that_contradicts_the_file_or_is_none() -> None:
    with pytest.raises(SourceError, match=r"rope_theta is 1e\+06 in params.json, not 10000") as caught:
        facts_of_params(PARAMS, where="params.json", rope_theta=1e4)
    assert caught.value.hint == "leave --rope-theta out"
    for theta in (float("nan"), 0.0, -1.0, float("inf")):
        with pytest.raises(SourceError, match="which is no positive number"):
            facts_of_params(changed(PARAMS, {"rope_theta": GONE}), where="params.json", rope_theta=theta)


def test_contexts_that_are_none() -> None:
    for value in ("32768", 0, True, 1.5):
        with pytest.raises(SourceError, match=r"max_seq_len is .*, which is no size"):
            context_of_params({"max_seq_len": value}, where="params.json")
        with pytest.raises(SourceError, match=r"max_position_embeddings is .*, which is no size"):
            context_of_config({**HF, "max_position_embeddings": value}, where="config.json")


CONFIG_CASES = [
    ({"model_type": GONE}, "model_type is missing: Mistral's own layout has no such model"),
    ({"model_type": "qwen2"}, "model_type is 'qwen2': Mistral's own layout has no such model"),
    ({"model_type": ["mistral"]}, "model_type is ['mistral'], which is no text"),
    ({"model_type": "mistral3"}, "the model reads images (model_type 'mistral3')"),
    ({"model_type": "llava"}, "the model reads images (model_type 'llava')"),
    ({"vision_config": {}}, "the model reads images (model_type 'mistral')"),
    ({"hidden_size": "64"}, "hidden_size is '64', which is no size"),
    ({"hidden_size": True}, "hidden_size is True, which is no size"),
    *(({key: GONE}, f"{key} is missing from config.json")
      for key in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size")),
    ({"rms_norm_eps": None}, "rms_norm_eps is missing from config.json"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, which is no positive number"),
    ({"head_dim": 15}, "head_dim is 15, an odd number"),
    ({"head_dim": GONE, "hidden_size": 4}, "num_attention_heads is 8, more than hidden_size"),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3, which does not divide the 8 heads of num_attention_heads"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', which is no truth value"),
    # another computation
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', which Mistral's own layout cannot say"),
    ({"model_type": "llama", "attention_bias": True}, "attention_bias is True, which Mistral's own layout cannot say"),
    ({"model_type": "llama", "mlp_bias": True}, "mlp_bias is True, which Mistral's own layout cannot say"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which Mistral's own layout cannot say"),
    ({"per_layer_config": {"0": {}}}, "per_layer_config is {'0': {}}, which Mistral's own layout cannot say"),
    # windows
    ({"sliding_window": "4096"}, "sliding_window is '4096', which is no size"),
    ({"sliding_window": 0}, "sliding_window is 0, which is no size"),
    ({"sliding_window": 64, "use_sliding_window": False}, "use_sliding_window is false and sliding_window is 64"),
    ({"sliding_window": GONE, "use_sliding_window": False}, "use_sliding_window is false and sliding_window is 4096"),
    ({"model_type": "llama", "sliding_window": 64}, "sliding_window is 64, which a llama model ignores"),
    ({"layer_types": "full"}, "layer_types is 'full', which is no list of values"),
    ({"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries for 4 layers"),
    ({"layer_types": ["full_attention"] * 3 + ["linear_attention"]}, "layer_types has 'linear_attention'"),
    ({"layer_types": ["full_attention"] * 3 + [7]}, "layer_types has 7"),
    ({"layer_types": ["sliding_attention"] * 4}, "layer_types has sliding_attention, but there is no sliding_window"),
    ({"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
     "layer_types and sliding_window disagree: mistral has one window (8) for every layer"),
    ({"sliding_window": 8, "layer_types": ["full_attention"] * 4}, "layer_types and sliding_window disagree"),
    # experts
    ({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3},
     "num_experts_per_tok is 3, more than the 2 experts"),
    ({"model_type": "mixtral", "num_local_experts": None}, "num_local_experts is missing from config.json"),
    ({"model_type": "mixtral", "num_experts": 4, "num_local_experts": 8},
     "num_experts is 4 and num_local_experts is 8"),
    # rope
    ({"rope_theta": float("inf")}, "rope_theta is inf, which is no positive number"),
    ({"rope_theta": None}, "rope_theta is missing from config.json"),
    ({"rope_parameters": []}, "rope_parameters is [], which is no table"),
    ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 1e+06 and 10000 in rope_parameters"),
    ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_parameters.rope_theta is '1e6', which is no positive number"),
    ({"rope_parameters": {"rope_type": "default", "type": "yarn"}},
     "rope_parameters.type is not what rope_type is, 'default'"),
    ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": HF_YARN},
     "rope_parameters and rope_scaling differ in rope_type"),
    ({"rope_parameters": HF_YARN, "rope_scaling": {"rope_theta": 1e6}},
     "rope_parameters and rope_scaling differ in rope_type"),
    ({"rope_parameters": HF_YARN, "rope_scaling": {**HF_YARN, "beta_fast": 9.0}},
     "rope_parameters and rope_scaling differ in beta_fast"),
    ({"rope_parameters": {**HF_YARN, "mscale": 1.0}, "rope_scaling": HF_YARN},
     "rope_parameters and rope_scaling differ in mscale"),
    ({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"rope_theta": 1e4}},
     "rope_parameters and rope_scaling differ in rope_theta"),
    ({"rope_scaling": HF_YARN, "original_max_position_embeddings": 64},
     "rope_scaling.original_max_position_embeddings is not the 64 outside of rope_scaling"),
    ({"rope_scaling": {**HF_YARN, "factor": float("nan")}}, "rope_scaling.factor is nan"),
    ({"rope_parameters": {"full_attention": {}}},
     "rope_parameters.full_attention is nothing that Mistral's own layout can say"),
    *(({"rope_scaling": {"rope_type": name}}, f"rope_scaling.rope_type is '{name}', which Mistral's own layout")
      for name in ("linear", "dynamic", "longrope", "llama3", "proportional")),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.rope_type is 'linear', which Mistral's own"),
    ({"rope_scaling": {"rope_type": 3}}, "rope_scaling.rope_type is 3, which is no text"),
    ({"model_type": "llama", "rope_scaling": HF_YARN}, "rope_scaling.rope_type is 'yarn', which Mistral's own"),
    ({"rope_scaling": {**HF_YARN, "factor": 1.0}}, "rope_parameters.factor is 1.0, which stretches nothing"),
    ({"rope_scaling": {**HF_YARN, "factor": None}}, "rope_scaling.factor is missing from config.json"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
     "rope_scaling.original_max_position_embeddings is missing from config.json"),
    ({"rope_scaling": {**HF_YARN, "truncate": False}}, "rope_scaling.truncate is false"),
    ({"rope_scaling": {**HF_YARN, "partial_rotary_factor": 0.5}}, "rope_scaling.partial_rotary_factor is not 1"),
    ({"rope_scaling": {**HF_YARN, "attention_factor": 0.7}}, "rope_scaling.attention_factor comes to 0.7"),
    ({"rope_scaling": {**HF_YARN, "mscale": 1.0, "mscale_all_dim": 0.5}},
     "rope_scaling.attention_factor comes to 1.06482"),
    ({"rope_scaling": {**HF_YARN, "llama_4_scaling_beta": 0.1}},
     "rope_scaling.llama_4_scaling_beta means nothing to mistral"),
    ({"model_type": "ministral3", "rope_parameters": {"llama_4_scaling_beta": 0.1}},
     "rope_parameters.llama_4_scaling_beta stands without yarn"),
    ({"model_type": "ministral3", "rope_theta": 5e5}, "rope_theta is 500000 and 1e+06 in rope_parameters"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "what"), CONFIG_CASES)
def test_configs_that_are_refused(change: Json, what: str) -> None:
    with pytest.raises(SourceError) as caught:
        facts_of_config(changed(HF, change), where="/models/x/config.json")
    assert refusal(caught.value, "/models/x/config.json").startswith(what)


def test_a_vision_config_without_its_language_model() -> None:
    with pytest.raises(SourceError, match="text_config is missing"):
        facts_of_config({"model_type": "mistral3"}, where="config.json", text_only=True)
    with pytest.raises(SourceError, match=r"text_config\.hidden_size is missing"):
        facts_of_config({"model_type": "mistral3", "text_config": changed(HF, {"hidden_size": GONE})},
                        where="config.json", text_only=True)  # fmt: skip


SCALED = Yarn(16.0, 16384, 32.0, 1.0, apply_scale=False, query_beta=0.1)


@pytest.mark.parametrize(
    ("facts", "what"),
    [
        (Facts(64, 4, 16, 96, 8, 4, 1e-5, 100, 1e6, windows=(None, 8), experts=8, experts_per_token=2),
         "experts and windows that differ in one model"),
        (Facts(64, 4, 16, 96, 8, 4, 1e-5, 100, 1e6, yarn=SCALED, experts=8, experts_per_token=2),
         "experts and scaled queries in one model"),
        (Facts(64, 4, 16, 96, 8, 4, 1e-5, 100, 1e6, yarn=SCALED, windows=(None, 8)),
         "windows that differ and scaled queries in one model"),
    ],
)  # fmt: skip
def test_models_that_transformers_has_no_class_for(facts: Facts, what: str) -> None:
    params, _ = params_of_facts(facts, profile="current", context=None)
    assert facts_of_params(params, where="params.json") == (facts, [])
    with pytest.raises(SourceError) as caught:
        config_of_facts(facts, dtype=None, context=1)
    assert refusal(caught.value, "config.json").startswith(what)


def test_a_dtype_that_no_config_announces() -> None:
    with pytest.raises(SourceError, match="weights in 'F8_E4M3'"):
        config_of_facts(TINY, dtype="F8_E4M3", context=1)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({}, "rope_theta 1e+06: its own is fixed at 10000"),
        ({"rope_theta": 1e4}, "a model without a window whose context is not known"),
        ({"rope_theta": 1e4, "tied_embeddings": True}, "a head that is the embedding"),
        ({"moe": {"num_experts": 8, "num_experts_per_tok": 2}}, "a mixture of experts"),
        ({"rope_theta": 1e4, "sliding_window": [None, 8]}, "windows that differ between layers"),
        ({"rope_theta": 1e4, "sliding_window": 8, "yarn": YARN}, "a model with yarn"),
    ],
)
def test_what_the_code_of_2023_cannot_run(change: Json, what: str) -> None:
    facts, _ = facts_of_params({**PARAMS, **change}, where="params.json")
    with pytest.raises(SourceError) as caught:
        params_of_facts(facts, profile="one-file-ref-2023", context=None)
    assert refusal(caught.value, "profile one-file-ref-2023") == f"the one-file reference of 2023 cannot run {what}"


# Whatever stands under the keys that are read, the answer is facts or a SourceError, and nothing of the input changes.
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from([4, 8, 1e6]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(["rope_type", "type", "factor", "beta", "beta_fast", "alpha", "num_experts", "rope_theta",
                         "num_experts_per_tok", "original_max_position_embeddings", "mscale", "attention_factor"]),
        inner, max_size=4),
    max_leaves=6,
)  # fmt: skip
params_keys = st.sampled_from([*PARAMS, "sliding_window", "_sliding_window", "moe", "yarn", "llama_4_scaling",
                               "model_type", "tied_embeddings", "use_biases", "activation",
                               "quantization"])  # fmt: skip
config_keys = st.sampled_from([*HF, "rope_parameters", "rope_scaling", "layer_types", "use_sliding_window",
                               "tie_word_embeddings", "hidden_act", "num_local_experts", "text_config",
                               "vision_config", "num_experts_per_tok", "per_layer_config"])  # fmt: skip
model_types = st.sampled_from(["mistral", "mixtral", "ministral", "ministral3", "llama", "mistral3"])


@given(st.dictionaries(params_keys, anything, max_size=3), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_params(change: Json, text_only: bool) -> None:
    params = {**PARAMS, **change}
    before = repr(copy.deepcopy(params))
    try:
        facts, _ = facts_of_params(params, where="params.json", text_only=text_only)
    except SourceError as error:
        refusal(error, "params.json")
    else:
        assert facts_of_params(params_of_facts(facts, profile="current", context=None)[0], where="p")[0] == facts
    assert repr(params) == before


@given(st.dictionaries(config_keys, anything, max_size=3), model_types, st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_config(change: Json, model_type: str, text_only: bool) -> None:
    config = {**HF, "model_type": model_type, **change}
    before = repr(copy.deepcopy(config))
    try:
        facts, _ = facts_of_config(config, where="config.json", text_only=text_only)
    except SourceError as error:
        refusal(error, "config.json")
    else:
        assert facts_of_config(config_of_facts(facts, dtype=None, context=9), where="c")[0] == facts
    assert repr(config) == before
