"""The table by itself: no torch, no transformers, real configs. tests/interop proves it against transformers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from quantkit import architectures as table
from quantkit.architectures import ARCHITECTURES, Linear
from quantkit.errors import SourceError

CONFIGS = Path(__file__).resolve().parents[2] / "shared" / "data" / "configs"

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
# As published by TII: the 7B's num_kv_heads means nothing, the 40B was first called RefinedWeb.
FALCON_7B = {
    "model_type": "falcon",
    "hidden_size": 4544,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "num_kv_heads": 71,
    "multi_query": True,
    "new_decoder_architecture": False,
    "vocab_size": 65024,
}
REFINED_WEB = {
    "model_type": "RefinedWeb",
    "hidden_size": 8192,
    "n_head": 128,
    "n_head_kv": 8,
    "n_layer": 60,
    "vocab_size": 65024,
}


def row(config: dict[str, Any]) -> table.Architecture:
    found = table.find(config)
    assert found is not None
    return found


def shape(config: dict[str, Any], name: str) -> tuple[int, ...] | None:
    return table.expected_shape(row(config), config, name)


def tensor_names(config: dict[str, Any]) -> list[str]:
    """Every weight of a model whose row has no `*`, as its files name it."""
    arch = row(config)
    layers = config.get("num_hidden_layers") or config["n_layer"]
    inside = [
        f"{arch.prefix}.{arch.blocks}.{i}.{name}" for i in range(layers) for name in [*arch.linears, *arch.others]
    ]
    return [f"{name}.weight" for name in [*(f"{arch.prefix}.{name}" for name in arch.outside), *inside]]


def test_import_is_cheap_and_needs_no_torch() -> None:
    code = "import sys, quantkit.architectures; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_takes_under_50_ms() -> None:
    code = (
        "import time, sys; sys.path.insert(0, sys.argv[1]); start = time.process_time(); "
        "import quantkit.architectures; print(time.process_time() - start)"
    )
    root = str(Path(table.__file__).parents[1])
    # Of the processor, and the best of a few: the machine may be busy, the module may not be slow.
    found = []
    while not found or (min(found) >= 0.05 and len(found) < 10):
        run = subprocess.run([sys.executable, "-c", code, root], capture_output=True, check=True)
        found.append(float(run.stdout))
    assert min(found) < 0.05


def test_find() -> None:
    assert row({"model_type": "gemma3_text"}).name == "gemma3_text"
    assert row({"model_type": "RefinedWebModel"}) is row({"model_type": "RefinedWeb"}) is row(FALCON_7B)
    assert table.find({"model_type": "mamba"}) is None
    assert table.find({}) is None
    assert table.find({"model_type": ["llama"]}) is None


def test_no_model_type_has_two_rows() -> None:
    types = [model_type for arch in ARCHITECTURES for model_type in arch.model_types]
    assert len(types) == len(set(types))


@pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda arch: arch.name)
def test_a_row_is_whole(arch: table.Architecture) -> None:
    assert not set(arch.linears) & set(arch.others)
    assert not set(arch.outside_linears) & set(arch.outside)
    assert arch.embedding in arch.outside
    assert all(len(sizes) == 2 for sizes in [*arch.linears.values(), *arch.outside_linears.values()])


def test_linears_come_in_order_of_the_forward_pass_whatever_the_order_of_names() -> None:
    config = {**LLAMA, "model_type": "mixtral", "num_local_experts": 2, "num_hidden_layers": 11}
    moe = "block_sparse_moe"
    names = [
        "lm_head.weight",
        "model.embed_tokens.weight",
        f"model.layers.10.{moe}.experts.1.w2.weight",
        f"model.layers.10.{moe}.experts.0.w2.weight",
        f"model.layers.10.{moe}.experts.1.w1.weight",
        f"model.layers.10.{moe}.gate.weight",
        f"model.layers.2.{moe}.experts.0.w1.weight",
        "model.layers.10.input_layernorm.weight",
        "model.layers.10.self_attn.q_proj.bias",
        "model.layers.10.self_attn.q_proj.weight",
    ]
    found = table.linears(row(config), config, names)
    assert [linear.module for linear in found] == [
        f"model.layers.2.{moe}.experts.0.w1",
        "model.layers.10.self_attn.q_proj",
        f"model.layers.10.{moe}.experts.0.w2",
        f"model.layers.10.{moe}.experts.1.w1",
        f"model.layers.10.{moe}.experts.1.w2",
    ]
    assert found[0] == Linear(f"model.layers.2.{moe}.experts.0.w1", f"{moe}.experts.w1", 2, False, True)
    assert found[1] == Linear("model.layers.10.self_attn.q_proj", "self_attn.q_proj", 10, False, False)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.32.mlp.up_proj.weight",  # a layer more than config.json has: transformers leaves it out too
        "model.layers.-1.mlp.up_proj.weight",
        "model.layers.03.mlp.up_proj.weight",
        "model.layers.٣.mlp.up_proj.weight",
        "model.layers.99999999999999999999.mlp.up_proj.weight",
        "model.layers.3.mlp.0.up_proj.weight",
        "model.layers.3.up_proj.weight",
        "model.layers.3.weight",
        "model.layers.3.self_attn.rotary_emb.inv_freq",
        "model.model.layers.3.mlp.up_proj.weight",
        "model.lm_head.weight",
        "vision.layers.3.mlp.up_proj.weight",
        "model.embed_tokens.bias",
        "model.embed_tokens",
        "weight",
        "",
    ],
)
def test_a_name_that_the_model_does_not_have(name: str) -> None:
    assert shape(LLAMA, name) is None
    assert table.linears(row(LLAMA), LLAMA, [name]) == []


def test_an_expert_more_than_config_has() -> None:
    config = {**LLAMA, "model_type": "mixtral", "num_local_experts": 8}
    assert shape(config, "model.layers.0.block_sparse_moe.experts.7.w1.weight") == (11008, 4096)
    assert shape(config, "model.layers.0.block_sparse_moe.experts.8.w1.weight") is None
    assert shape(config, "model.layers.0.block_sparse_moe.experts.w1.weight") is None


@pytest.mark.parametrize("model_type", ["bloom", "gpt2", "llama"])
def test_the_prefix_may_be_absent(model_type: str) -> None:
    config = {**LLAMA, "model_type": model_type, "n_positions": 1024}
    arch = row(config)
    names = tensor_names(config)
    bare = [name.removeprefix(f"{arch.prefix}.") for name in names]
    assert [shape(config, name) for name in bare] == [shape(config, name) for name in names]
    assert None not in [shape(config, name) for name in names]
    found = table.linears(arch, config, bare)
    assert [f"{arch.prefix}.{linear.module}" for linear in found] == [
        linear.module for linear in table.linears(arch, config, names)
    ]


def test_gpt2_lies_transposed() -> None:
    config = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_inner": None}
    assert shape(config, "h.0.attn.c_attn.weight") == (768, 2304)
    assert shape(config, "h.0.attn.c_attn.bias") == (2304,)
    assert shape(config, "h.0.mlp.c_proj.weight") == (3072, 768)
    assert shape(config, "wte.weight") == (50257, 768)
    assert shape(config, "h.0.attn.bias") is None  # the causal mask of old files
    assert all(linear.transposed for linear in table.linears(row(config), config, tensor_names(config)))


def test_falcon_generations() -> None:
    qkv = "transformer.h.0.self_attention.query_key_value.weight"
    assert shape(FALCON_7B, qkv) == (4672, 4544)
    assert shape(FALCON_7B, "transformer.h.0.mlp.dense_h_to_4h.weight") == (18176, 4544)
    assert shape({**FALCON_7B, "multi_query": False}, qkv) == (3 * 4544, 4544)
    assert shape(REFINED_WEB, qkv) == (9216, 8192)
    assert shape({**REFINED_WEB, "model_type": "falcon"}, qkv) == (8192 + 2 * 64, 8192)
    assert shape({**REFINED_WEB, "model_type": "falcon", "new_decoder_architecture": True}, qkv) == (9216, 8192)
    assert shape(REFINED_WEB, "transformer.h.59.ln_mlp.bias") == (8192,)


def test_absent_is_not_null() -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    mistral = {**LLAMA, "model_type": "mistral"}
    assert shape(LLAMA, name) == (4096, 4096)
    assert shape(mistral, name) == (1024, 4096)  # the class says 8
    assert shape({**mistral, "num_key_value_heads": None}, name) == (4096, 4096)
    assert shape({**LLAMA, "head_dim": 64, "num_key_value_heads": 2}, name) == (128, 4096)
    assert shape({**LLAMA, "model_type": "gemma"}, name) == (16 * 256, 4096)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"intermediate_size": None}, "intermediate_size or ffn_dim or ffn_hidden_size or n_inner is missing"),
        ({"hidden_size": "4096"}, "n_embed or hidden_size or n_embd is '4096', which is no size"),
        ({"num_attention_heads": 0}, "num_attention_heads or n_head is 0, which is no size"),
        ({"num_hidden_layers": True}, "num_hidden_layers or n_layer is True, which is no size"),
        ({"vocab_size": -1}, "vocab_size is -1, which is no size"),
    ],
)
def test_a_size_that_is_none(change: dict[str, Any], what: str) -> None:
    config = {**LLAMA, **change}
    with pytest.raises(SourceError) as caught:
        [shape(config, name) for name in tensor_names(LLAMA)]
    lines = str(caught.value).splitlines()
    assert lines[0] == what
    assert lines[1] == "  in: config.json (model_type 'llama')"
    assert lines[2].startswith("  hint: a llama model cannot be measured without it")


def test_tied_and_skip_modules() -> None:
    assert not table.is_tied(row(LLAMA), LLAMA)
    assert table.skip_modules(row(LLAMA), LLAMA) == ("lm_head",)
    tied = {**LLAMA, "tie_word_embeddings": True}
    assert table.skip_modules(row(tied), tied) == ("model.embed_tokens", "lm_head")
    gemma = {"model_type": "gemma"}
    assert table.is_tied(row(gemma), gemma)
    assert not table.is_tied(row(gemma), {**gemma, "tie_word_embeddings": False})
    opt = {"model_type": "opt"}
    assert table.skip_modules(row(opt), opt) == ("model.decoder.embed_tokens", "lm_head")
    assert table.skip_modules(row(FALCON_7B), FALCON_7B) == ("transformer.word_embeddings", "lm_head")
    assert table.skip_modules(row({"model_type": "gpt_neox"}), {}) == ("embed_out", "lm_head")


def test_warnings_for_readers() -> None:
    warned = {arch.name: arch.warning for arch in ARCHITECTURES if arch.warning}
    assert set(warned) == {"falcon", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3"}
    assert all("quantkit.load" in warning for warning in warned.values())


def test_large_models_are_measured_quickly() -> None:
    """Qwen3-235B has 36,945 tensors; planning from its index must not be felt."""
    config = {
        **LLAMA, "model_type": "qwen3_moe", "num_hidden_layers": 94, "num_experts": 128, "moe_intermediate_size": 1536
    }  # fmt: skip
    names = [
        f"model.layers.{i}.mlp.experts.{j}.{kind}_proj.weight"
        for i in range(94)
        for j in range(128)
        for kind in ("gate", "up", "down")
    ]
    start = time.perf_counter()
    assert len(table.linears(row(config), config, names)) == len(names)
    assert None not in {shape(config, name) for name in names}
    assert time.perf_counter() - start < 5


def real(name: str) -> dict[str, Any]:
    path = CONFIGS / name / "config.json"
    if not path.exists():
        pytest.skip(f"{path} is not here: real configs lie beside the repository, not in it")
    config: dict[str, Any] = json.loads(path.read_text())
    return config


@pytest.mark.parametrize("name", ["mixtral-8x7b", "mistral-7b-lily"])
def test_a_plan_from_config_and_index_alone(name: str) -> None:
    config = real(name)
    index = json.loads((CONFIGS / name / "model.safetensors.index.json").read_text())
    itemsize = {"bfloat16": 2, "float16": 2, "float32": 4}[config["torch_dtype"]]
    shapes = {tensor: shape(config, tensor) for tensor in index["weight_map"]}
    assert None not in shapes.values()
    total = sum(math.prod(sizes) for sizes in shapes.values() if sizes) * itemsize
    assert total == index["metadata"]["total_size"]
    found = table.linears(row(config), config, shapes)
    assert {f"{linear.module}.weight" for linear in found} == {
        tensor for tensor in shapes if "_proj." in tensor or ".experts." in tensor
    }


def test_bloom_560m_from_its_config() -> None:
    """One file, and so no index to compare with: the figure is the parameter count of transformers' model."""
    config = real("bloom-560m")
    arch = row(config)
    norms = [*arch.others, *(name for name, sizes in arch.outside.items() if len(sizes) == 1)]
    weights = tensor_names(config)
    biased = (*arch.linears, *norms)
    names = weights + [n.removesuffix("weight") + "bias" for n in weights if n.removesuffix(".weight").endswith(biased)]
    assert sum(math.prod(shape(config, name) or ()) for name in names) == 559_214_592
