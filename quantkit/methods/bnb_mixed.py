"""`bnb` with more than 4 bits: NF4 or FP4 for most linears, and those for which that costs most stay as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from quantkit.checkpoint.header import DTYPE_BITS
from quantkit.methods import bnb_4bit
from quantkit.methods.base import Description, Method, Mixed, Mixing, WeightSpec, apply
from quantkit.methods.bnb_4bit import Bnb4bit

DENSE = "dense"


class MixedBnb(Bnb4bit, Mixed):
    """bitsandbytes 4-bit, and the bits of the source where they are worth most."""

    bits: float = Field(5.0, gt=0, le=32, description="bits per weight of the linears together, at the most")

    @field_validator("mixes")
    @classmethod
    def _mixes(cls, value: dict[str, str]) -> dict[str, str]:
        for text in value.values():
            if text not in ("nf4", "fp4", DENSE):
                raise ValueError(f"{text!r} is no form of a linear\nwrite nf4, fp4 or {DENSE}")
        return value


def _cost(params: MixedBnb, spec: WeightSpec, mix: str) -> int:
    if mix == DENSE:
        return DTYPE_BITS[spec.dtype] * spec.numel
    return sum(8 * t.nbytes for t in bnb_4bit.outputs(spec, params))


@dataclass(frozen=True)
class _Restored:
    values: npt.NDArray[np.float32]

    def restore(self) -> npt.NDArray[np.float32]:
        return self.values


@dataclass(frozen=True)
class _Trial:
    """solvers.group.Solver of a format that rounds every weight for itself."""

    params: MixedBnb
    mix: str

    def factor(self, hessian: Any) -> None:
        return None

    def nearest(self, name: str, weight: Any, hessian: Any) -> _Restored:
        values = np.ascontiguousarray(weight.cpu().numpy())
        if self.mix == DENSE:
            return _Restored(values)
        spec = WeightSpec(name, "F32", *values.shape)
        tensors, _ = apply(bnb_4bit.METHOD, values.view(np.uint32), spec, self.params)
        main, *_ = bnb_4bit.outputs(spec, self.params)
        raw = tensors.pop(main.name).reshape(-1)
        decoded = bnb_4bit.METHOD.decoder(spec, self.params, tensors).decode(raw, 0, spec.numel)
        return _Restored(decoded.reshape(values.shape))


def _describe(params: MixedBnb) -> Description:
    about = bnb_4bit.describe(params)
    bits = f"at most {params.bits:g} per weight of the linears, in 4 each or as the source has them"
    settings = (("Bits", bits), *about.settings)
    tags = tuple(tag for tag in about.tags if tag != "4-bit")
    return replace(about, slug=f"{about.slug}-{params.bits:g}", tags=tags, settings=settings)


_UNIFORM: Method[Any] = bnb_4bit.METHOD
METHOD = replace(
    _UNIFORM,
    bits=0,
    params=MixedBnb,
    describe=_describe,
    mixing=Mixing(
        label=lambda params: f"bnb, {params.quant_type}{', double quantization' if params.double_quant else ''}",
        options=lambda params, _: (params.quant_type, DENSE),
        cost=_cost,
        trial=_Trial,
        dense=DENSE,
    ),
)
