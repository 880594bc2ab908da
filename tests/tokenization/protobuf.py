"""A writer for SentencePiece models, so that tests can write wrong ones."""

from __future__ import annotations

import struct
from collections.abc import Iterable

Piece = tuple[str, float, int]  # text, score, type
BYTE_PIECES = [(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
HEAD: list[Piece] = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
TRAINER = {3: 2, 35: 1}  # BPE, byte fallback
NORMALIZER = {1: b"identity", 3: 1, 4: 0}


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def message(fields: dict[int, int | bytes]) -> bytes:
    return b"".join(field(number, value) for number, value in fields.items())


def piece(text: str, score: float, kind: int) -> bytes:
    return field(1, field(1, text.encode()) + field(2, score) + field(3, kind))


def spm(
    pieces: Iterable[Piece] = (),
    trainer: dict[int, int | bytes] | None = None,
    normalizer: dict[int, int | bytes] | None = None,
    head: Iterable[Piece] = (*HEAD, *BYTE_PIECES),
) -> bytes:
    """A model of `head` and `pieces`; `trainer` and `normalizer` are added to what a Mistral tokenizer has there."""
    out = b"".join(piece(*p) for p in (*head, *pieces))
    return (
        out
        + field(2, message({**TRAINER, **(trainer or {})}))
        + field(3, message({**NORMALIZER, **(normalizer or {})}))
    )
