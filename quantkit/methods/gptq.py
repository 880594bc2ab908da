"""Two methods, one format: `gptq`, solved on calibration text, and `rtn`, every weight rounded to the nearest code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from quantkit.checkpoint.header import TensorSpec
from quantkit.methods import gptq_format, pack_quantized
from quantkit.methods.base import Array, Description, Method, Report, Selection, WeightSpec
from quantkit.methods.gptq_format import Grouped
from quantkit.solvers.coded import Coded

BITS = (2, 3, 4, 8)


class Rtn(Grouped):
    """Rounding to nearest, on scales that were searched."""


class Gptq(Grouped):
    """GPTQ (Frantar et al. 2022), aimed at the full-precision model's outputs."""

    act_order: Literal["static", "group", "none"] = Field("static", description="order in which columns are rounded")
    effort: Literal["low", "default", "high"] = Field("default", description="time for quality")
    damp: float = Field(0.01, gt=0, lt=1, description="part of the mean diagonal that is added to the Hessian")

    @model_validator(mode="after")
    def _orders(self) -> Gptq:
        if self.acting and self.format != "gptq":
            raise ValueError("act_order group needs g_idx, which compressed-tensors does not have")
        return self

    @property
    def acting(self) -> bool:
        return self.act_order == "group" and self.group_size != -1


def _layout(params: Grouped) -> Any:
    return gptq_format if params.format == "gptq" else pack_quantized


def _outputs(bits: int, spec: WeightSpec, params: Grouped) -> tuple[TensorSpec, ...]:
    found: tuple[TensorSpec, ...] = _layout(params).outputs(bits, spec, params)
    return found


def _pack(bits: int, coded: Coded, spec: WeightSpec, params: Grouped) -> dict[str, Array]:
    found: dict[str, Array] = _layout(params).pack(bits, coded, spec, params)
    return found


class _Rounder:
    """Encodes a weight that comes whole, in one slab: in the packed tensor, its rows are columns."""

    def __init__(self, bits: int, spec: WeightSpec, params: Grouped, device: str) -> None:
        self.bits, self.spec, self.params, self.device = bits, spec, params, device
        self.companions: dict[str, Array] = {}
        self.report = Report(0.0, 0.0)

    def main_offset(self, start: int) -> int:
        return 0

    def encode(self, x: Array, start: int) -> Array:
        import torch

        from quantkit.kernels.floats import to_float32
        from quantkit.solvers.grids import Grid, rtn

        weight = to_float32(x.reshape(-1), self.spec.dtype).reshape(self.spec.rows, self.spec.columns)
        grid = Grid(self.bits, self.params.group_size or -1, self.params.sym)
        coded = rtn(torch.from_numpy(weight).to(self.device), grid)
        error = norm = 0.0
        for a in range(0, self.spec.rows, 256):  # some rows at a time: the weight is not there three times
            part = Coded(self.bits, coded.codes[a : a + 256], coded.scales[a : a + 256], coded.zeros[a : a + 256],
                         coded.g_idx)  # fmt: skip
            rows = weight[a : a + 256].reshape(-1)
            difference = rows - part.restore().reshape(-1)
            error += float(np.vdot(difference, difference))
            norm += float(np.vdot(rows, rows))
        self.report = Report(error, norm)
        self.companions = _pack(self.bits, coded, self.spec, self.params)
        return self.companions.pop(_outputs(self.bits, self.spec, self.params)[0].name)

    def finish(self) -> tuple[dict[str, Array], Report]:
        return self.companions, self.report


class _Restorer:
    """Decodes a weight whole."""

    def __init__(self, bits: int, spec: WeightSpec, params: Grouped, companions: Mapping[str, Array]) -> None:
        self.bits, self.spec, self.params, self.companions = bits, spec, params, companions

    def decode(self, raw: npt.NDArray[np.uint8], start: int, count: int) -> npt.NDArray[np.float32]:
        main = _outputs(self.bits, self.spec, self.params)[0]
        tensors = {**self.companions, main.name: raw.view(np.int32).reshape(main.shape)}
        coded: Coded = _layout(self.params).unpack(self.bits, tensors, self.spec, self.params)
        return coded.restore().reshape(-1)


def _config(bits: int, params: Grouped, dtype: str, selection: Selection) -> dict[str, Any]:
    if params.format != "gptq":
        return pack_quantized.config(bits, params, selection)
    return gptq_format.config(bits, params, selection, getattr(params, "damp", None))


def _describe(name: str, bits: int, params: Grouped) -> Description:
    grid = "symmetric" if params.sym else "asymmetric"
    group = "one scale a row" if params.group_size == -1 else f"groups of {params.group_size}"
    settings = [("Grid", f"{bits} bits, {grid}, {group}"), ("Format", _named(params))]
    if isinstance(params, Gptq):
        orders = {"static": "by activation, groups in natural order", "group": "by activation, groups too (desc_act)",
                  "none": "natural"}  # fmt: skip
        aims = "each layer's own output" if params.effort == "low" else "the full-precision model's outputs"
        settings += [("Order of rounding", orders[params.act_order]), ("Aimed at", aims), ("Effort", params.effort)]
    tags = [name, f"{bits}-bit"]
    if name == "rtn":
        tags.append("gptq")
    if params.format != "gptq":
        tags = [name, f"{bits}-bit", "compressed-tensors"]
    title = "GPTQ" if name == "gptq" else "Round to nearest"
    return Description(f"{title}, {bits} bits, {group}", f"{name}-{bits}bit", tuple(tags), tuple(settings))


def _named(params: Grouped) -> str:
    if params.format != "gptq":
        return "compressed-tensors, pack-quantized"
    return "GPTQ, version 1" if params.checkpoint_format == "gptq" else "GPTQ, version 2"


def _resolve(params: Grouped, specs: Sequence[WeightSpec]) -> Grouped:
    return gptq_format.resolve_group(params, [spec.columns for spec in specs])


def _solve(bits: int, weights: Mapping[str, Any], found: Any, params: Gptq) -> Iterator[tuple[str, Any]]:
    from quantkit.solvers.gptq import Settings
    from quantkit.solvers.grids import Grid
    from quantkit.solvers.group import solve_group

    grid = Grid(bits, params.group_size or -1, params.sym)
    order = "static" if params.act_order == "group" and not params.acting else params.act_order
    return solve_group(weights, found, Settings(grid, order, params.damp), params.effort)


def _method(name: str, bits: int) -> Method[Any]:
    calibrated = name == "gptq"
    return Method(
        name=name,
        bits=bits,
        needs="hessian" if calibrated else "nothing",
        params=Gptq if calibrated else Rtn,
        outputs=partial(_outputs, bits),
        granule=lambda _: 0,
        encoder=partial(_Rounder, bits),
        decoder=partial(_Restorer, bits),
        config=partial(_config, bits),
        describe=partial(_describe, name, bits),
        devices=("cpu", "cuda") if calibrated else ("cpu",),
        resolve=_resolve,
        refuses=gptq_format.refuses,
        extra_files=gptq_format.extra_files,
        reader_notes=gptq_format.reader_notes,
        streams=_streams if calibrated else lambda _: (),
        solve=partial(_solve, bits) if calibrated else None,
        pack=partial(_pack, bits),
    )


def _streams(params: Gptq) -> tuple[str, ...]:
    return ("quantized",) if params.effort == "low" else ("quantized", "full")


METHODS = {(name, bits): _method(name, bits) for name in ("rtn", "gptq") for bits in BITS}
