"""Loads a bitsandbytes folder (NF4, FP4, nested or not, LLM.int8()) into a working transformers model.

Most folders go straight to `from_pretrained`. transformers 5 converts only modules whose type is exactly `nn.Linear`
(or `Conv1D`) and merges MoE experts into 3-D parameters before it looks at their quantization, so it cannot load a
quantized Falcon or quantized experts. Those folders are loaded here: the model is built empty, each linear whose
companions are on disk becomes a bitsandbytes layer, and each merged experts module a list of such layers. Which way a
folder goes is decided by comparing the linears that transformers would convert with those that are quantized on disk.

Hazard: on a CPU with AVX512_BF16 the first forward in eval mode repacks every `Linear4bit` in place, computes in
bfloat16 whatever the dtype asked for, and rounds the scales to bfloat16. Never save a model after that: write it anew
from its source. The repacking fails on some shapes, and other CPU code is wrong on some: see `_avoid_cpu_kernels`.
"""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.bnb_folder import COMPANION, Parts, bad_folder, quantized_linears, read_headers, refuse
from quantkit.checkpoint.header import TensorInfo
from quantkit.checkpoint.reader import read_json
from quantkit.errors import SourceError, UsageError
from quantkit.layouts.hf import code_keys
from quantkit.layouts.mistral_params import PARAMS
from quantkit.modules import Names, split_experts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load(folder: str | Path, *, device: str = "cpu", dtype: torch.dtype | str | None = None) -> PreTrainedModel:
    """The model in `folder`, in eval mode on one device, its quantized linears as `Linear4bit` or `Linear8bitLt`.

    `dtype` is that of everything that is not quantized; None takes the one in config.json. Beside the model itself, no
    more than one tensor is held in memory. Code in the folder is never run. Raises SourceError if the folder is not a
    whole, consistent bitsandbytes folder that fits its config.json, and UsageError for an unknown device or dtype.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:  # torch asserts that it was built for the device
        raise UsageError(f"device {device!r}: {str(e).splitlines()[0]}", hint="`cpu`, `cuda`, `cuda:1`, ...") from None
    wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(wanted, torch.dtype) and dtype is not None:
        raise UsageError(f"dtype {dtype!r} is not a torch dtype", hint="`bfloat16`, `float16` or `float32`")
    path = Path(folder)
    if (path / PARAMS).is_file() and not (path / "config.json").is_file():
        raise SourceError(
            "this folder is in Mistral's own layout, which transformers does not read", where=str(path),
            hint=f"quantkit convert {path.name} --to hf -o OUT",
        )  # fmt: skip
    if code := code_keys(read_json(path / "config.json")):
        raise SourceError(
            f"config.json names code to run or to fetch: {', '.join(code)}", where=str(path / "config.json"),
            hint="quantkit writes no such keys; take them out, if you trust the rest",
        )  # fmt: skip
    tensors = read_headers(path)
    quantized = quantized_linears(path, tensors)
    model, quantizer = _empty_model(path, wanted)
    if quantized and quantizer is None:
        raise bad_folder(path / "config.json", f"no quantization_config, though {next(iter(quantized))!r} is quantized")
    names = Names(model)
    if {names.linear(name) for name in quantized} != _converted_by_transformers(model, quantizer):
        _fill(model, path, tensors, quantized, names, quantizer, device)
    else:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            device_map=device,
            dtype=wanted or "auto",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, in our words
            output_loading_info=True,
        )
        refuse(path, report["missing_keys"], "not in the folder")
        refuse(path, report["unexpected_keys"], "not in the model")
        refuse(path, [key for key, *_ in report["mismatched_keys"]], "of another shape than in the model")
    _avoid_cpu_kernels(model)
    return model.eval()


def _empty_model(folder: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, Any]:
    """The model of config.json with its parameters on `meta`, and transformers' quantizer or None."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        settings = getattr(config, "quantization_config", None)
        if settings and settings["quant_method"] != "bitsandbytes":
            raise ValueError(f"quant_method is {settings['quant_method']!r}, not 'bitsandbytes'")
        quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True) if settings else None
        # Buffers stay real: those that are not saved (rotary frequencies) have no other source than the constructor.
        with init_empty_weights(include_buffers=False):
            overrides = {} if dtype is None else {"dtype": dtype}
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **overrides), quantizer
    except Exception as e:  # whatever goes wrong here comes from values in config.json, and takes many types
        fault = f"config.json does not describe a model to load: {' '.join(str(e).split()) or type(e).__name__}"
        hint = "quantkit.load reads bitsandbytes folders of causal language models that transformers knows"
        raise SourceError(fault, where=str(folder / "config.json"), hint=hint) from e


def _converted_by_transformers(model: PreTrainedModel, quantizer: Any) -> set[str]:
    """The linears that `from_pretrained` would turn into bitsandbytes layers."""
    if quantizer is None:
        return set()
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    listed = quantizer.quantization_config.llm_int8_skip_modules
    skipped = quantizer.get_modules_to_not_convert(model, listed, model._keep_in_fp32_modules)
    linears = {n for n, module in model.named_modules() if type(module) is nn.Linear or isinstance(module, Conv1D)}
    return {name for name in linears if should_convert_module(name, skipped)}


