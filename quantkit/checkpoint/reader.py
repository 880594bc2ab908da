"""Weight files of one folder, opened safely, described by their headers, read by byte range.

No tensor is read here before somebody asks for a run of its bytes, and a run lands in the caller's buffer: memory is
the caller's decision. Works for safetensors and for torch zip files alike, because in both a tensor is a byte range.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint.header import TensorInfo, quote, read_header, strict_json
from quantkit.checkpoint.system import DIRECT, PAGE, page_buffer
from quantkit.checkpoint.torch_zip import read_torch_zip
from quantkit.checkpoint.views import ByteRange, SourceTensor
from quantkit.errors import NotFiniteError, RunError, SourceError

MAX_JSON = 64 * 1024 * 1024
_BASENAME = re.compile(r"[A-Za-z0-9][\w.\-]*")


@dataclass(frozen=True)
class WeightFile:
    """One weight file. `identity` is the SHA-256 of its header (or data.pkl): what a plan is bound to; `stamp` is
    (size, mtime_ns, inode): what tells that the file was touched while we read it."""

    name: str
    nbytes: int
    identity: str
    stamp: tuple[int, int, int]


def not_finite(tensor: SourceTensor, at: int, folder: Path) -> NotFiniteError:
    """What is said of a NaN or an infinity at element `at` of a tensor in a file of that folder."""
    index = ", ".join(map(str, np.unravel_index(at, tensor.shape)))
    return NotFiniteError(
        f"tensor {tensor.name!r} holds a NaN or an infinity at [{index}]",
        where=f"{folder}/{tensor.file}",
        hint="fetch or train the model again; --allow-nonfinite quantizes such values as zero, or copies them",
    )


def safe_path(folder: Path, name: str) -> Path:
    """folder/name, if `name` is a plain file name and what is there, if anything, is a file inside the folder.

    The one exception is a Hub cache: its snapshots are symlinks into the `blobs` folder of the same model, or (since
    huggingface_hub 2) through that into the one of the whole cache, as `blobs/ab/abcd…`.
    """
    if not _BASENAME.fullmatch(name):
        raise SourceError(
            f"{quote(name)} is not a plain file name",
            where=str(folder),
            hint="an index may only name files beside itself",
        )
    path = folder / name
    if path.is_symlink():
        home, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))  # resolve() raises on a loop
        model = home.parent.parent
        blobs = (target.parent == model / "blobs", target.parent.parent == model.parent / "blobs")
        cached = home.parent.name == "snapshots" and any(blobs)
        if not (target.is_relative_to(home) or cached):
            raise SourceError(
                f"{name} is a symbolic link that leaves the folder",
                where=str(path),
                hint="copy the file in its place, if you trust where it leads",
            )
    if path.exists() and not path.is_file():  # opening a pipe would wait forever
        raise SourceError(f"{name} is not a file", where=str(path), hint="fetch the model again")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file; SourceError if it is missing, too large, not JSON or not an object."""
    hint = "fetch the file again, or mend it"
    try:
        if path.stat().st_size > MAX_JSON:
            raise SourceError(f"{path.name} is larger than {MAX_JSON >> 20} MiB", where=str(path), hint=hint)
        value = strict_json(path.read_bytes())
    except FileNotFoundError:
        raise SourceError(f"{path.name} is missing", where=str(path.parent), hint="fetch the file again") from None
    except ValueError as e:
        raise SourceError(f"{path.name} is not valid JSON: {e}", where=str(path), hint=hint) from None
    except OSError as e:
        raise SourceError(
            f"{path.name} cannot be read: {e.strerror}", where=str(path), hint="check its permissions"
        ) from None
    if not isinstance(value, dict):
        raise SourceError(f"{path.name} holds {type(value).__name__}, not an object", where=str(path), hint=hint)
    return value


def read_weight_files(
    folder: Path, names: Iterable[str], *, data_present: bool = True
) -> tuple[list[TensorInfo], list[WeightFile]]:
    """Headers of the named files, in that order; tensors in file order. A name in two files is an error."""
    tensors: dict[str, TensorInfo] = {}
    files = []
    for name in names:
        path = safe_path(folder, name)
        try:
            if name.endswith(".safetensors"):
                infos, _, identity = read_header(path, data_present=data_present)
            else:
                infos, identity = read_torch_zip(path, data_present=data_present)
            status = path.stat()
        except FileNotFoundError:
            raise SourceError(
                f"the weight file {name} is missing",
                where=str(folder),
                hint="the download is incomplete: fetch it again",
            ) from None
        except OSError as e:
            raise SourceError(
                f"{name} cannot be read: {e.strerror}", where=str(path), hint="check its permissions"
            ) from None
        for info in infos:
            if info.name == "__metadata__":  # a pickle may hold it, but in a safetensors header it is no tensor
                raise SourceError("no tensor may be called '__metadata__'", where=str(path), hint="rename it")
            if info.name in tensors:
                raise SourceError(
                    f"tensor {quote(info.name)} is stored twice",
                    where=f"{folder}: {tensors[info.name].file} and {name}",
                    hint="keep the files of one download only",
                )
            tensors[info.name] = info
        digest = hashlib.sha256(identity).hexdigest()
        # A file that holds no more than its header still counts with the size that the header promises.
        promised = max((t.offset + t.nbytes for t in infos), default=0)
        files.append(WeightFile(name, max(status.st_size, promised), digest, _stamp(status)))
    return list(tensors.values()), files


