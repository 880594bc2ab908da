"""A sum of bytes at their places in a file, which pieces that are written in any order add up to.

It tells what was written from what a disk gives back, also where a network filesystem gives zeros or an older page. It
is fast, and no protection from somebody who means it: that is what the SHA-256 of a file is for. In numpy, so that
copying needs no compiler; in few calls, as threads that often take the interpreter's lock wait for each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

MODULUS = 1 << 64
ROW = 1 << 13  # words
# Odd, so that no change of a word goes unseen; and without a pattern, so that changes that have one do not cancel.
WEIGHTS = np.arange(1, ROW + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
WEIGHTS ^= WEIGHTS >> np.uint64(32)
WEIGHTS |= np.uint64(1)


def position_sum(data: npt.NDArray[Any], offset: int) -> int:
    """Σ word · (2 · row + 1) · WEIGHTS[column] mod 2⁶⁴ over the little-endian 32-bit words of a file, ROW words a row,
    of which `data`, uint8 [n], lies at byte `offset`; all else counts as zero."""
    head = min(-offset % 4, data.size)
    end = data.size - (data.size - head) % 4
    words, place = data[head:end].view("<u4"), (offset + head) // 4
    begin = min(-place % ROW, words.size)  # of the first whole row
    rows = words[begin : begin + (words.size - begin) // ROW * ROW].reshape(-1, ROW)
    odd = 2 * np.arange((place + begin) // ROW, (place + begin) // ROW + len(rows), dtype=np.uint64) + np.uint64(1)
    total = int((np.einsum("ij,j->i", rows, WEIGHTS, dtype=np.uint64) * odd).sum())
    for piece, at in ((words[:begin], place), (words[begin + rows.size :], place + begin + rows.size)):
        row, column = divmod(at, ROW)
        weights = WEIGHTS[column : column + piece.size]
        total += int(np.einsum("i,i", piece, weights, dtype=np.uint64)) * (2 * row + 1)
    for byte, at in ((data[:head], offset), (data[end:], offset + end)):
        row, column = divmod(at // 4, ROW)
        total += (int.from_bytes(byte.tobytes(), "little") << 8 * (at % 4)) * (2 * row + 1) * int(WEIGHTS[column])
    return total % MODULUS
