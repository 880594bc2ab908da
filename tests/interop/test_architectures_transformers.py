"""The table against transformers and bitsandbytes: a tiny model of every row is built, saved, and quantized on load."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")

from safetensors import safe_open  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig  # noqa: E402
from transformers.integrations.bitsandbytes import replace_with_bnb_linear  # noqa: E402
from transformers.quantizers.base import HfQuantizer  # noqa: E402

from quantkit import architectures as table  # noqa: E402
from quantkit.derived_architecture import derive  # noqa: E402
from quantkit.errors import SourceError  # noqa: E402

# No two sizes that could be taken for each other are equal: A*D = 80, K*D = 40, A*D+2*K*D = 160, 3H = 192, 4H = 256.
BASE = {
    "vocab_size": 352,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**BASE, "intermediate_size": 224, "num_key_value_heads": 2}
LLAMA = {**GROUPED, "head_dim": 20}
BIASES = {"attention_bias": True, "mlp_bias": True}
GPT2 = {k: v for k, v in BASE.items() if k not in ("hidden_size", "max_position_embeddings")} | {
    "n_embd": 64,
    "n_positions": 48,
}
BLOOM = {k: v for k, v in BASE.items() if k not in ("max_position_embeddings",)}
MOE = {**LLAMA, "moe_intermediate_size": 96, "num_experts": 6, "num_experts_per_tok": 2}

LOW_RANK = {
    **LLAMA, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 40, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16, "v_head_dim": 12, "n_group": 1, "topk_group": 1,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama biases": {**LLAMA, **BIASES},
    "llama plain": {**BASE, "intermediate_size": 224},  # neither head_dim nor num_key_value_heads
    "mistral": LLAMA,
    "ministral": {**LLAMA, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
    "ministral3": LLAMA,
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "attention_bias": True},
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "phi": LLAMA,
    "phi qk_layernorm": {**GROUPED, "qk_layernorm": True},
    "phi3": GROUPED,
    "starcoder2": LLAMA,
    "stablelm": {**GROUPED, "use_qkv_bias": True},
    "stablelm qk_layernorm": {**GROUPED, "qk_layernorm": True, "use_parallel_residual": True},
    "olmo2": {**LLAMA, "attention_bias": True},
    "granite": {**LLAMA, **BIASES},
    "cohere": LLAMA,
    "cohere use_qk_norm": {**LLAMA, "use_qk_norm": True},
    "smollm3": {**LLAMA, **BIASES},
    "gpt_neox": {**BASE, "intermediate_size": 224},
    "opt": {**BASE, "ffn_dim": 224},
    "opt project": {**BASE, "ffn_dim": 224, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "gpt2": GPT2,
    "gpt2 n_inner": {**GPT2, "n_inner": 224},
    "bloom": BLOOM,
    "falcon 7b": {**BASE, "num_kv_heads": 4},  # as published: it says 71, and has one
    "falcon rw": {**BASE, "multi_query": False, "alibi": True, "bias": True, "parallel_attn": False},
    "falcon 40b": {**BASE, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 224},
    "falcon 11b": {**BASE, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    "mixtral": {**LLAMA, "num_local_experts": 6},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 112},
    "qwen2_moe mixed": {**MOE, "shared_expert_intermediate_size": 112, "mlp_only_layers": [0], "qkv_bias": False},
    "qwen3_moe": MOE,
    "qwen3_moe mixed": {**MOE, "decoder_sparse_step": 2},
    "deepseek_v3": LOW_RANK,
    "deepseek_v3 q_proj": {**LOW_RANK, "q_lora_rank": None},
}
ROWS = {case.partition(" ")[0] for case in CASES}


@dataclass
class Saved:
    folder: Path
    config: dict[str, Any]  # config.json as a reader of the folder sees it
    shapes: dict[str, tuple[int, ...]]
    tied: bool
    row: table.Architecture


def tiny_config(case: str, **changes: Any) -> Any:
    return AutoConfig.for_model(case.partition(" ")[0], **CASES[case], **changes)


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def save(case: str) -> Saved:
        folder = tmp_path_factory.mktemp("model")
        model = AutoModelForCausalLM.from_config(tiny_config(case))
        model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        with safe_open(folder / "model.safetensors", "pt") as f:
            shapes = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118
        row = table.find(config)
        assert row is not None
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        return Saved(folder, config, shapes, tied, row)

    return save


def test_every_row_has_a_case() -> None:
    assert {row.name for row in table.ARCHITECTURES} == ROWS


@pytest.mark.parametrize("case", CASES)
def test_shape_of_every_tensor(save: Any, case: str) -> None:
    saved = save(case)
    assert {name: table.expected_shape(saved.row, saved.config, name) for name in saved.shapes} == saved.shapes


@pytest.mark.parametrize("case", CASES)
def test_tied(save: Any, case: str) -> None:
    saved = save(case)
    assert table.is_tied(saved.row, saved.config) == saved.tied
    assert (saved.row.heads[0] + ".weight" in saved.shapes) != saved.tied


@pytest.mark.parametrize("case", CASES)
def test_linears_are_those_that_transformers_quantizes(save: Any, case: str) -> None:
    saved = save(case)
    found = table.linears(saved.row, saved.config, saved.shapes)
    assert len(found) == len(set(found)) > 0
    extras = {linear.module for linear in found if linear.expert or saved.row.name == "falcon"}
    ours = {linear.module for linear in found} - extras

    by_default = loaded(saved, None)
    explicit = loaded(saved, list(table.skip_modules(saved.row, saved.config)))
    assert ours == by_default == explicit
    # Every matrix is a linear, an embedding, a head or a router: nothing is forgotten.
    kept = {name for name, shape in saved.shapes.items() if len(shape) == 2} - {f"{m.module}.weight" for m in found}
    assert all(any(word in name for word in ("embed", "wte", "wpe", "lm_head", ".gate.", "_norm.")) for name in kept)
    assert bool(extras) == bool(saved.row.warning)


def loaded(saved: Saved, skip: list[str] | None) -> set[str]:
    """What from_pretrained turns into Linear4bit. In-memory and disk names are the same for all but experts and head,
    which it does not convert."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip)
    model = AutoModelForCausalLM.from_pretrained(saved.folder, quantization_config=quantization, device_map="cpu")
    return {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tied", [True, False])
def test_explicit_skip_list_says_what_null_says(case: str, tied: bool) -> None:
    config = tiny_config(case, tie_word_embeddings=tied)
    row = table.find({"model_type": config.model_type})
    assert row is not None
    assert table.is_tied(row, config.to_dict()) == tied
    skip = table.skip_modules(row, config.to_dict())
    assert len(skip) == len(row.heads) + tied
    assert on_meta(config, list(skip)) == on_meta(config, None)


def on_meta(config: Any, skip: list[str] | None) -> set[str]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    patterns = HfQuantizer.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules)
    model = replace_with_bnb_linear(model, patterns, BitsAndBytesConfig(load_in_4bit=True))
    return {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


def test_the_one_accident_that_an_explicit_list_does_not_repeat() -> None:
    """transformers' null skips the module of the last parameter, meant to be a head. An OPT without biases and without
    affine norms, tied, ends in a linear, so null leaves that one fc2 of all in 16 bits. Spelled out, it does not."""
    bare = {**BASE, "ffn_dim": 224, "enable_bias": False, "layer_norm_elementwise_affine": False}
    config = AutoConfig.for_model("opt", **bare)
    row = table.find({"model_type": "opt"})
    assert row is not None
    explicit = on_meta(config, list(table.skip_modules(row, config.to_dict())))
    assert explicit - on_meta(config, None) == {"model.decoder.layers.1.fc2"}


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("falcon")])
def test_the_fallback_agrees_with_the_table(save: Any, case: str) -> None:
    saved = save(case)
    found, skipped = derive(saved.config, saved.shapes)
    assert set(found) == {m for m in table.linears(saved.row, saved.config, saved.shapes) if not m.expert}
    assert set(skipped) == {name for name in table.skip_modules(saved.row, saved.config) if name != "embed_out"}


