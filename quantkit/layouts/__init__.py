"""How checkpoints lie on disk: one file per layout. `open_checkpoint` finds out which one a folder has, `make_target`
says what a folder in another one is made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from quantkit.checkpoint.reader import safe_path
from quantkit.errors import SourceError, UsageError
from quantkit.layouts.base import (
    Checkpoint,
    CopiedFile,
    NativeOptions,
    Prefer,
    Target,
    record,
    recorded_configuration,
)
from quantkit.layouts.hf import CONFIG, TOKENIZER_FILES, WEIGHT_SETS, hf_target, open_hf
from quantkit.layouts.meta_llama import is_meta_llama, open_meta_llama
from quantkit.layouts.mistral import TOKENIZER, WEIGHTS, mistral_target, open_mistral, read_params
from quantkit.layouts.mistral_params import PARAMS
from quantkit.layouts.text_part import text_part

__all__ = [
    "Checkpoint",
    "CopiedFile",
    "NativeOptions",
    "Prefer",
    "Target",
    "make_hf_target",
    "mistral_target",
    "open_checkpoint",
]


def open_checkpoint(
    folder: Path,
    *,
    data_present: bool = True,
    native: NativeOptions | None = None,
    prefer: Prefer = "hf",
) -> Checkpoint:
    """The checkpoint in `folder`. `data_present=False` is enough for inspecting and planning: the weight files may be
    cut off after their headers, or absent beside an index. Official folders hold the same weights in two layouts:
    `prefer` says which is read then. `native` is for folders in a native layout alone. Raises SourceError."""
    if not folder.exists():
        raise SourceError(f"there is no folder {folder.name!r}", where=str(folder), hint="check the path for a typo")
    if not folder.is_dir():
        raise SourceError(
            f"{folder.name!r} is a file",
            where=str(folder),
            hint="name the folder that holds config.json or params.json and the weights",
        )
    try:
        if _reads_native(folder, prefer):
            options = native or NativeOptions()
            if is_meta_llama(read_params(folder)):
                return open_meta_llama(folder, options, data_present=data_present)
            return open_mistral(folder, options, data_present=data_present)
        if native is not None and (native.rope_theta is not None or native.context is not None):
            raise UsageError(
                "--rope-theta and --context are for folders with params.json, and this one is read by its config.json",
                where=str(folder), hint="leave them out",
            )  # fmt: skip
        checkpoint = open_hf(folder, data_present=data_present)
        return text_part(checkpoint) if native is not None and native.text_only else checkpoint
    except OSError as e:
        raise SourceError(
            f"{folder.name!r} cannot be read: {e.strerror}", where=str(e.filename), hint="check its permissions"
        ) from None


def _reads_native(folder: Path, prefer: Prefer) -> bool:
    native = any(WEIGHTS.fullmatch(p.name) for p in folder.iterdir())
    if (folder / CONFIG).exists() and any((folder / name).exists() for name in WEIGHT_SETS):
        return native and prefer == "mistral"
    return native or (folder / PARAMS).exists()


def make_hf_target(checkpoint: Checkpoint, *, tokenizer: Literal["required", "if there is one", "none"]) -> Target:
    """A Hugging Face folder of a checkpoint in any layout: for a native one, with the tokenizer files that
    transformers reads made from the one that is there."""
    params = checkpoint.params or recorded_configuration(checkpoint.folder, PARAMS)
    target = replace(hf_target(checkpoint), recorded=record(PARAMS, params))
    if tokenizer == "none":
        return replace(target, copies=tuple(f for f in target.copies if not TOKENIZER_FILES.fullmatch(f.name)))
    if checkpoint.params is None:
        return target
    from quantkit.tokenization import hf_tokenizer_files

    names = {file.name for file in target.copies}
    natives = sorted(n for n in names if TOKENIZER.fullmatch(n))
    if "tokenizer.json" in names:  # an official folder has both
        return target
    if len(natives) != 1:
        if not natives and tokenizer == "if there is one":
            return replace(target, notes=("the folder has no tokenizer, and neither will the output",))
        raise SourceError(
            f"{natives[0]} and {natives[1]} are both there" if natives else "the folder has no tokenizer",
            where=str(checkpoint.folder),
            hint="Mistral's own programs want exactly one: keep the one that belongs to these weights" if natives
            else "put tokenizer.model or tekken.json into it, or leave the tokenizer out with --no-tokenizer",
        )  # fmt: skip
    path = safe_path(checkpoint.folder, natives[0])
    context = checkpoint.config.get("max_position_embeddings")
    generated, notes = hf_tokenizer_files(
        natives[0], path.read_bytes(), where=str(path), vocab_size=checkpoint.config["vocab_size"], context=context
    )
    copies = tuple(file for file in target.copies if file.name not in generated)
    return replace(target, copies=copies, generated=generated, notes=tuple(notes))
