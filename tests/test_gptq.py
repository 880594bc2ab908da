"""The calibrated methods, end to end on small models: written, verified, restored, resumed, refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from eval_models import KINDS
from eval_models import build as build_model
from resuming import interrupted
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.errors import QuantkitError, RunError, SourceError
from quantkit.layer_runner import LayerRun

pytestmark = pytest.mark.usefixtures("quiet")
TEXT = " ".join(f"{a} {b} of the {c}." for a in ("red", "old", "far") for b in "abcdefgh" for c in range(60))


def build(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """A small model, and a text to calibrate on beside it."""
    build_model(folder, kind, **changes)
    (folder / "calib.txt").write_text(TEXT)
    return folder


def recipe(source: Path, *, bits: int = 4, samples: int = 8, length: int = 64, **quantize: Any) -> dict[str, Any]:
    quantize = {"method": "gptq", "bits": bits, "group_size": 32, **quantize}
    if quantize["method"] != "gptq":
        return {"quantize": quantize}
    return {
        "quantize": quantize,
        "resources": {"threads": 1},
        "calibration": {"text": str(source / "calib.txt"), "samples": samples, "length": length},
    }


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "quantkit.json").read_text())
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(tmp_path: Path, kind: str) -> None:
    source = build(tmp_path / "source", kind)
    quantkit.quantize(str(source), tmp_path / "out", recipe(source))
    found = quantkit.verify(tmp_path / "out", source=str(source))
    assert not found.problems
    assert found.quantized == len(found.errors) > 0
    rounded = tmp_path / "rtn"
    quantkit.quantize(str(source), rounded, recipe(source, method="rtn"))
    assert not quantkit.verify(rounded, source=str(source)).problems
    text = str(source / "calib.txt")
    ours = quantkit.evaluate(tmp_path / "out", text, against=str(source), windows=6, length=64).against
    theirs = quantkit.evaluate(rounded, text, against=str(source), windows=6, length=64).against
    assert ours is not None
    assert theirs is not None
    assert ours.kl < theirs.kl


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("options", [
    {}, {"sym": False}, {"act_order": "group"}, {"act_order": "none", "group_size": -1},
    {"checkpoint_format": "gptq_v2"},
    {"format": "compressed-tensors", "sym": False}, {"effort": "low"}, {"effort": "high", "group_size": 64},
])  # fmt: skip
def test_every_option_verifies(tmp_path: Path, bits: int, options: dict[str, Any]) -> None:
    source = build(tmp_path / "source", num_hidden_layers=1)
    plan = quantkit.plan(str(source), recipe(source, bits=bits, **options))
    quantkit.quantize(str(source), tmp_path / "out", recipe(source, bits=bits, **options))
    sizes = {f.name: f.nbytes for f in plan.files}
    assert {p.name: p.stat().st_size for p in (tmp_path / "out").iterdir()} == sizes
    assert not quantkit.verify(tmp_path / "out", source=str(source)).problems


def test_the_same_bytes_whatever_memory_and_threads(tmp_path: Path) -> None:
    source = build(tmp_path / "source", hidden_size=192, intermediate_size=768)  # enough for sums to be shared out
    outs = []
    for name, resources in {"a": {}, "b": {"max_memory": "2GB"}, "c": {"threads": 1}, "d": {"threads": 3}}.items():
        quantkit.quantize(str(source), tmp_path / name, {**recipe(source), "resources": resources})
        outs.append((tmp_path / name / "model.safetensors").read_bytes())
    assert outs[0] == outs[1] == outs[2] == outs[3]


def test_a_value_that_is_not_finite_is_found_before_the_first_layer_is_solved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = build(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with monkeypatch.context() as patch:
        patch.setattr("quantkit.calibration.stream.Stream.layer", None)
        with pytest.raises(SourceError, match=r"down_proj.weight' holds a NaN or an infinity at \[3, 4\]"):
            quantkit.quantize(str(source), tmp_path / "out", recipe(source))
    assert not (tmp_path / "out").exists()
    again = {**recipe(source), "allow_nonfinite": True}
    assert quantkit.quantize(str(source), tmp_path / "out", again).units


def test_doubts_about_the_text(tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    (source / "calib.txt").write_text("the same" * 4000)
    warnings = quantkit.plan(str(source), recipe(source)).warnings
    assert any("repeat others" in w for w in warnings)
    assert any("7 different tokens" in w for w in warnings)


def test_what_is_not_solved_is_copied(tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    table = recipe(source)
    table["quantize"]["skip"] = ["mlp.down_proj"]
    quantkit.quantize(str(source), tmp_path / "out", table)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    kept = [name for name in before if name in after]
    assert any("down_proj" in name for name in kept)
    assert all(torch.equal(before[name], after[name]) for name in kept)
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert block == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert all("down_proj" in pattern for pattern in block["dynamic"])
    assert [["mlp.down_proj"]] not in [block["modules_in_block_to_quantize"]]


@pytest.mark.slow
def test_killed_in_a_layer(tmp_path: Path) -> None:
    _kill(tmp_path, times=8)


def test_killed_once(tmp_path: Path) -> None:
    _kill(tmp_path, times=1)


def _kill(tmp_path: Path, times: int) -> None:
    source = build(tmp_path / "source", num_hidden_layers=6)
    table = recipe(source, samples=40)
    quantkit.quantize(str(source), tmp_path / "whole", table)
    wanted = (tmp_path / "whole" / "model.safetensors").read_bytes()
    command = [
        "quantize", str(source), "-o", str(tmp_path / "out"), "--quiet", "--method", "gptq", "--group-size", "32",
        "--calib", str(source / "calib.txt"), "--calib-samples", "40", "--calib-length", "64",
    ]  # fmt: skip
    journal = tmp_path / "out" / ".quantkit" / "journal"
    for n in range(times):
        process = warm.start(command, torch=True)
        while process.poll() is None:  # until so many tensors of the layers are journalled
            done = journal.read_text().count("self_attn") if journal.exists() else 0
            if done >= 3 + 3 * n:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        process.wait()
    assert warm.run(command, torch=True).returncode == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted
    assert not (tmp_path / "out" / ".quantkit").exists()


@pytest.mark.parametrize("lost", ["", "all", "a part"])
def test_interrupted_in_a_later_layer(tmp_path: Path, lost: str) -> None:
    """Finished layers are kept; all are solved again if the hidden states behind them are gone. The bytes are the same
    in any case."""
    source = build(tmp_path / "source", num_hidden_layers=4)
    quantkit.quantize(str(source), tmp_path / "whole", recipe(source))

    groups: list[tuple[str, ...]] = []
    stop_after = 10  # of the 16 groups: within the third layer

    def note(self: LayerRun, group: tuple[str, ...], *arguments: Any) -> Any:
        if len(groups) == stop_after:
            raise KeyboardInterrupt
        groups.append(group)
        return solve(self, group, *arguments)

    solve = LayerRun._solve
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerRun, "_solve", note)
        with pytest.raises(QuantkitError, match="interrupted"):
            quantkit.quantize(str(source), tmp_path / "out", recipe(source))
        hidden = tmp_path / "out" / ".quantkit" / "hidden"
        if lost == "all":
            shutil.rmtree(hidden)
        elif lost:
            os.truncate(hidden / "quantized-0", (hidden / "quantized-0").stat().st_size // 2)
        groups, stop_after = [], -1
        quantkit.quantize(str(source), tmp_path / "out", recipe(source))
    assert len(groups) == (16 if lost else 8)
    assert all(".0." in group[0] or ".1." in group[0] for group in groups[:8]) == bool(lost)
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert same[0] == same[1]


def test_a_linear_that_nothing_calls(tmp_path: Path) -> None:
    """Its inputs are not known: it is rounded, and that is said."""
    source = build(tmp_path / "source", num_hidden_layers=1)
    from transformers.models.llama.modeling_llama import LlamaMLP

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x))))
        quantkit.quantize(str(source), tmp_path / "out", recipe(source))
    rows = {r["name"]: r for r in manifest(tmp_path / "out")["tensors"] if r["quantized"]}
    assert [name for name, row in rows.items() if row["fallback"]] == ["model.layers.0.mlp.up_proj.weight"]
    assert rows["model.layers.0.mlp.up_proj.weight"]["output_error"] is None
    assert "n/a %" in (tmp_path / "out" / "README.md").read_text()
    assert not quantkit.verify(tmp_path / "out", source=str(source)).problems


def poison(source: Path, letters: str) -> None:
    """The first norm overflows where these letters stand: no others use the channel that it makes too large."""
    weights = load_file(source / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] = 0
    for letter in letters:
        weights["model.embed_tokens.weight"][ord(letter), 0] = 1
    weights["model.layers.0.input_layernorm.weight"][0] = 3e38
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("samples", [1, 2])
def test_a_few_rows_are_enough_to_judge_a_step_by(tmp_path: Path, samples: int) -> None:
    """One of two is held out; of a single one none can be, which is said."""
    source, made = build(tmp_path / "source", num_hidden_layers=1), {}
    for effort in ("low", "default"):
        table = recipe(source, samples=samples, length=120, effort=effort)
        said = [w for w in quantkit.plan(str(source), table).warnings if "single calibration row" in w]
        assert len(said) == (samples == 1 and effort == "default")
        quantkit.quantize(str(source), tmp_path / effort, table)
        made[effort] = (tmp_path / effort / "model.safetensors").read_bytes()
    assert (made["low"] == made["default"]) == (samples == 1)
    assert manifest(tmp_path / "low")["calibration"]["compute"] in ("bfloat16", "float32")


def test_rows_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    (source / "calib.txt").write_text(TEXT[:320] + "~" + TEXT[:2000])
    poison(source, "~")
    quantkit.quantize(str(source), tmp_path / "out", recipe(source, samples=20))
    assert manifest(tmp_path / "out")["calibration"]["excluded"] == 1
    assert not quantkit.verify(tmp_path / "out", source=str(source)).problems


def test_taken_up_with_a_row_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What lies in its place is of another layer, or nothing: it is no row that the next one needs."""
    source = build(tmp_path / "source", "mixtral", num_hidden_layers=3)
    (source / "calib.txt").write_text(TEXT[:320] + "~" + TEXT[:2000])
    poison(source, "~")
    table = recipe(source, samples=20)
    quantkit.quantize(str(source), tmp_path / "whole", table)
    assert manifest(tmp_path / "whole")["calibration"]["excluded"] == 1
    interrupted(lambda: quantkit.quantize(str(source), tmp_path / "out", table), 2)
    capsys.readouterr()
    quantkit.quantize(str(source), tmp_path / "out", table)
    assert "again" not in capsys.readouterr().err
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert same[0] == same[1]


