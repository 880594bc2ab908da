"""Random models in Mistral's native layout, in each of the forms in which such folders are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from oracle.mistral import expected_shapes
from safetensors.torch import save_file
from torch import Tensor

Files = Literal["safetensors", "pth", "pt-shards", "safetensors-shards"]


def random_weights(params: dict[str, Any], dtype: str, *, tied: bool, megablocks: bool, seed: int) -> dict[str, Tensor]:
    """Matrices of deviation 0.05, norms around 1. Experts are the same numbers in both of their layouts."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in expected_shapes(params, tied=tied, megablocks=False).items():
        noise = torch.randn(shape, generator=generator)
        weights[name] = (1 + 0.1 * noise if len(shape) == 1 else 0.05 * noise).to(getattr(torch, dtype))
    if megablocks:
        for i in range(params["n_layers"]):
            weights[f"layers.{i}.block_sparse_moe.gate.weight"] = weights.pop(f"layers.{i}.feed_forward.gate.weight")
            for w in ("w1", "w2", "w3"):
                names = [f"layers.{i}.feed_forward.experts.{e}.{w}.weight" for e in range(params["moe"]["num_experts"])]
                parts = [weights.pop(name) for name in names]
                weights[f"layers.{i}.block_sparse_moe.{w}"] = torch.cat([p.T if w == "w2" else p for p in parts])
    return weights


def save_weights(folder: Path, weights: dict[str, Tensor], files: Files) -> None:
    """One file, eight `.pt` files as of Mixtral, or three safetensors with an index; shards have no key in common."""
    if files == "pth":
        torch.save(weights, folder / "consolidated.00.pth")
    elif files == "safetensors":
        save_file(weights, folder / "consolidated.safetensors")
    elif files == "pt-shards":
        for i in range(8):
            torch.save(dict(list(weights.items())[i::8]), folder / f"consolidated.{i:02}.pt")
    else:
        where = {}
        for i in range(3):
            file = f"consolidated-{i + 1:05}-of-00003.safetensors"
            part = dict(list(weights.items())[i::3])
            save_file(part, folder / file)
            where.update(dict.fromkeys(part, file))
        index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": where}
        (folder / "consolidated.safetensors.index.json").write_text(json.dumps(index))


def make_native(
    folder: Path,
    *,
    dim: int = 64,
    n_layers: int = 2,
    head_dim: int = 16,
    hidden_dim: int = 96,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    vocab_size: int = 256,
    dtype: str = "bfloat16",
    experts: int = 0,
    experts_per_token: int = 2,
    tied: bool = False,
    files: Files = "safetensors",
    megablocks: bool = False,
    params_extra: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """A random native folder, without a tokenizer. The same seed gives the same numbers for every `files`.

    params.json has the eight keys that all generations share, "moe" and "tied_embeddings" where they apply, and then
    `params_extra`: {"sliding_window": 4096} makes it a v0.1, {"rope_theta": 1e6} a v0.3.
    """
    if megablocks and not experts:
        raise ValueError("megablocks is a layout of experts")
    params: dict[str, Any] = {
        "dim": dim, "n_layers": n_layers, "head_dim": head_dim, "hidden_dim": hidden_dim, "n_heads": n_heads,
        "n_kv_heads": n_kv_heads, "norm_eps": 1e-5, "vocab_size": vocab_size,
    }  # fmt: skip
    if experts:
        params["moe"] = {"num_experts_per_tok": experts_per_token, "num_experts": experts}
    if tied:
        params["tied_embeddings"] = True
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params | (params_extra or {})))
    save_weights(folder, random_weights(params, dtype, tied=tied, megablocks=megablocks, seed=seed), files)
    return folder
