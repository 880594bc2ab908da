"""`columns.round_block` and `descent.descend_block` on a GPU, each in one launch instead of thirty for each column.

In Triton's language: the operations of the Numba kernels in their order, no multiplication fused with an addition, so
that codes and errors are the same bit for bit. Triton comes with torch for CUDA and is no dependency: without it this
can be imported, and nothing here is `usable`. Import this where there is a tensor on a GPU, and nowhere else.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.kernels.descent import MARGIN

# A program is one warp with this many rows and all columns of a block, which it keeps in registers: its lanes are eight
# rows by four, and each has every fourth column of its row. What is done once for a row and column is so done for eight
# rows in one instruction, and to find a value among the lanes takes two steps. With 16 rows a program needs half as
# many registers again, and a weight of 1,024 rows has half as many programs as an H200 has multiprocessors; with 4 it
# needs 1.4 times the instructions for a row.
TILE = 8
BLOCK = 128
OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}
WIN = float(np.float32(1) + MARGIN)
OLDEST = (8, 0)  # compute capability: Triton compiles for no older one
# Numbers that a kernel must take as they come: one compiled for each value would be compiled for every block.
NUMBERS = ["rows", "width", "first", "by_shifted", "by_target", "by_lower", "by_gradient", "by_curvature", "by_scales",
           "by_zeros", "by_keep", "by_codes", "by_errors"]  # fmt: skip


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


triton, tl = _module("triton"), _module("triton.language")


def _kernel(function: Any) -> Any:
    return function if triton is None else triton.jit(function, do_not_specialize=NUMBERS)


def usable(tensor: Tensor) -> bool:
    """Whether these kernels work where a tensor lies: on a CUDA device that Triton compiles for, not on a stand-in."""
    real = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_cuda
    return real and triton is not None and _works(tensor.device)


def lacking(device: torch.device) -> str | None:
    """What a real GPU lacks for these kernels, in words; None if nothing."""
    if torch.version.cuda is None:
        return None
    if triton is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < OLDEST:
        return "Triton compiles for no GPU as old as this one"
    return _fault(device)


def _works(device: torch.device) -> bool:
    new = torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= OLDEST
    return new and _fault(device) is None


@functools.cache
def _fault(device: torch.device) -> str | None:
    """Tried on one weight: Triton needs a C compiler and Python's headers, which images made for running lack."""
    one, zero = torch.ones((1, 1), device=device), torch.zeros(1, dtype=torch.int64, device=device)
    codes = torch.zeros((1, 1), dtype=torch.uint8, device=device)
    try:
        round_block(one, one, one, 0, zero, zero.int(), one[0], one, one, None, codes, one.clone())
    except Exception as e:  # whatever it is, torch can do the same without
        return f"Triton does not work here ({(str(e) or type(e).__name__).splitlines()[0][:200]})"
    return None


def round_block(
    shifted: Tensor,
    target: Tensor,
    lower: Tensor,
    first: int,
    column: Tensor,
    group: Tensor,
    top: Tensor,
    scales: Tensor,
    zeros: Tensor,
    keep: Tensor | None,
    codes: Tensor,
    errors: Tensor,
) -> None:
    """Rounds one block of columns, from its last column to its first: see `columns.round_block`.

    All on one device, contiguous along rows: `shifted` float32 [rows, n] by position, left as it is; `target` float32
    [rows, block], block ≤ 128; `lower` float32 [block, block]; `column` int64, `group` int32, `top` float32, all [n] by
    position; `scales`, `zeros` float32 [rows, groups]; `keep` bool [rows, n] by column, None keeps all. Written:
    `codes` uint8 [rows, n] by column; `errors` float32 [rows, block].
    """
    rows, width = target.shape
    counts = (rows, width, first, *map(_step, (shifted, target, lower, scales, zeros, keep, codes, errors)))
    tensors = (shifted, target, lower, column, group, top, scales, zeros, keep, codes, errors)
    _launch(_round_tile, rows, width, *tensors, *counts)


def descend_block(
    gradient: Tensor,
    curvature: Tensor,
    first: int,
    group: Tensor,
    top: Tensor,
    scales: Tensor,
    zeros: Tensor,
    keep: Tensor | None,
    codes: Tensor,
    errors: Tensor,
) -> None:
    """One visit to every column of a block: see `descent.descend_block`.

    All on one device, contiguous along rows: `gradient` float32 [rows, width], width ≤ 128, left as it is; `curvature`
    float32 [width, width]; `group` int32, `top` float32, both [n]; `scales`, `zeros` float32 [rows, groups]; `keep`
    bool [rows, n], None keeps all. Changed: `codes` uint8, `errors` float32, both [rows, n].
    """
    rows, width = gradient.shape
    counts = (rows, width, first, *map(_step, (gradient, curvature, scales, zeros, keep, codes, errors)))
    tensors = (gradient, curvature, group, top, scales, zeros, keep, codes, errors)
    _launch(_descend_tile, rows, width, *tensors, *counts, WIN)


def _step(matrix: Tensor | None) -> int:
    """From a row to the next."""
    assert matrix is None or matrix.stride(1) == 1 or matrix.shape[1] == 1, "columns side by side"
    return 0 if matrix is None else matrix.stride(0)


