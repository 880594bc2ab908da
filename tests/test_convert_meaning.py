"""Converted folders mean the same: transformers computes on the one what Mistral's own program computes on the other.

The native side is computed by the oracle (float64, from the description alone), the other by transformers in fp32.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Run
from meanings import CLOSE, THETA, config_of, convert, furthest, load, ours, theirs, wide_hf, wide_native
from oracle import mistral
from safetensors.torch import load_file, save_file

from quantkit.errors import QuantkitError, SourceError


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# --- the same logits --------------------------------------------------------------------------------------------------

NATIVE: dict[str, dict[str, Any]] = {
    "head_dim is not dim / n_heads": {"dim": 40, "params_extra": THETA},
    "window, base by rule": {"params_extra": {"sliding_window": 5}},
    "windows that differ": {"n_layers": 4, "params_extra": {"rope_theta": 1e4, "sliding_window": [None, 5]}},
    "windows that differ, by the other key": {"n_layers": 4, "params_extra": {**THETA, "_sliding_window": [5, None]}},
    "tied": {"tied": True, "params_extra": THETA},
    "no base, no window": {},
    "all heads alike": {"n_kv_heads": 4, "params_extra": {"rope_theta": 500.0}},
    "one head for keys": {"n_kv_heads": 1, "params_extra": {"rope_theta": 500.0}},
    "experts": {"experts": 4, "params_extra": THETA},
    "stacked experts": {"experts": 4, "megablocks": True, "params_extra": THETA},
    "three of five experts": {"experts": 5, "experts_per_token": 3, "megablocks": True, "params_extra": THETA},
}


@pytest.mark.parametrize("case", NATIVE)
def test_native_to_hf_gives_the_same_logits(case: str, tmp_path: Path) -> None:
    source = wide_native(tmp_path / "native", **NATIVE[case])
    expected = ours(source)
    for size in ("5GB", "60kB"):
        out = convert(source, tmp_path / size, "hf", shard_size=size)
        assert furthest(theirs(out), expected) < CLOSE
    back = convert(out, tmp_path / "back", "mistral")
    if NATIVE[case].get("megablocks"):  # they come back one by one, and float64 adds up in another order
        assert furthest(ours(back), expected) < 1e-12
    else:
        assert torch.equal(ours(back), expected)


MINISTRAL = {**TINY["mistral"], "num_hidden_layers": 4, "sliding_window": 5,
             "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
HF: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {}),
    "mistral, window": ("mistral", {"sliding_window": 5}),
    "mistral, tied": ("mistral", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "mistral, another base": ("mistral", {"rope_parameters": {"rope_type": "default", "rope_theta": 321.5}}),
    "llama": ("llama", {}),
    "llama, one head for keys": ("llama", {"num_key_value_heads": 1}),
    "ministral": ("ministral", MINISTRAL),
    "mixtral": ("mixtral", {}),
    "mixtral, window": ("mixtral", {"sliding_window": 5, "num_experts_per_tok": 1}),
}


@pytest.fixture
def tiny_ministral(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TINY, "ministral", {})


@pytest.mark.usefixtures("tiny_ministral")
@pytest.mark.parametrize("case", HF)
def test_hf_to_native_gives_the_same_logits(case: str, tmp_path: Path) -> None:
    model_type, changes = HF[case]
    source = wide_hf(tmp_path / "hf", model_type, **changes)
    expected = theirs(source)
    for form in ("safetensors", "pth"):
        out = convert(source, tmp_path / form, "mistral", weights_format=form)
        assert furthest(ours(out), expected) < CLOSE
    back = convert(out, tmp_path / "back", "hf")
    assert torch.equal(theirs(back), expected)


def swap(folder: Path, one: str, other: str) -> None:
    weights = load_file(folder / "model.safetensors")
    pairs = [(n, n.replace(one, other)) for n in weights if one in n]
    changed = {a: weights[b] for a, b in pairs} | {b: weights[a] for a, b in pairs}
    save_file({**weights, **changed}, folder / "model.safetensors", {"format": "pt"})


def reorder(folder: Path, name: str, head_dim: int) -> None:
    """Rows of each head of that size, in pairs → in halves."""
    weights = load_file(folder / "model.safetensors")
    for n in [n for n in weights if name in n]:
        heads = weights[n].unflatten(0, (-1, head_dim))
        weights[n] = torch.cat([heads[:, 0::2], heads[:, 1::2]], 1).flatten(0, 1).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def setting(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **changes)


MISTAKES: dict[str, Callable[[Path], None]] = {
    "q permuted twice": lambda f: reorder(f, "q_proj", 16),
    "k permuted twice": lambda f: reorder(f, "k_proj", 16),
    "k permuted as if it had q's heads": lambda f: reorder(f, "k_proj", 8),
    "v permuted": lambda f: reorder(f, "v_proj", 16),
    "norms swapped": lambda f: swap(f, "input_layernorm", "post_attention_layernorm"),
    "w1 and w3 swapped": lambda f: swap(f, "gate_proj", "up_proj"),
    "eps": setting(rms_norm_eps=1e-1),
    "window left": setting(sliding_window=5),
    "base": setting(rope_theta=1e4, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "tied": setting(tie_word_embeddings=True),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(mistake: str, tmp_path: Path) -> None:
    """A hundred times the tolerance, and that is the mildest of them."""
    source = wide_native(tmp_path / "native", dim=40, params_extra=THETA)
    out = convert(source, tmp_path / "hf", "hf")
    MISTAKES[mistake](out)
    if mistake == "tied":
        weights = load_file(out / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, out / "model.safetensors", {"format": "pt"})
    assert furthest(theirs(out), ours(source)) > 100 * CLOSE


def test_the_users_base_and_context(tmp_path: Path) -> None:
    source = wide_native(tmp_path / "native")
    out = convert(source, tmp_path / "hf", "hf", native={"rope_theta": 777.0, "context": 96})
    edit(source / "params.json", rope_theta=777.0)
    assert furthest(theirs(out), ours(source)) < CLOSE
    config = load(out).config
    assert (config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (96, 777.0)
    with pytest.raises(QuantkitError, match="rope_theta is 777"):
        convert(source, tmp_path / "other", "hf", native={"rope_theta": 5.0})
    back = convert(out, tmp_path / "back", "mistral")
    assert torch.equal(ours(back), ours(source))


def test_only_the_text_part(tmp_path: Path) -> None:
    source = wide_native(tmp_path / "native", params_extra=THETA)
    weights, expected = mistral.read_weights(source), ours(source)
    params = json.loads((source / "params.json").read_text())
    seeing = {
        "vision_encoder.transformer.layers.0.attention.wq.weight": torch.ones(8, 8), "vision_encoder.ln_pre.weight":
        torch.ones(8), "vision_language_adapter.w_in.weight": torch.ones(64, 8), "patch_merger.merging_layer.weight":
        torch.ones(8, 32), "pre_mm_projector_norm.weight": torch.ones(8),
    }  # fmt: skip
    save_file({**weights, **seeing}, source / "consolidated.safetensors")
    edit(source / "params.json", vision_encoder={"hidden_size": 8})
    with pytest.raises(SourceError, match="image"):
        convert(source, tmp_path / "refused", "hf")
    out = convert(source, tmp_path / "hf", "hf", native={"text_only": True})
    assert furthest(theirs(out), expected) < CLOSE
    native = convert(source, tmp_path / "text", "mistral", native={"text_only": True})
    assert torch.equal(ours(native), expected)
    assert json.loads((native / "params.json").read_text()) == params
    assert torch.equal(ours(convert(out, tmp_path / "back", "mistral")), expected)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_line(spm: bytes, tmp_path: Path, quantkit: Run) -> None:
    source = wide_native(tmp_path / "native", vocab_size=330, params_extra={"sliding_window": 5})
    (source / "tokenizer.model").write_bytes(spm)
    done = quantkit("convert", source, "-o", tmp_path / "hf", "--to", "hf", "--context", 64, "--max-shard-size", "60kB")
    assert done.returncode == 0, done.stderr
    assert furthest(theirs(tmp_path / "hf"), ours(source)) < CLOSE
    assert config_of(tmp_path / "hf")["max_position_embeddings"] == 64
    done = quantkit(
        "convert", tmp_path / "hf", "-o", tmp_path / "back", "--to", "mistral", "--profile", "one-file-ref-2023"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "back" / "params.json").read_text()) == json.loads(
        (source / "params.json").read_text()
    )
    assert "21 tensors mapped back, each equal to the source bit for bit" in done.stdout
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == spm
    found = quantkit("verify", tmp_path / "back", "--source", tmp_path / "hf")
    assert found.returncode == 0
    assert "sound" in found.stdout
    assert "21 tensors compared" in found.stdout  # that is what was asked for
    shutil.copyfile(source / "consolidated.safetensors", tmp_path / "back" / "consolidated.safetensors")
    assert quantkit("verify", tmp_path / "back", "--source", tmp_path / "hf").returncode == 3
