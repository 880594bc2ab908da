"""exllamav2's own Python code, without its kernels, in an environment of its own (`make interop` builds it), finds in
our folders what it looks for, and every matrix that its kernels would compute is the one that we restore."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_models import SIZES, build, quiet_transformers
from safetensors.torch import load_file
from test_recipe_twins import READERS, predicts_the_same, run  # type: ignore[import-not-found]

import quantkit
from quantkit.layouts import open_checkpoint
from quantkit.restored import RestoredWeights, open_files

pytestmark = pytest.mark.interop

PYTHON = Path(__file__).parents[2] / ".interop" / "exllamav2" / "bin" / "python"
SCALED = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
ROOM = {"max_position_embeddings": 2048}  # for what a card's code asks for: such a folder's is run


@pytest.mark.parametrize(("kind", "changes", "rope"), [
    ("llama", {"rope_theta": 12345.0, "tie_word_embeddings": True}, (12345.0, None)),
    ("llama", {"rope_parameters": SCALED, **ROOM}, (5e5, "llama3")),
    ("mistral", {}, (10000.0, None)),
    ("mixtral", {}, (None, None)),
    ("qwen2", {**SIZES, "rope_theta": 1e6, **ROOM}, (1e6, None)),
    ("qwen3", ROOM, (None, None)),
])  # fmt: skip
def test_it_finds_what_it_looks_for(tmp_path: Path, kind: str, changes: dict[str, Any], rope: tuple[Any, Any]) -> None:
    if not PYTHON.exists():
        pytest.skip("no environment .interop/exllamav2: `make interop` builds it")
    with quiet_transformers():
        source = build(tmp_path / "source", kind, **changes)
    if kind == "qwen2":
        (source / "chat_template.jinja").write_text(TEMPLATE)
    (source / "calib.txt").write_text("some words of text, and more of them. " * 200)
    recipe = {
        "quantize": {"method": "exl2", "bits": 4.5},
        "calibration": {"text": str(source / "calib.txt"), "samples": 8, "length": 64},
    }
    quantkit.quantize(str(source), tmp_path / "out", recipe)
    run("exllamav2", READERS / "exllamav2_check.py", tmp_path / "out", tmp_path / "found")
    read = json.loads((tmp_path / "found.json").read_text())
    theta, scaling = rope
    assert theta is None or read["rope"] == theta
    assert read["scaling"] == scaling
    assert read["heads"] == 4
    found = load_file(tmp_path / "found.safetensors")
    checkpoint = open_checkpoint(tmp_path / "out")
    with open_files(checkpoint) as files:
        restored = RestoredWeights(checkpoint, files)
        assert set(found) == set(restored.packed)
        for name, matrix in found.items():
            assert torch.equal(matrix.float(), restored.read(name)), name
    if ROOM.items() <= changes.items():
        same = predicts_the_same(source, tmp_path / "out", tmp_path)
        note = "takes the mean away" in (tmp_path / "out" / "README.md").read_text()
        assert same != note
        assert note == (kind == "qwen3")
