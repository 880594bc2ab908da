"""The 4-bit encoder on a GPU, through bitsandbytes' own kernels; same signature as `bnb4.encode_blocks`.

Bytes may differ from the CPU's where a scaled weight lies within a rounding of a threshold: CUDA builds of bitsandbytes
use an approximate reciprocal. On device "cpu" this is bitsandbytes' CPU code, which the tests compare with ours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from bitsandbytes.functional import quantize_4bit

from quantkit.kernels.bnb4_tables import BLOCK, ERROR_STRIDE, TABLES, ZERO_CODE, F32Array
from quantkit.kernels.floats import Bits

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def encode_blocks(
    x: Bits,
    dtype: str,
    quant_type: str,
    packed: np.ndarray[Any, Any],
    absmax: F32Array,
    sums: np.ndarray[Any, Any],
    *,
    device: str,
) -> None:
    """See `bnb4.encode_blocks`. Memory on the device: the slab, its codes, and fp64 of every 16th block."""
    if not x.size:
        return
    weights = torch.from_numpy(x).view(_DTYPES[dtype]).to(device)
    codes, state = quantize_4bit(weights, blocksize=BLOCK, quant_type=quant_type, compress_statistics=False)
    codes = codes.view(-1, BLOCK // 2)
    # A block of zeros must decode to zeros for any reconstructed maximum; CUDA kernels code it as -1 times nothing.
    codes[state.absmax == 0] = ZERO_CODE[quant_type] * 17
    table = torch.from_numpy(TABLES[quant_type]).to(device, torch.float64)
    some = codes[::ERROR_STRIDE].long()
    chosen = torch.stack([table[some >> 4], table[some & 15]], dim=-1).view(-1, BLOCK)
    values = weights.view(-1, BLOCK)[::ERROR_STRIDE].double()
    parts = [(values * values).sum(1), (values * chosen).sum(1), (chosen * chosen).sum(1)]
    packed[:] = codes.view(-1).cpu().numpy()
    absmax[:] = state.absmax.float().cpu().numpy()
    sums[:] = torch.stack(parts, dim=1).cpu().numpy()