def test_too_many_rows_that_are_not_finite(tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    poison(source, "aeo")
    with pytest.raises(RunError, match="not finite in"):
        quantkit.quantize(str(source), tmp_path / "out", recipe(source))


def test_experts_with_few_tokens_fall_back(tmp_path: Path) -> None:
    source = build(tmp_path / "source", "mixtral", num_local_experts=8, num_experts_per_tok=1)
    quantkit.quantize(str(source), tmp_path / "out", recipe(source, samples=4))
    rows = [r for r in manifest(tmp_path / "out")["tensors"] if r["quantized"]]
    fallen = [r["name"] for r in rows if r["fallback"]]
    assert fallen
    assert all("experts" in name for name in fallen)
    assert all((row["output_error"] is None) == row["fallback"] for row in rows)
    assert manifest(tmp_path / "out")["calibration"]["fallbacks"] == len(fallen)
    assert f"{len(fallen):>15,d}" in (tmp_path / "out" / "README.md").read_text()


def test_shapes_that_no_reader_takes_stay_dense(tmp_path: Path) -> None:
    source = build(tmp_path / "source", intermediate_size=172)
    plan = quantkit.plan(str(source), recipe(source))
    assert any("left dense" in w and "172" in w for w in plan.warnings)
    quantkit.quantize(str(source), tmp_path / "out", recipe(source))
    assert not quantkit.verify(tmp_path / "out", source=str(source)).problems
    with pytest.raises(SourceError, match="nothing is left to quantize"):
        quantkit.plan(str(build(tmp_path / "odd", hidden_size=40, intermediate_size=172)), recipe(source))


def test_the_group_size_is_found(tmp_path: Path) -> None:
    source = build(tmp_path / "source")
    table = recipe(source)
    del table["quantize"]["group_size"]
    assert quantkit.plan(str(source), table).recipe.quantize.params.group_size == 64  # type: ignore[union-attr]


@pytest.mark.parametrize(("change", "words"), [
    ({"quantize": {"method": "bnb"}}, "looks at no text"),
    ({"quantize": {"method": "gptq", "bits": "5"}}, "no '5'-bit form"),
    ({"quantize": {"method": "gptq", "act_order": "group", "format": "compressed-tensors"}}, "g_idx"),
    ({"quantize": {"method": "gptq", "checkpoint_format": "gptq_v2", "format": "compressed-tensors"}}, "one version"),
    ({"quantize": {"method": "gptq", "group_size": 48}}, "group_size"),
    ({"quantize": {"method": "gptq", "quant_type": "nf4"}}, "does not apply"),
    ({"calibration": {"text": "nowhere.txt"}}, "nowhere.txt"),
    ({"calibration": {"samples": 100_000}}, "samples"),
    ({"calibration": {"length": 4096}}, "length"),
    ({"resources": {"max_memory": "100MB"}}, "too little"),
])  # fmt: skip
def test_what_cannot_be_done_is_said(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    source = build(tmp_path / "source", num_hidden_layers=1)
    table = recipe(source)
    for block, keys in change.items():
        table[block] = keys if block == "quantize" else {**table.get(block, {}), **keys}
    with pytest.raises(QuantkitError, match=words):
        quantkit.plan(str(source), table)
    assert not (tmp_path / "out").exists()


def test_an_empty_block_means_the_defaults(tmp_path: Path) -> None:
    source = build(tmp_path / "source", num_hidden_layers=1)
    plan = quantkit.plan(str(source), {"quantize": {"method": "gptq"}, "calibration": None})
    assert plan.tokens is not None
    assert "pydoc_data.topics" in plan.tokens.name


def test_no_path_of_the_machine_travels(tmp_path: Path) -> None:
    source = build(tmp_path / "source", num_hidden_layers=1)
    quantkit.quantize(str(source), tmp_path / "out", recipe(source))
    for name in ("quantkit.json", "README.md"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()
    assert "--calib calib.txt" in (tmp_path / "out" / "README.md").read_text()


LARGER = {
    "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4,
    "num_hidden_layers": 1,
}  # fmt: skip
EXPERTS = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "num_local_experts": 8}


@pytest.mark.parametrize(("kind", "sizes", "compiled"), [
    ("llama", LARGER, False), pytest.param("llama", LARGER, True, marks=pytest.mark.slow),
    pytest.param("mixtral", EXPERTS, False, marks=pytest.mark.slow),
])  # fmt: skip
def test_the_plan_keeps_its_memory(tmp_path: Path, kind: str, sizes: dict[str, int], compiled: bool) -> None:
    """Peak RSS of a run in a process of its own is below what the plan says: also with kernels compiled anew, and with
    experts, which get another number of tokens at each call."""
    source = build(tmp_path / "source", kind, **sizes)
    table = recipe(source, samples=16, length=128)
    del table["resources"]  # with all threads
    peak = quantkit.plan(str(source), table).memory.peak
    code = (
        "import sys, json, quantkit, pathlib; quantkit.quantize(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]));"
        "print(pathlib.Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")} if compiled else dict(os.environ)
    run = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "out"), json.dumps(table)],
        check=True, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert int(run.stdout.split()[-1]) * 1024 <= peak


