"""recipe × source headers × architecture × target layout → Plan. Reads headers and config only; imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from quantkit import architectures
from quantkit.architectures import Linear
from quantkit.calibration.data import Tokens, load_tokens
from quantkit.checkpoint.header import FLOATS, TensorInfo, TensorSpec, aligned_order, build_header, quote
from quantkit.checkpoint.reader import read_json
from quantkit.checkpoint.torch_zip_writer import plan_torch_zip
from quantkit.checkpoint.views import SourceTensor, plain
from quantkit.errors import SourceError, UsageError
from quantkit.job_memory import memory_of, streams_of
from quantkit.layouts import Checkpoint, Target, make_hf_target, mistral_target
from quantkit.layouts.base import MANIFEST as MANIFEST_NAME
from quantkit.layouts.hf import index_text
from quantkit.measurement import ROWS, Measurement
from quantkit.methods.base import WeightSpec
from quantkit.plans import (
    CARD,
    CONFIG,
    COPY,
    GENERATED,
    INDEX,
    MANIFEST,
    WEIGHTS,
    Origin,
    Plan,
    PlannedFile,
    Shard,
    Unit,
    digest,
)
from quantkit.plots import ALLOCATION, allocation_plot, can_plot
from quantkit.pruning import NAMES, Prune
from quantkit.publication import Measured, draft_manifest, finish_manifest, manifest_text, render_from_manifest
from quantkit.recipe import Recipe
from quantkit.selection import Chosen, choose, find_linears, misfits, spec_of, specs_of, to_quantize, unknown
from quantkit.version import __version__

# Tensor names that only a quantized checkpoint has.
QUANTIZED_MARKS = (".qweight", ".qzeros", ".weight.absmax", ".SCB", ".weight_scale", ".weight_scale_inv", ".q_weight",
                   ".weight_packed", ".weight.quant_map")  # fmt: skip
# Where config.json says how long a text may be.
CONTEXTS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_SINGLE_ROW = (
    "with a single calibration row none is left to judge a step toward the full-precision model by: nothing is aimed "
    "at it",
)
_ASSUMED = (
    "bits are not measured yet: which linears get how many is a stand-in, within the same budget, and sizes are near "
    "what they will be. A run measures first, or `quantkit measure` does; a plan with that is exact",
)
_NO_PLOT = ("no plot of the bits without matplotlib: `pip install quantkit[plot]`",)
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


def source_tensors(checkpoint: Checkpoint) -> list[SourceTensor]:
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
        tensors.append(plain(TensorInfo(name, dtype, shape, file, 0)))
    return tensors


def make_plan(
    recipe: Recipe, checkpoint: Checkpoint, origin: Origin, *, quiet: bool = True, measured: Measurement | None = None
) -> Plan:
    """The plan. Raises SourceError or UsageError where the job cannot be done. measured: for a method that mixes
    bits, what its linears lose; without, a stand-in decides."""
    if (how := quantized_already(checkpoint)) is not None:
        reason = "the source is quantized already"
        if recipe.convert is not None:
            reason = "packed weights cannot change their layout: their rows are not theirs alone any more"
        raise SourceError(f"{reason} ({how})", where=str(checkpoint.folder), hint="name the unquantized parent instead")
    target = target_of(recipe, checkpoint)
    tensors = [t for t in source_tensors(checkpoint) if t.name in target.names]
    chosen, tokens = Chosen(), None
    if recipe.quantize is not None or recipe.prune is not None:
        _check_device(recipe)
        chosen = choose(recipe, checkpoint, tensors, None if measured is None else measured.losses)
        if chosen.allocation is not None and measured is not None:
            chosen = replace(chosen, allocation=replace(chosen.allocation, text=measured.text, tokens=measured.tokens))
        if recipe.quantize is not None:
            quantize = recipe.quantize.model_copy(update={"params": chosen.params})
            recipe = recipe.model_copy(update={"quantize": quantize})
        recipe, tokens = _calibrate(recipe, checkpoint, target, quiet=quiet)
        if tokens is not None and recipe.needs == "nothing":  # they are looked at to measure losses, and no further
            tokens = tokens.first(ROWS)
    units = [_unit(t, chosen, recipe, target, str(checkpoint.folder)) for t in tensors]
    _refuse_twice(units, str(checkpoint.folder))
    shards, units = _shard(units, recipe, target)
    config = dict(target.config)
    if recipe.quantize is not None:
        method = recipe.quantize.implementation
        compute = next(u.weight.dtype for u in units if u.quantized and u.weight is not None)
        config |= method.reader_config(config)
        config["quantization_config"] = method.config(recipe.quantize.params, compute, chosen.selection)
        extra = method.extra_files(config["quantization_config"])
        target = replace(target, generated={**target.generated, **extra, **_plot(units, chosen)})
    warnings = [
        *checkpoint.notes,
        *(checkpoint.config_notes if target.layout == "hf" else ()),
        *target.notes,
        *(tokens.doubts if tokens is not None else ()),
        *(_SINGLE_ROW if tokens is not None and len(tokens.ids) == 1 and "full" in streams_of(recipe, tokens) else ()),
        *misfits(checkpoint, tensors, chosen),
        *unknown(tensors, chosen),
        *_sparse_parent(checkpoint, recipe),
        *(_ASSUMED if chosen.allocation is not None and chosen.allocation.assumed else ()),
        *(_NO_PLOT if chosen.allocation is not None and not can_plot() else ()),
        *_warnings(units, recipe, chosen, target, len(shards)),
    ]
    identity = digest(
        {
            "quantkit": __version__,
            "recipe": recipe.canonical(),
            "origin": [origin.name, origin.base_model, origin.revision],
            "files": [[f.name, f.nbytes, f.identity] for f in checkpoint.files],
            "side_files": checkpoint.side_files,
            "config": config,
            "recorded": target.recorded,
            "generated": {name: hashlib.sha256(data).hexdigest() for name, data in target.generated.items()},
            "card": digest(checkpoint.parent_card),
            "tokens": None if tokens is None else tokens.sha256,
            "tensors": [[[t.name, t.dtype, list(t.shape)], t.file, t.offset] for u in units for t in u.outputs],
        }
    )
    plan = Plan(
        recipe, origin, chosen.architecture or str(checkpoint.config.get("model_type")), identity, tuple(units), shards,
        (), config, target.layout, target.config_file, target.index_file, target.copies, target.generated,
        memory_of(units, recipe, chosen, target, checkpoint, tokens), tuple(warnings), {},
        tokens, streams_of(recipe, tokens), chosen.allocation,
    )  # fmt: skip
    loader, _ = _loader(recipe, chosen, target)
    draft = draft_manifest(plan, checkpoint, target, chosen.selection, loader)
    plan = replace(plan, draft=draft)
    return replace(plan, files=tuple(_files(plan)))


def _plot(units: Sequence[Unit], chosen: Chosen) -> dict[str, bytes]:
    """How bits are spread over layers, as a figure."""
    if chosen.allocation is None or not can_plot():
        return {}
    linears = [
        (linear.layer, linear.kind, 8 * sum(t.nbytes for t in u.outputs) / u.source.numel, u.source.numel)
        for u in units
        if (linear := chosen.mixed.get(u.name)) is not None
    ]
    return {ALLOCATION: allocation_plot(linears)}


def _loader(recipe: Recipe, chosen: Chosen, target: Target) -> tuple[str, str]:
    """Which program the card shows for loading the result, and what is to be said of others."""
    if target.layout != "hf":
        return "mistral-inference", ""
    if recipe.quantize is None:
        return "transformers", ""
    if (known := recipe.quantize.implementation.loader) is not None:
        return known(chosen.architecture, recipe.quantize.params)
    return "quantkit" if chosen.warning else "transformers", chosen.warning


def target_of(recipe: Recipe, checkpoint: Checkpoint, *, tokenizer: bool = True) -> Target:
    """What the recipe makes of the checkpoint beside its weights. `tokenizer=False` leaves the tokenizer out."""
    convert = recipe.convert
    if convert is not None and convert.to == "mistral":
        if recipe.native.context is not None:
            raise UsageError("a native folder has no place for a context length", hint="leave --context out")
        return mistral_target(
            checkpoint,
            profile=convert.profile,
            weights_format=convert.weights_format,
            tokenizer=convert.tokenizer and tokenizer,
        )
    if not tokenizer or (convert is not None and not convert.tokenizer):
        return make_hf_target(checkpoint, tokenizer="none")
    return make_hf_target(checkpoint, tokenizer="if there is one" if convert is None else "required")


def _check_device(recipe: Recipe) -> None:
    method = recipe.quantize.implementation if recipe.quantize is not None else None
    if method is None and recipe.needs == "nothing" and recipe.resources.device != "cpu":
        raise UsageError(
            f"magnitude pruning does not compute on {recipe.resources.device!r}", hint="leave --device out"
        )
    if method is not None and recipe.resources.device.partition(":")[0] not in method.devices:
        raise UsageError(
            f"{method.name} with {method.bits} bits does not encode on {recipe.resources.device!r}",
            hint=f"use --device {' or '.join(method.devices)}",
        )


def linears_to_mix(recipe: Recipe, checkpoint: Checkpoint) -> tuple[list[Linear], list[WeightSpec], Any]:
    """The linears that a method takes which mixes bits, and its parameters with nothing left open but the mixes."""
    assert recipe.quantize is not None
    tensors = [t for t in source_tensors(checkpoint) if t.name in target_of(recipe, checkpoint).names]
    linears, skip, name, warning = find_linears(checkpoint, [t.name for t in tensors])
    found = to_quantize(recipe.quantize, checkpoint, tensors, Chosen({}, {}, linears, (), name, warning), skip)
    return list(found.quantized.values()), specs_of(tensors, found.quantized, str(checkpoint.folder)), found.params


def tokens_for(recipe: Recipe, checkpoint: Checkpoint) -> Tokens:
    """The calibration text of a recipe."""
    tokens = _calibrate(recipe, checkpoint, target_of(recipe, checkpoint), quiet=True)[1]
    assert tokens is not None
    return tokens


def _calibrate(recipe: Recipe, checkpoint: Checkpoint, target: Target, *, quiet: bool) -> tuple[Recipe, Tokens | None]:
    """The tokens that a calibrated method looks at; the recipe with the text's public name, and nothing left open."""
    if recipe.calibration is None:
        return recipe, None
    vocabulary = checkpoint.config.get("vocab_size")
    if type(vocabulary) is not int:
        raise SourceError(
            "config.json has no vocab_size, so tokens cannot be checked", where=str(checkpoint.folder),
            hint="a calibrated method needs a causal language model; try --method rtn",
        )  # fmt: skip
    context = next((n for k in CONTEXTS if type(n := checkpoint.config.get(k)) is int), None)
    tokenizer = target.generated.get("tokenizer.json", checkpoint.folder)
    tokens = load_tokens(recipe.calibration, tokenizer, vocab_size=vocabulary, context=context, quiet=quiet)
    public = {"length": tokens.ids.shape[1], "text": tokens.name if recipe.calibration.text is not None else None}
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update=public)}), tokens


