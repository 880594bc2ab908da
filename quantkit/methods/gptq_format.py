"""GPTQ's checkpoint format: a coded weight as qweight, qzeros, scales and g_idx, and its configuration.

    qweight int32 [in · bits / 32, out]     codes, a stream along the inputs of each output
    qzeros  int32 [groups, out · bits / 32] zero points, a stream along the outputs; stored less one in version 1
    scales  fp16  [groups, out]
    g_idx   int32 [in]                      the group of each input

Source: AutoGPTQ 0.7.1 and GPTQModel 7.7, whose readers take this; docs/formats.md says it to the byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from quantkit.checkpoint.header import TensorSpec
from quantkit.kernels.bitstream import pack_columns, pack_rows, unpack_columns, unpack_rows
from quantkit.methods.base import Array, Parameters, Selection, WeightSpec
from quantkit.solvers.coded import Coded
from quantkit.version import __version__

WORD = 32  # readers take widths and heights in whole words
GROUPS = (128, 64, 32)


class Grouped(Parameters):
    """What GPTQ's format leaves to choose."""

    group_size: Literal[-1, 32, 64, 128] | None = Field(None, description="weights that share a scale; -1: a whole row")
    sym: bool = Field(True, description="symmetric: no zero points to speak of")
    checkpoint_format: Literal["gptq", "gptq_v2"] = Field("gptq", description="zero points less one, or as they are")
    format: Literal["gptq", "compressed-tensors"] = Field("gptq", description="for whom the tensors are laid out")

    @model_validator(mode="after")
    def _one_format(self) -> Grouped:
        if self.format != "gptq" and self.checkpoint_format != "gptq":
            raise ValueError("checkpoint_format is of the gptq format; compressed-tensors has one version")
        return self

    @property
    def acting(self) -> bool:
        """Whether groups follow the order of activation, so that a reader has to look up each input's (desc_act)."""
        return False


def size_of(params: Grouped, columns: int) -> int:
    """Columns in a group."""
    return columns if params.group_size in (-1, None) else int(params.group_size or 0)


def resolve_group(params: Grouped, widths: list[int]) -> Grouped:
    """The group size that is not named: the largest that divides every width that can be packed at all."""
    if params.group_size is not None:
        return params
    widths = [w for w in widths if w % WORD == 0]
    chosen = next((g for g in GROUPS if all(w % g == 0 for w in widths)), GROUPS[-1])
    return params.model_copy(update={"group_size": chosen})


def refuses(spec: WeightSpec, params: Grouped) -> str | None:
    """Why a weight must stay dense, if it must: no reader takes parts of a word, and few a shorter last group."""
    if spec.columns % WORD:
        return f"has {spec.columns} inputs, which 32 does not divide"
    if spec.rows % WORD:
        return f"has {spec.rows} outputs, which 32 does not divide"
    if params.group_size not in (-1, None) and spec.columns % int(params.group_size or 1):
        return f"has {spec.columns} inputs, which the group size {params.group_size} does not divide"
    return None


def outputs(bits: int, spec: WeightSpec, params: Grouped) -> tuple[TensorSpec, ...]:
    groups = spec.columns // size_of(params, spec.columns)
    return (
        TensorSpec(f"{spec.module}.qweight", "I32", (spec.columns * bits // WORD, spec.rows)),
        TensorSpec(f"{spec.module}.qzeros", "I32", (groups, spec.rows * bits // WORD)),
        TensorSpec(f"{spec.module}.scales", "F16", (groups, spec.rows)),
        TensorSpec(f"{spec.module}.g_idx", "I32", (spec.columns,)),
    )


def pack(bits: int, coded: Coded, spec: WeightSpec, params: Grouped) -> dict[str, Array]:
    """The tensors of `outputs`."""
    zeros = coded.zeros.T
    if params.checkpoint_format == "gptq":
        if not zeros.all():
            raise ValueError("version 1 of the format cannot say a zero point of 0")
        zeros = zeros - np.uint8(1)
    return {
        f"{spec.module}.qweight": pack_rows(np.ascontiguousarray(coded.codes.T), bits),
        f"{spec.module}.qzeros": pack_columns(np.ascontiguousarray(zeros), bits),
        f"{spec.module}.scales": np.ascontiguousarray(coded.scales.T),
        f"{spec.module}.g_idx": coded.g_idx.astype(np.int32),
    }


def unpack(bits: int, tensors: Mapping[str, Array], spec: WeightSpec, params: Grouped) -> Coded:
    """The inverse of `pack`. ValueError for tensors that contradict each other or the parameters."""
    qweight, qzeros, scales, g_idx = (tensors[s.name] for s in outputs(bits, spec, params))
    groups = scales.shape[0]
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise ValueError(f"g_idx names a group beyond the {groups} there are")
    if not params.acting and not np.array_equal(g_idx, np.arange(spec.columns) // size_of(params, spec.columns)):
        raise ValueError("g_idx is not the natural order of groups")
    if not np.isfinite(scales).all():
        raise ValueError("a scale is not finite")
    zeros = unpack_columns(qzeros, bits)
    if params.checkpoint_format == "gptq":
        zeros = (zeros + np.uint8(1)) & np.uint8(2**bits - 1)
    if params.sym and (zeros != 2 ** (bits - 1)).any():
        raise ValueError("a zero point is not the middle, though the format is symmetric")
    return Coded(
        bits,
        np.ascontiguousarray(unpack_rows(qweight, bits).T),
        np.ascontiguousarray(scales.T),
        np.ascontiguousarray(zeros.T),
        g_idx,
    )


def config(bits: int, params: Grouped, selection: Selection, damp: float | None) -> dict[str, Any]:
    """quantization_config, as every reader takes it: see docs/formats.md for who reads what."""
    table: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": params.group_size,
        "desc_act": params.acting,
        "sym": params.sym,
        "lm_head": False,
        "checkpoint_format": params.checkpoint_format,
        "pack_dtype": "int32",
        "true_sequential": True,
        "static_groups": False,
    }
    if damp is not None:
        table["damp_percent"] = damp
    table["meta"] = {"quantizer": [f"quantkit:{__version__}"]}
    if selection.skipped:
        # GPTQModel learns of dense linears from the first, transformers from the second.
        table["dynamic"] = {rf"-:^{re.escape(module)}$": {} for module in selection.skipped}
        table["modules_in_block_to_quantize"] = [[kind] for kind in kinds(selection.encoded)]
    return table


def kinds(modules: tuple[str, ...]) -> list[str]:
    """What modules are called within their block: below the last number, or the last but one of an expert."""
    return list(dict.fromkeys(_within(module) for module in modules))


def _within(module: str) -> str:
    parts = module.split(".")
    block = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[block + 1 :])


def reader_notes(selection: Selection, params: Grouped) -> tuple[str, ...]:
    """What some reader cannot be told by a configuration."""
    notes = []
    mixed = sorted(set(kinds(selection.encoded)) & set(kinds(selection.skipped)))
    if mixed and params.format == "gptq":
        notes.append(
            f"{mixed[0]} is dense in some layers and quantized in others: gptqmodel and vLLM read that, transformers "
            "cannot be told"
        )
    return tuple(notes)


def extra_files(block: Mapping[str, Any]) -> dict[str, bytes]:
    """Older readers look for the configuration in a file of its own."""
    if block.get("quant_method") != "gptq":
        return {}
    return {"quantize_config.json": (json.dumps(block, indent=2) + "\n").encode()}
