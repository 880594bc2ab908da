"""The parent's card is read without failing, and nothing untrue is taken over from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.parent_card import (
    HUB_LICENCES,
    MAX_CARD,
    ParentCard,
    carried,
    carried_tags,
    clean_line,
    clean_text,
    core_scalar,
    is_hub_id,
    licences_mentioned,
    read_parent_card,
)

FLATTENED = """Copied by a robot.
some-chat - bnb 4bits
- Model creator: https://huggingface.co/acme/
Original description:
license: bigscience-bloom-rail-1.0
datasets:
- acme/wizards_70k
- beta/OIG
language:
- fr
- no
library_name: transformers
pipeline_tag: text-generation
inference:
parameters:
max_new_tokens: 128
widget:
- text: Bonjour ?
some-chat
A chat model that was made from another one.
- Downloads last month
- 7"""


def front(block: str, body: str = "# A model\n") -> ParentCard:
    return read_parent_card(f"---\n{block}\n---\n{body}")


def test_front_matter_is_read_as_plain_data() -> None:
    card = front(
        "language:\n- fr\nlicense: apache-2.0\ninference:\n    parameters:\n        temperature: 1.0\n        top_k: 10"
    )
    assert card.origin == "front matter"
    assert card.problems == ()
    assert card.body == "# A model"
    assert card.metadata == {
        "language": ["fr"],
        "license": "apache-2.0",
        "inference": {"parameters": {"temperature": 1.0, "top_k": 10}},
    }


def test_byte_order_mark_and_windows_line_ends() -> None:
    card = read_parent_card("\ufeff---\r\nlicense: mit\r\n---\r\n# A\r\n\r\nb\r\n")
    assert (card.origin, card.metadata, card.body) == ("front matter", {"license": "mit"}, "# A\n\nb")


@pytest.mark.parametrize("text", [None, "", " \n\t\n", "\ufeff"])
def test_no_card(text: str | None) -> None:
    assert read_parent_card(text) == ParentCard({}, "", "none", ("the parent has no model card",))


@pytest.mark.parametrize("body", ["# Model\n\nIn English.", "モデルの概要\nこのモデルは…", "---\n\nA rule, then text."])
def test_no_front_matter(body: str) -> None:
    card = read_parent_card(body)
    assert (card.metadata, card.body, card.origin) == ({}, body, "none")
    assert card.problems == ("the card has no front matter",)


def test_empty_front_matter() -> None:
    assert read_parent_card("---\n---\ntext") == ParentCard({}, "text", "front matter", ())


def test_norwegian_is_a_language_and_dates_are_text() -> None:
    card = front(
        "language:\n- no\n- 'on'\ndate: 2024-01-01\ntime: 12:30:00\nlr: 1e-5\nodd: 0o17\nyes: y\nflag: true\nx: ~"
    )
    assert card.metadata == {
        "language": ["no", "on"],
        "date": "2024-01-01",
        "time": "12:30:00",
        "lr": 1e-5,
        "odd": "0o17",
        "yes": "y",
        "flag": True,
        "x": None,
    }


def test_quoted_scalars_stay_text() -> None:
    assert front("a: '1'\nb: \"true\"\nc: |\n  license: mit\n  x").metadata == {
        "a": "1",
        "b": "true",
        "c": "license: mit\nx",
    }


def test_duplicate_keys_are_noticed_and_no_licence_is_lost() -> None:
    card = front("license: mit\nlicense: cc-by-nc-4.0\npipeline_tag: a\npipeline_tag: b")
    assert card.metadata == {"license": ["mit", "cc-by-nc-4.0"], "pipeline_tag": "b"}
    assert len(card.problems) == 2
    assert "'license' stands twice" in card.problems[0]


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ("license: apache-2.0\ntags: [a\nlanguage: fr", "line 4"),
        ("license: apache-2.0\n\ttabs: x", "not sound YAML"),
        ("license: apache-2.0\na: &x [1]\nb: [*x, *x]", "aliases"),
        ("license: apache-2.0\na: " + "[" * 60 + "]" * 60, "nested too deeply"),
        ('license: apache-2.0\na: "\\UFFFFFFFF"', "malformed number or escape"),
        ("license: apache-2.0\na: " + "x" * 70_000, "longer than"),
        ("license: apache-2.0\na: 'open", "not sound YAML"),
        ("license: apache-2.0\na: {{ template }}: x", "not sound YAML"),
    ],
)
def test_broken_yaml_is_survived_and_simple_lines_are_saved(block: str, reason: str) -> None:
    card = front(block)
    assert card.origin == "broken"
    assert card.metadata["license"] == "apache-2.0"
    assert reason in card.problems[0]
    assert "license" in card.problems[1]
    assert card.body.startswith("---\nlicense"), "what could not be read stays visible in the quotation"


def test_broken_yaml_saves_only_what_is_unambiguous() -> None:
    card = front("license: mit\nlicense: apache-2.0\nlanguage: [fr, 'en']\npipeline_tag: a b\nx: [")
    assert card.metadata == {"language": ["fr", "en"]}
    assert any("'license' has several values" in problem for problem in card.problems)


def test_front_matter_that_is_never_closed() -> None:
    card = read_parent_card("---\nlicense: mit\nlanguage: fr\n\n# Text\nlicense: gpl-3.0\n")
    assert card.origin == "broken"
    assert card.metadata == {"license": "mit", "language": ["fr"]}
    assert "never closed" in card.problems[0]


@pytest.mark.parametrize("block", ["- a\n- b", "just words", "42"])
def test_front_matter_that_is_not_a_mapping(block: str) -> None:
    card = front(block)
    assert (card.origin, card.metadata) == ("broken", {})
    assert card.problems == ("the front matter is not a mapping of keys to values",)
    assert block in card.body


def test_objects_in_yaml_are_never_built() -> None:
    card = front("a: !!python/object/apply:os.system ['true']\nb: !!timestamp nonsense\nc: !!binary '!'")
    assert card.metadata == {"a": ["true"], "b": "nonsense", "c": "!"}


def test_metadata_flattened_into_prose() -> None:
    card = read_parent_card(FLATTENED)
    assert card.origin == "prose"
    assert card.metadata == {
        "license": "bigscience-bloom-rail-1.0",
        "datasets": ["acme/wizards_70k", "beta/OIG"],
        "language": ["fr", "no"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    assert any("recovered from lines of its text" in problem for problem in card.problems)
    assert "Downloads last month" not in card.body
    assert any("page" in problem for problem in card.problems)


@pytest.mark.parametrize(
    "text",
    [
        "Write\nlicense: mit\nin the header of your file.",  # one known key alone
        "```yaml\nlicense: mit\nlanguage: en\n```\n",  # an example
        "license: anything goes\nlanguage: Esperanto, mostly\n",  # implausible values
        "license: mit\nlanguage:\n\ntext\n\nlicense: gpl-3.0\ntags:\n",  # says two things
    ],
)
def test_prose_that_is_not_metadata(text: str) -> None:
    card = read_parent_card(text)
    assert (card.origin, card.metadata) == ("none", {})


def test_size_cap() -> None:
    card = read_parent_card("---\nlicense: mit\n---\n" + "x" * (MAX_CARD + 5))
    assert card.metadata == {"license": "mit"}
    assert len(card.body) < MAX_CARD
    assert "longer than" in card.problems[0]


def test_control_and_direction_characters_are_removed() -> None:
    card = read_parent_card("---\nlicense: m\0it\n---\na\u202eb\x1b[31m\u2028c\ud800d\U000e0041")
    assert card.metadata == {"license": "mit"}
    assert card.body == "ab[31m\ncd"
    assert "removed" in card.problems[0]


@settings(deadline=None)  # the machine may be busy
@given(st.text(st.characters(), max_size=200))
def test_any_text_is_read(text: str) -> None:
    for candidate in (text, f"---\n{text}\n---\n{text}", f"---\nlicense: mit\n{text}"):
        card = read_parent_card(candidate)
        card.body.encode()
        yaml.safe_dump(dict(card.metadata)).encode()
        carried(card), carried_tags(card), licences_mentioned(card.body)


@settings(deadline=None)  # the machine may be busy
@given(st.text(max_size=50))
def test_cleaning_is_idempotent(text: str) -> None:
    assert clean_text(clean_text(text)) == clean_text(text)
    line = clean_line(text)
    assert clean_line(line) == line
    assert len(line.splitlines()) <= 1


@settings(deadline=None)  # the machine may be busy
@given(st.one_of(st.text("ab9_-./", max_size=12), st.text(max_size=8), st.from_regex(r"[\w.-]{94,98}", fullmatch=True)))
def test_hub_ids_as_huggingface_hub_sees_them(text: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        assert not is_hub_id(text)
    else:
        assert is_hub_id(text)


@settings(deadline=None)  # the machine may be busy
@given(
    st.one_of(st.text("0123456789.eE+-", max_size=6), st.sampled_from(["null", "~", "", "TRUE", "False", "no", "y"]))
)
def test_core_scalars_agree_with_python_numbers(text: str) -> None:
    value = core_scalar(text)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        assert float(text) == value


def test_what_is_carried_over() -> None:
    data, notes = carried(
        front(
            "language: [fr, pt-BR, French, NO]\npipeline_tag: Text Generation\ndatasets: [a/b, a/b, ../c, 7]\n"
            "inference:\n  parameters:\n    top_k: 10\n    stop: ['</s>', \"\\n\"]\n"
            "widget:\n- text: Hi\n  junk: 1\n- nonsense\n- messages:\n  - role: user\n    content: Hi\n- messages: [1]"
        )
    )
    assert data == {
        "language": ["fr", "pt", "no"],
        "language_bcp47": ["pt-BR"],
        "pipeline_tag": "text-generation",
        "datasets": ["a/b"],
        "inference": {"parameters": {"top_k": 10, "stop": ["</s>", "\n"]}},
        "widget": [{"text": "Hi"}, {"messages": [{"role": "user", "content": "Hi"}]}],
    }
    assert [note.split("parent's ")[1].split()[0] for note in notes] == [
        "language",
        "pipeline_tag",
        "datasets",
        "widget",
    ]


@pytest.mark.parametrize(
    "inference", ["{parameters: 3}", "{parameters: {a: {b: 1}}}", "{x: 1}", "[1]", "{parameters: {'a b': 1}}"]
)
def test_malformed_inference_is_left_out(inference: str) -> None:
    data, notes = carried(front(f"inference: {inference}"))
    assert "inference" not in data
    assert len(notes) == 1


def test_inference_may_be_switched_off() -> None:
    assert carried(front("inference: false"))[0]["inference"] is False


def test_tags_that_are_no_longer_true_are_dropped() -> None:
    card = front(
        "tags: [pretrained, custom_code, gguf, GPTQ, exl2, 8-bit, 4.0bpw, 4bit, q4_k_m, pytorch, 'license:mit', "
        "'base_model:a/b', conversational, 7, '', quantized, merge, 'arxiv:1234.5678', 3d, qwen2]"
    )
    assert carried_tags(card) == ["pretrained", "conversational", "merge", "arxiv:1234.5678", "3d", "qwen2"]


def test_licences_named_in_prose() -> None:
    text = "Data under CC-BY-NC-SA licenses, so: the CC-BY-NC-SA 4.0 license. MIT license. Apache License, Version 2.0"
    assert licences_mentioned(text) == ("cc-by-nc-sa-4.0", "mit", "apache-2.0")
    assert licences_mentioned("このモデルはApache-2.0ライセンスの下で") == ("apache-2.0",)
    assert licences_mentioned("Beats Llama3.1 8B; submitted; commit") == ()


def test_the_licence_list() -> None:
    assert len(HUB_LICENCES) > 75
    assert {"apache-2.0", "cc-by-nc-sa-4.0", "bigscience-bloom-rail-1.0", "llama3.3", "unknown"} <= HUB_LICENCES
    assert all(name == name.lower() for name in HUB_LICENCES)


SHARED = Path(__file__).parents[2] / "shared" / "data" / "cards"


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="real cards are not part of the repository: ../shared/data/cards is absent"
)
@pytest.mark.parametrize(
    ("file", "origin", "licence", "mentioned"),
    [
        ("bloomz-560m-sft-chat-bnb-4bits.md", "prose", "bigscience-bloom-rail-1.0", "bigscience-bloom-rail-1.0"),
        ("claire-7b-apache-0.1.md", "front matter", "apache-2.0", "apache-2.0"),
        ("claire-mistral-7b-exl2.md", "none", None, "cc-by-nc-sa-4.0"),
        ("mistral-7b-instruct-v0.2-wanda-2pct-ja.md", "none", None, "apache-2.0"),
        ("mistral-7b-v0.1-notes.md", "none", None, "apache-2.0"),
    ],
)
def test_real_cards(file: str, origin: str, licence: str | None, mentioned: str) -> None:
    card = read_parent_card((SHARED / file).read_text(encoding="utf-8"))
    assert card.origin == origin
    assert card.metadata.get("license") == licence
    assert licences_mentioned(card.body) == (mentioned,)
