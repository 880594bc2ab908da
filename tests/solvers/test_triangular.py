"""The factorization and the equations: right, failing where they must, the same for any number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layers import layer
from torch import Tensor

from quantkit.solvers.triangular import cholesky, solve_symmetric


def definite(n: int) -> Tensor:
    _, hessian = layer(1, n)
    return hessian / hessian.diagonal().mean() + 0.01 * torch.eye(n)


@pytest.mark.parametrize("n", [1, 2, 127, 128, 129, 511, 513, 650, 1100])
def test_factor(n: int) -> None:
    matrix = definite(n)
    expected = np.linalg.cholesky(matrix.double().numpy())
    matrix.triu_(1).mul_(7).add_(definite(n).tril())  # what is above the diagonal is not read
    assert cholesky(matrix)
    np.testing.assert_allclose(matrix.numpy(), expected, atol=3e-5)
    assert torch.equal(matrix, matrix.tril())


@pytest.mark.parametrize("at", [0, 3, 127, 128, 300, 599])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_no_factor(at: int, value: float) -> None:
    matrix = definite(600)
    matrix[at, at] = value
    assert not cholesky(matrix)


@pytest.mark.parametrize("rows", [1, 30])
@pytest.mark.parametrize("n", [1, 128, 129, 300])
def test_equations(rows: int, n: int) -> None:
    lower, pivots = definite(n), torch.linspace(0.5, 2, n)
    assert cholesky(lower)
    lower /= lower.diagonal().clone()
    right = torch.randn(rows, n, generator=torch.Generator().manual_seed(0))
    x = right.clone()
    solve_symmetric(lower, pivots, x)
    matrix = (lower.double() * pivots.double().square()) @ lower.double().mT
    np.testing.assert_allclose((x.double() @ matrix).numpy(), right.numpy(), atol=1e-3)


@pytest.mark.parametrize("n", [5, 133, 700])
def test_same_bytes_for_any_number_of_threads(n: int) -> None:
    found = set()
    matrix = definite(n)
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        lower = matrix.clone()
        assert cholesky(lower)
        lower /= lower.diagonal().clone()
        found.add(lower.numpy().tobytes())
    assert len(found) == 1
