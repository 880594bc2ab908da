"""The params.json of every generation, what is known of each, and a small config.json: what tests of the two share."""

from __future__ import annotations

import json
from typing import Any

from quantkit.layouts.mistral_config import Facts, facts_of_params

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

HF: Json = {
    "model_type": "mistral", "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 96,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 100, "rms_norm_eps": 1e-5,
    "sliding_window": None, "rope_theta": 1e6,
}  # fmt: skip
TINY = Facts(64, 4, 16, 96, 8, 4, 1e-5, 100, 1e6)


def through_json(value: Json) -> Json:
    loaded: Json = json.loads(json.dumps(value, allow_nan=False))
    return loaded
