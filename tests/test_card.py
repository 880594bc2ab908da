"""The card: true metadata, inert quotations, fixed width. huggingface_hub and markdown-it are the real readers."""

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
from huggingface_hub import ModelCard, ModelCardData
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from quantkit.card import (
    AUTO_GPTQ,
    FLOORS,
    CardFacts,
    ErrorRow,
    FileRow,
    _code,
    _escape,
    _public,
    front_matter,
    read_parent_card,
    render_card,
    validate_front_matter,
)
from quantkit.errors import RecipeError
from quantkit.parent_card import clean_line

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


# ------------------------------------------------------------------------------------------ licence


def test_licence_may_be_repeated_or_named_but_not_changed() -> None:
    assert front_matter(facts(license="Apache 2.0"))["license"] == "apache-2.0"
    assert front_matter(facts(JAPANESE, license="apache-2.0"))["license"] == "apache-2.0"
    assert "whoever made this copy named this one" in render(JAPANESE, license="apache-2.0")
    assert front_matter(facts(None, license="mit"))["license"] == "mit"
    assert front_matter(facts("---\nlicense: unknown\n---\n", license="mit"))["license"] == "mit"
    for parent, wrong in (
        (NONCOMMERCIAL, "apache-2.0"),
        (APACHE, "unknown"),
        (APACHE, "other"),
        (RAIL_IN_PROSE, "mit"),
    ):
        with pytest.raises(RecipeError, match="cannot be relicensed") as caught:
            render(parent, license=wrong)
        assert caught.value.exit_code == 2


def test_licence_may_not_be_milder_than_one_in_the_parents_prose() -> None:
    with pytest.raises(RecipeError, match=r"names the licence cc-by-nc-sa-4\.0"):
        render(ENGLISH, license="mit")
    assert front_matter(facts(ENGLISH, license="cc-by-nc-sa-4.0"))["license"] == "cc-by-nc-sa-4.0"
    assert "If it does apply: the weights may not be used commercially;" in render(ENGLISH)


def test_unknown_licence_id_gets_a_hint() -> None:
    with pytest.raises(RecipeError, match=r"did you mean 'apache-2\.0'"):
        render(None, license="apache2.0")
    with pytest.raises(RecipeError, match="not a licence id"):
        render(None, license="other")


def test_two_licences_are_both_kept_and_neither_can_be_picked() -> None:
    parent = "---\nlicense: mit\nlicense: cc-by-nc-4.0\n---\n"
    assert front_matter(facts(parent))["license"] == ["mit", "cc-by-nc-4.0"]
    assert "take all of them as binding" in render(parent)
    with pytest.raises(RecipeError):
        render(parent, license="mit")


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (
            "license: other\nlicense_name: owl-1\nlicense_link: LICENSE",
            ("owl-1", f"https://huggingface.co/acme/Owl-7B/blob/{COMMIT}/LICENSE"),
        ),
        ("license: other\nlicense_name: owl-1\nlicense_link: https://a.org/x", ("owl-1", "https://a.org/x")),
        ("license: other\nlicense_link: 'javascript:alert(1)'", ("not-named-by-the-parent", None)),
        ("license: other\nlicense_link: ../../x", ("not-named-by-the-parent", None)),
        ("license: GPL-2.0-or-later", ("gpl-2.0-or-later", None)),
        ("license: '<script>'", ("script", None)),
    ],
)
def test_other_licences(block: str, expected: tuple[str, str | None]) -> None:
    data = front_matter(facts(f"---\n{block}\n---\n"))
    assert (data["license"], data["license_name"], data.get("license_link")) == ("other", *expected)


def test_a_licence_file_that_is_here_too_is_linked_here() -> None:
    parent = "---\nlicense: llama3.1\nlicense_link: LICENSE\n---\n"
    assert front_matter(facts(parent, files=(FileRow("LICENSE", 1, SUM),)))["license_link"] == "LICENSE"


# ------------------------------------------------------------------------------------------ validation

GOOD = {"license": "mit", "tags": ["a"], "base_model": "a/b", "base_model_relation": "quantized"}