@pytest.mark.parametrize("model_type", sorted(ROWS))
def test_defaults_are_those_of_the_config_class(model_type: str) -> None:
    row = table.find({"model_type": model_type})
    assert row is not None
    fields = type(AutoConfig.for_model(model_type)).__dataclass_fields__
    defaults = {key: fields[key].default for key in ("num_key_value_heads", "head_dim") if key in fields}
    assert dict(row.defaults) == {key: value for key, value in defaults.items() if value is not None}
    assert row.tied == fields["tie_word_embeddings"].default


def test_fallback_reads_a_model_without_a_row(tmp_path: Path) -> None:
    config = AutoConfig.for_model("olmo", **{**GROUPED, "auto_map": {"AutoModelForCausalLM": "evil.Evil"}})
    assert table.find({"model_type": "olmo"}) is None
    names = [f"layers.{i}.{kind}.weight" for i in range(2) for kind in table.ARCHITECTURES[0].linears]
    found, skipped = derive(config.to_dict(), [*names, "embed_tokens.weight"])
    assert {f"{linear.module}.weight" for linear in found} == set(names)  # on disk there is no prefix
    assert {linear.kind for linear in found} == set(table.ARCHITECTURES[0].linears)
    assert {linear.layer for linear in found} == {0, 1}
    assert skipped == ("lm_head",)


@pytest.mark.parametrize(
    ("config", "names", "message"),
    [
        ({"model_type": "no_such"}, [], "cannot build"),
        ({}, [], "cannot build"),
        ({"model_type": "t5"}, [], "cannot build"),
        ({"model_type": "llama", **LLAMA, "hidden_size": "many"}, [], "cannot build"),
        ({"model_type": "falcon", **BASE}, ["transformer.h.0.mlp.dense_h_to_4h.weight"], "quantize nothing"),
        ({"model_type": "llama", **LLAMA}, ["a.weight"], "14 of 14 linears"),
        ({"model_type": "llama", **LLAMA}, ["model.layers.0.mlp.up_proj.weight"], "13 of 14 linears"),
    ],
)
def test_fallback_refuses(config: dict[str, Any], names: list[str], message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        derive(config, names)
    assert len(str(caught.value).splitlines()) == 3
