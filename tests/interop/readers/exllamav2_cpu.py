"""exllamav2's compiled extension, computed on a CPU: `install()` puts it where exllamav2 0.3.2 looks for its own.

All of exllamav2 that is Python then runs as it is: configuration, modules, `load_autosplit`, cache, attention by torch,
generator, sampler. Replaced are the kernels (their names, arguments, checks and results, in float16 with products in
float32), the streams of a GPU, and the name of the device. Kernels that no reader here needs are missing: exllamav2
fails on them. It runs where quantkit is not installed.
"""

from __future__ import annotations

import contextlib
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HANDLES: list[Any] = []  # what a C++ pointer is in the extension is an index here; 0 is the null pointer
KERNELS = (
    "stloader_read", "tensor_remap", "tensor_remap_4bit", "make_group_map", "make_q_matrix", "gemm_half_q_half",
    "rms_norm", "make_q_attn", "q_attn_forward_1", "q_attn_forward_2", "make_q_mlp", "q_mlp_forward_", "count_match",
    "apply_rep_penalty", "sample_basic",
)  # fmt: skip


def handle(thing: Any) -> int:
    HANDLES.append(thing)
    return len(HANDLES)


def stloader_read(file: str, offset: int, size: int, tensor: Tensor) -> None:
    with Path(file).open("rb") as f:
        f.seek(offset)
        raw = np.frombuffer(f.read(size), np.uint8).copy()
    tensor.reshape(-1).view(torch.uint8)[:] = torch.from_numpy(raw)


def make_group_map(q_groups: Tensor, rows: int) -> Tensor:
    from exllamav2.ext import make_group_map_py

    return make_group_map_py(q_groups, rows)


