"""What processes of a team agree on before they begin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantkit.calibration.data import Tokens
from quantkit.checkpoint.system import cores
from quantkit.devices import own_gpu
from quantkit.layouts import Checkpoint
from quantkit.recipe import Recipe
from quantkit.version import __version__

if TYPE_CHECKING:
    from quantkit.solvers.team import Team


def signed(checkpoint: Checkpoint, tokens: Tokens | None, device: str, **more: Any) -> dict[str, Any]:
    """What must be the same for all processes of a team that compute there."""
    import torch

    from quantkit.torch_setup import fast_dtype

    return {
        "source": sorted((f.name, f.identity, f.stamp[:2]) for f in checkpoint.files),
        "text": None if tokens is None else tokens.sha256,
        "quantkit": __version__,
        "torch": torch.__version__,
        "dtype that linears multiply in": str(fast_dtype(torch.device(device))),
        "GPU": "" if device == "cpu" else torch.cuda.get_device_name(device),
        **more,
    }


def own_share(recipe: Recipe, team: Team) -> tuple[Recipe, Team]:
    """The recipe with as many threads as this machine has for each process of a team. On GPUs, each takes its own, and
    they are wired to each other."""
    import torch

    device = own_gpu(recipe.resources.device, team)
    if device != "cpu":
        team = team.wired(torch.device(device))
    threads = recipe.resources.threads or max(1, cores() // team.here)
    resources = recipe.resources.model_copy(update={"threads": threads, "device": device})
    return recipe.model_copy(update={"resources": resources}), team
