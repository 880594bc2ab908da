"""The linears of an architecture that has no row: transformers is asked, on the meta device, with no weight loaded.

The table in `architectures` is the rule and this the exception: it imports torch, takes seconds, and knows no shapes.
Only classes that transformers itself ships are built. Code that comes with a checkpoint is never run, nor are attention
kernels that a config asks to be fetched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from quantkit.architectures import Linear
from quantkit.errors import SourceError
from quantkit.layouts.base import STRIPPED

# Keys through which a config.json could make transformers run or fetch something else than its own modules, or build
# them already quantized.
_NOT_OURS = (*STRIPPED, "quantization_config", "model_type", "transformers_version")


LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")


def derive(config: Mapping[str, Any], names: Iterable[str]) -> tuple[list[Linear], tuple[str, ...]]:
    """Linears among the tensor `names`, in the order of the model's modules, and `llm_int8_skip_modules` spelled out:
    what transformers with bitsandbytes would convert by default, and what not.

    Raises SourceError if transformers cannot build this model_type, if it would convert nothing (Falcon's kind), or if
    a linear that it would convert is not among the names: the layout on disk is then one we do not know, and a folder
    written from a part of it could not be loaded.
    """
    model_type = config.get("model_type")
    where = f"config.json (model_type {model_type!r})"
    names = list(names)
    layers = max((v for k in LAYERS if type(v := config.get(k)) is int), default=0)
    if layers > max(len(names), 512):  # before a model of that depth is built: it may take minutes, or all memory
        raise SourceError(
            f"config.json speaks of {layers:,} layers, the checkpoint has {len(names):,} tensors",
            where=where,
            hint="config and weights are of different models",
        )
    model = _build(config, where)
    modules, skipped = _converted(model)
    if not modules:
        raise SourceError(
            f"transformers would quantize nothing in a {type(model).__name__}",
            where=where,
            hint="its linears are not plain nn.Linear modules; this architecture needs a row in architectures.py",
        )
    on_disk = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    prefix = f"{model.base_model_prefix}."
    found, missing = [], []
    for module, transposed in modules.items():
        spellings = (module, module.removeprefix(prefix), prefix + module)
        name = next((s for s in spellings if s in on_disk), None)
        if name is None:
            missing.append(module)
        else:
            found.append(_linear(name, module.removeprefix(prefix), transposed))
    if missing:
        raise SourceError(
            f"{len(missing)} of {len(modules)} linears of a {type(model).__name__} are not in the checkpoint, "
            f"{missing[0]!r} first",
            where=where,
            hint="the files name their tensors otherwise; this architecture needs a row in architectures.py",
        )
    return found, skipped


def _build(config: Mapping[str, Any], where: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    hint = "upgrade transformers; a model that needs trust_remote_code cannot be read, its code is never run"
    try:
        ours = AutoConfig.for_model(config.get("model_type"), **plain_config(config))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(ours, trust_remote_code=False, attn_implementation="eager")
    except Exception as e:
        # Whatever a foreign config does to its class (missing key, wrong type, no such class) is the config's fault.
        reason = str(e).partition("\n")[0]
        raise SourceError(
            f"transformers cannot build this model ({type(e).__name__}: {reason[:200]})", where=where, hint=hint
        ) from e


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is not ours, at any depth; the model_type of an inner config stays, it selects that one's class.
    Infinities and NaN, which transformers writes as {"__float__": "Infinity"}, are numbers again."""
    inner = tuple(key for key in _NOT_OURS if key != "model_type")
    plain = {key: value for key, value in config.items() if key not in _NOT_OURS}

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(v) for v in value]
        if not isinstance(value, dict):
            return value
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {k: clean(v) for k, v in value.items() if k not in inner}

    return {key: clean(value) for key, value in plain.items()}


def _converted(model: Any) -> tuple[dict[str, bool], tuple[str, ...]]:
    """Modules that would be converted, with whether their weight lies transposed; and the skip list that says so."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    patterns = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    modules: dict[str, bool] = {}
    skipped: dict[str, None] = {}
    for name, module in model.named_modules():
        # The exact type, against the house rule: it is transformers' rule that is asked for.
        linear = type(module) is nn.Linear or isinstance(module, Conv1D)
        if linear and should_convert_module(name, patterns):
            modules[name] = isinstance(module, Conv1D)
        elif linear or (isinstance(module, nn.Embedding) and name in patterns):
            # Named in full, since a reader's rules for patterns differ between versions. The defaults also list norms
            # that merely come last; they could not be converted anyway.
            skipped[name] = None
    return modules, tuple(skipped)


def _linear(module: str, inner: str, transposed: bool) -> Linear:
    """`inner` is the name below the base prefix: "layers.3.self_attn.q_proj"."""
    block = re.match(r"(?:.*?\.)??(\d+)\.(.*)", inner)
    layer, kind = (int(block[1]), block[2]) if block else (-1, inner)
    bare = re.sub(r"\.\d+(?=\.)", "", kind)
    return Linear(module, bare, layer, transposed, expert=re.search(r"experts\.\d+\.", kind) is not None)
