"""Masks and pruned weights are those of slow references written from the papers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import layer
from oracle import pruning as oracle
from torch import Tensor

from quantkit.solvers import sparsegpt
from quantkit.solvers.factor import factorize
from quantkit.solvers.masks import by_outliers, magnitude, wanda, wanda_variant
from quantkit.solvers.pattern import Pattern
from quantkit.solvers.quadratic import row_losses
from quantkit.solvers.sparsegpt import prune_columns

AMOUNTS: list[Any] = [0.0, 0.02, 0.5, 0.9, Pattern(2, 4), Pattern(4, 8), Pattern(1, 4), Pattern(3, 4)]


def inputs_of(columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(50, columns, generator=generator) * torch.randn(columns, generator=generator).exp()


def natural(hessian: Tensor, damp: float = 0.01) -> Any:
    return factorize(hessian, torch.arange(len(hessian)), damp)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_wanda_is_the_papers(amount: float | Pattern) -> None:
    weight, inputs = layer(70, 96)[0], inputs_of(96)
    keep = wanda(weight, inputs.square().sum(0), amount)
    doubles = weight.double().numpy(), inputs.double().numpy()
    if isinstance(amount, Pattern):
        expected = oracle.wanda_pattern(*doubles, amount.pruned, amount.of)
    else:
        expected = oracle.wanda(*doubles, amount)
        assert ((~keep).sum(1) == int(96 * amount)).all()
    assert np.array_equal(keep.numpy(), expected)


def test_ties_go_by_index() -> None:
    keep = wanda(torch.ones(2, 8), torch.ones(8), 0.5)
    assert keep.tolist() == [[False] * 4 + [True] * 4] * 2
    assert wanda(torch.ones(1, 8), torch.ones(8), Pattern(1, 4)).tolist() == [[False, True, True, True] * 2]


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.7])
def test_the_variant_comes_close_and_takes_the_smallest(sparsity: float) -> None:
    weight, squares = layer(64, 256)[0], inputs_of(256).square().sum(0)
    keep = wanda_variant(weight, squares, sparsity)
    assert 1 - int(keep.sum()) / keep.numel() == pytest.approx(sparsity, abs=0.002)
    scores = weight.abs() * squares.sqrt()
    gone, stays = scores.masked_fill(keep, 0).amax(1), scores.masked_fill(~keep, float("inf")).amin(1)
    assert (gone <= stays).all()
    if sparsity:
        assert len(set((~keep).sum(1).tolist())) > 1  # rows differ


@pytest.mark.parametrize("sparsity", [0.0, 0.02, 0.5])
def test_magnitude_is_the_whole_matrix(sparsity: float) -> None:
    weight = layer(30, 40)[0].half()
    keep = magnitude(weight, sparsity)
    assert np.array_equal(keep.numpy(), oracle.magnitude(weight.double().numpy(), sparsity))
    rows = magnitude(weight, sparsity, per_row=True)
    assert ((~rows).sum(1) == int(40 * sparsity)).all()


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("columns", [128, 296])
@pytest.mark.parametrize("torch_twin", [False, True])
def test_sparsegpt_is_the_papers(
    monkeypatch: pytest.MonkeyPatch, amount: float | Pattern, columns: int, torch_twin: bool
) -> None:
    weight, hessian = layer(70, columns)
    hessian[7] = hessian[:, 7] = 0
    if torch_twin:
        monkeypatch.setattr(sparsegpt, "on_cpu", lambda _: False)
    pruned, keep = prune_columns(weight, natural(hessian), amount)
    pattern = (amount.pruned, amount.of) if isinstance(amount, Pattern) else None
    sparsity = 0.0 if isinstance(amount, Pattern) else amount
    expected, stays = oracle.sparsegpt(*(t.double().numpy() for t in (weight, hessian)), 0.01, sparsity, pattern)
    assert np.array_equal(keep.numpy(), stays)
    np.testing.assert_allclose(pruned.numpy(), expected, rtol=1e-3, atol=1e-6)
    assert (pruned[~keep] == 0).all()


def test_a_mask_that_is_given_is_kept_to_and_made_up_for() -> None:
    weight, hessian = layer(64, 200)
    keep = wanda(weight, hessian.diagonal(), 0.5)
    pruned, same = prune_columns(weight, natural(hessian), keep)
    assert torch.equal(same, keep)
    made_up, plain = (row_losses(weight - w, hessian).sum() for w in (pruned, weight * keep))
    assert made_up < 0.8 * plain


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_pruning_never_fails_and_keeps_its_promise(data: st.DataObject) -> None:
    rows, groups = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    of = data.draw(st.sampled_from([2, 4, 8]))
    pattern = Pattern(data.draw(st.integers(1, of - 1)), of)
    weight, hessian = layer(
        rows, groups * of, data.draw(st.integers(0, 99)), tokens=data.draw(st.sampled_from([1, 64]))
    )
    if data.draw(st.booleans()):
        hessian.zero_()
    for keep in (wanda(weight, hessian.diagonal(), pattern), prune_columns(weight, natural(hessian), pattern)[1]):
        assert ((~keep).reshape(rows, groups, of).sum(2) == pattern.pruned).all()


def test_layers_differ_by_their_outliers_and_the_whole_is_as_asked() -> None:
    outliers, sizes = [0.1, 0.2, 0.3, 0.9, 0.0], [100, 300, 50, 100, 0]
    for sparsity in (0.02, 0.3, 0.5, 0.97, 0.995):
        found = by_outliers(outliers, sizes, sparsity, 0.08)
        whole = sum(size * part for size, part in zip(sizes, found, strict=True)) / sum(sizes)
        assert whole == pytest.approx(sparsity, abs=1e-9)
        assert all(0 <= part < 1 for part in found)
        assert found[0] >= found[1] >= found[2] >= found[3]
    found = by_outliers(outliers, sizes, 0.5, 0.08)
    assert found[0] - found[3] == pytest.approx(0.16)
    assert by_outliers([0.2, 0.2], [1, 1], 0.4, 0.08) == [0.4, 0.4]


@pytest.mark.parametrize("sparsity", [0.005, 0.01, 0.02, 0.98])
def test_the_variant_comes_near_beyond_the_papers_range(sparsity: float) -> None:
    torch.manual_seed(3)
    keep = wanda_variant(torch.randn(256, 512), torch.rand(512) + 0.1, sparsity)
    assert 1 - int(keep.sum()) / keep.numel() == pytest.approx(sparsity, abs=0.0011)
