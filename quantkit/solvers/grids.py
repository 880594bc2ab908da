"""Grids of codes, and the search for the scale and zero point that suit a group of weights best."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quantkit.kernels.scales import search
from quantkit.solvers.coded import Coded
from quantkit.solvers.projection import arrays, round_all, uniform
from quantkit.solvers.scales_torch import search_torch
from quantkit.solvers.threads import in_threads, parts

# The smallest part of a group's range that is worth covering: with few codes, clipping the extremes pays.
SMALLEST_RATIO = {2: 0.3, 3: 0.4, 4: 0.5, 8: 0.9}
RATIOS = 32
SHIFTS = (0.0, -1.0, 1.0)
POLISH = 2


@dataclass(frozen=True)
class Grid:
    """bits: 2, 3, 4 or 8. group_size: columns that share a scale, −1 for all of a row; the last group may be shorter.

    symmetric: the zero point is 2**(bits − 1) everywhere, and the sign of the scale says on which side lies the one
    code more. Otherwise it is one of 1 … 2**bits − 1: files of GPTQ's first version cannot say 0.
    """

    bits: int
    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in SMALLEST_RATIO:
            raise ValueError(f"{self.bits} bits: 2, 3, 4 or 8 are possible")
        if self.group_size != -1 and self.group_size < 1:
            raise ValueError(f"group size {self.group_size}: positive numbers are possible, and -1 for the whole row")

    @property
    def top(self) -> int:
        """The largest code."""
        return int(2**self.bits - 1)

    def groups(self, columns: int) -> int:
        """Groups a row of that many columns has."""
        return 1 if self.group_size == -1 else -(-columns // self.group_size)

    def natural(self, columns: int, device: torch.device | str = "cpu") -> Tensor:
        """int32 [columns]: the group of every column where groups are runs of columns."""
        size = columns if self.group_size == -1 else self.group_size
        return (torch.arange(columns, device=device) // size).to(torch.int32)


def ratios(grid: Grid) -> Tensor:
    """float32 [RATIOS], falling: the parts of the range that are tried. The first covers both ends without clipping."""
    middle = 2 ** (grid.bits - 1)
    most = middle / (middle - 1) if grid.symmetric else grid.top / (grid.top - 1)
    return torch.linspace(most, SMALLEST_RATIO[grid.bits], RATIOS, dtype=torch.float64).float()


@dataclass(frozen=True)
class Columns:
    """What a search needs to know of a weight's columns, the same for all of its rows.

    order: int64 [columns], those of one group side by side; None where they are. edges: int64 [groups + 1], where each
    group begins in that order. weighing: float32 [columns], in that order, how much each column's error counts.
    """

    order: Tensor | None
    edges: Tensor
    weighing: Tensor

    @staticmethod
    def of(grid: Grid, group: Tensor, importance: Tensor | None = None) -> Columns:
        """group: int32 [columns]. importance: float32 [columns], not negative: the diagonal of the Hessian; a group
        without any counts every column alike."""
        order = group.long().argsort(stable=True)
        counts = group.long().bincount(minlength=grid.groups(len(group)))
        natural = bool((order[1:] > order[:-1]).all())
        weighing = normalized(importance, group)[order]
        return Columns(None if natural else order, torch.cat([order.new_zeros(1), counts.cumsum(0)]), weighing)


def search_scales(weight: Tensor, grid: Grid, columns: Columns | None = None) -> tuple[Tensor, Tensor]:
    """(scales float16 [rows, groups], zeros uint8 [rows, groups]) with the least Σ weighing·(w − ŵ)² found.

    weight: float32 [rows, columns], finite. columns: by default groups are runs, and all columns count alike. No scale
    is 0; a group of zeros has scale 1.
    """
    columns = Columns.of(grid, grid.natural(weight.shape[1], weight.device)) if columns is None else columns
    weight = weight.contiguous() if columns.order is None else weight[:, columns.order]
    tried, shifts = ratios(grid), torch.tensor(SHIFTS)
    scales = torch.empty((weight.shape[0], columns.edges.numel() - 1), device=weight.device)
    zeros = torch.empty_like(scales)
    if weight.device.type == "cpu":
        read = arrays(weight, columns.weighing, columns.edges)
        options = (grid.symmetric, np.float32(grid.top), *arrays(tried, shifts), POLISH)
        search(*read, *options, *arrays(scales, zeros))
    else:
        options = (grid.symmetric, grid.top, tried, shifts, POLISH)
        search_torch(weight, columns.weighing, columns.edges, *options, scales, zeros)
    return scales.half(), zeros.to(torch.uint8)


def normalized(importance: Tensor | None, group: Tensor) -> Tensor:
    """float32 [columns], the largest of each group 1: sums of squares stay within float32."""
    if importance is None:
        return torch.ones(group.shape, device=group.device)
    most = importance.new_zeros(int(group.max()) + 1).scatter_reduce(0, group.long(), importance, "amax")[group.long()]
    return torch.where(most > 0, importance / most, torch.ones_like(importance))


def round_to_grid(weight: Tensor, scales: Tensor, zeros: Tensor, group: Tensor, bits: int) -> Tensor:
    """Codes uint8 [rows, columns], each the nearest, halves to even.

    weight: float32 [rows, columns]. scales: float16 or float32 [rows, groups]. zeros: uint8 [rows, groups]. group:
    int32 [columns].
    """
    return round_all(weight, uniform(bits, scales, zeros, group))


def coded(grid: Grid, codes: Tensor, scales: Tensor, zeros: Tensor, group: Tensor) -> Coded:
    """The result type, on the CPU: codes uint8 [rows, columns], scales float16, zeros uint8 [rows, groups], group."""
    return Coded(grid.bits, *(part.cpu().numpy() for part in (codes, scales, zeros, group)))


def rtn(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Coded:
    """Round to nearest: every weight for itself, on scales from `search_scales`. weight: [rows, columns] of any
    float type."""
    group = grid.natural(weight.shape[1], weight.device)
    columns = Columns.of(grid, group, importance)

    def some(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        aim = weight[rows].float()
        scales, zeros = search_scales(aim, grid, columns)
        return round_to_grid(aim, scales, zeros, group, grid.bits), scales, zeros

    found = in_threads(some, parts(weight.shape[0], weight.device, weight.shape[1]), weight.device)
    codes, scales, zeros = (torch.cat(column) for column in zip(*found, strict=True))
    return coded(grid, codes, scales, zeros, group)
