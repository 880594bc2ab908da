"""The scales of a group of inputs of an EXL2 weight: of some maxima the one on whose sixteen scales all rows lose least
together. By Numba's kernels, and in torch for devices that they do not reach."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quantkit.kernels.exl2_scales import INFINITE, LEVELS, choose, losses
from quantkit.solvers.projection import arrays

TRIED = 25  # scales for each row of a group
MAXIMA = np.geomspace(1.12, 0.4, 24)  # of what the row with the largest weights would take for itself
SMALLEST = {2: 0.3, 3: 0.4, 4: 0.5, 5: 0.65, 6: 0.75, 8: 0.9}  # parts of a row's range that are worth covering
LEAST, MOST = 6e-5, 65504.0  # maxima: a 256th of a smaller one is hardly a number of fp16 any more


def search_group(weight: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(the maximum, fp16 [1]; the code of each row's scale, uint8 [rows]) for float32 [rows, columns] in `bits` bits,
    columns weighed by `importance` float32 [columns]. In RAM."""
    high, most, ratios = _range(bits)
    own = weight.contiguous()
    table, base = np.empty((len(own), TRIED), np.float32), np.empty(len(own), np.float32)
    losses(*arrays(own, importance), -high - 1, high, ratios, base, table)
    tried = np.clip(MAXIMA * base.max() * most, LEAST, MOST).astype(np.float16)
    units = (tried.astype(np.float32) / 256).astype(np.float16).astype(np.float32)
    chosen, code = np.zeros(1, np.int64), np.empty(len(own), np.uint8)
    choose(table, ratios, base, units, chosen, code)
    return torch.from_numpy(tried[chosen]), torch.from_numpy(code)


def search_alike(weight: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(maxima fp16 [groups], codes uint8 [groups, rows]) for groups of one size and one width at once, float32 [groups,
    rows, columns], columns weighed by `importance` float32 [groups, columns]. In torch, for devices that Numba does not
    reach: a launch takes as long for one group as for many. Sums run in another order than the kernels', so where two
    choices lose the same to the last digits it may take the other."""
    high, most, ratios = _range(bits)
    base = weight.abs().amax(2) / float(high)  # [groups, rows]
    table = weight.new_zeros((*base.shape, TRIED))
    for number, part in enumerate(ratios.tolist()):
        scale = (base * part)[..., None]
        error = weight - (weight / scale).clamp(-float(high) - 1, float(high)).round().mul_(scale)
        table[..., number] = (error.square_() * importance[:, None]).sum(2)
    nothing = base == 0
    table = table.masked_fill(nothing[..., None], 0)
    maxima = torch.from_numpy(MAXIMA).to(weight.device)
    tried = (maxima * base.amax(1)[:, None] * float(most)).clamp(LEAST, MOST).half()  # [groups, maxima]
    units = (tried.float() / 256).half().float()
    squares = torch.arange(1, LEVELS + 1, device=weight.device).square().float()
    first, last = float(ratios[0]), float(ratios[-1])
    codes = torch.empty((len(MAXIMA), *base.shape), dtype=torch.uint8, device=weight.device)
    totals = torch.empty((len(MAXIMA), len(weight)), dtype=torch.float64, device=weight.device)
    divisor = base.masked_fill(nothing, 1)[..., None]
    for number in range(len(MAXIMA)):
        ratio = squares * units[:, number, None, None] / divisor  # [groups, rows, levels]
        place = ((first - ratio) / (first - last) * (TRIED - 1)).clamp(0, TRIED - 1)
        at = place.long().clamp_(max=TRIED - 2)
        loss = torch.lerp(table.gather(2, at), table.gather(2, at + 1), place - at)
        loss = torch.where(ratio >= first, table[..., :1] * (ratio / first).square(), loss)
        loss = loss.masked_fill(ratio < last, torch.inf)
        least, code = loss.min(2)
        # Where even the largest scale is too small for a row, or the row is nothing, as the kernel has it.
        code = code.masked_fill(least.isinf(), LEVELS - 1).masked_fill(nothing, 0)
        codes[number] = code.to(torch.uint8)
        totals[number] = least.clamp(max=float(INFINITE)).masked_fill(nothing, 0).sum(1, dtype=torch.float64)
    chosen = totals.argmin(0)  # [groups]
    group = torch.arange(len(weight), device=weight.device)
    return tried[group, chosen], codes[chosen, group]


def _range(bits: int) -> tuple[np.float32, np.float32 | float, np.ndarray[tuple[int], np.dtype[np.float32]]]:
    """The largest level, the largest ratio of a scale to that which has the largest weight as its largest level, and
    the ratios tried."""
    high = np.float32(2 ** (bits - 1) - 1)
    most = (high + 1) / (high + 0.5) if bits < 8 else 1.0
    return high, most, np.linspace(most, SMALLEST[bits], TRIED, dtype=np.float32)
