"""Made-up layers for tests of solvers: weights, and the Hessian of inputs that are correlated as a model's are."""

from __future__ import annotations

import torch
from torch import Tensor


def layer(rows: int, columns: int, seed: int = 0, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """(weight float32 [rows, columns], Σ x·xᵀ float32 [columns, columns]): mixed channels of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + torch.randn(columns, columns, generator=generator) * (0.7 / columns**0.5)
    sizes = torch.randn(columns, generator=generator).exp()
    inputs = torch.randn(tokens or 2 * columns, columns, generator=generator) @ mixing * sizes
    return torch.randn(rows, columns, generator=generator) * 0.02, inputs.T @ inputs