def test_good_front_matter() -> None:
    assert validate_front_matter(GOOD) == []
    assert validate_front_matter(GOOD | {"language": ["fr", "pt-BR", "yue", "multilingual", "code", "no"]}) == []
    assert validate_front_matter(GOOD | {"widget": [{"text": "a\n---\nb"}], "x": "1e-5", "y": "no", "z": 1e-5}) == []


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"base_model": "/home/me/x"}, "base_model"),
        ({"base_model": "a/b\nlicense: mit"}, "base_model"),
        ({"base_model": ["a/b", "../x"]}, "base_model"),
        ({"base_model_relation": "copy"}, "base_model_relation"),
        ({"license": "apache2"}, "license"),
        ({"license": {"a": 1}}, "license"),
        ({"license": []}, "license"),
        ({"license": "other"}, "license_name"),
        ({"language": ["French"]}, "language"),
        ({"language": [False]}, "language"),
        ({"tags": "a"}, "tags"),
        ({"tags": ["a", 1]}, "tags"),
        ({"tags": ["a", "a"]}, "unique"),
        ({"tags": ["a\n---"]}, "line breaks"),
        ({"quantized_by": "x\u202ey"}, "unprintable"),
        ({"quantized_by": 3}, "short text"),
        ({"datasets": ["a b"]}, "datasets"),
        ({"x\ny": 1}, "line breaks"),
        ({"x": {1, 2}}, "cannot be written"),
        ({"x": (1, 2)}, "read back"),
        ({"x": float("nan")}, "cannot be written"),
        ({"x": object()}, "cannot be written"),
    ],
)
def test_bad_front_matter(change: dict[str, Any], part: str) -> None:
    problems = validate_front_matter(GOOD | change)
    assert problems
    assert part in problems[0]


def test_licence_must_be_there() -> None:
    assert validate_front_matter({}) == ["license is missing; write 'unknown' if it is not known"]


@pytest.mark.parametrize(
    "change", [{"quantized_by": "a\nlicense: mit"}, {"tags": ("a\n---\n",)}, {"base_model": "a/b/c"}]
)
def test_what_the_hub_would_refuse_is_the_recipes_fault(change: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as caught:
        render(**change)
    assert caught.value.exit_code == 2


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf", "Z"]), min_size=1, max_size=12), unique=True)
)
def test_front_matter_is_read_back_by_yaml_and_by_the_hub(tags: list[str]) -> None:
    if validate_front_matter(GOOD | {"tags": tags}):  # non-characters
        return
    data = ModelCard(render(None, tags=tuple(tags))).data.to_dict()
    assert data["tags"] == tags


@pytest.mark.parametrize(
    "text", ["no", "1e-5", "1_000", "12:30", "0x1f", "null", "~", "- a", "a: b", "#", "---", "=", "é", "'", '"']
)
def test_texts_that_yaml_might_misread(text: str) -> None:
    card = render(quantized_by=text)
    assert ModelCard(card).data.to_dict()["quantized_by"] == text
    line = next(line for line in card.split("\n") if line.startswith("quantized_by"))
    assert text not in ("no", "1e-5", "1_000", "12:30", "null", "~") or "'" in line


# ------------------------------------------------------------------------------------------ attacks

ATTACKS = [
    "---\nlicense: mit\n---\n# Owned\n",
    "text\n\n---\nlicense: mit\nbase_model: evil/x\n---\n",
    "</details><script>alert(1)</script>\n\n</details>\n\n<script>alert(1)</script>\n",
    "NUL \0 and \x1b[31m red \u202e reversed \u200f\u2066 x\n",
    "{{ 7 * 7 }} {% for x in y %} {{ facts.config }} {# gone #}",
    "[click](javascript:alert(1)) ![x](http://evil/pixel.png) <http://evil>\n\n[a]: http://evil\n\n# Owned",
    "\u2028---\u2028license: mit\u2028---\u2028",
    "a\r---\rlicense: mit\r---\r# Owned",
    *("`" * n + "\n\n# Owned\n\n" + "`" * n + "text\n" + "~" * n for n in range(3, 13)),
    "   ```\n# Owned\n\t````\n",
]


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("head", ["", "---\nlicense: apache-2.0\n---\n"])
def test_a_parents_text_cannot_act(attack: str, head: str) -> None:
    text = render(head + "x " + attack if not head else head + attack)
    assert_sound(text)
    data = ModelCard(text).data.to_dict()
    # Without a front matter, two known keys in a row count as the parent's own, and the card says where they stood.
    assert data["license"] == ("apache-2.0" if head else "mit" if "base_model: evil" in attack else "unknown")
    assert data["base_model"] == "acme/Owl-7B"
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(text).text)
    quotes = [token for token in tokens if token.type == "fence" and token.info == "text"]
    assert len(quotes) == 1
    assert tokens[-1].type == "html_block"
    assert tokens[-1].content.strip() == "</details>"
    assert "49" not in quotes[0].content
    if "{{" in attack:
        assert attack in quotes[0].content


