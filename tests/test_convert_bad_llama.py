"""What can be wrong with Meta's Llama folders, and with what a stranger's manifest recorded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_inputs import Spoil
from convert_inputs import ESCAPES, FP8, GONE, NORM, WQ, Program, base_config, both, params, remove, written
from torch import Tensor


def shard(i: int, change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / f"consolidated.{i:02}.pth"
        table = torch.load(path)
        change(table)
        torch.save(table, path)

    return spoil


def third_shard(folder: Path) -> None:
    shutil.copy(folder / "consolidated.01.pth", folder / "consolidated.03.pth")


BAD_LLAMA: dict[str, tuple[Spoil, str]] = {
    "first shard missing": (remove("consolidated.00.pth"), "number 0 is missing (1 of 2"),
    "last shard missing": (remove("consolidated.01.pth"), "params.json makes it"),
    "middle shard missing": (third_shard, "number 2 is missing (3 of 4"),
    "shard of another shape": (
        shard(1, lambda t: t.update({WQ: t[WQ][:16].clone()})),
        "not in every shard in one shape",
    ),
    "shard of another dtype": (shard(1, lambda t: t.update({WQ: t[WQ].float()})), "not in every shard in one shape"),
    "tensor in one shard": (shard(1, lambda t: t.pop(WQ)), "not in every shard in one shape"),
    "tensor in the other shard": (shard(0, lambda t: t.pop(WQ)), "attention.wq"),
    "one tensor more in the other shard": (shard(1, lambda t: t.update({"layers.0.x": t[WQ]})), "'layers.0.x'"),
    "norms that differ": (shard(1, lambda t: t.update({NORM: t[NORM] + 1})), f"tensor '{NORM}' is not the same"),
    "unknown tensor": (shard(0, lambda t: t.update({"layers.0.x": t[WQ]})), "'layers.0.x' has no place"),
    "heads do not fit": (params(n_heads=8), "params.json makes it"),
    "heads do not divide": (params(n_heads=5), "is"),
    "kv heads do not fit": (params(n_kv_heads=4), "params.json makes it"),
    "kv heads left out": (params(n_kv_heads=GONE), "params.json makes it"),
    "kv heads in quotes": (params(n_kv_heads="2"), "'2'"),
    "kv heads are true": (params(n_kv_heads=True), "True"),
    "dim does not fit": (params(dim=128), ""),
    "dim is negative": (params(dim=-64), "dim is -64"),
    "dim is true": (params(dim=True), "dim is True"),
    "layers do not fit": (params(n_layers=3), "tensor 'layers.2."),
    "layers without end": (params(n_layers=2**31 - 1), "no model has so many layers"),
    "no layers": (params(n_layers=GONE), "n_layers is missing"),
    "more layers in the weights": (params(n_layers=1), "layers.1."),
    "unknown key": (params(n_experts=4), "'n_experts'"),
    "unknown key that escapes": (params(**{ESCAPES: 4}), "'\\x1b[2J"),
    "epsilon in quotes": (params(norm_eps="1e-5"), "norm_eps"),
    "epsilon is NaN": (params(norm_eps=float("nan")), "norm_eps is nan"),
    "epsilon is negative": (params(norm_eps=-1e-5), "norm_eps is -1e-05"),
    "no epsilon": (params(norm_eps=GONE), "norm_eps"),
    "theta is NaN": (params(rope_theta=float("nan")), "rope_theta"),
    "theta is infinite": (params(rope_theta=float("inf")), "rope_theta"),
    "theta is beyond all measure": (params(rope_theta=10**400), "rope_theta"),
    "context is negative": (params(max_seq_len=-5), "max_seq_len"),
    "context in quotes": (params(max_seq_len="2048"), "max_seq_len"),
    "context is huge": (params(max_seq_len=2**40), "max_seq_len"),
    "scaled by text": (params(use_scaled_rope=True, rope_scaling_factor="eight"), "rope_scaling_factor"),
    "scaled by a list": (params(use_scaled_rope=True, rope_high_freq_factor=[4]), "rope_high_freq_factor"),
    "scaled by zero": (params(use_scaled_rope=True, rope_scaling_factor=0), "rope_scaling_factor"),
    "scaled by NaN": (params(use_scaled_rope=True, rope_scaling_factor=float("nan")), "rope_scaling_factor"),
    "scaled by 1": (params(use_scaled_rope=1), "use_scaled_rope"),
    "FP8": (both(*(shard(i, lambda t: t.update({WQ: t[WQ].to(FP8)})) for i in range(2))), "F8_E4M3"),
    "truncated": (lambda f: os.truncate(f / "consolidated.01.pth", 20_000), ""),
    "embedding missing": (both(*(shard(i, lambda t: t.pop("tok_embeddings.weight")) for i in range(2))), "missing"),
}


@pytest.mark.parametrize(("spoil", "what"), BAD_LLAMA.values(), ids=BAD_LLAMA)
def test_a_bad_llama_folder_is_refused(spoil: Spoil, what: str, llama: Path, out: Path, program: Program) -> None:
    spoil(llama)
    refusal = program.refuses(llama, out, "--to", "hf")
    assert what in refusal.what
    assert str(llama) in refusal.where


def test_a_scaled_llama_stays_out_of_mistrals_layout(llama: Path, out: Path, program: Program) -> None:
    params(rope_theta=500000.0, use_scaled_rope=True)(llama)
    assert "rope_parameters" in program.refuses(llama, out, "--to", "mistral").what


@pytest.mark.parametrize("theta", [None, GONE])
def test_a_llamas_theta_can_be_said(theta: Any, llama: Path, out: Path, program: Program) -> None:
    params(rope_theta=theta)(llama)
    program.converts(llama, out, "--to", "hf", "--rope-theta", 5000)
    assert written(out)["rope_theta"] == 5000


def recorded(**files: Any) -> Spoil:
    """quantkit.json of a stranger: `config` or `params` as what the other layout said."""
    kept = {f"{name}.json": value for name, value in files.items()}
    return lambda folder: (folder / "quantkit.json").write_text(json.dumps({"recorded": kept}))


@pytest.mark.parametrize("said", ["params", "option"])
def test_a_record_does_not_outrank_the_context(said: str, native: Path, out: Path, program: Program) -> None:
    recorded(config={**base_config(), "max_position_embeddings": 512})(native)
    options = ()
    if said == "params":
        params(max_position_embeddings=2048)(native)
    else:
        options = ("--context", "2048")
    program.converts(native, out, "--to", "hf", *options)
    assert written(out)["max_position_embeddings"] == 2048


def test_a_record_does_not_change_the_dtype(native: Path, out: Path, program: Program) -> None:
    """transformers loads in the dtype that config.json announces: from bfloat16 to float16 loses weights."""
    recorded(config={**base_config(), "torch_dtype": "float16", "dtype": "float16"})(native)
    program.converts(native, out, "--to", "hf")
    table = written(out)
    assert table.get("dtype", "bfloat16") == table.get("torch_dtype", "bfloat16") == "bfloat16"


def test_a_record_does_not_change_the_class(native: Path, out: Path, program: Program) -> None:
    """vLLM goes by architectures: LlamaForCausalLM would leave the window out."""
    params(sliding_window=64)(native)
    recorded(config={**base_config(), "sliding_window": 64, "architectures": ["LlamaForCausalLM"]})(native)
    program.converts(native, out, "--to", "hf")
    assert written(out)["architectures"] == ["MistralForCausalLM"]


@pytest.mark.parametrize("to", ["hf", "mistral"])
def test_a_record_that_names_code_does_not_travel(to: str, native: Path, out: Path, program: Program) -> None:
    """Nor does it from one manifest into the next."""
    evil = {**base_config(), "auto_map": {"AutoModel": "evil.Evil"}, "_name_or_path": "/home/somebody",
            "rope_scaling": None, "attn_implementation": "evil/kernel"}  # fmt: skip
    recorded(config=evil)(native)
    program.converts(native, out, "--to", to)
    for file in out.glob("*.json"):
        assert "evil" not in file.read_text(), file.name
        assert "somebody" not in file.read_text(), file.name
