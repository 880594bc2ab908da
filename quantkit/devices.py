"""Where torch computes: whether it can there, and who takes which GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.console import human_bytes
from quantkit.errors import UsageError
from quantkit.memory import MemoryPlan

if TYPE_CHECKING:
    from quantkit.solvers.team import Team


def check_device(device: str) -> None:
    """UsageError if torch cannot compute there."""
    if device == "cpu":
        return
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):  # torch asserts that it was built for the device
        raise UsageError(
            f"no {device} device is usable here",
            where="--device",
            hint="use --device cpu, or cuda with a CUDA build of torch",
        ) from None


def check_gpu_memory(device: str, planned: MemoryPlan) -> None:
    """UsageError if a GPU has less free than is planned."""
    layers = planned.layers
    if device == "cpu" or layers is None:
        return
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    if layers.at_work > free:
        raise UsageError(
            f"this job needs {human_bytes(layers.at_work)} of GPU memory, and {human_bytes(free)} are free",
            where=f"--device {device}",
            hint="use a larger GPU, or shorter rows: --calib-length; or leave --device out",
        )


def own_gpu(device: str, team: Team) -> None:
    """Where `device` is whichever GPU there is, each process of a machine takes another."""
    if device == "cuda":
        import torch

        if count := torch.cuda.device_count():
            torch.cuda.set_device(team.local % count)
