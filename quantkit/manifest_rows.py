"""A manifest's list of tensors as `verify` reads it: what each was, and what it must have become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantkit.checkpoint.header import DTYPE_BITS, FLOATS, TensorSpec
from quantkit.checkpoint.views import SourceTensor
from quantkit.methods.base import WeightSpec
from quantkit.recipe import Quantize


def strings(listed: Any) -> tuple[str, ...]:
    if not isinstance(listed, list) or not all(isinstance(x, str) for x in listed):
        raise ValueError("a list of modules is none")
    return tuple(listed)


@dataclass(frozen=True)
class Row:
    """One source tensor of the manifest. `spec.shape` is [out, in] for a quantized weight."""

    spec: TensorSpec
    quantized: bool
    transposed: bool
    error: float
    pruned: bool
    masked: int
    zeros: int

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Row:
        if row["dtype"] not in DTYPE_BITS:
            raise ValueError(f"unknown dtype {row['dtype']!r}")
        spec = TensorSpec(str(row["name"]), str(row["dtype"]), tuple(int(n) for n in row["shape"]))
        if row["quantized"] and (len(spec.shape) != 2 or min(spec.shape) < 1 or spec.dtype not in FLOATS):
            raise ValueError(f"{spec.name!r} is no float matrix, so it was not quantized")
        error = float(row.get("error", 0.0))
        if not 0 <= error < np.inf:
            raise ValueError(f"{spec.name!r} has an error of {error}")
        pruned = bool(row.get("pruned"))
        if pruned and (len(spec.shape) != 2 or spec.dtype not in FLOATS):
            raise ValueError(f"{spec.name!r} is no float matrix, so it was not pruned")
        masked, zeros = (int(row["masked"]), int(row["zeros"])) if pruned else (0, 0)
        return cls(spec, bool(row["quantized"]), bool(row.get("transposed")), error, pruned, masked, zeros)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def weight(self) -> WeightSpec:
        rows, columns = self.spec.shape
        return WeightSpec(self.name.removesuffix(".weight"), self.spec.dtype, rows, columns)

    def outputs(self, quantize: Quantize | None) -> tuple[TensorSpec, ...]:
        if quantize is None:
            return (self.spec,)
        if not self.quantized:
            others = quantize.implementation.others
            cast = others is not None and self.spec.dtype in FLOATS and not self.pruned
            return (TensorSpec(self.name, str(others), self.spec.shape) if cast else self.spec,)
        return quantize.implementation.outputs(self.weight, quantize.params)


def mismatch(found: SourceTensor | None, wanted: TensorSpec) -> str:
    if found is None:
        return f"tensor {wanted.name!r} is missing"
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        return (
            f"tensor {wanted.name!r} is {found.dtype} {list(found.shape)}, "
            f"the manifest makes it {wanted.dtype} {list(wanted.shape)}"
        )
    return ""
