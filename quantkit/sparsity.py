"""How many weights of a folder are zero: counted in what is on disk, decoded where it is packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quantkit.architectures import Linear
from quantkit.checkpoint.header import FLOATS
from quantkit.checkpoint.reader import SourceFiles, elements
from quantkit.checkpoint.views import SourceTensor
from quantkit.errors import SourceError
from quantkit.layouts import Checkpoint
from quantkit.memory import SLAB, slab_elements
from quantkit.methods.base import Array
from quantkit.packed import UNDECODABLE, Packed, decoded
from quantkit.restored import packed_weights
from quantkit.selection import find_linears
from quantkit.solvers.pattern import Pattern

USUAL = (Pattern(2, 4), Pattern(4, 8))  # those that programs and papers speak of


@dataclass
class ZeroCount:
    """Zeros of weights that come row by row in runs of any length; broken: by pattern, how many of its groups hold
    fewer zeros than they should."""

    patterns: Sequence[Pattern] = ()
    weights: int = 0
    zeros: int = 0
    broken: dict[Pattern, int] = field(default_factory=dict)
    _left: dict[Pattern, Array] = field(default_factory=dict)

    def feed(self, zero: Array) -> None:
        """zero: bool [n]."""
        self.weights += zero.size
        self.zeros += int(np.count_nonzero(zero))
        for pattern in self.patterns:
            left = self._left.get(pattern)
            joined = zero if left is None or not left.size else np.concatenate([left, zero])
            whole = joined.size // pattern.of * pattern.of
            groups = joined[:whole].reshape(-1, pattern.of)
            found = sum(groups[:, i].astype(np.uint16) for i in range(pattern.of))
            self.broken[pattern] = self.broken.get(pattern, 0) + int(np.count_nonzero(found < pattern.pruned))
            self._left[pattern] = joined[whole:].copy()

    def add(self, other: ZeroCount) -> None:
        self.weights += other.weights
        self.zeros += other.zeros
        for pattern, n in other.broken.items():
            self.broken[pattern] = self.broken.get(pattern, 0) + n


def is_zero(x: Array) -> Array:
    """bool: whether floats, as bit patterns, are 0 or −0."""
    found: Array = (x & x.dtype.type((1 << (8 * x.itemsize - 1)) - 1)) == 0
    return found


def runs(tensor: SourceTensor, files: SourceFiles, *, turned: bool) -> Iterator[Array]:
    """The elements of a dense weight as bit patterns, in the order [out, in]."""
    if turned:
        whole = elements(tensor, files, 0, tensor.numel)
        yield np.ascontiguousarray(whole.reshape(tensor.shape).T).reshape(-1)
        return
    size = slab_elements(tensor, tensor.granule, SLAB)
    for start in range(0, tensor.numel, size or 1):
        yield elements(tensor, files, start, min(size, tensor.numel - start))


def count_dense(
    tensor: SourceTensor, files: SourceFiles, patterns: Sequence[Pattern], *, turned: bool = False
) -> ZeroCount:
    count = ZeroCount(patterns)
    for x in runs(tensor, files, turned=turned):
        count.feed(is_zero(x))
    return count


def count_packed(
    tensors: Mapping[str, SourceTensor], files: SourceFiles, packed: Packed, patterns: Sequence[Pattern]
) -> ZeroCount:
    """Raises what UNDECODABLE lists if the weight does not decode."""
    count = ZeroCount(patterns)
    for _, values in decoded(tensors, files, packed):
        count.feed(values == 0)
    return count


@dataclass(frozen=True)
class KindSparsity:
    """Of all linears of one kind in the decoder layers. patterns: those of USUAL that every group keeps to."""

    kind: str
    tensors: int
    weights: int
    zeros: int
    patterns: tuple[str, ...]

    @property
    def sparsity(self) -> float:
        return self.zeros / self.weights if self.weights else 0.0

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "tensors": self.tensors, "weights": self.weights, "zeros": self.zeros,
                "sparsity": self.sparsity, "patterns": list(self.patterns)}  # fmt: skip


def measure(checkpoint: Checkpoint) -> list[KindSparsity]:
    """Counts the zeros of every linear of the decoder layers. SourceError where a packed one does not decode."""
    counts: dict[str, tuple[int, ZeroCount]] = {}
    with SourceFiles(checkpoint.folder, checkpoint.files) as files:
        packed = packed_weights(checkpoint, files)
        names = [*packed, *(name for name in checkpoint.tensors if name not in packed)]
        for linear in find_linears(checkpoint, names)[0]:
            if linear.layer < 0:
                continue
            found = _count(checkpoint, files, packed, linear)
            tensors, sofar = counts.setdefault(linear.kind, (0, ZeroCount(USUAL)))
            sofar.add(found)
            counts[linear.kind] = tensors + 1, sofar
    return [
        KindSparsity(
            kind, tensors, found.weights, found.zeros, tuple(str(p) for p in USUAL if found.broken.get(p) == 0)
        )
        for kind, (tensors, found) in counts.items()
    ]


def _count(checkpoint: Checkpoint, files: SourceFiles, packed: Mapping[str, Packed], linear: Linear) -> ZeroCount:
    name = f"{linear.module}.weight"
    if name not in packed:
        tensor = checkpoint.tensors[name]
        if tensor.dtype not in FLOATS or len(tensor.shape) != 2:
            raise SourceError(
                f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}: its weights cannot be counted",
                where=f"{checkpoint.folder}/{tensor.file}", hint="leave --sparsity out",
            )  # fmt: skip
        columns = tensor.shape[0] if linear.transposed else tensor.shape[1]
        fitting = [p for p in USUAL if columns % p.of == 0]
        found = count_dense(tensor, files, fitting, turned=linear.transposed)
    else:
        columns = packed[name].spec.columns
        fitting = [p for p in USUAL if columns % p.of == 0]
        try:
            found = count_packed(checkpoint.tensors, files, packed[name], fitting)
        except UNDECODABLE as e:
            raise SourceError(f"tensor {name!r} does not decode: {e}", where=str(checkpoint.folder)) from None
    for pattern in USUAL:
        if pattern not in fitting:
            found.broken[pattern] = 1
    return found
