"""What POSIX systems do not all have. Linux has all of it; elsewhere the next best thing is done."""

from __future__ import annotations

import mmap
import os
from functools import cache

import numpy as np
import numpy.typing as npt

PAGE = 4096  # what direct reads are aligned to: file offset, length and address
DIRECT = getattr(os, "O_DIRECT", 0)  # 0 where there is no such thing


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def multiplies_in_bf16() -> bool:
    """Whether the processor does, as far as the system says; torch_setup.fast_dtype asks torch, which no plan loads."""
    try:
        with open("/proc/cpuinfo") as f:
            return any(line.startswith("flags") and "avx512_bf16" in line.split() for line in f)
    except OSError:
        return False


def sync_data(fd: int) -> None:
    """The file's bytes are on disk on return; its times need not be."""
    (os.fdatasync if hasattr(os, "fdatasync") else os.fsync)(fd)


def page_buffer(nbytes: int) -> npt.NDArray[np.uint8]:
    """Bytes that begin at a page boundary, with room for `nbytes` wherever in a page they begin."""
    return np.frombuffer(mmap.mmap(-1, (nbytes // PAGE + 2) * PAGE), np.uint8)
