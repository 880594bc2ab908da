"""The journal of an unfinished run: which units are safely on disk, and what was measured of them.

One JSON object a line. The first line binds the run to its plan; a line that was torn by a crash is dropped, and its
unit is done again. The file is locked while a run writes to it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantkit.checkpoint.shared import make_folder, open_or_create
from quantkit.checkpoint.system import sync_data
from quantkit.checkpoint.writer import write_error
from quantkit.errors import OutputError, RunError

FOLDER = ".quantkit"


class Journal:
    """Appends to OUT/.quantkit/NAME. `entries` holds what an earlier run left, first line excluded. writer: who else
    has it, if it is locked."""

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
        raw = self.path.read_bytes()
        good, position = [], 0
        while (end := raw.find(b"\n", position)) >= 0:
            try:
                entry = json.loads(raw[position:end])
            except ValueError:
                break
            if not isinstance(entry, dict):
                break
            good.append(entry)
            position = end + 1
        if position < len(raw):
            os.ftruncate(self._fd, position)
        self._size = position
        return (good[0], good[1:]) if good else (None, [])

    def start(self, head: dict[str, Any]) -> None:
        """Begins anew: forgets what was there, writes the first line."""
        os.ftruncate(self._fd, 0)
        self._size = 0
        self.head, self.entries = head, []
        self.append([head])

    def append(self, entries: Iterable[dict[str, Any]]) -> None:
        """Durable on return; RunError if the disk is full, or if somebody else wrote to the journal, on a filesystem
        that only seems to lock. The caller has synced the data that the entries speak of."""
        raw = b"".join(json.dumps(e).encode() + b"\n" for e in entries)
        view = memoryview(raw)
        try:
            with self._lock:
                if os.fstat(self._fd).st_size != self._size:
                    raise RunError(
                        "another process writes to the same journal",
                        where=str(self.path),
                        hint="start one of them only",
                    )
                while view:
                    view = view[os.write(self._fd, view) :]
                self._size += len(raw)
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
