"""What was written is compared with what is on disk when that is hashed: a byte that somebody, a disk or a network
changed meanwhile never gets into a finished folder; whoever wrote it writes it anew."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import warm
from conftest import make_tiny
from eval_models import text_of
from resuming import OPTIONS, assert_three_lines, at, digests, flip, interrupted, lines, make_source

import quantkit
from quantkit import runner
from quantkit.checkpoint.header import strict_json
from quantkit.checkpoint.journal import Journal
from quantkit.errors import Interrupted, OutputError, QuantkitError
from quantkit.layer_runner import Written
from quantkit.part_folder import read_job
from quantkit.parts import shares
from quantkit.plans import Plan

ALTERED = "is not on disk as it was written"
LINEAR = "model.layers.0.self_attn.q_proj.weight"


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


def test_a_header_that_changed_after_parts_were_done(parts: Path, plan: Plan, reference: dict[str, str]) -> None:
    """It is known beforehand, and so written anew."""
    flip(parts / f"{shared(plan)}.partial", 20)
    assert finish(parts) == (0, "")
    assert digests(parts) == reference


def test_several_that_changed_are_found_at_once(
    parts: Path, source: Path, plan: Plan, reference: dict[str, str]
) -> None:
    tensors = [t for u in plan.units for t in u.outputs if t.file == shared(plan)]
    for tensor in (tensors[0], tensors[1], tensors[-1]):
        flip(parts / f"{tensor.file}.partial", tensor.offset)
    code, stderr = finish(parts)
    assert code == 1
    owners = [
        n
        for n, share in enumerate(shares(plan, 3), 1)
        if shared(plan) in {t.file for u in share.units for t in u.outputs}
    ]
    assert len(owners) > 1
    again = ", ".join(f"{n}/3" for n in owners)
    assert_three_lines(stderr, f"tensor '{tensors[0].name}' and 2 more", f"run part {again} again")
    for n in owners:
        assert quantize(source, parts, "--part", f"{n}/3") == (0, "")
    assert finish(parts) == (0, "")
    assert digests(parts) == reference


def test_a_byte_that_changed_in_a_file_of_one_part(
    source: Path, plan: Plan, reference: dict[str, str], tmp_path: Path
) -> None:
    out, share = tmp_path / "out", shares(plan, 3)[0]
    name = next(s.name for s in plan.shards if s.name in share.shards)
    tensor = next(t for u in share.units for t in u.outputs if t.file == name)
    process = warm.start(["quantize", str(source), "-o", str(out), *OPTIONS, "--part", "1/3"])
    journal = out / ".quantkit" / "part-1-of-3"
    at(process, out, lambda _: journal.exists() and journal.read_bytes().count(b"\n") > 8, signal.SIGKILL)
    process.communicate(timeout=60)
    flip(out / f"{name}.partial", tensor.offset)
    flip(out / f"{name}.partial", 20)  # and its header
    code, stderr = quantize(source, out, "--part", "1/3")
    assert code == 1
    assert_three_lines(stderr, f"tensor '{tensor.name}' {ALTERED}", name, "run part 1/3 again")
    for n in (1, 2, 3):
        assert quantize(source, out, "--part", f"{n}/3") == (0, "")
    assert finish(out) == (0, "")
    assert digests(out) == reference


def test_a_byte_that_changed_in_a_file_that_a_part_had_whole(
    parts: Path, source: Path, plan: Plan, reference: dict[str, str]
) -> None:
    """It was hashed already, by its part: whoever writes to it later does not go unseen."""
    share = shares(plan, 3)[0]
    name = next(s.name for s in plan.shards if s.name in share.shards)
    tensor = next(t for u in share.units for t in u.outputs if t.file == name)
    flip(parts / f"{name}.partial", 20)  # the header: it is known
    flip(parts / f"{name}.partial", tensor.offset)
    code, stderr = finish(parts)
    assert code == 1
    assert_three_lines(stderr, f"tensor '{tensor.name}' {ALTERED}", name, "run part 1/3 again")
    assert quantize(source, parts, "--part", "1/3") == (0, "")
    assert finish(parts) == (0, "")
    assert digests(parts) == reference


def test_what_lies_between_tensors_of_a_torch_file(source: Path, tmp_path: Path) -> None:
    out, line = tmp_path / "out", ["convert", str(source), "--to", "mistral", "--no-tokenizer", "--quiet"]
    line += ["--weights-format", "pth", "-o"]
    assert warm.run([*line, str(tmp_path / "whole")]).returncode == 0
    for n in ("1/2", "2/2"):
        assert warm.run([*line, str(out), "--part", n]).returncode == 0
    file = out / "consolidated.00.pth.partial"
    for offset in (1, 13, 21, 31, 134, file.stat().st_size - 5):
        flip(file, offset)
    assert finish(out) == (0, "")
    assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_a_copy_that_changed_after_a_part_was_done(form: str, source: Path, tmp_path: Path) -> None:
    out, line = tmp_path / "out", ["convert", str(source), "--to", "mistral", "--no-tokenizer", "--quiet"]
    line += ["--weights-format", form, "-o"]
    assert warm.run([*line, str(tmp_path / "whole")]).returncode == 0
    for n in ("1/2", "2/2"):
        assert warm.run([*line, str(out), "--part", n]).returncode == 0
    recipe = {"convert": {"to": "mistral", "tokenizer": False, "weights_format": form}}
    unit = quantkit.plan(source, recipe).units[-1]
    flip(out / f"{unit.outputs[0].file}.partial", unit.outputs[0].offset)
    code, stderr = finish(out)
    assert code == 1
    assert_three_lines(stderr, f"tensor '{unit.outputs[0].name}' {ALTERED}", "run part 2/2 again")
    assert warm.run([*line, str(out), "--part", "2/2"]).returncode == 0
    assert finish(out) == (0, "")
    assert digests(out) == digests(tmp_path / "whole")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, str]]:
    """A model, a recipe for it, and what an undisturbed run makes of it."""
    folder = tmp_path_factory.mktemp("calibrated")
    text = folder / "text.txt"
    text.write_text(text_of(3000))
    recipe: dict[str, Any] = {
        "quantize": {"method": "gptq", "bits": 4, "group_size": 32},
        "calibration": {"text": str(text), "samples": 8, "length": 64}, "resources": {"threads": 1},
    }  # fmt: skip
    source = make_tiny("llama", folder / "source", num_hidden_layers=3)
    quantkit.quantize(str(source), folder / "reference", recipe)
    return source, recipe, digests(folder / "reference")


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("again", ["at once", "and is interrupted"])
def test_a_layer_that_was_solved_is_solved_again(
    layer: int, again: str, calibrated: tuple[Path, dict[str, Any], dict[str, str]], tmp_path: Path
) -> None:
    """With all others, as hidden states of earlier layers are gone: also if that is interrupted in the first of them,
    when states of the last run are overwritten already, and its journal still speaks of them."""
    source, recipe, reference = calibrated
    out = tmp_path / "out"
    interrupted(lambda: quantkit.quantize(str(source), out, recipe), 2)
    name = f"model.layers.{layer}.mlp.up_proj.weight"
    unit = next(u for u in quantkit.plan(str(source), recipe).units if u.name == name)
    flip(out / f"{unit.outputs[0].file}.partial", unit.outputs[0].offset)
    with pytest.raises(QuantkitError, match=ALTERED) as stop:
        quantkit.quantize(str(source), out, recipe)
    assert stop.value.exit_code == 1
    assert "all layers are solved anew" in stop.value.hint
    if again == "and is interrupted":
        interrupted(lambda: quantkit.quantize(str(source), out, recipe), 0)
    quantkit.quantize(str(source), out, recipe)
    assert digests(out) == reference


@pytest.mark.parametrize("stream", ["quantized", "full"])
def test_hidden_states_that_changed(
    stream: str,
    calibrated: tuple[Path, dict[str, Any], dict[str, str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As all layers behind them would be other ones, nothing is made of them."""
    source, recipe, reference = calibrated
    out = tmp_path / "out"
    interrupted(lambda: quantkit.quantize(str(source), out, recipe), 2)
    flip(out / ".quantkit" / "hidden" / f"{stream}-0", 4 * 1001 + 3)
    quantkit.quantize(str(source), out, recipe)
    assert digests(out) == reference
    assert "altered: all layers are solved again" in capsys.readouterr().err


