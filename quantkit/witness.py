"""What was written, as sums taken of it in memory, compared with what is on disk as that is hashed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantkit.errors import RunError
from quantkit.kernels.sums import MODULUS, position_sum
from quantkit.plans import Shard, Unit


class AlteredError(RunError):
    """A file holds something else than what was written to it. unit: whose tensor it is; "" for a file's header."""

    def __init__(self, what: str, *, unit: str, where: str) -> None:
        super().__init__(what, where=where, hint="run the same command again: it is written anew")
        self.unit = unit


@dataclass(frozen=True)
class _Range:
    start: int
    end: int
    tensor: str
    known: int | None = None


def written_sums(units: Iterable[Unit], sums: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """By tensor, from `sums`: by unit, those of its outputs, or none if they were not summed."""
    return {t.name: n for u in units if sums.get(u.name) for t, n in zip(u.outputs, sums[u.name], strict=True)}


class Witness:
    """Looks at a shard's bytes as they go by, from its start to its end. sums: by tensor, of what was written, if that
    was summed; may grow meanwhile, but has a tensor's before its bytes go by. units: by tensor, whose it is.

    Of a torch file only tensors are compared: between them are CRC-32s that are not known beforehand.
    """

    def __init__(self, shard: Shard, folder: Path, sums: Mapping[str, int], units: Mapping[str, str]) -> None:
        self.path, self.sums, self.units = folder / shard.name, sums, units
        ranges = [_Range(t.offset, t.offset + t.nbytes, t.name) for t in shard.tensors]
        if shard.zip is None:
            ranges += [
                _Range(offset, offset + len(raw), "", position_sum(np.frombuffer(raw, np.uint8), offset))
                for offset, raw in shard.fixed
            ]
        self.ranges = deque(sorted((r for r in ranges if r.start < r.end), key=lambda r: r.start))
        self.sum = 0

    def look(self, position: int, data: memoryview) -> None:
        """`data` follows at `position`. AlteredError where a tensor ends that is not what was written."""
        raw, end = np.frombuffer(data, np.uint8), position + len(data)
        while self.ranges and self.ranges[0].start < end:
            near = self.ranges[0]
            start, known = max(near.start, position), self.sums.get(near.tensor, near.known)
            if known is not None:
                self.sum += position_sum(raw[start - position : min(near.end, end) - position], start)
            if near.end > end:
                return
            self.ranges.popleft()
            if known is not None and known != self.sum % MODULUS:
                what = f"tensor {near.tensor!r}" if near.tensor else "the header"
                unit = self.units[near.tensor] if near.tensor else ""
                raise AlteredError(f"{what} is not on disk as it was written", unit=unit, where=str(self.path))
            self.sum = 0
