"""SparseGPT (Frantar & Alistarh 2023): weights pruned column after column, and those that stay made to make up for it.

The loop is that of `solvers.columns` with another projection: a weight becomes 0, or what the columns before it ask of
it. With H = L·D²·Lᵀ in reversed order, pruning column k costs (w·D_k)², for 1/D_k² is the k-th diagonal entry of the
inverse that SparseGPT's authors take, once the columns before k are fixed.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from quantkit.kernels.sparse import prune_block
from quantkit.solvers.factor import Factor
from quantkit.solvers.pattern import Pattern
from quantkit.solvers.projection import arrays
from quantkit.solvers.threads import in_threads, parts
from quantkit.solvers.triangular import substitute

BLOCK = 128  # columns for which a mask is chosen at a time, as in the paper


def prune_columns(target: Tensor, factor: Factor, amount: float | Pattern | Tensor) -> tuple[Tensor, Tensor]:
    """(weight float32 [rows, columns], mask bool, false where it is zero), in natural order of columns.

    target: float32 [rows, columns], finite. amount: the sparsity, chosen block by block over all rows, at or below the
    cost of the int(weights · sparsity)-th; a pattern, whose groups must divide a block and be runs of the factor's
    order; or a mask, bool [rows, columns], to be kept to.
    """
    rows, columns = target.shape
    position, device = factor.position, target.device
    shifted = target[:, position]
    errors = torch.empty_like(shifted)
    pivots = factor.pivots.clone()
    pivots[torch.isin(position, factor.dead)] = 0  # what never has an input costs nothing
    keep = amount.clone() if isinstance(amount, Tensor) else torch.ones(target.shape, dtype=torch.bool, device=device)
    pattern = amount if isinstance(amount, Pattern) else None
    assert pattern is None or (BLOCK % pattern.of == 0 and columns % pattern.of == 0)
    for stop in range(columns, 0, -BLOCK):
        start = max(0, stop - BLOCK)
        triangle = factor.lower[start:stop, start:stop].contiguous()
        if isinstance(amount, float) and amount > 0:
            costs = torch.empty((rows, stop - start), device=device)
            own = partial(_costs, shifted, target, position[start:stop], triangle, pivots[start:stop], start, costs)
            in_threads(own, parts(rows, device, columns), device)
            limit = costs.flatten().kthvalue(int(costs.numel() * amount) + 1).values
            keep[:, position[start:stop]] = costs > limit

        def some(part: slice, start: int = start, stop: int = stop, triangle: Tensor = triangle) -> None:
            block = target[part][:, position[start:stop]]
            wrong = torch.empty_like(block)
            if on_cpu(device):
                chosen = (pattern.pruned, pattern.of) if pattern is not None else (0, 0)
                moving = arrays(shifted[part], block, triangle, pivots[start:stop])
                prune_block(*moving, start, *arrays(position), *chosen, *arrays(keep[part], wrong))
            else:
                _block_torch(start, shifted[part], block, triangle, pivots, position, pattern, keep[part], wrong)
            errors[part, start:stop] = wrong
            if start:
                shifted[part, :start].addmm_(wrong, factor.lower[start:stop, :start])

        in_threads(some, parts(rows, device, columns), device)
    found = torch.empty_like(target)
    found[:, position] = target[:, position].sub_(errors)
    return found.mul_(keep), keep


def _costs(
    shifted: Tensor,
    target: Tensor,
    position: Tensor,
    triangle: Tensor,
    pivots: Tensor,
    first: int,
    out: Tensor,
    rows: slice,
) -> None:
    """What it costs to prune each weight of a block, in some rows of `out`."""
    moved = settled(shifted[rows, first : first + len(position)], target[rows][:, position], triangle)
    out[rows] = moved.mul_(pivots).square_()


def settled(shifted: Tensor, target: Tensor, triangle: Tensor) -> Tensor:
    """What the weights of some positions would be with none of them pruned, float32 [rows, positions]: each made up of
    the errors of all that were reached before it, those of these positions included.

    shifted: of these positions, with the errors before them. triangle: of the factor.
    """
    errors = substitute(triangle.flip(0, 1), (target - shifted).flip(1)).flip(1)
    return target - errors


def on_cpu(device: torch.device) -> bool:
    return device.type == "cpu"


def _block_torch(
    first: int,
    shifted: Tensor,
    block: Tensor,
    triangle: Tensor,
    pivots: Tensor,
    position: Tensor,
    pattern: Pattern | None,
    keep: Tensor,
    errors: Tensor,
) -> None:
    """The same in torch, a column at a time for all rows: for devices that Numba does not reach."""
    width = block.shape[1]
    for k in range(width - 1, -1, -1):
        if pattern is not None and (width - 1 - k) % pattern.of == 0:
            run = torch.arange(first + k, first + k - pattern.of, -1, device=block.device)
            here = slice(k + 1 - pattern.of, k + 1)
            moved = settled(shifted[:, first + here.start : first + here.stop], block[:, here], triangle[here, here])
            costs = (moved.flip(1) * pivots[run]).square()
            least = costs.sort(dim=1, stable=True).indices[:, : pattern.pruned]
            keep[:, position[run]] = torch.ones_like(costs, dtype=torch.bool).scatter_(1, least, False)
        value = shifted[:, first + k] * keep[:, position[first + k]]
        errors[:, k] = block[:, k] - value
        shifted[:, first : first + k].addmm_(errors[:, k : k + 1], triangle[k : k + 1, :k])
