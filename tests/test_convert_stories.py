"""Converted models tell the same story, token for token: trained ones, in transformers and in Mistral's program of
2023. What that program cannot run, or the native layout cannot say, is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny
from meanings import CLOSE, THETA, TOKENS, assert_same_ids, convert, furthest, load, theirs, wide_hf
from oracle import mistral, mistral_2023
from oracle.native_models import make_native

from quantkit.errors import SourceError, UsageError

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"trained models in {SHARED} are absent")

# --- trained models ---------------------------------------------------------------------------------------------------

STORIES = ("stories15m", "stories260k")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[int], list[int]]]:
    """By the name of a trained model: its folder converted to HF, a prompt, and the oracle's 60 tokens after it."""
    pytest.importorskip("sentencepiece")
    made: dict[str, tuple[Path, list[int], list[int]]] = {}

    def get(name: str) -> tuple[Path, list[int], list[int]]:
        if name not in made:
            source = SHARED / f"{name}-mistral-src"
            out = convert(source, tmp_path_factory.mktemp(name) / "hf", "hf", tokenizer=True)
            prompt = mistral_2023.tokens_2023(source, "Once upon a time")
            made[name] = out, prompt, mistral.greedy(mistral.load_native(source), prompt, 60)
        return made[name]

    return get


Story = Callable[[str], tuple[Path, list[int], list[int]]]


@torch.no_grad()
def say(model: Any, prompt: list[int]) -> list[int]:
    said = model.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False, pad_token_id=0)[0].tolist()
    return list(said[len(prompt) :])


@real
@pytest.mark.parametrize("name", STORIES)
def test_a_converted_model_tells_the_same_story(name: str, story: Story) -> None:
    import transformers

    out, prompt, expected = story(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("Once upon a time")["input_ids"] == prompt
    assert say(load(out), prompt) == expected
    text = tokenizer.decode(prompt + expected, skip_special_tokens=True)
    assert text.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside")
    assert {"One", "day,", "she", "saw", "big,", "red", "wanted"} <= set(text.split())
    assert_same_ids(out, (SHARED / f"{name}-mistral-src" / "tokenizer.model").read_bytes())


@real
@pytest.mark.parametrize("name", STORIES)
def test_a_trained_model_comes_back(name: str, story: Story, tmp_path: Path) -> None:
    source = SHARED / f"{name}-mistral-src"
    old = {"profile": "one-file-ref-2023"} if name == "stories15m" else {}
    back = convert(story(name)[0], tmp_path / "back", "mistral", tokenizer=True, **old)
    expected, found = mistral.read_weights(source), mistral.read_weights(back)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key
    assert json.loads((back / "params.json").read_text()) == json.loads((source / "params.json").read_text())
    assert (back / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    names = {"consolidated.00.pth" if old else "consolidated.safetensors", "params.json", "tokenizer.model"}
    assert {p.name for p in back.iterdir()} == names | {"quantkit.json", "README.md"}


@real
@pytest.mark.parametrize("name", STORIES)
def test_the_program_of_2023_tells_the_same_story(name: str, story: Story, tmp_path: Path) -> None:
    """stories260k never was in that form: its base is 10,000 and it has no window, so one as wide as its context."""
    hf, prompt, expected = story(name)
    old = convert(hf, tmp_path / "old", "mistral", tokenizer=True, profile="one-file-ref-2023")
    assert mistral_2023.run_2023(old, prompt, 60) == expected
    source = SHARED / f"{name}-mistral-src"
    straight = convert(source, tmp_path / "straight", "mistral", tokenizer=True, profile="one-file-ref-2023")
    for file in ("consolidated.00.pth", "params.json", "tokenizer.model"):
        assert (straight / file).read_bytes() == (old / file).read_bytes()


# --- the program of 2023 ----------------------------------------------------------------------------------------------


def test_a_llama_in_the_form_of_2023(spm: bytes, tmp_path: Path) -> None:
    source = wide_hf(tmp_path / "hf", "llama", vocab_size=330)
    (source / "tokenizer.model").write_bytes(spm)
    out = convert(source, tmp_path / "old", "mistral", tokenizer=True, profile="one-file-ref-2023")
    params = json.loads((out / "params.json").read_text())
    assert len(params) == 9
    assert params["sliding_window"] == load(source).config.max_position_embeddings
    model = mistral_2023.load_2023(out)
    assert furthest(mistral.logits(model, TOKENS), theirs(source)) < CLOSE
    answer = mistral_2023.run_2023(out, TOKENS, 60)
    again = convert(out, tmp_path / "again", "hf", tokenizer=True)
    for folder in (source, again):
        assert say(load(folder), TOKENS) == answer[: len(say(load(folder), TOKENS))]
    assert {p.name for p in out.iterdir()} == {
        "consolidated.00.pth", "params.json", "tokenizer.model", "quantkit.json", "README.md",
    }  # fmt: skip


def test_a_later_tokenizer_gets_the_name_of_2023(spm: bytes, tmp_path: Path) -> None:
    source = make_native(tmp_path / "native", vocab_size=330, params_extra={"sliding_window": 6})
    (source / "tokenizer.model.v1").write_bytes(spm)
    out = convert(source, tmp_path / "old", "mistral", tokenizer=True, profile="one-file-ref-2023")
    assert (out / "tokenizer.model").read_bytes() == spm
    assert not (out / "tokenizer.model.v1").exists()
    assert len(mistral_2023.run_2023(out, TOKENS, 3)) == 3


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ({"params_extra": {"rope_theta": 1e6, "sliding_window": 6}}, "rope_theta 1e\\+06"),
        ({"params_extra": THETA}, "rope_theta"),
        ({}, "rope_theta"),  # by rule
        ({"experts": 2, "params_extra": {"sliding_window": 6}}, "mixture of experts"),
        ({"tied": True, "params_extra": {"sliding_window": 6}}, "head that is the embedding"),
        ({"n_layers": 4, "params_extra": {"rope_theta": 1e4, "sliding_window": [None, 6]}}, "differ between layers"),
    ],
    ids=["base", "base, no window", "no base", "experts", "tied", "windows that differ"],
)
def test_what_the_program_of_2023_cannot_run_is_refused(shape: dict[str, Any], match: str, tmp_path: Path) -> None:
    source = make_native(tmp_path / "native", **shape)
    hf = convert(source, tmp_path / "hf", "hf")
    for folder in (source, hf):
        with pytest.raises(SourceError, match=match):
            convert(folder, tmp_path / "out", "mistral", profile="one-file-ref-2023")
    assert not (tmp_path / "out").exists()


def test_what_the_native_layout_cannot_say_is_refused(tmp_path: Path) -> None:
    for i, changes in enumerate([
        {"attention_bias": True}, {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    ]):  # fmt: skip
        source = make_tiny("llama", tmp_path / f"hf {i}", **changes)
        with pytest.raises(SourceError):
            convert(source, tmp_path / "out", "mistral")
    for name in ("qwen2", "gpt2"):
        with pytest.raises(SourceError):
            convert(make_tiny(name, tmp_path / name), tmp_path / "out", "mistral")
    with pytest.raises(UsageError, match=r"params\.json"):
        convert(make_tiny("llama", tmp_path / "plain"), tmp_path / "out", "mistral", native={"rope_theta": 1e4})
