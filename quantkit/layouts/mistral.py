"""The layout of Mistral's own programs (mistral-src, mistral-inference): params.json, consolidated weights, one
tokenizer file.

Facts: names and shapes of mistral-src 09-2023 to mistral-inference 1.6. Rows of wq and wk are stored in pairs
(kernels/rope); the heads' size is head_dim, never dim / n_heads. No biases.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from quantkit.checkpoint.header import TensorInfo, quote
from quantkit.checkpoint.reader import WeightFile, read_json, read_weight_files, safe_path
from quantkit.checkpoint.views import SourceTensor
from quantkit.errors import SourceError, UsageError
from quantkit.layouts.base import (
    MANIFEST,
    Checkpoint,
    CopiedFile,
    NativeOptions,
    Target,
    record,
    recorded_configuration,
)
from quantkit.layouts.hf import CONFIG, LICENCE_FILES, match_index, read_index, side_files
from quantkit.layouts.mistral_config import (
    Facts,
    config_of_facts,
    context_of_config,
    context_of_params,
    default_context,
    facts_of_config,
    facts_of_params,
    generation,
    native_quantization,
    params_of_facts,
    restore_config,
    restore_params,
)
from quantkit.layouts.mistral_names import (
    BUFFERS,
    HEAD,
    ROTARY,
    STACKED,
    STACKED_GATE,
    VISION,
    check_complete,
    table_of,
)
from quantkit.layouts.mistral_params import PARAMS
from quantkit.layouts.names import pattern_of
from quantkit.tokenization import native_tokenizer

INDEX = "consolidated.safetensors.index.json"
WEIGHTS = re.compile(r"consolidated(?:\.\d\d\.pth?|(?:-\d{5}-of-\d{5})?\.safetensors)")
TOKENIZER = re.compile(r"tokenizer\.model(?:\.v\d+(?:m\d+)?)?|tekken\.json")


# The tokenizer once more, as transformers reads it.
_SAME = re.compile(rf"{TOKENIZER.pattern}|tokenizer(?:_config)?\.json|special_tokens_map\.json")


# ------------------------------------------------------------------------------------------------------------- reading


def open_mistral(folder: Path, options: NativeOptions, *, data_present: bool = True) -> Checkpoint:
    """Reads params, headers and an index if there is one. Raises SourceError, naming the file at fault."""
    params, where = read_params(folder), str(folder / PARAMS)
    facts, notes = facts_of_params(params, where=where, rope_theta=options.rope_theta, text_only=options.text_only)
    check_plain(params, where)
    stored, files = _stored(folder, data_present=data_present)
    tensors, dropped, more = _canonical(stored, facts, folder, options)
    if (said := native_quantization(params)) is not None:
        more.insert(0, f"{PARAMS} announces {said}")
    config, about = make_config(facts, params, options, _dtype(tensors), folder)
    check_complete(facts, config, tensors, where=str(folder), native=True)
    return Checkpoint(
        folder, "mistral", config, {t.name: t for t in tensors}, files, {}, None, side_files(folder),
        params=params, generation=generation(facts), dropped=tuple(dropped), notes=(*notes, *more),
        config_notes=tuple(about),
    )  # fmt: skip


def read_params(folder: Path) -> dict[str, Any]:
    if not (folder / PARAMS).exists():
        raise SourceError(
            f"the folder has consolidated weights and no {PARAMS}", where=str(folder),
            hint="fetch it from where the weights come from: nothing else says the number of heads",
        )  # fmt: skip
    return read_json(safe_path(folder, PARAMS))


def check_plain(params: Mapping[str, Any], where: str) -> None:
    """SourceError for NaN or an infinity in a key that nothing else reads: Python's JSON alone lets it pass."""
    if not record(PARAMS, params):
        raise SourceError(
            f"{PARAMS} holds NaN or an infinity, which is no JSON", where=where, hint="fetch the original file"
        )


