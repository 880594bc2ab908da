"""Columns rounded one after another, each with the errors of those before it taken back as far as it can.

With H = L·Lᵀ the loss of an error matrix E is tr(E H Eᵀ) = ‖E L‖², and from the last column to the first the best
choice for column k, given the errors of all later ones, is the point nearest to W_k + Σ_{i>k} E_i · L_ik / L_kk:
Babai's nearest plane. It gives what GPTQ gives (Frantar et al. 2022) and needs no inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from quantkit.kernels.columns import round_block, take_block
from quantkit.solvers.factor import Factor
from quantkit.solvers.projection import Projection, arrays, nearest

BLOCK = 128


def solve_columns(target: Tensor, factor: Factor, projection: Projection) -> Tensor:
    """Codes uint8 [rows, columns] in natural order of columns.

    target: float32 [rows, columns], finite. Held beside it: one more matrix of its size.
    """
    solve = _solve_numba if target.device.type == "cpu" else partial(_solve_blocks, _on_gpu(target))
    position = factor.position
    by_position = (position, projection.group[position], projection.top[position])
    codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    solve(target, target[:, position], factor.lower, by_position, projection, codes)
    return codes


def _blocks(columns: int) -> list[tuple[int, int]]:
    """(start, stop) of runs of positions, the last first."""
    return [(max(0, stop - BLOCK), stop) for stop in range(columns, 0, -BLOCK)]


def _solve_numba(
    target: Tensor,
    shifted: Tensor,
    lower: Tensor,
    by_position: tuple[Tensor, Tensor, Tensor],
    projection: Projection,
    codes: Tensor,
) -> None:
    """In as few calls of torch as can be: threads that make many of them wait for each other."""
    masked, keep = projection.mask()
    read = arrays(*by_position, projection.scales, projection.zeros)
    weight, moving, triangle, kept, found = arrays(target.contiguous(), shifted, lower, keep, codes)
    for start, stop in _blocks(target.shape[1]):
        width = stop - start
        own, errors = np.empty((2, len(weight), width), np.float32)
        square = np.empty((width, width), np.float32)
        take_block(weight, read[0], triangle, start, own, square)
        round_block(moving, own, square, start, *read, masked, kept, found, errors)
        if start:
            shifted[:, :start].addmm_(torch.from_numpy(errors), lower[start:stop, :start])


def _solve_blocks(
    solve: Callable[..., Tensor],
    target: Tensor,
    shifted: Tensor,
    lower: Tensor,
    by_position: tuple[Tensor, Tensor, Tensor],
    projection: Projection,
    codes: Tensor,
) -> None:
    for start, stop in _blocks(target.shape[1]):
        block = target[:, by_position[0][start:stop]]
        triangle = lower[start:stop, start:stop].contiguous()
        errors = solve(start, shifted, block, triangle, by_position, projection, codes)
        if start:
            shifted[:, :start].addmm_(errors, lower[start:stop, :start])


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
