"""Columns rounded one after another, each with the errors of those before it taken back as far as it can.

With H = L·Lᵀ the loss of an error matrix E is tr(E H Eᵀ) = ‖E L‖², and from the last column to the first the best
choice for column k, given the errors of all later ones, is the point nearest to W_k + Σ_{i>k} E_i · L_ik / L_kk:
Babai's nearest plane. It gives what GPTQ gives (Frantar et al. 2022) and needs no inverse.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantkit.kernels.columns import round_block
from quantkit.solvers.factor import Factor
from quantkit.solvers.projection import Projection, arrays, nearest

BLOCK = 128


def solve_columns(target: Tensor, factor: Factor, projection: Projection) -> Tensor:
    """Codes uint8 [rows, columns] in natural order of columns.

    target: float32 [rows, columns], finite. Held beside it: one more matrix of its size.
    """
    position = factor.position
    by_position = (position, projection.group[position], projection.top[position])
    shifted = target[:, position]
    codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    for stop in range(target.shape[1], 0, -BLOCK):
        start = max(0, stop - BLOCK)
        block = target[:, position[start:stop]]
        triangle = factor.lower[start:stop, start:stop].contiguous()
        solve = _block_numba if target.device.type == "cpu" else _on_gpu(target)
        errors = solve(start, shifted, block, triangle, by_position, projection, codes)
        if start:
            shifted[:, :start].addmm_(errors, factor.lower[start:stop, :start])
    return codes


def _block_numba(
    start: int,
    shifted: Tensor,
    block: Tensor,
    triangle: Tensor,
    by_position: tuple[Tensor, Tensor, Tensor],
    projection: Projection,
    codes: Tensor,
) -> Tensor:
    errors = torch.empty_like(block)
    masked, keep = projection.mask()
    read = arrays(*by_position, projection.scales, projection.zeros)
    moving = arrays(shifted, block, triangle)
    round_block(*moving, start, *read, masked, *arrays(keep, codes, errors))
    return errors


def _on_gpu(target: Tensor) -> Callable[..., Tensor]:
    from quantkit.kernels import columns_triton

    return _block_triton if columns_triton.usable(target) else _block_torch


def _block_triton(
    start: int,
    shifted: Tensor,
    block: Tensor,
    triangle: Tensor,
    by_position: tuple[Tensor, Tensor, Tensor],
    projection: Projection,
    codes: Tensor,
) -> Tensor:
    from quantkit.kernels import columns_triton

    errors = torch.empty_like(block)
    grid = (*by_position, projection.scales, projection.zeros)
    columns_triton.round_block(shifted, block, triangle, start, *grid, projection.keep, codes, errors)
    return errors


def _block_torch(
    start: int,
    shifted: Tensor,
    block: Tensor,
    triangle: Tensor,
    by_position: tuple[Tensor, Tensor, Tensor],
    projection: Projection,
    codes: Tensor,
) -> Tensor:
    """The same in torch, a column at a time for all rows: for devices that neither Numba nor Triton reaches."""
    errors, position = torch.empty_like(block), by_position[0]
    for k in range(block.shape[1] - 1, -1, -1):
        column = position[start + k : start + k + 1]
        group = projection.group[column].long()
        level = nearest(shifted[:, start + k : start + k + 1], projection, column)
        codes[:, column] = (level + projection.zeros[:, group]).to(torch.uint8)
        errors[:, k : k + 1] = block[:, k : k + 1] - level * projection.scales[:, group]
        shifted[:, start : start + k].addmm_(errors[:, k : k + 1], triangle[k : k + 1, :k])
    return errors
