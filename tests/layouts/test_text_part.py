"""The language model of a vision model, as transformers 5.23 saves one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Run
from oracle import mistral
from safetensors.torch import load_file, save_file

import quantkit as package
from quantkit.errors import SourceError

TEXT = {"model_type": "mistral", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "sliding_window": None}  # fmt: skip
VISION = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
          "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
ALONE: dict[str, Any] = {"native": {"text_only": True}, "convert": {"tokenizer": False}}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.Mistral3Config(text_config=TEXT, vision_config=VISION, tie_word_embeddings=request.param)
    folder = tmp_path_factory.mktemp("vision") / "model"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.Mistral3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_both_layouts_compute_what_the_whole_model_does(seeing: Path, tmp_path: Path) -> None:
    ids = torch.tensor([[5, 9, 77, 3, 120, 9]])
    whole = transformers.Mistral3ForConditionalGeneration.from_pretrained(seeing)
    expected = whole(input_ids=ids).logits[0]
    package.convert(str(seeing), tmp_path / "hf", "hf", ALONE)
    text = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(text).__name__ == "MistralForCausalLM"
    assert torch.equal(text(input_ids=ids).logits[0], expected)
    package.convert(str(seeing), tmp_path / "native", "mistral", ALONE)
    native = mistral.logits(mistral.load_native(tmp_path / "native"), ids[0].tolist())
    assert (native - expected).abs().max() < 1e-4
    for out in ("hf", "native"):
        assert not package.verify(tmp_path / out, source=str(seeing)).problems


def test_names_of_both_generations(seeing: Path, tmp_path: Path) -> None:
    """transformers 4 and 5 put the two prefixes in the other order."""
    folder = tmp_path / "other"
    folder.mkdir()
    weights = load_file(seeing / "model.safetensors")
    renamed = {
        n.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head"): w
        for n, w in weights.items()
    }
    assert renamed.keys() != weights.keys()
    save_file(renamed, folder / "model.safetensors")
    (folder / "config.json").write_bytes((seeing / "config.json").read_bytes())
    package.convert(str(seeing), tmp_path / "a", "mistral", ALONE)
    package.convert(str(folder), tmp_path / "b", "mistral", ALONE)
    a, b = (load_file(tmp_path / out / "consolidated.safetensors") for out in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_refused_without_the_option(seeing: Path, tmp_path: Path, quantkit: Run) -> None:
    done = quantkit("convert", seeing, "--to", "mistral", "-o", tmp_path / "out", "--no-tokenizer")
    assert done.returncode == 2
    assert "hint: --text-only" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"text_config": None}, "no vision part"), ({"text_config": {"model_type": "gpt2"}}, "model_type 'gpt2'")],
)
def test_configs_without_such_a_part(change: dict[str, Any], message: str, seeing: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((seeing / "model.safetensors").read_bytes())
    config = json.loads((seeing / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(SourceError, match=message):
        package.convert(str(folder), tmp_path / "out", "mistral", ALONE)


def test_a_tensor_of_neither_part(seeing: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    weights = {**load_file(seeing / "model.safetensors"), "audio_tower.x": torch.zeros(3)}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_bytes((seeing / "config.json").read_bytes())
    with pytest.raises(SourceError, match=r"'audio_tower\.x' belongs neither"):
        package.convert(str(folder), tmp_path / "out", "mistral", ALONE)
