"""What a journal says is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantkit.methods.base import Report


@dataclass(frozen=True)
class Kept:
    """Reports, CRC-32s, and sums of what was written, by unit; SHA-256s of files read, and of files written;
    and when these were written to, by then."""

    reports: Mapping[str, Report]
    crcs: Mapping[str, int]
    sums: Mapping[str, Sequence[int]]
    sources: Mapping[str, str]
    shards: Mapping[str, str]
    stamps: Mapping[str, int]

    @classmethod
    def read(cls, entries: Sequence[Mapping[str, Any]]) -> Kept:
        units: dict[str, Mapping[str, Any]] = {}
        for e in entries:
            if "unit" in e:
                units[str(e["unit"])] = e
            elif "altered" in e:
                units.pop(str(e["altered"]), None)
        return cls(
            {name: Report.from_row(e["report"]) for name, e in units.items()},
            {name: int(e["crc"]) for name, e in units.items() if "crc" in e},
            {name: [int(n) for n in e["sums"]] for name, e in units.items() if "sums" in e},
            {str(e["source"]): str(e["sha256"]) for e in entries if "source" in e},
            {str(e["shard"]): str(e["sha256"]) for e in entries if "shard" in e},
            {str(e["shard"]): int(e["stamp"]) for e in entries if "stamp" in e},
        )

    def without(self, units: set[str]) -> Kept:
        return replace(
            self,
            reports={name: x for name, x in self.reports.items() if name not in units},
            crcs={name: x for name, x in self.crcs.items() if name not in units},
            sums={name: x for name, x in self.sums.items() if name not in units},
        )
