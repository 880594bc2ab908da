"""Large models as they are published, from their configurations alone: names and shapes of all tensors, no weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Shapes = Iterator[tuple[str, tuple[int, ...]]]

# Configurations as published, and how many parameters the models have.
MIXTRAL_8X22B: dict[str, Any] = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 6144, "intermediate_size": 16384,
    "num_hidden_layers": 56, "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000,
    "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 65536, "rope_theta": 1e6,
}  # fmt: skip
LLAMA_405B: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16384, "intermediate_size": 53248,
    "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8, "vocab_size": 128_256,
    "max_position_embeddings": 131_072, "rope_theta": 5e5,
}  # fmt: skip
KIMI_K2: dict[str, Any] = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 64,
    "num_key_value_heads": 64, "vocab_size": 163_840, "n_routed_experts": 384, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "first_k_dense_replace": 1, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_group": 1, "topk_group": 1,
    "max_position_embeddings": 131_072, "rope_theta": 5e4,
}  # fmt: skip
MISTRAL_7B: dict[str, Any] = {
    "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000,
    "max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None,
}  # fmt: skip
LARGE = {
    "Mistral-7B": (MISTRAL_7B, 7_241_732_096),
    "Mixtral 8x22B": (MIXTRAL_8X22B, 140_620_634_112),
    "Llama 3.1 405B": (LLAMA_405B, 405_853_388_800),
    "Kimi K2": (KIMI_K2, 1_026_408_232_448),
}


def tensors(config: dict[str, Any]) -> Shapes:
    """(name, shape) of every tensor, in the order in which they are published."""
    d, vocabulary = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, d)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        yield from ((p + name, shape) for name, shape in _attention(config))
        yield from ((p + name, shape) for name, shape in _feed_forward(config, layer))
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{p}{name}.weight", (d,)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (vocabulary, d)


def _attention(config: dict[str, Any]) -> Shapes:
    d, heads = config["hidden_size"], config["num_attention_heads"]
    if "kv_lora_rank" in config:
        q, kv, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
        nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
        yield "self_attn.q_a_proj.weight", (q, d)
        yield "self_attn.q_a_layernorm.weight", (q,)
        yield "self_attn.q_b_proj.weight", (heads * (nope + rope), q)
        yield "self_attn.kv_a_proj_with_mqa.weight", (kv + rope, d)
        yield "self_attn.kv_a_layernorm.weight", (kv,)
        yield "self_attn.kv_b_proj.weight", (heads * (nope + value), kv)
        yield "self_attn.o_proj.weight", (d, heads * value)
        return
    size = config.get("head_dim", d // heads)
    yield "self_attn.q_proj.weight", (heads * size, d)
    for name in ("k_proj", "v_proj"):
        yield f"self_attn.{name}.weight", (config["num_key_value_heads"] * size, d)
    yield "self_attn.o_proj.weight", (d, heads * size)


def _feed_forward(config: dict[str, Any], layer: int) -> Shapes:
    d, wide = config["hidden_size"], config["intermediate_size"]
    if "num_local_experts" in config:
        yield "block_sparse_moe.gate.weight", (config["num_local_experts"], d)
        for expert in range(config["num_local_experts"]):
            p = f"block_sparse_moe.experts.{expert}."
            yield from ((f"{p}w1.weight", (wide, d)), (f"{p}w2.weight", (d, wide)), (f"{p}w3.weight", (wide, d)))
        return
    if layer < config.get("first_k_dense_replace", math.inf):
        yield from _gated("mlp", d, wide)
        return
    wide = config["moe_intermediate_size"]
    yield "mlp.gate.weight", (config["n_routed_experts"], d)
    yield "mlp.gate.e_score_correction_bias", (config["n_routed_experts"],)
    for expert in range(config["n_routed_experts"]):
        yield from _gated(f"mlp.experts.{expert}", d, wide)
    yield from _gated("mlp.shared_experts", d, wide * config["n_shared_experts"])


def _gated(prefix: str, d: int, wide: int) -> Shapes:
    yield f"{prefix}.gate_proj.weight", (wide, d)
    yield f"{prefix}.up_proj.weight", (wide, d)
    yield f"{prefix}.down_proj.weight", (d, wide)


def write(folder: Path, config: dict[str, Any]) -> int:
    """A folder with that configuration and headers of files without weights; its parameters."""
    from quantkit.checkpoint.header import TensorSpec, build_header

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", "rms_norm_eps": 1e-5, **config}))
    every = list(tensors(config))
    parameters = sum(math.prod(shape) for _, shape in every)
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for name, shape in every:
        if size > 5e9:
            shards.append([])
            size = 0
        shards[-1].append(TensorSpec(name, "BF16", shape))
        size += 2 * math.prod(shape)
    weight_map = {}
    for number, specs in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys((s.name for s in specs), file)
        header, _ = build_header(specs)
        with (folder / file).open("wb") as f:
            f.write(header)
            f.truncate(len(header) + sum(2 * math.prod(s.shape) for s in specs))
    index = {"metadata": {"total_size": 2 * parameters}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return parameters
