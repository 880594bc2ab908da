"""Two tensors side by side, element by element, slab by slab."""

from __future__ import annotations

import math

import numpy as np

from quantkit.checkpoint.reader import SourceFiles, elements
from quantkit.checkpoint.views import SourceTensor, same_bytes
from quantkit.memory import SLAB, slab_elements
from quantkit.methods.base import Array


class Elements:
    """A tensor read from its start to its end, in runs of any length: whole granules are read, and what is left over
    is kept. `turned`: it is wanted column by column, and so is held whole."""

    def __init__(self, tensor: SourceTensor, files: SourceFiles, *, turned: bool) -> None:
        self.tensor, self.files = tensor, files
        self.read = 0  # up to here
        self.kept: Array = np.empty(0, tensor.word)
        if turned:
            whole = elements(tensor, files, 0, tensor.numel)
            self.kept = np.ascontiguousarray(whole.reshape(tensor.shape).T).reshape(-1)
            self.read = tensor.numel

    def run(self, start: int, count: int) -> Array:
        """The next `count` elements, which begin at `start`."""
        missing = start + count - self.read
        if missing > 0:
            granule = self.tensor.granule or self.tensor.numel
            n = min(-(-missing // granule) * granule, self.tensor.numel - self.read)
            self.kept = np.concatenate([self.kept, elements(self.tensor, self.files, self.read, n)])
            self.read += n
        found: Array = self.kept[:count]
        self.kept = self.kept[count:]
        return found


def same_elements(a: SourceTensor, a_files: SourceFiles, b: SourceTensor, b_files: SourceFiles) -> bool:
    """Whether `a` holds the elements of `b`, or these in fp16."""
    cast = (a.dtype, b.dtype) in (("F16", "F32"), ("F16", "BF16"))
    if a.numel != b.numel or (a.dtype != b.dtype and not cast):
        return False
    granule = 0 if a.turned or b.turned else math.lcm(a.granule, b.granule)
    size = slab_elements(b, granule, SLAB)
    for start in range(0, a.numel, size or 1):
        n = min(size, a.numel - start)
        wanted = elements(b, b_files, start, n)
        if cast:
            from quantkit.kernels.floats import to_float16

            wanted = to_float16(wanted, b.dtype)
        if not same_bytes(elements(a, a_files, start, n), wanted):
            return False
    return True


def same_but_zeros(a: SourceTensor, a_files: SourceFiles, b: SourceTensor, b_files: SourceFiles) -> bool:
    """Whether `a` has the elements of `b`, bit for bit, except where it is zero."""
    if (a.dtype, a.numel) != (b.dtype, b.numel):
        return False
    granule = 0 if a.turned or b.turned else math.lcm(a.granule, b.granule)
    size = slab_elements(a, granule, SLAB)
    for start in range(0, a.numel, size or 1):
        n = min(size, a.numel - start)
        x, y = elements(a, a_files, start, n), elements(b, b_files, start, n)
        if not ((x == y) | (x == 0)).all():
            return False
    return True


def relative_error(found: SourceTensor, files: SourceFiles, source: SourceTensor, source_files: SourceFiles) -> float:
    """‖found − source‖ / ‖source‖ of two float tensors of one dtype; what is not finite in the source counts as 0."""
    from quantkit.kernels.floats import to_float32

    error = norm = 0.0
    granule = 0 if found.turned or source.turned else math.lcm(found.granule, source.granule)
    size = slab_elements(found, granule, SLAB)
    for start in range(0, found.numel, size or 1):
        n = min(size, found.numel - start)
        read = (elements(found, files, start, n), elements(source, source_files, start, n))
        new, old = (to_float32(x, found.dtype).astype(np.float64) for x in read)
        old[~np.isfinite(old)] = 0
        error += float(np.vdot(new - old, new - old))
        norm += float(np.vdot(old, old))
    return relative(error, norm)


def relative(error: float, norm: float) -> float:
    """Of sums of squares."""
    return (error / norm) ** 0.5 if norm > 0 else error
