"""What can still be won when every column has its code: better codes one at a time, better scales for the codes.

Both go down the loss tr(E·(H + ridge·I)·Eᵀ) itself and take a step only where it wins, so neither makes it larger. The
ridge is the damping that the columns were solved with: without it they fit what is chance in the calibration text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from quantkit.kernels.descent import MARGIN, damp_block, descend_block
from quantkit.kernels.refit import fit_group, take_levels
from quantkit.solvers.projection import Projection, arrays, residual
from quantkit.solvers.quadratic import row_products

BLOCK = 128
LARGEST = 65504.0  # of float16


def descend(target: Tensor, hessian: Tensor, projection: Projection, codes: Tensor, ridge: float = 0.0) -> None:
    """Visits every code once, in the order of columns, and makes it the best one given all others of its row.
    Columns without inputs are rounded to nearest.

    target: float32 [rows, columns]. hessian: float32 [columns, columns], contiguous. codes: uint8 like the target,
    changed in place. Held beside them: one more float32 matrix like the target.
    """
    errors = residual(target, codes, projection)
    visit = _descend_numba if target.device.type == "cpu" else partial(_descend_blocks, _on_gpu(target))
    visit(hessian, projection, codes, errors, ridge)


def _descend_numba(hessian: Tensor, projection: Projection, codes: Tensor, errors: Tensor, ridge: float) -> None:
    """In as few calls of torch as can be: threads that make many of them wait for each other."""
    masked, keep = projection.mask()
    grid = arrays(projection.group, projection.top, projection.scales, projection.zeros)
    square, error, kept, found = arrays(hessian, errors, keep, codes)
    for start in range(0, len(hessian), BLOCK):
        gradient = torch.mm(errors, hessian[:, start : start + BLOCK]).numpy()
        curvature = np.empty((gradient.shape[1],) * 2, np.float32)
        damp_block(square, error, start, np.float32(ridge), gradient, curvature)
        descend_block(gradient, curvature, start, *grid, masked, kept, found, error)


def _descend_blocks(
    visit: Callable[..., None], hessian: Tensor, projection: Projection, codes: Tensor, errors: Tensor, ridge: float
) -> None:
    for start in range(0, len(hessian), BLOCK):
        stop = min(start + BLOCK, len(hessian))
        gradient = _damped(errors, hessian[:, start:stop], errors[:, start:stop], ridge)
        curvature = hessian[start:stop, start:stop].clone()
        curvature.diagonal().add_(ridge)
        visit(start, gradient, curvature, projection, codes, errors)


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


def refit(
    target: Tensor,
    hessian: Tensor,
    projection: Projection,
    codes: Tensor,
    ridge: float = 0.0,
    allowed: Tensor | None = None,
) -> Projection:
    """The projection with better scales for the codes it has, a row's taken where its loss falls.

    Group after group, each the best given all others and rounded before the next, which so makes up for the rounding.
    All groups of a row at once are a system of equations; a sweep comes within a thousandth of what its solution gains
    (12 matrices of SmolLM2-135M), and needs no matrix of groups by groups for each row.
    target: float32 [rows, columns]. hessian: float32 [columns, columns]. codes: uint8 like the target. allowed: float32
    [groups, m], rising: the scales that can be written for each group, every float16 but 0 by default.
    """
    errors = residual(target, codes, projection)
    scales = projection.scales.clone()
    fit = _fit_numba if target.device.type == "cpu" else _fit_torch
    fit(errors, hessian, projection, codes, scales, ridge, allowed)
    return replace(projection, scales=scales)


def _fit_numba(
    errors: Tensor,
    hessian: Tensor,
    projection: Projection,
    codes: Tensor,
    scales: Tensor,
    ridge: float,
    allowed: Tensor | None,
) -> None:
    found, zeros, real, error = arrays(codes, projection.zeros, scales, errors)
    none = torch.empty((scales.shape[1], 0), dtype=torch.float32)
    between, snaps = arrays(*((none.double(), none) if allowed is None else (middles(allowed), allowed)))
    order, groups = _by_group(projection.group)
    columns = order.numpy()
    for group, (start, stop, run) in enumerate(groups):
        place, levels = columns[start:stop], np.empty((len(error), stop - start), np.float32)
        take_levels(found, zeros, group, place, levels)
        across = hessian[:, run]
        products = torch.mm(torch.from_numpy(levels), across[run]).numpy()
        gradient = torch.mm(errors, across).numpy()
        read = (gradient, products, levels, np.float32(ridge), group, place, between[group], snaps[group])
        fit_group(*read, real, error)


def _fit_torch(
    errors: Tensor,
    hessian: Tensor,
    projection: Projection,
    codes: Tensor,
    scales: Tensor,
    ridge: float,
    allowed: Tensor | None,
) -> None:
    """The same in torch, a group at a time for all rows."""
    for group, (_, _, run) in enumerate(_by_group(projection.group)[1]):
        levels = codes[:, run].float() - projection.zeros[:, group : group + 1]
        across = hessian[:, run]
        slope = row_products(_damped(errors, across, errors[:, run], ridge), levels)
        bend = row_products(_damped(levels, across[run], levels, ridge), levels)
        wanted = scales[:, group].double() + torch.where(bend > 0, slope / bend, torch.zeros_like(bend))
        if allowed is None:
            better = wanted.clamp(-LARGEST, LARGEST).half().float()
        else:
            better = allowed[group][torch.searchsorted(middles(allowed[group]), wanted)]
        move = (better - scales[:, group]).double()
        wins = (2 * move * slope > (1 + float(MARGIN)) * move.square() * bend) & (better != 0)
        scales[:, group] = torch.where(wins, better, scales[:, group])
        errors[:, run] -= levels.mul_(torch.where(wins, move, torch.zeros_like(move)).float()[:, None])


def middles(levels: Tensor) -> Tensor:
    """float64 [..., m − 1]: what lies between rising levels, float32 [..., m]."""
    return ((levels[..., 1:].double() + levels[..., :-1].double()) / 2).contiguous()


def _damped(a: Tensor, b: Tensor, c: Tensor, ridge: float) -> Tensor:
    """a·b + ridge·c. Not by addmm: oneDNN compiles a kernel for each beta, and keeps a thousand of them."""
    return torch.mm(a, b).add_(c, alpha=ridge)


def _by_group(group: Tensor) -> tuple[Tensor, list[tuple[int, int, Tensor | slice]]]:
    """int64 [columns], those of one group side by side; and of each group from where to where it is there, and its
    columns: a slice, so that nothing is copied, where groups are runs."""
    order, edges = group.long().argsort(stable=True), [0, *group.long().bincount().cpu().cumsum(0).tolist()]
    runs = bool((order[1:] > order[:-1]).all())
    return order, [(a, b, slice(a, b) if runs else order[a:b]) for a, b in pairwise(edges)]