def _unit(source: SourceTensor, chosen: Chosen, recipe: Recipe, target: Target, where: str) -> Unit:
    # Offsets and files of the outputs are filled in by _shard.
    quantized, pruned = source.name in chosen.quantized, source.name in chosen.pruned
    head_dim = 0 if quantized else target.head_dims.get(source.name, 0)
    outputs: tuple[TensorInfo, ...] = (TensorInfo(target.names[source.name], source.dtype, source.shape, "", 0),)
    if not (quantized or pruned):
        others = recipe.quantize.implementation.others if recipe.quantize is not None else None
        if others is not None and source.dtype in FLOATS:
            outputs = (replace(outputs[0], dtype=others),)
        granule = math.lcm(source.granule, head_dim * source.columns or 1)
        return Unit(source, outputs, head_dim=head_dim, granule=granule)
    linear = chosen.quantized[source.name] if quantized else chosen.pruned[source.name]
    weight = spec_of(source, linear, where)
    granule = 0
    if quantized and recipe.quantize is not None:
        method, params = recipe.quantize.implementation, recipe.quantize.params
        outputs = tuple(TensorInfo(s.name, s.dtype, s.shape, "", 0) for s in method.outputs(weight, params))
        own = method.granule(weight)
        granule = 0 if linear.transposed or not own or not source.granule else math.lcm(source.granule, own)
    calibrated = recipe.needs != "nothing" and linear.layer >= 0
    if calibrated or pruned:
        granule = source.granule if calibrated else 0
    return Unit(source, outputs, linear, weight, head_dim, granule, calibrated, quantized, pruned)


