"""A sum of bytes at their places in a file, which pieces that are written in any order add up to.

It tells what was written from what a disk gives back, also where a network filesystem gives zeros or an older page. It
is fast, and no protection from somebody who means it: that is what the SHA-256 of a file is for. In numpy, so that
copying needs no compiler.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

MODULUS = 1 << 64
_PLACES = np.arange(1 << 14, dtype=np.uint64)


def position_sum(data: npt.NDArray[Any], offset: int) -> int:
    """Σ word · (2 · place + 1) mod 2⁶⁴ over the little-endian 64-bit words of a file, of which `data`, uint8 [n], lies
    at byte `offset`; all else counts as zero. The weights are odd, so no change of a single word goes unseen.
    """
    head = min(-offset % 8, data.size)
    end = data.size - (data.size - head) % 8
    words, first = data[head:end].view("<u8"), (offset + head) // 8
    total = 0
    for i in range(0, words.size, _PLACES.size):
        part = words[i : i + _PLACES.size]
        total += int(part.sum()) * (2 * (first + i) + 1) + 2 * int(np.dot(part, _PLACES[: part.size]))
    for piece, at in ((data[:head], offset), (data[end:], offset + end)):
        total += (int.from_bytes(piece.tobytes(), "little") << 8 * (at % 8)) * (2 * (at // 8) + 1)
    return total % MODULUS
