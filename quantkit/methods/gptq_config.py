"""quantization_config of a folder in GPTQ's format, and what its readers make of layers that are left dense.

    GPTQModel 7.7     `dynamic`: regular expressions, one with "-:" in front names a dense layer
    optimum 2.3       `modules_in_block_to_quantize`: ends of names of all the others; a whole name is an end, too
    vLLM 0.33         both; there the second lists parts of names
    AutoGPTQ 0.7.1    neither: it packs what it knows of an architecture

Source: these programs' own code; the first two were run (tests/interop).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from quantkit.methods.base import Selection
from quantkit.methods.gptq_format import Grouped
from quantkit.version import __version__

# By architecture: who loads a folder in GPTQ's format, as far as it was run (tests/interop), and what others make of
# it. Where nothing stands, both GPTQModel 7.7 and transformers 5.23 with optimum 2.3 load it right.
_EXPERTS = (
    "transformers 5 with optimum fills the experts of this folder with random numbers, and only a line of its loading "
    "report says so; load it with gptqmodel"
)
LOADERS = {
    "falcon": ("gptqmodel", "transformers with optimum computes wrong numbers for Falcon; load it with gptqmodel"),
    "gpt2": ("gptqmodel", "transformers with optimum does not load GPT-2 in this format; gptqmodel does"),
    "phi3": ("transformers", "gptqmodel 7.7 looks for the parts of this model's fused layers and does not load it"),
    "qwen2_moe": ("gptqmodel", _EXPERTS),
    "qwen3_moe": ("gptqmodel", _EXPERTS),
    "deepseek_v3": ("gptqmodel", _EXPERTS),
    "mixtral": (
        "auto-gptq",
        "transformers 5 with optimum fills the experts of this folder with random numbers, and gptqmodel 7.7 looks for "
        "them under other names; load it with auto-gptq 0.7.1 beside transformers 4.45, which expects every linear of "
        "attention and experts to be quantized",
    ),
}
UNTRIED = (
    "compressed-tensors folders of this architecture were not tried with any reader: its layers are not plain "
    "nn.Linear modules in transformers"
)

# Linears that have the same inputs, so that GPTQ rounds them together, and vLLM computes them as one.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def config(bits: int, params: Grouped, selection: Selection, damp: float | None) -> dict[str, Any]:
    """quantization_config. damp: of a calibrated method."""
    table: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": params.group_size,
        "desc_act": params.acting,
        "sym": params.sym,
        "lm_head": False,
        "checkpoint_format": params.checkpoint_format,
        "pack_dtype": "int32",
        "true_sequential": True,
        "static_groups": False,
    }
    if damp is not None:
        table["damp_percent"] = damp
    table["meta"] = {"quantizer": [f"quantkit:{__version__}"]}
    if selection.skipped:
        table["dynamic"] = {rf"-:^{re.escape(module)}$": {} for module in selection.skipped}
        table["modules_in_block_to_quantize"] = quantized_modules(selection)
    return table


def quantized_modules(selection: Selection) -> list[list[str]]:
    """`modules_in_block_to_quantize`: what layers are called within their block, a list for each set of inputs.

    Where some layers of a kind are dense and others are not, every quantized layer's whole name instead.
    """
    kinds = list(dict.fromkeys(map(within_block, selection.encoded)))
    dense = {within_block(module) for module in selection.skipped}
    names = selection.encoded if any(kind in other for kind in kinds for other in dense) else kinds
    lists: list[list[str]] = []
    for name in names:
        if lists and _siblings(lists[-1][-1], name):
            lists[-1].append(name)
        else:
            lists.append([name])
    return lists


def within_block(module: str) -> str:
    """What a module is called within its block: behind the first number, which is the block's."""
    parts = module.split(".")
    return ".".join(parts[next((i for i, part in enumerate(parts) if part.isdigit()), -1) + 1 :])


def _siblings(a: str, b: str) -> bool:
    (parent, _, one), (other, _, two) = a.rpartition("."), b.rpartition(".")
    return parent == other and any(one in names and two in names for names in SIBLINGS)


def loader(architecture: str, params: Grouped) -> tuple[str, str]:
    """Which program loads the folder, "none" if no one that was tried does, and a warning about the others or ""."""
    if params.format == "gptq":
        program, warning = LOADERS.get(architecture, ("transformers", ""))
        if program == "auto-gptq" and params.checkpoint_format != "gptq":
            return "none", f"no program that was tried knows this architecture in {params.checkpoint_format}"
        return program, warning
    odd = architecture in ("falcon", "gpt2", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3")
    return ("none", UNTRIED) if odd else ("transformers", "")


def reader_notes(bits: int, selection: Selection, params: Grouped) -> tuple[str, ...]:
    """What some reader refuses of such a folder."""
    notes = []
    if params.format == "gptq" and not params.sym and params.checkpoint_format == "gptq":
        notes.append(
            "gptqmodel refuses asymmetric folders of version 1 that another program wrote; transformers and auto-gptq "
            "read them; gptqmodel and transformers read checkpoint_format gptq_v2"
        )
    if params.format == "gptq" and (bits, params.sym, params.group_size) == (4, False, -1):
        notes.append(
            "on a CPU, transformers with optimum computes wrong numbers for 4-bit asymmetric weights with one scale a "
            "row"
        )
    if params.format == "gptq" and (bits not in (4, 8) or not params.sym or params.acting):
        notes.append(
            "vLLM reads the gptq format with 4 or 8 bits, symmetric, and groups in their natural order; anything else "
            "needs format compressed-tensors there"
        )
    if (torn := _torn(selection)) is not None:
        notes.append(
            f"{torn[0]} is dense and {torn[1]} is quantized: vLLM computes them as one and refuses that; other "
            "readers take them"
        )
    return tuple(notes)


def _torn(selection: Selection) -> tuple[str, str] | None:
    """A dense and a quantized module that vLLM computes as one."""
    encoded = {unit: module for module in reversed(selection.encoded) if (unit := computed_at_once(module))}
    torn = ((module, encoded.get(computed_at_once(module))) for module in selection.skipped)
    return next(((dense, other) for dense, other in torn if other is not None), None)


def computed_at_once(module: str) -> str:
    """What vLLM computes at once: linears with the same inputs, all experts of a layer. Empty: the module is alone."""
    if ".experts." in module:
        return module.partition(".experts.")[0] + ".experts"
    parent, _, name = module.rpartition(".")
    return next((f"{parent}.{'+'.join(names)}" for names in SIBLINGS if name in names), "")


def extra_files(block: Mapping[str, Any]) -> dict[str, bytes]:
    """Older readers look for the configuration in a file of its own."""
    if block.get("quant_method") != "gptq":
        return {}
    return {"quantize_config.json": (json.dumps(block, indent=2) + "\n").encode()}
