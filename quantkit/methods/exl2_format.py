"""EXL2: a linear as runs of rows of different widths, the most active inputs in the widest.

    q_weight    int32 [Q, out]         codes, a stream down each column of each group
    q_scale     int32 [groups, out/8]  4-bit codes of scales, eight columns to a word
    q_scale_max fp16  [groups]
    q_groups    int16 [2 · groups]     the width of each group, and its first row in q_weight
    q_invperm   int32 [in]             at which row of the stream each input is

A code c of a group of width b is the level c − 2^(b − 1), a code s of a scale is (s + 1)² / 256 of the group's maximum.
What follows is in fp16 throughout, as exllamav2's kernels compute it: a loader sees these numbers, and no others.

Its loader checks hardly any of this and computes nonsense where it does not hold: `unpack` checks all of it.

Source: exllamav2 0.3.2, whose loader and kernels take this; docs/formats.md says it to the byte.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from quantkit.checkpoint.header import TensorSpec
from quantkit.methods.base import Array, WeightSpec
from quantkit.methods.gptq_format import shaped
from quantkit.solvers.exl2_coded import WORD, Exl2Coded, Groups

MOST_INPUTS = 65536  # the loader reads q_invperm as 16-bit numbers
_PART = re.compile(r"(?:(0?\.\d{1,3}|1):)?([2-6]|8)_(32|64|128)")


@dataclass(frozen=True)
class Mix:
    """Widths of a linear's rows, the widest first: (share of the rows, bits, group size) of each width."""

    parts: tuple[tuple[Fraction, int, int], ...]

    @classmethod
    def parse(cls, text: str) -> Mix:
        """As exllamav2's authors write them: "0.1:4_128/0.9:3_128", "4_64". ValueError for what is no mix."""
        parts = []
        for part in text.split("/"):
            match = _PART.fullmatch(part)
            if match is None:
                raise ValueError(f"{part!r} is no part of a mix of bits\nwrite SHARE:BITS_GROUPSIZE, such as 0.1:4_128")
            parts.append((Fraction(match[1] or "1"), int(match[2]), int(match[3])))
        bits = [b for _, b, _ in parts]
        if sum(p for p, _, _ in parts) != 1 or sorted(set(bits), reverse=True) != bits:
            raise ValueError(f"{text!r} is no mix of bits\nshares have the sum 1, and widths fall from part to part")
        return cls(tuple(parts))

    def __str__(self) -> str:
        if len(self.parts) == 1:
            return f"{self.parts[0][1]}_{self.parts[0][2]}"
        return "/".join(f"{float(share):g}:{bits}_{size}" for share, bits, size in self.parts)

    def groups(self, columns: int) -> Groups:
        """The groups of a linear with so many inputs, of which each width gets its share, rounded up to whole groups,
        or what is left."""
        bits: list[int] = []
        rows: list[int] = []
        left = columns
        for share, width, size in self.parts:
            wanted = min(-(-columns * share.numerator // share.denominator), left)
            for _ in range(-(-wanted // size)):
                bits.append(width)
                rows.append(min(size, left))
                left -= rows[-1]
        return Groups(tuple(bits), tuple(rows))

    def cost(self, spec: WeightSpec) -> int:
        """Bits on disk of a linear with this mix, all five tensors."""
        return sum(8 * t.nbytes for t in outputs(spec, self))


def refuses(spec: WeightSpec) -> str | None:
    """Why a weight must stay dense, if it must."""
    if spec.columns % WORD:
        return f"has {spec.columns} inputs, which 32 does not divide"
    if spec.rows % WORD:
        return f"has {spec.rows} outputs, which 32 does not divide"
    if spec.columns > MOST_INPUTS:
        return f"has {spec.columns:,} inputs, and {MOST_INPUTS:,} is the most there can be"
    return None


def outputs(spec: WeightSpec, mix: Mix) -> tuple[TensorSpec, ...]:
    groups = mix.groups(spec.columns)
    count = len(groups.rows)
    return (
        TensorSpec(f"{spec.module}.q_weight", "I32", (groups.words[-1], spec.rows)),
        TensorSpec(f"{spec.module}.q_scale", "I32", (count, spec.rows // 8)),
        TensorSpec(f"{spec.module}.q_scale_max", "F16", (count,)),
        TensorSpec(f"{spec.module}.q_groups", "I16", (2 * count,)),
        TensorSpec(f"{spec.module}.q_invperm", "I32", (spec.columns,)),
    )


def pack(coded: Exl2Coded, spec: WeightSpec, mix: Mix) -> dict[str, Array]:
    """The tensors of `outputs`."""
    from quantkit.kernels.bitstream import pack_columns, pack_rows  # Numba: not before it is needed

    groups = coded.groups
    assert groups == mix.groups(spec.columns)
    order = np.argsort(coded.position)
    words = np.empty((groups.words[-1], spec.rows), np.int32)
    for bits, rows, where in groups.runs():
        pack_rows(coded.codes.T[order[rows]], bits, words[where])
    table = np.array([groups.bits, groups.words[:-1]], np.int16).T.reshape(-1)
    found = (words, pack_columns(coded.scales.T, 4), coded.maxima, table, coded.position)
    return {t.name: np.ascontiguousarray(x) for t, x in zip(outputs(spec, mix), found, strict=True)}


def unpack(tensors: Mapping[str, Array], spec: WeightSpec, mix: Mix) -> Exl2Coded:
    """A weight's codes from the tensors of `outputs`. ValueError where these contradict each other, or the mix."""
    from quantkit.kernels.bitstream import unpack_columns, unpack_rows

    words, scales, maxima, table, position = shaped(tensors, outputs(spec, mix))
    groups = mix.groups(spec.columns)
    wanted = np.array([groups.bits, groups.words[:-1]], np.int16).T.reshape(-1)
    if not np.array_equal(table, wanted):
        raise ValueError(f"q_groups is not that of {mix}, with which the shapes agree")
    if not (np.isfinite(maxima).all() and (maxima > 0).all()):
        raise ValueError("q_scale_max holds a number that is not positive, or not finite")
    if not np.array_equal(np.sort(position), np.arange(spec.columns)):
        raise ValueError("q_invperm is no permutation of the inputs")
    by_place = np.empty((spec.columns, spec.rows), np.uint8)
    for bits, rows, where in groups.runs():
        by_place[rows] = unpack_rows(words[where], bits)
    codes = np.ascontiguousarray(by_place[position].T)
    return Exl2Coded(groups, codes, np.ascontiguousarray(unpack_columns(scales, 4).T), maxima, position)
