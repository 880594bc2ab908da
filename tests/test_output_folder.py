"""The folder to write: apart from the source, nothing of others deleted, results and unfinished runs of other plans
replaced by force alone; and what `verify` and `card` refuse to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bad_inputs import LINEAR, Refused, contents, poke

import quantkit
from quantkit.checkpoint.writer import ShardWriter
from quantkit.cli import main
from quantkit.errors import Interrupted

pytestmark = pytest.mark.usefixtures("_signals")

# --- the folder to write ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relation", ["same", "inside", "around", "same by link", "inside by link", "dotted"])
def test_output_and_source_lie_apart(relation: str, model: Path, tmp_path: Path, refused: Refused) -> None:
    link = tmp_path / "link"
    link.symlink_to(model, target_is_directory=True)
    target = {"same": model, "inside": model / "out", "around": tmp_path, "same by link": link,
              "inside by link": link / "out", "dotted": f"{model}/../model/out"}[relation]  # fmt: skip
    before = contents(tmp_path)
    for force in ([], ["--force"]):
        assert "contain each other" in refused("quantize", model, "-o", target, *force).what
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "below a file", "long name", "dangling link"])
def test_an_output_that_can_be_no_folder(kind: str, model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nothing")
    name = {"file": "file", "below a file": "file/out", "long name": "x" * 300, "dangling link": "link"}[kind]
    before = contents(tmp_path)
    refusal = refused("quantize", model, "-o", tmp_path / name)
    assert str(tmp_path) in refusal.where
    assert "-o" in refusal.hint
    assert contents(tmp_path) == before


def test_an_output_in_nobodys_home(model: Path, tmp_path: Path, refused: Refused, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    refusal = refused("quantize", model, "-o", "~nobody-by-this-name/../model/out")
    assert "contain each other" in refusal.what  # as no home is found for it, it is a name like any other
    assert contents(tmp_path) == before


def test_a_folder_of_other_things_is_left_alone(model: Path, out: Path, refused: Refused, done: Any) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refusal = refused("quantize", model, "-o", out)
    assert refusal.what == "the output folder is not empty (notes.txt)"
    assert "--force" in refusal.hint
    assert contents(out).keys() == {"notes.txt"}
    done("quantize", model, "-o", out, "--quiet", "--force")
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors"])
def test_force_deletes_nobody_elses_weights(name: str, model: Path, out: Path, refused: Refused) -> None:
    out.mkdir()
    for file in ("config.json", name):
        (out / file).write_text("mine")
    before = contents(out)
    refusal = refused("quantize", model, "-o", out, "--force")
    assert refusal.what == f"{name} is a weight file that quantkit did not write; --force does not delete it"
    # Nor does the refused try open the door for the next one.
    assert "is not empty" in refused("quantize", model, "-o", out).what
    assert contents(out) == before


def test_another_plan_needs_force(model: Path, out: Path, refused: Refused, done: Any) -> None:
    done("quantize", model, "-o", out, "--quiet")
    before = contents(out)
    assert "is finished already" in done("quantize", model, "-o", out, "--quiet")
    refusal = refused("quantize", model, "-o", out, "--quiet", "--bits", 8)
    assert refusal.what == "the output folder holds the result of another plan"
    assert contents(out) == before
    done("quantize", model, "-o", out, "--quiet", "--bits", 8, "--force", "--shard-size", "100KB")
    assert "sound" in done("verify", out, "--quiet")  # with no stray file of the earlier result
    assert not (out / "model.safetensors").exists()


def leave_unfinished(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **recipe: Any) -> None:
    """A run that is interrupted when all is written and nothing is committed."""

    def interrupt(_writer: ShardWriter) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "commit", interrupt)
        with pytest.raises(Interrupted):
            quantkit.quantize(str(model), out, recipe)


def test_an_unfinished_run_of_another_plan(
    model: Path, out: Path, refused: Refused, done: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_unfinished(model, out, monkeypatch, shard_size="100KB")
    before = contents(out)
    refusal = refused("quantize", model, "-o", out, "--quiet")
    assert refusal.what == "the output folder holds an unfinished run of another plan"
    assert contents(out) == before
    done("quantize", model, "-o", out, "--quiet", "--force")
    assert "sound" in done("verify", out, "--quiet")


def test_after_the_source_was_changed_the_run_does_not_resume(
    model: Path, out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_unfinished(model, out, monkeypatch)
    poke(model, LINEAR, 0, 0)
    refusal = refused("quantize", model, "-o", out, "--quiet")
    assert refusal.what == "the source changed since the unfinished run began"
    assert refusal.hint == "start over with --force"


# --- verify and card --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["verify", "card"])
def test_a_folder_that_is_not_ours(verb: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(model)
    with pytest.raises(SystemExit) as stop:
        main([verb, str(model)])
    assert stop.value.code == 2
    what, where, *_ = capsys.readouterr().err.splitlines()
    assert what == "error: the folder has no quantkit.json, so quantkit did not write it"
    assert where == f"  in: {model}"
    assert contents(model) == before


def test_verify_of_an_unfinished_run(model: Path, out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_unfinished(model, out, monkeypatch)
    assert refused("verify", out).what == "the folder holds an unfinished run"


def test_quick_and_source_do_not_go_together(model: Path, out: Path, refused: Refused, done: Any) -> None:
    done("quantize", model, "-o", out, "--quiet")
    assert "--quick" in refused("verify", out, "--quick", "--source", model).what
