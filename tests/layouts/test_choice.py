"""Which layout a folder is read in, and what comes back of a file that had to say more than it meant."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny
from oracle.native_models import make_native

import quantkit as package
from quantkit.errors import SourceError
from quantkit.layouts import open_checkpoint

BARE: dict[str, Any] = {"convert": {"tokenizer": False}}


def test_the_layout_that_has_weights_is_read(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(tiny("mistral"), both)
    assert open_checkpoint(both, prefer="mistral").layout == "hf"
    (both / "params.json").write_text("{}")  # no weights go with it
    assert open_checkpoint(both, prefer="mistral").layout == "hf"
    native = make_native(tmp_path / "native")
    for path in native.iterdir():
        shutil.copyfile(path, both / path.name)
    assert open_checkpoint(both, prefer="mistral").layout == "mistral"
    assert open_checkpoint(both, prefer="hf").layout == "hf"
    (both / "model.safetensors").unlink()
    assert open_checkpoint(both, prefer="hf").layout == "mistral"


def test_a_model_without_a_window_comes_back_from_2023_without_one(tmp_path: Path) -> None:
    source = make_tiny("llama", tmp_path / "llama", max_position_embeddings=2048)
    package.convert(str(source), tmp_path / "old", "mistral",
                    {"convert": {"tokenizer": False, "profile": "one-file-ref-2023"}})  # fmt: skip
    assert json.loads((tmp_path / "old" / "params.json").read_text())["sliding_window"] == 2048
    package.convert(str(tmp_path / "old"), tmp_path / "back", "hf", BARE)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


def test_norms_are_the_same_on_every_device(tmp_path: Path) -> None:
    whole = make_native(tmp_path / "whole", files="pth")
    weights = torch.load(whole / "consolidated.00.pth", weights_only=True)
    folder = tmp_path / "meta"
    folder.mkdir()
    params = json.loads((whole / "params.json").read_text())
    sizes = {k: params[k] for k in ("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "vocab_size")}
    (folder / "params.json").write_text(json.dumps({**sizes, "dim": 64, "multiple_of": 32}))
    below = ("wq", "wk", "wv", "w1", "w3", "output")
    for i in range(2):
        share = {}
        for name, w in weights.items():
            if w.dim() == 1:
                share[name] = w * (1 + i) if name == "norm.weight" else w.clone()
            else:
                axis = 0 if name.split(".")[-2] in below else 1
                share[name] = w.chunk(2, axis)[i].clone()
        torch.save(share, folder / f"consolidated.0{i}.pth")
    with pytest.raises(SourceError, match=r"'norm\.weight' is not the same in every shard"):
        package.convert(str(folder), tmp_path / "out", "hf", BARE)
