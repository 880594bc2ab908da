"""All 256 codes of E4M3, times a scale, against torch."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit.kernels.fp8 import to_bf16

CODES = np.arange(256, dtype=np.uint8)


def by_torch(codes: np.ndarray, scales: np.ndarray) -> torch.Tensor:
    values = torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).to(torch.float32)
    return (values * torch.from_numpy(scales)).to(torch.bfloat16)


def same(ours: np.ndarray, theirs: torch.Tensor) -> None:
    """Equal bits; of NaNs only that they are NaN."""
    mine = torch.from_numpy(ours.copy()).view(torch.bfloat16)
    nan = theirs.isnan()
    assert torch.equal(mine.isnan(), nan)
    assert torch.equal(mine[~nan].view(torch.int16), theirs[~nan].view(torch.int16))


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_every_code_with_one_scale(scale: float) -> None:
    scales = np.array([scale], np.float32)
    same(to_bf16(CODES, scales, 0, 256), by_torch(CODES, scales))


def test_a_scale_for_each_row_and_a_run_in_the_middle() -> None:
    chance = np.random.default_rng(0)
    codes = chance.integers(0, 256, (6, 10)).astype(np.uint8)
    scales = chance.uniform(0.001, 3, 6).astype(np.float32)
    run = to_bf16(codes[2:5].reshape(-1), scales, 2, 10)
    same(run.reshape(3, 10), by_torch(codes, scales[:, None])[2:5])
