"""The command that makes a folder again, as its card says it: the recipe of its manifest, in options."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from quantkit.recipe import SHARD_SIZE


def command_of(manifest: Mapping[str, Any]) -> str:
    """The command that makes this folder again, with a stand-in for the output path."""
    recipe, source = manifest["recipe"], manifest["source"]
    if "allocation" in manifest:  # its recipe has the bits of every linear, and needs no measurement
        return "quantkit run recipe.yaml -o OUT"
    quantize, convert, prune = recipe.get("quantize"), recipe.get("convert", {}), recipe.get("prune", {})
    verb = "quantize" if quantize else "prune" if prune else "convert"
    words = ["quantkit", verb, source["name"], "-o", "OUT"]
    if prune and verb == "prune":
        words += _prune_options(prune)
    elif prune:
        words += [f"--set=prune.{key}={json.dumps(value)}" for key, value in prune.items()]
    if quantize:
        if quantize["method"] != "bnb":
            words += ["--method", quantize["method"]]
        words += ["--bits", str(quantize["bits"])]
        words += _method_options(quantize)
        if quantize.get("quant_type", "nf4") != "nf4":
            words += ["--quant-type", quantize["quant_type"]]
        if quantize.get("double_quant") is False:
            words.append("--no-double-quant")
        for pattern in quantize["skip"]:
            words += ["--skip", pattern]
    if verb != "convert":
        words += [f"--set=convert.{key}={value}" for key, value in convert.items() if value is not True]
    else:
        words += ["--to", convert["to"]]
        if convert["profile"] != "current":
            words += ["--profile", convert["profile"]]
        if "weights_format" in convert:
            words += ["--weights-format", convert["weights_format"]]
        words += [f"--no-{key}" for key in ("tokenizer", "check") if not convert[key]]
    for key, value in recipe.get("calibration", {}).items():
        words += [f"--calib{'' if key == 'text' else f'-{key}'}", str(value)]
    for key, value in recipe.get("native", {}).items():
        words += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    if source["revision"]:
        words += ["--revision", source["revision"]]
    if recipe["shard_size"] not in (None, SHARD_SIZE):
        words += ["--shard-size", str(recipe["shard_size"])]
    if recipe["allow_nonfinite"]:
        words.append("--allow-nonfinite")
    if recipe["device"] != "cpu":
        words += ["--device", recipe["device"]]
    for key, value in recipe["card"].items():
        if value is not None:
            words += ["--set", f"card.{key}={value}"]
    return shlex.join(words)


def _prune_options(prune: Mapping[str, Any]) -> list[str]:
    words = []
    for key, value in prune.items():
        option = f"--{key.replace('_', '-')}"
        if key.startswith("owl_"):
            words.append(f"--set=prune.{key}={value}")
        elif isinstance(value, list):
            words += [word for pattern in value for word in (option, pattern)]
        elif (key, value) != ("method", "wanda"):
            words += [option] if value is True else [option, str(value)]
    return words


# Keys of a recipe's quantize block, and the values that need not be said.
_SAID = {"group_size": None, "act_order": "static", "effort": "default", "damp": 0.03, "checkpoint_format": "gptq",
         "format": "gptq", "min_bits": 0.0, "max_bits": 32.0, "head_bits": 6}  # fmt: skip


def _method_options(quantize: Mapping[str, Any]) -> list[str]:
    words = []
    for key, usual in _SAID.items():
        if key in quantize and quantize[key] != usual:
            words += [f"--{key.replace('_', '-')}", str(quantize[key])]
    return words + (["--no-sym"] if quantize.get("sym") is False else [])