def _refuse_twice(units: Sequence[Unit], where: str) -> None:
    written = Counter(t.name for u in units for t in u.outputs)
    if (twice := next((name for name, n in written.items() if n > 1), None)) is not None:
        raise SourceError(
            f"the source holds {quote(twice)}, a name that quantizing would give to another tensor",
            where=where, hint="the source is quantized already, or its tensors need other names",
        )  # fmt: skip


def _shard(units: list[Unit], recipe: Recipe, target: Target) -> tuple[tuple[Shard, ...], list[Unit]]:
    """Fills shards greedily in the units' order; what belongs to one linear stays in one file."""
    groups: list[list[Unit]] = [[]]
    filled = 0
    limit = recipe.largest_file
    for unit in units:
        size = sum(t.nbytes for t in unit.outputs)
        if groups[-1] and limit is not None and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(unit)
        filled += size
    if len(groups) > 1 and target.container == "pth":
        raise UsageError(
            f"a {target.single} is one file of {sum(t.nbytes for u in units for t in u.outputs):,} bytes",
            hint="leave --shard-size out, or take --weights-format safetensors",
        )
    shards, placed = [], []
    for number, group in enumerate(groups, 1):
        name = target.single if len(groups) == 1 else target.numbered.format(number, len(groups))
        shard = _lay_out(name, [t for u in group for t in u.outputs], target)
        at = {t.name: t for t in shard.tensors}
        shards.append(shard)
        placed += [replace(u, outputs=tuple(at[t.name] for t in u.outputs)) for u in group]
    return tuple(shards), placed


