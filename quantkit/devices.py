"""Where torch computes: whether it can there, who takes which GPU, and how much of it is free."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from quantkit.console import Console, human_bytes
from quantkit.errors import RunError, UsageError
from quantkit.memory import MARGIN

if TYPE_CHECKING:
    from quantkit.solvers.team import Team

# How torch, cuBLAS and Triton say that a GPU's memory is full, where they do not by torch's own exception.
FULL = ("CUDA error: out of memory", "CUDA_ERROR_OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED", "[CUDA]: out of memory")
FULL_RAM = "DefaultCPUAllocator: "


def check_device(device: str) -> None:
    """Makes it the one that libraries work on which are not told. UsageError if torch cannot compute there."""
    if device == "cpu":
        return
    import torch

    try:
        place = torch.device(device)
        if place.type == "cpu":  # with a number, which everything else would take for a GPU
            raise ValueError
        torch.empty(0, device=place)
        if place.type == "cuda" and place.index is not None:
            torch.cuda.set_device(place)
    except (RuntimeError, AssertionError, ValueError):  # torch asserts that it was built for the device
        raise UsageError(
            f"no {device} device is usable here",
            where="--device",
            hint="use --device cpu, or cuda with a CUDA build of torch",
        ) from None


def check_gpu_memory(device: str, needed: int) -> None:
    """UsageError if a GPU has less free than `needed` bytes of numbers, and what is lost beside. What an earlier job of
    this process has left for the garbage collector is free."""
    if device == "cpu" or not needed:
        return
    import torch

    from quantkit.torch_setup import free_memory

    gc.collect()
    free = free_memory(torch.device(device))
    if needed + MARGIN > free:
        raise UsageError(
            f"this job needs {human_bytes(needed + MARGIN)} of GPU memory, and {human_bytes(free)} are free",
            where=f"--device {device}",
            hint="use a larger GPU, or shorter rows of text, or leave --device out",
        )


def warn_if_slow(device: str, console: Console) -> None:
    """Says it beforehand, where columns of weights will be solved one by one."""
    if device == "cpu":
        return
    import torch

    from quantkit.kernels import columns_triton

    if (lacking := columns_triton.lacking(torch.device(device))) is not None:
        console.warn(f"{lacking}, so weights are solved column by column, many times as slowly")


def own_gpu(device: str, team: Team) -> str:
    """Where `device` is whichever GPU there is, each process of a machine takes another: which one. UsageError if all
    are told the same one."""
    if device.startswith("cuda:") and team.here > 1:
        error = UsageError(
            f"{team.here} processes would all take {device}", where="--device",
            hint="say --device cuda, and each takes its own",
        )  # fmt: skip
        error.said = not team.leads
        raise error
    if device != "cuda":
        return device
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{team.local % count}" if count else device


def out_of_memory(e: RuntimeError | MemoryError) -> RunError | None:
    """What a user is told, if that is what the error says."""
    again = "and run the same command again"
    if type(e).__name__ == "OutOfMemoryError" or any(words in str(e) for words in FULL):
        hint = f"end what else runs there, {again}"
        return RunError("the GPU's memory is full", where="--device", hint=hint)
    if isinstance(e, MemoryError) or FULL_RAM in str(e):
        return RunError("the memory is full", where="this machine's RAM", hint=f"end what else runs, {again}")
    return None
