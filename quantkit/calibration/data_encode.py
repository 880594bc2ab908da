"""Text to ids: a long document no further than its ids are wanted, and in pieces, for an encoding takes a hundred times
the room of its text.

What a tokenizer makes of a place depends on what stands around it, but not from afar: the pattern that cuts a text
into words looks to the ends of a run (of blanks, letters, digits), the merges within a word a few tokens on, a Unicode
form to the next letter. So ids count as settled that end MARGIN characters before the end of a piece, if at least
three words follow. The next piece begins MARGIN characters before the first id that is not settled; an id must begin
at that very place again, and before it must be the same AGREED ids. Where one of these fails (a run of digits without
end), the document is read again in larger pieces. The tests compare with ids of whole texts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer

from quantkit.checkpoint.header import quote
from quantkit.errors import InputError, SourceError

Ids = npt.NDArray[np.int32]
Open = Callable[[], TextIO]

PIECE = 2**19  # characters
MARGIN = 2**14
AGREED = 32
CHARS = 5  # a token of English; more text is read if that was not enough
MAX_PIECE = 2**27


@contextmanager
def explained(what: str, where: str) -> Iterator[None]:
    """What the library raises, a bare Exception or, from a panic of its Rust, a BaseException, as a SourceError."""
    try:
        yield
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        first = (str(e).strip() or type(e).__name__).splitlines()[0][:150]
        raise SourceError(
            f"{what}: {quote(first)}", where=where, hint="the tokenizer is damaged: fetch the model again"
        ) from None


@dataclass(frozen=True)
class TextTokenizer(ABC):
    """`where` it comes from, for errors."""

    where: str

    @abstractmethod
    def encode(self, texts: Sequence[str], *, special: bool) -> list[Ids]:
        """int32 ids of each whole text; with those that a text gets before or behind, if `special`."""

    @abstractmethod
    def attempt(self, stream: TextIO, wanted: int, piece: int, *, special: bool) -> Ids | None:
        """`wanted` ids or a few more from the beginning of a document, or all; None if pieces of that size will not
        do."""

    def head(self) -> Ids:
        """What this tokenizer puts before every text: a model's BOS, most often, or nothing."""
        bare, special = (self.encode(["a"], special=s)[0] for s in (False, True))
        places = range(len(special) - len(bare) + 1)
        return special[: next((k for k in places if np.array_equal(special[k : k + len(bare)], bare)), 0)]

    def leading(self, document: Open, wanted: int, *, special: bool) -> Ids:
        """The first `wanted` ids of a document, or all if it has fewer; those of the whole text, without reading it.
        Raises InputError for what has no words."""
        piece = min(max(wanted * CHARS, 2 * MARGIN) + 2 * MARGIN, PIECE)
        while piece <= MAX_PIECE:
            with document() as stream:
                ids = self.attempt(stream, wanted, piece, special=special)
            if ids is not None:
                return ids[:wanted]
            piece *= 4
        raise InputError(
            f"the text has {MAX_PIECE >> 20} million characters without words to cut it at",
            where=self.where, hint="this is no text: name another file",
        )  # fmt: skip


@dataclass(frozen=True)
class FastTokenizer(TextTokenizer):
    tokenizer: Tokenizer

    def encode(self, texts: Sequence[str], *, special: bool) -> list[Ids]:
        # The fast form keeps no places, which is much of the memory.
        with explained("the tokenizer cannot encode the text", self.where):
            found = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)
        return [np.array(e.ids, np.int32) for e in found]

    def attempt(self, stream: TextIO, wanted: int, piece: int, *, special: bool) -> Ids | None:
        parts: list[Ids] = []
        have = 0
        text, start, agreed = "", 0, np.empty(0, np.int32)
        while True:
            text += stream.read(piece - len(text))
            ahead = stream.read(1)
            with explained("the tokenizer cannot encode the text", self.where):
                encoding = self.tokenizer.encode(text, add_special_tokens=special)
            ids = np.array(encoding.ids, np.int32)
            first = 0
            if parts:
                found = encoding.char_to_token(start, 0)
                if found is None or not _begins(encoding, found):
                    return None
                first = found
                if not np.array_equal(ids[max(first - len(agreed), 0) : first], agreed):
                    return None
            last = _settled(encoding, text) if ahead else len(ids)
            if last is None or (ahead and last <= first):
                return None
            parts.append(ids[first:last])
            have += last - first
            if have >= wanted or not ahead:
                return np.concatenate(parts)
            agreed = parts[-1][-AGREED:]
            place, _ = encoding.token_to_chars(last) or (0, 0)  # it has a place, or _settled would not give it
            begin = max(place - MARGIN, 0)
            text, start = text[begin:] + ahead, place - begin


@dataclass(frozen=True)
class SlowTokenizer(TextTokenizer):
    """A tokenizer of transformers in Python. It tells no places, so a document is one piece."""

    tokenizer: Any

    def encode(self, texts: Sequence[str], *, special: bool) -> list[Ids]:
        found = (self.tokenizer(text, add_special_tokens=special, verbose=False).input_ids for text in texts)
        return [np.array(ids, np.int32) for ids in found]

    def attempt(self, stream: TextIO, wanted: int, piece: int, *, special: bool) -> Ids | None:
        text = stream.read(piece)
        ids = self.encode([text], special=special)[0]
        if stream.read(1):
            if not _has_words(text[-MARGIN:]):
                return None
            # At worst a token is a byte, and a character four.
            ids = ids[: max(len(ids) - 4 * MARGIN - 1, 0)]
            return ids if len(ids) >= wanted else None
        return ids


def _settled(encoding: Encoding, text: str) -> int | None:
    """The token behind those that are settled; None if there is none to be sure of."""
    limit = len(text) - MARGIN
    if limit <= 0 or not _has_words(text[limit:]):
        return None
    # Blanks may belong to no token, and tokens may share a character: back to where one begins.
    for place in range(limit, max(limit - MARGIN, 0), -1):
        token = encoding.char_to_token(place, 0)
        while token and not _begins(encoding, token):
            token -= 1
        if token:
            return token
    return None


def _begins(encoding: Encoding, token: int) -> bool:
    """Whether a character begins with this token, and the token with that character."""
    here, before = encoding.token_to_chars(token), encoding.token_to_chars(token - 1) if token else None
    if here is None or here[0] == here[1] or (before is not None and before[1] > here[0]):
        return False
    return encoding.char_to_token(here[0], 0) == token


def _has_words(text: str) -> bool:
    return len(text.split(maxsplit=3)) >= 3
