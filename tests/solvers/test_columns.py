"""The column solver gives what the slow, obvious GPTQ gives that knows the inverse and nothing of a factor."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import layer
from oracle import gptq as oracle
from torch import Tensor

from quantkit.solvers import columns
from quantkit.solvers.columns import solve_columns
from quantkit.solvers.factor import Factor, factorize
from quantkit.solvers.gptq import Settings, processing_order, solve
from quantkit.solvers.grids import Grid, search_scales
from quantkit.solvers.projection import Projection, residual, round_all, uniform
from quantkit.solvers.quadratic import row_losses, total

ORDERS = ["static", "none", "group"]


def factor_of(hessian: Tensor, order: Tensor, damp: float = 0.01) -> Factor:
    factor = factorize(hessian, order, damp)
    assert factor is not None
    return factor


def doubles(*tensors: Tensor) -> list[Any]:
    return [tensor.double().numpy() for tensor in tensors]


def slow_codes(weight: Tensor, hessian: Tensor, order: Tensor, projection: Projection, damp: float = 0.01) -> Tensor:
    scales, zeros = projection.scales.double().numpy(), projection.zeros.long().numpy()
    bits = [int(top + 1).bit_length() - 1 for top in projection.top]
    keep = None if projection.keep is None else projection.keep.numpy()
    group = projection.group.long().numpy()
    codes = oracle.solve(*doubles(weight, hessian), order.tolist(), damp, scales, zeros, group, bits, keep)
    return torch.from_numpy(codes).to(torch.uint8)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 128), (4, 30), (8, -1)])
@pytest.mark.parametrize(("rows", "width"), [(4, 300), (3, 61), (6, 128), (2, 129)])
def test_same_codes_as_the_oracle(
    rows: int, width: int, bits: int, group_size: int, symmetric: bool, order: Any
) -> None:
    weight, hessian = layer(rows, width)
    hessian[width // 2] = 0
    hessian[:, width // 2] = 0
    solved = solve(weight, hessian, Settings(Grid(bits, group_size, symmetric), order, 0.01, 0, 0))
    coded, processing = solved.coded, processing_order(hessian, order)
    projection = uniform(bits, *map(torch.from_numpy, (coded.scales, coded.zeros, coded.g_idx)))
    expected = slow_codes(weight, hessian, processing, projection)
    np.testing.assert_array_equal(coded.codes, expected.numpy())
    loss = oracle.loss(*doubles(weight), coded.restore().astype(np.float64), *doubles(hessian))
    assert solved.report.loss == pytest.approx(loss, rel=1e-6)
    np.testing.assert_array_equal(coded.codes[:, width // 2], round_all(weight, projection).numpy()[:, width // 2])


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_no_more_loss_than_the_oracle(data: st.DataObject) -> None:
    """Any shape and order, singular Hessians, dead channels: float32 may decide a tie otherwise, never badly."""
    rows, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40))
    seed = data.draw(st.integers(0, 1000))
    weight, hessian = layer(rows, width, seed, tokens=data.draw(st.sampled_from([1, width, 3 * width])))
    for column in data.draw(st.sets(st.integers(0, width - 1), max_size=3)):
        hessian[column] = 0
        hessian[:, column] = 0
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    grid = Grid(data.draw(st.sampled_from([2, 3, 4, 8])), data.draw(st.sampled_from([-1, 4, 16])), bool(seed % 2))
    projection = uniform(grid.bits, *search_scales(weight, grid), grid.natural(width))
    codes = solve_columns(weight, factor_of(hessian, order), projection)
    expected = slow_codes(weight, hessian, order, projection)
    h, _ = oracle.damped(*doubles(hessian), 0.01)
    losses = [
        float(np.trace(e @ h @ e.T))
        for e in (residual(weight, of, projection).double().numpy() for of in (codes, expected))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.02, abs=1e-12)


def masked(rows: int, width: int) -> Tensor:
    keep = torch.rand(rows, width, generator=torch.Generator().manual_seed(5)) > 0.5
    keep[0] = False
    keep[1] = True
    return keep


@pytest.mark.parametrize("symmetric", [True, False])
def test_pruned_weights_are_exactly_zero_and_the_others_make_up_for_them(symmetric: bool) -> None:
    weight, hessian = layer(6, 150)
    keep = masked(6, 150)
    solved = solve(weight, hessian, Settings(Grid(4, 32, symmetric), "static", 0.01, 0, 0), keep=keep)
    restored = torch.from_numpy(solved.coded.restore())
    assert not restored[~keep].any()
    pruned, size = total(row_losses(weight - weight * keep, hessian)), total(row_losses(weight, hessian))
    assert solved.report.loss is not None
    assert solved.report.loss < 0.9 * pruned / size  # a whole row of them is pruned, and cannot
    coded = solved.coded
    projection = uniform(4, *map(torch.from_numpy, (coded.scales, coded.zeros, coded.g_idx)), keep)
    expected = slow_codes(weight, hessian, processing_order(hessian, "static"), projection)
    np.testing.assert_array_equal(coded.codes, expected.numpy())


def mixed(rows: int, width: int) -> Projection:
    """2, 3, 4 and 8 bits by turns of 20 columns, scales that are no float16, half of the weights pruned."""
    generator = torch.Generator().manual_seed(7)
    group = torch.arange(width) // 20
    bits = torch.tensor([2, 3, 4, 8])[group % 4]
    scales = 0.03 * (1 + torch.rand(rows, int(group.max()) + 1, generator=generator)) / 2.0 ** bits[::20]
    zeros = (2.0 ** (bits[::20] - 1)).expand(rows, -1).contiguous()
    return Projection(scales, zeros, group.to(torch.int32), 2.0**bits - 1, masked(rows, width))


def test_bits_may_differ_from_column_to_column() -> None:
    weight, hessian = layer(5, 200)
    projection, order = mixed(5, 200), processing_order(hessian, "static")
    codes = solve_columns(weight, factor_of(hessian, order), projection)
    assert torch.equal(codes, slow_codes(weight, hessian, order, projection))
    assert (codes <= projection.top).all()


def test_twin_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = layer(9, 300)
    order = processing_order(hessian, "static")
    grid = Grid(4, 64, False)
    whole = uniform(4, *search_scales(weight, grid), grid.natural(300))
    for projection in (whole, mixed(9, 300)):
        codes = solve_columns(weight, factor_of(hessian, order), projection)
        with monkeypatch.context() as patch:
            patch.setattr(columns, "_solve_numba", partial(columns._solve_blocks, columns._block_torch))
            twin = solve_columns(weight, factor_of(hessian, order), projection)
        assert torch.equal(codes, twin)


def test_codes_are_codes_whatever_happens() -> None:
    """A factor that blows up ends in infinities; a code beyond the largest would spill into its neighbours."""
    weight, hessian = layer(3, 260)
    factor = factor_of(hessian, torch.arange(260))
    factor.lower.mul_(1e30)
    grid = Grid(3, 64)
    projection = uniform(3, *search_scales(weight, grid), grid.natural(260))
    assert (solve_columns(weight, factor, projection) <= 7).all()
