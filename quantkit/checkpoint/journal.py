"""The journal of an unfinished run: which units are safely on disk, and what was measured of them.

A line is a CRC-32, in hexadecimal, which goes on from that of the line before, and a JSON object. The first binds the
run to its plan. From one that was torn by a crash, or altered, or whose predecessor is gone, nothing counts any more,
and is done again: a digit of a SHA-256 or of an error would get into manifest and card. It stays in the file until
something is appended: who only looks, changes nothing. The file is locked while a run writes to it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantkit.checkpoint.shared import GONE, forget_pages, make_folder, open_or_create
from quantkit.checkpoint.system import sync_data
from quantkit.checkpoint.writer import write_error
from quantkit.errors import OutputError, RunError

FOLDER = ".quantkit"


class Journal:
    """Appends to OUT/.quantkit/NAME. `entries` holds what an earlier run left, first line excluded; `damage`: words
    of warning, if whole lines of that do not count. writer: who else has it, if it is locked."""

    def __init__(self, out: Path, name: str = "journal", writer: str = "another run is writing to this folder") -> None:
        self.path = out / FOLDER / name
        make_folder(self.path.parent)
        self._lock = threading.Lock()
        self._fd = open_or_create(self.path, 0o644, os.O_APPEND)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            with suppress(OSError):  # of a folder that is gone
                os.close(self._fd)
            if e.errno != errno.EWOULDBLOCK:
                raise OutputError(
                    f"the output folder cannot be locked: {e.strerror}", where=str(out), hint="write to a local disk"
                ) from None
            raise OutputError(writer, where=str(out), hint="wait for it, or name another -o") from None
        if os.fstat(self._fd).st_nlink == 0:  # it finished between our open and our lock
            os.close(self._fd)
            raise OutputError(
                "another run has just finished this folder", where=str(out), hint="run the same command again"
            )
        head, self.entries = self._load()
        self.head: dict[str, Any] | None = head

    def _load(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        forget_pages(self._fd)
        raw = self.path.read_bytes()
        good, position, self._crc = _whole_lines(raw)
        damaged = b"\n" in raw[position:]
        self.damage = (
            f"{self.path} is not as it was written; what it no longer speaks of is done again" if damaged else ""
        )
        self._size, self._good = len(raw), position
        return (good[0], good[1:]) if good else (None, [])

    def start(self, head: dict[str, Any]) -> None:
        """Begins anew: forgets what was there, writes the first line."""
        os.ftruncate(self._fd, 0)
        self._size = self._good = self._crc = 0
        self.head, self.entries = head, []
        self.append([head])

    def append(self, entries: Iterable[dict[str, Any]]) -> None:
        """Durable on return; RunError if the disk is full, or if somebody else wrote to the journal, on a filesystem
        that only seems to lock. The caller has synced the data that the entries speak of."""
        try:
            with self._lock:
                crc, lines = self._crc, []
                for entry in entries:
                    line, crc = _line(entry, crc)
                    lines.append(line)
                raw = b"".join(lines)
                view = memoryview(raw)
                if os.fstat(self._fd).st_size != self._size:
                    raise RunError(
                        "another process writes to the same journal",
                        where=str(self.path),
                        hint="start one of them only",
                    )
                if self._good < self._size:
                    os.ftruncate(self._fd, self._good)
                while view:
                    view = view[os.write(self._fd, view) :]
                self._size = self._good = self._good + len(raw)
                self._crc = crc
                sync_data(self._fd)
        except OSError as e:
            raise write_error(e, self.path) from None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """The run is committed: the folder needs no journal any more."""
        self.path.unlink(missing_ok=True)
        self.close()
        with suppress(OSError):  # a run that started this moment may hold a journal of its own there
            self.path.parent.rmdir()


def read_journal(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """First line and entries, by now, of a journal that another process may be writing; nothing of none."""
    try:
        with path.open("rb") as f:
            forget_pages(f.fileno())
            good, _, _ = _whole_lines(f.read())
    except OSError as e:
        if e.errno not in GONE:
            raise
        good = []
    return (good[0], good[1:]) if good else (None, [])


def _whole_lines(raw: bytes) -> tuple[list[dict[str, Any]], int, int]:
    """What counts of a journal, how many bytes that are, and the last one's CRC-32."""
    good, position, crc = [], 0, 0
    while (end := raw.find(b"\n", position)) >= 0:
        if (entry := _read(raw[position:end], crc)) is None:
            break
        good.append(entry)
        crc = int(raw[position : position + 8], 16)
        position = end + 1
    return good, position, crc


def _line(entry: dict[str, Any], before: int) -> tuple[bytes, int]:
    """With its CRC-32; before: that of the line before."""
    raw = json.dumps(entry).encode()
    crc = zlib.crc32(raw, before)
    return b"%08x %s\n" % (crc, raw), crc


def _read(line: bytes, before: int) -> dict[str, Any] | None:
    """None for one that is not as it was written, or where."""
    crc, _, raw = line.partition(b" ")
    if crc != b"%08x" % zlib.crc32(raw, before):
        return None
    try:
        entry = json.loads(raw)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