def runs_buffer(runs: Sequence[ByteRange]) -> npt.NDArray[np.uint8]:
    """Room for `SourceFiles.read_runs`: each run at a page of its own."""
    return page_buffer(sum((run.nbytes // PAGE + 2) * PAGE for run in runs))


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


class SourceFiles:
    """Open descriptors of the weight files, for reading runs of bytes from any thread.

    A large file that is read once gains nothing from the page cache, and filling it costs more processor time than
    hashing what is read: `read_aside` goes past it (O_DIRECT) wherever the filesystem allows that.
    """

    def __init__(self, folder: Path, files: Iterable[WeightFile]) -> None:
        self.folder = folder
        self.files = {f.name: f for f in files}
        self._fds: dict[str, int] = {}
        self._direct: dict[str, int] = {}

    def __enter__(self) -> SourceFiles:
        try:
            for name in self.files:
                path = safe_path(self.folder, name)
                self._fds[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                with suppress(OSError):
                    if DIRECT:
                        self._direct[name] = os.open(path, os.O_RDONLY | os.O_CLOEXEC | DIRECT)
        except OSError as e:
            self.__exit__()
            many = e.errno in (errno.EMFILE, errno.ENFILE)
            hint = "allow more files to be open: ulimit -n" if many else "see who may read it, and from where"
            raise RunError(f"{name} cannot be opened: {e.strerror}", where=str(self.folder), hint=hint) from None
        return self

    def __exit__(self, *_: object) -> None:
        for fd in (*self._fds.values(), *self._direct.values()):
            os.close(fd)
        self._fds.clear()
        self._direct.clear()

    def read_aside(self, buffer: npt.NDArray[np.uint8], file: str, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        """The bytes at `offset` as a part of `buffer`, which `page_buffer(nbytes)` made. RunError as `read_into`."""
        first = offset // PAGE * PAGE
        lead, end = offset - first, offset - first + nbytes
        got = 0
        if file in self._direct:
            try:
                got = os.preadv(self._direct[file], [buffer[: -(-end // PAGE) * PAGE].data], first)
            except OSError:  # opened so, but not read so: some filesystems find out late
                got = 0
        # The rest, or all of it: what ends with the file or what the filesystem would not give directly.
        start = max(lead, min(got, end))
        self.read_into(buffer[start:end], file, first + start)
        return buffer[lead:end]

    def read_runs(
        self, buffer: npt.NDArray[np.uint8], runs: Sequence[ByteRange], item: int
    ) -> list[npt.NDArray[np.uint8]]:
        """The bytes of each run as a part of `buffer`, which `runs_buffer(runs)` made, aligned to `item` bytes."""
        found, begin = [], 0
        for run in runs:
            room = (run.nbytes // PAGE + 2) * PAGE
            part = buffer[begin : begin + room]
            raw = self.read_aside(part, run.file, run.offset, run.nbytes)
            if run.offset % item:  # a header of odd length leaves every tensor askew; kernels want them aligned
                ctypes.memmove(part.ctypes.data, raw.ctypes.data, run.nbytes)  # no copy that no plan knows
                raw = part[: run.nbytes]
            found.append(raw)
            begin += room
        return found

    def read_into(self, buffer: npt.NDArray[np.uint8], file: str, offset: int) -> None:
        """Fills `buffer` (uint8) with the bytes at `offset`; RunError if the file has become shorter."""
        view = buffer.data
        while view:
            n = self.pread(file, offset, view)
            view = view[n:]
            offset += n

    def pread(self, file: str, offset: int, buffer: memoryview) -> int:
        """Reads up to len(buffer) bytes at `offset` into it; how many, at least one."""
        try:
            n = os.preadv(self._fds[file], [buffer], offset)
        except OSError as e:
            raise RunError(f"reading {file} failed: {e.strerror}", where=str(self.folder)) from None
        if n == 0:
            raise self._changed(file)
        return n

    def check_unchanged(self) -> None:
        """RunError if any file was modified or replaced since its header was read."""
        for name, file in self.files.items():
            path = safe_path(self.folder, name)
            if not path.exists() or _stamp(path.stat()) != file.stamp:
                raise self._changed(name)

    def _changed(self, file: str) -> RunError:
        return RunError(
            f"{file} changed while it was being read",
            where=str(self.folder),
            hint="let the download or training finish, then run the same command with --force",
        )


def elements(tensor: SourceTensor, sources: SourceFiles, start: int, count: int) -> npt.NDArray[Any]:
    """`count` elements of a tensor from `start` on, flat, as bit patterns in a fresh array. Both fit its granule."""
    raw = []
    for run in tensor.runs(start, count):
        raw.append(np.empty(run.nbytes, np.uint8))
        sources.read_into(raw[-1], run.file, run.offset)
    return tensor.arrange(raw, start)
