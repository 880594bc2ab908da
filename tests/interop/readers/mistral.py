"""Logits of a folder in Mistral's own layout by mistral_inference: mistral.py FOLDER OUT.

Reading the folder, its checks, its rotary embedding, its cache and its layers are mistral_inference's. Replaced is the
one operation that xformers has for a GPU only, memory_efficient_attention. It runs where quantkit is not installed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mistral_inference.transformer_layers as layers
import numpy as np
import torch
from mistral_inference.cache import BufferCache
from mistral_inference.transformer import Transformer


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any) -> torch.Tensor:
    """[1, tokens, heads, head size] each."""
    mask = bias.materialize((q.shape[1], k.shape[1]), dtype=q.dtype)
    found = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    return found.transpose(1, 2)


def main() -> None:
    layers.memory_efficient_attention = attention
    model = Transformer.from_folder(Path(sys.argv[1]), device="cpu", dtype=torch.float32)
    args = model.args
    cache = BufferCache(args.n_layers, 1, 64, args.n_kv_heads, args.head_dim, args.sliding_window)
    cache.to(device=model.device, dtype=model.dtype)
    cache.reset()
    with torch.no_grad():
        np.save(sys.argv[2], model(torch.arange(3, 35), [32], cache).numpy())


if __name__ == "__main__":
    main()
