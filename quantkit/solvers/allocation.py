"""One option for each item, so that the losses sum up to the least that a budget allows (multiple-choice knapsack).

Three steps. The linear relaxation, by the lower convex hulls of all items, gives a bound that no choice can be below,
and nearly always a choice that is hardly above it. Options that this bound shows to be of no use are struck out. What
is left is gone through exactly, item by item, over the choices so far that no other one beats in both cost and loss
(Nemhauser and Ullmann 1969). Should these become too many, some are left out, and the bound says how much that can have
cost at the most.

Nothing is random, and of equally good choices the one found is the same whatever order the items come in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

STATES, FEWEST = 1 << 17, 1 << 8  # choices kept at a time: fewer, if there are many items, but not fewer than these
HISTORY = 1 << 28  # bytes for how each of them came about, item by item
_SLACK = 1e-12  # of the loss: sums of floats in another order


@dataclass(frozen=True, slots=True)
class Option:
    """cost: in bits, or any other whole unit. loss: any number that is to be small in sum."""

    cost: int
    loss: float


@dataclass(frozen=True)
class Allocation:
    """chosen: of each item, the place of its option. cost, loss: sums. bound: no choice within the budget has a smaller
    loss than this; equal to loss where the choice is proved to be the best."""

    chosen: dict[str, int]
    cost: int
    loss: float
    bound: float


class BudgetError(ValueError):
    """The budget is below the sum of the cheapest options. least: that sum."""

    def __init__(self, least: int, budget: int) -> None:
        super().__init__(f"the cheapest options cost {least:,}, the budget is {budget:,}")
        self.least, self.budget = least, budget


def allocate(items: Mapping[str, Sequence[Option]], budget: int) -> Allocation:
    """The best choice. BudgetError if there is none, ValueError for an item without options or a loss that is not
    finite."""
    names = sorted(items)
    for name in names:
        if not items[name] or not all(np.isfinite(option.loss) for option in items[name]):
            raise ValueError(f"{name}: an item needs options, and these losses that are finite")
    useful = [_useful(items[name]) for name in names]
    if (least := sum(options[0].cost for options in useful)) > budget:
        raise BudgetError(least, budget)
    price = _price(useful, budget)
    reduced = [np.array([o.loss + price * o.cost for o in options]) for options in useful]
    floors = np.array([float(r.min()) for r in reduced])
    bound = float(floors.sum()) - price * budget
    guess = _filled(useful, _greedy(useful, budget), budget)
    best = sum(options[j].loss for options, j in zip(useful, guess, strict=True))
    slack = _SLACK * max(abs(best), abs(bound), *(abs(o.loss) for options in useful for o in options))
    room = best - bound + slack
    kept = [np.flatnonzero(r - floor <= room) for r, floor in zip(reduced, floors, strict=True)]
    found, exact = _search(useful, kept, floors, price, budget, best + slack)
    if found is None or sum(o[j].loss for o, j in zip(useful, found, strict=True)) > best:
        found = guess
    picked = [options[j] for options, j in zip(useful, found, strict=True)]
    loss = sum(option.loss for option in picked)
    places = {name: _place(items[name], option) for name, option in zip(names, picked, strict=True)}
    return Allocation(places, sum(o.cost for o in picked), loss, loss if exact else min(bound, loss))


def _useful(options: Sequence[Option]) -> list[Option]:
    """By rising cost, those that no other option beats in both."""
    found: list[Option] = []
    for option in sorted(options, key=lambda o: (o.cost, o.loss)):
        if not found or option.loss < found[-1].loss:
            found.append(option)
    return found


def _place(options: Sequence[Option], option: Option) -> int:
    return next(i for i, o in enumerate(options) if o.cost == option.cost and o.loss == option.loss)


def _steps(useful: Sequence[Sequence[Option]]) -> list[tuple[float, int, int, int]]:
    """(gain for each unit of cost, item, from, to) along the lower convex hulls, the largest gain first."""
    steps = []
    for item, options in enumerate(useful):
        at = 0
        while at < len(options) - 1:
            gains = [(options[at].loss - o.loss) / (o.cost - options[at].cost) for o in options[at + 1 :]]
            to = at + 1 + max(range(len(gains)), key=lambda i: (gains[i], i))
            steps.append((gains[to - at - 1], item, at, to))
            at = to
    return sorted(steps, key=lambda s: (-s[0], s[1], s[2]))


def _price(useful: Sequence[Sequence[Option]], budget: int) -> float:
    """What a unit of cost is worth: the gain of the step at which the budget is used up, 0 if it never is."""
    cost = sum(options[0].cost for options in useful)
    for gain, item, at, to in _steps(useful):
        cost += useful[item][to].cost - useful[item][at].cost
        if cost > budget:
            return gain
    return 0.0


def _greedy(useful: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Every step of the hulls that still fits."""
    chosen = [0] * len(useful)
    cost = sum(options[0].cost for options in useful)
    for _, item, at, to in _steps(useful):
        more = useful[item][to].cost - useful[item][at].cost
        if chosen[item] == at and cost + more <= budget:
            chosen[item], cost = to, cost + more
    return chosen


