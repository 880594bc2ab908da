"""What was written, as sums taken of it in memory, compared with what is on disk as that is hashed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantkit.checkpoint.writer import PARTIAL
from quantkit.errors import RunError
from quantkit.kernels.sums import MODULUS, position_sum
from quantkit.plans import Shard, Unit


class AlteredError(RunError):
    """Files hold something else than what was written to them. units: whose tensors that is; a header is nobody's."""

    def __init__(self, what: str, *, units: frozenset[str], where: str) -> None:
        super().__init__(what, where=where, hint="run the same command again: it is written anew")
        self.units = units


@dataclass(frozen=True)
class _Range:
    start: int
    end: int
    tensor: str | None  # none in a header
    known: int | None = None


def written_sums(units: Iterable[Unit], sums: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """By tensor, from `sums`: by unit, those of its outputs, or none if they were not summed."""
    return {t.name: n for u in units if sums.get(u.name) for t, n in zip(u.outputs, sums[u.name], strict=True)}


class Witness:
    """Looks at a shard's bytes as they go by, from its start to its end, and collects in `altered` what is not as it
    was written: tensors, and None for the header. sums: by tensor, of what was written, if that was summed; may grow
    meanwhile, but has a tensor's before its bytes go by.

    Of a torch file only tensors are compared: between them are CRC-32s that are not known beforehand.
    """

    def __init__(self, shard: Shard, folder: Path, sums: Mapping[str, int]) -> None:
        self.path, self.sums = folder / shard.name, sums
        self.altered: list[str | None] = []
        ranges = [_Range(t.offset, t.offset + t.nbytes, t.name) for t in shard.tensors]
        if shard.zip is None:
            ranges += [
                _Range(offset, offset + len(raw), None, position_sum(np.frombuffer(raw, np.uint8), offset))
                for offset, raw in shard.fixed
            ]
        self.ranges = deque(sorted((r for r in ranges if r.start < r.end), key=lambda r: r.start))
        self.sum = 0

    def look(self, position: int, data: memoryview) -> None:
        """`data` follows at `position`."""
        raw, end = np.frombuffer(data, np.uint8), position + len(data)
        while self.ranges and self.ranges[0].start < end:
            near = self.ranges[0]
            start, known = max(near.start, position), near.known if near.tensor is None else self.sums.get(near.tensor)
            if known is not None:
                self.sum += position_sum(raw[start - position : min(near.end, end) - position], start)
            if near.end > end:
                return
            self.ranges.popleft()
            if known is not None and known != self.sum % MODULUS:
                self.altered.append(near.tensor)
            self.sum = 0


def check_unaltered(witnesses: Iterable[Witness], units: Mapping[str, str]) -> None:
    """AlteredError for all that they have collected. units: by tensor, whose it is."""
    found = [(tensor, witness.path) for witness in witnesses for tensor in witness.altered]
    if not found:
        return
    (first, path), more = found[0], len(found) - 1
    what = "the header" if first is None else f"tensor {first!r}"
    if more:
        what += f" and {more:,} more are not on disk as they were written"
    else:
        what += " is not on disk as it was written"
    if not path.exists():
        path = path.with_name(path.name + PARTIAL)
    altered = frozenset(units[tensor] for tensor, _ in found if tensor is not None)
    raise AlteredError(what, units=altered, where=str(path))
