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
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from quantkit.errors import InputError, Interrupted, QuantkitError, RunError, UsageError
from quantkit.solvers.threads import in_threads

Thing = TypeVar("Thing")

MEETING = timedelta(minutes=10)  # until all processes are there
PATIENCE = timedelta(hours=24)  # a process may have to wait for what another does alone
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by which processes find each other
PIECE = 16 << 20  # bytes sent at a time


@dataclass(frozen=True)
class Team:
    """Process `rank` of `size`, the `local`-th of `here` on this machine. Methods must be called by all, in the same
    order; RunError if one of them is gone. wire: a group by which GPUs send each other tensors; without one, these go
    through RAM."""

    rank: int = 0
    size: int = 1
    here: int = 1
    local: int = 0
    group: Any = field(default=None, compare=False, repr=False)
    wire: Any = field(default=None, compare=False, repr=False)

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
            with self._peers():
                distributed.barrier(self.group)

    def tell(self, thing: Thing) -> Thing:
        """What the leader says, to all. Plain data."""
        if self.alone:
            return thing
        box = [thing if self.leads else None]
        with self._peers():
            distributed.broadcast_object_list(box, 0, self.group)
        return box[0]  # type: ignore[return-value]

    def hear(self) -> Any:
        """What the leader tells."""
        return self.tell(None)

    def begin(self, make: Callable[[], Thing], sign: Callable[[Thing], Mapping[str, Any]]) -> Thing:
        """What all make to begin with, of which `sign` gives what must be the same. Raises what `make` raises, as
        an error that the leader says where all have it; RunError if only others do, or if signs differ."""
        made: list[Thing] = []
        error: InputError | None = None
        try:
            made.append(make())
        except InputError as e:
            error = e
        said = self.gather(str(error) if error else "")
        if error is not None:
            error.said = self.leads or said[0] == str(error)
            raise error
        if others := [rank for rank, words in enumerate(said) if words]:
            raise RunError(
                f"process {others[0]} of the team cannot begin", where=said[others[0]].splitlines()[0],
                hint="give all processes the same files and options, and what they say of it",
            )  # fmt: skip
        signs = self.gather(dict(sign(made[0])))
        for rank, other in enumerate(signs):
            if wrong := [key for key, value in other.items() if value != signs[0].get(key)]:
                raise RunError(
                    f"process {rank} of the team has another {wrong[0]} than process 0",
                    where=f"{other[wrong[0]]!s:.80}", hint="give all processes the same files, versions and machines",
                )  # fmt: skip
        return made[0]

    def gather(self, thing: Thing) -> list[Thing]:
        """What each says, by rank. Plain data."""
        if self.alone:
            return [thing]
        found: list[Any] = [None] * self.size
        with self._peers():
            distributed.all_gather_object(found, thing, self.group)
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
        wire = self.wire if piece[0].device.type != "cpu" else None
        device = piece[0].device if wire is not None else torch.device("cpu")
        if owner == self.rank:
            flat = torch.cat([_bytes(part) for part in piece]).to(device)
        else:
            flat = torch.empty(sum(part.nbytes for part in piece), dtype=torch.uint8, device=device)
        if wire is not None:
            self.meet()  # NCCL would wait for one that is gone, or works on something else
        with self._peers(wired=wire is not None):
            distributed.broadcast(flat, owner, wire if wire is not None else self.group)
        if owner != self.rank:
            for part, raw in zip(piece, torch.split(flat, [part.nbytes for part in piece]), strict=True):
                part.copy_(raw.clone().view(part.dtype).reshape(part.shape))

    @contextmanager
    def _peers(self, *, wired: bool = False) -> Iterator[None]:
        """RunError for what torch says where another process is gone; wired: or where GPUs cannot reach each other."""
        try:
            yield
        except torch.OutOfMemoryError:  # a RuntimeError, and this process's own
            raise
        except (RuntimeError, pickle.UnpicklingError) as e:  # gloo's words say nothing of what happened there
            why = f", or GPUs do not reach each other: {_first_line(e)}" if wired else ""
            gone = RunError(
                f"another process of the team is gone{why}",
                where=f"process {self.rank} of {self.size}, on {socket.gethostname()}",
                hint="see what the other said; the same command takes up where it stopped",
            )
            gone.said = self.local > 1  # two of each machine, should one, or a whole machine, be what is gone
            raise gone from None

    def wired(self, device: torch.device) -> Team:
        """The same with a wire between GPUs, if each process has one of its own: `device`."""
        if self.alone:
            return self
        own = _card(device) if distributed.is_nccl_available() else None
        cards = self.gather(own)
        if None in cards or len(set(cards)) < self.size:
            return self
        return replace(self, wire=distributed.new_group(backend="nccl", timeout=MEETING))


def _card(device: torch.device) -> str | None:
    """Which GPU it is, of all there are. None: there is none, or it does not say."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", "")) or None


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


ALONE = Team()


@contextmanager
def joined() -> Iterator[Team]:
    """The team that torchrun has started, or whoever set the variables by which torch.distributed finds its peers, for
    as long as it works together."""
    try:
        group = _met()
    except QuantkitError as e:
        e.own = True
        raise
    rank, size = distributed.get_rank(), distributed.get_world_size()
    try:
        names = Team(rank, size, group=group).gather(socket.gethostname())
        yield Team(rank, size, names.count(names[rank]), names[:rank].count(names[rank]), group)
    except QuantkitError as e:
        e.own = not (e.said or isinstance(e, Interrupted))
        raise
    finally:
        distributed.destroy_process_group()


def _first_line(e: Exception) -> str:
    return (str(e) or type(e).__name__).splitlines()[0][:200]


@contextmanager
def _can_be_ended() -> Iterator[None]:
    """Signals end the process at once: nothing is begun yet, and what waits for peers is not Python."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _met() -> Any:
    """The group of all processes."""
    where = ", ".join(f"{key}={os.environ.get(key)}" for key in VARIABLES)
    numbers = [os.environ.get(key, "") for key in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
    if not (all(map(str.isdigit, numbers)) and int(numbers[0]) < int(numbers[1]) and 0 < int(numbers[2]) < 65536):
        raise UsageError(
            "these variables name no process of a team", where=where,
            hint="torchrun sets them; for one process alone, unset them",
        )  # fmt: skip
    try:
        with _can_be_ended():
            distributed.init_process_group("gloo", timeout=MEETING)
        return distributed.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as e:
        raise RunError(
            f"the team did not come together: {_first_line(e)}", where=where,
            hint="start all of its processes, on a port that is free; for one alone, unset these",
        ) from None  # fmt: skip
