"""Mixed bits end to end on small models: allocated, written as EXL2, verified, read by a slow twin, refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from mixed_models import TEXT, build, manifest
from mixed_models import exl2_recipe as recipe
from oracle import exl2 as oracle
from safetensors.torch import load_file, save_file

import quantkit
from quantkit import api
from quantkit.errors import NotFiniteError, QuantkitError
from quantkit.layouts import open_checkpoint
from quantkit.restored import RestoredWeights, open_files

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def made(exl2_folder: tuple[Path, Path]) -> tuple[Path, Path]:
    return exl2_folder


def test_what_is_written_is_sound_and_within_its_bits(made: tuple[Path, Path]) -> None:
    source, out = made
    found = quantkit.verify(out, source=str(source))
    assert not found.problems
    assert found.quantized == 14
    facts = manifest(out)
    tensors = load_file(out / "model.safetensors")
    linears = [row for row in facts["tensors"] if row["quantized"]]
    weights = sum(int(np.prod(row["shape"])) for row in linears)
    own = sum(x.nbytes for name, x in tensors.items() if ".q_" in name and not name.endswith("norm.weight"))
    assert 8 * own / weights <= 4.5
    assert facts["allocation"]["bits"] == pytest.approx(8 * own / weights, abs=1e-4)
    assert facts["allocation"]["bound"] == facts["allocation"]["expected_kl"] > 0
    assert set(facts["recipe"]["quantize"]["mixes"]) == {row["name"].removesuffix(".weight") for row in linears}
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "exl2", "version": "0.3.2", "bits": 4.5, "head_bits": 16}
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_all_else_is_fp16(made: tuple[Path, Path]) -> None:
    source, out = made
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    for name, x in after.items():
        if ".q_" not in name or name.endswith("norm.weight"):
            assert torch.equal(x, before[name].half()), name


def test_a_slow_reader_restores_the_same(made: tuple[Path, Path]) -> None:
    _, out = made
    tensors = load_file(out / "model.safetensors")
    checkpoint = open_checkpoint(out)
    with open_files(checkpoint) as files:
        restored = RestoredWeights(checkpoint, files)
        for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj"):
            own = {key.rpartition(".")[2]: x.numpy() for key, x in tensors.items() if key.startswith(f"{name}.")}
            assert np.array_equal(oracle.decode(own), restored.read(f"{name}.weight").numpy())


def test_it_predicts_like_its_parent_and_better_with_more_bits(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = made
    (tmp_path / "text.txt").write_text(TEXT[::-1])
    measured = str(out) + ".measurement.json"
    divergence = []
    for bits in (3.6, 4.5, 6.5):
        folder = tmp_path / str(bits)
        quantkit.quantize(source, folder, recipe(source, bits, measurement=measured))
        found = api.evaluate(folder, str(tmp_path / "text.txt"), against=str(source), windows=4, length=64)
        assert found.against is not None
        divergence.append(found.against.kl)
        expected = manifest(folder)["allocation"]["expected_kl"]
        assert expected / 4 < found.against.kl < 4 * expected
    assert divergence[0] > 2 * divergence[1] > 4 * divergence[2]


def test_passes_over_the_source_are_said(made: tuple[Path, Path]) -> None:
    source, out = made
    measured = f"{out}.measurement.json"
    assert quantkit.plan(source, recipe(source, measurement=measured)).passes == 2
    assert quantkit.plan(source, recipe(source)).passes == 2 + 5
    mixture = recipe(source)
    mixture["quantize"] = {"method": "bnb", "bits": 8.5}
    assert quantkit.plan(source, mixture).passes == 1 + 5


def test_the_plan_says_what_is_written(made: tuple[Path, Path]) -> None:
    source, out = made
    table = recipe(source, measurement=str(out) + ".measurement.json")
    plan = quantkit.plan(source, table)
    assert {f.name: f.nbytes for f in plan.files} == {p.name: p.stat().st_size for p in out.iterdir()}
    assert not any("not measured" in w for w in plan.warnings)
    unknown = quantkit.plan(source, recipe(source))
    assert any("not measured" in w for w in unknown.warnings)
    assert unknown.bits_per_weight is not None
    assert unknown.bits_per_weight <= 4.5


def test_the_command_on_the_card_makes_it_again(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = made
    card = (out / "README.md").read_text()
    line = next(line for line in card.split("\n") if line.startswith("quantkit ") and "OUT" in line)
    shutil.copytree(source, tmp_path / "source")
    (written,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(written.replace("calib.txt", "source/calib.txt"))
    words = line.replace("-o OUT", "-o again").split()
    assert warm.run([*words[1:], "--quiet"], cwd=tmp_path, torch=True).returncode == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    said = ("exllamav2", "Expected KL divergence from the parent: ", "Measured on `calib.txt`", "Other tensors | fp16")
    for word in (*said, "`mlp.down_proj`"):
        assert word in card
    assert str(source.parent) not in card


def test_mixes_that_are_given_and_bounds(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = made
    measured = str(out) + ".measurement.json"
    mixes = {"mlp.down_proj": "8_128", "layers.0.mlp.down_proj": "0.1:6_32/0.9:5_32"}
    quantkit.quantize(source, tmp_path / "out", recipe(source, 5, measurement=measured, mixes=mixes, max_bits=6.8))
    assert not quantkit.verify(tmp_path / "out").problems
    found = manifest(tmp_path / "out")["recipe"]["quantize"]["mixes"]
    assert found["model.layers.1.mlp.down_proj"] == "8_128"
    assert found["model.layers.0.mlp.down_proj"] == "0.1:6_32/0.9:5_32"
    assert "8_128" not in {mix for name, mix in found.items() if "down_proj" not in name}


@pytest.mark.parametrize("kind", ["mixtral", "gpt2"])
def test_other_architectures(tmp_path: Path, kind: str) -> None:
    source = build(tmp_path / "source", kind)
    quantkit.quantize(source, tmp_path / "out", recipe(source, 5))
    assert not quantkit.verify(tmp_path / "out", source=str(source)).problems
    facts = manifest(tmp_path / "out")
    assert facts["result"]["loader"] == ("exllamav2" if kind == "mixtral" else "none")
    (tmp_path / "text.txt").write_text(TEXT[::-1])
    found = api.evaluate(tmp_path / "out", str(tmp_path / "text.txt"), against=str(source), windows=2, length=64)
    assert found.against is not None
    assert found.against.kl < 1


def test_pruned_too(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = made
    quantkit.quantize(source, tmp_path / "out", {**recipe(source), "prune": {"pattern": "2:4"}})
    found = quantkit.verify(tmp_path / "out", source=str(source))
    assert not found.problems
    assert found.pruned is not None
    assert found.pruned.zeros >= found.pruned.weights / 2
    assert "Without what pruning costs, the expected KL divergence" in (tmp_path / "out" / "README.md").read_text()


def test_what_32_does_not_divide_stays_dense(tmp_path: Path) -> None:
    source = build(tmp_path / "source", intermediate_size=144)
    plan = quantkit.plan(source, recipe(source, 5))
    assert any("144 inputs, which 32 does not divide" in w for w in plan.warnings)
    quantkit.quantize(source, tmp_path / "out", recipe(source, 5))
    assert not quantkit.verify(tmp_path / "out", source=str(source)).problems


def test_damage_is_found(made: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = made
    for name, place in (("q_invperm", 0), ("q_groups", 1), ("q_scale_max", 0)):
        folder = shutil.copytree(out, tmp_path / name)
        tensors = load_file(folder / "model.safetensors")
        key = f"model.layers.0.mlp.up_proj.{name}"
        tensors[key][place] = tensors[key][place] + 1 if name != "q_scale_max" else -1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        problems = quantkit.verify(folder).problems
        assert any("does not decode" in p for p in problems), problems


@pytest.mark.parametrize(("change", "words"), [
    ({"bits": 1.5}, "1.5 bits per weight are too few: these linears take 3"),
    ({"bits": 9}, "quantize.bits: input should be less than or equal to 8"),
    ({"bits": 0}, "quantize.bits: input should be greater than 0"),
    ({"bits": "four"}, "quantize.bits"),
    ({"mixes": {"mlp.down_proj": "7_64"}}, "'7_64' is no part of a mix of bits"),
    ({"mixes": {"nothing": "4_64"}}, "matches no tensor"),
    ({"min_bits": 6, "max_bits": 5.9}, "above max_bits"),
    ({"bits": 4, "max_bits": 3}, "no linear may have more than 3"),
    ({"bits": 3, "min_bits": 4}, "too few"),
    ({"measurement": "nowhere.json"}, "cannot be read"),
    ({"group_size": 64}, "does not apply to exl2"),
])  # fmt: skip
def test_refused(made: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], words: str) -> None:
    source, _ = made
    with pytest.raises(QuantkitError, match=words) as error:
        quantkit.quantize(source, tmp_path / "out", recipe(source, **{"bits": 4.5, **change}))
    assert error.value.exit_code == 2
    assert error.value.hint
    assert not list(tmp_path.iterdir())


def test_an_occupied_output_is_refused_before_anything_is_measured(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = made
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("Dear")
    with pytest.raises(QuantkitError, match="is not empty"):
        quantkit.quantize(source, tmp_path / "out", recipe(source))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_value_that_is_not_finite(tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFiniteError, match=r"down_proj.weight' holds a NaN or an infinity at \[3, 4\]"):
        quantkit.quantize(source, tmp_path / "out", recipe(source))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
    quantkit.quantize(source, tmp_path / "out", {**recipe(source), "allow_nonfinite": True})
    assert not quantkit.verify(tmp_path / "out").problems


def test_what_fp16_cannot_hold(tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFiniteError, match=r"'model.norm.weight' holds a number at \[3\] that fp16 cannot"):
        quantkit.quantize(source, tmp_path / "out", recipe(source))
    assert not (tmp_path / "out").exists()
