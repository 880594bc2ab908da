"""How large what a linear gets is, for the tokens that it matters for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors.torch import load, save

from quantkit.calibration.rows import Group
from quantkit.calibration.sensitivity import Squares
from quantkit.calibration.statistics import Statistics, add_product
from quantkit.modules import in_64s

_OUTPUTS, _TOKENS = ".outputs", ".tokens"


def to_bytes(squares: Mapping[str, Squares]) -> bytes:
    """As a file keeps them."""
    tensors = {name + _OUTPUTS: own.outputs.cpu() for name, own in squares.items()}
    return save(tensors | {name + _TOKENS: own.tokens for name, own in squares.items() if own.tokens is not None})


def read_squares(raw: bytes) -> dict[str, Squares]:
    """Of what `to_bytes` made."""
    tensors = load(raw)
    names = [name.removesuffix(_OUTPUTS) for name in tensors if name.endswith(_OUTPUTS)]
    return {name: Squares(tensors[name + _OUTPUTS], tensors.get(name + _TOKENS)) for name in names}


class Energies:
    """Σ a·x·xᵀ for each linear of a group, a being the squares of a token's gradients there: what `add` is told of is
    added up until `take` takes it. first: the row of the text that gradients begin with."""

    def __init__(self, squares: Mapping[str, Squares], first: int) -> None:
        self.squares, self.first = squares, first
        self.sums: dict[str, torch.Tensor] = {}  # float32 [in, in]
        self.weights: dict[str, float] = {}  # Σ a

    def add(self, group: Group, row: int, x: torch.Tensor) -> None:
        """x [tokens, in]: the beginning of a row, or all of it, is what gradients are known of."""
        for name in group:
            own = self.squares.get(name)
            if own is None or own.tokens is None or not self.first <= row < self.first + len(own.tokens):
                continue
            a = own.tokens[row - self.first].to(x.device)
            some = x[: len(a)].float()
            if name not in self.sums:
                self.sums[name] = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            add_product(self.sums[name], in_64s(some * a[:, None]), in_64s(some))
            self.weights[name] = self.weights.get(name, 0.0) + float(a.double().sum())

    def take(self, name: str, seen: Statistics) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(Mean squares of the gradients by output, float64 [out]; energy of the inputs, float32 [in, in]; the weight
        of all tokens, by which that is to be divided). Where single tokens' gradients are not known, all count alike.
        """
        own, total, weight = self.squares.get(name), self.sums.pop(name, None), self.weights.pop(name, 0.0)
        rows, device = len(seen.weights[name]), seen.hessian.device
        means = torch.zeros(rows, dtype=torch.float64, device=device) if own is None else own.outputs.to(device)
        if total is None or not weight > 0:
            return means, seen.hessian, float(seen.tokens)
        return means, total, weight
