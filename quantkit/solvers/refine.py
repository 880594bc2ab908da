"""What can still be won when every column has its code: better codes one at a time, better scales for the codes.

Both go down the loss tr(E·(H + ridge·I)·Eᵀ) itself and take a step only where it wins, so neither makes it larger. The
ridge is the damping that the columns were solved with: without it they fit what is chance in the calibration text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from quantkit.kernels.descent import MARGIN, descend_block
from quantkit.solvers.projection import Projection, arrays, residual
from quantkit.solvers.quadratic import row_products

BLOCK = 128
LARGEST = 65504.0  # of float16


def descend(target: Tensor, hessian: Tensor, projection: Projection, codes: Tensor, ridge: float = 0.0) -> None:
    """Visits every code once, in the order of columns, and makes it the best one given all others of its row.
    Columns without inputs are rounded to nearest.

    target: float32 [rows, columns]. hessian: float32 [columns, columns]. codes: uint8 like the target, changed in
    place. Held beside them: one more float32 matrix like the target.
    """
    errors = residual(target, codes, projection)
    for start in range(0, target.shape[1], BLOCK):
        stop = min(start + BLOCK, target.shape[1])
        gradient = _damped(errors, hessian[:, start:stop], errors[:, start:stop], ridge)
        curvature = hessian[start:stop, start:stop].clone()
        curvature.diagonal().add_(ridge)
        visit = _block_numba if target.device.type == "cpu" else _on_gpu(target)
        visit(start, gradient, curvature, projection, codes, errors)


def _block_numba(
    first: int, gradient: Tensor, curvature: Tensor, projection: Projection, codes: Tensor, errors: Tensor
) -> None:
    masked, keep = projection.mask()
    grid = arrays(projection.group, projection.top, projection.scales, projection.zeros)
    changed = arrays(keep, codes, errors)
    descend_block(*arrays(gradient, curvature), first, *grid, masked, *changed)


def _on_gpu(target: Tensor) -> Callable[..., None]:
    from quantkit.kernels import columns_triton

    return _block_triton if columns_triton.usable(target) else _block_torch


def _block_triton(
    first: int, gradient: Tensor, curvature: Tensor, projection: Projection, codes: Tensor, errors: Tensor
) -> None:
    from quantkit.kernels import columns_triton

    grid = (projection.group, projection.top, projection.scales, projection.zeros)
    columns_triton.descend_block(gradient, curvature, first, *grid, projection.keep, codes, errors)


def _block_torch(
    first: int, gradient: Tensor, curvature: Tensor, projection: Projection, codes: Tensor, errors: Tensor
) -> None:
    """The same in torch, a column at a time for all rows."""
    for k in range(gradient.shape[1]):
        column = first + k
        bend = curvature[k, k]
        group = int(projection.group[column])
        scale, zero = projection.scales[:, group], projection.zeros[:, group]
        level = codes[:, column].float() - zero
        wanted = errors[:, column] / scale if bend == 0 else gradient[:, k] / (bend * scale)
        better = (level + wanted).clamp(-zero, projection.top[column] - zero).round()
        move = (better - level) * scale
        wins = 2 * move * gradient[:, k] > (1 + float(MARGIN)) * move * move * bend
        wins = torch.full_like(wins, bool(bend == 0)) if bend <= 0 else wins
        if projection.keep is not None:
            wins &= projection.keep[:, column]
        move = torch.where(wins, move, torch.zeros_like(move))
        codes[:, column] = (torch.where(wins, better, level) + zero).to(torch.uint8)
        errors[:, column] -= move
        gradient.addmm_(move[:, None], curvature[k : k + 1], alpha=-1)


def _half(_: int, wanted: Tensor) -> Tensor:
    return wanted.clamp(-LARGEST, LARGEST).half().float()


def refit(
    target: Tensor,
    hessian: Tensor,
    projection: Projection,
    codes: Tensor,
    ridge: float = 0.0,
    onto: Callable[[int, Tensor], Tensor] = _half,
) -> Projection:
    """The projection with better scales for the codes it has, a row's taken where its loss falls. onto: of a group, by
    number, the scales nearest to those wanted that can be written, float16 numbers by default.

    Group after group, each the best given all others and rounded before the next, which so makes up for the rounding.
    All groups of a row at once are a system of equations; a sweep comes within a thousandth of what its solution gains
    (12 matrices of SmolLM2-135M), and needs no matrix of groups by groups for each row.
    target: float32 [rows, columns]. hessian: float32 [columns, columns]. codes: uint8 like the target.
    """
    errors = residual(target, codes, projection)
    scales = projection.scales.clone()
    for group in range(scales.shape[1]):
        columns = _members(projection.group, group)
        levels = codes[:, columns].float() - projection.zeros[:, group : group + 1]
        across = hessian[:, columns]
        slope = row_products(_damped(errors, across, errors[:, columns], ridge), levels)
        bend = row_products(_damped(levels, across[columns], levels, ridge), levels)
        step = torch.where(bend > 0, slope / bend, torch.zeros_like(bend))
        better = onto(group, scales[:, group].double() + step)
        move = (better - scales[:, group]).double()
        wins = (2 * move * slope > (1 + float(MARGIN)) * move.square() * bend) & (better != 0)
        move = torch.where(wins, move, torch.zeros_like(move)).float()
        scales[:, group] += move
        errors[:, columns] -= levels.mul_(move[:, None])
    return replace(projection, scales=scales)


def _damped(a: Tensor, b: Tensor, c: Tensor, ridge: float) -> Tensor:
    """a·b + ridge·c. Not by addmm: oneDNN compiles a kernel for each beta, and keeps a thousand of them."""
    return torch.mm(a, b).add_(c, alpha=ridge)


def _members(group: Tensor, number: int) -> Tensor | slice:
    """The columns of a group: a slice, so that nothing is copied, where they are a run."""
    columns = (group == number).nonzero().flatten()
    first, last = int(columns[0]), int(columns[-1])
    return slice(first, last + 1) if last - first + 1 == columns.numel() else columns
