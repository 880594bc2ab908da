"""Which weights of a linear go, by the measure that a recipe names, from what is known of its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.pruning import Prune
from quantkit.solvers.factor import factorize
from quantkit.solvers.group import FEWEST_TOKENS, Statistics
from quantkit.solvers.masks import magnitude, wanda, wanda_variant
from quantkit.solvers.pattern import Amount, Pattern
from quantkit.solvers.sparsegpt import prune_columns

DAMP = 0.01  # as SparseGPT's authors have it


@dataclass(frozen=True)
class Pruned:
    """A mask, bool [rows, columns], false where a weight goes; what those that stay become, float32, or None where they
    stay as they are; whether too little was known of the inputs, so that magnitude within rows decided."""

    keep: Tensor
    weight: Tensor | None = None
    fallback: bool = False

    def of(self, weight: Tensor) -> Tensor:
        """The pruned weight, in the dtype of the weight that is given."""
        value = weight
        if self.weight is not None:
            most = torch.finfo(weight.dtype).max  # of fp16, what made up for others may be beyond it
            value = self.weight.clamp(-most, most).to(weight.dtype)
        return value.masked_fill(~self.keep, 0)


def prune_weight(prune: Prune, weight: Tensor, amount: Amount, squares: Tensor | None, tokens: int) -> Pruned:
    """By Wanda or magnitude. weight: [rows, columns]; squares: Σ x² float32 [columns] over so many tokens."""
    if prune.method == "magnitude":
        return Pruned(magnitude(weight, amount, per_row=prune.per_row))
    if squares is None or tokens < FEWEST_TOKENS:
        return Pruned(magnitude(weight, amount, per_row=True), fallback=True)
    if prune.variant:
        assert not isinstance(amount, Pattern)
        return Pruned(wanda_variant(weight, squares, amount))
    return Pruned(wanda(weight, squares, amount))


def prune_group(
    prune: Prune, found: Statistics, amounts: Mapping[str, Amount], targets: Mapping[str, Tensor]
) -> Iterator[tuple[str, Pruned]]:
    """Those of the linears of a group that `amounts` names, once the sums in `found` are complete. targets: what a
    weight should come near to, where that is not the weight itself."""
    if prune.method != "sparsegpt":
        for name, amount in amounts.items():
            yield name, prune_weight(prune, found.weights[name], amount, found.hessian.diagonal(), found.tokens)
        return
    factor = None
    if found.tokens >= FEWEST_TOKENS:
        order = torch.arange(len(found.hessian), device=found.hessian.device)
        factor = factorize(found.hessian, order, prune.damp or DAMP, found.team)
    for name, amount in amounts.items():
        if factor is None:
            yield name, Pruned(magnitude(found.weights[name], amount, per_row=True), fallback=True)
            continue
        weight, keep = prune_columns(targets.get(name, found.weights[name]).float(), factor, amount)
        yield name, Pruned(keep, weight)
