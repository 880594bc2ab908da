"""Tensors of a checkpoint as torch tensors, one at a time, whatever its layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from quantkit.checkpoint.reader import SourceFiles, elements
from quantkit.checkpoint.views import SourceTensor
from quantkit.errors import SourceError
from quantkit.layouts import Checkpoint

Array = npt.NDArray[Any]

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class CheckpointWeights:
    """The dense tensors of a checkpoint, read through its views. The files are the caller's to open and close. `look`
    sees the elements of a tensor, by name, as bit patterns, before anybody else, and may change them."""

    def __init__(
        self, checkpoint: Checkpoint, files: SourceFiles, look: Callable[[str, Array], None] = lambda _name, _flat: None
    ) -> None:
        self.tensors, self.files, self.look = checkpoint.tensors, files, look

    @property
    def names(self) -> Iterable[str]:
        return self.tensors

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in the dtype that its view gives."""
        tensor = self.tensors[name]
        flat = elements(tensor, self.files, 0, tensor.numel)
        self.look(name, flat)
        return _as_torch(flat, tensor).reshape(tensor.shape)

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """[len(rows), columns]: some rows of a matrix, and no more than them in memory where they lie in one piece."""
        tensor = self.tensors[name]
        if not tensor.granule or (tensor.columns % tensor.granule and tensor.granule % tensor.columns):
            return self.read(name)[rows]
        step = max(tensor.granule // tensor.columns, 1)
        found = torch.empty((len(rows), tensor.columns), dtype=_dtype(tensor))
        for i, row in enumerate(rows.tolist()):
            first = row // step * step
            count = min(step, tensor.shape[0] - first) * tensor.columns
            part = elements(tensor, self.files, first * tensor.columns, count)
            found[i] = _as_torch(part, tensor).reshape(-1, tensor.columns)[row - first]
        return found


def _dtype(tensor: SourceTensor) -> torch.dtype:
    if tensor.dtype not in _DTYPES:
        raise SourceError(
            f"tensor {tensor.name!r} is {tensor.dtype}, which no forward pass takes", where=tensor.file,
            hint="name the unquantized parent",
        )  # fmt: skip
    return _DTYPES[tensor.dtype]


def _as_torch(flat: Array, tensor: SourceTensor) -> torch.Tensor:
    return torch.from_numpy(flat.view(np.uint8)).view(_dtype(tensor))
