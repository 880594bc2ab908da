"""What a mix of bits is chosen by: measured once, resumed, used again for the same model and refused for any other,
within the memory that was said."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import warm
from mixed_models import build, manifest
from mixed_models import exl2_recipe as recipe
from safetensors.torch import load_file, save_file

import quantkit
from quantkit import api
from quantkit.errors import Interrupted, QuantkitError
from quantkit.measurement import Measurement, read_measurement
from quantkit.measuring import expected_losses
from quantkit.methods.exl2 import Exl2
from quantkit.recipe import build_recipe

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def made(exl2_folder: tuple[Path, Path]) -> tuple[Path, Path]:
    return exl2_folder


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


def test_more_bits_are_never_expected_to_lose_more(made: tuple[Path, Path]) -> None:
    _, out = made
    found = read_measurement(Path(str(out) + ".measurement.json"))
    curve = list(expected_losses(found, build_recipe({"source": "", "quantize": {"method": "exl2"}})).values())
    assert curve == sorted(curve, reverse=True)
    assert len(curve) >= 4
    assert Exl2().bits == 4


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


def alter(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[4 * 777 + 3] ^= 1
    file.write_bytes(raw)


def test_measuring_begins_anew_without_its_hidden_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or if those of a trial changed. What it measures until it is interrupted again is not taken for more layers than
    it was."""
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
            alter(hidden / "trial-2-1")
    stop = -1
    asked.clear()
    api.measure(source, tmp_path / "m.json", recipe(source))
    assert asked == [1, 2, 3]
    assert (tmp_path / "m.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_gradients_that_changed_are_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkit.calibration.trials import Trials

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    source = build(tmp_path / "source", num_hidden_layers=2)
    api.measure(source, tmp_path / "whole.json", recipe(source))
    with monkeypatch.context() as patch:
        patch.setattr(Trials, "layer", stop)
        with pytest.raises(Interrupted):
            api.measure(source, tmp_path / "m.json", recipe(source))
    file = tmp_path / "m.json.work" / ".quantkit" / "hidden" / "gradients.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:-3] + bytes([raw[-3] ^ 64]) + raw[-2:])
    api.measure(source, tmp_path / "m.json", recipe(source))
    assert (tmp_path / "m.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


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


def test_a_stale_measurement_beside_the_output_is_made_again(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = made
    beside = tmp_path / "out.measurement.json"
    shutil.copy(str(out) + ".measurement.json", beside)
    table = recipe(source)
    table["calibration"]["samples"] = 7
    quantkit.quantize(source, tmp_path / "out", table)
    assert read_measurement(beside).rows == 7


def test_a_measurement_of_another_model_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = made
    measured = Path(str(out) + ".measurement.json")
    other = build(tmp_path / "other", seed=1)
    with pytest.raises(QuantkitError, match="of another model, 'source': its weights are others"):
        quantkit.quantize(other, tmp_path / "out", recipe(other, measurement=str(measured)))
    taller = build(tmp_path / "taller", num_hidden_layers=3)
    with pytest.raises(QuantkitError, match=r"it knows nothing of model\.layers\.2"):
        quantkit.plan(taller, recipe(taller, measurement=str(measured)))
    table = read_measurement(measured).model_dump()
    table["linears"]["model.layers.0.mlp.up_proj"]["losses"]["4_32"] = -1.0
    impossible, digit = Measurement.model_validate(table).to_bytes(), measured.read_bytes().index(b"e-0")
    altered = measured.read_bytes()[:digit] + b"e-1" + measured.read_bytes()[digit + 3 :]
    for raw, words in (
        (b"{}", "format: field required"), (b"[]", "used: input should be"), (b"[", "no JSON"), (b"\xff", "no JSON"),
        (impossible, "a loss is"), (altered, "it was altered since it was written"),
    ):  # fmt: skip
        (tmp_path / "bad.json").write_bytes(raw)
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
