"""The sum of bytes at their places, beside one that takes byte after byte."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from quantkit.kernels.sums import MODULUS, position_sum


def slow(data: bytes, offset: int) -> int:
    return sum((b << 8 * (i % 8)) * (2 * (i // 8) + 1) for i, b in enumerate(data, offset)) % MODULUS


def fast(data: bytes, offset: int) -> int:
    return position_sum(np.frombuffer(data, np.uint8), offset)


@given(st.binary(max_size=100), st.integers(0, 1 << 45))
def test_it_is_the_sum(data: bytes, offset: int) -> None:
    assert fast(data, offset) == slow(data, offset)


def test_of_many_words() -> None:
    data = np.random.default_rng(0).integers(0, 256, 300_007, np.uint8).tobytes()
    assert fast(data, 13) == slow(data, 13)


@given(st.binary(min_size=1, max_size=200), st.integers(0, 1 << 45), st.randoms(use_true_random=False))
def test_pieces_in_any_order_add_up(data: bytes, offset: int, chance: random.Random) -> None:
    cuts = sorted({0, len(data), *(chance.randrange(len(data)) for _ in range(4))})
    pieces = list(pairwise(cuts))
    chance.shuffle(pieces)
    assert sum(fast(data[a:b], offset + a) for a, b in pieces) % MODULUS == fast(data, offset)


@given(st.binary(min_size=1, max_size=64), st.integers(0, 1 << 45), st.data())
def test_no_change_of_one_byte_goes_unseen(data: bytes, offset: int, draw: st.DataObject) -> None:
    at, by = draw.draw(st.integers(0, len(data) - 1)), draw.draw(st.integers(1, 255))
    assert fast(data[:at] + bytes([data[at] ^ by]) + data[at + 1 :], offset) != fast(data, offset)
