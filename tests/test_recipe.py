"""Recipes: what a card prints is a recipe that runs, and makes the same plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from quantkit import api
from quantkit.recipe import load_recipe


def test_the_recipe_of_a_folder_makes_it_again(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny("llama")
    settings = {"quantize": {"bits": 4, "quant_type": "fp4", "skip": ["layers.0"]}, "card": {"quantized_by": "me"}}
    api.quantize(str(source), tmp_path / "out", settings)
    manifest = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    (tmp_path / "recipe.yaml").write_text(manifest["recipe_yaml"])
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.source == source.name
    again, _ = api.plan_recipe(load_recipe(tmp_path / "recipe.yaml", options={"source": str(source)}))
    assert again.hash == manifest["plan_hash"]
