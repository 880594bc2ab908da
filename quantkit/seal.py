"""A finished folder as it was when its evaluation began: what is found is recorded of these weights, or not at all."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from quantkit.checkpoint.reader import read_json
from quantkit.errors import QuantkitError, RunError, VerifyError
from quantkit.verifier import sha256_of

MANIFEST = "quantkit.json"


@dataclass(frozen=True)
class Seal:
    """manifest: SHA-256 of quantkit.json; stamps: size and time of change of each file that it lists."""

    manifest: str
    stamps: tuple[tuple[str, int, int], ...]


def seal(folder: Path) -> Seal:
    """VerifyError if a file is not what the manifest says, by its SHA-256."""
    before = _stamped(folder)
    for row in _listed(folder):
        if sha256_of(folder / row[0]) != row[1]:
            raise VerifyError(
                f"{row[0]} is not what {MANIFEST} says, so nothing found of it can be recorded", where=str(folder),
                hint="see `quantkit verify`; --no-record evaluates it as it is",
            )  # fmt: skip
    return before


def check_sealed(folder: Path, then: Seal) -> None:
    """RunError if the folder was written to since."""
    try:
        unchanged = _stamped(folder) == then
    except QuantkitError:
        unchanged = False
    if not unchanged:
        raise RunError(
            "the folder changed while it was evaluated, so nothing was recorded", where=str(folder),
            hint="evaluate it again",
        )  # fmt: skip


def _stamped(folder: Path) -> Seal:
    found = []
    for name, _ in _listed(folder):
        try:
            status = (folder / name).stat()
        except OSError:
            raise VerifyError(f"{name} is missing", where=str(folder), hint="see `quantkit verify`") from None
        found.append((name, status.st_size, status.st_mtime_ns))
    return Seal(hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest(), tuple(found))


def _listed(folder: Path) -> list[tuple[str, str]]:
    """Names and sums. VerifyError if the manifest is damaged."""
    try:
        return [(str(row["name"]), str(row["sha256"])) for row in read_json(folder / MANIFEST)["files"]]
    except (KeyError, TypeError):
        raise VerifyError(f"{MANIFEST} is damaged", where=str(folder / MANIFEST)) from None