def weight_names(folder: Path) -> list[str]:
    """The one set of consolidated files. SourceError where there are two, none, or a gap in the numbers."""
    found = sorted(p.name for p in folder.iterdir() if WEIGHTS.fullmatch(p.name))
    if not found:
        raise SourceError(
            f"the folder has {PARAMS} and no consolidated weights", where=str(folder),
            hint="fetch consolidated.safetensors or consolidated.00.pth",
        )  # fmt: skip
    kinds = {re.sub(r"\d+", "N", name): name for name in found}
    if len(kinds) > 1:
        one, other, *_ = kinds.values()
        raise SourceError(
            f"{one} and {other} are both there: which are the weights?",
            where=str(folder), hint="keep one of them: Mistral's own programs refuse such a folder too",
        )  # fmt: skip
    numbers = [[int(n) for n in re.findall(r"\d+", name)] for name in found]
    # consolidated.00.pth counts from 0 and does not say how many; consolidated-00001-of-00003 counts from 1 and does.
    first = 1 if len(numbers[0]) == 2 else 0
    count = max((n[-1] for n in numbers if n), default=0) + 1 - first
    if first and len({n[-1] for n in numbers}) > 1:
        raise SourceError(
            f"the weights are numbered in two ways, for example {found[0]} and {found[-1]}",
            where=str(folder), hint="keep the files of one download only",
        )  # fmt: skip
    missing = [i for i in range(first, first + count) if numbers[0] and i not in [n[0] for n in numbers]]
    if missing:
        raise SourceError(
            f"the weights are numbered, and number {missing[0]} is missing ({len(found)} of {count} are there)",
            where=str(folder), hint="the download is incomplete: fetch it again",
        )  # fmt: skip
    return found


def _stored(folder: Path, *, data_present: bool) -> tuple[list[TensorInfo], tuple[WeightFile, ...]]:
    names = weight_names(folder)
    stored, files = read_weight_files(folder, names, data_present=data_present)
    if (folder / INDEX).exists() and len(names) > 1:
        match_index(folder, read_index(folder, INDEX)[0], stored)
    return stored, tuple(files)


def _canonical(
    stored: Iterable[TensorInfo], facts: Facts, folder: Path, options: NativeOptions
) -> tuple[list[SourceTensor], list[str], list[str]]:
    """The model's tensors, the names of what is left out, and notes about both."""
    stored = list(stored)
    table = table_of(facts)
    scales = {t.name.removesuffix(".qscale_weight"): t for t in stored if t.name.endswith(".qscale_weight")}
    found: list[SourceTensor] = []
    dropped: list[str] = []
    notes: list[str] = []
    for info in stored:
        module, _, leaf = info.name.rpartition(".")
        if leaf == "qscale_weight":
            continue
        seeing = options.text_only and info.name.startswith(VISION)
        if seeing or leaf == "qscale_act" or BUFFERS.fullmatch(info.name):
            dropped.append(info.name)
        elif (canonical := table.canonical(info.name)) is not None:
            if canonical == HEAD and facts.tied:
                dropped.append(info.name)
                notes.append(f"{info.name} is left out: {PARAMS} says that the head is the embedding")
                continue
            scale = scales.pop(module, None) if info.dtype.startswith("F8") else None
            found.append(_view(canonical, info, facts, scale, folder))
        elif facts.experts and (several := _stacked(info, facts, folder)):
            found += several
        else:
            raise _unknown(info, folder)
    dropped += [scale.name for scale in scales.values()]  # of what is not there, or no FP8
    if decoded := sum(t.scales is not None for t in found):
        notes.append(f"{decoded} tensors are stored in FP8 and are decoded to bfloat16, without activation scales")
    vision = sum(name.startswith(VISION) for name in dropped)
    if vision:
        notes.append(f"the vision part is left out: {vision} tensors")
    return found, dropped, notes


def _view(canonical: str, info: TensorInfo, facts: Facts, scale: TensorInfo | None, folder: Path) -> SourceTensor:
    head_dim = facts.head_dim if canonical.endswith(ROTARY) else 0
    if head_dim and (len(info.shape) != 2 or info.shape[0] % head_dim):
        raise SourceError(
            f"tensor {quote(info.name)} is {list(info.shape)}: no whole heads of {head_dim} rows",
            where=str(folder / info.file), hint=f"{PARAMS} and the weights are of different models",
        )  # fmt: skip
    dtype, scales = info.dtype, None
    if info.dtype.startswith("F8"):
        scales = _scales(info, scale, folder)
        dtype = "BF16"
    return SourceTensor(canonical, dtype, info.shape, (info,), head_dim=head_dim, scales=scales)


