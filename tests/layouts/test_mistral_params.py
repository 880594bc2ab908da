"""params.json as it is read: what it leaves unsaid is taken as its readers take it, and a note says so. Several ways to
say the same give the same facts."""

from __future__ import annotations

import copy

import pytest
from mistral_models import MINISTRAL_3, MINISTRAL_8B, SMALL31, V01, V02, Json, facts_of

from quantkit.layouts.mistral_config import (
    Facts,
    Yarn,
    config_of_facts,
    context_of_params,
    default_context,
    facts_of_params,
    generation,
    native_quantization,
)


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
