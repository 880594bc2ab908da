"""Files that several processes open at the same time, also of other machines, on a filesystem between these.

Such a filesystem remembers on each machine what it has seen of a file, or that there was none, for a second or so, and
of a file that is open there for as long as it is. So: no file is there in two versions, whoever is second to create one
takes the first one's, and to see what others wrote a file is opened anew, without the pages that are remembered of it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantkit.checkpoint.reader import read_json
from quantkit.errors import SourceError

RETRIES, PAUSE = 12, 0.25  # how long a file may take to be seen from elsewhere; seconds
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)  # of what is remembered, and another machine has deleted
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def make_folder(path: Path) -> None:
    """With its parents. Where another machine makes it at the same time, this one may not see it for a moment."""
    for _ in range(RETRIES):
        with suppress(FileExistsError):
            path.mkdir(parents=True, exist_ok=True)
            return
        time.sleep(PAUSE)
    path.mkdir(parents=True, exist_ok=True)


def open_or_create(path: Path, mode: int, flags: int = 0) -> int:
    """A descriptor to read and write by, of one file for all who ask at the same time. Links are not followed.

    O_CREAT ends in EEXIST on GlusterFS where another machine creates the file between our look and our creation.
    """
    flags |= os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    for _ in range(RETRIES):
        with suppress(FileExistsError):
            return os.open(path, flags | os.O_CREAT, mode)
        with suppress(FileNotFoundError):
            return os.open(path, flags)
        time.sleep(PAUSE)
    return os.open(path, flags | os.O_CREAT, mode)


def open_there(path: Path) -> int:
    """The same of a file that somebody has made, which this machine may see a moment later."""
    for _ in range(RETRIES):
        with suppress(FileNotFoundError):
            return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        time.sleep(PAUSE)
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)


def by_the_byte(fd: int) -> None:
    """For files that several machines write to at the same time. NFS reads a page before it writes a part of it, and
    then may write all of it, with what another machine has written meanwhile as it was before. With a lock on part of
    the file, even a shared one, it writes what it is given."""
    with suppress(OSError):  # a filesystem without such locks
        fcntl.lockf(fd, fcntl.LOCK_SH, 1)


def forget_pages(fd: int) -> None:
    """What is read next comes from the filesystem, not from what this machine remembers. What this process wrote to the
    file must have been synced. Nothing is done on a disk of this machine, where there is nobody else to remember."""
    if hasattr(os, "posix_fadvise") and os.major(os.fstat(fd).st_dev) == 0:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def write_once(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """What the file holds by now: `content`, or what another process wrote before. It is never replaced, so that nobody
    can remember an older version of it."""
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        with beside.open("xb") as f:
            f.write(json.dumps(content).encode())
            f.flush()
            os.fsync(f.fileno())
        os.link(beside, path)
    except FileExistsError:
        return read_if_there(path, certain=True) or {}
    except OSError as e:
        if e.errno not in NO_LINKS:
            raise
        os.replace(beside, path)  # nobody else does at this moment: the caller has locked the folder
    finally:
        beside.unlink(missing_ok=True)
    return content


def read_if_there(path: Path, *, certain: bool = False) -> dict[str, Any] | None:
    """A file of `write_once`, None if there is none. A machine may remember that there was none; in the folder's list
    it is there. certain: it is, whatever the list says. SourceError if it holds something else."""
    for _ in range(RETRIES):
        if not certain and path.name not in listed(path.parent):
            return None
        with suppress(SourceError):
            return read_json(path)
        time.sleep(PAUSE)
    return read_json(path)


def listed(folder: Path) -> list[str]:
    """What is in a folder, nothing if there is none. A list is up to date where a machine still remembers a file that
    another has deleted."""
    try:
        return os.listdir(folder)
    except OSError as e:
        if e.errno in GONE:
            return []
        raise
