"""What each recipe makes of a small model of its kind, read by the program that its card names where that is not
transformers alone (tests/test_recipes.py has those): gptqmodel, auto-gptq, exllamav2's Python side,
mistral_inference."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_models import quiet_transformers, text_of
from recipe_twins import FOLDER, TWINS, small, source_of
from safetensors.torch import load_file
from test_gptq_readers import ours, python_of, run_reader  # type: ignore[import-not-found]
from transformers import AutoModelForCausalLM

from quantkit import api
from quantkit.layouts import open_checkpoint
from quantkit.restored import RestoredWeights, open_files

pytestmark = pytest.mark.interop

READERS = Path(__file__).with_name("readers")
GPTQ = ("llama-3-8b-gptq4", "mixtral-8x7b-wanda-2of4-gptq4", "qwen3-8b-gptq-mixed-3.5")


def made(name: str, work: Path) -> tuple[Path, Path]:
    """Source, and what the recipe makes of it."""
    text, out = work / "text.txt", work / "out"
    text.write_text(text_of(3000))
    with quiet_transformers():
        source = source_of(TWINS[name], work)
        api.run_recipe(small(FOLDER / f"{name}.yaml", source, text).model_copy(update={"output": str(out)}))
    return source, out


def run(environment: str, script: Path, *arguments: Path) -> str:
    """What it prints."""
    command = [str(python_of(environment)), *map(str, (script, *arguments))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_nobody_is_left_out() -> None:
    others = {name for name, twin in TWINS.items() if twin.loader == "nobody"}
    assert others == {*GPTQ, "claire-mistral-7b-exl2-4.0", "mistral-7b-v0.3-to-mistral-src"}


@pytest.mark.parametrize("name", GPTQ)
def test_gptq(name: str, tmp_path: Path) -> None:
    """The reader that the card names: its layers apply the weights that we restore, and it predicts the same."""
    python_of("gptqmodel")
    source, out = made(name, tmp_path)
    loader = json.loads((out / "quantkit.json").read_text())["result"]["loader"]
    environment, reader = ("autogptq", "autogptq") if loader == "auto-gptq" else ("gptqmodel", loader)
    (tmp_path / "found").mkdir()
    run_reader(environment, reader, tmp_path / "found", [out])
    theirs = np.load(tmp_path / "found" / "out.npz")
    weights, logits = ours(source, out)
    for module in weights:
        assert np.abs(theirs[module] - weights[module]).max() < 2e-3 * np.abs(weights[module]).max(), module
    assert np.abs(theirs["logits"] - logits).max() < 2e-2 * np.abs(logits).max()
    run(environment, snippet(out, tmp_path))


def snippet(out: Path, work: Path) -> Path:
    """The card's code as a program; what is put in is what its comment asks for."""
    code = re.search(r"```python\n(.*?)\n```", (out / "README.md").read_text(), re.DOTALL)
    assert code
    program, put = re.subn(r"^(PATH_OR_REPO_ID|FOLDER) = .*", rf"\1 = {str(out)!r}", code[1], flags=re.MULTILINE)
    assert put == 1
    (work / "snippet.py").write_text(program)
    return work / "snippet.py"


def test_exl2(tmp_path: Path) -> None:
    """The weights of exllamav2 are those that we restore; the card's code, run as it is written on exllamav2 with its
    kernels on the CPU, writes on, and its model predicts what transformers predicts with these weights."""
    python_of("exllamav2")
    source, out = made("claire-mistral-7b-exl2-4.0", tmp_path)
    run("exllamav2", READERS / "exllamav2_check.py", out, tmp_path / "found")
    found = load_file(tmp_path / "found.safetensors")
    checkpoint = open_checkpoint(out)
    with open_files(checkpoint) as files:
        restored = RestoredWeights(checkpoint, files)
        assert set(found) == set(restored.packed)
        for name, matrix in found.items():
            assert torch.equal(matrix.float(), restored.read(name)), name
    assert predicts_the_same(source, out, tmp_path)


def predicts_the_same(source: Path, out: Path, work: Path) -> bool:
    """Runs the code of an EXL2 folder's card, which writes on. Whether its model predicts what transformers does with
    the weights that we restore."""
    printed = run("exllamav2", READERS / "exllamav2_snippet.py", snippet(out, work), work / "logits")
    said = r"^(The three longest rivers of France are|user: Name three rivers of France\.\nassistant:).{20,}"
    assert re.search(said, printed, re.DOTALL | re.MULTILINE), printed
    _, logits = ours(source, out)
    theirs = np.load(work / "logits.npy")[:, : logits.shape[-1]]
    return bool(np.abs(theirs - logits[0]).max() < 1e-2 * np.abs(logits).max())


def test_mistral_layout(tmp_path: Path) -> None:
    """It predicts what transformers predicts from the folder that was converted."""
    python_of("mistral")
    source, out = made("mistral-7b-v0.3-to-mistral-src", tmp_path)
    run("mistral", READERS / "mistral.py", out, tmp_path / "logits.npy")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.arange(3, 35)[None]).logits[0].numpy()
    assert np.abs(np.load(tmp_path / "logits.npy") - logits).max() < 1e-4 * np.abs(logits).max()
