"""bitsandbytes 4-bit: NF4 and FP4, blocks of 64, with or without double quantization of the block maxima.

Tensors per linear and their meaning: docs/formats.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from quantkit.checkpoint.header import TensorSpec
from quantkit.errors import SourceError
from quantkit.kernels.bnb4_tables import BLOCK, ERROR_STRIDE, NESTED_BLOCK, TABLES, dynamic_map
from quantkit.methods.base import Array, Description, Method, Parameters, Report, Selection, WeightSpec

TORCH_DTYPE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# repr() of a non-negative fp32 as a double never needs more: the blob's length is then known before its number is.
OFFSET_WIDTH = 22
GRANULE = BLOCK * ERROR_STRIDE


class Bnb4bit(Parameters):
    quant_type: Literal["nf4", "fp4"] = Field("nf4", description="code table: nf4 (normal) or fp4")
    double_quant: bool = Field(True, description="store the block maxima in 8 bits: 4.127 instead of 4.5 bits a weight")


def _blocks(spec: WeightSpec) -> int:
    return -(-spec.numel // BLOCK)


def _state_name(spec: WeightSpec, params: Bnb4bit) -> str:
    return f"{spec.module}.weight.quant_state.bitsandbytes__{params.quant_type}"


def _state_blob(spec: WeightSpec, params: Bnb4bit, offset: float | None) -> bytes:
    """quant_state as bitsandbytes packs it, padded with spaces to the length that the plan promised."""
    state: dict[str, Any] = {
        "quant_type": params.quant_type,
        "blocksize": BLOCK,
        "dtype": TORCH_DTYPE[spec.dtype],
        "shape": [spec.rows, spec.columns],
    }
    if not params.double_quant:
        return json.dumps(state).encode()
    state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0.0}
    length = len(json.dumps(state)) - len("0.0") + OFFSET_WIDTH
    state["nested_offset"] = float(offset or 0.0)
    return json.dumps(state).encode().ljust(length)


def outputs(spec: WeightSpec, params: Bnb4bit) -> tuple[TensorSpec, ...]:
    name, blocks = f"{spec.module}.weight", _blocks(spec)
    nested = (
        TensorSpec(f"{name}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),)),
        TensorSpec(f"{name}.nested_quant_map", "F32", (256,)),
    )
    return (
        TensorSpec(name, "U8", (-(-spec.numel // 2), 1)),
        TensorSpec(f"{name}.absmax", "U8" if params.double_quant else "F32", (blocks,)),
        *(nested if params.double_quant else ()),
        TensorSpec(f"{name}.quant_map", "F32", (16,)),
        TensorSpec(_state_name(spec, params), "U8", (len(_state_blob(spec, params, None)),)),
    )


class Bnb4bitEncoder:
    """Holds the block maxima (4 bytes per 64 weights) and the error sums (24 bytes per 1,024) of one tensor."""

    def __init__(self, spec: WeightSpec, params: Bnb4bit, device: str = "cpu") -> None:
        self.spec, self.params = spec, params
        self.absmax = np.empty(_blocks(spec), np.float32)
        self.sums = np.empty((-(-self.absmax.size // ERROR_STRIDE), 3))
        from quantkit.kernels import bnb4  # Numba takes half a second to import: not before it is needed

        self._encode = bnb4.encode_blocks
        if device != "cpu":
            from quantkit.kernels import bnb4_torch

            self._encode = partial(bnb4_torch.encode_blocks, device=device)

    def main_offset(self, start: int) -> int:
        return start // 2

    def encode(self, x: Array, start: int) -> npt.NDArray[np.uint8]:
        from quantkit.kernels.bnb4 import encode_tail
        from quantkit.kernels.floats import to_float32

        full = x.size // BLOCK
        first, error = start // BLOCK, start // GRANULE
        packed = np.empty(-(-x.size // 2), np.uint8)
        absmax = self.absmax[first : first + full]
        sums = self.sums[error : error - (-full // ERROR_STRIDE)]
        self._encode(x[: full * BLOCK], self.spec.dtype, self.params.quant_type, packed[: full * 32], absmax, sums)
        if full * BLOCK < x.size:
            values = to_float32(x[full * BLOCK :], self.spec.dtype)
            packed[full * 32 :], self.absmax[first + full], tail = encode_tail(values, self.params.quant_type)
            if full % ERROR_STRIDE == 0:
                self.sums[error + full // ERROR_STRIDE] = tail[0]
        return packed

    def finish(self) -> tuple[dict[str, Array], Report]:
        from quantkit.kernels import bnb4

        name = f"{self.spec.module}.weight"
        companions: dict[str, Array] = {f"{name}.quant_map": TABLES[self.params.quant_type]}
        seen, offset = self.absmax, None
        if self.params.double_quant:
            codes, nested, offset = bnb4.encode_absmax(self.absmax)
            if not np.isfinite(offset):
                raise SourceError(
                    f"{name} holds {self.absmax.max():g}: its block maxima have no mean that a 32-bit float can hold",
                    hint=f"leave it as it is with --skip {self.spec.module}, or add --no-double-quant",
                )
            companions[f"{name}.absmax"] = codes
            companions[f"{name}.nested_absmax"] = nested
            companions[f"{name}.nested_quant_map"] = dynamic_map()
            seen = bnb4.decode_absmax(codes, dynamic_map(), nested, float(offset))
        else:
            companions[f"{name}.absmax"] = self.absmax
        blob = _state_blob(self.spec, self.params, None if offset is None else float(offset))
        companions[_state_name(self.spec, self.params)] = np.frombuffer(blob, np.uint8)
        return companions, Report(*bnb4.squared_errors(self.sums, seen[::ERROR_STRIDE]))


class Bnb4bitDecoder:
    """Decodes with what is stored, and refuses companions that contradict each other: loaders do not look."""

    def __init__(self, spec: WeightSpec, params: Bnb4bit, companions: Mapping[str, Array]) -> None:
        from quantkit.kernels.bnb4 import decode_absmax

        name = f"{spec.module}.weight"
        state = json.loads(companions[_state_name(spec, params)].tobytes())
        expected = {
            "quant_type": params.quant_type,
            "blocksize": BLOCK,
            "dtype": TORCH_DTYPE[spec.dtype],
            "shape": [spec.rows, spec.columns],
        }
        for key, value in expected.items():
            if state.get(key) != value:
                raise ValueError(f"quant_state says {key} {state.get(key)!r}, the plan {value!r}")
        if not np.array_equal(companions[f"{name}.quant_map"], TABLES[params.quant_type]):
            raise ValueError(f"quant_map is not the {params.quant_type} table")
        self.params, self.dtype = params, spec.dtype
        self.absmax = companions[f"{name}.absmax"]
        if params.double_quant:
            table, nested = companions[f"{name}.nested_quant_map"], companions[f"{name}.nested_absmax"]
            if not np.array_equal(table, dynamic_map()):
                raise ValueError("nested_quant_map is not the signed dynamic map")
            self.absmax = decode_absmax(self.absmax, table, nested, float(state["nested_offset"]))
        if not np.isfinite(self.absmax).all():
            raise ValueError("a block maximum is not finite")

    def decode(self, raw: npt.NDArray[np.uint8], start: int, count: int) -> npt.NDArray[np.float32]:
        from quantkit.kernels.bnb4 import decode_blocks

        first = start // BLOCK
        values = decode_blocks(raw, self.params.quant_type, self.absmax[first : first + -(-count // 64)], count)
        return round_to(values, self.dtype)


def round_to(values: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[np.float32]:
    """fp32 values rounded, half to even, to what `dtype` can hold: the loader's output dtype."""
    if dtype == "F16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        bits = values.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return values


def config(params: Bnb4bit, dtype: str, selection: Selection) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": params.quant_type,
        "bnb_4bit_use_double_quant": params.double_quant,
        "bnb_4bit_compute_dtype": TORCH_DTYPE[dtype],
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(selection.listed),
        "llm_int8_threshold": 6.0,
    }


def describe(params: Bnb4bit) -> Description:
    nested = "with double quantization" if params.double_quant else "without double quantization"
    return Description(
        f"bitsandbytes {params.quant_type.upper()} {nested}",
        f"bnb-{params.quant_type}",
        ("bitsandbytes", "4-bit", params.quant_type),
        (
            ("Block size", "64 weights, one maximum each"),
            (
                "Block maxima",
                "8-bit, in blocks of 256 (double quantization)" if params.double_quant else "32-bit floats",
            ),
        ),
    )


METHOD = Method(
    name="bnb",
    bits=4,
    needs="nothing",
    params=Bnb4bit,
    outputs=outputs,
    granule=lambda _: GRANULE,
    encoder=Bnb4bitEncoder,
    decoder=Bnb4bitDecoder,
    config=config,
    describe=describe,
    devices=("cpu", "cuda"),
)
