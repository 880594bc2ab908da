"""N:M patterns, as data that needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """N:M: of every `of` columns in a row, `pruned` go."""

    pruned: int
    of: int

    def __post_init__(self) -> None:
        if not 0 < self.pruned < self.of:
            raise ValueError(f"{self.pruned}:{self.of}: of M weights some go and some stay")

    @property
    def sparsity(self) -> float:
        return self.pruned / self.of

    def __str__(self) -> str:
        return f"{self.pruned}:{self.of}"


Amount = float | Pattern  # how much is pruned: a part of the weights, or N of every M
