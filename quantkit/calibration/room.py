"""Room on a GPU for hidden states, so that what layers hand each other need not go through files.

What a run takes of a GPU at the least is planned; what is free beyond that holds as many rows as it can. The numbers
are those that a file would hold, so nothing that comes of them depends on how much room there was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from quantkit.memory import MARGIN
from quantkit.torch_setup import free_memory

BEHIND = 8  # rows that are still to be written


class Room:
    """Bytes of a GPU, given out row by row; and a thread that writes rows to files while the GPU goes on."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self.device, self.left = device, nbytes
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="states")
        self._waiting: deque[Future[None]] = deque()

    @staticmethod
    def beside(device: torch.device, needed: int, of: int = 1) -> Room | None:
        """What is free on a GPU beyond `needed` bytes and some; one of so many equal parts of it. None: not a GPU."""
        if device.type != "cuda":
            return None
        return Room(device, max(free_memory(device) - needed - MARGIN, 0) // of)

    def take(self, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """A tensor of that shape on the GPU, with nothing in it; None where there is no room."""
        nbytes = like.numel() * dtype.itemsize
        if nbytes > self.left:
            return None
        try:
            made = torch.empty(like.shape, dtype=dtype, device=self.device)
        except torch.OutOfMemoryError:  # another process has taken it
            self.left = 0
            return None
        self.left -= nbytes
        return made

    def give_back(self, tensor: torch.Tensor) -> None:
        self.left += tensor.nbytes

    def write(self, work: Callable[[], None]) -> None:
        """Has it done behind what was asked for before, and raises what any of that raised."""
        while len(self._waiting) >= BEHIND:
            self._waiting.popleft().result()
        self._waiting.append(self._writer.submit(work))

    def settle(self) -> None:
        """Waits until everything is written, and raises what went wrong."""
        while self._waiting:
            self._waiting.popleft().result()

    def close(self) -> None:
        """Drops what is not written yet."""
        self._writer.shutdown(cancel_futures=True)
        self._waiting.clear()
