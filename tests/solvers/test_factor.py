"""The Hessian's factor: right, whatever the Hessian is, in one matrix of memory, and the same for any threads."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import layer
from oracle import gptq as oracle
from torch import Tensor

from quantkit.solvers.factor import Factor, dampings, factorize


def product(factor: Factor) -> Tensor:
    lower = factor.lower.double() * factor.pivots.double()
    return lower @ lower.T


@pytest.mark.parametrize("unit", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("n", [1, 2, 127, 128, 129, 513, 700])
def test_product_is_the_damped_hessian_in_the_order_of_rounding(n: int, unit: float) -> None:
    _, hessian = layer(1, n)
    hessian[n // 3] = 0
    hessian[:, n // 3] = 0
    hessian *= unit
    before = hessian.clone()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    factor = factorize(hessian, order, 0.05)
    assert factor is not None
    assert torch.equal(hessian, before)
    expected, dead = oracle.damped(hessian.double().numpy(), 0.05)
    position = order.flip(0).numpy()
    np.testing.assert_allclose(product(factor).numpy(), expected[position][:, position], atol=2e-5)
    assert factor.damp == 0.05
    assert factor.dead.tolist() == dead.nonzero()[0].tolist()
    assert torch.equal(factor.lower, factor.lower.tril())
    assert (factor.lower.diagonal() == 1).all()


def test_dead_columns_are_strangers_even_where_the_hessian_says_otherwise() -> None:
    _, hessian = layer(1, 50)
    hessian.diagonal()[7] = 0  # a sum of squares that has left float32 from below may leave this
    factor = factorize(hessian, torch.arange(50), 0.01)
    assert factor is not None
    at = int((factor.position == 7).nonzero())
    assert not factor.lower[at, :at].any()
    assert not factor.lower[at + 1 :, at].any()


@pytest.mark.parametrize("damp", [0.0, 1e-8])
def test_damping_grows_until_there_is_a_factor(damp: float) -> None:
    inputs = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    hessian = inputs.T @ inputs
    hessian.diagonal().sub_(1e-3)  # as rounding errors may
    factor = factorize(hessian, torch.arange(200), damp)
    assert factor is not None
    assert factor.damp > damp
    assert factor.damp in list(dampings(damp))
    assert factor.damp <= 0.01


def test_sequence_of_dampings() -> None:
    assert list(dampings(0.01)) == pytest.approx([0.01, 0.1, 1, 10, 100, 1000])
    assert list(dampings(0)) == pytest.approx([0, 1e-4, 1e-3, 0.01, 0.1, 1, 10, 100, 1000])
    assert list(dampings(1e4)) == [1e4]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_factor_where_a_number_is_not_finite(value: float) -> None:
    _, hessian = layer(1, 300)
    hessian[299, 3] = value
    assert factorize(hessian, torch.arange(300), 0.01) is None


def test_no_factor_of_what_is_no_hessian() -> None:
    hessian = torch.full((40, 40), 1e6) - 2e6 * torch.eye(40)
    hessian.diagonal()[0] = 1.0
    assert factorize(hessian, torch.arange(40), 0.01) is None


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_never_raises(data: st.DataObject) -> None:
    n, tokens = data.draw(st.integers(1, 30)), data.draw(st.integers(0, 40))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    spread = data.draw(st.sampled_from([0, 1, 5]))
    inputs = torch.randn(tokens, n, generator=generator) * 10 ** (spread * torch.randn(n, generator=generator))
    hessian = inputs.T @ inputs
    if data.draw(st.booleans()):
        hessian -= data.draw(st.sampled_from([1e-6, 1e-2, 10.0])) * hessian.diagonal().mean() * torch.eye(n)
    factor = factorize(hessian, torch.arange(n), data.draw(st.sampled_from([0.0, 1e-6, 0.01, 1.0])))
    if factor is not None:
        assert torch.isfinite(factor.lower).all()
        assert (factor.pivots > 0).all()


@pytest.mark.parametrize("n", [200, 1100])
def test_same_bytes_for_any_number_of_threads(n: int) -> None:
    _, hessian = layer(1, n, tokens=64)
    found = set()
    for threads in (1, 2, 3, 16):
        torch.set_num_threads(threads)
        factor = factorize(hessian, torch.arange(n), 0.01)
        assert factor is not None
        found.add(b"".join(part.numpy().tobytes() for part in (factor.lower, factor.pivots)))
    assert len(found) == 1


GROWS = """
import torch
from quantkit.solvers.gptq import Settings, solve
from quantkit.solvers.grids import Grid
from quantkit.torch_setup import prepare_torch

prepare_torch(2)
generator = torch.Generator().manual_seed(0)
sizes = []
for _ in range(40):
    x = torch.randn(512, 256, generator=generator)
    solve(torch.randn(128, 256, generator=generator), x.T @ x, Settings(Grid(4, 32)))
    sizes.append(int(open("/proc/self/statm").read().split()[1]) * 4096)
print(sizes[-1] - sizes[9])
"""


def test_nothing_is_kept_of_a_weight_that_is_solved() -> None:
    """oneDNN compiles a kernel for each factor that is added with a product, and keeps it: half a megabyte a weight."""
    done = subprocess.run([sys.executable, "-c", GROWS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 4 << 20


MEASURE = """
import resource, torch
from quantkit.solvers.gptq import Settings, solve
from quantkit.solvers.grids import Grid

def now():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def run(n):
    hessian = torch.eye(n)
    hessian[0] = hessian[:, 0] = 0.001
    hessian[5, 5] = 0  # the way with dead columns, too
    weight = torch.randn(16, n, generator=torch.Generator().manual_seed(0))
    before = now()
    solve(weight, hessian, Settings(Grid(4), passes=1, refits=1))
    peak = int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) * 1024
    return (peak - before) / (4 * n * n)

torch.set_num_threads(1)
run(600)  # what is compiled and reserved once
print(run(4096))
"""


def test_one_matrix_besides_the_hessian() -> None:
    """Measured by what the process ever held, in matrices of 4096 × 4096; products need some 20 MB more."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, timeout=120)
    assert 0.95 < float(done.stdout) < 1.6