def _scales(info: TensorInfo, scale: TensorInfo | None, folder: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    where = str(folder / info.file)
    if scale is None or info.dtype != "F8_E4M3":
        raise SourceError(
            f"tensor {quote(info.name)} is {info.dtype} without a scale that is known here", where=where,
            hint="FP8 weights are read as E4M3 with a `qscale_weight` beside them; fetch the 16-bit weights instead",
        )  # fmt: skip
    rows = info.shape[0]
    if (
        scale.shape not in ((), (1,), (rows,), (rows, 1))
        or scale.dtype not in ("F32", "BF16")
        or scale.nbytes > 1 << 24
    ):
        raise SourceError(
            f"tensor {quote(scale.name)} is {scale.dtype} {list(scale.shape)}: neither one scale nor one for each row",
            where=where, hint="fetch the 16-bit weights instead",
        )  # fmt: skip
    with safe_path(folder, scale.file).open("rb") as f:
        f.seek(scale.offset)
        raw = f.read(scale.nbytes).ljust(scale.nbytes, b"\0")  # zeros where only headers are here, for a plan
    if scale.dtype == "F32":
        return np.frombuffer(raw, np.float32)
    return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)


def _stacked(info: TensorInfo, facts: Facts, folder: Path) -> list[SourceTensor]:
    """The experts of a layer that lie in one tensor [experts · hidden_dim, dim], one by one."""
    pattern, indices = pattern_of(info.name)
    if pattern == STACKED_GATE:
        return [SourceTensor(f"model.{info.name}", info.dtype, info.shape, (info,))]
    leaf = STACKED.get(pattern)
    if leaf is None:
        return []
    expected = (facts.experts * facts.hidden_dim, facts.dim)
    if info.shape != expected:
        raise SourceError(
            f"tensor {quote(info.name)} is {list(info.shape)}, {PARAMS} makes it {list(expected)}",
            where=str(folder / info.file), hint=f"{PARAMS} and the weights are of different models",
        )  # fmt: skip
    stored, size = (facts.hidden_dim, facts.dim), info.nbytes // facts.experts
    turned = leaf == "w2.weight"
    shape = stored[::-1] if turned else stored
    return [
        SourceTensor(
            f"model.layers.{indices[0]}.block_sparse_moe.experts.{i}.{leaf}", info.dtype, shape,
            (TensorInfo(info.name, info.dtype, stored, info.file, info.offset + i * size),), turned=turned,
        )
        for i in range(facts.experts)
    ]  # fmt: skip


def _unknown(info: TensorInfo, folder: Path) -> SourceError:
    vision = info.name.startswith(VISION)
    return SourceError(
        f"tensor {quote(info.name)} " + ("belongs to a vision part" if vision else "has no place in this layout"),
        where=str(folder / info.file),
        hint="--text-only leaves the vision part out" if vision
        else f"{PARAMS} and the weights are of different models, or this is a layout that quantkit does not know",
    )  # fmt: skip


def _dtype(tensors: Iterable[SourceTensor]) -> str | None:
    return next((t.dtype for t in tensors if t.name == "model.embed_tokens.weight"), None)


def make_config(
    facts: Facts, params: Mapping[str, Any], options: NativeOptions, dtype: str | None, folder: Path
) -> tuple[dict[str, Any], list[str]]:
    """config.json for the facts: the one that a manifest in the folder keeps, if it says the same; else a fresh one.
    And notes about what had to be assumed."""
    notes = []
    context = context_of_params(params, where=str(folder / PARAMS))
    if options.context is not None and context not in (None, options.context):
        raise UsageError(f"{PARAMS} gives a context of {context:,} tokens", hint="leave --context out")
    length, assumed = default_context(facts)
    length = context or options.context or length
    fresh = config_of_facts(facts, dtype=dtype, context=length)
    kept = recorded_configuration(folder, CONFIG)
    config, restored = restore_config(facts, kept, fresh)
    if kept is not None and not restored:
        notes.append(f"the {CONFIG} that {MANIFEST} keeps describes another model than {PARAMS} does, and is not used")
    if restored and (context or options.context):  # what is said goes before what was kept
        config = {**config, "max_position_embeddings": length}
    if assumed and not (restored or context or options.context):
        notes.append(
            f"{PARAMS} does not say how long a context may be; {length:,} tokens are assumed (--context says otherwise)"
        )
    return config, notes


# ------------------------------------------------------------------------------------------------------------- writing


