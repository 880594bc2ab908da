"""Every recipe that we publish: end to end on a small model of its kind, and planned at full size."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from card_numbers import unexplained
from eval_models import build, quiet_transformers, text_of
from huggingface_hub import ModelCard
from recipe_twins import FOLDER, RECIPES, TWINS, Twin, small, source_of
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit import api, job_memory
from quantkit.front_matter import validate_front_matter
from quantkit.recipe import load_recipe

FRENCH, JAPANESE = "## En bref, en français", "## 日本語での概要"


def test_every_recipe_has_a_twin_and_says_what_it_makes() -> None:
    assert {path.stem for path in RECIPES} == TWINS.keys()
    for path in RECIPES:
        assert path.read_text().startswith("# ")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_end_to_end(path: Path, tmp_path: Path) -> None:
    """Planned, run, verified against its source, evaluated, loaded, and its card read by the Hub's own reader."""
    twin, text, out = TWINS[path.stem], tmp_path / "text.txt", tmp_path / "out"
    text.write_text(text_of(3000))
    with quiet_transformers():
        source = source_of(twin, tmp_path)
        recipe = small(path, source, text)
        assert recipe.output
        recipe = recipe.model_copy(update={"output": str(out)})
        made = api.run_recipe(recipe)
        assert made.units
        found = quantkit.verify(out, source=str(source))
        assert found.problems == ()
        manifest = json.loads((out / "quantkit.json").read_text())
        bits = manifest["result"]["bits_per_weight"]
        assert (bits is None) == (twin.bits is None)
        if twin.bits is not None:
            assert twin.bits[0] < bits <= twin.bits[1]
        if twin.kind != "native" and manifest["result"]["layout"] == "hf":
            judged = quantkit.evaluate(
                out, str(text), against=str(source), windows=4, length=32, max_kl=50.0, record=True
            )
            assert judged.against is not None
            assert judged.against.kl > 0
        loads(twin, out)
    card = (out / "README.md").read_text()
    assert validate_front_matter(ModelCard(card).data.to_dict()) == []
    if twin.kind != "native":
        assert f"license: {twin.licence}" in card
    for heading in (FRENCH, JAPANESE):
        assert (heading in card.splitlines()) == (heading == twin.heading)
    assert unexplained(out) == []
    changed = re.sub(r"[1-9](?=\d* \|)", "7", card).replace("| 7", "| 9")
    assert changed != card
    (out / "README.md").write_text(changed)
    assert unexplained(out) != []


def loads(twin: Twin, out: Path) -> None:
    """Three tokens from the folder, by who is to load it."""
    if twin.loader == "nobody":
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other people's programs
        model: Any = quantkit.load(out) if twin.loader == "quantkit" else AutoModelForCausalLM.from_pretrained(out)
    ids = torch.tensor([[5, 6, 7]])
    if (out / "tokenizer.json").exists():
        ids = AutoTokenizer.from_pretrained(out)("a red b", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    assert torch.isfinite(logits).all()


# Published configurations, and how many parameters they have.
FULL: dict[str, tuple[str, int, dict[str, Any]]] = {
    "mistral-7b-instruct-v0.2-wanda-2pct": ("mistral", 7_241_732_096, {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768,
    }),
    "claire-7b-apache-bnb-4bit": ("falcon", 6_921_720_704, {
        "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "vocab_size": 65024,
        "multi_query": True, "new_decoder_architecture": False, "parallel_attn": True, "bias": False,
    }),
    "bloomz-560m-sft-chat-bnb-4bit": ("bloom", 559_214_592, {
        "hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250_880,
    }),
    "llama-3-8b-gptq4": ("llama", 8_030_261_248, {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 8192,
    }),
    "qwen3-8b-gptq-mixed-3.5": ("qwen3", 8_190_735_360, {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936, "max_position_embeddings": 40960,
    }),
}  # fmt: skip


def test_memory_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/memory.md says what a plan of Mistral-7B says."""
    monkeypatch.setattr(job_memory, "multiplies_in_bf16", lambda: True)
    _, _, config = FULL["mistral-7b-instruct-v0.2-wanda-2pct"]
    source = full_size(tmp_path / "source", "mistral", config)
    text = tmp_path / "text.txt"
    text.write_text(text_of(80_000) * 5)
    calibrated = {"calibration.text": str(text), "calibration.samples": 64, "calibration.length": 1024}
    jobs: list[dict[str, Any]] = [
        {"quantize.bits": 4},
        {"quantize.method": "gptq", **calibrated},
        {"quantize.method": "exl2", "quantize.bits": 4.0, **calibrated},
        {"prune.method": "wanda", "prune.sparsity": 0.02, **calibrated},
    ]
    plans = [
        api.plan_recipe(load_recipe(None, options={"source": str(source), "resources.threads": 2, **options}))[0]
        for options in jobs
    ]
    layers = plans[1].memory.layers
    assert layers is not None
    row = [plans[0].source_bytes, *(job.memory.peak for job in plans), layers.scratch, plans[0].weight_bytes]
    digits = (1, 2, 2, 2, 2, 1, 2)
    said = " | ".join(f"{n / 1e9:.{d}f}" for n, d in zip(row, digits, strict=True))
    assert f"| Mistral-7B | {said} |" in (FOLDER.parent / "docs" / "memory.md").read_text()


def full_size(folder: Path, kind: str, config: dict[str, Any]) -> Path:
    """A folder of that configuration with an index and no weights: what of a model is known before it is fetched."""
    folder.mkdir()
    made = AutoConfig.for_model(kind, dtype="bfloat16", **config)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    tied = set(model.all_tied_weights_keys)
    tensors = {name: t for name, t in model.state_dict().items() if name not in tied}
    (folder / "config.json").write_text(json.dumps(made.to_dict()))
    index = {
        "metadata": {"total_size": sum(2 * t.numel() for t in tensors.values())},
        "weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors"),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tokenizer = build(folder.parent / "tokens")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    return folder


@pytest.mark.parametrize("name", FULL)
def test_plan_at_full_size(name: str, tmp_path: Path) -> None:
    kind, parameters, config = FULL[name]
    text = tmp_path / "text.txt"
    text.write_text(text_of(40_000) * 2)
    source = full_size(tmp_path / "source", kind, config)
    options: dict[str, Any] = {"source": str(source)}
    if "\ncalibration:" in (FOLDER / f"{name}.yaml").read_text():
        options |= {"calibration.text": str(text), "calibration.samples": 4, "calibration.length": 512}
    job, _ = api.plan_recipe(load_recipe(FOLDER / f"{name}.yaml", options=options))
    assert job.parameters == parameters
    linears = sum(u.source.numel for u in job.units if u.linear is not None)
    if kind == "mistral":
        assert linears == 6_979_321_856
        assert job.to_prune == (138_346_496, 6_979_321_856)
        quantized, _ = api.plan_recipe(load_recipe(None, options={"source": str(source), "quantize.bits": 4}))
        assert quantized.weight_bytes == pytest.approx(4.13e9, rel=2e-3)
    elif kind == "bloom":
        assert 1 - linears / job.parameters == pytest.approx(0.46, abs=0.005)
        assert job.weight_bytes == pytest.approx(0.68e9, rel=0.02)
    elif name == "llama-3-8b-gptq4":
        assert job.bits_per_weight == pytest.approx(4.156, abs=0.01)
    elif name.startswith("qwen"):
        assert job.bits_per_weight is not None
        assert job.bits_per_weight <= 3.5
