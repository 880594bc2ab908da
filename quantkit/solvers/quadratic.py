"""The loss that everything here lowers: tr(E·H·Eᵀ), row by row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quantkit.kernels.columns import add_products
from quantkit.solvers.projection import arrays

BLOCK = 512


def row_losses(errors: Tensor, hessian: Tensor, scale: float = 1.0) -> Tensor:
    """float64 [rows]: e·H·eᵀ / scale for every row e of `errors` [rows, n]. hessian: float32 [n, n], symmetric.

    Half the products of errors @ hessian: each block of columns with those to its right, which count twice.
    """
    losses = torch.zeros(errors.shape[0], dtype=torch.float64, device=errors.device)
    errors = errors.contiguous()
    scaled = errors / scale
    for start in range(0, errors.shape[1], BLOCK):
        stop = min(start + BLOCK, errors.shape[1])
        _add(scaled[:, start:stop] @ hessian[start:stop, start:stop], errors, start, 1.0, losses)
        if stop < errors.shape[1]:
            _add(scaled[:, stop:] @ hessian[stop:, start:stop], errors, start, 2.0, losses)
    return losses


def _add(products: Tensor, errors: Tensor, start: int, times: float, losses: Tensor) -> None:
    if errors.device.type == "cpu":
        add_products(*arrays(products, errors), start, times, losses.numpy())
    else:
        losses += row_products(products, errors[:, start : start + products.shape[1]]).mul_(times)


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """float64 [rows]: Σ a·b of every row of two float32 [rows, n], where kernels do not reach."""
    return (a * b).sum(1, dtype=torch.float64)


def total(losses: Tensor) -> float:
    """The sum of float64 [rows], in numpy's order: torch's own depends on the number of threads."""
    with np.errstate(invalid="ignore"):  # of what is not finite
        return float(losses.cpu().numpy().sum())
