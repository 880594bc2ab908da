"""Every recipe that we publish is valid, and can be planned on a small model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit.api import plan_recipe
from quantkit.recipe import load_recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
MODEL = {"smollm2": "llama", "bloomz": "bloom", "claire": "falcon"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_plans(path: Path, tiny: Callable[[str], Path]) -> None:
    recipe = load_recipe(path, options={"source": str(tiny(MODEL[path.stem.split("-")[0]]))})
    plan, _ = plan_recipe(recipe)
    assert recipe.output
    assert path.read_text().startswith("# ")
    assert 4.1 < plan.bits_per_weight < 8  # small layers carry their tables, 1.3 kB each
