"""Hidden states of all calibration rows, on disk: read and written row by row, so that they take no memory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from quantkit.checkpoint.system import sync_data
from quantkit.checkpoint.writer import write_error


class HiddenStates:
    """A file of float32 [rows, length, width]. What is read of it is a copy."""

    def __init__(self, path: Path, rows: int, length: int, width: int) -> None:
        self.path, self.shape = path, (rows, length, width)
        self.row_bytes = length * width * 4
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.row_bytes

    @property
    def complete(self) -> bool:
        """Whether every row was written, as far as the size tells."""
        return os.fstat(self._fd).st_size == self.nbytes

    def write(self, row: int, hidden: torch.Tensor) -> None:
        """hidden: [1, length, width]."""
        view = hidden.detach().to("cpu", torch.float32).contiguous().numpy().data.cast("B")
        offset = row * self.row_bytes
        try:
            while view:
                n = os.pwrite(self._fd, view, offset)
                view, offset = view[n:], offset + n
        except OSError as e:
            raise write_error(e, self.path) from None

    def read(self, row: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """[1, length, width]."""
        buffer = np.empty((1, *self.shape[1:]), np.float32)
        view = buffer.data.cast("B")
        offset = row * self.row_bytes
        while view:
            n = os.preadv(self._fd, [view], offset)
            if n == 0:
                raise EOFError(f"{self.path} ends within row {row}")
            view, offset = view[n:], offset + n
        return torch.from_numpy(buffer).to(device)

    def sync(self) -> None:
        sync_data(self._fd)

    def remove(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
