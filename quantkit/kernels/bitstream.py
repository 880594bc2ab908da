"""Codes of 2, 3, 4 or 8 bits as one stream of bits in 32-bit words, least significant first.

Code k takes bits [b·k, b·k + b) of the stream, and word w holds its bits [32·w, 32·w + 32). For 3 bits, a code may lie
in two words: the tenth and the twenty-first of every 32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.int32]
Codes = npt.NDArray[np.uint8]


def pack_rows(codes: Codes, bits: int) -> Words:
    """uint8 [n, m] → int32 [n · bits / 32, m]: each column's codes are a stream. 32 must divide n · bits."""
    n, m = codes.shape
    if n * bits % 32:
        raise ValueError(f"{n} codes of {bits} bits do not fill words")
    words = np.zeros((n * bits // 32, m), np.uint32)
    for k, word, shift, rest in _places(bits):
        part = codes[k :: 32 // _gcd(bits)].astype(np.uint32)
        words[word :: bits // _gcd(bits)] |= part << np.uint32(shift)
        if rest:
            words[word + 1 :: bits // _gcd(bits)] |= part >> np.uint32(rest)
    return words.view(np.int32)


def unpack_rows(words: Words, bits: int) -> Codes:
    """int32 [n · bits / 32, m] → uint8 [n, m]."""
    w, m = words.shape
    if w * 32 % bits:
        raise ValueError(f"{w} words do not hold whole codes of {bits} bits")
    raw = np.ascontiguousarray(words).view(np.uint32)
    codes = np.empty((w * 32 // bits, m), np.uint8)
    mask = np.uint32(2**bits - 1)
    for k, word, shift, rest in _places(bits):
        value = raw[word :: bits // _gcd(bits)] >> np.uint32(shift)
        if rest:
            value = value | (raw[word + 1 :: bits // _gcd(bits)] << np.uint32(rest))
        codes[k :: 32 // _gcd(bits)] = value & mask
    return codes


def pack_columns(codes: Codes, bits: int) -> Words:
    """uint8 [m, n] → int32 [m, n · bits / 32]: each row's codes are a stream."""
    return np.ascontiguousarray(pack_rows(np.ascontiguousarray(codes.T), bits).T)


def unpack_columns(words: Words, bits: int) -> Codes:
    """int32 [m, n · bits / 32] → uint8 [m, n]."""
    return np.ascontiguousarray(unpack_rows(np.ascontiguousarray(words.T), bits).T)


def _gcd(bits: int) -> int:
    """The stream repeats after 32 / gcd codes and bits / gcd words."""
    return int(np.gcd(bits, 32))


def _places(bits: int) -> Any:
    """(code, word, shift, rest) of each code in a period: `rest` of its bits lie in `word`, the others in the next one;
    0 if all are in one word."""
    for k in range(32 // _gcd(bits)):
        word, shift = divmod(bits * k, 32)
        yield k, word, shift, 32 - shift if shift + bits > 32 else 0
