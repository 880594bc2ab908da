"""A tensor of a model, and how it is put together from what lies in files.

Layouts store the same tensor in different ways: in one piece or in one piece a device, with its rows in another order,
turned, or in FP8 with a scale. A view says which bytes to read for a run of elements and how they become these
elements, and back. It opens no file: runs of bytes come from the reader, and memory is the caller's decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint.header import DTYPE_BITS, TensorInfo, TensorSpec
from quantkit.kernels.fp8 import to_bf16
from quantkit.kernels.rope import to_halves, to_pairs

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes of one file."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SourceTensor(TensorSpec):
    """A tensor by the name, dtype and shape that the rest of the program knows it by.

    parts: what is stored, joined along `axis` (0: below each other, 1: side by side; all of one size).
    head_dim: if not 0, the rows of each head of that many are stored in pairs, and are wanted in halves (kernels/rope).
    turned: the one part is stored [columns, rows].
    scales: fp32, of a tensor or of each row, if the parts are FP8; the dtype is then BF16.
    """

    parts: tuple[TensorInfo, ...]
    axis: int = 0
    head_dim: int = 0
    turned: bool = False
    scales: npt.NDArray[np.float32] | None = field(default=None, compare=False)

    @property
    def file(self) -> str:
        """Where it lies, or begins: for messages."""
        return self.parts[0].file

    @property
    def stored(self) -> str:
        """The dtype of the parts."""
        return self.parts[0].dtype

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def granule(self) -> int:
        """Runs of elements begin at multiples of this many, and end at one or with the tensor. 0: all at once."""
        if self.turned:
            return 0
        if self.head_dim:
            return self.head_dim * self.columns
        if self.axis == 1 or self.scales is not None:
            return self.columns
        return 8  # a byte, whatever the dtype

    @property
    def word(self) -> str:
        """numpy's name for an element as a bit pattern; types below a byte, and complex ones, come as bytes."""
        bits = DTYPE_BITS[self.dtype]
        return f"u{bits // 8}" if bits in (8, 16, 32, 64) and self.dtype != "C64" else "u1"

    def runs(self, start: int, count: int) -> list[ByteRange]:
        """The bytes that hold `count` elements from `start` on."""
        bits = DTYPE_BITS[self.stored]
        if self.axis == 1:
            share = len(self.parts)
            a, n = start // share * bits // 8, count // share * bits // 8
            return [ByteRange(p.file, p.offset + a, n) for p in self.parts]
        first, last = start * bits // 8, (start + count) * bits // 8
        found: list[ByteRange] = []
        begin = 0
        for p in self.parts:
            end = begin + p.nbytes
            if (begin < last and first < end) or (first == last and not found):
                a, b = max(first, begin), min(last, end)
                found.append(ByteRange(p.file, p.offset + a - begin, b - a))
            begin = end
        return found

    def arrange(self, raw: Sequence[Bytes], start: int) -> Array:
        """Elements, flat, as bit patterns, of the bytes that `runs` named. Where nothing has to be done: no copy."""
        if self.axis == 1:
            rows = raw[0].nbytes * len(self.parts) * 8 // DTYPE_BITS[self.stored] // self.columns
            joined = np.concatenate([r.reshape(rows, -1) for r in raw], axis=1).reshape(-1)
        else:
            joined = raw[0] if len(raw) == 1 else np.concatenate(raw)
        x: Array = joined
        if self.scales is not None:
            x = to_bf16(joined, self.scales, start // self.columns, self.columns)
        x = x.view(self.word)
        if self.head_dim:
            x = to_halves(x, self.head_dim, self.columns)
        if self.turned:
            x = np.ascontiguousarray(x.reshape(self.shape[::-1]).T).reshape(-1)
        return x

    def restore(self, x: Array, like: Sequence[Bytes]) -> list[Bytes]:
        """The inverse of `arrange` for all but FP8: the bytes as they were stored, cut as `like` is."""
        if self.turned:
            x = np.ascontiguousarray(x.reshape(self.shape).T).reshape(-1)
        if self.head_dim:
            x = to_pairs(x, self.head_dim, self.columns)
        joined: Bytes = x.view(np.uint8)
        if self.axis == 1:
            rows = x.size // self.columns
            parts = np.split(joined.reshape(rows, -1), len(self.parts), axis=1)
            return [np.ascontiguousarray(p).reshape(-1) for p in parts]
        ends = np.cumsum([r.nbytes for r in like])[:-1]
        return np.split(joined, ends)


def plain(info: TensorInfo) -> SourceTensor:
    """What is stored, as it is."""
    return SourceTensor(info.name, info.dtype, info.shape, (info,))


def same_bytes(a: Array, b: Array) -> bool:
    """Whether two arrays hold the same bytes."""
    a, b = a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)
    if a.size != b.size:
        return False
    whole = a.size // 8 * 8
    if a.ctypes.data % 8 or b.ctypes.data % 8:
        whole = 0
    # Eight bytes at a time: an eighth of the answers to look through.
    return bool((a[:whole].view("u8") == b[:whole].view("u8")).all() and (a[whole:] == b[whole:]).all())
