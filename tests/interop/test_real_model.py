"""SmolLM2-135M-Instruct, a real model with outliers and real weights, against transformers and bitsandbytes.

Looked for in `.demo/` under the repository root (git ignores it); the demo fetches it there. Skipped where it is not.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_bnb_folders import (
    SETTINGS,
    compare_configs,
    compare_tensors,
    from_pretrained,
    logits_of,
    one_thread,  # noqa: F401
    write_peer,
)

import quantkit.api as api

SOURCE = Path(__file__).parents[2] / ".demo" / "SmolLM2-135M-Instruct"
SENTENCE = "The old lighthouse keeper climbed the stairs every evening, because"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SOURCE / "config.json").is_file(), reason=f"no model in {SOURCE}"),
]


@pytest.mark.parametrize("kind", SETTINGS)
def test_folder_is_the_peers(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    api.quantize(str(SOURCE), ours, {"quantize": SETTINGS[kind]})
    write_peer(SOURCE, theirs, SETTINGS[kind])
    # 30 layers of 7 linears, 61 norms, the embedding; per linear 5, 3 or 2 tensors beside its weight.
    companions = 2 if kind == "int8" else 5 if kind.endswith("nested") else 3
    assert compare_tensors(ours, theirs) == 30 * 7 * (1 + companions) + 61 + 1
    compare_configs(ours, theirs, {"lm_head", "model.embed_tokens"})
    ids = AutoTokenizer.from_pretrained(ours)(SENTENCE, return_tensors="pt").input_ids
    our_logits = logits_of(from_pretrained(ours), ids)
    assert our_logits.equal(logits_of(from_pretrained(theirs), ids))
    dense = logits_of(from_pretrained(SOURCE, dtype=torch.bfloat16), ids)
    assert not our_logits.equal(dense)
    assert our_logits[0, -1].argmax() in dense[0, -1].topk(5).indices


@pytest.mark.parametrize("kind", ["nf4-nested", "int8"])
def test_it_still_writes_english(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    api.quantize(str(SOURCE), tmp_path / "ours", {"quantize": SETTINGS[kind]})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    tokens = from_pretrained(tmp_path / "ours").generate(ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(tokens[0])