def _filled(useful: Sequence[Sequence[Option]], chosen: list[int], budget: int) -> list[int]:
    """Spends what is left over, each time on what lowers the loss most."""
    left = budget - sum(options[j].cost for options, j in zip(useful, chosen, strict=True))
    while True:
        moves = [
            (options[j].loss - o.loss, -item, k)
            for item, (options, j) in enumerate(zip(useful, chosen, strict=True))
            for k, o in enumerate(options)
            if o.loss < options[j].loss and o.cost - options[j].cost <= left
        ]
        if not moves:
            return chosen
        _, item, k = max(moves)
        left -= useful[-item][k].cost - useful[-item][chosen[-item]].cost
        chosen[-item] = k


def _search(
    useful: Sequence[Sequence[Option]],
    kept: Sequence[npt.NDArray[Any]],
    floors: npt.NDArray[np.float64],
    price: float,
    budget: int,
    limit: float,
) -> tuple[list[int] | None, bool]:
    """(The best choice among the options kept, whether none was passed over); None where all are above `limit`."""
    rest_loss = np.append(np.cumsum(floors[::-1])[::-1][1:], 0.0)  # of the items that come after each, at their price
    cheapest = [min(options[j].cost for j in js) for options, js in zip(useful, kept, strict=True)]
    rest_cost = np.append(np.cumsum(cheapest[::-1])[::-1][1:], 0)
    cost, loss = np.zeros(1, np.int64), np.zeros(1)
    history: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int16]]] = []
    exact, states = True, min(STATES, max(HISTORY // (6 * len(useful)), FEWEST))
    for item, (options, js) in enumerate(zip(useful, kept, strict=True)):
        costs = np.add.outer(cost, np.array([options[j].cost for j in js], np.int64)).ravel()
        losses = np.add.outer(loss, np.array([options[j].loss for j in js])).ravel()
        least = losses + price * (costs - budget) + rest_loss[item]  # no way on from here leads below this
        keep = np.flatnonzero((costs + rest_cost[item] <= budget) & (least <= limit))
        keep = keep[np.lexsort((keep, losses[keep], costs[keep]))]
        # Of rising costs, those that are below all that cost no more.
        before = np.minimum.accumulate(losses[keep])
        keep = keep[np.append(True, losses[keep][1:] < before[:-1])] if keep.size else keep
        if keep.size > states:
            exact = False
            keep = np.sort(keep[np.argsort(least[keep], kind="stable")[:states]])
            keep = keep[np.argsort(costs[keep], kind="stable")]
        if not keep.size:
            return None, exact
        history.append(((keep // len(js)).astype(np.int32), js[keep % len(js)].astype(np.int16)))
        cost, loss = costs[keep], losses[keep]
    at = int(np.argmin(loss))
    chosen: list[int] = []
    for parents, picked in reversed(history):
        chosen.append(int(picked[at]))
        at = int(parents[at])
    return chosen[::-1], exact
