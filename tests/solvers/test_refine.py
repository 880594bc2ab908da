"""Descent and refit go down the loss, and never up."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import layer
from torch import Tensor

from quantkit.solvers import refine
from quantkit.solvers.grids import Columns, Grid, search_scales
from quantkit.solvers.projection import Projection, residual, round_all, uniform
from quantkit.solvers.refine import descend, refit


def loss(weight: Tensor, hessian: Tensor, projection: Projection, codes: Tensor) -> np.ndarray:
    """Of every row, in float64."""
    group = projection.group.long()
    restored = (codes.double() - projection.zeros.double()[:, group]) * projection.scales.double()[:, group]
    e, h = (weight.double() - restored).numpy(), hessian.double().numpy()
    return np.einsum("ri,ij,rj->r", e, h, e)


def rounded(weight: Tensor, grid: Grid, keep: Tensor | None = None) -> tuple[Projection, Tensor]:
    projection = uniform(grid.bits, *search_scales(weight, grid), grid.natural(weight.shape[1]), keep)
    return projection, round_all(weight, projection)


@pytest.mark.parametrize("ridge", [0.0, 0.05])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 50), (8, -1)])
def test_every_step_wins(bits: int, group_size: int, symmetric: bool, ridge: float) -> None:
    weight, hessian = layer(24, 300)
    ridge *= float(hessian.diagonal().mean())
    damped = hessian + ridge * torch.eye(300)
    projection, codes = rounded(weight, Grid(bits, group_size, symmetric))
    losses = [loss(weight, damped, projection, codes)]
    for _ in range(3):
        projection = refit(weight, hessian, projection, codes, ridge)
        losses.append(loss(weight, damped, projection, codes))
        descend(weight, hessian, projection, codes, ridge)
        losses.append(loss(weight, damped, projection, codes))
    for before, after in pairwise(losses):
        assert (after <= before * (1 + 1e-6)).all()
    assert losses[-1].sum() < 0.7 * losses[0].sum()
    assert torch.equal(projection.scales.half().float(), projection.scales)
    assert (projection.scales != 0).all()
    assert (codes <= 2**bits - 1).all()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_never_worse(data: st.DataObject) -> None:
    """For a single row or column, dead channels, singular and ill-conditioned Hessians, pruned weights."""
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 40))
    seed = data.draw(st.integers(0, 1000))
    weight, hessian = layer(rows, width, seed, tokens=data.draw(st.sampled_from([1, 4, 100])))
    sizes = 10 ** (
        data.draw(st.sampled_from([0, 2])) * torch.randn(width, generator=torch.Generator().manual_seed(seed))
    )
    hessian = sizes[:, None] * hessian * sizes
    for column in data.draw(st.sets(st.integers(0, width - 1), max_size=3)):
        hessian[column] = 0
        hessian[:, column] = 0
    keep = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) > 0.3
    grid = Grid(data.draw(st.sampled_from([2, 3, 4, 8])), data.draw(st.sampled_from([-1, 4, 16])), bool(seed % 2))
    projection, codes = rounded(weight * keep, grid, keep if seed % 3 else None)
    before = loss(weight, hessian, projection, codes)
    # The terms of which the loss is the sum may be far larger than it is: float32 sees it only down to here.
    noise = 1e-12 * (residual(weight, codes, projection).abs() @ hessian.diagonal().sqrt()).double().square().numpy()
    refitted = refit(weight, hessian, projection, codes)
    between = loss(weight, hessian, refitted, codes)
    assert (between <= before.clip(0) * (1 + 1e-6) + noise).all()
    descend(weight, hessian, refitted, codes)
    assert (loss(weight, hessian, refitted, codes) <= between.clip(0) * (1 + 1e-6) + noise).all()
    if projection.keep is not None:
        assert not residual(torch.zeros_like(weight), codes, refitted)[~keep].any()
    dead = hessian.diagonal() == 0
    nearest = residual(weight, round_all(weight, refitted), refitted)[:, dead].abs()
    assert (residual(weight, codes, refitted)[:, dead].abs() <= nearest * 1.0001).all()


def test_refit_of_one_group_is_the_best_scale() -> None:
    weight, hessian = layer(10, 80)
    projection, codes = rounded(weight, Grid(3, -1))
    fitted = refit(weight, hessian, projection, codes)
    d, h = (codes.double() - 4).numpy(), hessian.double().numpy()
    best = np.einsum("ri,ij,rj->r", d, h, weight.double().numpy()) / np.einsum("ri,ij,rj->r", d, h, d)
    np.testing.assert_allclose(fitted.scales[:, 0].numpy(), best, rtol=2**-9)


def test_refit_is_near_the_best_of_all_groups_at_once() -> None:
    weight, hessian = layer(8, 256)
    projection, codes = rounded(weight, Grid(3, 32))
    fitted = refit(weight, hessian, projection, codes)
    d, h = (codes.double() - 4).numpy().reshape(8, 8, 32), hessian.double().numpy()
    best = projection.scales.double().clone()
    for row in range(8):
        spread = np.zeros((256, 8))
        for group in range(8):
            spread[group * 32 : group * 32 + 32, group] = d[row, group]
        system = spread.T @ h @ spread
        best[row] = torch.from_numpy(np.linalg.solve(system, spread.T @ h @ weight[row].double().numpy()))
    ideal = Projection(best, projection.zeros, projection.group, projection.top)
    start, near, least = (loss(weight, hessian, of, codes).sum() for of in (projection, fitted, ideal))
    assert least < near < start
    assert start - near > 0.97 * (start - least)


def test_descent_ends_where_no_code_can_be_better() -> None:
    weight, hessian = layer(4, 40)
    projection, codes = rounded(weight, Grid(3, 16))
    for _ in range(50):
        descend(weight, hessian, projection, codes)
    least = loss(weight, hessian, projection, codes)
    for column in range(40):
        for step in (-1, 1):
            other = codes.clone()
            other[:, column] = (codes[:, column].int() + step).clamp(0, 7).to(torch.uint8)
            assert (loss(weight, hessian, projection, other) >= least * (1 - 1e-4)).all()


def test_twin_of_descent_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = layer(9, 200)
    hessian[20] = 0
    hessian[:, 20] = 0
    keep = torch.rand(9, 200, generator=torch.Generator().manual_seed(1)) > 0.3
    for symmetric, mask in ((True, None), (False, keep)):
        projection, codes = rounded(weight, Grid(3, 64, symmetric), mask)
        twin = codes.clone()
        descend(weight, hessian, projection, codes)
        with monkeypatch.context() as patch:
            patch.setattr(refine, "_descend_numba", partial(refine._descend_blocks, refine._block_torch))
            descend(weight, hessian, projection, twin)
        assert torch.equal(codes, twin)


@pytest.mark.parametrize("snapped", [False, True])
@pytest.mark.parametrize("scattered", [False, True])
def test_twin_of_refit_in_torch(scattered: bool, snapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = layer(9, 200)
    hessian[64:128] = 0  # a group that nothing is known of
    hessian[:, 64:128] = 0
    grid = Grid(3, 64, False)
    group = grid.natural(200)
    if scattered:
        group = group[torch.randperm(200, generator=torch.Generator().manual_seed(2))]
    keep = torch.rand(9, 200, generator=torch.Generator().manual_seed(1)) > 0.3
    projection = uniform(3, *search_scales(weight, grid, Columns.of(grid, group)), group, keep)
    codes = round_all(weight, projection)
    allowed = None
    if snapped:  # of either sign: scales of a grid that is not symmetric may be negative
        allowed = projection.scales.abs().mean() * torch.linspace(-1.5, 1.5, 16).repeat(4, 1)
    fitted = refit(weight, hessian, projection, codes, 0.1, allowed)
    with monkeypatch.context() as patch:
        patch.setattr(refine, "_fit_numba", refine._fit_torch)
        twin = refit(weight, hessian, projection, codes, 0.1, allowed)
    assert torch.equal(fitted.scales, twin.scales)
    moved = fitted.scales != projection.scales
    assert moved.any(0).tolist() == [True, True, True, True]
    if snapped:
        assert allowed is not None
        assert torch.isin(fitted.scales[moved], allowed).all()


def test_a_scale_that_would_be_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is best for these codes is 0, which is no scale."""
    one = torch.full((1, 1), 0.5)
    projection = Projection(one, 16 * one, torch.zeros(4, dtype=torch.int32), torch.full((4,), 15.0))
    target, codes = torch.tensor([[1.0, -1, 0, 0]]), torch.tensor([[9, 9, 8, 8]], dtype=torch.uint8)
    assert refit(target, torch.eye(4), projection, codes).scales.item() == 0.5
    monkeypatch.setattr(refine, "_fit_numba", refine._fit_torch)
    assert refit(target, torch.eye(4), projection, codes).scales.item() == 0.5


def test_the_ridge_is_added_with_one_rounding() -> None:
    """As the twins in torch have it: on the edge of a decision the last bit of a gradient is a code."""
    generator = torch.Generator().manual_seed(1)
    rows, width, ridge = 512, 64, 0.5312345
    hessian = torch.diag(torch.rand(width, generator=generator) * 3 + 0.5)
    scales = (torch.rand(rows, 1, generator=generator) + 0.1).half().float()
    group, top = torch.zeros(width, dtype=torch.int32), torch.full((width,), 15.0)
    projection = Projection(scales, torch.full((rows, 1), 8.0), group, top)
    target = scales * (0.5005 + 1e-7 * torch.randn(rows, width, generator=generator))
    codes = torch.full((rows, width), 8, dtype=torch.uint8)
    twin, errors = codes.clone(), residual(target, codes, projection)
    descend(target, hessian, projection, codes, ridge)
    refine._descend_blocks(refine._block_torch, hessian, projection, twin, errors, ridge)
    assert 0 < int((codes == 9).sum()) < codes.numel()
    assert int((codes != twin).sum()) < 5  # of the rows that go one way or the other by less than a bit
