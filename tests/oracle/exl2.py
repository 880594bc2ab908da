"""EXL2 read one number at a time, from the format's description alone: slow, and without anything of quantkit's."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

HALF = np.float16


def code(words: npt.NDArray[np.int32], row: int, bits: int, column: int) -> int:
    """The code of a group's row-th row in a column, from the words of that group."""
    value = 0
    for i in range(bits):
        bit = row * bits + i
        value |= ((int(words[bit // 32, column]) >> (bit % 32)) & 1) << i
    return value


def decode(tensors: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
    """[out, in] of q_weight, q_scale, q_scale_max, q_groups and q_invperm."""
    words, scales, maxima = tensors["q_weight"], tensors["q_scale"], tensors["q_scale_max"]
    table, inverse = tensors["q_groups"], tensors["q_invperm"]
    columns, inputs = words.shape[1], len(inverse)
    order = np.argsort(inverse)
    found = np.zeros((columns, inputs), np.float32)
    row = 0
    for g in range(len(maxima)):
        bits, first = int(table[2 * g]), int(table[2 * g + 1])
        last = int(table[2 * g + 3]) if g + 1 < len(maxima) else len(words)
        unit = HALF(maxima[g] * HALF(1 / 256))
        for local in range((last - first) * 32 // bits):
            for n in range(columns):
                nibble = (int(scales[g, n // 8]) >> (4 * (n % 8))) & 15
                scale = HALF(HALF((nibble + 1) ** 2) * unit)
                level = HALF(code(words[first:last], local, bits, n) - 2 ** (bits - 1))
                found[n, order[row]] = HALF(level * scale)
            row += 1
    assert row == inputs
    return found
