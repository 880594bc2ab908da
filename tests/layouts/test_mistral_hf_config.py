"""config.json as others write it is read for what it means: both generations of rope, yarn, windows, null, and the
defaults of each class, of which notes tell."""

from __future__ import annotations

from typing import Any

from mistral_models import HF, TINY

from quantkit.layouts.mistral_config import Facts, Yarn, context_of_config, default_context, facts_of_config


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