def nibbles(words: Tensor) -> Tensor:
    """int32 [rows, n] -> int32 [rows, 8 n], the low four bits first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).reshape(len(words), -1)


def tensor_remap(tensor: Tensor, index: Tensor) -> None:
    assert tensor.shape[1] == len(index)
    assert tensor.dtype == index.dtype == torch.int32
    tensor.copy_(tensor[:, index.long()])


def tensor_remap_4bit(tensor: Tensor, index: Tensor) -> None:
    assert 8 * tensor.shape[1] == len(index)
    assert tensor.dtype == index.dtype == torch.int32
    moved = nibbles(tensor)[:, index.long()].reshape(len(tensor), -1, 8).to(torch.int64)
    packed = (moved << torch.arange(0, 32, 4)).sum(-1)
    tensor.copy_(torch.from_numpy(packed.numpy().astype(np.uint32).view(np.int32)))


def q_matrix(words: Tensor, perm: Tensor | None, scales: Tensor, unit: Tensor, table: Tensor) -> Tensor:
    """Checks of `make_q_matrix` and its constructor (ext_qmatrix.cpp), then float16 [in, out], in the kernels' order;
    `unit` is the largest scale of each group / 256."""
    assert words.dtype == torch.int32
    assert scales.dtype == torch.int32
    assert unit.dtype == torch.float16
    assert table.dtype == torch.int16
    assert perm is None or perm.dtype == torch.int16
    assert words.shape[1] == 8 * scales.shape[1]
    assert unit.shape[0] == scales.shape[0]
    groups, steps, rows = table.tolist(), nibbles(scales), []
    for g in range(len(unit)):
        bits, first = groups[2 * g], groups[2 * g + 1]
        last = groups[2 * g + 3] if g + 1 < len(unit) else len(words)
        part = words[first:last].numpy().view(np.uint32).astype(np.uint64)
        part = np.concatenate([part, np.zeros_like(part[:1])])
        scale = ((steps[g] + 1) ** 2).half() * unit[g]
        word, shift = np.divmod(np.arange((last - first) * 32 // bits, dtype=np.int64) * bits, 32)
        pairs = part[word] | (part[word + 1] << np.uint64(32))
        codes = (pairs >> shift.astype(np.uint64)[:, None]) & np.uint64(2**bits - 1)
        levels = torch.from_numpy((codes.astype(np.int64) - 2 ** (bits - 1)).astype(np.float16))
        rows.append(levels * scale)
    stored = torch.cat(rows)
    if perm is None:
        return stored
    assert len(stored) == len(perm), "incompatible shapes"
    found = torch.empty_like(stored)
    found[perm.long() & 0xFFFF] = stored
    return found


@dataclass
class Matrix:
    weight: Tensor  # [in, out], float16
    bias: Tensor | None

    def of(self, x: Tensor) -> Tensor:
        y = (x.float() @ self.weight.float()).half()
        return y if self.bias is None else y + self.bias


def make_q_matrix(  # type: ignore[no-untyped-def]
    words, perm, inverse, scales, unit, table, group_map, qzeros, gptq_scales, g_idx, bias, temp_dq, max_dq_rows
) -> int:
    assert qzeros.is_meta
    assert gptq_scales.is_meta
    assert g_idx.is_meta
    assert temp_dq.numel() > 0
    assert perm.is_meta == inverse.is_meta
    assert perm.is_meta or torch.equal(perm.long()[inverse.long()], torch.arange(len(perm)))
    assert bias.is_meta or (bias.dtype == torch.float16 and bias.shape[0] == words.shape[1])
    weight = q_matrix(words, None if perm.is_meta else perm, scales, unit, table)
    assert len(group_map) == 2 * len(weight)
    return handle(Matrix(weight, None if bias.is_meta else bias))


def gemm_half_q_half(a: Tensor, b: int, c: Tensor, force_cuda: bool) -> None:
    c.copy_(HANDLES[b - 1].of(a))


def normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon) * weight.float()).half()


def rms_norm(x: Tensor, weight: Tensor, y: Tensor, epsilon: float) -> None:
    y.copy_(normed(x, weight, epsilon))


@dataclass
class Attention:
    norm: Tensor
    epsilon: float
    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    heads: int
    kv_heads: int
    width: int  # of a head
    q_norm: Tensor | None  # [heads, width]
    k_norm: Tensor | None
    centred: bool  # whether the mean of a head is taken away, too


def make_q_attn(  # type: ignore[no-untyped-def]
    norm, norm_bias, is_rms, headnorm_is_rms, epsilon, q, k, v, o, temp_state, temp_dq, max_rows, hidden, heads,
    kv_heads, width, max_seq_len, has_residual, rope_style, rotated, q_norm, k_norm, post_norm, post_norm_bias,
    residual_fp32, use_graphs,
) -> int:  # fmt: skip
    assert is_rms
    assert has_residual
    assert rope_style == 2, "NeoX: halves of a head"
    assert not residual_fp32
    assert all(t.is_meta for t in (norm_bias, post_norm, post_norm_bias))
    assert rotated == width
    assert norm.dtype == torch.float16
    parts = [HANDLES[h - 1] for h in (q, k, v, o)]
    assert [len(m.weight) for m in parts[:3]] == [hidden] * 3
    own = [None if t.is_meta else t for t in (q_norm, k_norm)]
    return handle(Attention(norm, epsilon, *parts, heads, kv_heads, width, *own, not headnorm_is_rms))


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """x: [rows, heads, width]; sin, cos: [rows, width]; the two halves of a head are the pairs."""
    half = x.shape[-1] // 2
    left, right = x[..., :half].float(), x[..., half:].float()
    s, c = sin[:, None, :half].float(), cos[:, None, :half].float()
    return torch.cat([left * c - right * s, right * c + left * s], -1).half()


def q_attn_forward_1(  # type: ignore[no-untyped-def]
    attention, x, batch, length, past, pasts, q, k, v, sin, cos, loras, loras_temp
) -> None:
    a = HANDLES[attention - 1]
    assert batch == 1
    assert pasts.is_meta
    assert not loras
    assert x.dtype == torch.float16
    y = normed(x[0], a.norm, a.epsilon)
    s, c = sin[0, 0, past : past + length], cos[0, 0, past : past + length]
    for out, matrix, heads, own in ((q, a.q, a.heads, a.q_norm), (k, a.k, a.kv_heads, a.k_norm)):
        made = matrix.of(y).view(length, heads, a.width)
        if own is not None:
            made = normed(made.float() - made.float().mean(-1, keepdim=True) if a.centred else made, own, a.epsilon)
        out.copy_(rotate(made, s, c).view(out.shape))
    v.copy_(a.v.of(y).view(v.shape))


def q_attn_forward_2(attention, x, output, batch, length, loras, loras_temp) -> None:  # type: ignore[no-untyped-def]
    x += HANDLES[attention - 1].o.of(output)


@dataclass
class Mlp:
    norm: Tensor
    epsilon: float
    gate: Matrix
    up: Matrix
    down: Matrix


def make_q_mlp(  # type: ignore[no-untyped-def]
    norm, norm_bias, is_rms, epsilon, gate, up, down, temp_state, temp_a, temp_b, temp_dq, max_rows, gelu, has_residual,
    post_norm, post_norm_bias, residual_fp32, use_graphs,
) -> int:  # fmt: skip
    assert is_rms
    assert has_residual
    assert not gelu
    assert not residual_fp32
    assert all(t.is_meta for t in (norm_bias, post_norm, post_norm_bias))
    return handle(Mlp(norm, epsilon, *(HANDLES[h - 1] for h in (gate, up, down))))


def q_mlp_forward_(mlp, x, loras, loras_temp) -> None:  # type: ignore[no-untyped-def]
    m = HANDLES[mlp - 1]
    y = normed(x, m.norm, m.epsilon)
    x += m.down.of((torch.nn.functional.silu(m.gate.of(y).float()) * m.up.of(y).float()).half())


def count_match(a: Tensor, b: Tensor, most: int) -> int:
    count = min(a.shape[-1], b.shape[-1], most)
    different = (a[0, :count] != b[0, :count]).nonzero()
    return int(different[0]) if len(different) else count


def apply_rep_penalty(  # type: ignore[no-untyped-def]
    sequence, penalty, sustain, decay, frequency, presence, logits
) -> None:
    assert decay == 0
    assert frequency == 0
    assert presence == 0
    seen = sequence[0].unique() if sustain < 0 else sequence[0, -sustain:].unique()
    row = logits[0, 0]
    row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)


def sample_basic(  # type: ignore[no-untyped-def]
    logits, temperature, top_k, top_p, top_a, min_p, tfs, typical, random, tokens, probabilities, k_probabilities,
    k_tokens, logit_filter, mirostat, mirostat_mu, mirostat_tau, mirostat_eta, post_temperature, xtc_mask,
    xtc_probability, xtc_threshold, min_temp, max_temp, exponent, smoothing, skew,
) -> list[float]:  # fmt: skip
    assert logits.dtype == torch.float32
    assert not any((top_a, min_p, tfs, typical, mirostat, xtc_probability, smoothing, skew))
    assert post_temperature == 1
    assert logit_filter.is_meta
    if temperature < 0.01:
        temperature, top_k = 1.0, 1
    p, order = torch.softmax(logits[0, 0] / temperature, 0).sort(descending=True, stable=True)
    if top_k:
        p = p[:top_k] / p[:top_k].sum()
    if 0 < top_p < 1:
        p = p[: int((p.cumsum(0) < top_p).sum()) + 1]
        p = p / p.sum()
    chosen = min(int((p.cumsum(0) < random).sum()), len(p) - 1)
    tokens[0, 0], probabilities[0, 0] = order[chosen], p[chosen]
    return []


class NoStreams(dict[int, None]):
    """A stream for each device, which is None; none of them to visit."""

    def __contains__(self, index: object) -> bool:
        return True

    def __missing__(self, index: int) -> None:
        return None


def install() -> None:
    """Must come before the first import of exllamav2."""
    extension: Any = types.ModuleType("exllamav2_ext")
    for name in KERNELS:
        setattr(extension, name, globals()[name])
    sys.modules["exllamav2_ext"] = extension
    cuda: Any = torch.cuda
    for name in ("set_device", "set_stream", "synchronize"):
        setattr(cuda, name, lambda *_, **__: None)  # one of its own each: torch's compiler tells functions apart by id
    for name in ("device", "stream"):
        setattr(cuda, name, lambda *_, **__: contextlib.nullcontext())
    cuda.device_count = lambda: 1
    from exllamav2 import device, generator

    device.global_streams = NoStreams()
    for name, owner in list(sys.modules.items()):
        if name.startswith(generator.__name__.partition(".")[0] + "."):
            if hasattr(owner, "_torch_device"):
                owner._torch_device = lambda _: "cpu"
            if hasattr(owner, "safe_move_tensor"):
                owner.safe_move_tensor = lambda tensor, *_, **__: tensor