def _fill(
    model: PreTrainedModel,
    folder: Path,
    tensors: dict[str, TensorInfo],
    quantized: dict[str, Parts],
    names: Names,
    quantizer: Any,
    device: str,
) -> None:
    """Gives the empty model its weights, in file order: every tensor on disk is used once, every parameter is found."""
    import torch
    from safetensors import safe_open
    from transformers import GenerationConfig

    # What transformers leaves unread too: buffers that old checkpoints carry, layers that no model has.
    ignored = re.compile("|".join([r"rotary_emb\.inv_freq$", *(model._keys_to_ignore_on_load_unexpected or ())]))
    on_disk = [n for n in tensors if not COMPANION.fullmatch(n) and not ignored.search(n)]
    split_experts(model, folder, names, on_disk)
    targets = {name: names.tensor(name) for name in on_disk}
    refuse(folder, [name for name, target in targets.items() if target not in names.known], "not in the model")
    sources = {target: name for name, target in targets.items()}
    refuse(folder, targets.keys() - set(sources.values()), "there under two names, with and without a prefix")
    with ExitStack() as stack:
        files = {info.file for info in tensors.values()}
        shards = {file: stack.enter_context(safe_open(folder / file, framework="pt")) for file in files}

        def read(info: TensorInfo, dtype: torch.dtype | None = None) -> torch.Tensor:
            # A copy, since safetensors hands out a view of the mapped file, which may change or go away.
            value: torch.Tensor = shards[info.file].get_tensor(info.name)
            return value.to(device=device, dtype=dtype, copy=True)

        for name, target in targets.items():
            path, _, leaf = target.rpartition(".")
            if parts := quantized.get(name.removesuffix(".weight")):
                _replace(model, path, parts, read, quantizer.quantization_config, folder)
                continue
            module = model.get_submodule(path)
            empty = getattr(module, leaf)
            _check_shape(folder, tensors[name], tensors[name].shape, empty.shape)
            value = read(tensors[name], empty.dtype)
            if leaf in module._parameters:
                value = torch.nn.Parameter(value, requires_grad=empty.requires_grad)
            setattr(module, leaf, value)
    missing = names.known - sources.keys()
    model.tie_weights(missing_keys=missing, recompute_mapping=False)  # takes away from `missing` what it ties
    refuse(folder, missing, "not in the folder")
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            module._buffers[leaf] = None if buffer is None else buffer.to(device)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    if quantizer is not None:  # as `from_pretrained` marks a quantized model: casts are refused, sizes counted right
        model.hf_quantizer, model.is_quantized = quantizer, True
        model.quantization_method = quantizer.quantization_config.quant_method
        quantizer.postprocess_model(model)


def _check_shape(folder: Path, info: TensorInfo, found: Iterable[int], wanted: Iterable[int]) -> None:
    if tuple(found) != tuple(wanted):
        refuse(folder, [info.name], f"of shape {[*found]}; the model wants {[*wanted]}")


def _replace(
    model: PreTrainedModel,
    path: str,
    parts: Parts,
    read: Callable[[TensorInfo], torch.Tensor],
    settings: Any,
    folder: Path,
) -> None:
    """Puts a bitsandbytes layer with the weights of `parts` in place of the linear at `path`. Its bias stays."""
    import bitsandbytes as bnb
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    old: Any = model.get_submodule(path)
    if not isinstance(old, nn.Linear | Conv1D):
        refuse(folder, [parts["weight"].name], f"quantized, but its module is a {type(old).__name__}")
    # Conv1D holds [in, out]; on disk its quantized weight is [out, in] like any other.
    rows, columns = reversed(old.weight.shape) if isinstance(old, Conv1D) else old.weight.shape
    common = {"bias": False, "device": "meta"}
    new: Any
    data = read(parts["weight"])
    if "SCB" in parts:
        new = bnb.nn.Linear8bitLt(
            columns, rows, has_fp16_weights=False, threshold=settings.llm_int8_threshold, **common
        )
        new.weight = bnb.nn.Int8Params(data, requires_grad=False, CB=data, SCB=read(parts["SCB"]))
        shape = data.shape
    else:
        new = bnb.nn.Linear4bit(columns, rows, compute_dtype=settings.bnb_4bit_compute_dtype, **common)
        companions = {part: read(info) for part, info in parts.items() if part != "weight"}
        new.weight = bnb.nn.Params4bit.from_prequantized(data, companions, device=data.device, module=new)
        new.quant_storage, shape = data.dtype, new.weight.quant_state.shape
    _check_shape(folder, parts["weight"], shape, (rows, columns))
    new.bias, new.source_cls = old.bias, type(old)
    model.set_submodule(path, new)


def _avoid_cpu_kernels(model: PreTrainedModel) -> None:
    """Keeps bitsandbytes 0.50's CPU code away from shapes that it fails on.

    Its AVX512_BF16 layout holds only rows in multiples of 32 and columns in multiples of a block. And its AVX-512
    dequantization takes the wrong scales, from the third row on, where a row does not end with a block: decoded as one
    long row, the same weights come out right.
    """
    import bitsandbytes as bnb

    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit) and layer.weight.quant_state is not None:
            block = layer.weight.quant_state.blocksize
            if layer.out_features % 32 or layer.in_features % block:
                layer.support_avx512bf16_for_cpu = False
            if layer.in_features % block and layer.weight.device.type == "cpu":
                layer.forward = types.MethodType(_forward_as_one_row, layer)


def _forward_as_one_row(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """x [..., in] → [..., out], in x's dtype."""
    import torch
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(layer.weight.quant_state)
    state.shape = torch.Size((1, state.shape.numel()))
    weight = dequantize_4bit(layer.weight.data, state).view(layer.out_features, layer.in_features)
    bias = None if layer.bias is None else layer.bias.to(weight.dtype)
    return torch.nn.functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)
