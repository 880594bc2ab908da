"""The card: what it says is true of the folder and of the parent, its code runs, and it has the planned width.
huggingface_hub and markdown-it are the real readers."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from card_facts import (
    APACHE,
    BROKEN,
    COMMIT,
    ENGLISH,
    JAPANESE,
    NONCOMMERCIAL,
    RAIL_IN_PROSE,
    SUM,
    assert_sound,
    facts,
    render,
)
from huggingface_hub import ModelCard, ModelCardData
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from quantkit.card import AUTO_GPTQ, FLOORS, ErrorRow, FileRow, front_matter, render_card, validate_front_matter

# ------------------------------------------------------------------------------------------ the five shapes of parents


@pytest.mark.parametrize(
    ("parent", "expected", "sentence"),
    [
        (
            NONCOMMERCIAL,
            {"license": "cc-by-nc-sa-4.0", "language": ["fr"], "datasets": ["acme/plays"]},
            "the weights may not be used commercially",
        ),
        (
            APACHE,
            {
                "license": "apache-2.0",
                "language": ["fr"],
                "inference": {"parameters": {"temperature": 1.0, "max_new_tokens": 200}},
            },
            "This is the licence of the parent",
        ),
        (
            RAIL_IN_PROSE,
            {"license": "bigscience-bloom-rail-1.0", "language": ["fr", "en"], "datasets": ["acme/owls_70k"]},
            "its metadata was recovered from lines of its text",
        ),
        (JAPANESE, {"license": "unknown"}, "sets no sliding window"),
        (ENGLISH, {"license": "unknown"}, "mentions `cc-by-nc-sa-4.0`"),
        (BROKEN, {"license": "apache-2.0", "language": ["fr"]}, "as read from its broken front matter"),
        (None, {"license": "unknown"}, "the parent has no model card"),
    ],
    ids=["non-commercial", "apache", "rail in prose", "japanese", "english", "broken", "none"],
)
def test_shapes_of_parents(parent: str | None, expected: dict[str, Any], sentence: str) -> None:
    text = render(parent)
    card = ModelCard(text)
    data = card.data.to_dict()
    constant = {
        "base_model": "acme/Owl-7B",
        "base_model_relation": "quantized",
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "quantized_by": "someone",
    }
    tags = ["bitsandbytes", "4-bit", "nf4", "quantized", "quantkit"] + ["pretrained"] * (parent == APACHE)
    assert data == constant | expected | {"tags": tags}
    assert data == front_matter(facts(parent))
    assert validate_front_matter(data) == []
    assert sentence in text
    assert ("**The licence is unknown.**" in text) == (expected["license"] == "unknown")
    assert_sound(text)


def test_tables_have_the_columns_they_announce() -> None:
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(render()).text)
    tables = [i for i, token in enumerate(tokens) if token.type == "table_open"]
    assert len(tables) == 6
    cells = [token.content for token in tokens if token.type == "inline"]
    assert {"9.350 %", "9.660 %", "4.13 GB", "14.48 GB", "4.127", f"`{SUM}`", "4,125,688,500"} <= set(cells)


def test_model_card_data_writes_the_same() -> None:
    data = front_matter(facts(NONCOMMERCIAL))
    assert yaml.safe_load(ModelCardData(**data).to_yaml()) == data


def test_the_card_says_what_a_stranger_asks() -> None:
    text = render(warnings=("Needs a GPU.",), stripped=("auto_map",))
    for part in (
        f"[`acme/Owl-7B`](https://huggingface.co/acme/Owl-7B/tree/{COMMIT}) at revision `{COMMIT}`",
        "quantized to 4 bits per weight with bitsandbytes NF4 with double quantization by quantkit 0.1.0",
        "Quality on a task or on text: not evaluated.",
        "Memory for the weights: 3.84 GiB",
        "`bitsandbytes>=0.49`",
        "- Needs a GPU.",
        "Removed from `config.json`: `auto_map`.",
        "7.24 billion",
        "https://arxiv.org/abs/2305.14314",
        "block_size: 64",
        "Written with quantkit `0.1.0`, numpy `2.4.6`.",
        "A quantized copy is a derivative",
        "load_in_4bit or similar",
    ):
        assert part in text
    assert "\n\n\n" not in text
    assert "not quantized" not in text


def test_source_without_a_hub_id_or_revision() -> None:
    text = render(base_model=None, source_name="/home/me/models/owl", revision=None)
    assert "This is `owl` (revision not recorded)" in text
    assert "base_model" not in ModelCard(text).data.to_dict()


def test_floors_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    readers = {"gptqmodel", "optimum", "compressed-tensors"}  # read what we write; we do not use them
    ours = {f"{name}>={floor}" for name, floor in FLOORS.items() if name not in readers}
    assert ours <= set(project["dependencies"])


def test_import_is_light() -> None:
    code = (
        "import time, sys; t = time.perf_counter(); import quantkit.card; t = time.perf_counter() - t; "
        "bad = {'torch', 'numpy', 'transformers', 'huggingface_hub'} & sys.modules.keys(); "
        "print(sorted(bad), 'fast' if t < 1 else t)"  # in truth 0.05 s; a loaded machine must not fail the test
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[] fast"


# ------------------------------------------------------------------------------------------ load snippet


def test_versions_for_auto_gptq_are_those_of_its_environment() -> None:
    path = Path(__file__).parent / "interop" / "requirements" / "autogptq.txt"
    assert {named.replace("auto-gptq", "auto_gptq") for named in AUTO_GPTQ} <= set(path.read_text().splitlines())
    assert "`auto-gptq==0.7.1`" in render(loader="auto-gptq")


@pytest.mark.parametrize("loader", ["transformers", "quantkit", "gptqmodel", "auto-gptq"])
@pytest.mark.parametrize("chat", [False, True])
def test_snippet_loads_this_folder_and_uses_only_names_it_defines(loader: Any, chat: bool) -> None:
    text = render(loader=loader, chat=chat, name='O"wl\\`7B')
    code = re.search(r"```python\n(.*?)\n```", text, re.DOTALL)[1]  # type: ignore[index]
    tree = ast.parse(code)
    stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    imported = {a.name for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    assert used <= stored | imported | vars(builtins).keys()
    loads = [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.Call) and ast.unparse(n.func).split(".")[-1][:4] in ("load", "from")
    ]
    assert [ast.unparse(call.args[0]) for call in loads] == ["PATH_OR_REPO_ID"] * 2
    assert code.count("PATH_OR_REPO_ID = ") == 1
    assert 'PATH_OR_REPO_ID = "path/or/repo-id"  # put the path of this folder here' in code
    assert 'PATH_OR_REPO_ID = "Owl-7B-nf4"  # put the path of this folder here' in render(loader=loader)
    assert ("apply_chat_template" in code) == chat
    assert ("quantkit.load" in code) == (loader == "quantkit")


# ------------------------------------------------------------------------------------------ fixed width


FRACTION = st.floats(0, 9.99)
HEX = st.text("0123456789abcdefABCDEF", min_size=64, max_size=64)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(FRACTION, min_size=4, max_size=4),
    st.lists(HEX, min_size=2, max_size=2),
    st.lists(st.integers(0, 10**12 - 1), min_size=2, max_size=2),
)
def test_measured_values_do_not_change_the_size(errors: list[float], sums: list[str], counts: list[int]) -> None:
    planned = facts()
    measured = dataclasses.replace(
        planned,
        errors=tuple(
            dataclasses.replace(row, mean=mean, worst=worst)
            for row, mean, worst in zip(planned.errors, errors[:2], errors[2:], strict=True)
        ),
        files=tuple(dataclasses.replace(row, sha256=value) for row, value in zip(planned.files, sums, strict=True)),
        nonfinite=tuple((kind, n) for (kind, _), n in zip(planned.nonfinite, counts, strict=True)),
    )
    text = render_card(measured)
    assert len(text.encode()) == len(render_card(planned).encode())
    assert f"`{sums[0].lower()}`" in text
    assert f"{errors[0] * 100:.3f} %" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9, 0.0, 1e-12])
def test_absurd_errors_keep_the_width(value: float) -> None:
    rows = (ErrorRow("a", 1, 1, value, value),)
    assert len(render(errors=rows)) == len(render(errors=(ErrorRow("a", 1, 1, 0.1, 0.2),)))


def test_a_sum_must_be_one() -> None:
    with pytest.raises(ValueError, match="SHA-256"):
        render(files=(FileRow("a", 1, "f" * 63),))


def test_rendering_is_deterministic() -> None:
    assert render() == render()


# ------------------------------------------------------------------------------------------ claims checked


@pytest.mark.parametrize(
    ("config", "stale"),
    [
        ({"sliding_window": None}, True),
        ({"model_type": "x"}, True),
        ({"sliding_window": 4096, "use_sliding_window": False}, True),
        ({"sliding_window": 4096}, False),
        ({"text_config": {"sliding_window": 512}}, False),
        ({"layer_types": ["full_attention", "sliding_attention"]}, False),
        ({}, False),  # nothing is known, so nothing is contradicted
    ],
)
def test_sliding_window_claim(config: dict[str, Any], stale: bool) -> None:
    assert ("sets no sliding window" in render(JAPANESE, config=config)) == stale


def test_the_parents_own_base_is_named_for_its_terms() -> None:
    assert "names `mistralai/Mistral-7B-v0.1` as what it was made from" in render(NONCOMMERCIAL)


SHARED = Path(__file__).parents[2] / "shared" / "data" / "cards"


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="real cards are not part of the repository: ../shared/data/cards is absent"
)
def test_real_cards() -> None:
    cards = sorted(SHARED.glob("*.md"))
    assert cards
    for path in cards:
        text = render(path.read_text(encoding="utf-8"))
        assert_sound(text)
        assert "Downloads last month" not in text


@pytest.mark.parametrize(("named", "asked", "heading"), [
    ("fr", None, "## En bref, en français"), (["fr"], None, "## En bref, en français"),
    ("ja", None, "## 日本語での概要"),
    (["fr", "en"], None, ""), ("de", None, ""), (None, None, ""), ("fr", "en", ""), ("en", "ja", "## 日本語での概要"),
    ("fr", "ja", "## 日本語での概要"),
])  # fmt: skip
def test_language_of_the_summary(named: Any, asked: str | None, heading: str) -> None:
    block = yaml.safe_dump({"license": "apache-2.0", **({"language": named} if named else {})})
    text = render(f"---\n{block}---\n# Parent\n", language=asked)
    headings = [line for line in text.splitlines() if line in ("## En bref, en français", "## 日本語での概要")]
    assert headings == ([heading] if heading else [])
    assert "No training took place." in text, "the English text is whole in any case"
    assert_sound(text, 11 if heading else 9)
