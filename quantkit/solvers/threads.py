"""Rows shared out to threads. Each row is computed alone, so the result does not depend on how many there are."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch


def over_rows(rows: int, kernel: Callable[..., Any], *arguments: Any) -> None:
    """kernel(start, stop, *arguments) on runs of rows that cover 0 … rows − 1, as many as torch has threads.

    The kernel must let go of the interpreter's lock. Threads of our own rather than Numba's: those have one pool a
    process, which some of its layers abort when two callers meet in it.
    """
    count = max(1, min(torch.get_num_threads(), rows))
    cuts = [rows * i // count for i in range(count + 1)]
    if count == 1:
        kernel(0, rows, *arguments)
        return
    with ThreadPoolExecutor(count) as pool:
        runs = [pool.submit(kernel, start, stop, *arguments) for start, stop in pairwise(cuts)]
    for run in runs:
        run.result()
