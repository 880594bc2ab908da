"""Hidden states of all calibration rows, on disk: read and written row by row, so that they take no memory.

Where a GPU has room for them, rows lie there, too; those that nobody needs after an interruption there only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch

from quantkit.calibration.room import Room
from quantkit.checkpoint.shared import by_the_byte, forget_pages, open_or_create
from quantkit.checkpoint.system import PAGE, sync_data
from quantkit.checkpoint.writer import writing
from quantkit.errors import RunError
from quantkit.kernels.sums import MODULUS, position_sum
from quantkit.solvers.team import Team


class HiddenStates:
    """A file of [rows, length, width] numbers of one type. What is read of it is a copy.

    A row may be written in another shape, with fewer tokens (those that an expert got): it is read in that shape, as
    long as the object lives. room: for rows on a GPU, of one process alone. lasting: whether they are to be in the file
    all the same, for a run that takes up this one; such rows are summed.
    """

    def __init__(
        self,
        path: Path,
        rows: int,
        length: int,
        width: int,
        dtype: torch.dtype = torch.float32,
        *,
        room: Room | None = None,
        lasting: bool = False,
    ) -> None:
        self.path, self.shape, self.dtype = path, (rows, length, width), dtype
        self.row_bytes = row_bytes(length, width, dtype.itemsize)
        self.room, self.lasting = room, lasting
        self._shapes: dict[int, torch.Size] = {}
        self._sums: dict[int, int] = {}
        self._there: dict[int, torch.Tensor] = {}  # rows on the GPU
        self._open()

    def _open(self) -> None:
        self._fd = open_or_create(self.path, 0o600)
        by_the_byte(self._fd)  # a team's

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.row_bytes

    def write(self, row: int, hidden: torch.Tensor) -> None:
        """hidden: [1, length, width], or [..., width] of at most `length` tokens."""
        if hidden.numel() > self.shape[1] * self.shape[2]:
            raise RunError(
                f"a linear gets {list(hidden.shape)} numbers for a row of {self.shape[1]} tokens",
                hint="such a layer cannot be calibrated; leave it alone with --skip, or use --method rtn",
            )
        self._shapes[row] = hidden.shape
        kept = self._keep(row, hidden)
        if kept is None:
            self._write(hidden, row * self.row_bytes)
        elif self.lasting and self.room is not None:
            self.room.write(partial(self._write, kept, row * self.row_bytes))

    def _keep(self, row: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """The row on the GPU, if there is room. A new one: the old one may still be on its way to the file."""
        if self.room is None:
            return None
        if (old := self._there.pop(row, None)) is not None:
            self.room.give_back(old)
        if (made := self.room.take(hidden, self.dtype)) is not None:
            self._there[row] = made.copy_(hidden.detach())
        return made

    def read(self, row: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """[1, length, width], or in the shape that it was written in."""
        if (there := self._there.get(row)) is not None:
            return there.to(device, copy=True)
        hidden = torch.empty(self._shapes.get(row, (1, *self.shape[1:])), dtype=self.dtype)
        self._read(hidden, row * self.row_bytes)
        return hidden.to(device)

    def write_part(self, row: int, first: int, hidden: torch.Tensor) -> None:
        """Tokens of a row from the `first` on: hidden [n, width]."""
        self._write(hidden, self._offset(row, first))

    def read_part(self, row: int, first: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """`count` tokens of a row from the `first` on: [count, width]."""
        hidden = torch.empty((count, self.shape[2]), dtype=self.dtype)
        self._read(hidden, self._offset(row, first))
        return hidden.to(device)

    def _offset(self, row: int, token: int) -> int:
        return row * self.row_bytes + token * self.shape[2] * self.dtype.itemsize

    def _write(self, hidden: torch.Tensor, offset: int) -> None:
        view = _bytes(hidden.detach().to("cpu", self.dtype).contiguous())
        if self.lasting:
            self._sums[offset // self.row_bytes] = position_sum(np.frombuffer(view, np.uint8), offset)
        with writing(self.path):
            while view:
                n = os.pwrite(self._fd, view, offset)
                view, offset = view[n:], offset + n

    def _read(self, hidden: torch.Tensor, offset: int) -> None:
        try:
            _fill(self._fd, _bytes(hidden), offset)
        except EOFError:
            raise RunError(
                f"{self.path.name} became shorter while it was read", where=str(self.path.parent),
                hint="nobody else may write there; run the same command again",
            ) from None  # fmt: skip

    def sum_of(self, rows: Iterable[int]) -> int | None:
        """Of what was written of rows, behind `sync`; None if one was not written. `sum_on_disk` must find the same."""
        sums = [self._sums.get(row) for row in rows]
        return None if None in sums else sum(n for n in sums if n is not None) % MODULUS

    def holds(self, rows: Iterable[int], wanted: int | None) -> bool:
        """Whether rows are in the file as they were written, of which `sum_of` gave `wanted`."""
        return wanted is not None and sum_on_disk(self.path, self.shape, rows) == wanted

    def share(self, team: Team) -> None:
        """What each has written can be read by all. To be called by all."""
        if team.alone:
            return
        elsewhere = team.here < team.size
        if elsewhere:  # GlusterFS writes behind a close, and says only then that the disk is full
            with writing(self.path):
                sync_data(self._fd)
        self.close()
        for shapes in team.gather(self._shapes):
            self._shapes |= shapes
        self._open()
        if elsewhere:
            forget_pages(self._fd)
        if os.fstat(self._fd).st_size < self.nbytes:  # rows were written in another shape, or this is not seen yet
            self.extend()

    def extend(self) -> None:
        """To the size that it has when all is written: zeros, which take no room."""
        with writing(self.path):
            os.ftruncate(self._fd, self.nbytes)

    def sync(self) -> None:
        """On disk, and as long as if every row had been written."""
        if self.room is not None:
            self.room.settle()
        self.extend()
        with writing(self.path):
            sync_data(self._fd)

    def remove(self) -> None:
        with suppress(RunError):  # nobody will read it
            self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """No row may be on its way to the file: behind `sync`, or when the room is closed."""
        for there in self._there.values():
            assert self.room is not None
            self.room.give_back(there)
        self._there = {}
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with writing(self.path):
                os.close(fd)


def sum_on_disk(path: Path, shape: tuple[int, int, int], rows: Iterable[int]) -> int | None:
    """The position sum of some rows of a file of float32 [rows, length, width]; None if it is not as long as that."""
    count, length, width = shape
    step, buffer, total = row_bytes(length, width, 4), np.empty(length * width * 4, np.uint8), 0
    with suppress(OSError, EOFError), path.open("rb", buffering=0) as file:  # what cannot be read is not there
        forget_pages(file.fileno())
        if os.fstat(file.fileno()).st_size != count * step:
            return None
        for row in rows:
            _fill(file.fileno(), buffer.data, row * step)
            total += position_sum(buffer, row * step)
        return total % MODULUS
    return None


def _fill(fd: int, view: memoryview, offset: int) -> None:
    """From a file's `offset` on; EOFError if it ends before."""
    while view:
        n = os.preadv(fd, [view], offset)
        if n == 0:
            raise EOFError
        view, offset = view[n:], offset + n


def row_bytes(length: int, width: int, itemsize: int) -> int:
    """From a row to the next in a file: whole pages. On a filesystem between machines, two that each write their rows
    would otherwise write into one page, and each has the page as it was before the other's."""
    return -(-length * width * itemsize // PAGE) * PAGE


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    flat = tensor.reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
