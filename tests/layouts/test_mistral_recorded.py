"""A recorded config.json or params.json comes back whole, but not where it is broken or describes another model."""

from __future__ import annotations

from typing import Any

import pytest
from mistral_models import HF, TINY, V01, Json, facts_of

from quantkit.layouts.mistral_config import Facts, config_of_facts, params_of_facts, restore_config, restore_params


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
