"""The text that models are judged by: tokenized as a whole, cut into windows without overlap from its beginning."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from quantkit.calibration.data import LENGTH, Tokens, cut, hash_of
from quantkit.calibration.data_encode import Ids, TextTokenizer
from quantkit.calibration.data_text import Source, open_source
from quantkit.calibration.data_tokenizer import read_tokenizer
from quantkit.errors import InputError, SourceError, UsageError
from quantkit.layouts import Checkpoint, make_hf_target

# More ids than any text has: all of them.
WHOLE = 2**40


def read_windows(
    checkpoint: Checkpoint,
    text: str,
    *,
    windows: int | None,
    length: int | None,
    vocabulary: int,
    context: int | None,
    quiet: bool = True,
) -> Tokens:
    """int32 ids [windows, length] of a text (.txt, .jsonl, .parquet, a Hub dataset) in the folder's tokenizer.

    The ids are those of transformers' `AutoTokenizer.from_pretrained(folder)(text)`, special tokens included, cut as
    calibration text is: a model's BOS stands at the beginning of every window, if its tokenizer puts it before texts.
    What is left behind the last window is dropped. windows: None takes all there are. length: None is 1,024 tokens, or
    `context` where that is shorter.

    Raises UsageError for numbers that do not go with the text or the model, InputError for the text, SourceError for
    the tokenizer.
    """
    if windows is not None and windows < 1:
        raise UsageError(f"--windows {windows} is no number of windows", hint="1 or more, or all")
    length = _length(length, context)
    encoder = read_tokenizer(_tokenizer(checkpoint))
    source = open_source(text, checkpoint.folder, quiet=quiet)
    try:
        flat = _gather(encoder, source, WHOLE if windows is None else windows * length)
    except UnicodeDecodeError as e:
        raise InputError(
            f"{source.name} is not UTF-8 text: {e.reason}",
            where=source.where, hint="convert it, for example with iconv -t UTF-8",
        ) from None  # fmt: skip
    grid = cut(flat, length, encoder.head())
    if len(grid) < (windows or 1):
        raise _too_short(source, len(flat), windows or 1, length)
    ids = np.ascontiguousarray(grid[:windows])
    if (highest := int(ids.max())) >= vocabulary:
        raise SourceError(
            f"the tokenizer gives the id {highest:,}, and the model's vocabulary has {vocabulary:,}",
            where=encoder.where, hint="the tokenizer belongs to another model: fetch the one of this model",
        )  # fmt: skip
    ids.flags.writeable = False
    return Tokens(ids, source.name, hash_of(ids), source.sha256(), None, None)


def _length(length: int | None, context: int | None) -> int:
    chosen = min(LENGTH, context or LENGTH) if length is None else length
    if chosen < 2:
        what = f"--length {length}" if length is not None else f"the model's context, {context},"
        raise UsageError(f"{what} leaves no token to predict", hint="2 or more: the first of a window is not predicted")
    if context is not None and chosen > context:
        raise UsageError(
            f"--length {chosen:,} is more than the model's context of {context:,} tokens",
            hint=f"--length {context} or less",
        )
    return chosen


def _tokenizer(checkpoint: Checkpoint) -> Path | bytes:
    if checkpoint.params is None:
        return checkpoint.folder
    # A native folder's tokenizer is turned into what `convert --to hf` writes of it.
    target = make_hf_target(checkpoint, tokenizer="required")
    return target.generated.get("tokenizer.json", checkpoint.folder)


def _gather(encoder: TextTokenizer, source: Source, wanted: int) -> Ids:
    """The first `wanted` ids of the documents one after the other; fewer if there are no more."""
    parts: list[Ids] = []
    left = wanted
    for document in source.documents():
        parts.append(encoder.leading(document.open, left, special=document.special))
        left -= len(parts[-1])
        if left <= 0:
            break
    return _joined(parts)[:wanted]


def _joined(parts: Iterable[Ids]) -> Ids:
    return np.concatenate([np.empty(0, np.int32), *parts])


def _too_short(source: Source, tokens: int, windows: int, length: int) -> InputError:
    if tokens < 2:
        return InputError(f"{source.name} is empty", where=source.where, hint="name a file with text in it")
    whole = tokens // length
    hint = f"--windows {whole}" + (" or less" if whole > 1 else "")
    if not whole:
        hint = f"--windows 1 --length {tokens} or less"
    return UsageError(
        f"the text has {tokens:,} tokens, and --windows {windows:,} of --length {length:,} need {windows * length:,}",
        where=source.where, hint=f"name a longer text, or {hint}",
    )  # fmt: skip
