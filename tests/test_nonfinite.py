"""Weights that are NaN or infinite: the first is named and nothing is written, or they are allowed and counted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import EMBEDDING, LINEAR, NORM, Refused, contents, poke
from safetensors.torch import load_file

NAN, INF = 0x7FC0, 0xFF80  # bf16; the infinity is the negative one


@pytest.mark.parametrize(
    ("tensor", "element", "index", "bits"),
    [(LINEAR, 64 * 3 + 5, "[3, 5]", NAN), (LINEAR, 0, "[0, 0]", INF), (EMBEDDING, 64 * 255 + 63, "[255, 63]", INF),
     (NORM, 7, "[7]", NAN)],
)  # fmt: skip
def test_a_nonfinite_weight_is_named(
    tensor: str, element: int, index: str, bits: int, model: Path, out: Path, refused: Refused
) -> None:
    poke(model, tensor, element, bits)
    before = contents(model)
    refusal = refused("quantize", model, "-o", out, "--quiet")
    assert refusal.what == f"tensor {tensor!r} holds a NaN or an infinity at {index}"
    assert refusal.where == str(model / "model.safetensors")
    assert "--allow-nonfinite" in refusal.hint
    assert contents(model) == before
    assert not out.exists()  # no run of this plan can end: nothing of it is in the way of another


def test_nonfinite_weights_can_be_allowed(model: Path, out: Path, done: Any) -> None:
    for element, bits in enumerate((NAN, INF, NAN)):
        poke(model, LINEAR, element, bits)
    poke(model, NORM, 0, NAN)
    done("quantize", model, "-o", out, "--quiet", "--allow-nonfinite")
    assert "sound" in done("verify", out, "--source", model, "--quiet")
    assert json.loads((out / "quantkit.json").read_text())["nonfinite"] == 3
    card = (out / "README.md").read_text()
    assert "NaN" in card
    assert re.search(r"\| `quantized tensors` \| +3 \|", card)
    assert load_file(out / "model.safetensors")[NORM][0].isnan()  # a copied tensor is copied
