"""How torch computes here: how many threads, and by which library."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

# Of glibc's malloc.h: options of mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGE = 32 << 20  # the most that glibc takes for a threshold


def prepare_torch(threads: int) -> None:
    """Threads of a matrix product; products of float32 by oneDNN where that costs no precision.

    oneDNN is 2.2 times as fast as MKL on AMD's processors. torch takes it for float32 when inputs may be rounded to
    bf16, which it does on x86 only with AMX. There, on other processors, and where torch is too old to be asked,
    nothing is changed.
    """
    torch.set_num_threads(threads)
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is not None and platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_amx_tile_supported():
        matmul.fp32_precision = "bf16"
    _keep_freed_memory()


@contextmanager
def torch_settings(threads: int) -> Iterator[None]:
    """Computes with `threads` threads; what the caller's process had set comes back.

    Products of float32 go through oneDNN where that rounds nothing (see `prepare_torch`): perplexity of the 135M model
    is the same to 1e-7 with and without.
    """
    before = torch.get_num_threads()
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    precision = getattr(matmul, "fp32_precision", None)
    prepare_torch(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if matmul is not None:
            matmul.fp32_precision = precision


def fast_dtype(device: torch.device) -> torch.dtype:
    """What linears of a forward pass multiply in here: bfloat16 if the processor does, which is several times as fast,
    otherwise float32. Sums are float32 in either case."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    known = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if device.type == "cpu" and known else torch.float32


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU's memory that can be had: free ones, and those that torch keeps for the next tensor."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + kept)


def give_back_beside(nbytes: int) -> None:
    """`give_back` beside a matrix so large that it takes no time against what is done with the matrix."""
    if nbytes >= 2 * _LARGE:
        give_back()


def give_back() -> None:
    """Returns freed memory to the system. What a layer's weights took lies in the heap in pieces between small objects
    that stay, and the next layer's do not fit there."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _keep_freed_memory() -> None:
    """Activations come and go by the megabyte, always of the same sizes. glibc would give such blocks back to the
    kernel and take them anew, page by page; kept in the heap they are faster, and leave fewer holes. Not the Hessian of
    a large model: where it was, something small would soon lie, and the next one need as much again."""
    with suppress(OSError, AttributeError):  # another C library
        c = ctypes.CDLL(None)
        c.mallopt(_M_ARENA_MAX, 1)
        c.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        c.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
