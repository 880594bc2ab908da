"""The scale search in torch, for devices that Numba does not reach: `quantkit.kernels.scales` says what it does."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.kernels.scales import LARGEST, SMALLEST_NORMAL


def _to_half(values: Tensor) -> Tensor:
    """The nearest float16 as float32, never 0 and never beyond 65504."""
    halves = values.clamp(-float(LARGEST), float(LARGEST)).half().float()
    return torch.where(halves == 0, torch.full_like(halves, float(SMALLEST_NORMAL)).copysign(values), halves)


def search_torch(
    weight: Tensor,
    importance: Tensor,
    edges: Tensor,
    symmetric: bool,
    top: int,
    ratios: Tensor,
    shifts: Tensor,
    polish: int,
    scales: Tensor,
    zeros: Tensor,
) -> None:
    """As the kernel, for all rows at once. Sums run in another order, so where two candidates are equal to the last
    digits it may choose the other."""
    sizes = edges.diff()
    # Groups as equally long rows: what a shorter one lacks is a weight of 0 without importance.
    inside = torch.arange(int(sizes.max()), device=weight.device)[None] < sizes[:, None]
    place = inside.flatten().nonzero().flatten()
    h = weight.new_zeros(inside.numel()).index_copy(0, place, importance).view(inside.shape)
    w = weight.new_zeros((weight.shape[0], inside.numel())).index_copy(1, place, weight).view(-1, *inside.shape)
    least, most = w.amin(2).clamp(max=0), w.amax(2).clamp(min=0)
    span = torch.maximum(most, -least)
    empty = span == 0
    span = torch.where(empty, torch.ones_like(span), span)
    w, least, most = w / span[..., None], least / span, most / span
    middle = (top + 1) / 2

    def levels(scale: Tensor, zero: Tensor) -> Tensor:
        return torch.clamp(w * (span / scale)[..., None], -zero[..., None], (top - zero)[..., None]).round()

    def error(scale: Tensor, zero: Tensor) -> Tensor:
        return ((w - levels(scale, zero) * (scale / span)[..., None]).square_() * h).sum(2)

    best = torch.full_like(span, torch.inf)

    def offer(scale: Tensor, zero: Tensor) -> None:
        found = error(scale, zero)
        better = found < best
        best.copy_(torch.where(better, found, best))
        scales.copy_(torch.where(better, scale, scales))
        zeros.copy_(torch.where(better, zero, zeros))

    if symmetric:
        first = torch.where(-least >= most, 1.0, -1.0)
        for sign in (first, -first):
            for ratio in ratios.tolist():
                offer(_to_half(sign * (ratio * span / middle)), torch.full_like(span, middle))
    else:
        sign = torch.where(least == 0, -1.0, 1.0)
        below = torch.where(least == 0, most, -least)
        for ratio in ratios.tolist():
            scale = _to_half(sign * ((most - least) * (ratio * span / top)))
            at = (below * ratio * (span / scale.abs())).round()
            for shift in shifts.tolist():
                offer(scale, (at + shift).clamp(1, top))
    for _ in range(polish):
        codes = levels(scales, zeros)
        wd, dd = (h * w * codes).sum(2), (h * codes * codes).sum(2)
        better = torch.where(dd > 0, _to_half(wd / dd * span), scales)
        offer(torch.where(better * scales > 0, better, scales), zeros.clone())
    scales.copy_(torch.where(empty, torch.ones_like(scales), scales))
    zeros.copy_(torch.where(empty, torch.full_like(zeros, middle), zeros))
