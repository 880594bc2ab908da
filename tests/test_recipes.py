"""Every recipe that we publish is valid, and can be planned on a small model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from oracle.native_models import make_native

from quantkit.api import plan_recipe
from quantkit.recipe import load_recipe

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
MODEL = {"smollm2": "llama", "bloomz": "bloom", "claire": "falcon", "mistral": "mistral", "mixtral": "mixtral",
         "llama": "llama"}  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_plans(path: Path, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    native = "to-hf" in path.stem
    kind = "mistral" if "mistral-7b" in path.stem else MODEL[path.stem.split("-")[0]]
    source = make_native(tmp_path / "native") if native else tiny(kind)
    options: dict[str, Any] = {"source": str(source)}
    if "-to-" in path.stem:
        options["convert.tokenizer"] = False  # the small models have none of that kind
    if "calibration:" in path.read_text():  # rows that the small models can take
        options |= {"calibration.length": 32, "calibration.samples": 2}
    if "gptq" in path.stem:
        options["quantize.group_size"] = 32
    recipe = load_recipe(path, options=options)
    plan, _ = plan_recipe(recipe)
    assert recipe.output
    assert path.read_text().startswith("# ")
    if recipe.prune is not None:
        assert plan.pruned
        assert plan.streams
        assert (plan.bits_per_weight is not None) == ("gptq" in path.stem)
    elif plan.bits_per_weight is None:
        assert plan.layout == ("hf" if native else "mistral")
    elif "exl2" in path.stem:
        assert 3.5 < plan.bits_per_weight <= 4
    else:
        assert 4.1 < plan.bits_per_weight < 8  # small layers carry their tables, 1.3 kB each
