"""Work shared out: which of N takes what."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from quantkit.errors import UsageError


@dataclass(frozen=True)
class Part:
    """The `index`-th of `count` parts, from 1."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def parse_part(text: str) -> Part:
    """Part of "3/8"; UsageError if that is none."""
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(
            f"{text!r} is not a part", where="--part", hint="--part 3/8 is the third of eight; at most 999,999"
        )
    return Part(int(found[1]), int(found[2]))


def runs(costs: Sequence[int], count: int, ends: Sequence[int] = (), near: float = 0.0) -> list[int]:
    """For each of some things in a row, which of `count` (from 0) does it: that in whose equal stretch of all costs its
    middle lies. So everybody has a run of them, of about the same cost. Costs are above 0. ends: sums of costs at which
    a run had better end, if one is no further than `near` of a stretch from where it should."""
    stretch = sum(costs) / count
    cuts = []
    for n in range(1, count):
        nearest = min(ends, key=lambda end: abs(end - n * stretch), default=0)
        cuts.append(nearest if abs(nearest - n * stretch) <= near * stretch else n * stretch)
    return [bisect_right(cuts, end - cost / 2) for end, cost in zip(accumulate(costs), costs, strict=True)]
