"""GPTQ with linears of several widths, end to end on small models, and the plot of what each got."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mixed_models import make, manifest
from mixed_models import recipe as recipe_of

import quantkit
from quantkit import plots
from quantkit.errors import QuantkitError
from quantkit.layouts import open_checkpoint
from quantkit.methods import gptq_mixed
from quantkit.methods.base import WeightSpec
from quantkit.restored import RestoredWeights, open_files

pytestmark = pytest.mark.usefixtures("quiet")
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}


def recipe(source: Path, bits: float, **quantize: Any) -> dict[str, Any]:
    return recipe_of(source, "gptq", bits, **quantize)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make(tmp_path_factory.mktemp("mixed"), "gptq", 3.9, **SIZES)


def test_bits_are_within_the_budget_and_linears_computed_as_one_are_alike(made: tuple[Path, Path]) -> None:
    source, out = made
    found = manifest(out)
    mixes = found["recipe"]["quantize"]["mixes"]
    assert 3.5 < found["result"]["bits_per_weight"] <= 3.9
    assert len(set(mixes.values())) > 1
    for layer in range(2):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        assert len({mixes[f"{attention}.{x}_proj"] for x in "qkv"}) == 1
        assert mixes[f"{mlp}.gate_proj"] == mixes[f"{mlp}.up_proj"]
    verified = quantkit.verify(out, source=source)
    assert verified.problems == ()


def test_configuration_names_every_linear_that_is_not_as_most_are(made: tuple[Path, Path]) -> None:
    import re

    _, out = made
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    for module, mix in manifest(out)["recipe"]["quantize"]["mixes"].items():
        said = [v for k, v in block["dynamic"].items() if re.match(k.removeprefix("+:"), module)]
        own = {"bits": block["bits"], "group_size": block["group_size"], **(said[0] if said else {})}
        assert f"{own['bits']}_{own['group_size']}" == mix


def test_without_the_manifest_the_same_weights_are_read(made: tuple[Path, Path], tmp_path: Path) -> None:
    """As of somebody else's folder: widths and groups are what the tensors make them."""
    _, out = made
    bare = shutil.copytree(out, tmp_path / "bare")
    (bare / "quantkit.json").unlink()
    weights = []
    for folder in (out, bare):
        checkpoint = open_checkpoint(folder)
        with open_files(checkpoint) as files:
            restored = RestoredWeights(checkpoint, files)
            weights.append({name: restored.read(name).float().numpy() for name in restored.names})
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        np.testing.assert_array_equal(weight, weights[1][name])


def test_a_second_size_needs_no_measuring_and_loses_less(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = made
    measured = f"{out}.measurement.json"
    quantkit.quantize(source, tmp_path / "more", recipe(source, 5, measurement=measured))
    assert not Path(f"{tmp_path / 'more'}.measurement.json").exists()
    both = [manifest(folder)["allocation"]["expected_kl"] for folder in (out, tmp_path / "more")]
    assert both[1] < both[0]


def test_compressed_tensors_gets_a_scheme_for_each_form(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = made
    options = {"measurement": f"{out}.measurement.json", "format": "compressed-tensors"}
    quantkit.quantize(source, tmp_path / "out", recipe(source, 3.9, **options))
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    targets = [module for group in block["config_groups"].values() for module in group["targets"]]
    assert sorted(targets) == sorted(manifest(tmp_path / "out")["method"]["encoded"])
    assert quantkit.verify(tmp_path / "out", source=source).problems == ()


def test_whole_bits_that_gptq_has_are_the_same_for_all(made: tuple[Path, Path]) -> None:
    source, _ = made
    for bits in (4, 4.0):
        plan = quantkit.plan(str(source), recipe(source, bits))
        assert plan.allocation is None
    assert quantkit.plan(str(source), recipe(source, 4, max_bits=9.0)).allocation is not None


def test_importance_moves_bits_and_the_loss_stays_what_was_measured(made: tuple[Path, Path]) -> None:
    from quantkit.api import plan_recipe
    from quantkit.recipe import build_recipe

    source, out = made
    table = recipe(source, 3.9, measurement=f"{out}.measurement.json")

    def bits(**more: Any) -> tuple[float, Any]:
        table["quantize"] |= more
        plan, _ = plan_recipe(build_recipe({**table, "source": str(source)}), data_present=True)
        last = [u for u in plan.quantized if ".layers.1." in u.name]
        return sum(t.nbytes for u in last for t in u.outputs), plan.allocation

    before, best = bits()
    after, other = bits(importance={"layers.1": 30.0})
    assert after > before
    assert other.loss > best.loss
    assert other.bound == best.bound <= best.loss
    assert other.bits <= 3.9


ERRORS = [
    ({"importance": {"q_proj": 0.0}}, "factor"),
    ({"importance": {"nothing": 2.0}}, "matches no"),
    ({"mixes": {"q_proj": "5_64"}}, "no form of a linear"),
    ({"act_order": "group"}, "act_order group"),
    ({"mixes": {"q_proj": "4_32", "k_proj": "3_32"}}, "cannot be written alike"),
    ({"min_bits": 6, "max_bits": 5.9}, "above max_bits"),
    ({"bits": 1.5}, "too few"),
]


@pytest.mark.parametrize(("options", "words"), ERRORS, ids=[words for _, words in ERRORS])
def test_refused(made: tuple[Path, Path], options: dict[str, Any], words: str) -> None:
    source, _ = made
    with pytest.raises(QuantkitError, match=words):
        quantkit.plan(str(source), recipe(source, **{"bits": 3.9, **options}))


def test_measurement_for_another_method_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = made
    table = recipe_of(source, "exl2", 4.5, measurement=f"{out}.measurement.json")
    with pytest.raises(QuantkitError, match="was made for gptq"):
        quantkit.quantize(source, tmp_path / "out", table)


def test_every_linear_chooses_between_group_sizes_that_divide_it() -> None:
    options = gptq_mixed.METHOD.mixing.options  # type: ignore[union-attr]
    params = gptq_mixed.MixedGptq()
    assert options(params, WeightSpec("a", "F16", 64, 576))[:2] == ("2_64", "2_32")
    assert options(params, WeightSpec("a", "F16", 64, 96)) == ("2_32", "3_32", "4_32", "8_32")
    fixed = gptq_mixed.MixedGptq(group_size=128)
    assert options(fixed, WeightSpec("a", "F16", 64, 256)) == ("2_128", "3_128", "4_128", "8_128")


def test_plot_is_in_the_folder_and_on_the_card(made: tuple[Path, Path]) -> None:
    _, out = made
    raw = (out / plots.ALLOCATION).read_bytes()
    assert raw.startswith(b"\x89PNG\r\n")
    assert f"]({plots.ALLOCATION})" in (out / "README.md").read_text()


def test_same_numbers_make_the_same_plot() -> None:
    linears = [(layer, kind, 2.5 + layer, 10) for layer in range(3) for kind in ("a", "b")]
    one = plots.allocation_plot(linears)
    assert one == plots.allocation_plot(linears)
    assert one != plots.allocation_plot([(layer, kind, bits + 1, n) for layer, kind, bits, n in linears])
