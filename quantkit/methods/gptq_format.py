"""GPTQ's checkpoint format: a coded weight as qweight, qzeros, scales and g_idx.

    qweight int32 [in · bits / 32, out]     codes, a stream along the inputs of each output
    qzeros  int32 [groups, out · bits / 32] zero points, a stream along the outputs; stored less one in version 1
    scales  fp16  [groups, out]
    g_idx   int32 [in]                      the group of each input

Source: AutoGPTQ 0.7.1 and GPTQModel 7.7, whose readers take this; docs/formats.md says it to the byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from quantkit.checkpoint.header import TensorSpec
from quantkit.methods.base import Array, Parameters, WeightSpec
from quantkit.solvers.coded import Coded

WORD = 32  # readers take widths and heights in whole words
GROUPS = (128, 64, 32)
NUMPY = {"I16": np.int16, "I32": np.int32, "I64": np.int64, "F16": np.float16}


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


def resolve(params: Grouped, specs: Sequence[WeightSpec]) -> Grouped:
    """The group size that is not named: the largest that divides every width that can be packed at all. 32 does, so no
    weight is left dense for its group."""
    if params.group_size is not None:
        return params
    widths = {spec.columns for spec in specs if refuses(spec, params) is None}
    chosen = next(g for g in GROUPS if all(w % g == 0 for w in widths))
    return params.model_copy(update={"group_size": chosen})


def refuses(spec: WeightSpec, params: Grouped) -> str | None:
    """Why a weight must stay dense, if it must: no reader takes parts of a word, and few a shorter last group."""
    if spec.columns % WORD:
        return f"has {spec.columns} inputs, which 32 does not divide"
    if spec.rows % WORD:
        return f"has {spec.rows} outputs, which 32 does not divide"
    if params.group_size not in (-1, None) and spec.columns % int(params.group_size or 1):
        return f"has {spec.columns} inputs, which the group size {params.group_size} does not divide"
    if params.format == "gptq" and not any(part.isdigit() for part in spec.module.split(".")):
        return "lies outside the decoder layers, where readers of the gptq format take every layer for a dense one"
    return None


def outputs(bits: int, spec: WeightSpec, params: Grouped) -> tuple[TensorSpec, ...]:
    groups = spec.columns // size_of(params, spec.columns)
    return (
        TensorSpec(f"{spec.module}.qweight", "I32", (spec.columns * bits // WORD, spec.rows)),
        TensorSpec(f"{spec.module}.qzeros", "I32", (groups, spec.rows * bits // WORD)),
        TensorSpec(f"{spec.module}.scales", "F16", (groups, spec.rows)),
        TensorSpec(f"{spec.module}.g_idx", "I32", (spec.columns,)),
    )


def empty(specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """Tensors by name, for `place` to fill."""
    return {spec.name: np.empty(spec.shape, NUMPY[spec.dtype]) for spec in specs}


def place(bits: int, coded: Coded, first: int, spec: WeightSpec, params: Grouped, tensors: Mapping[str, Array]) -> None:
    """Writes rows of the weight from row `first` on, a multiple of 32 of them, into the tensors of `outputs`."""
    from quantkit.kernels.bitstream import pack_columns, pack_rows  # Numba: not before it is needed

    check(coded, params)
    zeros = coded.zeros.T
    if params.checkpoint_format == "gptq":
        if not zeros.all():
            raise ValueError("version 1 of the format cannot say a zero point of 0")
        zeros = zeros - np.uint8(1)
    stop = first + len(coded.codes)
    pack_rows(coded.codes.T, bits, tensors[f"{spec.module}.qweight"][:, first:stop])
    pack_columns(zeros, bits, tensors[f"{spec.module}.qzeros"][:, first * bits // WORD : stop * bits // WORD])
    tensors[f"{spec.module}.scales"][:, first:stop] = coded.scales.T
    tensors[f"{spec.module}.g_idx"][:] = coded.g_idx


def unpack(bits: int, tensors: Mapping[str, Array], spec: WeightSpec, params: Grouped) -> Coded:
    """A weight's codes from the tensors of `outputs`. ValueError where these contradict each other, or parameters."""
    from quantkit.kernels.bitstream import unpack_columns

    qweight, qzeros, scales, g_idx = shaped(tensors, outputs(bits, spec, params))
    zeros = unpack_columns(qzeros, bits)
    if params.checkpoint_format == "gptq":
        zeros += np.uint8(1)
        if (zeros > 2**bits - 1).any() or not zeros.all():  # 256 is 0 in 8 bits
            raise ValueError("a zero point is 0, which readers of version 1 of the format take for different numbers")
    codes = unpack_columns(qweight.T, bits)  # a row for each output at once: turning the codes takes longer than this
    scales, zeros = (np.ascontiguousarray(x.T) for x in (scales, zeros))
    coded = Coded(bits, codes, scales, zeros, g_idx)
    check(coded, params)
    return coded


def shaped(tensors: Mapping[str, Array], specs: Sequence[TensorSpec]) -> list[Array]:
    """The tensors in the order of `specs`. ValueError for one of another shape or dtype, but for scales: of those that
    others wrote, some are wider floats."""
    found = [tensors[spec.name] for spec in specs]
    for array, spec in zip(found, specs, strict=True):
        fits = array.dtype == NUMPY[spec.dtype] or (spec.dtype == "F16" and array.dtype == np.float32)
        if array.shape != spec.shape or not fits:
            seen = f"{array.dtype} {list(array.shape)}"
            raise ValueError(f"{spec.name} is {seen}, the weight makes it {spec.dtype} {list(spec.shape)}")
    return found


def check(coded: Coded, params: Grouped) -> None:
    """ValueError for what the parameters rule out: a reader would believe them and restore another weight."""
    columns, groups = coded.codes.shape[1], coded.scales.shape[1]
    size = size_of(params, columns)
    if coded.g_idx.min() < 0 or coded.g_idx.max() >= groups:
        raise ValueError(f"g_idx names a group beyond the {groups} there are")
    if (np.bincount(coded.g_idx, minlength=groups) != size).any():
        raise ValueError(f"g_idx has a group that is not of {size} inputs")
    if not params.acting and not np.array_equal(coded.g_idx, np.arange(columns) // size):
        raise ValueError("g_idx is not the natural order of groups")
    if not np.isfinite(coded.scales).all():
        raise ValueError("a scale is not finite")
    if params.sym and (coded.zeros != 2 ** (coded.bits - 1)).any():
        raise ValueError("a zero point is not the middle, though the format is symmetric")
