"""The allocator against every choice there is, and against the annealer that others use."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.solvers import allocation
from quantkit.solvers.allocation import BudgetError, Option, allocate

options = st.lists(st.builds(Option, st.integers(0, 30), st.floats(0, 10)), min_size=1, max_size=4)
tables = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), options, min_size=1, max_size=6)


def best_of_all(items: dict[str, list[Option]], budget: int) -> float | None:
    losses = [
        sum(o.loss for o in choice)
        for choice in itertools.product(*items.values())
        if sum(o.cost for o in choice) <= budget
    ]
    return min(losses, default=None)


@given(tables, st.integers(0, 120))
@settings(max_examples=400, deadline=None)
def test_it_finds_the_best_choice_of_all(items: dict[str, list[Option]], budget: int) -> None:
    best = best_of_all(items, budget)
    if best is None:
        with pytest.raises(BudgetError) as error:
            allocate(items, budget)
        assert error.value.least == sum(min(o.cost for o in options) for options in items.values())
        return
    found = allocate(items, budget)
    picked = [items[name][j] for name, j in found.chosen.items()]
    assert found.cost == sum(o.cost for o in picked) <= budget
    assert found.loss == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert found.bound == found.loss


@given(tables, st.integers(0, 120), st.randoms())
@settings(max_examples=100, deadline=None)
def test_the_order_of_items_does_not_matter(items: dict[str, list[Option]], budget: int, random) -> None:  # type: ignore[no-untyped-def]
    try:
        found = allocate(items, budget)
    except BudgetError:
        return
    shuffled = list(items.items())
    random.shuffle(shuffled)
    assert allocate(dict(shuffled), budget).chosen == found.chosen


def like_a_model(linears: int, seed: int) -> tuple[dict[str, list[Option]], int]:
    """Linears of a few sizes, errors that fall fourfold with each bit; and 4 bits a weight."""
    rng = np.random.default_rng(seed)
    items, weights = {}, 0
    for i in range(linears):
        numel = int(rng.choice([576 * 576, 192 * 576, 1536 * 576]))
        sensitivity = math.exp(rng.normal(0, 1.5))
        bits = [2.2, 2.3, 2.5, 3.1, 3.3, 4.04, 4.1, 4.25, 5.1, 5.2, 6.04, 6.2, 8.04]
        items[f"{i:03}"] = [Option(int(b * numel), sensitivity * numel * 4.0**-b * rng.uniform(0.8, 1.2)) for b in bits]
        weights += numel
    return items, 4 * weights


def anneal(items: dict[str, list[Option]], budget: int, seed: int) -> float:
    """As exllamav2 does it, with fewer temperatures: random moves, accepted by their gain; then whatever still fits."""
    rng = np.random.default_rng(seed)
    names = list(items)
    chosen = dict.fromkeys(names, 0)
    cost = sum(items[n][0].cost for n in names)
    temperature = 2.0
    scale = sum(items[n][0].loss for n in names)
    while temperature > 1e-4:
        for _ in range(200):
            name = names[rng.integers(len(names))]
            j = int(rng.integers(len(items[name])))
            new, old = items[name][j], items[name][chosen[name]]
            delta = (new.loss - old.loss) / scale
            if cost + new.cost - old.cost <= budget and (delta < 0 or rng.random() < math.exp(-delta / temperature)):
                chosen[name], cost = j, cost + new.cost - old.cost
        temperature *= 0.97
    for name in names:
        for j, option in enumerate(items[name]):
            old = items[name][chosen[name]]
            if option.loss < old.loss and cost + option.cost - old.cost <= budget:
                chosen[name], cost = j, cost + option.cost - old.cost
    return sum(items[n][chosen[n]].loss for n in names)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_never_worse_than_annealing_and_proves_it(seed: int) -> None:
    items, budget = like_a_model(30, seed)
    found = allocate(items, budget)
    assert found.bound == found.loss
    assert found.loss <= anneal(items, budget, seed)


def test_a_large_model_takes_little_time_and_its_gap_is_small() -> None:
    items, budget = like_a_model(560, 5)
    found = allocate(items, budget)
    assert found.cost <= budget
    assert found.loss - found.bound <= 1e-4 * found.loss


def test_what_was_passed_over_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "STATES", 2)
    items, budget = like_a_model(40, 1)
    found = allocate(items, budget)
    assert found.cost <= budget
    assert found.bound <= found.loss
    monkeypatch.undo()
    assert found.bound <= allocate(items, budget).loss <= found.loss


def test_items_without_options_or_with_infinite_losses_are_refused() -> None:
    for options in ([], [Option(1, math.inf)], [Option(1, math.nan)]):
        with pytest.raises(ValueError, match="a: an item needs options"):
            allocate({"a": options}, 5)


def test_of_many_items_no_more_is_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for 256 choices an item; what that may have cost is in the bound, and is next to nothing."""
    random = np.random.default_rng(3)
    items = {
        f"{i:04}": [Option(int(c), float(w / c**2)) for c in range(2, 9)] for i, w in enumerate(random.random(600))
    }
    whole = allocate(items, 2400)
    monkeypatch.setattr(allocation, "HISTORY", 0)
    tracemalloc.start()
    found = allocate(items, 2400)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 600 * 256 * 6 * 4
    assert found.bound <= whole.loss <= found.loss <= whole.loss * 1.001
