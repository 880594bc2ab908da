"""compressed-tensors' `pack-quantized` layout of the same codes: what vLLM reads of asymmetric, 2- and 3-bit weights.

    weight_packed      int32 [out, in · bits / 32]      codes, a stream along the inputs of each output
    weight_scale       fp16  [out, groups]
    weight_zero_point  int32 [out · bits / 32, groups]  only if asymmetric; a stream along the outputs
    weight_shape       int64 [2]                        out, in

Codes are stored as they are here; their readers take them for signed numbers with 2^(bits − 1) added, zero points too.
Source: compressed-tensors 0.19 and 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from quantkit.checkpoint.header import TensorSpec
from quantkit.kernels.bitstream import pack_columns, pack_rows, unpack_columns, unpack_rows
from quantkit.methods.base import Array, Selection, WeightSpec
from quantkit.methods.gptq_format import WORD, Grouped, size_of
from quantkit.solvers.coded import Coded

VERSION = "0.19.0"  # of the format that is written


def outputs(bits: int, spec: WeightSpec, params: Grouped) -> tuple[TensorSpec, ...]:
    groups = spec.columns // size_of(params, spec.columns)
    zeros = TensorSpec(f"{spec.module}.weight_zero_point", "I32", (spec.rows * bits // WORD, groups))
    return (
        TensorSpec(f"{spec.module}.weight_packed", "I32", (spec.rows, spec.columns * bits // WORD)),
        TensorSpec(f"{spec.module}.weight_scale", "F16", (spec.rows, groups)),
        *(() if params.sym else (zeros,)),
        TensorSpec(f"{spec.module}.weight_shape", "I64", (2,)),
    )


def pack(bits: int, coded: Coded, spec: WeightSpec, params: Grouped) -> dict[str, Array]:
    """The tensors of `outputs`."""
    zeros = {} if params.sym else {f"{spec.module}.weight_zero_point": pack_rows(coded.zeros, bits)}
    return {
        f"{spec.module}.weight_packed": pack_columns(coded.codes, bits),
        f"{spec.module}.weight_scale": coded.scales,
        **zeros,
        f"{spec.module}.weight_shape": np.array([spec.rows, spec.columns], np.int64),
    }


def unpack(bits: int, tensors: Mapping[str, Array], spec: WeightSpec, params: Grouped) -> Coded:
    """The inverse of `pack`. ValueError for tensors that contradict each other."""
    scales = tensors[f"{spec.module}.weight_scale"]
    if tensors[f"{spec.module}.weight_shape"].tolist() != [spec.rows, spec.columns]:
        raise ValueError("weight_shape is not the weight's")
    if not np.isfinite(scales).all():
        raise ValueError("a scale is not finite")
    zeros = np.full(scales.shape, 2 ** (bits - 1), np.uint8)
    if not params.sym:
        zeros = unpack_rows(tensors[f"{spec.module}.weight_zero_point"], bits)
    codes = unpack_columns(tensors[f"{spec.module}.weight_packed"], bits)
    natural = (np.arange(spec.columns) // size_of(params, spec.columns)).astype(np.int32)
    return Coded(bits, codes, scales, zeros, natural)


def config(bits: int, params: Grouped, selection: Selection) -> dict[str, Any]:
    """quantization_config: one scheme for all linears but those listed."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": params.sym,
        "strategy": "channel" if params.group_size == -1 else "group",
        "group_size": None if params.group_size == -1 else params.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": sorted({*selection.skipped, *(m for m in selection.listed if "embed" not in m)}),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": VERSION,
    }
