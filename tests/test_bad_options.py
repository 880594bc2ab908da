"""What can be wrong in the command line and in a recipe, and how the program says it: in three lines, as JSON, and
on a terminal that knows ASCII alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from bad_inputs import Refused, parse, truncate, write
from conftest import Run

from quantkit.cli import main

pytestmark = pytest.mark.usefixtures("_signals")

# --- options and recipes ----------------------------------------------------------------------------------------------

BAD_OPTIONS = [
    (["--method", "bmb"], "unknown method 'bmb'", "did you mean 'bnb'?"),
    (["--metod", "bnb"], "No such option '--metod'", "see `quantkit quantize --help`"),
    (["--method", "rtn", "--bits", "5"], "method rtn has no 5-bit form", "use --bits 2 or 3 or 4 or 8"),
    (["--bits", "x"], "'x' is not a number", "see `quantkit quantize --help`"),
    (["--quant-type", "nf5"], "quantize.quant_type: input should be 'nf4' or 'fp4'", "it is 'nf5'"),
    (["--bits", "8", "--quant-type", "nf4"], "quant_type does not apply to bnb with 8 bits", "leave it out"),
    (["--skip", "lm_haed"], "the pattern 'lm_haed' matches no tensor", "a name looks like 'model.layers."),
    (["--skip", "*"], "nothing is left to quantize", "check --skip"),
    (["--set", "quantize.bits"], "--set 'quantize.bits' is not KEY=VALUE", "--set quantize.bits=8"),
    (["--set", "=8"], "--set '=8' is not KEY=VALUE", "--set quantize.bits=8"),
    (["--set", "card.licence=mit"], "unknown key 'card.licence'", "did you mean 'license'?"),
    (["--set", "quantise.bits=8"], "unknown key 'quantise'", "did you mean 'quantize'?"),
    (["--set", "card.license=[mit"], "the value is not YAML", "quote it"),
    (["--set", "card.license=2024-13-45"], "the value is not YAML", "quote it"),
    (["--set", "card.license=" + "[" * 2000], "the value is not YAML", "quote it"),
    (["--set", "resources=1", "--threads", "2"], "resources is not a block, so resources.threads", "keys"),
    (["--shard-size", "0"], "shard_size: input should be greater than 0", "it is '0'"),
    (["--shard-size", "foo"], "shard_size: 'foo' is not a size", "it is 'foo'"),
    (["--shard-size", "9" * 400], "shard_size: the size is beyond all measure", "it is '999"),
    (["--max-memory", "1MB"], "--max-memory 1 MiB is too little", "allow "),
    (["--threads", "0"], "resources.threads: input should be greater than or equal to 1", "it is 0"),
    (["--device", "abacus"], "no abacus device is usable here", "--device cpu"),
    (["--device", "cpu:0"], "no cpu:0 device is usable here", "--device cpu"),
    (["--device", "cuda:99"], "no cuda:99 device is usable here", "--device cpu"),
    (["--device", "cuda:x"], "no cuda:x device is usable here", "--device cpu"),
    (["--revision", "main"], "--revision is for Hub ids", "leave it out"),
    (["--recipe", "no.yaml"], "the recipe cannot be read: No such file", "check the path"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "what", "hint"), BAD_OPTIONS, ids=[" ".join(o)[:40] for o, _, _ in BAD_OPTIONS])
def test_a_bad_option_is_refused(
    options: list[str], what: str, hint: str, model: Path, out: Path, refused: Refused
) -> None:
    refusal = refused("quantize", model, "-o", out, *options)
    assert what in refusal.what
    assert hint in refusal.hint
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(model: Path, out: Path, refused: Refused) -> None:
    assert refused("quantize", model, "-o", out, "--device", "cuda").what == "no cuda device is usable here"
    assert not out.exists()


def test_a_network_of_one_machine(model: Path, refused: Refused) -> None:
    refusal = refused("plan", model, "--network", "1GB")
    assert refusal.what == "--network is between machines, and there is one"
    assert "--nodes 8" in refusal.hint


def test_nothing_said(refused: Refused, model: Path) -> None:
    assert refused().what == "Missing command"
    assert refused("plan").what == "source is missing"
    assert "-o OUT" in refused("quantize", model).hint


BAD_RECIPES = {
    "unknown key": ("quantize:\n  bits: 4\n  quant_tpye: fp4\n", "unknown key 'quantize.quant_tpye'", 3, "quant_type"),
    "unknown block": ("shard_size: 5GB\ncards: {}\n", "unknown key 'cards'", 2, "'card'"),
    "wrong type": ("quantize:\n  bits: four\n", "method bnb has no 'four'-bit form", 2, "4 or 8"),
    "wrong type inside": ("resources:\n  threads: many\n", "resources.threads: input should be", 2, "'many'"),
    "text for a block": ("quantize: bnb\n", "quantize is not a block of keys", 1, "indent"),
    "skip is a number": ("quantize:\n  skip: 3\n", "skip is not a list of patterns", 2, "lm_head"),
    "number for a key": ("1: 2\n", "1: keys should be strings", 1, ""),
    "not YAML": ("quantize:\n  bits: [4\n", "the recipe is not valid YAML", 3, "key: value"),
    "python tag": ("card: !!python/object/apply:os.getcwd []\n", "not valid YAML: could not determine", 1, "key:"),
    "not UTF-8": (b"card: \xff", "the recipe is not UTF-8 text", None, "UTF-8"),
    "not a mapping": ("- quantize\n", "the recipe is not a table of keys", None, "source:"),
    "empty": ("", "the recipe is not a table of keys", None, "source:"),
    "key twice": ("shard_size: 5GB\nshard_size: 6GB\n", "the key 'shard_size' stands twice", 2, "leave one"),
    "inner key twice": ("quantize:\n  bits: 4\n  bits: 8\n", "the key 'quantize.bits' stands twice", 3, "leave one"),
    "refers to itself": ("&a\ncard: *a\n", "unknown key 'card.card'", 2, "known: base_model"),
    "laughs": (
        "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklmnopqrstuvwx",
        "bcdefghijklmnopqrstuvwxy", strict=True)) + "quantize: {method: *y}\n", "unknown method [[[", 26, "known: bnb"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "what", "line", "hint"), BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_a_bad_recipe_is_refused(
    text: str | bytes, what: str, line: int | None, hint: str, model: Path, out: Path, tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / "recipe.yaml"
    write(path.name, text)(tmp_path)
    refusal = refused("quantize", model, "--recipe", path, "-o", out)
    assert what in refusal.what
    assert refusal.where == (f"{path}, line {line}" if line else str(path))
    assert hint in refusal.hint
    assert not out.exists()


def test_an_option_outranks_set_and_set_the_file(model: Path, tmp_path: Path, done: Any) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"source": str(model), "quantize": {"bits": 8}, "shard_size": 1}))
    settings = ["--recipe", tmp_path / "r.yaml", "--set", "quantize.bits=8", "--set", "shard_size=100KB", "--bits", 4]
    recipe = json.loads(done("plan", *settings, "--json"))["recipe"]
    assert recipe["quantize"]["bits"] == 4
    assert recipe["shard_size"] == 100_000


# --- the program as a whole -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["inspect", "nowhere"], ["plan", "nowhere", "--bits", "x"], ["verify", "."], ["--json"], ["nonsense"]]
)
def test_an_error_as_json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, "--json"])
    stdout, stderr = capsys.readouterr()
    error = json.loads(stdout)["error"]
    assert error.keys() == {"what", "in", "hint", "exit_code"}
    assert error["exit_code"] == 2
    assert parse(stderr) == (error["what"], error["in"], error["hint"])


def test_a_failed_verify_is_one_json_object(
    model: Path, out: Path, done: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    done("quantize", model, "-o", out, "--quiet")
    (out / "tokenizer.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(out), "--json", "--quiet"])
    stdout, stderr = capsys.readouterr()
    found = json.loads(stdout)
    assert stop.value.code == 3
    assert found["sound"] is False
    assert found["problems"]
    count = len(found["problems"])
    assert parse(stderr).what == ("1 problem found" if count == 1 else f"{count} problems found")


def test_a_process_of_its_own(model: Path, out: Path, quantkit: Run) -> None:
    truncate(model)
    result = quantkit("quantize", model, "-o", out)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "its header promises" in parse(result.stderr).what
    assert not out.exists()


def test_a_terminal_without_unicode(model: Path) -> None:
    line = [sys.executable, "-m", "quantkit", "plan", str(model)]
    result = subprocess.run(line, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "plan hash" in result.stdout
