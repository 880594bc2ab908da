"""What Mistral's reference program of September 2023 (`one_file_ref.py`) demands of a folder, checked by us.

It builds a dataclass from `params.json`, so a key too many is as fatal as one too few; it knows one weight file and one
tokenizer; its RoPE base is a constant; and it loads names and shapes strictly.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from oracle.mistral import NativeModel, expected_shapes, greedy

THETA = 10_000.0


@dataclass
class Params2023:
    """The nine fields, all required. The program has a tenth, max_batch_size, and sets it itself; no release has it."""

    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    sliding_window: int
    vocab_size: int

    def __post_init__(self) -> None:
        """The program fails too, a little later, where torch gets null or "4096" for a size."""
        for name, value in vars(self).items():
            if type(value) is not (float if name == "norm_eps" else int):
                raise TypeError(f"{name} is {value!r}")


def load_2023(folder: Path) -> NativeModel:
    """As there: TypeError for params.json, FileNotFoundError for a missing file, RuntimeError for names and shapes."""
    params = json.loads((folder / "params.json").read_text())
    Params2023(**params)
    stored = torch.load(folder / "consolidated.00.pth", weights_only=True)
    expected = expected_shapes(params, tied=False, megablocks=False)  # it ties nothing and has no experts
    if wrong := {name: tuple(tensor.shape) for name, tensor in stored.items()}.items() ^ expected.items():
        raise RuntimeError(f"missing, unexpected or of another shape: {sorted(wrong)}")
    weights = {name: tensor.double() for name, tensor in stored.items()}
    return NativeModel(params, weights, THETA, [params["sliding_window"]] * params["n_layers"])


def tokens_2023(folder: Path, text: str) -> list[int]:
    """The prompt as it encodes it: always with the start token, never with the end token."""
    from sentencepiece import SentencePieceProcessor

    if not (folder / "tokenizer.model").exists():
        raise FileNotFoundError(folder / "tokenizer.model")
    processor = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return [processor.bos_id(), *processor.encode(text)]


def run_2023(folder: Path, prompt_ids: list[int], n: int) -> list[int]:
    """The n tokens that it would generate, greedily.

    Its mask for the prompt lets a query look back by `sliding_window`, so at one key more than the window, while a
    token generated later finds exactly a window of keys in the rolling cache. A prompt of one token has no mask.
    """
    tokens_2023(folder, "")
    model = load_2023(folder)
    return greedy(model, prompt_ids, n, prefill=len(prompt_ids))
