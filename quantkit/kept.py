"""What a journal says is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantkit.methods.base import Report


def shard_entry(name: str, digest: str, stamp: int) -> dict[str, Any]:
    """A journal's line of a file's SHA-256; stamp: `ShardWriter.stamp`, the same before its first byte was read as
    after its last."""
    return {"shard": name, "sha256": digest, "stamp": stamp}


@dataclass(frozen=True)
class Kept:
    """Reports, CRC-32s, and sums of what was written, by unit; SHA-256s of files read, by name. hashed: those of files
    written, by name and by when they were last written to; shards: such as still hold."""

    reports: Mapping[str, Report]
    crcs: Mapping[str, int]
    sums: Mapping[str, Sequence[int]]
    sources: Mapping[str, str]
    hashed: Mapping[str, Mapping[int, str]]
    shards: Mapping[str, str]

    @classmethod
    def read(cls, entries: Sequence[Mapping[str, Any]]) -> Kept:
        units: dict[str, Mapping[str, Any]] = {}
        for e in entries:
            if "unit" in e:
                units[str(e["unit"])] = e
            elif "altered" in e:
                units.pop(str(e["altered"]), None)
        hashed: dict[str, dict[int, str]] = {}
        for e in entries:
            if "shard" in e:
                hashed.setdefault(str(e["shard"]), {})[int(e["stamp"])] = str(e["sha256"])
        return cls(
            {name: Report.from_row(e["report"]) for name, e in units.items()},
            {name: int(e["crc"]) for name, e in units.items() if "crc" in e},
            {name: [int(n) for n in e["sums"]] for name, e in units.items() if "sums" in e},
            {str(e["source"]): str(e["sha256"]) for e in entries if "source" in e},
            hashed,
            {},
        )

    def unchanged(self, stamps: Mapping[str, int]) -> Kept:
        """With the hashes of those of these files that nobody has written to since; by name, when that last was."""
        held = {name: found[stamp] for name, stamp in stamps.items() if stamp in (found := self.hashed.get(name, {}))}
        return replace(self, shards=held)

    def without(self, units: set[str]) -> Kept:
        return replace(
            self,
            reports={name: x for name, x in self.reports.items() if name not in units},
            crcs={name: x for name, x in self.crcs.items() if name not in units},
            sums={name: x for name, x in self.sums.items() if name not in units},
        )
