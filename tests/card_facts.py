"""Facts for a card, parents' cards of every shape, and what holds for every card: what test_card*.py share."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from quantkit.card import CardFacts, ErrorRow, FileRow, read_parent_card, render_card

SUM = "0123456789abcdef" * 4
COMMIT = "89abcdef" * 5
APACHE = """---
language:
- fr
license: apache-2.0
pipeline_tag: text-generation
tags:
- pretrained
- custom_code
inference:
    parameters:
        temperature: 1.0
        max_new_tokens: 200
---

# Owl-7B

An owl that speaks. Load it with `load_in_4bit=True`.
"""
NONCOMMERCIAL = """---
license: cc-by-nc-sa-4.0
language: [fr]
base_model: mistralai/Mistral-7B-v0.1
datasets: [acme/plays]
---
Made from plays.
"""
RAIL_IN_PROSE = """Copied by a robot.
owl-chat - bnb 4bits
license: bigscience-bloom-rail-1.0
datasets:
- acme/owls_70k
language:
- fr
- en
pipeline_tag: text-generation
owl-chat
Answers in French.
- Downloads last month
- 7"""
JAPANESE = "フクロウ-7Bの概要\nSliding-Window Attention を使います。\nこのモデルはApache-2.0ライセンスです。\n"
ENGLISH = "Owl-Mistral-7B\n\nMade of plays that are CC-BY-NC-SA 4.0.\n\nTypical usage\n\nimport owls\n"
BROKEN = "---\nlicense: apache-2.0\ntags: [a\nlanguage: fr\n---\n# Owl\n"


def facts(parent: str | None = APACHE, **changes: Any) -> CardFacts:
    base = CardFacts(
        name="Owl-7B-nf4",
        base_model="acme/Owl-7B",
        source_name="acme/Owl-7B",
        revision=COMMIT,
        license=None,
        quantized_by="someone",
        parent=read_parent_card(parent),
        method_title="bitsandbytes NF4 with double quantization",
        bits=4,
        tags=("bitsandbytes", "4-bit", "nf4", "quantized", "quantkit"),
        settings=(("Block size", "64"), ("Compute type", "bfloat16")),
        source_bytes=14_483_464_192,
        output_bytes=4_125_687_808,
        bits_per_weight=4.127,
        model_bits_per_weight=4.56,
        parameters=7_241_732_096,
        architecture="MistralForCausalLM",
        kept=(("embed_tokens", 262_144_000), ("lm_head", 262_144_000)),
        errors=(
            ErrorRow("self_attn.q_proj", 32, 536_870_912, 0.0935, 0.0951),
            ErrorRow("mlp.up_proj", 32, 1_879_048_192, 0.0921, 0.0966),
        ),
        error_note="Over every quantized tensor, while it was written.",
        nonfinite=(("self_attn.q_proj", 0), ("mlp.up_proj", 0)),
        files=(FileRow("config.json", 900, SUM), FileRow("model.safetensors", 4_125_688_500, SUM)),
        loader="transformers",
        chat=False,
        warnings=(),
        config={"model_type": "mistral", "sliding_window": None},
        stripped=(),
        command="quantkit quantize acme/Owl-7B --recipe nf4.yaml --out Owl-7B-nf4",
        recipe_yaml="method: nf4\nblock_size: 64\n",
        versions=(("quantkit", "0.1.0"), ("numpy", "2.4.6")),
        plan_hash="ab" * 32,
        language="en",
    )
    return dataclasses.replace(base, **changes)


def render(parent: str | None = APACHE, **changes: Any) -> str:
    return render_card(facts(parent, **changes))


def assert_sound(text: str, headings: int = 9) -> None:
    """What holds for every card, whoever wrote the facts."""
    assert text.startswith(("---\nbase_model", "---\nlicense"))
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert "More Information Needed" not in text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\u200e\u200f]", text)
    text.encode()
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(text).text)
    assert sum(token.type == "heading_open" for token in tokens) == headings
    blocks = [token.content.strip() for token in tokens if token.type == "html_block"]
    ours = ["<details>\n<summary>Text of the parent's card</summary>", "</details>"]
    assert blocks in ([], ours)
    for token in tokens:
        for child in token.children or []:
            assert child.type != "image"
            if child.type == "html_inline":
                assert child.content in ("<code>", "</code>")
            if child.type == "link_open":
                address = child.attrs["href"]
                assert re.fullmatch(r"https://(huggingface\.co/acme/Owl-7B|arxiv\.org/abs/)[\w./]*", str(address))
