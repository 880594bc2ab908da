"""What was written is compared with what is on disk when that is hashed: a byte that somebody, a disk or a network
changed meanwhile never gets into a finished folder; whoever wrote it writes it anew."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import warm
from conftest import make_tiny
from eval_models import text_of
from resuming import OPTIONS, assert_three_lines, at, digests, lines, make_source

import quantkit
from quantkit.checkpoint.writer import ShardWriter
from quantkit.errors import Interrupted, QuantkitError
from quantkit.parts import shares
from quantkit.plans import Plan

ALTERED = "is not on disk as it was written"
LINEAR = "model.layers.0.self_attn.q_proj.weight"


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as f:
        f.seek(offset)
        (byte,) = f.read(1)
        f.seek(offset)
        f.write(bytes([byte ^ 1]))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("altered") / "source")


@pytest.fixture(scope="module")
def plan(source: Path) -> Plan:
    return quantkit.plan(source, {"shard_size": "12MB"})


@pytest.fixture(scope="module")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("reference") / "out"
    assert quantize(source, out) == (0, "")
    return digests(out)


def quantize(source: Path, out: Path, *options: str) -> tuple[int, str]:
    done = warm.run(["quantize", str(source), "-o", str(out), *OPTIONS, *options])
    return done.returncode, done.stderr


def killed(source: Path, out: Path) -> None:
    """A run that is half done."""
    process = warm.start(["quantize", str(source), "-o", str(out), *OPTIONS])
    at(process, out, lines(20), signal.SIGKILL)
    process.communicate(timeout=60)


def finish(out: Path) -> tuple[int, str]:
    done = warm.run(["finish", str(out), "--quiet"])
    return done.returncode, done.stderr


@pytest.mark.parametrize("output", [0, 1, -1], ids=["codes", "absmax", "the last companion"])
def test_a_byte_that_changed_before_a_run_was_taken_up(
    output: int, source: Path, plan: Plan, reference: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killed(source, out)
    tensor = next(u for u in plan.units if u.name == LINEAR).outputs[output]
    flip(out / f"{tensor.file}.partial", tensor.offset + tensor.nbytes // 2)
    code, stderr = quantize(source, out)
    assert code == 1
    assert_three_lines(stderr, f"tensor '{tensor.name}' {ALTERED}", tensor.file, "run the same command again")
    assert not (out / "config.json").exists()
    assert quantize(source, out) == (0, "")
    assert digests(out) == reference


def test_a_header_that_changed_is_written_anew(
    source: Path, plan: Plan, reference: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    killed(source, out)
    flip(out / f"{plan.shards[0].name}.partial", 20)
    assert quantize(source, out) == (0, "")
    assert digests(out) == reference


@pytest.fixture
def parts(source: Path, tmp_path: Path) -> Path:
    """A folder whose three parts are done."""
    for n in (1, 2, 3):
        assert quantize(source, tmp_path / "out", "--part", f"{n}/3") == (0, "")
    return tmp_path / "out"


def shared(plan: Plan) -> str:
    """A weight file that no part of three has whole."""
    whole = frozenset[str]().union(*(share.shards for share in shares(plan, 3)))
    return next(shard.name for shard in plan.shards if shard.name not in whole)


def test_a_byte_that_changed_after_a_part_was_done(
    parts: Path, source: Path, plan: Plan, reference: dict[str, str]
) -> None:
    tensors = [t for u in plan.units for t in u.outputs if t.file == shared(plan)]
    owners = {t.name: n for n, share in enumerate(shares(plan, 3), 1) for u in share.units for t in u.outputs}
    assert len({owners[t.name] for t in tensors}) > 1
    for tensor in (tensors[0], tensors[-1]):
        part = f"{owners[tensor.name]}/3"
        flip(parts / f"{tensor.file}.partial", tensor.offset)
        code, stderr = finish(parts)
        assert code == 1
        assert_three_lines(stderr, f"tensor '{tensor.name}' {ALTERED}", tensor.file, f"run part {part} again")
        code, stderr = finish(parts)
        assert code == 2
        assert_three_lines(stderr, f"part {part} is not finished")
        assert not (parts / "config.json").exists()
        assert quantize(source, parts, "--part", part) == (0, "")
    assert finish(parts) == (0, "")
    assert digests(parts) == reference


def test_a_header_that_changed_after_parts_were_done(parts: Path, plan: Plan) -> None:
    flip(parts / f"{shared(plan)}.partial", 20)
    for _ in range(2):
        code, stderr = finish(parts)
        assert code == 1
        assert_three_lines(stderr, f"the header {ALTERED}", shared(plan), "delete the folder")
    assert not (parts / "config.json").exists()


@pytest.mark.parametrize("which", ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_layer_that_was_solved_is_solved_again(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text(text_of(3000))
    recipe: dict[str, Any] = {
        "quantize": {"method": "gptq", "bits": 4, "group_size": 32},
        "calibration": {"text": str(text), "samples": 8, "length": 64}, "resources": {"threads": 1},
    }  # fmt: skip
    source = make_tiny("llama", tmp_path / "source")
    quantkit.quantize(str(source), tmp_path / "reference", recipe)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "commit", interrupt)
        with pytest.raises(Interrupted):
            quantkit.quantize(str(source), out, recipe)
    unit = next(u for u in quantkit.plan(str(source), recipe).units if u.name == which)
    flip(out / f"{unit.outputs[0].file}.partial", unit.outputs[0].offset)
    with pytest.raises(QuantkitError, match=ALTERED) as stop:
        quantkit.quantize(str(source), out, recipe)
    assert stop.value.exit_code == 1
    quantkit.quantize(str(source), out, recipe)
    assert digests(out) == digests(tmp_path / "reference")


def interrupt(_writer: ShardWriter) -> None:
    raise KeyboardInterrupt
