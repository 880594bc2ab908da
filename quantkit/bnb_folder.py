"""The headers of a bitsandbytes folder, proved whole and consistent before a loader may trust them.

Loaders do not look: a wrong block size in `quant_state` loads without a word and gives wrong numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

from quantkit.checkpoint.header import FLOATS, TensorInfo
from quantkit.checkpoint.reader import read_json, read_weight_files
from quantkit.errors import SourceError
from quantkit.layouts.hf import SAFETENSORS_INDEX

SINGLE = "model.safetensors"
COMPANION = re.compile(
    r"(?P<linear>.+)\.(?P<part>SCB|weight_format"
    r"|weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(?:nf4|fp4)))"
)

Parts = dict[str, TensorInfo]  # of one quantized linear: "weight", "weight.absmax", "SCB", ... → where it lies


def bad_folder(where: Path, what: str) -> SourceError:
    hint = "the folder is incomplete or was changed: quantize or fetch it again, then run `quantkit verify`"
    return SourceError(what, where=str(where), hint=hint)


def refuse(folder: Path, tensors: Iterable[str], fault: str) -> None:
    if ordered := sorted(tensors):
        more = f" (and {len(ordered) - 1} more)" if ordered[1:] else ""
        raise bad_folder(folder, f"tensor {ordered[0]!r}{more} is {fault}")


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of the folder by its name on disk. A single file goes before an index, as in transformers."""
    read_json(folder / "config.json")
    if (folder / SINGLE).is_file():
        return {info.name: info for info in read_weight_files(folder, [SINGLE])[0]}
    index = read_json(folder / SAFETENSORS_INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(str(shard).endswith(".safetensors") for shard in index.values()):
        raise bad_folder(folder / SAFETENSORS_INDEX, "weight_map does not lead from tensors to safetensors files")
    # transformers would follow `../`; read_weight_files takes plain file names only.
    shards = sorted({str(shard) for shard in index.values()})
    tensors = {info.name: info for info in read_weight_files(folder, shards)[0]}
    refuse(folder, index.keys() - tensors.keys(), "in the index and in no shard")
    return tensors


def quantized_linears(folder: Path, tensors: dict[str, TensorInfo]) -> dict[str, Parts]:
    """The quantized linears by name on disk, each proved complete and of sizes that fit together."""
    linears: dict[str, Parts] = {}
    for name, info in tensors.items():
        if match := COMPANION.fullmatch(name):
            linears.setdefault(match["linear"], {})[match["part"]] = info
    for name, parts in linears.items():
        if weight := tensors.get(f"{name}.weight"):
            parts["weight"] = weight
        if fault := _fault_8bit(folder, parts) if {"SCB", "weight_format"} & set(parts) else _fault_4bit(folder, parts):
            raise bad_folder(folder, f"quantized linear {name!r}: {fault}")
    loose = {n for n, info in tensors.items() if n.endswith(".weight") and info.dtype not in FLOATS}
    refuse(folder, loose - {f"{name}.weight" for name in linears}, "quantized, but its companions are missing")
    return linears


def _bytes_of(folder: Path, info: TensorInfo) -> bytes:
    with (folder / info.file).open("rb") as f:
        f.seek(info.offset)
        return f.read(info.nbytes)


def _fault_4bit(folder: Path, parts: Parts) -> str:
    """What is wrong with a 4-bit linear, or "". A wrong block size would load without a word and give wrong numbers."""
    states = [part for part in parts if ".quant_state." in part] or ["weight.quant_state.bitsandbytes__nf4"]
    needed = {"weight", "weight.absmax", "weight.quant_map", states[0]}
    try:
        state = json.loads(_bytes_of(folder, parts[states[0]])) if states[0] in parts else {}
        fields = {"quant_type", "blocksize", "dtype", "shape"}
        if nested := "nested_offset" in state:
            needed |= {"weight.nested_absmax", "weight.nested_quant_map"}
            fields |= {"nested_blocksize", "nested_dtype", "nested_offset"}
        if wrong := set(parts) ^ needed:
            return f"companions missing or too many: {sorted(wrong)}"
        dtypes = {state["dtype"], state.get("nested_dtype", "float32")}
        if set(state) != fields or not dtypes <= {"float32", "float16", "bfloat16"}:
            return "its quant_state has fields or dtypes that bitsandbytes does not know"
        rows, columns = state["shape"]
        blocks = math.ceil(rows * columns / state["blocksize"])
        wanted = {"weight": math.ceil(rows * columns / 2), "weight.absmax": blocks if nested else blocks * 4}
        if nested:
            wanted["weight.nested_absmax"] = math.ceil(blocks / state["nested_blocksize"]) * 4
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as e:
        return f"its quant_state is not readable ({type(e).__name__})"
    wrong = {part for part, nbytes in wanted.items() if parts[part].nbytes != nbytes}
    return f"not of the size that its quant_state says: {sorted(wrong)}" if wrong else ""


def _fault_8bit(folder: Path, parts: Parts) -> str:
    """What is wrong with an LLM.int8() linear, or ""."""
    if wrong := (set(parts) | {"weight_format"}) ^ {"weight", "SCB", "weight_format"}:
        return f"companions missing or too many: {sorted(wrong)}"
    weight, scale = parts["weight"], parts["SCB"]
    if weight.dtype != "I8" or len(weight.shape) != 2 or (scale.dtype, scale.shape) != ("F32", weight.shape[:1]):
        return f"weight {weight.dtype} {weight.shape} and SCB {scale.dtype} {scale.shape} do not fit together"
    other_layout = "weight_format" in parts and any(_bytes_of(folder, parts["weight_format"]))
    return "its weight_format is not 0, the row layout" if other_layout else ""
