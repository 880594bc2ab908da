"""What transformers makes of a converted folder: nothing is left to the defaults of its classes, every tensor is where
it computes with it, and its tokenizer makes of a text the ids that sentencepiece makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from meanings import THETA, assert_same_ids, config_of, convert, load
from oracle import mistral
from oracle.native_models import make_native
from safetensors.torch import load_file

import quantkit as package
from quantkit.errors import SourceError

# --- the traps, as transformers sees them -----------------------------------------------------------------------------


def test_nothing_is_left_to_the_defaults_of_a_class(tmp_path: Path) -> None:
    """Those of MistralConfig: a window of 4096, eps 1e-6, base 10,000, 8 heads for keys, heads of dim / n_heads,
    131,072 positions."""
    source = make_native(tmp_path / "native", dim=40, params_extra={"rope_theta": 1e6})
    config = load(convert(source, tmp_path / "hf", "hf")).config
    assert (config.model_type, config.architectures) == ("mistral", ["MistralForCausalLM"])
    assert config.sliding_window is None
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert (config.head_dim, config.num_key_value_heads, config.num_attention_heads) == (16, 2, 4)
    assert config.max_position_embeddings == 32768
    assert (config.tie_word_embeddings, config.hidden_act) == (False, "silu")
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    written = config_of(tmp_path / "hf")
    for key in ("sliding_window", "rms_norm_eps", "rope_theta", "rope_parameters", "head_dim", "num_key_value_heads",
                "max_position_embeddings", "tie_word_embeddings"):  # fmt: skip
        assert key in written, key
    # both generations of readers
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("extra", "window", "theta"),
    [
        ({"sliding_window": 4096}, 4096, 1e4),  # 7B v0.1 says no base: it is 10,000
        ({"sliding_window": 4096, "rope_theta": 1e6}, 4096, 1e6),
        ({"sliding_window": None, "rope_theta": 1e6}, None, 1e6),
        ({}, None, 1e6),
        ({"rope_theta": 1e8}, None, 1e8),
    ],
)
@pytest.mark.parametrize("experts", [0, 2])
def test_window_and_base(extra: dict[str, Any], window: int | None, theta: float, experts: int, tmp_path: Path) -> None:
    source = make_native(tmp_path / "native", experts=experts, params_extra=extra)
    config = load(convert(source, tmp_path / "hf", "hf")).config
    assert config.model_type == ("mixtral" if experts else "mistral")
    assert (config.sliding_window, config.rope_parameters["rope_theta"]) == (window, theta)
    params = json.loads((convert(tmp_path / "hf", tmp_path / "back", "mistral") / "params.json").read_text())
    assert (params.get("sliding_window"), params["rope_theta"]) == (window, theta)  # a base is always written


def test_every_tensor_is_where_transformers_computes_with_it(tmp_path: Path) -> None:
    """Read from the loaded model, not from the file; every tensor of the source has other values, the norms too."""
    shape: dict[str, Any] = {"dim": 48, "hidden_dim": 48, "n_heads": 3, "n_kv_heads": 3, "vocab_size": 48}
    source = make_native(tmp_path / "native", dtype="float32", params_extra=THETA, **shape)
    native = mistral.read_weights(source)
    model = load(convert(source, tmp_path / "hf", "hf"))
    for i, layer in enumerate(model.model.layers):
        at = {name.removeprefix(f"layers.{i}."): t for name, t in native.items() if name.startswith(f"layers.{i}.")}
        plain = {
            "attention_norm.weight": layer.input_layernorm, "ffn_norm.weight": layer.post_attention_layernorm,
            "attention.wv.weight": layer.self_attn.v_proj, "attention.wo.weight": layer.self_attn.o_proj,
            "feed_forward.w1.weight": layer.mlp.gate_proj, "feed_forward.w2.weight": layer.mlp.down_proj,
            "feed_forward.w3.weight": layer.mlp.up_proj,
        }  # fmt: skip
        for name, module in plain.items():
            assert torch.equal(module.weight, at[name]), name
        for name, module in (
            ("attention.wq.weight", layer.self_attn.q_proj),
            ("attention.wk.weight", layer.self_attn.k_proj),
        ):
            for head in range(3):
                for j in range(8):
                    assert torch.equal(module.weight[16 * head + j], at[name][16 * head + 2 * j])
                    assert torch.equal(module.weight[16 * head + 8 + j], at[name][16 * head + 2 * j + 1])
    assert torch.equal(model.model.embed_tokens.weight, native["tok_embeddings.weight"])
    assert torch.equal(model.lm_head.weight, native["output.weight"])
    assert torch.equal(model.model.norm.weight, native["norm.weight"])


def test_experts_are_where_transformers_computes_with_them(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"dim": 48, "hidden_dim": 48, "experts": 3, "dtype": "float32", "params_extra": THETA}
    native = mistral.read_weights(make_native(tmp_path / "native", **shape))
    for megablocks in (False, True):
        source = make_native(tmp_path / f"source {megablocks}", megablocks=megablocks, **shape)
        model = load(convert(source, tmp_path / f"hf {megablocks}", "hf"))
        for i, layer in enumerate(model.model.layers):
            assert torch.equal(layer.mlp.gate.weight, native[f"layers.{i}.feed_forward.gate.weight"])
            for e in range(3):
                w1, w2, w3 = (native[f"layers.{i}.feed_forward.experts.{e}.w{n}.weight"] for n in (1, 2, 3))
                assert torch.equal(layer.mlp.experts.gate_up_proj[e], torch.cat([w1, w3]))
                assert torch.equal(layer.mlp.experts.down_proj[e], w2)


def test_layers_of_two_kinds(tmp_path: Path) -> None:
    source = make_native(tmp_path / "native", n_layers=4, params_extra={**THETA, "sliding_window": [None, 7]})
    model = load(convert(source, tmp_path / "hf", "hf"))
    assert model.config.model_type == "ministral"
    assert model.config.layer_types == ["full_attention", "sliding_attention"] * 2
    assert model.config.sliding_window == 7


def test_a_tied_head_is_tied(tmp_path: Path) -> None:
    source = make_native(tmp_path / "native", tied=True, params_extra=THETA)
    model = load(convert(source, tmp_path / "hf", "hf"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "hf" / "model.safetensors")


def test_the_dtype_stays(tmp_path: Path) -> None:
    import transformers

    for dtype in ("bfloat16", "float16", "float32"):
        source = make_native(tmp_path / f"{dtype} native", dtype=dtype, params_extra=THETA)
        out = convert(source, tmp_path / dtype, "hf")
        model = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}


# --- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v1"])
def test_a_tokenizer_keeps_its_name_and_its_ids(name: str, spm: bytes, tmp_path: Path) -> None:
    source = make_native(tmp_path / "native", vocab_size=330, params_extra=THETA)
    (source / name).write_bytes(spm)
    (source / "LICENSE").write_text("ours")
    hf = convert(source, tmp_path / "hf", "hf", tokenizer=True)
    assert (hf / name).read_bytes() == spm
    assert (hf / "LICENSE").read_text() == "ours"
    assert_same_ids(hf, spm)
    back = convert(hf, tmp_path / "back", "mistral", tokenizer=True)
    # as Mistral's own programs want it: one file of weights, one tokenizer, nothing of the other layout
    assert sorted(p.name for p in back.iterdir()) == sorted(
        ["LICENSE", "README.md", "consolidated.safetensors", "params.json", "quantkit.json", name]
    )
    assert (back / name).read_bytes() == spm
    bare = convert(source, tmp_path / "bare", "hf")
    assert sorted(p.name for p in bare.iterdir()) == [
        "LICENSE", "README.md", "config.json", "model.safetensors", "quantkit.json",
    ]  # fmt: skip


def test_a_folder_without_a_tokenizer_is_asked_for_one(tmp_path: Path) -> None:
    source = make_native(tmp_path / "native", params_extra=THETA)
    with pytest.raises(SourceError, match="no tokenizer"):
        convert(source, tmp_path / "out", "hf", tokenizer=True)


def test_a_tokenizer_config_beside_a_native_tokenizer_is_planned_once(spm: bytes, tmp_path: Path) -> None:
    """It is made anew, so the one that lies in the native folder has no place in the output."""
    source = make_native(tmp_path / "native", vocab_size=330, params_extra=THETA)
    (source / "tokenizer.model").write_bytes(spm)
    (source / "tokenizer_config.json").write_text("{}")
    job = package.plan(str(source), {"convert": {"to": "hf"}})
    out = convert(source, tmp_path / "out", "hf", tokenizer=True)
    assert_same_ids(out, spm)
    assert job.disk == sum(p.stat().st_size for p in out.iterdir())
    assert sorted(f.name for f in job.files) == sorted(p.name for p in out.iterdir())
