"""compressed-tensors' `pack-quantized` layout of the same codes: what vLLM reads of asymmetric, 2- and 3-bit weights.

    weight_packed      int32 [out, in · bits / 32]      codes, a stream along the inputs of each output
    weight_scale       fp16  [out, groups]
    weight_shape       int64 [2]                        out, in
    weight_zero_point  int32 [out · bits / 32, groups]  only if asymmetric; a stream along the outputs

Codes are stored as they are here; their readers take them for signed numbers with 2^(bits − 1) added, zero points too.

Scales are fp16 whatever the model's dtype. transformers 5.17 with compressed-tensors 0.19 casts them to the dtype that
the model is loaded in, and vLLM to the one it serves in, as it does with GPTQ's: in fp16 and fp32 a weight is restored
as it is here, in bf16 from a scale rounded to 8 bits. bf16 on disk would round it for all of them.

Source: compressed-tensors 0.19 and 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from quantkit.checkpoint.header import TensorSpec
from quantkit.methods.base import Array, Selection, WeightSpec
from quantkit.methods.gptq_format import WORD, Grouped, check, shaped, size_of
from quantkit.solvers.coded import Coded

VERSION = "0.19.0"  # of the format that is written


def outputs(bits: int, spec: WeightSpec, params: Grouped) -> tuple[TensorSpec, ...]:
    groups = spec.columns // size_of(params, spec.columns)
    zeros = TensorSpec(f"{spec.module}.weight_zero_point", "I32", (spec.rows * bits // WORD, groups))
    return (
        TensorSpec(f"{spec.module}.weight_packed", "I32", (spec.rows, spec.columns * bits // WORD)),
        TensorSpec(f"{spec.module}.weight_scale", "F16", (spec.rows, groups)),
        TensorSpec(f"{spec.module}.weight_shape", "I64", (2,)),
        *(() if params.sym else (zeros,)),
    )


def place(bits: int, coded: Coded, first: int, spec: WeightSpec, params: Grouped, tensors: Mapping[str, Array]) -> None:
    """Writes rows of the weight from row `first` on, a multiple of 32 of them, into the tensors of `outputs`."""
    from quantkit.kernels.bitstream import pack_columns, pack_rows  # Numba: not before it is needed

    check(coded, params)
    stop = first + len(coded.codes)
    pack_columns(coded.codes, bits, tensors[f"{spec.module}.weight_packed"][first:stop])
    tensors[f"{spec.module}.weight_scale"][first:stop] = coded.scales
    tensors[f"{spec.module}.weight_shape"][:] = spec.rows, spec.columns
    if not params.sym:
        words = tensors[f"{spec.module}.weight_zero_point"][first * bits // WORD : stop * bits // WORD]
        pack_rows(coded.zeros, bits, words)


def unpack(bits: int, tensors: Mapping[str, Array], spec: WeightSpec, params: Grouped) -> Coded:
    """A weight's codes from the tensors of `outputs`. ValueError where these contradict each other, or parameters."""
    from quantkit.kernels.bitstream import unpack_columns, unpack_rows

    packed, scales, shape, *stored = shaped(tensors, outputs(bits, spec, params))
    if shape.tolist() != [spec.rows, spec.columns]:
        raise ValueError(f"weight_shape says {shape.tolist()}, the weight is {[spec.rows, spec.columns]}")
    zeros = unpack_rows(stored[0], bits) if stored else np.full(scales.shape, 2 ** (bits - 1), np.uint8)
    natural = (np.arange(spec.columns) // size_of(params, spec.columns)).astype(np.int32)
    coded = Coded(bits, unpack_columns(packed, bits), scales, zeros, natural)
    check(coded, params)
    return coded


def config(bits: int, params: Grouped, selection: Selection) -> dict[str, Any]:
    """quantization_config: one scheme for all linears but those listed."""
    return _config({"group_0": _scheme(bits, params, ["Linear"])}, selection)


def mixed_config(schemes: Sequence[tuple[int, Grouped, Sequence[str]]], selection: Selection) -> dict[str, Any]:
    """The same with a scheme for each set of modules."""
    groups = {f"group_{i}": _scheme(bits, params, modules) for i, (bits, params, modules) in enumerate(schemes)}
    return _config(groups, selection)


def _scheme(bits: int, params: Grouped, targets: Sequence[str]) -> dict[str, Any]:
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
    return {"targets": list(targets), "weights": weights, "input_activations": None, "output_activations": None}


def _config(groups: Mapping[str, Any], selection: Selection) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": dict(groups),
        # Embeddings are no linears. GPT-NeoX's head, which is one, is called embed_out.
        "ignore": sorted({*selection.skipped, *(m for m in selection.listed if "embed" not in m or m == "embed_out")}),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": VERSION,
    }
