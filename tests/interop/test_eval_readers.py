"""`quantkit eval` of GPTQ folders beside the perplexity that real loaders have on the same tokens: within 0.1 %."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from eval_models import build, quiet_transformers, text_of

import quantkit
from quantkit.evaluation_text import read_windows
from quantkit.layouts import open_checkpoint

pytestmark = pytest.mark.interop
ROOT = Path(__file__).parents[2]
REAL = ROOT / ".demo" / "SmolLM2-135M-Instruct"


def by_reader(environment: str, reader: str, folder: Path, ids: Path) -> float:
    python = ROOT / ".interop" / environment / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no environment .interop/{environment}: `make interop` builds it")
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    variables.pop("PYTHONPATH", None)
    script = Path(__file__).with_name("readers") / "perplexity.py"
    done = subprocess.run(
        [str(python), "-W", "ignore", str(script), reader, str(folder), str(ids)],
        env=variables, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return float(done.stdout.split()[-1])


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize(("environment", "reader"), [("gptqmodel", "gptqmodel"), ("gptqmodel", "transformers")])
def test_perplexity_is_the_loaders(tmp_path: Path, environment: str, reader: str, real: bool) -> None:
    """gptqmodel computes in fp16, transformers with optimum in float32."""
    if real and not REAL.exists():
        pytest.skip("needs the demo's model: scripts/demo.py --model-only")
    with quiet_transformers():
        source = REAL if real else build(tmp_path / "source", hidden_size=128, intermediate_size=256)
        text = tmp_path / "text.txt"
        text.write_text((ROOT / "README.md").read_text() if real else text_of(3000))
        table = {"quantize": {"method": "rtn", "bits": 4, "group_size": 32}}
        quantkit.quantize(source, tmp_path / "out", table)
        found = quantkit.evaluate(tmp_path / "out", str(text), windows=4, length=128)
        tokens = read_windows(
            open_checkpoint(tmp_path / "out"), str(text), windows=4, length=128, vocabulary=2**20, context=None
        )
    np.save(tmp_path / "ids.npy", tokens.ids)
    theirs = by_reader(environment, reader, tmp_path / "out", tmp_path / "ids.npy")
    assert found.perplexity == pytest.approx(theirs, rel=1e-3)
