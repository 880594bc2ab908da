"""The scales of one group of inputs of an EXL2 weight: of some maxima the one on whose sixteen scales all rows lose
least together. By Numba's kernels, and in torch for devices that they do not reach."""

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
    columns weighed by `importance` float32 [columns]."""
    high = np.float32(2 ** (bits - 1) - 1)
    most = (high + 1) / (high + 0.5) if bits < 8 else 1.0
    ratios = np.linspace(most, SMALLEST[bits], TRIED, dtype=np.float32)
    own = weight.contiguous()
    if weight.device.type != "cpu":
        return _search_torch(own, importance, float(high), float(most), ratios)
    table, base = np.empty((len(own), TRIED), np.float32), np.empty(len(own), np.float32)
    losses(*arrays(own, importance), -high - 1, high, ratios, base, table)
    tried = np.clip(MAXIMA * base.max() * most, LEAST, MOST).astype(np.float16)
    units = (tried.astype(np.float32) / 256).astype(np.float16).astype(np.float32)
    chosen, code = np.zeros(1, np.int64), np.empty(len(own), np.uint8)
    choose(table, ratios, base, units, chosen, code)
    return torch.from_numpy(tried[chosen]), torch.from_numpy(code)


def _search_torch(
    weight: Tensor, importance: Tensor, high: float, most: float, ratios: np.ndarray[tuple[int], np.dtype[np.float32]]
) -> tuple[Tensor, Tensor]:
    """As the kernels, for all rows at once. Sums run in another order, so where two choices lose the same to the last
    digits it may take the other."""
    base = weight.abs().amax(1) / high
    table = weight.new_zeros((len(weight), TRIED))
    for number, part in enumerate(ratios.tolist()):
        scale = (base * part)[:, None]
        error = weight - (weight / scale).clamp(-high - 1, high).round().mul_(scale)
        table[:, number] = (error.square_() * importance).sum(1)
    some = base > 0
    table = table.masked_fill(~some[:, None], 0)
    maxima = torch.from_numpy(MAXIMA).to(weight.device)
    tried = (maxima * base.max() * most).clamp(LEAST, MOST).half()
    units = (tried.float() / 256).half().float()
    squares = torch.arange(1, LEVELS + 1, device=weight.device).square().float()
    first, last = float(ratios[0]), float(ratios[-1])
    codes = torch.empty((len(tried), len(weight)), dtype=torch.uint8, device=weight.device)
    totals = torch.empty(len(tried), dtype=torch.float64, device=weight.device)
    divisor = base.masked_fill(~some, 1)
    for number in range(len(tried)):
        ratio = squares * units[number] / divisor[:, None]  # [rows, levels]
        place = ((first - ratio) / (first - last) * (TRIED - 1)).clamp(0, TRIED - 1)
        at = place.long().clamp_(max=TRIED - 2)
        left, right = table.gather(1, at), table.gather(1, at + 1)
        loss = torch.lerp(left, right, place - at)
        loss = torch.where(ratio >= first, table[:, :1] * (ratio / first).square(), loss)
        loss = loss.masked_fill(ratio < last, torch.inf)
        least, code = loss.min(1)
        # Where even the largest scale is too small for a row, or the row is nothing, as the kernel has it.
        code = code.masked_fill(least.isinf(), LEVELS - 1).masked_fill(~some, 0)
        codes[number] = code.to(torch.uint8)
        totals[number] = least.clamp(max=float(INFINITE)).masked_fill(~some, 0).sum(dtype=torch.float64)
    chosen = totals.argmin()[None]
    return tried[chosen], codes[chosen][0]
