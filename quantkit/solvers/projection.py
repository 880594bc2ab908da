"""What a weight may become: the points of a grid that a row has for each of its columns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantkit.kernels.columns import round_rows, subtract_levels

CHUNK = 256  # rows at a time where a temporary is as large as its rows


@dataclass(frozen=True)
class Projection:
    """ŵ = scale · (code − zero) with codes 0 … top, and ŵ = 0 where nothing may be kept. All on one device.

    scales: float32 [rows, groups], never 0. zeros: float32 [rows, groups], integers within 0 … top.
    group: int32 [columns]. top: float32 [columns], the largest code, 2**bits − 1 of that column.
    keep: bool [rows, columns], false where a weight is pruned; None keeps all.
    """

    scales: Tensor
    zeros: Tensor
    group: Tensor
    top: Tensor
    keep: Tensor | None = None

    def rows(self, rows: slice) -> Projection:
        """That of some rows; a view."""
        keep = None if self.keep is None else self.keep[rows]
        return replace(self, scales=self.scales[rows], zeros=self.zeros[rows], keep=keep)

    def mask(self) -> tuple[bool, Tensor]:
        """For kernels: is there a mask, and the mask or something of its type."""
        if self.keep is None:
            return False, torch.ones((1, 1), dtype=torch.bool)
        return True, self.keep


def uniform(bits: int, scales: Tensor, zeros: Tensor, group: Tensor, keep: Tensor | None = None) -> Projection:
    """The same number of bits everywhere. scales [rows, groups] of any float type, zeros of any, group [columns]."""
    top = torch.full(group.shape, 2.0**bits - 1, device=scales.device)
    return Projection(scales.float(), zeros.float(), group.to(torch.int32), top, keep)


def arrays(*tensors: Tensor) -> tuple[Any, ...]:
    """The tensors as numpy arrays on the same memory, which must be contiguous: a copy would take no writes."""
    assert all(tensor.is_contiguous() for tensor in tensors)
    return tuple(tensor.numpy() for tensor in tensors)


def nearest(values: Tensor, projection: Projection, column: Tensor | int | slice) -> Tensor:
    """Levels (code − zero), float32, of `values` in some columns: the twin of the kernels' rounding, in torch."""
    group = projection.group[column].long()
    scale, zero = projection.scales[:, group], projection.zeros[:, group]
    level = (values / scale).clamp(-zero, projection.top[column] - zero).round()
    return level if projection.keep is None else level.where(projection.keep[:, column], torch.zeros_like(level))


def round_all(weight: Tensor, projection: Projection) -> Tensor:
    """Codes uint8 [rows, columns]: every weight to the nearest point of its grid, halves to the even code.

    weight: float32 [rows, columns], finite.
    """
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    if weight.device.type == "cpu":
        masked, keep = projection.mask()
        grid = (projection.group, projection.top, projection.scales, projection.zeros)
        round_rows(*arrays(weight.contiguous(), *grid), masked, *arrays(keep, codes))
        return codes
    for rows in chunks(weight.shape[0]):
        part = projection.rows(rows)
        levels = nearest(weight[rows], part, slice(None))
        codes[rows] = (levels + part.zeros[:, part.group.long()]).to(torch.uint8)
    return codes


def chunks(rows: int) -> list[slice]:
    """Runs of rows that temporaries are made of."""
    return [slice(start, min(start + CHUNK, rows)) for start in range(0, rows, CHUNK)]


def residual(target: Tensor, codes: Tensor, projection: Projection) -> Tensor:
    """target − ŵ, float32 [rows, columns]. codes: uint8 of that shape."""
    if target.device.type == "cpu":
        out = torch.empty(target.shape, dtype=torch.float32)
        read = (codes, projection.scales, projection.zeros, projection.group)
        subtract_levels(*arrays(target.contiguous(), *read, out))
        return out
    out = torch.empty_like(target)
    group = projection.group.long()
    for rows in chunks(target.shape[0]):
        part = projection.rows(rows)
        levels = codes[rows].float().sub_(part.zeros[:, group])
        torch.sub(target[rows], levels.mul_(part.scales[:, group]), out=out[rows])
    return out
