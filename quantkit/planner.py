"""recipe × source headers × architecture → Plan. Reads headers and config only; imports no torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from quantkit import architectures
from quantkit.architectures import Linear
from quantkit.checkpoint.header import FLOATS, TensorInfo, TensorSpec, aligned_order, build_header, quote
from quantkit.errors import SourceError, UsageError
from quantkit.layouts import Checkpoint
from quantkit.layouts.hf import SAFETENSORS_INDEX, index_text
from quantkit.memory import plan_memory
from quantkit.methods.base import WeightSpec
from quantkit.patterns import select
from quantkit.plans import CARD, CONFIG, COPY, INDEX, MANIFEST, WEIGHTS, Origin, Plan, PlannedFile, Shard, Unit, digest
from quantkit.publication import Measured, draft_manifest, finish_manifest, manifest_text, render_from_manifest
from quantkit.recipe import Recipe
from quantkit.version import __version__

# Tensor names that only a quantized checkpoint has.
QUANTIZED_MARKS = (".qweight", ".qzeros", ".weight.absmax", ".SCB", ".weight_scale", ".weight_scale_inv", ".q_weight",
                   ".weight_packed", ".weight.quant_map")  # fmt: skip
CONFIG_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def quantized_already(checkpoint: Checkpoint) -> str | None:
    """How the source is quantized, in words, or None."""
    block = checkpoint.config.get("quantization_config")
    if isinstance(block, dict):
        return str(block.get("quant_method", "a quantization_config without quant_method"))
    for name in (*checkpoint.tensors, *checkpoint.absent):
        if name.endswith(QUANTIZED_MARKS):
            return f"tensor {name!r}"
    return None


def source_tensors(checkpoint: Checkpoint) -> list[TensorInfo]:
    """All tensors of the source; those in absent files with the shapes that the config implies. SourceError if the
    architecture has no row to say them."""
    tensors = list(checkpoint.tensors.values())
    if not checkpoint.absent:
        return tensors
    row = architectures.find(checkpoint.config)
    if row is None:
        raise SourceError(
            "the weights are absent, and this architecture's shapes are not known from its config alone",
            where=str(checkpoint.folder), hint="fetch the weight files, or at least their headers",
        )  # fmt: skip
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    dtype = CONFIG_DTYPES.get(str(named))
    if dtype is None:
        raise SourceError(
            f"config.json gives dtype {named!r}, so the absent weights' sizes are not known",
            where=str(checkpoint.folder),
        )
    for name, file in checkpoint.absent.items():
        shape = architectures.expected_shape(row, checkpoint.config, name)
        if shape is None:
            raise SourceError(
                f"tensor {name!r} of the index is unknown to the {row.name} architecture", where=str(checkpoint.folder)
            )
        tensors.append(TensorInfo(name, dtype, shape, file, 0))
    return tensors


def find_linears(checkpoint: Checkpoint, names: Sequence[str]) -> tuple[list[Linear], tuple[str, ...], str, str]:
    """Linears to encode, modules for `llm_int8_skip_modules`, the architecture's name, and its reader warning."""
    row = architectures.find(checkpoint.config)
    if row is not None:
        found = architectures.linears(row, checkpoint.config, names)
        skip = architectures.skip_modules(row, checkpoint.config)
        return found, skip, row.name, row.warning
    from quantkit.derived_architecture import derive  # asks transformers, and so imports torch

    found, skip = derive(checkpoint.config, names)
    return found, skip, str(checkpoint.config.get("model_type")), ""


