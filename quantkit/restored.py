"""The weights of any folder as its loader will see them: dense tensors as they are, packed ones decoded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.checkpoint.header import FLOATS
from quantkit.checkpoint.reader import SourceFiles, read_json
from quantkit.errors import QuantkitError, SourceError
from quantkit.foreign import foreign_weights
from quantkit.layouts import Checkpoint, open_checkpoint
from quantkit.layouts.base import MANIFEST
from quantkit.methods.base import Selection, WeightSpec
from quantkit.packed import UNDECODABLE, Packed, check, decoded
from quantkit.publication import FORMAT
from quantkit.recipe import Native, Quantize, build_recipe

if TYPE_CHECKING:
    import torch

# What a loader goes by; the rest of a quantization_config names layers, versions and what the quantizer did.
_TELLING = ("quant_method", "format", "bits", "group_size", "desc_act", "sym", "checkpoint_format", "load_in_4bit",
            "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "config_groups", "dynamic")  # fmt: skip


def packed_weights(checkpoint: Checkpoint, files: SourceFiles) -> dict[str, Packed]:
    """The packed weights of a folder by the name that they have in a dense one: as quantkit.json lists them, or, in a
    folder that somebody else wrote, as its tensors say. Empty for a dense folder.

    Raises SourceError where a folder is quantized in a way that is not known, or does not agree with itself.
    """
    found = _listed(checkpoint) if (checkpoint.folder / MANIFEST).is_file() else {}
    return found or foreign_weights(checkpoint, files)


def _listed(checkpoint: Checkpoint) -> dict[str, Packed]:
    manifest = read_json(checkpoint.folder / MANIFEST)
    try:
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}, this version knows {FORMAT}")
        rows = [row for row in manifest["tensors"] if row["quantized"]]
        if not rows:
            return {}
        quantize = build_recipe({"source": "", "quantize": manifest["recipe"]["quantize"]}).quantize
        if quantize is None:
            raise ValueError("it lists quantized tensors, and its recipe quantizes nothing")
        found = {str(row["name"]): _read(row, quantize) for row in rows}
        for packed in found.values():
            check(checkpoint, packed)
        about = manifest["method"]
        chosen = Selection(*(tuple(map(str, about[key])) for key in ("encoded", "left_dense", "skipped_modules")))
        _compare(checkpoint, quantize, next(iter(found.values())).spec.dtype, chosen)
    except (QuantkitError, *UNDECODABLE, OverflowError) as e:
        why = e.what if isinstance(e, QuantkitError) else f"{type(e).__name__}: {e}"
        raise SourceError(
            f"{MANIFEST} and the folder do not fit together: {why.removeprefix('ValueError: ')}",
            where=str(checkpoint.folder / MANIFEST), hint="run `quantkit verify`, or fetch the folder again",
        ) from None  # fmt: skip
    return found


def _read(row: Mapping[str, Any], quantize: Quantize) -> Packed:
    height, width = (int(n) for n in row["shape"])
    if row["dtype"] not in FLOATS or min(height, width) < 1:
        raise ValueError(f"{row['name']!r} is no float matrix")
    spec = WeightSpec(str(row["name"]).removesuffix(".weight"), row["dtype"], height, width)
    return Packed(spec, quantize.implementation, quantize.params, bool(row.get("transposed")))


def _compare(checkpoint: Checkpoint, quantize: Quantize, dtype: str, chosen: Selection) -> None:
    """A loader reads config.json, not the manifest: it must say the same."""
    found = checkpoint.config.get("quantization_config")
    wanted = quantize.implementation.config(quantize.params, dtype, chosen)
    if not isinstance(found, dict):
        raise ValueError("config.json has no quantization_config")
    for key in _TELLING:
        if found.get(key) != wanted.get(key):
            raise ValueError(f"config.json says {key} {found.get(key)!r}, the recipe makes it {wanted.get(key)!r}")


class RestoredWeights:
    """Weights (calibration.skeleton) of any folder that quantkit reads or writes, one tensor in memory at a time;
    packed ones come in float32. The files are the caller's to open and close."""

    def __init__(self, checkpoint: Checkpoint, files: SourceFiles) -> None:
        from quantkit.calibration.weights import CheckpointWeights

        self.folder, self.tensors, self.files = checkpoint.folder, checkpoint.tensors, files
        self.packed = packed_weights(checkpoint, files)
        self.dense = CheckpointWeights(checkpoint, files)
        owned = {name for packed in self.packed.values() for name in packed.names}
        dense = [name for name in checkpoint.tensors if name not in owned]
        if twice := sorted(self.packed.keys() & set(dense)):
            raise SourceError(
                f"tensor {twice[0]!r} is there both quantized and dense", where=str(self.folder),
                hint="keep the files of one model only",
            )  # fmt: skip
        self._names = [*dense, *self.packed]

    @property
    def names(self) -> Iterable[str]:
        return self._names

    def read(self, name: str) -> torch.Tensor:
        """The tensor in the shape that a dense checkpoint has. SourceError if it does not decode."""
        import torch

        packed = self.packed.get(name)
        if packed is None:
            return self.dense.read(name)
        flat = None
        try:
            for start, values in decoded(self.tensors, self.files, packed):
                if values.size == packed.spec.numel:  # decoded in one piece: no second one beside it
                    flat = values
                    break
                flat = np.empty(packed.spec.numel, np.float32) if flat is None else flat
                flat[start : start + values.size] = values
        except UNDECODABLE as e:
            raise SourceError(
                f"tensor {name!r} does not decode: {e}", where=str(self.folder),
                hint="run `quantkit verify`, or fetch the folder again",
            ) from None  # fmt: skip
        assert flat is not None, "a weight has elements"
        matrix = torch.from_numpy(flat).reshape(packed.spec.rows, packed.spec.columns)
        return matrix.T if packed.transposed else matrix

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Some rows of a matrix: [len(rows), columns]."""
        return self.read(name)[rows] if name in self.packed else self.dense.read_rows(name, rows)


def open_files(checkpoint: Checkpoint) -> SourceFiles:
    return SourceFiles(checkpoint.folder, checkpoint.files)


def open_source(folder: Path, source: Path) -> Checkpoint:
    """The model at `source` as it was read when the folder was made from it: in its layout, and with what the user
    said of it. A folder without a manifest knows of neither."""
    try:
        manifest = read_json(folder / MANIFEST)
        native = Native.model_validate(manifest["recipe"].get("native", {})).options
        layout = manifest["source"].get("layout", "hf")
    except (QuantkitError, KeyError, TypeError, AttributeError, ValueError):
        return open_checkpoint(source)
    return open_checkpoint(source, native=native, prefer="hf" if layout == "hf" else "mistral")
