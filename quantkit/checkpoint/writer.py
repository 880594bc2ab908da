"""Weight files written at known offsets: header first, any order, any thread, renamed when complete."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint.header import fsync_directory
from quantkit.checkpoint.shared import by_the_byte, forget_pages, open_or_create, open_there
from quantkit.checkpoint.system import sync_data
from quantkit.errors import RunError
from quantkit.kernels.sums import position_sum

PARTIAL = ".partial"


@dataclass(frozen=True)
class FileLayout:
    """A weight file's name, what of it is known beforehand as (offset, bytes), and its full size."""

    name: str
    fixed: tuple[tuple[int, bytes], ...]
    nbytes: int


# The filesystem has no room, or this user none, or files cannot be so large: answers, not a lack of means.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_error(e: OSError, path: Path) -> RunError:
    full = e.errno in NO_SPACE
    hint = f"{'free some space' if full else 'mend that'}, then run the same command: it resumes"
    return RunError(f"writing {path.name} failed: {e.strerror or e}", where=str(path.parent), hint=hint)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """RunError for what the system refuses meanwhile."""
    try:
        yield
    except OSError as e:
        raise write_error(e, path) from None


def missing_files(folder: Path, layouts: Iterable[FileLayout]) -> set[str]:
    """Weight files that an earlier run has not left whole: nothing that a journal says of them holds."""
    found = set()
    for layout in layouts:
        sizes = [path.stat().st_size for name in (layout.name + PARTIAL, layout.name)
                 if (path := folder / name).is_file()]  # fmt: skip
        if not sizes or sizes[0] < layout.nbytes:
            found.add(layout.name)
    return found


class ShardWriter:
    """All weight files of one output folder. Reserves their space at once, so that a full disk shows before work does.

    Files that an earlier run left partial, or already renamed, are taken up as they are. reserve: whether their space
    is, or only their size is set, as others may write to them at the same time. shared: others do, and the files are
    as they should be.
    """

    def __init__(
        self, folder: Path, layouts: Iterable[FileLayout], *, reserve: bool = True, shared: bool = False
    ) -> None:
        self.folder, self._reserve, self._shared = folder, reserve and not shared, shared
        self.layouts = {layout.name: layout for layout in layouts}
        self._fds: dict[str, int] = {}
        self._done: set[str] = set()
        try:
            for layout in self.layouts.values():
                self._open(layout)
            fsync_directory(folder)
        except BaseException:
            self.close()
            raise

    def _open(self, layout: FileLayout) -> None:
        final, partial = self.folder / layout.name, self.folder / (layout.name + PARTIAL)
        path = final if final.exists() and not partial.exists() else partial
        try:
            self._fds[layout.name] = fd = open_there(path) if self._shared else open_or_create(path, 0o644)
            if path is final:
                self._done.add(layout.name)
            if not self._reserve:
                by_the_byte(fd)
            if self._shared:
                forget_pages(fd)
                return
            size = os.fstat(fd).st_size
            if size > layout.nbytes:
                os.ftruncate(fd, layout.nbytes)
            elif size < layout.nbytes:
                if self._reserve:
                    _reserve(fd, layout.nbytes)
                else:
                    os.ftruncate(fd, layout.nbytes)
            for offset, data in layout.fixed:
                os.pwrite(fd, data, offset)
        except OSError as e:
            raise write_error(e, path) from None

    def write_fixed(self, files: Iterable[str]) -> None:
        """Once more what of these files is known beforehand: where others write to them, it may have been altered."""
        for name in files:
            for offset, data in self.layouts[name].fixed:
                self.write(name, offset, np.frombuffer(data, np.uint8), summed=False)

    def stamp(self, file: str) -> int:
        """When the file was written to, in nanoseconds: a later time tells that it was since."""
        return os.fstat(self._fds[file]).st_mtime_ns

    @property
    def stamps(self) -> dict[str, int]:
        """By file name."""
        return {name: self.stamp(name) for name in self._fds}

    @property
    def inodes(self) -> dict[str, int]:
        """By file name: which file it is, whatever it is called."""
        return {name: os.fstat(fd).st_ino for name, fd in self._fds.items()}

    def write(self, file: str, offset: int, data: npt.NDArray[Any], *, summed: bool = True) -> int:
        """Writes the array's bytes at `offset` of `file`; their sum, or 0. Thread-safe for disjoint ranges."""
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        found = position_sum(raw, offset) if summed else 0
        view = memoryview(raw.data)
        try:
            while view:
                n = os.pwrite(self._fds[file], view, offset)
                view = view[n:]
                offset += n
        except OSError as e:
            raise write_error(e, self.folder / file) from None
        return found

    def read_into(self, file: str, offset: int, buffer: memoryview) -> int:
        return os.preadv(self._fds[file], [buffer], offset)

    def read_back(self, file: str, offset: int, buffer: npt.NDArray[np.uint8]) -> None:
        """Fills `buffer` with what stands at `offset` now. RunError if that is past the file's end."""
        view = buffer.data
        while view:
            n = self.read_into(file, offset, view)
            if n == 0:
                raise RunError(f"{file} became shorter while it was written", where=str(self.folder))
            view = view[n:]
            offset += n

    def forget(self, file: str, start: int, end: int) -> None:
        """Lets go of what is on disk and will not be read again: the kernel then has pages at hand for what comes."""
        if hasattr(os, "posix_fadvise") and end > start:
            os.posix_fadvise(self._fds[file], start, end - start, os.POSIX_FADV_DONTNEED)

    def sync(self, files: Iterable[str]) -> None:
        for name in files:
            try:
                sync_data(self._fds[name])
            except OSError as e:
                raise write_error(e, self.folder / name) from None

    def commit(self) -> None:
        """Syncs and renames every file to its final name."""
        self.sync(self._fds)
        for name in self.layouts:
            if name not in self._done:
                os.replace(self.folder / (name + PARTIAL), self.folder / name)
        fsync_directory(self.folder)
        self.close()

    def close(self) -> None:
        fds = list(self._fds.values())
        self._fds.clear()
        for fd in fds:
            with suppress(OSError):  # what is to last was synced, and raised then
                os.close(fd)


