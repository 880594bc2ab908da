"""How torch computes here: how many threads, and by which library."""

from __future__ import annotations

import torch


def prepare_torch(threads: int) -> None:
    """Threads of a matrix product; products of float32 by oneDNN where that costs no precision.

    oneDNN is 2.2 times as fast as MKL on AMD's processors. torch takes it for float32 when inputs may be rounded to
    bf16, which it does only on processors with AMX: there, nothing is changed.
    """
    torch.set_num_threads(threads)
    if not torch.cpu._is_amx_tile_supported():
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
