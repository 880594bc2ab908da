"""Codes of 2, 3, 4 or 8 bits as one stream of bits in 32-bit words, least significant first.

Code k takes bits [b·k, b·k + b) of the stream, and word w holds its bits [32·w, 32·w + 32). For 3 bits, a code may lie
in two words: the eleventh and the twenty-second of every 32. 32 codes always end where a word ends.

One thread each, without the interpreter's lock: who has several weights to pack shares them out.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

Words = npt.NDArray[np.int32]
Codes = npt.NDArray[np.uint8]


# Both go through 32 codes of every stream before the next 32: where streams are columns, neighbours in memory are
# then read and written together.
@njit(nogil=True, cache=True)
def _pack(codes, bits, words):  # type: ignore[no-untyped-def]
    """codes uint8 [streams, n] → words uint32 [streams, n · bits / 32]. Returns all codes or-ed together."""
    seen = np.uint8(0)
    for start in range(0, codes.shape[1], 32):
        stop = min(start + 32, codes.shape[1])
        for s in range(codes.shape[0]):
            held, filled, w = np.uint64(0), 0, start // 32 * bits
            for k in range(start, stop):
                code = codes[s, k]
                seen |= code
                held |= np.uint64(code) << np.uint64(filled)
                filled += bits
                if filled >= 32:
                    words[s, w] = np.uint32(held)
                    held >>= np.uint64(32)
                    filled -= 32
                    w += 1
    return seen


@njit(nogil=True, cache=True)
def _unpack(words, bits, codes):  # type: ignore[no-untyped-def]
    """The inverse: words uint32 [streams, n · bits / 32] → codes uint8 [streams, n]."""
    mask = np.uint64((1 << bits) - 1)
    for start in range(0, codes.shape[1], 32):
        stop = min(start + 32, codes.shape[1])
        for s in range(codes.shape[0]):
            held, filled, w = np.uint64(0), 0, start // 32 * bits
            for k in range(start, stop):
                if filled < bits:
                    held |= np.uint64(words[s, w]) << np.uint64(filled)
                    filled += 32
                    w += 1
                codes[s, k] = np.uint8(held & mask)
                held >>= np.uint64(bits)
                filled -= bits


def pack_rows(codes: Codes, bits: int, out: Words | None = None) -> Words:
    """uint8 [n, m] → int32 [n · bits / 32, m]: each column's codes are a stream. 32 must divide n · bits.

    Written to `out` where one is given. ValueError for a code of more than `bits` bits.
    """
    n, m = codes.shape
    if n * bits % 32:
        raise ValueError(f"{n} codes of {bits} bits do not fill words of 32 bits")
    words = np.empty((n * bits // 32, m), np.int32) if out is None else out
    if int(_pack(codes.T, bits, words.view(np.uint32).T)) >> bits:
        raise ValueError(f"a code is larger than {bits} bits can hold")
    return words


def unpack_rows(words: Words, bits: int) -> Codes:
    """int32 [n · bits / 32, m] → uint8 [n, m]."""
    return np.ascontiguousarray(_unpacked(words.T, bits).T)


def pack_columns(codes: Codes, bits: int, out: Words | None = None) -> Words:
    """uint8 [m, n] → int32 [m, n · bits / 32]: each row's codes are a stream. 32 must divide n · bits.

    Written to `out` where one is given. ValueError for a code of more than `bits` bits.
    """
    words = np.empty((codes.shape[0], codes.shape[1] * bits // 32), np.int32) if out is None else out
    pack_rows(codes.T, bits, words.T)
    return words


def unpack_columns(words: Words, bits: int) -> Codes:
    """int32 [m, n · bits / 32] → uint8 [m, n]."""
    return _unpacked(words, bits)


def _unpacked(words: Words, bits: int) -> Codes:
    """Rows are streams: int32 [streams, n · bits / 32] → uint8 [streams, n]."""
    streams, w = words.shape
    if w * 32 % bits:
        raise ValueError(f"{w} words of 32 bits do not hold whole codes of {bits} bits")
    codes = np.empty((streams, w * 32 // bits), np.uint8)
    _unpack(words.view(np.uint32), bits, codes)
    return codes
