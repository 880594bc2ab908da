"""The card of a converted folder: true, valid for the Hub, of planned size, and its code runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from card_facts import render
from conftest import Run, make_tiny
from oracle.native_models import make_native

import quantkit as package
from quantkit import api
from quantkit.front_matter import validate_front_matter

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
BARE: dict[str, Any] = {"convert": {"tokenizer": False}}


def test_it_says_what_was_done_and_no_more() -> None:
    done = {"bits": None, "bits_per_weight": None, "errors": (), "kept": (), "tags": ("conversion",)}
    text = render(**done, method_title="the mistral-src layout", layout="mistral", checked=True, tensors=291)
    for part in (
        "written in the mistral-src layout by quantkit",
        "neither trained nor quantized",
        "every one of the 291 tensors was read back, mapped back to the parent's layout and compared",
        "A converted copy is a derivative",
        "--load-format mistral",
    ):
        assert part in text
    assert "\n\n\n" not in text
    for wrong in ("quantized to", "bits per weight with", "Left unquantized", "from_pretrained", "FP8"):
        assert wrong not in text.split("## From the parent's card")[0]
    assert "were not compared" in render(**done, checked=False)


@pytest.mark.parametrize("to", ["hf", "mistral"])
def test_front_matter_and_size(to: str, tmp_path: Path) -> None:
    source = make_native(tmp_path / "native") if to == "hf" else make_tiny("mistral", tmp_path / "tiny")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Parent\n")
    recipe = {**BARE, "card": {"base_model": "acme/parent"}}
    outcome = package.convert(str(source), tmp_path / "out", to, recipe)  # type: ignore[arg-type]
    assert outcome.checked.endswith("equal to the source bit for bit")
    text = (tmp_path / "out" / "README.md").read_text()
    data = yaml.safe_load(text.split("---\n")[1])
    assert validate_front_matter(data) == []
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == "acme/parent"
    assert data.get("library_name") == ("transformers" if to == "hf" else None)
    assert "conversion" in data["tags"]
    (tmp_path / "out" / "README.md").unlink()
    api.rewrite_card(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == text


@pytest.mark.parametrize("recipe", [
    {"convert": {"to": "mistral", "tokenizer": False}},
    {"convert": {"to": "mistral", "tokenizer": False, "weights_format": "pth", "check": False}},
    {"convert": {"to": "hf", "tokenizer": False}, "shard_size": 50_000},
    {"convert": {"to": "mistral", "tokenizer": False}, "native": {"rope_theta": 5e5}},
    {"convert": {"to": "hf", "tokenizer": False}, "quantize": {"bits": 8, "skip": ["mlp.down_proj"]}},
])  # fmt: skip
def test_its_command_and_its_recipe_make_it_again(recipe: dict[str, Any], tmp_path: Path, quantkit: Run) -> None:
    source = make_native(tmp_path / "model", params_extra={"sliding_window": 7})
    api.run_recipe(api.build_recipe({**recipe, "source": str(source), "output": str(tmp_path / "out")}))
    text = (tmp_path / "out" / "README.md").read_text()
    made = json.loads((tmp_path / "out" / "quantkit.json").read_text())["plan_hash"]
    (command,) = re.findall(r"```sh\n(quantkit .*)\n```", text)
    words = command.replace(" OUT", f" {tmp_path / 'again'}").split()[1:]
    assert quantkit(*words, cwd=tmp_path).returncode == 0
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "r.yaml").write_text(block)
    assert quantkit("run", "r.yaml", "-o", "third", cwd=tmp_path).returncode == 0
    for name in ("again", "third"):
        assert json.loads((tmp_path / name / "quantkit.json").read_text())["plan_hash"] == made


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real checkpoints are not here")
def test_its_code_runs(tmp_path: Path) -> None:
    package.convert(str(SHARED / "stories260k-mistral-src"), tmp_path / "out", "hf")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    code = re.sub(r'PATH_OR_REPO_ID = ".*"', f"PATH_OR_REPO_ID = {str(tmp_path / 'out')!r}", code)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 20
