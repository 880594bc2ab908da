"""Which weights of a linear to prune, from the weight and the size of its inputs: Wanda and magnitude.

A mask is bool like the weight [rows = out, columns = in], false where a weight goes. Ties are decided by index: the
weight that comes first goes first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantkit.solvers.threads import in_threads, parts

# The search for the variant's strength ends within this of the sparsity asked for, or of its own range.
CLOSE = 0.001


@dataclass(frozen=True)
class Pattern:
    """N:M: of every `of` columns in a row, `pruned` go."""

    pruned: int
    of: int

    def __post_init__(self) -> None:
        if not 0 < self.pruned < self.of:
            raise ValueError(f"{self.pruned}:{self.of}: of M weights some go and some stay")

    @property
    def sparsity(self) -> float:
        return self.pruned / self.of

    def __str__(self) -> str:
        return f"{self.pruned}:{self.of}"


def wanda(weight: Tensor, squares: Tensor, amount: float | Pattern) -> Tensor:
    """Wanda (Sun et al. 2023): of every row the smallest |w|·‖x‖ go, int(columns · sparsity) of them, or N of every M.

    weight: [rows, columns] of any float type. squares: float32 [columns], Σ x² of each input.
    """
    return _by_rows(weight, squares, lambda scores: _smallest(scores, amount))


def wanda_variant(weight: Tensor, squares: Tensor, sparsity: float) -> Tensor:
    """Wanda's variant: of every row as many go as hold a part α of the row's scores together, the smallest first. α is
    one for all rows, searched by bisection in 0 … 0.8 from 0.4 until the sparsity is within 0.001; rows so differ."""
    if sparsity == 0:
        return torch.ones_like(weight, dtype=torch.bool)
    low, high, alpha = 0.0, 0.8, 0.4
    while True:
        keep = _by_rows(weight, squares, partial(_light_part, alpha))
        there = 1 - float(keep.sum()) / keep.numel()
        if abs(there - sparsity) <= CLOSE or high - low < CLOSE:
            return keep
        low, high = (low, alpha) if there > sparsity else (alpha, high)
        alpha = (low + high) / 2


def magnitude(weight: Tensor, amount: float | Pattern, *, per_row: bool = False) -> Tensor:
    """The smallest |w| go: int(weights · sparsity) of the whole matrix, or of every row as `wanda` does, or N of every
    M."""
    ones = torch.ones(weight.shape[1], device=weight.device)
    if per_row or isinstance(amount, Pattern):
        return wanda(weight, ones, amount)
    return _smallest(weight.abs().float().reshape(1, -1), amount).reshape(weight.shape)


def measured_sparsity(keep: Tensor) -> float:
    """The part of a mask that is false."""
    return 1 - int(keep.sum()) / keep.numel()


def _by_rows(weight: Tensor, squares: Tensor, keep: Callable[[Tensor], Tensor]) -> Tensor:
    norms = squares.sqrt()
    out = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)

    def some(rows: slice) -> None:
        out[rows] = keep(weight[rows].abs().float() * norms)

    in_threads(some, parts(weight.shape[0], weight.device, weight.shape[1]), weight.device)
    return out


def _smallest(scores: Tensor, amount: float | Pattern) -> Tensor:
    """True but for the smallest scores of each row float32 [rows, columns]."""
    if isinstance(amount, Pattern):
        return _all_but(scores.reshape(-1, amount.of), amount.pruned).reshape(scores.shape)
    return _all_but(scores, int(scores.shape[1] * amount))


def _all_but(scores: Tensor, count: int) -> Tensor:
    order = scores.sort(dim=1, stable=True).indices
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], False)


def _light_part(alpha: float, scores: Tensor) -> Tensor:
    ordered, order = scores.sort(dim=1, stable=True)
    light = ordered.cumsum(1) <= scores.sum(1, keepdim=True) * alpha
    return torch.empty_like(light).scatter_(1, order, ~light)
