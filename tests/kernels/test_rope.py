"""The two row orders against loops written from the definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.kernels.rope import to_halves, to_pairs


def slow_halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Row c·D/2 + j of each head is its row 2j + c."""
    out = np.empty_like(rows)
    for head in range(len(rows) // head_dim):
        for j in range(head_dim // 2):
            for c in (0, 1):
                out[head * head_dim + c * head_dim // 2 + j] = rows[head * head_dim + 2 * j + c]
    return out


@given(st.integers(1, 5), st.integers(1, 20), st.integers(1, 7), st.sampled_from(["u1", "u2", "u4"]))
def test_against_loops_and_back(heads: int, half: int, columns: int, dtype: str) -> None:
    head_dim = 2 * half
    x = np.random.default_rng(0).integers(0, 255, (heads * head_dim, columns)).astype(dtype)
    halves = to_halves(x.reshape(-1), head_dim, columns)
    assert np.array_equal(halves.reshape(x.shape), slow_halves(x, head_dim))
    assert np.array_equal(to_pairs(halves, head_dim, columns), x.reshape(-1))


def test_the_order_of_16_rows() -> None:
    assert to_pairs(np.arange(16), 16, 1).tolist() == [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]


@pytest.mark.parametrize("head_dim", [2, 4, 8, 64])
def test_only_heads_of_four_forgive_the_wrong_direction(head_dim: int) -> None:
    x = np.arange(head_dim * 3)
    assert np.array_equal(to_halves(x, head_dim, 1), to_pairs(x, head_dim, 1)) == (head_dim <= 4)