def _reserve(fd: int, nbytes: int) -> None:
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, nbytes)
        else:
            os.ftruncate(fd, nbytes)
    except OSError as e:
        if e.errno in NO_SPACE:  # other codes mean that the filesystem cannot reserve
            raise
        os.ftruncate(fd, nbytes)


class TrailingHash:
    """SHA-256 of a file that is still being written or read, computed behind a moving frontier.

    `read(offset, buffer)` gives the bytes that are on disk by then: what is hashed is what was stored. The buffer may
    be shared by the hashes of one thread. `look(offset, bytes)` is shown what is read so.
    """

    def __init__(
        self,
        read: Callable[[int, memoryview], int],
        nbytes: int,
        buffer: memoryview,
        look: Callable[[int, memoryview], None] | None = None,
    ) -> None:
        self._read, self.nbytes, self._buffer, self._look = read, nbytes, buffer, look
        self._hash = hashlib.sha256()
        self.position = 0

    def advance(self, to: int) -> None:
        while self.position < to:
            part = self._buffer[: min(len(self._buffer), to - self.position)]
            n = self._read(self.position, part)
            if n == 0:
                raise RunError("a file became shorter while it was hashed", hint="run the same command again")
            self._hash.update(part[:n])
            if self._look is not None:
                self._look(self.position, part[:n])
            self.position += n

    def feed(self, offset: int, data: memoryview) -> None:
        """Hashes what lies before `offset`, then `data`, which the caller has read from there."""
        self.advance(offset)
        data = data[max(0, self.position - offset) :]
        self._hash.update(data)
        self.position += len(data)

    def hexdigest(self) -> str:
        self.advance(self.nbytes)
        return self._hash.hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """A small file, whole or not at all: written beside its place, synced, renamed."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.unlink(missing_ok=True)  # with "x" below: a link that somebody left there is not followed
        with partial.open("xb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except OSError as e:
        raise write_error(e, path) from None


def copy_file(source: Path, target: Path) -> str:
    """Copies a file byte for byte, whole or not at all. Returns its SHA-256."""
    digest = hashlib.sha256()
    partial = target.with_name(target.name + PARTIAL)
    try:
        partial.unlink(missing_ok=True)
        with source.open("rb") as reader, partial.open("xb") as f:
            while chunk := reader.read(1 << 20):
                digest.update(chunk)
                f.write(chunk)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, target)
    except OSError as e:
        raise write_error(e, target) from None
    return digest.hexdigest()