def make_plan(recipe: Recipe, checkpoint: Checkpoint, origin: Origin) -> Plan:
    """The plan. Raises SourceError or UsageError where the job cannot be done."""
    where = str(checkpoint.folder)
    if (how := quantized_already(checkpoint)) is not None:
        raise SourceError(
            f"the source is quantized already ({how})", where=where, hint="name the unquantized parent instead"
        )
    tensors = source_tensors(checkpoint)
    linears, skip_modules, name, warning = find_linears(checkpoint, [t.name for t in tensors])
    modules = [t.name.removesuffix(".weight") for t in tensors if t.name.endswith(".weight")]
    left_out = select(modules, recipe.quantize.skip)
    chosen = {f"{linear.module}.weight": linear for linear in linears if linear.module not in left_out}
    if not chosen:
        raise SourceError(
            f"nothing is left to quantize: {len(linears)} linear layers found, all of them skipped",
            where=where, hint="check --skip, and that config.json belongs to these weights",
        )  # fmt: skip
    skipped = tuple(dict.fromkeys((*skip_modules, *sorted(x.module for x in linears if x.module in left_out))))
    units = [_unit(t, chosen.get(t.name), recipe, where) for t in tensors]
    written = Counter(t.name for u in units for t in u.outputs)
    if (twice := next((name for name, n in written.items() if n > 1), None)) is not None:
        raise SourceError(
            f"the source holds {quote(twice)}, a name that quantizing would give to another tensor",
            where=where, hint="the source is quantized already, or its tensors need other names",
        )  # fmt: skip
    shards, units = _shard(units, recipe.shard_size)
    config, stripped = checkpoint.output_config()
    method = recipe.quantize.implementation
    if recipe.resources.device.partition(":")[0] not in method.devices:
        raise UsageError(
            f"{method.name} with {method.bits} bits does not encode on {recipe.resources.device!r}",
            hint=f"use --device {' or '.join(method.devices)}",
        )
    compute = next(u.weight.dtype for u in units if u.weight is not None)
    config["quantization_config"] = method.config(recipe.quantize.params, compute, skipped)
    warnings = [*_misfits(checkpoint, tensors, linears), *_warnings(units, recipe, warning, stripped)]
    memory = plan_memory(
        (
            (u.source, u.linear.transposed, method.granule(u.weight))
            for u in units
            if u.linear is not None and u.weight is not None
        ),
        tensors=sum(len(u.outputs) for u in units),
        threads=recipe.resources.threads,
        limit=recipe.resources.max_memory,
        device=recipe.resources.device,
        derived=architectures.find(checkpoint.config) is None,
    )
    identity = digest(
        {
            "quantkit": __version__,
            "recipe": recipe.canonical(),
            "origin": [origin.name, origin.base_model, origin.revision],
            "files": [[f.name, f.nbytes, f.identity] for f in checkpoint.files],
            "side_files": checkpoint.side_files,
            "config": config,
            "card": digest(checkpoint.parent_card),
            "tensors": [[[t.name, t.dtype, list(t.shape)], t.file, t.offset] for u in units for t in u.outputs],
        }
    )
    plan = Plan(recipe, origin, name, identity, tuple(units), shards, (), config, memory, tuple(warnings), {})
    plan = replace(
        plan, draft=draft_manifest(plan, checkpoint, skipped, stripped, "quantkit" if warning else "transformers")
    )
    return replace(plan, files=tuple(_files(plan, checkpoint)))


def _unit(source: TensorInfo, linear: Linear | None, recipe: Recipe, where: str) -> Unit:
    # Offsets and files of the outputs are filled in by _shard.
    if linear is None:
        return Unit(source, (TensorInfo(source.name, source.dtype, source.shape, "", 0),))
    if source.dtype not in FLOATS or len(source.shape) != 2 or not source.numel:
        raise SourceError(
            f"tensor {source.name!r} is {source.dtype} {list(source.shape)}: no 16- or 32-bit float matrix",
            where=f"{where}/{source.file}", hint="name the unquantized parent, or leave the tensor alone with --skip",
        )  # fmt: skip
    rows, columns = reversed(source.shape) if linear.transposed else source.shape
    weight = WeightSpec(linear.module, source.dtype, rows, columns)
    method = recipe.quantize.implementation
    outputs = tuple(TensorInfo(s.name, s.dtype, s.shape, "", 0) for s in method.outputs(weight, recipe.quantize.params))
    return Unit(source, outputs, linear, weight)


