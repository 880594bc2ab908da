"""What is written for a linear that is pruned, quantized, or both, from what was seen of its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from quantkit.kernels.rope import to_pairs
from quantkit.methods.base import Array, Encoder, Report, WeightSpec, apply
from quantkit.plans import Unit
from quantkit.pruners import Pruned, prune_group, prune_weight
from quantkit.recipe import Recipe
from quantkit.solvers.group import aim
from quantkit.solvers.pattern import Amount
from quantkit.solvers.quadratic import row_losses, total
from quantkit.solvers.restoring import restored as restored_on
from quantkit.solvers.threads import OF_GPU

if TYPE_CHECKING:
    from quantkit.calibration.norms import Norms
    from quantkit.calibration.statistics import Statistics

ROWS = 64  # of a weight, compared at a time
TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WORDS: dict[int, tuple[torch.dtype, Any]] = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}


@dataclass(frozen=True)
class Made:
    """tensors: by output name, ready to write. weight: [out, in], as a loader will see it."""

    tensors: dict[str, Array]
    weight: Tensor
    report: Report


@dataclass(frozen=True)
class Encoding:
    """The recipe's part that is about linears. units: by module. sparsities: of each layer, where they differ (OWL).
    written: whether what is made is, or only the weight to go on with is of use: another of a team writes it."""

    recipe: Recipe
    units: Mapping[str, Unit]
    sparsities: Sequence[float] = ()
    written: bool = True

    def group(self, found: Statistics) -> Iterator[tuple[Unit, Made]]:
        """The linears of a group that share their inputs, from their Hessian."""
        quantize = self.recipe.quantize
        solved = [n for n in found.weights if self.units[n].quantized and quantize and quantize.implementation.solve]
        rest = [name for name in found.weights if name not in solved]
        targets = aim(found)
        if solved:
            yield from self._solved(found.only(solved), {n: targets.pop(n) for n in solved if n in targets})
        if not rest:
            return
        found = found.only(rest)
        pruned: dict[str, Pruned] = {}
        if self.recipe.prune is not None:
            pruned = dict(prune_group(self.recipe.prune, found, self._amounts(rest), targets))
        for name in rest:
            how = pruned.pop(name, None)
            weight = found.weights[name]
            made = self.whole(self.units[name], weight, how)
            known = None if how is not None and how.fallback else _loss(weight, made.weight, found.hessian)
            yield self.units[name], _with(made, output_error=known)

    def _solved(self, found: Statistics, targets: dict[str, Tensor]) -> Iterator[tuple[Unit, Made]]:
        quantize, prune = self.recipe.quantize, self.recipe.prune
        assert quantize is not None
        method, params = quantize.implementation, quantize.params
        assert method.solve is not None
        assert method.pack is not None
        amounts = self._amounts(found.weights)
        gone: dict[str, int] = {}

        def masks(targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
            if prune is None:
                return {}
            chosen = {name: pruned.keep for name, pruned in prune_group(prune, found, amounts, targets)}
            gone.update((name, keep.numel() - int(keep.sum())) for name, keep in chosen.items())
            return chosen

        for name, solved in method.solve(found, params, targets, masks if amounts else None):
            unit = self.units[name]
            assert unit.weight is not None
            value = restored_on(solved.coded, found.hessian.device)
            if not self.written:
                yield unit, Made({}, value, Report(0.0, 0.0))
                continue
            tensors = method.pack(solved.coded, unit.weight, params)
            loss = None if solved.report.fallback else solved.report.loss
            report = compare(found.weights[name], value, output_error=loss, fallback=solved.report.fallback)
            if unit.pruned:
                report = _counted(report, found.weights[name], value, gone[name])
            yield unit, Made(tensors, value, report)

    def alone(self, name: str, norms: Norms) -> Made:
        """A linear of which the norms of its inputs are known."""
        unit, how = self.units[name], None
        if unit.pruned and self.recipe.prune is not None:
            how = prune_weight(self.recipe.prune, norms.weight, self.amount(unit), norms.squares, norms.tokens)
        return self.whole(unit, norms.weight, how)

    def whole(self, unit: Unit, weight: Tensor, how: Pruned | None) -> Made:
        """A weight [out, in] pruned so, or not at all, and then as the method encodes it, or as it is."""
        assert unit.weight is not None
        spec, quantize = unit.weight, self.recipe.quantize
        value = (weight if how is None else how.of(weight)).to(TORCH[spec.dtype]).cpu()
        if unit.quantized and quantize is not None:
            method, params = quantize.implementation, quantize.params
            tensors, _ = apply(method, _bits(value), spec, params)
            main, *others = (s.name for s in method.outputs(spec, params))
            decoder = method.decoder(spec, params, {name: tensors[name] for name in others})
            raw = np.ascontiguousarray(tensors[main]).reshape(-1).view(np.uint8)
            value = torch.from_numpy(decoder.decode(raw, 0, spec.numel).reshape(spec.rows, spec.columns))
        else:
            tensors = {unit.outputs[0].name: _as_stored(unit, value)}
        report = compare(weight, value, fallback=how is not None and how.fallback)
        if how is not None:
            report = _counted(report, weight, value, how.keep.numel() - int(how.keep.sum()))
        return Made(tensors, value, report)

    def amount(self, unit: Unit) -> Amount:
        assert unit.linear is not None
        assert self.recipe.prune is not None
        return self.sparsities[unit.linear.layer] if self.sparsities else self.recipe.prune.amount

    def _amounts(self, names: Sequence[str] | Mapping[str, Tensor]) -> dict[str, Amount]:
        return {name: self.amount(self.units[name]) for name in names if self.units[name].pruned}


class WholeEncoder(Encoder):
    """Prunes a weight by magnitude, and encodes it, in one slab."""

    def __init__(self, recipe: Recipe, unit: Unit) -> None:
        assert unit.weight is not None
        self.encoding, self.unit, self.spec = Encoding(recipe, {unit.weight.module: unit}), unit, unit.weight
        self.made: Made | None = None

    def main_offset(self, start: int) -> int:
        return 0

    def encode(self, x: Array, start: int) -> Array:
        weight = as_weight(x, self.spec)
        prune = self.encoding.recipe.prune
        assert prune is not None
        how = prune_weight(prune, weight, self.encoding.amount(self.unit), None, 0)
        self.made = self.encoding.whole(self.unit, weight, how)
        return self.made.tensors.pop(self.unit.outputs[0].name)

    def finish(self) -> tuple[dict[str, Array], Report]:
        assert self.made is not None
        return self.made.tensors, self.made.report


def as_weight(x: Array, spec: WeightSpec) -> Tensor:
    """The weight [out, in] of bit patterns in that order."""
    return torch.from_numpy(x.reshape(-1).view(np.uint8)).view(TORCH[spec.dtype]).reshape(spec.rows, spec.columns)


def compare(weight: Tensor, restored: Tensor, *, output_error: float | None = None, fallback: bool = False) -> Report:
    """How far a weight is from that of the source."""
    sums = torch.zeros(2, dtype=torch.float64, device=weight.device)
    step = ROWS if weight.device.type == "cpu" else OF_GPU
    for start in range(0, len(weight), step):
        w, r = weight[start : start + step].float(), restored[start : start + step].to(weight.device).float()
        sums[0] += (w - r).square_().sum(dtype=torch.float64)
        sums[1] += w.square().sum(dtype=torch.float64)
    error, norm = sums.cpu().tolist()
    return Report(error, norm, output_error=output_error, fallback=fallback)


def _counted(report: Report, weight: Tensor, restored: Tensor, pruned: int) -> Report:
    return replace(report, pruned=pruned, zeros=zeros(restored), source_zeros=zeros(weight))


def _with(made: Made, *, output_error: float | None) -> Made:
    return Made(made.tensors, made.weight, replace(made.report, output_error=output_error))


def zeros(weight: Tensor) -> int:
    return weight.numel() - int(torch.count_nonzero(weight))


def _loss(weight: Tensor, restored: Tensor, hessian: Tensor) -> float | None:
    """tr(E·H·Eᵀ) / tr(W·H·Wᵀ), E = W − Ŵ; None where that says nothing."""
    error = size = 0.0
    for start in range(0, len(weight), 8 * ROWS):
        w = weight[start : start + 8 * ROWS].float()
        r = restored[start : start + 8 * ROWS].to(w.device).float()
        error += total(row_losses(w - r, hessian))
        size += total(row_losses(w, hessian))
    return error / size if 0 < size < float("inf") and error < float("inf") else None


def _bits(value: Tensor) -> Array:
    word, numpy_word = WORDS[value.itemsize]
    found: Array = value.contiguous().view(word).numpy().view(numpy_word).reshape(-1)
    return found


def _as_stored(unit: Unit, value: Tensor) -> Array:
    """Bit patterns as the tensor lies on disk."""
    assert unit.linear is not None
    flat = _bits(value.T if unit.linear.transposed else value)
    return to_pairs(flat, unit.head_dim, value.shape[1]) if unit.head_dim else flat