def test_restored_as_the_format_says(tmp_path: Path) -> None:
    """Dequantized by hand from the written tensors, beside what `verify` and `eval` see."""
    from quantkit.layouts import open_checkpoint
    from quantkit.restored import RestoredWeights, open_files

    source = build(tmp_path / "source", num_hidden_layers=1)
    quantkit.quantize(str(source), tmp_path / "out", recipe(source, bits=3, sym=False, act_order="group"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"

    def stream(words: Any) -> list[int]:
        bits = "".join(format(int(w) & 0xFFFFFFFF, "032b")[::-1] for w in words)
        return [int(bits[i : i + 3][::-1], 2) for i in range(0, len(bits), 3)]

    codes = np.array([stream(column) for column in tensors[f"{name}.qweight"].T])
    zeros = np.array([stream(row) for row in tensors[f"{name}.qzeros"]]).T + 1
    scales = tensors[f"{name}.scales"].T.float().numpy()
    index = tensors[f"{name}.g_idx"].numpy()
    by_hand = scales[:, index] * (codes - zeros[:, index])
    checkpoint = open_checkpoint(tmp_path / "out")
    with open_files(checkpoint) as files:
        restored = RestoredWeights(checkpoint, files).read(f"{name}.weight").numpy()
    assert np.array_equal(restored, by_hand.astype(np.float32))
