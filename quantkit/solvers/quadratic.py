"""The loss that everything here lowers: tr(E·H·Eᵀ), row by row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quantkit.kernels.columns import row_products as kernel
from quantkit.solvers.projection import arrays

BLOCK = 512


def row_losses(errors: Tensor, hessian: Tensor, scale: float = 1.0) -> Tensor:
    """float64 [rows]: e·H·eᵀ / scale for every row e of `errors` [rows, n]. hessian: float32 [n, n], symmetric.

    Half the products of errors @ hessian: each block of columns with those to its right, which count twice.
    """
    losses = torch.zeros(errors.shape[0], dtype=torch.float64, device=errors.device)
    scaled = errors / scale
    for start in range(0, errors.shape[1], BLOCK):
        stop = min(start + BLOCK, errors.shape[1])
        losses += row_products(scaled[:, start:stop] @ hessian[start:stop, start:stop], errors[:, start:stop])
        if stop < errors.shape[1]:
            right = scaled[:, stop:] @ hessian[stop:, start:stop]
            losses += row_products(right, errors[:, start:stop]).mul_(2)
    return losses


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """float64 [rows]: Σ a·b of every row of two float32 [rows, n]."""
    if a.device.type != "cpu":
        return (a * b).sum(1, dtype=torch.float64)
    out = torch.empty(a.shape[0], dtype=torch.float64)
    kernel(*arrays(a.contiguous(), b.contiguous(), out))
    return out


def total(losses: Tensor) -> float:
    """The sum of float64 [rows], in numpy's order: torch's own depends on the number of threads."""
    with np.errstate(invalid="ignore"):  # of what is not finite
        return float(losses.cpu().numpy().sum())
