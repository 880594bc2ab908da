"""Which weights of a linear to prune, from the weight and the size of its inputs: Wanda and magnitude.

A mask is bool like the weight [rows = out, columns = in], false where a weight goes. Ties are decided by index: the
weight that comes first goes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quantkit.kernels.masks import drop_in_groups, drop_smallest
from quantkit.solvers.pattern import Amount, Pattern
from quantkit.solvers.threads import in_threads, parts

# The search for the variant's strength ends within this of the sparsity asked for, or at so small a range of its own.
CLOSE, FINEST = 0.001, 1e-7
MOST_PRUNED = 0.99  # of a layer, where layers differ, unless more is asked for


def wanda(weight: Tensor, squares: Tensor, amount: Amount) -> Tensor:
    """Wanda (Sun et al. 2023): of every row the smallest |w|·‖x‖ go, int(columns · sparsity) of them, or N of every M.

    weight: [rows, columns] of any float type. squares: float32 [columns], Σ x² of each input.
    """
    return _by_rows(weight, squares, lambda scores: _smallest(scores, amount))


def wanda_variant(weight: Tensor, squares: Tensor, sparsity: float) -> Tensor:
    """Wanda's variant: of every row as many go as hold a part α of the row's scores together, the smallest first. α is
    one for all rows, searched by bisection in 0 … 0.8 from 0.4 until the sparsity is within 0.001; rows so differ.
    Where the paper's search ends without having come so near (below 2 %, above 95 %), this one goes on."""
    if sparsity == 0:
        return torch.ones_like(weight, dtype=torch.bool)
    low, high, alpha, widest = 0.0, 0.8, 0.4, 1.0
    while True:
        keep = _by_rows(weight, squares, partial(_light_part, alpha))
        there = 1 - float(keep.sum()) / keep.numel()
        if abs(there - sparsity) <= CLOSE or high - low < FINEST:
            return keep
        low, high = (low, alpha) if there > sparsity else (alpha, high)
        if high - low < CLOSE and there < sparsity and high == 0.8:
            high = widest
        alpha = (low + high) / 2


def magnitude(weight: Tensor, amount: Amount, *, per_row: bool = False) -> Tensor:
    """The smallest |w| go: int(weights · sparsity) of the whole matrix, or of every row as `wanda` does, or N of every
    M."""
    if per_row or isinstance(amount, Pattern):
        return wanda(weight, torch.ones(weight.shape[1], device=weight.device), amount)
    count = int(weight.numel() * amount)
    if weight.device.type != "cpu":
        return _all_but(weight.abs().float().reshape(1, -1), count).reshape(weight.shape)
    keep = torch.empty(weight.shape, dtype=torch.bool)
    word, numpy_word = (torch.int16, np.uint16) if weight.itemsize == 2 else (torch.int32, np.uint32)
    bits = weight.contiguous().view(word).numpy().view(numpy_word)
    drop_smallest(bits.reshape(-1), 8 * weight.itemsize - 16, count, keep.numpy().reshape(-1))
    return keep


def outlier_part(weights: Callable[[Callable[[Tensor, Tensor], None]], None], times: float) -> tuple[float, int]:
    """The part of a layer's weights whose score |w|·‖x‖ is more than so many times the mean of the layer's scores (OWL,
    Yin et al. 2023), and how many they are. weights: hands over of each linear the weight [rows, columns] and
    Σ x² float32 [columns] of its inputs, one after the other, each time that it is called."""

    def each(look: Callable[[Tensor], Tensor]) -> tuple[float, int]:
        found, size = 0.0, 0

        def add(weight: Tensor, squares: Tensor) -> None:
            nonlocal found, size
            norms = squares.sqrt()

            def one(rows: slice) -> float:
                return float(look(weight[rows].abs().float() * norms))

            found += sum(in_threads(one, parts(weight.shape[0], weight.device, weight.shape[1]), weight.device))
            size += weight.numel()

        weights(add)
        return found, size

    total, size = each(lambda scores: scores.sum(dtype=torch.float64))
    if not size:
        return 0.0, 0
    mean = total / size
    return each(lambda scores: (scores > times * mean).sum())[0] / size, size


def by_outliers(outliers: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float) -> list[float]:
    """The sparsity of each layer, that of all weights together as asked for: layers with more outliers keep more, the
    one with the most 2 · `spread` more than the one with the least (OWL), as far as there is room.

    sizes: how many weights of each layer are pruned; layers with none have no say.
    """
    own = [part for part, size in zip(outliers, sizes, strict=True) if size]
    if not own or max(own) == min(own):
        return [sparsity] * len(outliers)
    least, most = min(own), max(own)
    keep = [2 * spread * (part - least) / (most - least) for part in outliers]
    highest = max(MOST_PRUNED, sparsity)

    def at(level: float) -> list[float]:
        return [min(max(level - part, 0.0), highest) for part in keep]

    low, high = 0.0, 1.0 + 2 * spread
    for _ in range(60):
        level = (low + high) / 2
        pruned = sum(size * part for size, part in zip(sizes, at(level), strict=True))
        low, high = (level, high) if pruned < sparsity * sum(sizes) else (low, level)
    return at((low + high) / 2)


def _by_rows(weight: Tensor, squares: Tensor, keep: Callable[[Tensor], Tensor]) -> Tensor:
    norms = squares.sqrt()
    out = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)

    def some(rows: slice) -> None:
        out[rows] = keep(weight[rows].abs().float() * norms)

    in_threads(some, parts(weight.shape[0], weight.device, weight.shape[1]), weight.device)
    return out


def _smallest(scores: Tensor, amount: Amount) -> Tensor:
    """True but for the smallest scores of each row float32 [rows, columns]."""
    if isinstance(amount, Pattern) and scores.device.type == "cpu":
        keep = torch.empty(scores.shape, dtype=torch.bool)
        drop_in_groups(scores.contiguous().numpy(), amount.pruned, amount.of, keep.numpy())
        return keep
    if isinstance(amount, Pattern):
        return _all_but(scores.reshape(-1, amount.of), amount.pruned).reshape(scores.shape)
    return _all_but(scores, int(scores.shape[1] * amount))


def _all_but(scores: Tensor, count: int) -> Tensor:
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if scores.device.type == "cpu":  # a sort takes twenty times as long
        return torch.from_numpy(_above(scores.numpy(), count))
    order = scores.sort(dim=1, stable=True).indices
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order[:, :count], False)


def _above(scores: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.bool_]:
    limit = np.partition(scores, count - 1, axis=1)[:, count - 1 : count]
    keep: npt.NDArray[np.bool_] = scores > limit
    equal = scores == limit
    over = np.count_nonzero(~keep, axis=1) - count  # of the equal ones, the last so many stay
    for row in np.flatnonzero(over):
        keep[row, np.flatnonzero(equal[row])[-over[row] :]] = True
    return keep


def _light_part(alpha: float, scores: Tensor) -> Tensor:
    ordered, order = scores.sort(dim=1, stable=True)
    light = ordered.cumsum(1) <= scores.sum(1, keepdim=True) * alpha
    return torch.empty_like(light).scatter_(1, order, ~light)
