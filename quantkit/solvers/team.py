"""Processes that calibrate together, started by torchrun or a scheduler, or one alone.

All of them run the same program on the same layer. Text is shared out by rows, products and solutions by runs of rows
of a matrix, and what somebody has made, everybody gets. Which process makes a number is of no influence on it: sums go
over the text in its order, whoever adds them up. So the bytes are the same for any number of processes.

Hidden states lie in files that all processes see. A file is opened anew to read what others wrote, which is what a
network's filesystem asks for.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from quantkit.errors import RunError
from quantkit.solvers.threads import in_threads

Thing = TypeVar("Thing")

PATIENCE = timedelta(hours=24)  # a process may have to wait for what another does alone
PIECE = 16 << 20  # bytes sent at a time


@dataclass(frozen=True)
class Team:
    """Process `rank` of `size`. Methods must be called by all, in the same order; RunError if one of them is gone."""

    rank: int = 0
    size: int = 1
    here: int = 1  # of them on this machine

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this one writes, and speaks."""
        return self.rank == 0

    def owners(self, costs: Sequence[int]) -> list[int]:
        """For each of some things, who does it: the dearest first, to whom has least to do."""
        loads = [0] * self.size
        found = [0] * len(costs)
        for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            found[i] = loads.index(min(loads))
            loads[found[i]] += costs[i]
        return found

    def meet(self) -> None:
        """Waits for all."""
        if not self.alone:
            with _peers():
                distributed.barrier()

    def tell(self, thing: Thing) -> Thing:
        """What the leader says, to all. Plain data."""
        if self.alone:
            return thing
        box = [thing if self.leads else None]
        with _peers():
            distributed.broadcast_object_list(box, 0)
        return box[0]  # type: ignore[return-value]

    def gather(self, thing: Thing) -> list[Thing]:
        """What each says, by rank. Plain data."""
        if self.alone:
            return [thing]
        found: list[Any] = [None] * self.size
        with _peers():
            distributed.all_gather_object(found, thing)
        return found

    def compute(
        self, work: Callable[[slice], Any], runs: Sequence[slice], results: Collection[Tensor], device: torch.device
    ) -> None:
        """Calls `work` for each run of rows, as `in_threads` does, here for this process's; `results`: tensors whose
        rows it sets, and which everybody has whole afterwards."""
        owners = self.owners([rows.stop - rows.start for rows in runs])
        in_threads(work, self.mine(runs, owners), device)
        self.exchange(runs, owners, results)

    def mine(self, runs: Sequence[slice], owners: Sequence[int]) -> list[slice]:
        return [rows for rows, owner in zip(runs, owners, strict=True) if owner == self.rank]

    def exchange(self, runs: Sequence[slice], owners: Sequence[int], results: Collection[Tensor]) -> None:
        """Sends the rows that this process has made to all others, and gets theirs."""
        if self.alone:
            return
        for owner in range(self.size):
            theirs = [rows for rows, whose in zip(runs, owners, strict=True) if whose == owner]
            piece: list[Tensor] = []
            for part in (result[rows] for result in results for rows in theirs):
                if piece and sum(p.nbytes for p in piece) + part.nbytes > PIECE:
                    self._send(piece, owner)
                    piece = []
                piece.append(part)
            if piece:
                self._send(piece, owner)

    def _send(self, piece: Sequence[Tensor], owner: int) -> None:
        """From the owner to all others, into the same parts of theirs."""
        device = piece[0].device
        if owner == self.rank:
            flat = torch.cat([_bytes(part) for part in piece])
        else:
            flat = torch.empty(sum(part.nbytes for part in piece), dtype=torch.uint8, device=device)
        with _peers():
            distributed.broadcast(flat, owner)
        if owner != self.rank:
            for part, raw in zip(piece, torch.split(flat, [part.nbytes for part in piece]), strict=True):
                part.copy_(raw.clone().view(part.dtype).reshape(part.shape))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


ALONE = Team()


@contextmanager
def joined() -> Iterator[Team]:
    """The team that torchrun has started, or whoever set the variables by which torch.distributed finds its peers, for
    as long as it works together."""
    with _peers():
        distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        yield Team(distributed.get_rank(), distributed.get_world_size(), here)
    finally:
        distributed.destroy_process_group()


@contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, pickle.UnpicklingError):  # in words that say nothing of what happened there
        raise RunError(
            "another process of the team is gone",
            hint="see what it said; the same command takes up where it stopped, also with another number of processes",
        ) from None
