"""Small models of the recipes' kinds, and the recipes with sizes that these can take."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from eval_models import build
from oracle.native_models import make_native

from quantkit.recipe import Recipe, load_recipe

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))


@dataclass(frozen=True)
class Twin:
    """A small model of a recipe's kind. loader: who loads what is made of it here: transformers itself, quantkit.load,
    or nobody; loaders of GPTQ and EXL2 have environments of their own, see tests/interop. licence: of the parent."""

    kind: str
    loader: str = "transformers"
    licence: str = "apache-2.0"
    language: str = "en"
    changes: dict[str, Any] = field(default_factory=dict)
    bits: tuple[float, float] | None = None  # of the quantized linears; small layers carry their tables, 1.3 kB each
    heading: str = ""


FRENCH, JAPANESE = "## En bref, en français", "## 日本語での概要"
TWINS = {
    "bloomz-560m-sft-chat-bnb-4bit": Twin(
        "bloom", licence="bigscience-bloom-rail-1.0", language="fr", bits=(4.1, 8), heading=FRENCH
    ),
    "claire-7b-apache-bnb-4bit": Twin("falcon", "quantkit", language="fr", bits=(4.1, 8), heading=FRENCH),
    "claire-mistral-7b-exl2-4.0": Twin(
        "mistral",
        "nobody",
        licence="cc-by-nc-sa-4.0",
        language="fr",
        bits=(3.5, 4.0),
        heading=FRENCH,
        changes={"max_position_embeddings": 2048},  # room for what the card's code asks for
    ),
    "llama-2-7b-sparsity": Twin("llama", licence="llama2"),
    "llama-3-8b-gptq4": Twin("llama", "nobody", licence="llama3", bits=(4.1, 6)),
    "mistral-7b-instruct-v0.2-wanda-2pct": Twin("mistral", heading=JAPANESE),
    "mistral-7b-v0.1-from-mistral-src": Twin("native", bits=(4.1, 8)),
    "mistral-7b-v0.3-to-mistral-src": Twin("mistral", "nobody"),
    "mistral-nemo-base-2407-to-hf": Twin("native"),
    "mixtral-8x7b-wanda-2of4-gptq4": Twin("mixtral", "nobody", bits=(4.1, 7)),
    "qwen3-8b-gptq-mixed-3.5": Twin("qwen3", "nobody", bits=(3.0, 3.5)),
    "smollm2-135m-instruct-bnb-4bit": Twin("llama", bits=(4.1, 8)),
}


def source_of(twin: Twin, work: Path) -> Path:
    if twin.kind == "native":
        return make_native(work / "source", hidden_dim=128)
    source = build(work / "source", twin.kind, **twin.changes)
    card = {"license": twin.licence, "language": twin.language}
    (source / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n# Parent\n\nA model.\n")
    return source


def small(path: Path, source: Path, text: Path) -> Recipe:
    """The recipe, with a source, a text and sizes that a small model can take."""
    written = path.read_text()
    options: dict[str, Any] = {"source": str(source)}
    if "\nconvert:" in written:
        options["convert.tokenizer"] = False  # the small models have none of that kind
    if "\ncalibration:" in written:
        options |= {"calibration.length": 32, "calibration.samples": 16, "calibration.text": str(text)}
    if "group_size:" in written:
        options["quantize.group_size"] = 32
    return load_recipe(path, options=options)