def mistral_target(
    checkpoint: Checkpoint,
    *,
    profile: Literal["current", "one-file-ref-2023"],
    weights_format: Literal["safetensors", "pth"] | None,
    tokenizer: bool,
) -> Target:
    """A mistral-src folder of the checkpoint. Raises SourceError where this layout cannot hold the model."""
    where = str(checkpoint.folder)
    facts, notes = facts_of_config(checkpoint.config, where=str(checkpoint.folder / CONFIG))
    tensors = [t for t in checkpoint.tensors.values() if not BUFFERS.fullmatch(t.name)]
    if checkpoint.absent:
        raise SourceError(
            f"weight files are absent, for example {next(iter(checkpoint.absent.values()))}", where=where,
            hint="fetch them, or their headers: what is planned here needs every tensor's shape",
        )  # fmt: skip
    table = table_of(facts)
    if facts.tied and HEAD in checkpoint.tensors:
        tensors = [t for t in tensors if t.name != HEAD]
        notes = [*notes, f"{HEAD} is left out: {CONFIG} says that the head is the embedding"]
    unknown = next((t for t in tensors if table.native(t.name) is None), None)
    if unknown is not None:
        raise SourceError(
            f"tensor {quote(unknown.name)} has no place in the mistral-src layout", where=f"{where}/{unknown.file}",
            hint="it knows dense and Mixtral models without biases; convert the plain parent",
        )  # fmt: skip
    check_complete(facts, checkpoint.config, tensors, where=where, native=False)
    old = profile == "one-file-ref-2023"
    if old and weights_format == "safetensors":
        raise UsageError("the reference program of 2023 reads no safetensors", hint="leave --weights-format out")
    context = None
    if checkpoint.config.get("max_position_embeddings") is not None:
        context = context_of_config(checkpoint.config, where=str(checkpoint.folder / CONFIG))
    params, more = params_of_facts(facts, profile=profile, context=context)
    recorded = checkpoint.params or recorded_configuration(checkpoint.folder, PARAMS)
    if not old:
        params, _ = restore_params(facts, recorded, params)
    pth = (weights_format or ("pth" if old else "safetensors")) == "pth"
    kept = recorded_configuration(checkpoint.folder, CONFIG) if checkpoint.params else checkpoint.output_config()[0]
    copies, others = _copies(checkpoint, facts, old=old, tokenizer=tokenizer)
    return Target(
        "mistral", PARAMS, params,
        names={t.name: str(table.native(t.name)) for t in tensors},
        head_dims={t.name: facts.head_dim for t in tensors if t.name.endswith(ROTARY)},
        copies=tuple(copies),
        container="pth" if pth else "safetensors",
        single="consolidated.00.pth" if pth else "consolidated.safetensors",
        numbered="consolidated-{:05d}-of-{:05d}.safetensors", index_file=INDEX,
        notes=(*notes, *more, *others), recorded=record(CONFIG, kept),
    )  # fmt: skip


def _copies(checkpoint: Checkpoint, facts: Facts, *, old: bool, tokenizer: bool) -> tuple[list[CopiedFile], list[str]]:
    """What travels, and notes about what does not."""
    sizes = dict(checkpoint.side_files)
    copies = [CopiedFile(name, name, size) for name, size in sizes.items() if LICENCE_FILES.fullmatch(name)]
    notes = []
    if tokenizer:
        file, count = _tokenizer(checkpoint, facts, old=old)
        copies.append(file)
        if count < facts.vocab_size:
            notes.append(
                f"{file.name} has {count:,} tokens, the model {facts.vocab_size:,}: ids from {count:,} on, such as "
                "tokens that a fine-tune added, stand for no text here"
            )
    left = [name for name in sizes if name not in [f.source for f in copies] and not _SAME.fullmatch(name)]
    config = checkpoint.folder / "tokenizer_config.json"
    if config.name in sizes and b'"chat_template"' in config.read_bytes():
        left.append(f"the chat template in {config.name}")
    if left:
        notes.append(f"left behind, because this layout has no place for them: {', '.join(left)}")
    return copies, notes


def _tokenizer(checkpoint: Checkpoint, facts: Facts, *, old: bool) -> tuple[CopiedFile, int]:
    """The one tokenizer file of the folder to write, and how many tokens it has."""
    sizes, where = dict(checkpoint.side_files), str(checkpoint.folder)
    found = native_tokenizer(
        sizes, lambda name: safe_path(checkpoint.folder, name).read_bytes(), vocab_size=facts.vocab_size, where=where
    )
    if found is None:
        raise SourceError(
            "the folder has no tokenizer", where=where,
            hint="put tokenizer.model or tekken.json into it, or leave the tokenizer out with --no-tokenizer",
        )  # fmt: skip
    if old and found.source == "tekken.json":
        raise SourceError(
            "the reference program of 2023 reads tokenizer.model alone, and this model's tokenizer is tekken.json",
            where=where, hint="leave --profile out",
        )  # fmt: skip
    name = "tokenizer.model" if old else found.name
    return CopiedFile(found.source, name, sizes[found.source]), found.size
