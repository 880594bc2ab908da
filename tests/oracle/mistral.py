"""Mistral's own model, slow and obvious: float64, one head, one expert and one token at a time, no cache.

Written from the description of the native layout (`params.json` beside `consolidated.*`), shares no code with quantkit
and imports nothing of it. Every tensor in the file must be one that the forward pass uses, and the other way round.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

REQUIRED = {"dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "norm_eps", "vocab_size"}
UNDERSTOOD = REQUIRED | {"n_kv_heads", "rope_theta", "sliding_window", "_sliding_window", "moe", "tied_embeddings"}
WITHOUT_EFFECT = {"max_seq_len", "max_position_embeddings", "max_batch_size", "model_type"}


@dataclass(frozen=True)
class NativeModel:
    params: dict[str, Any]  # as in the file
    weights: dict[str, Tensor]  # float64, by their native names
    theta: float
    windows: list[int | None]  # one a layer: how many positions a query sees, its own included; None sees all

    @property
    def kv_heads(self) -> int:
        return int(self.params.get("n_kv_heads", self.params["n_heads"]))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """What is stored, as stored. A folder holds its weights once, in one of four forms."""
    forms = [
        "consolidated.[0-9][0-9].pth",
        "consolidated.safetensors",
        "consolidated.[0-9][0-9].pt",
        "consolidated-*-of-*",
    ]
    present = [files for form in forms if (files := sorted(folder.glob(form)))]
    if len(present) != 1:
        raise ValueError(f"{folder}: weights in {len(present)} forms, expected one")
    weights: dict[str, Tensor] = {}
    where: dict[str, str] = {}
    for file in present[0]:
        part = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        if twice := weights.keys() & part.keys():
            raise ValueError(f"{file.name}: {sorted(twice)} were in an earlier file")
        weights.update(part)
        where.update(dict.fromkeys(part, file.name))
    last = present[0][-1].name
    if "-of-" in last and last != f"consolidated-{len(present[0]):05}-of-{len(present[0]):05}.safetensors":
        raise ValueError(f"{folder}: {last} is the last of {len(present[0])}")
    index = folder / "consolidated.safetensors.index.json"
    if index.exists() and json.loads(index.read_text())["weight_map"] != where:
        raise ValueError(f"{index}: does not say where the tensors are")
    return weights


def expected_shapes(params: dict[str, Any], *, tied: bool, megablocks: bool) -> dict[str, tuple[int, ...]]:
    """Every name that the forward pass reads, with its shape [out, in]."""
    dim, hidden, vocab = params["dim"], params["hidden_dim"], params["vocab_size"]
    q = params["n_heads"] * params["head_dim"]
    kv = params.get("n_kv_heads", params["n_heads"]) * params["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (vocab, dim), "norm.weight": (dim,)}
    if not tied:
        shapes["output.weight"] = (vocab, dim)
    mlp = {"w1.weight": (hidden, dim), "w2.weight": (dim, hidden), "w3.weight": (hidden, dim)}
    for i in range(params["n_layers"]):
        layer = {"attention_norm.weight": (dim,), "ffn_norm.weight": (dim,)}
        layer |= {"attention.wq.weight": (q, dim), "attention.wo.weight": (dim, q)}
        layer |= {"attention.wk.weight": (kv, dim), "attention.wv.weight": (kv, dim)}
        experts = params["moe"]["num_experts"] if params.get("moe") else 0
        if not experts:
            layer |= {f"feed_forward.{name}": shape for name, shape in mlp.items()}
        elif megablocks:
            layer |= {f"block_sparse_moe.{w}": (experts * hidden, dim) for w in ("w1", "w2", "w3")}
            layer |= {"block_sparse_moe.gate.weight": (experts, dim)}
        else:
            for e in range(experts):
                layer |= {f"feed_forward.experts.{e}.{name}": shape for name, shape in mlp.items()}
            layer |= {"feed_forward.gate.weight": (experts, dim)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def windows_of(params: dict[str, Any]) -> list[int | None]:
    """A number (in some files a string) for all layers, or a list that repeats: [None, 4096, 4096, 4096, None, …]."""
    given = [params[key] for key in ("sliding_window", "_sliding_window") if params.get(key) is not None]
    if len(given) > 1:
        raise ValueError("both sliding_window and _sliding_window")
    pattern = given[0] if given and isinstance(given[0], list) else given or [None]
    if params["n_layers"] % len(pattern):
        raise ValueError(f"{params['n_layers']} layers, {len(pattern)} windows")
    return [None if w is None else int(w) for w in pattern] * (params["n_layers"] // len(pattern))


def load_native(folder: Path) -> NativeModel:
    params = json.loads((folder / "params.json").read_text())
    if missing := REQUIRED - params.keys():
        raise ValueError(f"params.json lacks {sorted(missing)}")
    if unknown := params.keys() - UNDERSTOOD - WITHOUT_EFFECT:
        raise ValueError(f"params.json says {sorted(unknown)}, which this model does not compute")
    stored = read_weights(folder)
    tied = "output.weight" not in stored
    if params.get("tied_embeddings", tied) != tied:
        raise ValueError("tied_embeddings and output.weight contradict each other")
    expected = expected_shapes(params, tied=tied, megablocks=any(".block_sparse_moe." in name for name in stored))
    if wrong := expected.keys() ^ stored.keys():
        raise ValueError(f"missing or unused tensors: {sorted(wrong)}")
    for name, shape in expected.items():
        if tuple(stored[name].shape) != shape or stored[name].dtype not in (torch.bfloat16, torch.half, torch.float):
            raise ValueError(f"{name}: {stored[name].dtype} {tuple(stored[name].shape)}, expected {shape}")
    windows = windows_of(params)
    # v0.1 has windows and no rope_theta: 10,000. Without either it is the rule of December 2023.
    theta = float(params.get("rope_theta") or (1e6 if windows == [None] * len(windows) else 1e4))
    return NativeModel(params, {name: tensor.double() for name, tensor in stored.items()}, theta, windows)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x**2).mean(dim=-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, theta: float) -> Tensor:
    """A head's queries or keys [T, D]: columns 2j and 2j + 1 are a complex number, turned by t · theta^(-2j/D)."""
    length, size = x.shape
    frequency = torch.tensor([theta ** (-2 * j / size) for j in range(size // 2)], dtype=torch.float64)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    turned = torch.complex(x[:, 0::2], x[:, 1::2]) * torch.complex(torch.cos(angle), torch.sin(angle))
    return torch.stack([turned.real, turned.imag], dim=-1).reshape(length, size)


def attention(model: NativeModel, i: int, x: Tensor, prefill: int) -> Tensor:
    w = {name: model.weights[f"layers.{i}.attention.{name}.weight"] for name in ("wq", "wk", "wv", "wo")}
    size, heads = model.params["head_dim"], model.params["n_heads"]
    position = torch.arange(len(x))
    back = position[:, None] - position[None, :]  # how far query t looks back to key s
    visible = back >= 0
    if (window := model.windows[i]) is not None:
        visible &= back < window + (position < prefill).int()[:, None]
    q, k, v = x @ w["wq"].T, x @ w["wk"].T, x @ w["wv"].T
    outputs = []
    for head in range(heads):
        shared = head // (heads // model.kv_heads)  # neighbouring heads share keys and values
        mine, theirs = slice(head * size, (head + 1) * size), slice(shared * size, (shared + 1) * size)
        scores = rotate(q[:, mine], model.theta) @ rotate(k[:, theirs], model.theta).T / math.sqrt(size)
        scores[~visible] = -torch.inf
        outputs.append(torch.softmax(scores, dim=-1) @ v[:, theirs])
    return torch.cat(outputs, dim=-1) @ w["wo"].T


def swiglu(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    gate = x @ w1.T
    return (gate * torch.sigmoid(gate) * (x @ w3.T)) @ w2.T


def expert(model: NativeModel, i: int, e: int) -> tuple[Tensor, Tensor, Tensor]:
    """w1, w2, w3 of one expert. megablocks stacks them all as [E·F, H], w2 transposed."""
    if f"layers.{i}.block_sparse_moe.w1" in model.weights:
        rows = slice(e * model.params["hidden_dim"], (e + 1) * model.params["hidden_dim"])
        w1, w2, w3 = (model.weights[f"layers.{i}.block_sparse_moe.{w}"][rows] for w in ("w1", "w2", "w3"))
        return w1, w2.T, w3
    w1, w2, w3 = (model.weights[f"layers.{i}.feed_forward.experts.{e}.{w}.weight"] for w in ("w1", "w2", "w3"))
    return w1, w2, w3


def feed_forward(model: NativeModel, i: int, x: Tensor) -> Tensor:
    if not model.params.get("moe"):
        w1, w2, w3 = (model.weights[f"layers.{i}.feed_forward.{w}.weight"] for w in ("w1", "w2", "w3"))
        return swiglu(x, w1, w2, w3)
    blocks = ("feed_forward", "block_sparse_moe")
    (gate,) = (model.weights[g] for block in blocks if (g := f"layers.{i}.{block}.gate.weight") in model.weights)
    out = torch.zeros_like(x)
    for t in range(len(x)):
        best, chosen = torch.topk(gate @ x[t], model.params["moe"]["num_experts_per_tok"])
        for share, e in zip(torch.softmax(best, dim=0), chosen.tolist(), strict=True):  # among the chosen only
            out[t] += share * swiglu(x[t], *expert(model, i, e))
    return out


def logits(model: NativeModel, token_ids: list[int], *, prefill: int = 0) -> Tensor:
    """[T] → [T, V], float64. The first `prefill` positions see one key more than the window: see mistral_2023."""
    if not all(0 <= token < model.params["vocab_size"] for token in token_ids):
        raise ValueError(f"a token outside of 0 … {model.params['vocab_size'] - 1}")
    w, eps = model.weights, model.params["norm_eps"]
    x = w["tok_embeddings.weight"][token_ids]
    for i in range(model.params["n_layers"]):
        x = x + attention(model, i, rms_norm(x, w[f"layers.{i}.attention_norm.weight"], eps), prefill)
        x = x + feed_forward(model, i, rms_norm(x, w[f"layers.{i}.ffn_norm.weight"], eps))
    head = w.get("output.weight", w["tok_embeddings.weight"])
    return rms_norm(x, w["norm.weight"], eps) @ head.T


def greedy(model: NativeModel, token_ids: list[int], n: int, *, prefill: int = 0) -> list[int]:
    """The n tokens that follow, each the likeliest after all before it; everything is computed anew for each."""
    tokens = list(token_ids)
    for _ in range(n):
        tokens.append(int(logits(model, tokens, prefill=prefill)[-1].argmax()))
    return tokens[len(token_ids) :]