def test_hidden_states_that_did_not_change(
    calibrated: tuple[Path, dict[str, Any], dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are gone on with, and those of the layer before are nobody's concern."""
    source, recipe, reference = calibrated
    out = tmp_path / "out"
    interrupted(lambda: quantkit.quantize(str(source), out, recipe), 2)
    flip(out / ".quantkit" / "hidden" / "quantized-1", 4 * 1001 + 3)
    noted: list[Any] = []
    note = Written.note
    monkeypatch.setattr(Written, "note", lambda self, entry: (noted.append(entry), note(self, entry))[1])
    quantkit.quantize(str(source), out, recipe)
    assert [entry["layer"] for entry in noted] == [2]
    assert digests(out) == reference


def altered_digit(journal: Path, key: bytes) -> None:
    """In the first line that has the key, as an error of a unit, or the SHA-256 of a file."""
    raw = journal.read_bytes()
    place = next(n for n in range(raw.index(key) + len(key), len(raw)) if raw[n : n + 1] in b"0123456789")
    journal.write_bytes(raw[:place] + (b"7" if raw[place : place + 1] != b"7" else b"8") + raw[place + 1 :])


def test_a_journal_that_changed(source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    """An error of a tensor would get into manifest and card."""
    out = tmp_path / "out"
    killed(source, out)
    altered_digit(out / ".quantkit" / "journal", b'"report": ')
    code, stderr = quantize(source, out)
    assert (code, stderr.count("\n")) == (0, 1)
    assert "warning: " in stderr
    assert "journal is not as it was written; what it no longer speaks of is done again" in stderr
    assert digests(out) == reference


@pytest.mark.parametrize("key", [b'"report": ', b'"sha256": '])
def test_a_journal_of_a_part_that_changed(key: bytes, parts: Path, source: Path, reference: dict[str, str]) -> None:
    altered_digit(parts / ".quantkit" / "part-2-of-3", key)
    for _ in range(2):  # it looks, and changes nothing
        code, stderr = finish(parts)
        assert code == 2
        assert_three_lines(stderr, "the journal of part 2/3 was altered", "run part 2/3 again")
    code, stderr = quantize(source, parts, "--part", "2/3")
    assert (code, stderr.count("warning: ")) == (0, 1)
    assert finish(parts) == (0, "")
    assert digests(parts) == reference


@pytest.mark.parametrize("file", ["job.json", "files.json"])
def test_what_a_job_is_was_altered(file: str, parts: Path, source: Path) -> None:
    """Whatever digit or letter it is, it is said, and not what would follow from it."""
    path = parts / ".quantkit" / file
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"0", b"1", 1))
    for place, byte in enumerate(raw):
        other = raw[:place] + bytes([byte ^ 1]) + raw[place + 1 :]
        with suppress(ValueError):  # what is no JSON, somebody may be writing: that is waited for
            strict_json(other)
            path.write_bytes(other)
        with pytest.raises(OutputError, match="the job's description is damaged"):
            read_job(parts)
    for code, stderr in (finish(parts), quantize(source, parts, "--part", "1/3")):
        assert code == 2
        assert_three_lines(stderr, "the job's description is damaged", file, "delete the folder")


def test_whose_a_journal_is_was_altered(source: Path, reference: dict[str, str], tmp_path: Path) -> None:
    """Then it may be another plan's: nobody takes the folder over unasked."""
    out = tmp_path / "out"
    killed(source, out)
    altered_digit(out / ".quantkit" / "journal", b'"plan": ')
    before = digests(out)
    for more in ((), ("--quant-type", "fp4")):
        code, stderr = quantize(source, out, *more)
        assert code == 2
        assert_three_lines(stderr, "the first line of an unfinished run's journal", str(out), "--force")
        assert digests(out) == before
    for size in (30, 0):  # a crash tears no line that was written before there were files
        os.truncate(out / ".quantkit" / "journal", size)
        assert quantize(source, out)[0] == 2
    assert quantize(source, out, "--force") == (0, "")
    assert digests(out) == reference


@pytest.mark.parametrize("when", ["before it is published", "with all but the journal gone"])
def test_stopped_behind_the_last_layer(
    when: str,
    calibrated: tuple[Path, dict[str, Any], dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nobody needs hidden states any more."""
    source, recipe, reference = calibrated
    out = tmp_path / "out"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((runner, "publish", stop) if when == "before it is published" else (Journal, "remove", stop)))
        with pytest.raises(Interrupted):
            quantkit.quantize(str(source), out, recipe)
    for file in (out / ".quantkit").glob("hidden/*"):
        flip(file, 3)
    capsys.readouterr()
    monkeypatch.setattr(Written, "note", stop)
    quantkit.quantize(str(source), out, recipe)
    assert digests(out) == reference
    assert "again" not in capsys.readouterr().err


DIES = """
import os
from quantkit.cli import main
from quantkit.runner import Run
Run.run = lambda *_: os._exit(9)
main()
"""


def test_a_file_that_is_gone_stays_gone(source: Path, plan: Plan, reference: dict[str, str], tmp_path: Path) -> None:
    """Also if the run that makes it anew, zeros at first, is killed: the journal speaks of the old one."""
    out = tmp_path / "out"
    killed(source, out)
    next(out.glob("*.partial")).unlink()
    died = subprocess.run([sys.executable, "-c", DIES, "quantize", str(source), "-o", str(out), *OPTIONS])
    assert died.returncode == 9
    assert quantize(source, out) == (0, "")
    assert digests(out) == reference
