"""Grids: the scales searched are ones that a file can hold, and the codes are the nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from quantkit.solvers import grids
from quantkit.solvers.coded import Coded
from quantkit.solvers.grids import Columns, Grid, ratios, round_to_grid, rtn, search_scales
from quantkit.solvers.scales_torch import search_torch

BITS = [2, 3, 4, 8]
MODES = [True, False]


def normal(rows: int, columns: int, scale: float = 0.02) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * scale


def error(weight: Tensor, restored: np.ndarray, importance: Tensor | None = None) -> float:
    squares = (weight.double() - torch.from_numpy(restored).double()).square()
    return float((squares if importance is None else squares * importance).sum() / weight.double().square().sum())


def assert_storable(coded: Coded, grid: Grid) -> None:
    assert coded.scales.dtype == np.float16
    assert np.isfinite(coded.scales).all()
    assert (coded.scales != 0).all()
    assert coded.codes.max() <= grid.top
    assert coded.zeros.min() >= 1
    assert coded.zeros.max() <= grid.top
    if grid.symmetric:
        assert (coded.zeros == 2 ** (grid.bits - 1)).all()


@pytest.mark.parametrize("symmetric", MODES)
@pytest.mark.parametrize("bits", BITS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_finite_weight_gets_codes_that_a_file_can_hold(bits: int, symmetric: bool, data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 40)))
    numbers = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.floats(-1, 1, width=32) | st.just(0.0)
    weight = torch.from_numpy(data.draw(hnp.arrays(np.float32, shape, elements=numbers)))
    grid = Grid(bits, data.draw(st.sampled_from([-1, 1, 3, 8, 64])), symmetric)
    importance = data.draw(st.none() | hnp.arrays(np.float32, shape[1:], elements=st.floats(0, 2.0**60, width=32)))
    coded = rtn(weight, grid, None if importance is None else torch.from_numpy(importance))
    assert_storable(coded, grid)
    restored = coded.restore()
    assert not restored[weight.numpy() == 0].any()
    assert coded.scales.shape == (shape[0], grid.groups(shape[1]))


@pytest.mark.parametrize("symmetric", MODES)
@pytest.mark.parametrize("bits", BITS)
def test_group_of_zeros(bits: int, symmetric: bool) -> None:
    weight = normal(6, 96)
    weight[2, 32:64] = 0
    weight[5] = 0
    coded = rtn(weight, Grid(bits, 32, symmetric))
    assert coded.scales[2, 1] == 1
    assert (coded.scales[5] == 1).all()
    assert not coded.restore()[2, 32:64].any()
    assert not coded.restore()[5].any()
    assert_storable(coded, Grid(bits, 32, symmetric))


@pytest.mark.parametrize("value", [6e4, 1.0, -0.037, 3e-3, -7e-4])
@pytest.mark.parametrize("symmetric", MODES)
@pytest.mark.parametrize("bits", BITS)
def test_group_of_equal_weights_is_as_exact_as_its_scale(bits: int, symmetric: bool, value: float) -> None:
    weight = torch.full((2, 64), value)
    restored = rtn(weight, Grid(bits, 32, symmetric)).restore()
    subnormal = 2.0**-25 * 2**bits  # half the spacing of subnormal scales, times the largest code
    np.testing.assert_allclose(restored, weight.numpy(), rtol=2**-10, atol=subnormal)


@pytest.mark.parametrize("symmetric", MODES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", BITS)
def test_weights_of_one_sign(bits: int, sign: int, symmetric: bool) -> None:
    """No clipping above half of the range, as the classic scale has it, and for asymmetric codes no wasted half."""
    weight = normal(16, 64).abs() * sign
    found = error(weight, rtn(weight, Grid(bits, 64, symmetric)).restore())
    steps = 2 ** (bits - 1) if symmetric else 2**bits - 1
    uniform = weight.abs().amax(1, keepdim=True) / steps
    plain = error(weight, (weight.div(uniform).round() * uniform).numpy())
    assert found <= plain * 1.001


@pytest.mark.parametrize("symmetric", MODES)
@pytest.mark.parametrize(("scale", "most"), [(1e-4, 0.02), (1e-6, 0.5), (1e-9, 1.0), (1e-40, 1.0)])
def test_tiny_weights(scale: float, most: float, symmetric: bool) -> None:
    """As good as subnormal scales can be; below the smallest of them everything is zero, and no scale is."""
    weight = normal(4, 64, scale)
    coded = rtn(weight, Grid(4, 32, symmetric))
    assert_storable(coded, Grid(4, 32, symmetric))
    assert error(weight, coded.restore()) <= most
    if most == 1.0:
        assert not coded.restore().any()
        assert (np.abs(coded.scales) >= 2.0**-14).all()


@pytest.mark.parametrize("symmetric", MODES)
def test_huge_weights_are_clipped_to_what_float16_scales_reach(symmetric: bool) -> None:
    coded = rtn(normal(4, 64, 1e30), Grid(4, 32, symmetric))
    assert_storable(coded, Grid(4, 32, symmetric))
    assert (np.abs(coded.scales) == 65504).all()


@pytest.mark.parametrize("bits", BITS)
def test_extreme_may_be_the_lowest_code(bits: int) -> None:
    """Weights on a grid of the full range come back exactly, whichever side has the one code more."""
    top = 2 ** (bits - 1)
    levels = torch.randint(-top, top, (8, 64), generator=torch.Generator().manual_seed(1))
    levels[:, 5] = -top
    levels[4:] *= -1
    weight = levels * torch.tensor([0.25, 0.0078125, 0.5, 1.5]).repeat(2)[:, None]
    coded = rtn(weight, Grid(bits, -1))
    np.testing.assert_array_equal(coded.restore(), weight.numpy())
    assert (coded.scales[:4] > 0).all()
    assert (coded.scales[4:] < 0).all()


@pytest.mark.parametrize("symmetric", MODES)
@pytest.mark.parametrize(("bits", "margin"), [(2, 0.75), (3, 0.85), (4, 0.92), (8, 1.0)])
def test_search_beats_the_whole_range(bits: int, margin: float, symmetric: bool) -> None:
    weight, grid = normal(64, 512), Grid(bits, 64, symmetric)
    least, most = weight.view(64, 8, 64).amin(2), weight.view(64, 8, 64).amax(2)
    if symmetric:
        scale = torch.maximum(most, -least) / (2 ** (bits - 1) - 0.5)
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        scale = (most - least) / grid.top
        zero = (-least / scale).round().clamp(1, grid.top)
    group = grid.natural(512)
    codes = round_to_grid(weight, scale.half(), zero.to(torch.uint8), group, bits)
    plain = grids.coded(grid, codes, scale.half(), zero.to(torch.uint8), group)
    assert error(weight, rtn(weight, grid).restore()) < error(weight, plain.restore()) * margin


def test_importance_moves_the_error_to_where_it_does_not_matter() -> None:
    weight = normal(32, 256)
    importance = torch.ones(256)
    importance[::4] = 100
    grid = Grid(3, 64)
    weighed, even = rtn(weight, grid, importance).restore(), rtn(weight, grid).restore()
    assert error(weight, weighed, importance) < error(weight, even, importance) * 0.9
    assert error(weight, even) < error(weight, weighed)


def test_importance_of_none_is_importance_of_all() -> None:
    """Where no column of a group ever had an input, and in any unit."""
    weight, grid = normal(4, 64), Grid(4, 32)
    for importance in (torch.zeros(64), torch.full((64,), 1e-30), torch.full((64,), 1e38)):
        assert rtn(weight, grid, importance).scales.tobytes() == rtn(weight, grid).scales.tobytes()


def test_halves_go_to_the_even_code() -> None:
    scales, zeros = torch.tensor([[2.0]], dtype=torch.float16), torch.tensor([[8]], dtype=torch.uint8)
    weight = torch.tensor([[-17.0, -16, -15, -13, -3, -1, 0, 1, 3, 5, 13, 14, 15, 100, 3e38, -3e38]])
    codes = round_to_grid(weight, scales, zeros, torch.zeros(16, dtype=torch.int32), 4)
    assert codes.tolist() == [[0, 0, 0, 2, 6, 8, 8, 8, 10, 10, 14, 15, 15, 15, 15, 0]]


@pytest.mark.parametrize("symmetric", MODES)
@pytest.mark.parametrize("bits", BITS)
def test_groups_of_any_columns(bits: int, symmetric: bool) -> None:
    """A group is what `group` says: searching scattered groups is searching them gathered."""
    weight, grid = normal(8, 100), Grid(bits, 32, symmetric)
    importance = torch.rand(100, generator=torch.Generator().manual_seed(2))
    order = torch.randperm(100, generator=torch.Generator().manual_seed(3))
    group = torch.empty(100, dtype=torch.int32)
    group[order] = grid.natural(100)
    scattered = search_scales(weight, grid, Columns.of(grid, group, importance))
    members = torch.cat([order[start : start + 32].sort().values for start in range(0, 100, 32)])
    gathered = search_scales(weight[:, members], grid, Columns.of(grid, grid.natural(100), importance[members]))
    assert all(torch.equal(a, b) for a, b in zip(scattered, gathered, strict=True))


@pytest.mark.parametrize("group_size", [-1, 32, 48])
@pytest.mark.parametrize("symmetric", MODES)
@pytest.mark.parametrize("bits", BITS)
def test_twin_in_torch(bits: int, symmetric: bool, group_size: int) -> None:
    weight, grid = normal(16, 160), Grid(bits, group_size, symmetric)
    weight[3] = 0
    weight[4] = weight[4].abs()
    weight[5] *= 1e-5
    importance = torch.rand(160, generator=torch.Generator().manual_seed(2))
    scales, zeros = search_scales(weight, grid, Columns.of(grid, grid.natural(160), importance))
    edges = torch.tensor([*range(0, 160, group_size if group_size > 0 else 160), 160])
    twin_scales, twin_zeros = torch.empty(scales.shape), torch.empty(scales.shape)
    shifts = torch.tensor(grids.SHIFTS)
    options = (symmetric, grid.top, ratios(grid), shifts, grids.POLISH)
    search_torch(weight, importance, edges, *options, twin_scales, twin_zeros)
    same = (twin_scales == scales.float()) & (twin_zeros == zeros.float())
    assert same.float().mean() > 0.95  # two candidates may be equal but for the order of a sum
    assert torch.equal(twin_scales.half().float(), twin_scales)
    group = grid.natural(160)
    twin = round_to_grid(weight, twin_scales, twin_zeros.to(torch.uint8), group, bits)
    ours = grids.coded(grid, round_to_grid(weight, scales, zeros, group, bits), scales, zeros, group)
    theirs = grids.coded(grid, twin, twin_scales.half(), twin_zeros.to(torch.uint8), group)
    assert error(weight, theirs.restore(), importance) == pytest.approx(
        error(weight, ours.restore(), importance), rel=1e-4
    )


@pytest.mark.parametrize(("bits", "group_size"), [(5, 128), (4, 0), (4, -2), (16, -1)])
def test_impossible_grids(bits: int, group_size: int) -> None:
    with pytest.raises(ValueError, match="possible"):
        Grid(bits, group_size)
