"""bitsandbytes LLM.int8(): int8 codes and one fp32 scale per output row. Outliers are a matter of run time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint.header import TensorSpec
from quantkit.errors import SourceError
from quantkit.methods.base import Array, Description, Method, Parameters, Report, Selection, WeightSpec

ERROR_STRIDE = 16
FP16_LIMIT = 65536.0  # what rounds to infinity in fp16 shows up as a row scale at or above this


class BnbInt8(Parameters):
    pass


def outputs(spec: WeightSpec, params: BnbInt8) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(f"{spec.module}.weight", "I8", (spec.rows, spec.columns)),
        TensorSpec(f"{spec.module}.SCB", "F32", (spec.rows,)),
        TensorSpec(f"{spec.module}.weight_format", "U8", ()),
    )


def granule(spec: WeightSpec) -> int:
    return spec.columns * ERROR_STRIDE


class BnbInt8Encoder:
    """Holds one scale per row and the error sums of every 16th row."""

    def __init__(self, spec: WeightSpec, params: BnbInt8, device: str = "cpu") -> None:
        self.spec = spec
        self.scale = np.empty(spec.rows, np.float32)
        self.squares = np.empty(-(-spec.rows // ERROR_STRIDE))
        self.errors = np.empty_like(self.squares)

    def main_offset(self, start: int) -> int:
        return start

    def encode(self, x: Array, start: int) -> npt.NDArray[np.int8]:
        from quantkit.kernels import int8

        rows = x.size // self.spec.columns
        first, error = start // self.spec.columns, start // granule(self.spec)
        codes = np.empty((rows, self.spec.columns), np.int8)
        scale = self.scale[first : first + rows]
        sums = slice(error, error - (-rows // ERROR_STRIDE))
        x = x.reshape(rows, self.spec.columns)
        int8.encode_rows(x, self.spec.dtype, codes, scale, self.squares[sums], self.errors[sums])
        if scale.size and scale.max() >= FP16_LIMIT:
            raise SourceError(
                f"{self.spec.module}.weight holds {scale.max():g}, beyond the fp16 that LLM.int8() starts from",
                where=f"row {first + int(scale.argmax())}",
                hint=f"leave it as it is with --skip {self.spec.module}, or use --bits 4",
            )
        return codes.reshape(-1)

    def finish(self) -> tuple[dict[str, Array], Report]:
        companions: dict[str, Array] = {
            f"{self.spec.module}.SCB": self.scale,
            f"{self.spec.module}.weight_format": np.zeros((), np.uint8),
        }
        return companions, Report(float(self.errors.sum()), float(self.squares.sum()))


class BnbInt8Decoder:
    def __init__(self, spec: WeightSpec, params: BnbInt8, companions: Mapping[str, Array]) -> None:
        self.columns = spec.columns
        self.scale = companions[f"{spec.module}.SCB"]
        if int(companions[f"{spec.module}.weight_format"]) != 0:
            raise ValueError("weight_format is not 0 (row-major)")
        if not np.isfinite(self.scale).all() or (self.scale < 0).any():
            raise ValueError("a row scale is negative or not finite")

    def decode(self, raw: npt.NDArray[np.uint8], start: int, count: int) -> npt.NDArray[np.float32]:
        from quantkit.kernels import int8

        rows, first = count // self.columns, start // self.columns
        out = np.empty((rows, self.columns), np.float32)
        int8.decode_rows(raw.view(np.int8).reshape(rows, self.columns), self.scale[first : first + rows], out)
        return out.reshape(-1)


def config(params: BnbInt8, dtype: str, selection: Selection) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": False,
        "load_in_8bit": True,
        "_load_in_4bit": False,
        "_load_in_8bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(selection.listed),
        "llm_int8_threshold": 6.0,
    }


def describe(params: BnbInt8) -> Description:
    return Description(
        "bitsandbytes LLM.int8()",
        "bnb-int8",
        ("bitsandbytes", "8-bit", "int8"),
        (("Scale", "one 32-bit float per output row"),),
    )


METHOD = Method(
    name="bnb",
    bits=8,
    needs="nothing",
    params=BnbInt8,
    outputs=outputs,
    granule=granule,
    encoder=BnbInt8Encoder,
    decoder=BnbInt8Decoder,
    config=config,
    describe=describe,
)
