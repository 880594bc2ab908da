"""EXL2 weights as a solver gives and a format packs them: codes by group of inputs, scales as parts of its maximum."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

WORD = 32  # rows of the stream that begin and end where words do, whatever their width
CHUNK = 1 << 18  # weights restored at a time


@dataclass(frozen=True)
class Groups:
    """Of each group, in the order of the stream, its width, and how many rows it has."""

    bits: tuple[int, ...]
    rows: tuple[int, ...]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first row of each, and the number of all."""
        return (0, *np.cumsum(self.rows).tolist())

    @cached_property
    def words(self) -> tuple[int, ...]:
        """The first row of each in q_weight, and the number of all."""
        return (0, *np.cumsum([r * b // WORD for r, b in zip(self.rows, self.bits, strict=True)]).tolist())

    def runs(self) -> list[tuple[int, slice, slice]]:
        """(bits, rows of the stream, rows of q_weight) of each width: its groups are one stream."""
        found: list[tuple[int, slice, slice]] = []
        for i, bits in enumerate(self.bits):
            rows, words = slice(self.starts[i], self.starts[i + 1]), slice(self.words[i], self.words[i + 1])
            if found and found[-1][0] == bits:
                rows, words = slice(found[-1][1].start, rows.stop), slice(found[-1][2].start, words.stop)
                found.pop()
            found.append((bits, rows, words))
        return found


@dataclass(frozen=True)
class Exl2Coded:
    """A weight [rows = out, columns = in] as codes.

    codes: uint8 [rows, columns], columns in their natural order. scales: uint8 [rows, groups], 0 … 15. maxima: fp16
    [groups]. position: int32 [columns], at which place of the stream each column is.
    """

    groups: Groups
    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.uint8]
    maxima: npt.NDArray[np.float16]
    position: npt.NDArray[np.int32]

    @property
    def group(self) -> npt.NDArray[np.int64]:
        """The group of each column."""
        of_place = np.repeat(np.arange(len(self.groups.rows)), self.groups.rows)
        found: npt.NDArray[np.int64] = of_place[self.position]
        return found

    def restore(self) -> npt.NDArray[np.float32]:
        """float32 [rows, columns], the fp16 numbers of a loader."""
        restored = np.empty_like(self.codes, np.float32)
        middle = np.array([2 ** (b - 1) for b in self.groups.bits], np.float32)[self.group]
        step, group = max(1, CHUNK // restored.shape[1]), self.group
        for start in range(0, restored.shape[0], step):
            rows = slice(start, start + step)
            scales = real_scales(self.scales[rows], self.maxima)[:, group]
            levels = self.codes[rows].astype(np.float32)
            levels -= middle
            levels *= scales
            restored[rows] = levels.astype(np.float16)
        return restored


def real_scales(codes: npt.NDArray[np.uint8], maxima: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
    """float32 [rows, groups] of codes [rows, groups]: fp16((s + 1)²) · fp16(maximum / 256), rounded to fp16 each time.
    A 256th of a maximum is often subnormal, so that this rounds it coarsely."""
    with np.errstate(over="ignore"):
        unit = (maxima.astype(np.float32) * np.float32(2.0**-8)).astype(np.float16).astype(np.float32)
        found = (np.square(codes.astype(np.float32) + 1) * unit).astype(np.float16)
    return found.astype(np.float32)
