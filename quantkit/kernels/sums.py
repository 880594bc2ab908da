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
_PLACES = np.arange(1 << 12, dtype=np.uint64)


def position_sum(data: npt.NDArray[Any], offset: int) -> int:
    """Σ word · (2 · place + 1) mod 2⁶⁴ over the little-endian 64-bit words of a file, of which `data`, uint8 [n], lies
    at byte `offset`; all else counts as zero. The weights are odd, so no change of a single word goes unseen.
    """
    head = min(-offset % 8, data.size)
    end = data.size - (data.size - head) % 8
    words, place = data[head:end].view("<u8"), (offset + head) // 8
    # Row by row, in few calls: threads that take the interpreter's lock often wait for each other.
    whole = words.size // _PLACES.size * _PLACES.size
    rows = words[:whole].reshape(-1, _PLACES.size)
    starts = np.arange(len(rows), dtype=np.uint64) * np.uint64(_PLACES.size)
    sums = rows.sum(axis=1)
    total = int(sums.sum()) * (2 * place + 1) + 2 * (int(np.dot(sums, starts)) + int((rows @ _PLACES).sum()))
    rest = words[whole:]
    total += int(rest.sum()) * (2 * (place + whole) + 1) + 2 * int(np.dot(rest, _PLACES[: rest.size]))
    for piece, at in ((data[:head], offset), (data[end:], offset + end)):
        total += (int.from_bytes(piece.tobytes(), "little") << 8 * (at % 8)) * (2 * (at // 8) + 1)
    return total % MODULUS