NASTY = (
    "a|b `c` ``d`` <script>alert(1)</script> [x](http://evil) ![i](http://evil) **b** \\| \n# Owned\n---\n"
    "\u202e\0</details>&lt;"
)


@pytest.mark.parametrize(
    "text", [NASTY, "# x", "- a", "1. a", "```", "---", "***", "> q", "    code", "[a]: http://evil", "|", "\\"]
)
def test_no_fact_can_act(text: str) -> None:
    card = render(
        name=text,
        source_name=text,
        base_model=None,
        revision=text,
        method_title=text,
        settings=((text, text),),
        architecture=text,
        kept=((text, 1),),
        errors=(ErrorRow(text, 1, 1, 0.1, 0.1),),
        error_note=text,
        nonfinite=((text, 1),),
        files=(FileRow(text, 1, SUM),),
        warnings=(text, text),
        stripped=(text,),
        command=text,
        recipe_yaml=text,
        versions=((text, text), ("quantkit", text)),
        plan_hash=text,
    )
    assert_sound(card)
    plain = MarkdownIt("commonmark").enable("table").parse(ModelCard(render()).text)
    nasty = MarkdownIt("commonmark").enable("table").parse(ModelCard(card).text)

    def shape(tokens: Any) -> list[str]:
        return [token.type for token in tokens if token.type in ("table_open", "fence", "heading_open", "hr")]

    assert shape(nasty) == shape(plain)
    for start in (token for token in nasty if token.type == "tr_open"):
        assert start.level == 2


@settings(deadline=None, max_examples=80)
@given(st.text(st.one_of(st.sampled_from("`|<>[]()*_#-\\\n&!~ a1."), st.characters()), max_size=40))
def test_no_text_can_act(text: str) -> None:
    changes: dict[str, Any] = {"method_title": text, "warnings": (text,), "name": text, "settings": ((text, text),)}
    assert_sound(render(text, kept=((text, 1),), command=text, error_note="note " + text, **changes))


@settings(deadline=None)
@given(st.text(st.one_of(st.sampled_from("`|<>[]()*_#-\\&;!$:.1 aw"), st.characters()), min_size=1, max_size=30))
@example("&lt;b&gt; &amp;#58; &copy;")
@example("__init__ a_b _x_ **y** 1. 2) | \\| `` <i> $z$ [a](b)")
def test_escaped_text_is_shown_as_it_was(text: str) -> None:
    shown = clean_line(text)
    if not shown or shown != _public(shown):
        return
    for markdown in (_escape(text), _code(text)):
        tokens = MarkdownIt("commonmark").enable("table").parse(f"|x|\n|-|\n| {markdown} |")
        cells = [token for token in tokens if token.type == "inline"]
        assert len(cells) == 2
        parts = cells[1].children or []
        assert "".join(part.content for part in parts if part.type != "html_inline").strip() == shown.strip()


def test_a_huge_body_is_cut_and_said_to_be() -> None:
    text = render(APACHE + "line of an owl\n" * 60_000)
    assert_sound(text)
    assert len(text) < 80_000
    assert "the quotation ends after 64 thousand of its 900," in text


def test_placeholders_of_the_parent_are_not_repeated() -> None:
    text = render("# Owl\n\n- **Developed by:** [More Information Needed]\n- Language: owl\n")
    assert_sound(text)
    assert "Language: owl" in text
    assert "left to be filled in are not quoted" in text


def test_no_local_paths() -> None:
    text = render(
        source_name="/home/me/models/owl",
        base_model=None,
        command="quantkit quantize /home/me/models/owl --recipe=/home/me/r.yaml --out '/data/my disk/owl-nf4'",
        recipe_yaml="source: /home/me/models/owl\ncalibration: ~/texts/a.txt\nskip: ['model\\.layers\\.0\\..*']\n",
        warnings=("Read from /home/me/models/owl.",),
        settings=(("Source", "file:///home/me/models/owl"),),
    )
    assert "/home" not in text
    assert "/data" not in text
    assert "~/" not in text
    assert "quantkit quantize owl --recipe=r.yaml --out 'owl-nf4'" in text
    assert "skip: ['model\\.layers\\.0\\..*']" in text


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
    for path in sorted(SHARED.glob("*.md")):
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
