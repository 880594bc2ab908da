"""Models on which a mistake shows, and what both programs compute on them: what the tests of converted models share.

The native side is computed by the oracle (float64, from the description alone), the other by transformers in fp32.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny
from oracle import mistral
from oracle.native_models import make_native, save_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantkit as package

TOKENS = [(7 * t * t + 3 * t + 5) % 250 for t in range(24)]
CLOSE = 1e-4
THETA = {"rope_theta": 1e6}

# --- models -----------------------------------------------------------------------------------------------------------


def widen(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices of deviation 0.2: wide enough for attention to choose, so that a mistake shows."""
    return {name: tensor * 4 if tensor.dim() > 1 else tensor for name, tensor in weights.items()}


def wide_native(folder: Path, **shape: Any) -> Path:
    made = make_native(folder, **{"dtype": "float32", **shape})
    save_weights(made, widen(mistral.read_weights(made)), "safetensors")
    return made


def wide_hf(folder: Path, model_type: str, **changes: Any) -> Path:
    made = make_tiny(model_type, folder, dtype="float32", **changes)
    weights = load_file(made / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in weights.items():
        if tensor.dim() == 1:  # transformers makes every norm 1, and any of them could be any other
            weights[name] = 1 + 0.2 * torch.randn(tensor.shape, generator=generator)
    save_file(widen(weights), made / "model.safetensors", {"format": "pt"})
    return made


def convert(source: Path, out: Path, to: Any, **keys: Any) -> Path:
    block = {k: keys.pop(k) for k in ("profile", "weights_format", "tokenizer") if k in keys}
    package.convert(str(source), out, to, {"convert": {"tokenizer": False, **block}, **keys})
    assert package.verify(out, source=str(source)).problems == ()
    return out


def load(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def config_of(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    assert isinstance(config, dict)
    return config


@torch.no_grad()
def theirs(folder: Path) -> Tensor:
    logits = load(folder)(torch.tensor([TOKENS])).logits[0]
    assert isinstance(logits, Tensor)
    return logits.double()


def ours(folder: Path) -> Tensor:
    return mistral.logits(mistral.load_native(folder), TOKENS)


def furthest(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    assert min(a.std(), b.std()) > 0.3
    return float((a - b).abs().max())


# --- tokenizers -------------------------------------------------------------------------------------------------------

TEXTS = ["Once upon a time", "  two  spaces ", "", "Zoë said: “naïve café” — 1,234.5\n\tτέλος 😀", "<0x41>"]


@pytest.fixture(scope="session")
def spm() -> bytes:
    """A small tokenizer.model with the settings of Mistral's, trained here."""
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    words = ["once upon a time there was a little girl who loved to play", "the big red ball rolled away from her dog"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 20), model_writer=written, vocab_size=330, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, minloglevel=3,
        character_coverage=1.0, hard_vocab_limit=False,
    )  # fmt: skip
    return written.getvalue()


def assert_same_ids(folder: Path, raw: bytes) -> None:
    import transformers
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=raw)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # None with "</s>": sentencepiece sees letters there, transformers the end of a text.
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == [processor.bos_id(), *processor.encode(text)], text
        assert tokenizer.decode(processor.encode(text)) == processor.decode(processor.encode(text))
