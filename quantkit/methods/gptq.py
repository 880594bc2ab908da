"""Two methods, one format: `gptq`, solved on calibration text, and `rtn`, every weight rounded to the nearest code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from quantkit.checkpoint.header import TensorSpec
from quantkit.methods import gptq_config, gptq_format, pack_quantized
from quantkit.methods.base import Array, Description, Method, Report, Selection, WeightSpec
from quantkit.methods.gptq_format import WORD, Grouped, empty, size_of
from quantkit.solvers.coded import Coded

BITS = (2, 3, 4, 8)
CHUNK = 1 << 20


class Rtn(Grouped):
    """Rounding to nearest, on scales that were searched."""


class Gptq(Grouped):
    """GPTQ (Frantar et al. 2022), aimed at the full-precision model's outputs."""

    act_order: Literal["static", "group", "none"] = Field("static", description="order in which columns are rounded")
    effort: Literal["low", "default", "high"] = Field("default", description="time for quality")
    damp: float = Field(0.03, gt=0, lt=1, description="part of the mean diagonal that is added to the Hessian")

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


def outputs(bits: int, spec: WeightSpec, params: Grouped) -> tuple[TensorSpec, ...]:
    found: tuple[TensorSpec, ...] = _layout(params).outputs(bits, spec, params)
    return found


def pack(bits: int, coded: Coded, spec: WeightSpec, params: Grouped) -> dict[str, Array]:
    tensors = empty(outputs(bits, spec, params))
    _layout(params).place(bits, coded, 0, spec, params, tensors)
    return tensors


def unpack(bits: int, tensors: Mapping[str, Array], spec: WeightSpec, params: Grouped) -> Coded:
    found: Coded = _layout(params).unpack(bits, tensors, spec, params)
    return found


def _chunks(spec: WeightSpec) -> list[slice]:
    """Runs of rows that are worked on at a time: a multiple of 32, with some CHUNK weights."""
    size = max(1, CHUNK // (WORD * spec.columns)) * WORD
    return [slice(start, min(start + size, spec.rows)) for start in range(0, spec.rows, size)]


class Rounder:
    """Encodes a weight that comes whole, in one slab: in the packed tensor, its rows are columns. Beside the slab it
    holds the packed tensors, and some rows in float32."""

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

        bits, spec, params = self.bits, self.spec, self.params
        grid = Grid(bits, size_of(params, spec.columns), params.sym)
        main, *_ = specs = outputs(bits, spec, params)
        tensors, error, norm = empty(specs), 0.0, 0.0
        x = x.reshape(spec.rows, spec.columns)
        for rows in _chunks(spec):
            weight = to_float32(x[rows].reshape(-1), spec.dtype).reshape(-1, spec.columns)
            coded = rtn(torch.from_numpy(weight).to(self.device), grid)
            _layout(params).place(bits, coded, rows.start, spec, params, tensors)
            difference = (weight - coded.restore()).reshape(-1)
            error += float(np.vdot(difference, difference))
            norm += float(np.vdot(weight, weight))
        self.report = Report(error, norm)
        packed = tensors.pop(main.name)
        self.companions = tensors
        return packed

    def finish(self) -> tuple[dict[str, Array], Report]:
        return self.companions, self.report


class Restorer:
    """Decodes a weight whole."""

    def __init__(self, bits: int, spec: WeightSpec, params: Grouped, companions: Mapping[str, Array]) -> None:
        self.bits, self.spec, self.params, self.companions = bits, spec, params, companions

    def decode(self, raw: npt.NDArray[np.uint8], start: int, count: int) -> npt.NDArray[np.float32]:
        main = outputs(self.bits, self.spec, self.params)[0]
        tensors = {**self.companions, main.name: raw.view(np.int32).reshape(main.shape)}
        coded = unpack(self.bits, tensors, self.spec, self.params)
        values = np.empty(coded.codes.shape, np.float32)
        for rows in _chunks(self.spec):  # what Coded.restore holds beside its result is several times as large
            part = replace(coded, codes=coded.codes[rows], scales=coded.scales[rows], zeros=coded.zeros[rows])
            values[rows] = part.restore()
        return values.reshape(-1)


def _config(bits: int, params: Grouped, dtype: str, selection: Selection) -> dict[str, Any]:
    if params.format != "gptq":
        return pack_quantized.config(bits, params, selection)
    return gptq_config.config(bits, params, selection, params.damp if isinstance(params, Gptq) else None)


def describe(name: str, bits: int, params: Grouped) -> Description:
    grid = "symmetric" if params.sym else "asymmetric"
    group = "one scale a row" if params.group_size == -1 else f"groups of {params.group_size}"
    settings = [("Grid", f"{bits} bits, {grid}, {group}"), ("Format", _named(params))]
    if isinstance(params, Gptq):
        orders = {"static": "by activation, groups in natural order", "group": "by activation, groups too (desc_act)",
                  "none": "natural"}  # fmt: skip
        aims = "each layer's own output" if params.effort == "low" else "the full-precision model's outputs"
        settings += [("Order of rounding", orders[_order(params)]), ("Aimed at", aims), ("Effort", params.effort)]
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


def _solve(bits: int, found: Any, params: Gptq, targets: Any, masks: Any) -> Iterator[tuple[str, Any]]:
    from quantkit.solvers.group import GptqSolver, settings_for, solve_group

    chosen = settings_for(settings(grid(bits, params), params), params.effort)
    return solve_group(found, GptqSolver(chosen), targets, masks)


def grid(bits: int, params: Grouped) -> Any:
    """solvers.grids.Grid of a linear."""
    from quantkit.solvers.grids import Grid

    return Grid(bits, params.group_size or -1, params.sym)


def settings(grid: Any, params: Gptq) -> Any:
    """solvers.gptq.Settings"""
    from quantkit.solvers.gptq import Settings

    return Settings(grid, _order(params), params.damp)


def _order(params: Gptq) -> Literal["static", "group", "none"]:
    """With one group a row, its columns can be in any order, and g_idx is natural."""
    return "static" if params.act_order == "group" and not params.acting else params.act_order


def _method(name: str, bits: int) -> Method[Any]:
    calibrated = name == "gptq"
    return Method(
        name=name,
        bits=bits,
        needs="hessian" if calibrated else "nothing",
        params=Gptq if calibrated else Rtn,
        outputs=partial(outputs, bits),
        granule=lambda _: 0,
        encoder=partial(Rounder, bits),
        decoder=partial(Restorer, bits),
        config=partial(_config, bits),
        describe=partial(describe, name, bits),
        devices=("cpu", "cuda") if calibrated else ("cpu",),
        resolve=gptq_format.resolve,
        refuses=gptq_format.refuses,
        extra_files=gptq_config.extra_files,
        reader_notes=partial(gptq_config.reader_notes, bits),
        loader=gptq_config.loader,
        streams=streams if calibrated else lambda _: (),
        solve=partial(_solve, bits) if calibrated else None,
        pack=partial(pack, bits),
        unpack=partial(unpack, bits),
    )


def streams(params: Gptq) -> tuple[str, ...]:
    return ("quantized",) if params.effort == "low" else ("quantized", "full")


METHODS = {(name, bits): _method(name, bits) for name in ("rtn", "gptq") for bits in BITS}
