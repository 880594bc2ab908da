"""Limits to how far a folder may be from its source: what a pipeline goes by, and what a publication shows."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from quantkit.errors import GateError, UsageError
from quantkit.evaluation import Comparison, Verdict


@dataclass(frozen=True)
class Gates:
    """None: no limit."""

    max_ppl_increase: float | None = None
    max_kl: float | None = None

    @classmethod
    def parse(cls, increase: str | float | None, kl: float | None) -> Gates:
        """`increase`: a part, 0.03, or in words, "3%". UsageError for what is no limit."""
        if kl is not None and not (0 <= kl < math.inf):
            raise UsageError(f"--max-kl {kl} is no limit", hint="nats a token, 0.05 for example")
        return cls(None if increase is None else _part(increase), kl)

    def judge(self, found: Comparison) -> tuple[Verdict, ...]:
        limits = (
            ("perplexity_increase", self.max_ppl_increase, found.increase),
            ("kl", self.max_kl, found.kl),
        )
        return tuple(Verdict(measure, limit, value) for measure, limit, value in limits if limit is not None)

    @property
    def some(self) -> bool:
        return self.max_ppl_increase is not None or self.max_kl is not None


NO_LIMITS = Gates()


def check(verdicts: tuple[Verdict, ...], folder: str) -> None:
    """GateError if one has not passed."""
    failed = [verdict for verdict in verdicts if not verdict.passed]
    if failed:
        raise GateError(
            "; ".join(verdict.text for verdict in failed), where=folder,
            hint="use more bits, a smaller group size, or other calibration text; or allow more",
        )  # fmt: skip


def _part(given: str | float) -> float:
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?\d+)?)\s*(%?)\s*", str(given))
    if match is None:
        raise UsageError(
            f"--max-ppl-increase {given!r} is no limit", hint="a share such as 3% or 0.03, of the source's perplexity"
        )
    part = float(match[1]) / (100 if match[2] else 1)
    if part > 1 and not match[2]:
        raise UsageError(
            f"--max-ppl-increase {given} is more than the whole perplexity", hint=f"write {given}%, or a share below 1"
        )
    return part