def _launch(kernel: Any, rows: int, width: int, *arguments: Any) -> None:
    assert width <= BLOCK, width
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    assert all(a.is_contiguous() for a in tensors if a.dim() == 1)
    # Triton launches on the current device, whatever the tensors lie on.
    with torch.cuda.device_of(tensors[0]):  # type: ignore[no-untyped-call]
        kernel[(-(-rows // TILE),)](*arguments, tile=TILE, block=BLOCK, **OPTIONS)


@_kernel
def _nearest(level, low, high):  # type: ignore[no-untyped-def]
    """See `columns.nearest`. Nothing here is allowed to cancel what is added and subtracted."""
    level = tl.where(level > low, level, low)
    level = tl.where(level < high, level, high)
    return (level + 12582912.0) - 12582912.0


@_kernel
def _load(  # type: ignore[no-untyped-def]
    matrix, by_row, first, rows, width,
    tile: tl.constexpr, block: tl.constexpr,  # type: ignore[name-defined]
):  # fmt: skip
    """Columns first … of a tile's rows, [block, tile].

    As a run of numbers and only then of this shape: Triton gives a load of two dimensions to the threads as it thinks
    best for the memory, differently from version to version, and all that follows would have to live with that.
    """
    run = tl.arange(0, tile * block)
    row = tl.program_id(0).to(tl.int64) * tile + run % tile
    column = run // tile
    values = tl.load(matrix + row * by_row + first + column, mask=(row < rows) & (column < width), other=0.0)
    return tl.reshape(values, [block, tile])


@_kernel
def _round_tile(  # type: ignore[no-untyped-def]
    shifted, target, lower, column, group, top, scales, zeros, keep, codes, errors,
    rows, width, first, by_shifted, by_target, by_lower, by_scales, by_zeros, by_keep, by_codes, by_errors,
    tile: tl.constexpr, block: tl.constexpr,  # type: ignore[name-defined]
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    there = row < rows
    place = tl.arange(0, block)
    values = _load(shifted, by_shifted, first, rows, width, tile, block)
    for i in range(width):
        k = width - 1 - i
        p = first + k
        c = tl.load(column + p)
        g = tl.load(group + p)
        scale = tl.load(scales + row * by_scales + g, mask=there, other=1.0)
        zero = tl.load(zeros + row * by_zeros + g, mask=there, other=0.0)
        wanted = tl.load(target + row * by_target + k, mask=there, other=0.0)
        below = tl.load(lower + k * by_lower + place, mask=place < k, other=0.0)
        value = tl.sum(tl.where((place == k)[:, None], values, 0.0), axis=0)
        level = _nearest(tl.div_rn(value, scale), -zero, tl.load(top + p) - zero)
        if keep is not None:
            level = tl.where(tl.load(keep + row * by_keep + c, mask=there, other=0), level, 0.0)
        error = wanted - level * scale
        tl.store(codes + row * by_codes + c, (level + zero).to(tl.uint8), mask=there)
        tl.store(errors + row * by_errors + k, error, mask=there)
        values += error[None, :] * below[:, None]


@_kernel
def _descend_tile(  # type: ignore[no-untyped-def]
    gradient, curvature, group, top, scales, zeros, keep, codes, errors,
    rows, width, first, by_gradient, by_curvature, by_scales, by_zeros, by_keep, by_codes, by_errors,
    win: tl.constexpr, tile: tl.constexpr, block: tl.constexpr,  # type: ignore[name-defined]
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    there = row < rows
    place = tl.arange(0, block)
    slopes = _load(gradient, by_gradient, 0, rows, width, tile, block)
    for c in range(first, first + width):  # counted like this, the columns are compared in 32 bits
        k = c - first
        g = tl.load(group + c)
        scale = tl.load(scales + row * by_scales + g, mask=there, other=1.0)
        zero = tl.load(zeros + row * by_zeros + g, mask=there, other=0.0)
        level = tl.load(codes + row * by_codes + c, mask=there, other=0).to(tl.float32) - zero
        error = tl.load(errors + row * by_errors + c, mask=there, other=0.0)
        beside = tl.load(curvature + k * by_curvature + place, mask=place < width, other=0.0)
        bend = tl.load(curvature + k * by_curvature + k)
        slope = tl.sum(tl.where((place == k)[:, None], slopes, 0.0), axis=0)
        alone = bend == 0  # no inputs: no slope, and its weight alone says what is best
        step = tl.div_rn(tl.where(alone, error, slope), tl.where(alone, scale, bend * scale))
        wanted = _nearest(level + step, -zero, tl.load(top + c) - zero)
        move = (wanted - level) * scale
        better = tl.where(2.0 * move * slope <= win * move * move * bend, level, wanted)
        better = tl.where(alone, wanted, tl.where(bend < 0, level, better))
        if keep is not None:
            better = tl.where(tl.load(keep + row * by_keep + c, mask=there, other=0), better, level)
        move = (better - level) * scale
        tl.store(codes + row * by_codes + c, (better + zero).to(tl.uint8), mask=there)
        tl.store(errors + row * by_errors + c, error - move, mask=there)
        slopes -= tl.where(alone, 0.0, move)[None, :] * beside[:, None]
