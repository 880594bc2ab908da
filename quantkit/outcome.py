"""How a run went, for whoever started it."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quantkit.plans import Plan, Unit
from quantkit.publication import Measured


@dataclass(frozen=True)
class Outcome:
    """How a run went. `reused` counts the units that an earlier, interrupted run had committed; `checked` says in words
    what was mapped back and compared; `zeros` counts those of the pruned tensors, as they were written, and
    `source_zeros` those that the source had there."""

    out: Path
    already_done: bool
    seconds: float
    peak_rss: int
    units: int
    reused: int
    checked: str
    zeros: int | None = None
    source_zeros: int | None = None


def outcome_of(
    out: Path,
    plan: Plan,
    started: float,
    reused: int,
    measured: Measured | None,
    *,
    part: Sequence[Unit] | None = None,
) -> Outcome:
    """started: by time.monotonic. measured: None if there was nothing to do. part: the units of a run of some only."""
    units = plan.units if part is None else part
    checked = _checked(units) if plan.checked and measured is not None else ""
    outcome = Outcome(out, measured is None, time.monotonic() - started, _peak_rss(), len(units), reused, checked)
    if measured is None or not plan.pruned:
        return outcome
    reports = [measured.reports[u.name] for u in units if u.pruned]
    zeros, before = sum(r.zeros for r in reports), sum(r.source_zeros for r in reports)
    return replace(outcome, zeros=zeros, source_zeros=before)


def already_done(out: Path) -> Outcome:
    return Outcome(out, True, 0.0, _peak_rss(), 0, 0, "")


def _checked(units: Iterable[Unit]) -> str:
    copied = [u for u in units if u.linear is None and not u.cast]
    decoded = sum(u.source.scales is not None for u in copied)
    same = f"{len(copied) - decoded:,} tensors mapped back, each equal to the source bit for bit"
    return same + (f"; {decoded:,} from FP8 equal to what was decoded" if decoded else "")


def _peak_rss() -> int:
    """Most RAM that this process had. Not ru_maxrss where it can be helped: that begins with what our parent had."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
