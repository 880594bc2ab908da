"""The weights of a written folder as its loader will see them: dense tensors as they are, packed ones decoded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.checkpoint.header import FLOATS, TensorInfo
from quantkit.checkpoint.reader import SourceFiles, elements, read_json
from quantkit.checkpoint.views import SourceTensor, plain
from quantkit.errors import QuantkitError, SourceError
from quantkit.layouts import Checkpoint
from quantkit.memory import SLAB
from quantkit.methods.base import Array, Decoder, Method, WeightSpec
from quantkit.recipe import build_recipe

if TYPE_CHECKING:
    import torch

_NUMPY = {"F32": np.float32, "F16": np.float16, "U8": np.uint8, "I8": np.int8, "I32": np.int32, "I64": np.int64}
# What a decoder may raise on companions made to mislead: JSON of another shape has many ways to be wrong.
UNDECODABLE = (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError, IndexError)


@dataclass(frozen=True)
class Packed:
    """A weight that lies on disk in a method's own tensors. transposed: a dense checkpoint has it [in, out]."""

    spec: WeightSpec
    method: Method[Any]
    params: Any
    transposed: bool = False


def load_tensor(info: SourceTensor, files: SourceFiles) -> Array:
    """A small tensor whole, as numpy sees its dtype. ValueError for one that no method writes."""
    if info.dtype not in _NUMPY:
        raise ValueError(f"{info.name} is {info.dtype}, which no method writes")
    loaded: Array = elements(info, files, 0, info.numel).view(_NUMPY[info.dtype]).reshape(info.shape)
    return loaded


def decoded(tensors: Mapping[str, SourceTensor], files: SourceFiles, packed: Packed) -> Iterator[tuple[int, Array]]:
    """(first element, float32 values) of a packed weight [out, in], row-major, a slab at a time, or all at once where
    its method works so. Raises what UNDECODABLE lists if it does not decode."""
    weight, method = packed.spec, packed.method
    main, *companions = (tensors[spec.name] for spec in method.outputs(weight, packed.params))
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


def packed_weights(checkpoint: Checkpoint) -> dict[str, Packed]:
    """The packed weights of a folder by the name that they have in a dense one: as quantkit.json lists them, or, in a
    folder that somebody else wrote in GPTQ's format, as its tensors say. Empty for a dense folder.

    Raises SourceError where a folder is quantized in a way that is not known.
    """
    if (checkpoint.folder / "quantkit.json").is_file():
        return _listed(checkpoint)
    block = checkpoint.config.get("quantization_config")
    if block is None:
        return {}
    if isinstance(block, dict) and block.get("quant_method") == "gptq":
        return _gptq(checkpoint, block)
    named = block.get("quant_method") if isinstance(block, dict) else block
    raise SourceError(
        f"the folder is quantized ({named!r}), and not by quantkit", where=str(checkpoint.folder),
        hint="dense folders, quantkit's own and others in GPTQ's format can be read",
    )  # fmt: skip


def _listed(checkpoint: Checkpoint) -> dict[str, Packed]:
    where = str(checkpoint.folder / "quantkit.json")
    manifest = read_json(checkpoint.folder / "quantkit.json")
    try:
        rows = [row for row in manifest["tensors"] if row["quantized"]]
        if not rows:
            return {}
        quantize = build_recipe({"source": "", "quantize": manifest["recipe"]["quantize"]}).quantize
        assert quantize is not None
        found = {}
        for row in rows:
            height, width = (int(n) for n in row["shape"])
            if row["dtype"] not in FLOATS or min(height, width) < 1:
                raise ValueError(f"{row['name']!r} is no float matrix")
            spec = WeightSpec(str(row["name"]).removesuffix(".weight"), row["dtype"], height, width)
            packed = Packed(spec, quantize.implementation, quantize.params, bool(row.get("transposed")))
            _check(checkpoint, packed)
            found[str(row["name"])] = packed
        return found
    except (QuantkitError, AssertionError, *UNDECODABLE) as e:
        why = e.what if isinstance(e, QuantkitError) else str(e) or repr(e)
        raise SourceError(
            f"quantkit.json and the weights do not fit together: {why}", where=where, hint="run `quantkit verify`"
        ) from None


def _gptq(checkpoint: Checkpoint, block: Mapping[str, Any]) -> dict[str, Packed]:
    bits, group, act = block.get("bits"), block.get("group_size", -1), block.get("desc_act", False)
    table = {
        "method": "gptq", "bits": bits, "group_size": group, "sym": block.get("sym", True),
        "act_order": "group" if act else "static",
        "checkpoint_format": block.get("checkpoint_format", block.get("format", "gptq")),
    }  # fmt: skip
    quantize = build_recipe({"source": "", "quantize": table}).quantize
    assert quantize is not None
    found = {}
    for name, tensor in checkpoint.tensors.items():
        if name.endswith(".qweight"):
            module = name.removesuffix(".qweight")
            spec = WeightSpec(module, "F16", tensor.shape[1], tensor.shape[0] * 32 // quantize.bits)
            packed = Packed(spec, quantize.implementation, quantize.params)
            try:
                _check(checkpoint, packed)
            except ValueError as e:
                raise SourceError(str(e), where=str(checkpoint.folder), hint="fetch the folder again") from None
            found[f"{module}.weight"] = packed
    return found


def _check(checkpoint: Checkpoint, packed: Packed) -> None:
    for spec in packed.method.outputs(packed.spec, packed.params):
        tensor = checkpoint.tensors.get(spec.name)
        if tensor is None or tensor.shape != spec.shape:
            raise ValueError(f"{spec.name} is missing" if tensor is None else f"{spec.name} has another shape")


class RestoredWeights:
    """Weights (calibration.skeleton) of any folder that quantkit reads or writes; packed ones come in float32. The
    files are the caller's to open and close."""

    def __init__(self, checkpoint: Checkpoint, files: SourceFiles) -> None:
        from quantkit.calibration.weights import CheckpointWeights

        self.folder, self.tensors, self.files = checkpoint.folder, checkpoint.tensors, files
        self.packed = packed_weights(checkpoint)
        self.dense = CheckpointWeights(checkpoint, files)
        owned = {spec.name for p in self.packed.values() for spec in p.method.outputs(p.spec, p.params)}
        self._names = [*(n for n in checkpoint.tensors if n not in owned), *self.packed]

    @property
    def names(self) -> Iterable[str]:
        return self._names

    def read(self, name: str) -> torch.Tensor:
        """The tensor in the shape that a dense checkpoint has."""
        import torch

        packed = self.packed.get(name)
        if packed is None:
            return self.dense.read(name)
        flat = np.empty(packed.spec.numel, np.float32)
        try:
            for start, values in decoded(self.tensors, self.files, packed):
                flat[start : start + values.size] = values
        except UNDECODABLE as e:
            raise SourceError(
                f"tensor {name!r} does not decode: {e}", where=str(self.folder), hint="run `quantkit verify`"
            ) from None
        matrix = torch.from_numpy(flat).reshape(packed.spec.rows, packed.spec.columns)
        return matrix.T if packed.transposed else matrix

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return self.read(name)[rows] if name in self.packed else self.dense.read_rows(name, rows)


def open_files(checkpoint: Checkpoint) -> SourceFiles:
    return SourceFiles(Path(checkpoint.folder), checkpoint.files)
