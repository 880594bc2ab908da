"""Quantized folders that others wrote: there is no manifest, so config.json and the tensors themselves are asked.

GPTQ's format, as AutoGPTQ, GPTQModel and others write it: version 1 or 2; 2, 3, 4 or 8 bits. The width and the group
size of a linear are what its tensors make them, since a configuration may have exceptions for some (`dynamic`).
bitsandbytes: as transformers saves it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from quantkit.bnb_folder import quantized_linears, read_headers
from quantkit.checkpoint.reader import SourceFiles, read_json, safe_path
from quantkit.errors import SourceError
from quantkit.layouts import Checkpoint
from quantkit.methods import METHODS
from quantkit.methods.base import WeightSpec
from quantkit.methods.bnb_4bit import TORCH_DTYPE
from quantkit.methods.gptq import BITS, Gptq
from quantkit.packed import UNDECODABLE, Packed, check, load_tensor
from quantkit.selection import find_linears

VERSIONS = ("gptq", "gptq_v2")
OLD_CONFIG = "quantize_config.json"  # of AutoGPTQ, before config.json had a place for it
_DTYPES = {name: dtype for dtype, name in TORCH_DTYPE.items()}


def foreign_weights(checkpoint: Checkpoint, files: SourceFiles) -> dict[str, Packed]:
    """The packed weights by the names that they have in a dense folder; empty for a dense one.

    Raises SourceError where a folder is quantized in a way that is not known, or its tensors do not fit together.
    """
    block = checkpoint.config.get("quantization_config")
    if block is None and any(name.endswith(".qweight") for name in checkpoint.tensors):
        block = {"quant_method": "gptq", **read_json(safe_path(checkpoint.folder, OLD_CONFIG))}
    if block is None:
        return {}
    named = block.get("quant_method") if isinstance(block, dict) else block
    try:
        if named == "gptq":
            return _turned(checkpoint, _gptq(checkpoint, block))
        if named == "bitsandbytes":
            return _turned(checkpoint, _bitsandbytes(checkpoint, files))
    except UNDECODABLE as e:
        raise SourceError(
            f"config.json and the quantized tensors do not fit together: {e}", where=str(checkpoint.folder),
            hint="fetch the folder again",
        ) from None  # fmt: skip
    raise SourceError(
        f"the folder is quantized ({str(named)!r}), in a way that is not known here", where=str(checkpoint.folder),
        hint="dense folders, quantkit's own, and GPTQ's and bitsandbytes' format by anybody can be read",
    )  # fmt: skip


def _gptq(checkpoint: Checkpoint, block: Mapping[str, Any]) -> Iterable[Packed]:
    version = block.get("checkpoint_format") or block.get("format") or "gptq"
    if version not in VERSIONS:
        raise ValueError(f"its checkpoint_format is {version!r}, and {' and '.join(VERSIONS)} are known")
    for name, tensor in checkpoint.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "qweight":
            continue
        if f"{module}.g_idx" not in checkpoint.tensors or f"{module}.qzeros" not in checkpoint.tensors:
            raise ValueError(f"{module} has no g_idx or no qzeros")
        (columns,) = checkpoint.tensors[f"{module}.g_idx"].shape
        words, rows = tensor.shape
        groups, _ = checkpoint.tensors[f"{module}.qzeros"].shape
        bits = words * 32 // columns
        if bits not in BITS:
            raise ValueError(f"{name} is {words} words for {columns} inputs, which is no known width")
        # The model is constructed, not validated: others know group sizes that we do not write.
        said: dict[str, Any] = {
            "group_size": -1 if groups == 1 else columns // groups, "sym": block.get("sym", True) is True,
            "checkpoint_format": version, "act_order": "group" if block.get("desc_act") else "static",
        }  # fmt: skip
        params = Gptq.model_construct(**said)
        packed = Packed(WeightSpec(module, "F16", rows, columns), METHODS["gptq", bits], params)
        check(checkpoint, packed, any_dtype=(".scales",))
        yield packed


def _bitsandbytes(checkpoint: Checkpoint, files: SourceFiles) -> Iterable[Packed]:
    linears = quantized_linears(checkpoint.folder, read_headers(checkpoint.folder))
    for module, parts in linears.items():
        if "SCB" in parts:
            rows, columns = parts["weight"].shape
            packed = Packed(WeightSpec(module, "F16", rows, columns), METHODS["bnb", 8], METHODS["bnb", 8].params())
        else:
            part = next(part for part in parts if ".quant_state." in part)
            state = json.loads(load_tensor(checkpoint.tensors[f"{module}.{part}"], files).tobytes())
            method = METHODS["bnb", 4]
            params = method.params(quant_type=state["quant_type"], double_quant="nested_offset" in state)
            packed = Packed(WeightSpec(module, _DTYPES[state["dtype"]], *state["shape"]), method, params)
        check(checkpoint, packed)
        yield packed


def _turned(checkpoint: Checkpoint, found: Iterable[Packed]) -> dict[str, Packed]:
    """By name in a dense folder; those that it has [in, out], as GPT-2 does, marked so."""
    weights = {f"{packed.spec.module}.weight": packed for packed in found}
    owned = {name for packed in weights.values() for name in packed.names}
    linears = find_linears(checkpoint, [*(n for n in checkpoint.tensors if n not in owned), *weights])[0]
    turned = {f"{linear.module}.weight" for linear in linears if linear.transposed}
    return {n: Packed(p.spec, p.method, p.params, n in turned) for n, p in weights.items()}
