"""`solve`: better than rounding to nearest, never worse, and the same bytes every time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import layer
from oracle import gptq as oracle
from torch.utils._python_dispatch import TorchDispatchMode

from quantkit.solvers.gptq import Settings, Solved, factor_for, ridge_factor, solve, step_toward
from quantkit.solvers.grids import Grid, rtn

ORDERS = ["static", "none", "group"]


def same(a: Solved, b: Solved) -> bool:
    arrays = [(x.codes, x.scales, x.zeros, x.g_idx) for x in (a.coded, b.coded)]
    return a.report == b.report and all(x.tobytes() == y.tobytes() for x, y in zip(*arrays, strict=True))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_beats_rounding_to_nearest(bits: int, group_size: int, order: Any, symmetric: bool) -> None:
    weight, hessian = layer(32, 256)
    plain = Settings(Grid(bits, group_size, symmetric), order, passes=0, refits=0)
    report = solve(weight, hessian, plain).report
    assert report.loss is not None
    assert report.rtn_loss is not None
    assert report.loss < 0.8 * report.rtn_loss
    assert (report.fallback, report.kept_rtn, report.dead, report.damp) == (False, False, 0, 0.03)
    refined = solve(weight, hessian, replace(plain, passes=1, refits=2))
    assert refined.report.loss is not None
    assert refined.report.loss < 0.995 * report.loss  # it goes down the damped loss, of which this is a part


def test_groups_follow_the_order_only_if_they_are_asked_to() -> None:
    weight, hessian = layer(4, 100)
    by_size = hessian.diagonal().argsort(descending=True).numpy()
    natural = np.arange(100) // 32
    for order in ("static", "none"):
        np.testing.assert_array_equal(solve(weight, hessian, Settings(Grid(4, 32), order)).coded.g_idx, natural)
    np.testing.assert_array_equal(solve(weight, hessian, Settings(Grid(4, 32), "group")).coded.g_idx[by_size], natural)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_hessian(data: st.DataObject) -> None:
    """What is reported is so, codes are codes, and nothing is worse than rounding to nearest."""
    rows, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 40))
    weight, hessian = layer(rows, width, data.draw(st.integers(0, 99)), tokens=data.draw(st.integers(1, 60)))
    hessian *= data.draw(st.sampled_from([1.0, 1e-25, 1e25]))
    for column in data.draw(st.sets(st.integers(0, width - 1), max_size=width)):
        hessian[column] = 0
        hessian[:, column] = 0
    hessian.diagonal().mul_(data.draw(st.sampled_from([1.0, 1.5])))
    grid = Grid(
        data.draw(st.sampled_from([2, 3, 4, 8])), data.draw(st.sampled_from([-1, 7, 16])), data.draw(st.booleans())
    )
    damp = data.draw(st.sampled_from([0.0, 1e-6, 0.01]))
    how = Settings(
        grid, data.draw(st.sampled_from(ORDERS)), damp, data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    )
    solved = solve(weight, hessian, how)
    report, coded = solved.report, solved.coded
    assert coded.codes.max() <= grid.top
    assert np.isfinite(coded.scales).all()
    assert (coded.scales != 0).all()
    assert coded.zeros.min() >= 1
    assert report.dead == int((hessian.diagonal() == 0).sum())
    assert report.loss is not None
    assert report.rtn_loss is not None
    assert report.loss <= report.rtn_loss
    if report.dead < width:
        e, w, h = (weight.double().numpy() - coded.restore(), weight.double().numpy(), hessian.double().numpy())
        size = np.abs(np.trace(np.abs(w) @ np.abs(h) @ np.abs(w).T))
        found = np.trace(e @ h @ e.T) / np.trace(w @ h @ w.T)
        assert report.loss == pytest.approx(found, rel=1e-4, abs=1e-5 * size / abs(np.trace(w @ h @ w.T)))


@pytest.mark.parametrize("order", ORDERS)
def test_no_input_at_all_is_rounding_to_nearest(order: Any) -> None:
    weight, _ = layer(5, 70)
    solved = solve(weight, torch.zeros(70, 70), Settings(Grid(4, 32), order))
    plain = rtn(weight, Grid(4, 32))
    assert solved.coded.codes.tobytes() == plain.codes.tobytes()
    assert solved.coded.scales.tobytes() == plain.scales.tobytes()
    assert (solved.report.loss, solved.report.dead) == (0.0, 70)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_fallback(value: float) -> None:
    weight, hessian = layer(5, 70)
    hessian[3, 4] = value
    solved = solve(weight, hessian, Settings(Grid(4, 32)))
    assert solved.report.fallback
    assert solved.report.loss is None
    assert solved.report.rtn_loss is None
    assert solved.coded.codes.tobytes() == rtn(weight, Grid(4, 32)).codes.tobytes()


def test_rounding_to_nearest_is_kept_where_it_is_better() -> None:
    """A damping that drowns the Hessian below it makes rounding to nearest and solving the same."""
    weight, hessian = layer(5, 70)
    report = solve(weight, hessian, Settings(Grid(4, 32), damp=1e9)).report
    assert report.kept_rtn
    assert not report.fallback
    assert report.loss == report.rtn_loss


def test_a_factor_serves_several_weights() -> None:
    weight, hessian = layer(12, 200)
    how = Settings(Grid(4, 64), passes=1)
    shared = factor_for(hessian, how)
    assert same(solve(weight, hessian, how, factor=shared), solve(weight, hessian, how))


def test_rows_do_not_know_each_other() -> None:
    """So weights with the same inputs may be solved as one."""
    weight, hessian = layer(12, 200)
    how = Settings(Grid(3, 64), passes=1, refits=1)
    whole = solve(weight, hessian, how).coded
    parts = [solve(part, hessian, how).coded for part in (weight[:5].clone(), weight[5:].clone())]
    assert np.mean(np.concatenate([part.codes for part in parts]) != whole.codes) < 0.01


@pytest.mark.parametrize("order", ORDERS)
def test_same_bytes_twice_and_for_any_number_of_threads(order: Any) -> None:
    weight, hessian = layer(77, 650)
    how = Settings(Grid(4, 128, False), order, passes=2, refits=2)
    solved, shifted = [], set()
    for threads in (1, 1, 2, 3, 16):
        torch.set_num_threads(threads)
        solved.append(solve(weight, hessian, how))
        shifted.add(step_toward(weight, hessian, weight @ torch.eye(650), ridge_factor(hessian, 0.1)).numpy().tobytes())
    assert all(same(solved[0], other) for other in solved[1:])
    assert len(shifted) == 1


def test_inputs_are_left_alone() -> None:
    weight, hessian = layer(7, 90)
    keep, target = torch.rand(7, 90) > 0.2, weight + 0.001
    arguments = (weight, hessian, keep, target)
    before = [argument.clone() for argument in arguments]
    solve(weight, hessian, Settings(Grid(4, 32), passes=1, refits=1), keep=keep, target=target)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_step_toward_what_is_wanted() -> None:
    """With the outputs of the true inputs wanted and disturbed ones there, the step is the ridge regression."""
    weight, _ = layer(6, 40)
    generator = torch.Generator().manual_seed(9)
    true = torch.randn(200, 40, generator=generator)
    there = true + 0.1 * torch.randn(200, 40, generator=generator)
    there[:, 11] = 0
    hessian, cross = there.T @ there, (true @ weight.T).T @ there
    w, h, g = (part.double().numpy() for part in (weight, hessian, cross))
    damped, dead = oracle.damped(h, 0.01)
    mean = np.diag(h)[~dead].mean()
    expected = np.linalg.solve(damped * mean, (g - w @ h).T).T
    step = step_toward(weight, hessian, cross.clone(), ridge_factor(hessian, 0.01))
    np.testing.assert_allclose(step.numpy(), expected, atol=2e-6)
    assert not step[:, 11].any()
    outputs = true @ weight.T
    full = weight + step_toward(weight, hessian, cross.clone(), ridge_factor(hessian, 1e-6))
    assert (there @ full.T - outputs).square().sum() < (there @ weight.T - outputs).square().sum()
    broken = hessian * float("nan")
    assert not step_toward(weight, broken, cross, ridge_factor(broken, 0.01)).any()


def test_target_is_what_is_come_near_to() -> None:
    weight, hessian = layer(16, 128)
    target = weight + 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    solved = solve(weight, hessian, Settings(Grid(4, 32)), target=target)
    restored = solved.coded.restore().astype(np.float64)
    t, w, h = (part.double().numpy() for part in (target, weight, hessian))
    e = t - restored
    assert solved.report.loss == pytest.approx(np.trace(e @ h @ e.T) / np.trace(w @ h @ w.T), rel=1e-5)
    assert same(
        solve(target, hessian, Settings(Grid(4, 32)), target=target), solve(target, hessian, Settings(Grid(4, 32)))
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("symmetric", [True, False])
def test_on_a_gpu(symmetric: bool) -> None:
    weight, hessian = layer(64, 512)
    how = Settings(Grid(4, 64, symmetric), passes=1, refits=1)
    there, here = solve(weight.cuda(), hessian.cuda(), how), solve(weight, hessian, how)
    assert there.report.loss == pytest.approx(here.report.loss, rel=0.02)
    assert same(there, solve(weight.cuda(), hessian.cuda(), how))


class Calls(TorchDispatchMode):
    """Counts torch's operations, views among them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("order", ORDERS)
def test_threads_make_few_calls(order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes the interpreter's lock: threads that make many small ones wait for each other. 5 blocks of columns, 9
    groups, 2 refits: as an operation of torch each, what is done to a group alone would be 30 · 18 of them."""
    weight, hessian = layer(96, 576)
    found = Settings(Grid(4, 64), order)
    factor = factor_for(hessian, found)

    def calls(rows: int) -> int:
        with Calls() as mode:
            solve(weight[:rows], hessian, found, factor=factor)
        return mode.count

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # in this thread, where they are counted
    assert calls(96) - calls(48) < 500  # of a part of 48 rows
