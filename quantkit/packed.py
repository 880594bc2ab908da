"""A weight as a method keeps it on disk, and the way back to its values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantkit.checkpoint.header import TensorInfo
from quantkit.checkpoint.reader import SourceFiles, elements
from quantkit.checkpoint.views import SourceTensor, plain
from quantkit.layouts import Checkpoint
from quantkit.memory import SLAB
from quantkit.methods.base import Array, Decoder, Method, WeightSpec

_NUMPY = {"F32": np.float32, "F16": np.float16, "U8": np.uint8, "I8": np.int8, "I16": np.int16,
          "I32": np.int32, "I64": np.int64}  # fmt: skip
# What a decoder may raise on companions made to mislead: JSON of another shape has many ways to be wrong.
UNDECODABLE = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError, IndexError)


@dataclass(frozen=True)
class Packed:
    """A weight that lies on disk in a method's own tensors. transposed: a dense checkpoint has it [in, out]."""

    spec: WeightSpec
    method: Method[Any]
    params: Any
    transposed: bool = False

    @property
    def names(self) -> list[str]:
        """Of its tensors on disk, the main one first."""
        return [spec.name for spec in self.method.outputs(self.spec, self.params)]


def load_tensor(info: SourceTensor, files: SourceFiles) -> Array:
    """A small tensor whole, as numpy sees its dtype, bf16 as float32. ValueError for one that no method writes."""
    if info.dtype == "BF16":  # scales, in what others write
        from quantkit.kernels.floats import to_float32

        return to_float32(elements(info, files, 0, info.numel), "BF16").reshape(info.shape)
    if info.dtype not in _NUMPY:
        raise ValueError(f"{info.name} is {info.dtype}, which no method writes")
    loaded: Array = elements(info, files, 0, info.numel).view(_NUMPY[info.dtype]).reshape(info.shape)
    return loaded


def decoded(tensors: Mapping[str, SourceTensor], files: SourceFiles, packed: Packed) -> Iterator[tuple[int, Array]]:
    """(first element, float32 values) of a packed weight [out, in], row-major, a slab at a time, or all at once where
    its method works so. Raises what UNDECODABLE lists if it does not decode."""
    weight, method = packed.spec, packed.method
    main, *companions = (tensors[name] for name in packed.names)
    stored = main.parts[0]
    raw = plain(TensorInfo("", "U8", (stored.nbytes,), stored.file, stored.offset))
    loaded = {info.name: load_tensor(info, files) for info in companions}
    decoder: Decoder = method.decoder(weight, packed.params, loaded)
    granule = method.granule(weight) or weight.numel
    size = max(granule, SLAB // 4 // granule * granule)
    for start in range(0, weight.numel, size):
        count = min(size, weight.numel - start)
        first, last = (n * main.nbytes // weight.numel for n in (start, start + count))
        if start + count == weight.numel:
            last = main.nbytes
        values = decoder.decode(elements(raw, files, first, last - first), start, count)
        if not np.isfinite(values).all():
            raise ValueError("a value is not finite")
        yield start, values.reshape(-1)


def check(checkpoint: Checkpoint, packed: Packed, *, any_dtype: tuple[str, ...] = ()) -> None:
    """ValueError unless every tensor of the weight is there, in shape and, but for those named so, in dtype."""
    for spec in packed.method.outputs(packed.spec, packed.params):
        tensor = checkpoint.tensors.get(spec.name)
        if tensor is None:
            raise ValueError(f"{spec.name} is missing")
        if tensor.shape != spec.shape:
            raise ValueError(f"{spec.name} is {list(tensor.shape)}, and should be {list(spec.shape)}")
        if tensor.dtype != spec.dtype and not spec.name.endswith(any_dtype):
            raise ValueError(f"{spec.name} is {tensor.dtype}, and should be {spec.dtype}")
