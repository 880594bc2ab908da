"""Work shared out to threads, or to GPUs, in parts that do not depend on how many there are, each computed by one.

So neither do the bytes. A matrix product that MKL shares out itself has other last digits for other numbers of threads
where a thread's part has an odd edge.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

LEAST, MOST, PARTS = 48, 256, 16  # rows to a part: enough for a product to be fast, and parts for as many threads
LARGEST = 2**20  # numbers in a part, as far as LEAST rows have fewer
OF_GPU = 2048  # rows to a part of a GPU's: they fill it, and a tall matrix still has parts for several


def parts(rows: int, device: torch.device, columns: int = 1) -> list[slice]:
    """Rows 0 … rows − 1, each of so many columns, in runs of a suitable size."""
    return runs(0, rows, min(max(-(-rows // PARTS) + 15 & ~15, LEAST), most_rows(columns)), device)


def most_rows(columns: int) -> int:
    """The most rows to a part."""
    return max(min(MOST, LARGEST // columns & ~15), LEAST)


def runs(start: int, stop: int, size: int, device: torch.device) -> list[slice]:
    """start … stop − 1 in runs of a size; on a GPU, in runs of OF_GPU."""
    size = size if device.type == "cpu" else OF_GPU
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def in_threads(work: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> list[Result]:
    """[work(item) for item in items] without gradients, on as many threads as torch has here, each with one of its own.

    On another device: one after the other, in this thread.
    """
    inference = torch.is_inference_mode_enabled()  # a thread's own: tensors made in it may be changed in it alone

    def one(item: Item) -> Result:
        with torch.inference_mode(inference), torch.no_grad():
            return work(item)

    if device.type != "cpu" or torch.get_num_threads() == 1:
        return [one(item) for item in items]
    return list(_pool(torch.get_num_threads()).map(one, items))


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    """Threads in each of which torch, OpenMP and MKL have one thread. They stay: the setting is made once.

    Of torch's three settings two are a thread's own; the third, which is what new threads begin with, is put back.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "solver")
    all_set = threading.Barrier(count + 1)

    def settle() -> None:
        torch.get_num_threads()  # makes torch set up this thread, which would otherwise undo the next line later
        torch.set_num_threads(1)
        all_set.wait()

    for _ in range(count):
        pool.submit(settle)
    all_set.wait()
    torch.set_num_threads(before)
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
