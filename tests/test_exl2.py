"""Mixed bits end to end on small models: measured, allocated, written as EXL2, verified, resumed, refused."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from eval_models import quiet_transformers
from mixed_models import TEXT, build, make, manifest
from mixed_models import recipe as recipe_of
from oracle import exl2 as oracle
from safetensors.torch import load_file, save_file

import quantkit
from quantkit import api
from quantkit.errors import Interrupted, NotFiniteError, QuantkitError
from quantkit.layouts import open_checkpoint
from quantkit.measurement import Measurement
from quantkit.measuring import expected_losses
from quantkit.methods.exl2 import Exl2
from quantkit.recipe import build_recipe
from quantkit.restored import RestoredWeights, open_files


def recipe(source: Path, bits: float = 4.5, **quantize: Any) -> dict[str, Any]:
    return recipe_of(source, "exl2", bits, **quantize)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet_transformers():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make(tmp_path_factory.mktemp("exl2"), "exl2", 4.5, halves=True)


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


def test_passes_over_the_source_are_said(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = made
    measured = f"{out}.measurement.json"
    assert quantkit.plan(source, recipe(source, measurement=measured)).passes == 2
    assert quantkit.plan(source, recipe(source)).passes == 2 + 5
    mixture = recipe(source)
    mixture["quantize"] = {"method": "bnb", "bits": 8.5}
    assert quantkit.plan(source, mixture).passes == 1 + 5


def test_the_plan_says_what_is_written(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = made
    table = recipe(source, measurement=str(out) + ".measurement.json")
    plan = quantkit.plan(source, table)
    assert {f.name: f.nbytes for f in plan.files} == {p.name: p.stat().st_size for p in out.iterdir()}
    assert not any("not measured" in w for w in plan.warnings)
    unknown = quantkit.plan(source, recipe(source))
    assert any("not measured" in w for w in unknown.warnings)
    assert unknown.bits_per_weight is not None
    assert unknown.bits_per_weight <= 4.5


def test_the_same_measurement_serves_again_and_makes_the_same(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = made
    measured = Path(str(out) + ".measurement.json")
    api.measure(source, tmp_path / "again.json", {**recipe(source), "resources": {"threads": 1}})
    assert (tmp_path / "again.json").read_bytes() == measured.read_bytes()
    quantkit.quantize(
        source, tmp_path / "a", {**recipe(source, measurement=str(measured)), "resources": {"threads": 1}}
    )
    (tmp_path / "recipe.yaml").write_text(manifest(out)["recipe_yaml"])
    from quantkit.recipe import load_recipe

    options = {"source": str(source), "output": str(tmp_path / "b"), "calibration.text": str(source / "calib.txt")}
    api.run_recipe(load_recipe(tmp_path / "recipe.yaml", options=options))
    for folder in ("a", "b"):
        assert (tmp_path / folder / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert not list(tmp_path.glob("*.work"))


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


@pytest.mark.slow
def test_interrupted_while_measuring(tmp_path: Path) -> None:
    source = build(tmp_path / "source", num_hidden_layers=4)
    table = recipe(source)
    api.measure(source, tmp_path / "whole.json", table)
    command = [
        "measure", str(source), "-o", str(tmp_path / "m.json"), "--quiet", "--calib", str(source / "calib.txt"),
        "--calib-samples", "8", "--calib-length", "64",
    ]  # fmt: skip
    journal = tmp_path / "m.json.work" / ".quantkit" / "journal"
    for lines in (1, 3):
        process = warm.start(command, torch=True)
        while process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") > lines:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        process.wait()
    assert warm.run(command, torch=True).returncode == 0
    assert (tmp_path / "m.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not (tmp_path / "m.json.work").exists()


def test_measuring_begins_anew_without_its_hidden_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what it measures until it is interrupted again is not taken for more layers than it was."""
    from quantkit.calibration.trials import Trials

    source = build(tmp_path / "source", num_hidden_layers=4)
    api.measure(source, tmp_path / "whole.json", recipe(source))
    real, asked = Trials.layer, []
    hidden = tmp_path / "m.json.work" / ".quantkit" / "hidden"

    def layer(self: Trials, index: int) -> None:
        if index == stop:
            raise KeyboardInterrupt
        asked.append(index)
        real(self, index)

    monkeypatch.setattr(Trials, "layer", layer)
    for stop, done in ((3, [0, 1, 2]), (1, [0])):
        asked.clear()
        with pytest.raises(Interrupted):
            api.measure(source, tmp_path / "m.json", recipe(source))
        assert asked == done
        if stop == 3:
            for file in hidden.glob("quantized-*"):
                file.unlink()
    stop = -1
    asked.clear()
    api.measure(source, tmp_path / "m.json", recipe(source))
    assert asked == [1, 2, 3]
    assert (tmp_path / "m.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


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


def test_a_measurement_of_another_model_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = made
    measured = Path(str(out) + ".measurement.json")
    other = build(tmp_path / "other", seed=1)
    with pytest.raises(QuantkitError, match="of another model, 'source': its weights are others"):
        quantkit.quantize(other, tmp_path / "out", recipe(other, measurement=str(measured)))
    taller = build(tmp_path / "taller", num_hidden_layers=3)
    with pytest.raises(QuantkitError, match=r"it knows nothing of model\.layers\.2"):
        quantkit.plan(taller, recipe(taller, measurement=str(measured)))
    table = json.loads(measured.read_text())
    table["linears"]["model.layers.0.mlp.up_proj"]["losses"]["4_32"] = -1.0
    for text, words in (("{}", "format: field required"), ("[", "it is no JSON"), (json.dumps(table), "a loss is")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(QuantkitError, match=words):
            quantkit.plan(source, recipe(source, measurement=str(tmp_path / "bad.json")))


def test_a_plan_refuses_a_measurement_of_other_weights(made: tuple[Path, Path], tmp_path: Path) -> None:
    """The weights are here: that they are others is said before the run."""
    source, out = made
    other = shutil.copytree(source, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 2
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    table = recipe(other, measurement=f"{out}.measurement.json")
    with pytest.raises(QuantkitError, match="of another model"):
        quantkit.plan(str(other), table)


def test_a_folder_of_another_method_is_refused_before_anything_is_measured(
    made: tuple[Path, Path], tmp_path: Path
) -> None:
    source, _ = made
    quantkit.quantize(source, tmp_path / "out", {"quantize": {"method": "bnb", "bits": 4}})
    with pytest.raises(QuantkitError, match="another plan"):
        quantkit.quantize(source, tmp_path / "out", recipe(source))
    assert not Path(f"{tmp_path / 'out'}.measurement.json").exists()


def test_measuring_again_is_finished_already_and_another_file_is_kept(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = made
    path = Path(shutil.copy(f"{out}.measurement.json", tmp_path / "m.json"))
    before = path.stat()
    api.measure(source, path, recipe(source))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    other = recipe(source)
    other["calibration"]["length"] = 32
    with pytest.raises(QuantkitError, match="is not what would be measured"):
        api.measure(source, path, other)
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def test_an_occupied_output_is_refused_before_anything_is_measured(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, _ = made
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("Dear")
    with pytest.raises(QuantkitError, match="is not empty"):
        quantkit.quantize(source, tmp_path / "out", recipe(source))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_stale_measurement_beside_the_output_is_made_again(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = made
    beside = tmp_path / "out.measurement.json"
    shutil.copy(str(out) + ".measurement.json", beside)
    table = recipe(source)
    table["calibration"]["samples"] = 7
    quantkit.quantize(source, tmp_path / "out", table)
    assert Measurement.model_validate_json(beside.read_text()).rows == 7


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


def test_more_bits_are_never_expected_to_lose_more(made: tuple[Path, Path]) -> None:
    _, out = made
    found = Measurement.model_validate_json(Path(str(out) + ".measurement.json").read_text())
    curve = list(expected_losses(found, build_recipe({"source": "", "quantize": {"method": "exl2"}})).values())
    assert curve == sorted(curve, reverse=True)
    assert len(curve) >= 4
    assert Exl2().bits == 4


@pytest.fixture(scope="module")
def with_head(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model whose head has a matrix of its own that EXL2 can hold, and a folder made of it."""
    work = tmp_path_factory.mktemp("head")
    with quiet_transformers():
        source = build(work / "source", vocab_size=320)
        quantkit.quantize(source, work / "out", recipe(source))
    return source, work / "out"


def read(folder: Path, name: str) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    with open_files(checkpoint) as files:
        return RestoredWeights(checkpoint, files).read(name).float()


def test_head_is_quantized_beside_the_budget(with_head: tuple[Path, Path]) -> None:
    source, out = with_head
    found = manifest(out)
    assert found["recipe"]["quantize"]["mixes"]["lm_head"] == "0.15:8_128/0.85:6_128"
    assert json.loads((out / "config.json").read_text())["quantization_config"]["head_bits"] == 6
    assert found["allocation"]["head"] > 6
    assert found["result"]["bits_per_weight"] <= 4.5
    assert not any("lm_head" in row["kind"] for row in found["allocation"]["rows"])
    assert quantkit.verify(out, source=source).problems == ()
    weight, ours = read(source, "lm_head.weight"), read(out, "lm_head.weight")
    assert 0 < float((weight - ours).norm() / weight.norm()) < 0.05


def test_head_is_solved_on_what_it_gets(with_head: tuple[Path, Path], tmp_path: Path) -> None:
    """The error in its own outputs is less than that of rounding to nearest, the inputs being those behind the norm of
    the quantized model; and its most active inputs have the most bits."""
    from transformers import AutoModelForCausalLM

    source, out = with_head
    mixes = manifest(out)["recipe"]["quantize"]["mixes"] | {"lm_head": "0.25:3_32/0.75:2_32"}
    quantkit.quantize(source, tmp_path / "out", recipe(source, mixes=mixes))
    dense = shutil.copytree(source, tmp_path / "dense", ignore=shutil.ignore_patterns("*.safetensors"))
    checkpoint = open_checkpoint(tmp_path / "out")
    with open_files(checkpoint) as files:
        weights = RestoredWeights(checkpoint, files)
        save_file({n: weights.read(n).float().contiguous() for n in weights.names}, dense / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    ids = torch.tensor(list((source / "calib.txt").read_bytes()[: 8 * 64])).reshape(8, 64)
    with torch.no_grad():
        inputs = model.model(ids).last_hidden_state.reshape(-1, 64)
    weight, ours = read(source, "lm_head.weight"), read(tmp_path / "out", "lm_head.weight")
    order = (inputs.double() ** 2).sum(0).argsort(descending=True)
    errors = (weight - ours).square().sum(0)[order]
    assert errors[:16].mean() < 0.5 * errors[16:].mean()


def test_head_is_left_dense_where_that_is_asked_for_or_cannot_be_otherwise(with_head: tuple[Path, Path]) -> None:
    source, _ = with_head
    for more in ({"head_bits": 16}, {"skip": ["lm_head"]}):
        plan = quantkit.plan(str(source), recipe(source, **more))
        assert not any(t.name == "lm_head.q_weight" for u in plan.units for t in u.outputs)
        assert plan.config["quantization_config"]["head_bits"] == 16


def test_head_with_other_outputs_is_warned_of(made: tuple[Path, Path]) -> None:
    source, _ = made
    assert any(
        "lm_head" in w and "32 does not divide" in w for w in quantkit.plan(str(source), recipe(source)).warnings
    )


def test_bits_for_a_head_that_is_the_embedding_are_said_to_change_nothing(tmp_path: Path) -> None:
    source = build(tmp_path / "tied", tie_word_embeddings=True)
    for asked, said in (({"head_bits": 6}, True), ({"head_bits": 16}, False), ({}, False)):
        warnings = quantkit.plan(str(source), recipe(source, **asked)).warnings
        assert any("head_bits 6 changes nothing" in w for w in warnings) == said


def test_bits_that_a_head_cannot_have_are_refused(made: tuple[Path, Path]) -> None:
    source, _ = made
    with pytest.raises(QuantkitError, match="head_bits"):
        quantkit.plan(str(source), recipe(source, head_bits=7))


def test_interrupted_at_the_head(with_head: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is solved already is kept, and the bytes are those of a run that was never interrupted."""
    from quantkit.calibration.stream import Stream

    source, out = with_head
    table = recipe(source, measurement=f"{out}.measurement.json")
    layers: list[int] = []
    with monkeypatch.context() as patch:

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(Stream, "head", stop)
        with pytest.raises(Interrupted):
            quantkit.quantize(source, tmp_path / "out", table)
    real = Stream.layer
    monkeypatch.setattr(Stream, "layer", lambda self, index, solve: (layers.append(index), real(self, index, solve)))
    quantkit.quantize(source, tmp_path / "out", table)
    assert layers == []
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_measuring_says_what_it_takes_and_keeps_to_it(tmp_path: Path) -> None:
    """In a process of its own, on a model whose head and layers count."""
    source = build(tmp_path / "source", vocab_size=8192, hidden_size=512, num_hidden_layers=1)
    options = ["--calib", str(source / "calib.txt"), "--calib-samples", "8", "--calib-length", "128"]
    command = [sys.executable, "-m", "quantkit", "measure", str(source), "-o", str(tmp_path / "m.json"), *options]
    script = (
        "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], capture_output=True, text=True); "
        "print(done.stderr, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(done.returncode)"
    )
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    stated = re.search(r"peak RAM ([\d.,]+) (MB|GB)", done.stdout)
    assert stated is not None
    planned = float(stated[1].replace(",", "")) * {"MB": 1e6, "GB": 1e9}[stated[2]]
    peak = int(done.stdout.split()[-1]) * 1024
    assert 0.3 * planned < peak <= planned
    (tmp_path / "m.json").unlink()
    refused = subprocess.run([*command, "--set", "resources.max_memory=300MB"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--max-memory" in refused.stderr
