"""NF4 for most linears, 16 bits where they are worth most: end to end on a small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mixed_models import make, manifest
from mixed_models import recipe as recipe_of

import quantkit
from quantkit.errors import QuantkitError
from quantkit.layouts import open_checkpoint
from quantkit.methods import bnb_4bit, bnb_mixed
from quantkit.methods.base import WeightSpec
from quantkit.restored import RestoredWeights, open_files

pytestmark = pytest.mark.usefixtures("quiet")


def recipe(source: Path, bits: float, **quantize: Any) -> dict[str, Any]:
    return recipe_of(source, "bnb", bits, **quantize)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make(tmp_path_factory.mktemp("mixed-bnb"), "bnb", 11, halves=True, num_hidden_layers=3)


def test_some_linears_stay_as_they_are_within_the_budget(made: tuple[Path, Path]) -> None:
    source, out = made
    found = manifest(out)
    mixes = found["recipe"]["quantize"]["mixes"]
    dense = {module for module, mix in mixes.items() if mix == "dense"}
    assert 0 < len(dense) < len(mixes)
    assert set(found["method"]["left_dense"]) == dense
    assert sum(row["tensors"] for row in found["allocation"]["rows"]) == len(mixes)
    assert found["allocation"]["bits"] <= 11
    assert quantkit.verify(out, source=source).problems == ()
    skipped = json.loads((out / "config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert dense <= set(skipped)


def test_what_stays_is_equal_bit_for_bit_and_the_rest_is_nf4(made: tuple[Path, Path]) -> None:
    source, out = made
    dense = {m for m, mix in manifest(out)["recipe"]["quantize"]["mixes"].items() if mix == "dense"}
    theirs, ours = open_checkpoint(source), open_checkpoint(out)
    with open_files(theirs) as a, open_files(ours) as b:
        before, after = RestoredWeights(theirs, a), RestoredWeights(ours, b)
        for name in before.names:
            same = torch.equal(before.read(name).float(), after.read(name).float())
            assert same == (name not in after.packed)
            assert (name.removesuffix(".weight") in dense) <= same


def test_float32_takes_32_bits(tmp_path: Path) -> None:
    """As they lie on disk, beside those of NF4."""
    _, out = make(tmp_path, "bnb", 20, halves=False, num_hidden_layers=2)
    found = manifest(out)
    assert "dense" in found["recipe"]["quantize"]["mixes"].values()
    assert 8 < found["allocation"]["bits"] <= 20


def test_more_bits_lose_less(made: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = made
    quantkit.quantize(source, tmp_path / "more", recipe(source, 13, measurement=f"{out}.measurement.json"))
    losses = [manifest(folder)["allocation"]["expected_kl"] for folder in (out, tmp_path / "more")]
    assert losses[1] < losses[0]


def test_transformers_leaves_them_dense(made: tuple[Path, Path]) -> None:
    """As a stranger loads the folder: NF4 layers where the mix says so, plain ones elsewhere."""
    import bitsandbytes
    from transformers import AutoModelForCausalLM

    _, out = made
    model = AutoModelForCausalLM.from_pretrained(out)
    for module, mix in manifest(out)["recipe"]["quantize"]["mixes"].items():
        assert isinstance(model.get_submodule(module), bitsandbytes.nn.Linear4bit) == (mix != "dense")


def test_a_trial_is_what_would_be_written() -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    params = bnb_mixed.MixedBnb()
    trial = bnb_mixed.METHOD.mixing.trial(params, "nf4").nearest("a", weight, None).restore()  # type: ignore[union-attr]
    spec = WeightSpec("a", "F32", 8, 256)
    encoder = bnb_4bit.Bnb4bitEncoder(spec, params)
    raw = encoder.encode(weight.numpy().view(np.uint32).reshape(-1), 0)
    companions, _ = encoder.finish()
    wanted = bnb_4bit.Bnb4bitDecoder(spec, params, companions).decode(raw.reshape(-1), 0, weight.numel())
    np.testing.assert_array_equal(trial.reshape(-1), wanted)
    assert 0.05 < np.linalg.norm(trial - weight.numpy()) / float(weight.norm()) < 0.15


@pytest.mark.parametrize(("bits", "words"), [(3.5, "too few"), (16, "leave all linears")])
def test_refused(made: tuple[Path, Path], bits: float, words: str) -> None:
    source, _ = made
    with pytest.raises(QuantkitError, match=words):
        quantkit.plan(str(source), recipe(source, bits))


def test_whole_bits_look_at_no_text(made: tuple[Path, Path]) -> None:
    source, _ = made
    assert quantkit.plan(str(source), {"quantize": {"method": "bnb", "bits": 4}}).allocation is None
    with pytest.raises(QuantkitError, match="looks at no text"):
        quantkit.plan(str(source), recipe(source, 8))
