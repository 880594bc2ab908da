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


def signed(checkpoint: Checkpoint, tokens: Tokens | None, **more: Any) -> dict[str, Any]:
    """What must be the same for all processes of a team."""
    import torch

    from quantkit.torch_setup import fast_dtype

    return {
        "source": sorted((f.name, f.identity, f.stamp[:2]) for f in checkpoint.files),
        "text": None if tokens is None else tokens.sha256,
        "quantkit": __version__,
        "torch": torch.__version__,
        "dtype that linears multiply in": str(fast_dtype(torch.device("cpu"))),
        **more,
    }


def own_share(recipe: Recipe, team: Team) -> tuple[Recipe, Team]:
    """The recipe with as many threads as this machine has for each process of a team. On GPUs, each takes its own, and
    they are wired to each other."""
    own_gpu(recipe.resources.device, team)
    if recipe.resources.device != "cpu":
        team = team.wired()
    if recipe.resources.threads is not None:
        return recipe, team
    resources = recipe.resources.model_copy(update={"threads": max(1, cores() // team.here)})
    return recipe.model_copy(update={"resources": resources}), team