def _shard(units: list[Unit], shard_size: int) -> tuple[tuple[Shard, ...], list[Unit]]:
    """Fills shards greedily in the units' order; what belongs to one linear stays in one file."""
    groups: list[list[Unit]] = [[]]
    filled = 0
    for unit in units:
        size = sum(t.nbytes for t in unit.outputs)
        if groups[-1] and filled + size > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(unit)
        filled += size
    shards, placed = [], []
    for number, group in enumerate(groups, 1):
        name = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        specs: list[TensorSpec] = aligned_order([t for u in group for t in u.outputs])
        header, offsets = build_header(specs)
        at = {s.name: TensorInfo(s.name, s.dtype, s.shape, name, o) for s, o in zip(specs, offsets, strict=True)}
        end = offsets[-1] + specs[-1].nbytes
        shards.append(Shard(name, header, end, tuple(at.values())))
        placed += [replace(u, outputs=tuple(at[t.name] for t in u.outputs)) for u in group]
    return tuple(shards), placed


def _misfits(checkpoint: Checkpoint, tensors: Sequence[TensorInfo], linears: Sequence[Linear]) -> list[str]:
    """Where config.json and the weights contradict each other: what is written then will not load, or not work."""
    row = architectures.find(checkpoint.config)
    if row is None:
        return []
    found = []
    for t in tensors:
        shape = architectures.expected_shape(row, checkpoint.config, t.name)
        if shape is not None and shape != t.shape:
            found.append(f"tensor {quote(t.name)} is {list(t.shape)}, config.json makes it {list(shape)}")
    layers = len({x.layer for x in linears if x.layer >= 0})
    stated = checkpoint.config.get("num_hidden_layers", checkpoint.config.get("n_layer"))
    if type(stated) is int and stated != layers:
        found.append(f"config.json speaks of {stated:,} layers, the weights hold {layers:,}")
    kinds = Counter(x.kind for x in linears if x.layer >= 0 and not x.expert)
    # With experts, a layer may be of one kind or the other.
    odd = [kind for kind, n in kinds.items() if n != layers and not any(x.expert for x in linears)]
    if odd:
        found.append(f"{odd[0]} is there in {kinds[odd[0]]} of {layers} layers: the checkpoint is incomplete")
    return [f"the weights do not fit config.json: {what}" for what in found[:3]]


def _warnings(units: Sequence[Unit], recipe: Recipe, reader: str, stripped: Sequence[str]) -> list[str]:
    warnings = [reader] if reader else []
    odd = [u for u in units if u.weight is not None and (u.weight.columns % 64 or u.weight.rows % 32)]
    if odd and recipe.quantize.bits == 4:
        warnings.append(
            f"{len(odd)} layers have a width that 64 does not divide, or a height that 32 does not ({odd[0].name}): on "
            "CPUs with AVX-512, bitsandbytes 0.50 fails on them or computes wrong numbers; load with quantkit.load "
            "there, or use a GPU"
        )
    if "auto_map" in stripped:
        warnings.append("auto_map was taken out of config.json: the model's own Python code is not copied and not run")
    return warnings


def config_text(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def weight_map(plan: Plan) -> dict[str, str]:
    return {t.name: shard.name for shard in plan.shards for t in shard.tensors}


def _files(plan: Plan, checkpoint: Checkpoint) -> list[PlannedFile]:
    files = [PlannedFile(s.name, s.nbytes, WEIGHTS) for s in plan.shards]
    if len(plan.shards) > 1:
        files.append(PlannedFile(SAFETENSORS_INDEX, len(index_text(weight_map(plan), plan.weight_bytes)), INDEX))
    files += [PlannedFile(name, size, COPY) for name, size in checkpoint.side_files]
    files.append(PlannedFile("config.json", len(config_text(plan.config)), CONFIG))
    # Manifest and card are rendered here once with stand-ins of the same width as what the run will measure.
    manifest = finish_manifest(plan.draft, Measured.placeholder(plan, files), files)
    files.append(PlannedFile("quantkit.json", len(manifest_text(manifest)), MANIFEST))
    files.append(PlannedFile("README.md", len(render_from_manifest(manifest, plan.config).encode()), CARD))
    return files
