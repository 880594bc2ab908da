"""The two orders in which the rows of a rotary projection are stored.

Rotary position embedding turns pairs of a head's D rows. Meta's and Mistral's programs turn neighbours (2j, 2j + 1),
transformers turns (j, j + D/2). So the same weight is stored in two orders, head by head: "pairs" and "halves". Plain
copies of whole rows; numpy moves them at the speed of memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def to_halves(x: Array, head_dim: int, columns: int) -> Array:
    """x: whole heads of [head_dim, columns], flat, in pairs → a fresh flat array in halves: row c·D/2 + j is row
    2j + c. `head_dim` is even."""
    return _swap(x, head_dim // 2, 2, columns)


def to_pairs(x: Array, head_dim: int, columns: int) -> Array:
    """The inverse of `to_halves`: row 2j + c is row c·D/2 + j. (The two are the same map only for D = 4.)"""
    return _swap(x, 2, head_dim // 2, columns)


def _swap(x: Array, first: int, second: int, columns: int) -> Array:
    return np.ascontiguousarray(x.reshape(-1, first, second, columns).swapaxes(1, 2)).reshape(-1)
