"""Calibration text as rows of token ids: the same rows for the same files, whoever takes them, with a hash to say so.

What is a text: `data_text`. How it becomes ids: `data_tokenizer`, `data_encode`. This module takes rows of them.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from quantkit.calibration.data_encode import CHARS, PIECE, Ids, TextTokenizer
from quantkit.calibration.data_text import Document, Source, open_source
from quantkit.calibration.data_tokenizer import read_tokenizer
from quantkit.errors import InputError, RecipeError, SourceError

FEW_DISTINCT = 50  # tokens; fewer are a word or two, again and again
LENGTH = 1024
# With a seed, rows are drawn from so many tokens at the beginning of a text, or from four times what is asked for. More
# would not make better rows, and nobody waits for a tokenizer to read a whole crawl.
POOL = 2**21
BATCH_TEXTS, BATCH_CHARS = 256, PIECE


class Calibration(BaseModel):
    """`calibration:`, the text on which a method measures what a weight is for, and how much of it.

    text: FILE.txt, FILE.jsonl or FILE.parquet; or a Hub dataset, `org/name`, `org/name:path/in/repo`, either with a
    revision as `…@commit`. None: the text that comes with Python. length: tokens in a row; None: 1024, or the model's
    context where that is shorter. seed: None takes the rows from the beginning, in their order; a number draws them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    text: str | None = Field(None, min_length=1)
    samples: int = Field(64, ge=1, le=65_536)
    length: int | None = Field(None, ge=2)
    seed: int | None = Field(None, ge=0, lt=2**63)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Rows of token ids and what is to be said of them.

    ids: int32 [samples, length], read-only. name: the file's name without its folder; `org/name:file@commit` of a Hub
    dataset, which is how a recipe names it again; or the words for the embedded text.
    sha256: of 16 bytes, samples and length as little-endian int64, and of the ids row by row as little-endian int32:
    `hashlib.sha256(struct.pack("<qq", *ids.shape) + ids.astype("<i4").tobytes())`.
    text_sha256: of the source file, or of the embedded text in UTF-8.
    available: rows from which those were drawn. None without a seed: then the text is read no further than needed.
    """

    ids: Ids
    name: str
    sha256: str
    text_sha256: str
    available: int | None
    seed: int | None

    @property
    def doubts(self) -> list[str]:
        """What speaks against the text as one to calibrate on."""
        rows, distinct = len(self.ids), len(np.unique(self.ids))
        same = rows - len(np.unique(self.ids, axis=0))
        found = [f"{same:,} of {rows:,} calibration rows repeat others: they add nothing"] if same else []
        if distinct < FEW_DISTINCT:
            found.append(f"the calibration text has {distinct} different tokens: it says little of how a model is used")
        return found

    def first(self, rows: int) -> Tokens:
        """So many rows of them at the most."""
        ids = self.ids[:rows]
        return replace(self, ids=ids, sha256=hash_of(ids))

    def to_json(self) -> dict[str, Any]:
        """All but the ids, whose hash stands for them."""
        samples, length = self.ids.shape
        return {
            "text": self.name, "text_sha256": self.text_sha256, "samples": samples, "length": length,
            "seed": self.seed, "rows_available": self.available, "tokens_sha256": self.sha256,
        }  # fmt: skip


def load_tokens(
    calibration: Calibration, tokenizer: Path | bytes, *, vocab_size: int, context: int | None, quiet: bool = True
) -> Tokens:
    """Rows of a text in the ids of a tokenizer: that of a model's folder, or the content of a tokenizer.json.

    vocab_size: rows of the model's embedding, which ids must not exceed. context: the longest text of the model in
    tokens, None if it is not known. `quiet` shows no download bars.

    Every document becomes the ids that transformers' `AutoTokenizer.from_pretrained(folder)(text)` gives, special
    tokens included; documents are joined, then cut into rows (see `cut`), and what is left is dropped. A .txt file
    is one document. Chats are rendered by the model's template, and no special tokens are added to what that wrote.
    With a seed, the rows taken are those with the smallest SHA-256 of the ASCII text `seed:row`, in this order, of all
    whole rows in the first 2,097,152 tokens (or 4 · samples · length, if that is more).

    torch is not imported unless the folder has no tokenizer.json, or the text is of chats.

    Raises InputError for the text, RecipeError for numbers that do not go with it or with the model, SourceError for
    the tokenizer or what the Hub says.
    """
    length = _length(calibration, context)
    encoder = read_tokenizer(tokenizer)
    source = open_source(calibration.text, tokenizer if isinstance(tokenizer, Path) else None, quiet=quiet)
    wanted = calibration.samples * length
    if calibration.seed is not None:
        wanted = max(POOL, 4 * wanted)
    try:
        flat = _gather(encoder, source, wanted)
    except UnicodeDecodeError as e:
        raise InputError(
            f"{source.name} is not UTF-8 text: {e.reason}",
            where=source.where, hint="convert it, for example with iconv -t UTF-8",
        ) from None  # fmt: skip
    grid = cut(flat, length, encoder.head())
    rows = len(grid)
    if rows < calibration.samples:
        raise _too_little(calibration, source, len(flat), rows, length)
    ids = grid[: calibration.samples] if calibration.seed is None else grid[_drawn(calibration, rows)]
    ids = np.ascontiguousarray(ids)
    _check_range(ids, vocab_size, encoder)
    ids.flags.writeable = False
    return Tokens(
        ids, source.name, hash_of(ids), source.sha256(),
        None if calibration.seed is None else rows, calibration.seed,
    )  # fmt: skip


def cut(flat: Ids, length: int, head: Ids) -> Ids:
    """Rows [rows, length] of a text, without overlap, what is left dropped. Each begins with `head`, be it the text's
    own: models that were trained on texts that all begin so are lost without it (Gemma-3-270M has three times the
    perplexity)."""
    head = head[: length - 1]
    rows, at = [], 0
    while at < len(flat):
        own = np.array_equal(flat[at : at + len(head)], head)
        row = flat[at : at + length] if own else np.concatenate([head, flat[at : at + length - len(head)]])
        at += length if own else length - len(head)
        if len(row) == length:
            rows.append(row)
    return np.stack(rows) if rows else np.empty((0, length), np.int32)


def hash_of(ids: Ids) -> str:
    """The SHA-256 of rows of ids and of their shape, as `Tokens.sha256` describes it."""
    return hashlib.sha256(struct.pack("<qq", *ids.shape) + ids.astype("<i4").tobytes()).hexdigest()


def _length(calibration: Calibration, context: int | None) -> int:
    if context is not None and context < 2:
        raise SourceError(
            f"the model's context is {context}: there is nothing to calibrate on a single token",
            hint="mend the context in its config.json",
        )
    length = calibration.length or min(LENGTH, context or LENGTH)
    if context is not None and length > context:
        raise RecipeError(
            f"calibration.length is {length:,}, and the model's context ends at {context:,} tokens",
            hint=f"take rows of so many: --calib-length {context}, or calibration.length in the recipe",
        )
    return length


def _gather(encoder: TextTokenizer, source: Source, wanted: int) -> Ids:
    """The first `wanted` ids of the documents one after the other; fewer if there are no more."""
    parts: list[Ids] = []
    have = 0
    most = min(wanted * CHARS, BATCH_CHARS)
    for batch in _batches(source.documents(), most):
        left = wanted - have
        if batch[0].long or batch[0].chars > most:  # it is alone, and may do without its end
            found = [encoder.leading(batch[0].open, left, special=batch[0].special)]
        else:
            found = encoder.encode([_whole(d) for d in batch], special=batch[0].special)
        parts += found
        have += sum(map(len, found))
        if have >= wanted:
            break
    return np.concatenate(parts)[:wanted] if parts else np.empty(0, np.int32)


def _whole(document: Document) -> str:
    with document.open() as stream:
        return stream.read()


def _batches(documents: Iterable[Document], most: int) -> Iterator[list[Document]]:
    """Documents that are encoded together, of at most `most` characters: longer ones alone, chats apart from texts."""
    batch: list[Document] = []
    chars = 0
    for document in documents:
        full = len(batch) == BATCH_TEXTS or chars + document.chars > most
        if batch and (full or document.long or batch[0].special != document.special):
            yield batch
            batch, chars = [], 0
        batch.append(document)
        chars += document.chars
        if document.long:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _drawn(calibration: Calibration, rows: int) -> npt.NDArray[np.int64]:
    """Which of the rows, and in which order. By a hash, because generators change with their libraries."""
    keys = [hashlib.sha256(f"{calibration.seed}:{row}".encode()).digest() for row in range(rows)]
    order = sorted(range(rows), key=keys.__getitem__)
    return np.array(order[: calibration.samples], np.int64)


def _too_little(
    calibration: Calibration, source: Source, tokens: int, rows: int, length: int
) -> InputError | RecipeError:
    if tokens == 0:
        return InputError(f"{source.name} is empty", where=source.where, hint="name a file with text in it")
    hint = "name a longer text"
    if rows:
        hint += f", or set calibration.samples to {rows}" + (" or less" if rows > 1 else "")
    elif tokens >= 2:
        hint += f", or set calibration.samples to 1 and calibration.length to {tokens} or less"
    return RecipeError(
        f"the calibration text makes {rows:,} row{'' if rows == 1 else 's'} of {length:,} tokens, and "
        f"{calibration.samples:,} are asked for",
        where=f"{source.where}: {tokens:,} tokens", hint=hint,
    )  # fmt: skip


def _check_range(ids: Ids, vocab_size: int, encoder: TextTokenizer) -> None:
    highest = int(ids.max())
    if highest >= vocab_size:
        raise SourceError(
            f"the tokenizer gives the id {highest:,}, and the model's vocabulary has {vocab_size:,}",
            where=encoder.where, hint="the tokenizer belongs to another model: fetch the one of this model",
        )  # fmt: skip