def _lay_out(name: str, tensors: Sequence[TensorSpec], target: Target) -> Shard:
    def at(specs: Sequence[TensorSpec], offsets: Sequence[int]) -> tuple[TensorInfo, ...]:
        return tuple(TensorInfo(s.name, s.dtype, s.shape, name, o) for s, o in zip(specs, offsets, strict=True))

    if target.container == "pth":
        layout = plan_torch_zip(tensors, folder=name.rpartition(".")[0])
        return Shard(name, layout.fixed, layout.nbytes, at(tensors, layout.offsets), layout)
    specs = aligned_order(tensors)
    header, offsets = build_header(specs)
    return Shard(name, ((0, header),), offsets[-1] + specs[-1].nbytes, at(specs, offsets))


def _sparse_parent(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    """Whether a parent that quantkit pruned is to be quantized without a word about its zeros."""
    if recipe.quantize is None or recipe.prune is not None or not (checkpoint.folder / MANIFEST_NAME).is_file():
        return []
    try:
        prune = Prune.model_validate(read_json(checkpoint.folder / MANIFEST_NAME)["recipe"]["prune"])
    except (SourceError, KeyError, TypeError, ValueError):
        return []
    if not recipe.quantize.implementation.solve:
        return []
    return [
        f"the source is pruned ({NAMES[prune.method]}, {prune.requested}), and {recipe.quantize.method} gives values "
        "back to pruned weights: zeros are lost, and patterns broken. A recipe with a prune block and a quantize block "
        "keeps them, starting from the dense parent"
    ]


def _warnings(units: Sequence[Unit], recipe: Recipe, chosen: Chosen, target: Target, shards: int) -> list[str]:
    _, about_loaders = _loader(recipe, chosen, target)
    warnings = [about_loaders] if about_loaders else []
    if recipe.quantize is not None:
        warnings += recipe.quantize.implementation.reader_notes(chosen.selection, recipe.quantize.params)
    by_reason: dict[str, list[str]] = {}
    for module, why in chosen.refused.items():
        by_reason.setdefault(why, []).append(module)
    linears = len(chosen.refused) + len(chosen.selection.encoded)
    for why, modules in by_reason.items():
        warnings.append(f"{len(modules):,} of {linears:,} linears left dense, such as {modules[0]}, which {why}")
    odd = [u for u in units if u.weight is not None and (u.weight.columns % 64 or u.weight.rows % 32)]
    if odd and recipe.quantize is not None and recipe.quantize.method == "bnb" and recipe.quantize.bits == 4:
        warnings.append(
            f"{len(odd)} layers have a width that 64 does not divide, or a height that 32 does not ({odd[0].name}): on "
            "CPUs with AVX-512, bitsandbytes 0.50 fails on them or computes wrong numbers; load with quantkit.load "
            "there, or use a GPU"
        )
    if "auto_map" in target.stripped:
        warnings.append("auto_map was taken out of config.json: the model's own Python code is not copied and not run")
    if target.layout == "mistral" and shards > 1:
        warnings.append(f"mistral-inference reads a single {target.single}; vLLM reads these {shards} files too")
    return warnings


def config_text(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def weight_map(plan: Plan) -> dict[str, str]:
    return {t.name: shard.name for shard in plan.shards for t in shard.tensors}


def _files(plan: Plan) -> list[PlannedFile]:
    files = [PlannedFile(s.name, s.nbytes, WEIGHTS) for s in plan.shards]
    if len(plan.shards) > 1:
        files.append(PlannedFile(plan.index_file, len(index_text(weight_map(plan), plan.weight_bytes)), INDEX))
    files += [PlannedFile(file.name, file.nbytes, COPY) for file in plan.copies]
    files += [PlannedFile(name, len(data), GENERATED) for name, data in plan.generated.items()]
    files.append(PlannedFile(plan.config_file, len(config_text(plan.config)), CONFIG))
    # Manifest and card are rendered here once with stand-ins of the same width as what the run will measure.
    manifest = finish_manifest(plan.draft, Measured.placeholder(plan, files), files)
    files.append(PlannedFile("quantkit.json", len(manifest_text(manifest)), MANIFEST))
    files.append(PlannedFile("README.md", len(render_from_manifest(manifest, plan.config).encode()), CARD))
    return files
