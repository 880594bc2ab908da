"""A SentencePiece model file, read strictly and without protobuf. Standard library only.

The file is one protobuf message (sentencepiece_model.proto): field 1 is a piece {1 text, 2 score, 3 type}, repeated,
its place is its id; 2 is how it was trained, 3 how text is normalized, 5 how it is denormalized. The wire format is a
run of fields: a varint of number·8 + kind, then a varint (kind 0), 8 bytes (1), a length and that many bytes (2), or
4 bytes (5).
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from quantkit.checkpoint.header import quote
from quantkit.errors import SourceError

MAX_FILE = 16 * 1024 * 1024  # the largest published one, of Gemma, has 4.7 MB
MAX_PIECES = 1_000_000
MAX_PIECE = 128  # characters; trainers stop at 16, and a stranger's longer one would only cost time

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2
MODEL_TYPES = {1: "unigram", BPE: "BPE", 3: "word", 4: "character"}
BYTES = [f"<0x{i:02X}>" for i in range(256)]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_Value = int | float | bytes
_Fail = Callable[[str], SourceError]


class Piece(NamedTuple):
    text: str
    score: float
    kind: int  # NORMAL … BYTE


@dataclass(frozen=True)
class SentencePieceModel:
    """What decides how text becomes ids. An id is a place in `pieces`; those of the special pieces are None where the
    model has none. `charsmap` and `output_charsmap` are sizes in bytes of the normalization tables, 0 for identity."""

    pieces: tuple[Piece, ...]
    model_type: int
    byte_fallback: bool
    whitespace_as_suffix: bool
    normalizer: str
    charsmap: int
    output_charsmap: int
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    unk_id: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None

    def texts(self, kind: int) -> list[str]:
        return [p.text for p in self.pieces if p.kind == kind]


def read_sentencepiece(raw: bytes, *, where: str) -> SentencePieceModel:
    """The model in the bytes of a file. SourceError, with `where` as its second line, if they are not one: truncated,
    no protobuf, a piece that is empty, stands twice or is no UTF-8, no unknown piece, byte pieces missing."""

    def fail(what: str) -> SourceError:
        return SourceError(what, where=where, hint="the file is damaged or no SentencePiece model: fetch it again")

    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\n", raw):
        raise SourceError(
            "this is a tiktoken vocabulary, as Llama 3 has, and no SentencePiece model",
            where=where,
            hint="take tokenizer.json from the model's Hugging Face folder",
        )
    if len(raw) > MAX_FILE:
        raise fail(f"the tokenizer has {len(raw):,} bytes; the limit is {MAX_FILE:,}")
    pieces: list[Piece] = []
    specs: dict[int, dict[int, _Value]] = {}
    for number, value in _fields(raw, {1: _BYTES, 2: _BYTES, 3: _BYTES, 5: _BYTES}, fail):
        assert isinstance(value, bytes)
        if number == 1:
            if len(pieces) == MAX_PIECES:
                raise fail(f"it has more than {MAX_PIECES:,} pieces")
            pieces.append(_piece(len(pieces), value, fail))
        elif number in specs:
            raise fail(f"its field {number} stands twice")
        else:
            specs[number] = dict(_fields(value, _SPECS[number], fail))
    return _model(pieces, specs.get(2, {}), specs.get(3, {}), specs.get(5, {}), fail)


# The fields that matter, with their kinds. What else a message holds is skipped, as protobuf has it.
_PIECE = {1: _BYTES, 2: _FIXED32, 3: _VARINT}
_NORMALIZER = {1: _BYTES, 2: _BYTES, 3: _VARINT, 4: _VARINT, 5: _VARINT}
_SPECS = {
    2: {3: _VARINT, 24: _VARINT, 35: _VARINT, 45: _BYTES, 46: _BYTES, 47: _BYTES, 48: _BYTES},
    3: _NORMALIZER,
    5: _NORMALIZER,
}


def _fields(data: bytes, wanted: dict[int, int], fail: _Fail) -> Iterator[tuple[int, _Value]]:
    """(number, value) of the wanted fields of a message, in file order; of all others only the form is checked."""
    position, end = 0, len(data)

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while position < end and shift < 70:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >= 2**64:
                    break
                return value
            shift += 7
        raise fail(f"a number at byte {position:,} of a message does not end")

    while position < end:
        number, kind = divmod(varint(), 8)
        if not 0 < number < 2**29 or kind not in (_VARINT, _FIXED64, _BYTES, _FIXED32):
            raise fail(f"byte {position:,} of a message starts no field")
        value: _Value
        if kind == _VARINT:
            value = varint()
        else:
            length = varint() if kind == _BYTES else 8 if kind == _FIXED64 else 4
            if length > end - position:
                raise fail(f"a field of {length:,} bytes runs past the end of its message")
            value = data[position : position + length]
            position += length
        if number in wanted:
            if kind != wanted[number]:
                raise fail(f"field {number} of a message has another form than SentencePiece gives it")
            yield number, struct.unpack("<f", value)[0] if kind == _FIXED32 else value  # type: ignore[arg-type]


def _piece(place: int, raw: bytes, fail: _Fail) -> Piece:
    fields = dict(_fields(raw, _PIECE, fail))
    text, score, kind = fields.get(1, b""), fields.get(2, 0.0), fields.get(3, NORMAL)
    assert isinstance(score, float)
    assert isinstance(kind, int)
    piece = Piece(_text(text, f"piece {place}", fail), score, kind)
    if not 0 < len(piece.text) <= MAX_PIECE:
        raise fail(f"piece {place} has {len(piece.text):,} characters; 1 to {MAX_PIECE} are allowed")
    if not math.isfinite(score):
        raise fail(f"piece {place} has the score {score}")
    if not NORMAL <= kind <= BYTE:
        raise fail(f"piece {place} has the unknown type {kind}")
    return piece


def _text(raw: _Value, label: str, fail: _Fail) -> str:
    assert isinstance(raw, bytes)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise fail(f"{label} is not UTF-8") from None


def _model(
    pieces: list[Piece],
    trainer: dict[int, _Value],
    normalizer: dict[int, _Value],
    denormalizer: dict[int, _Value],
    fail: _Fail,
) -> SentencePieceModel:
    ids: dict[str, int] = {}
    for place, piece in enumerate(pieces):
        if ids.setdefault(piece.text, place) != place:
            raise fail(f"the piece {quote(piece.text)} stands twice, as {ids[piece.text]} and {place}")

    def special(field: int, default: str, kind: int) -> int | None:
        """sentencepiece finds these by their spelling; the ids in the trainer's part are not looked at."""
        text = _text(trainer.get(field, b""), "a special piece", fail) or default
        place = ids.get(text)
        return place if place is not None and pieces[place].kind == kind else None

    unk_id = special(45, "<unk>", UNKNOWN)
    if unk_id is None or sum(p.kind == UNKNOWN for p in pieces) != 1:
        raise fail("it has no piece for what is unknown, or several")
    model_type = trainer.get(3, 1)
    assert isinstance(model_type, int)
    if model_type not in MODEL_TYPES:
        raise fail(f"it is of the unknown model type {model_type}")
    byte_fallback = bool(trainer.get(35, 0))
    if byte_fallback and sorted(p.text for p in pieces if p.kind == BYTE) != BYTES:
        raise fail("it falls back to bytes, but its byte pieces are not <0x00> to <0xFF>")
    charsmap, output_charsmap = normalizer.get(2, b""), denormalizer.get(2, b"")
    assert isinstance(charsmap, bytes)
    assert isinstance(output_charsmap, bytes)
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=model_type,
        byte_fallback=byte_fallback,
        whitespace_as_suffix=bool(trainer.get(24, 0)),
        normalizer=_text(normalizer.get(1, b""), "the normalizer's name", fail),
        charsmap=len(charsmap),
        output_charsmap=len(output_charsmap),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
        unk_id=unk_id,
        bos_id=special(46, "<s>", CONTROL),
        eos_id=special(47, "</s>", CONTROL),
        pad_id=special(48, "<pad>", CONTROL),
    )
