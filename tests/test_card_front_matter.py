"""The metadata at the head of a card: the parent's licence, which nobody can make milder, and values that YAML and the
Hub read back as they were meant."""

from __future__ import annotations

from typing import Any

import pytest
from card_facts import APACHE, COMMIT, ENGLISH, JAPANESE, NONCOMMERCIAL, RAIL_IN_PROSE, SUM, facts, render
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from quantkit.card import FileRow, front_matter, validate_front_matter
from quantkit.errors import RecipeError

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
