"""Text on a card that others wrote is inert: no parent and no fact can add a heading, a link, HTML or metadata."""

from __future__ import annotations

from typing import Any

import pytest
from card_facts import APACHE, SUM, assert_sound, render
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from quantkit.card import ErrorRow, FileRow, _code, _escape, _public
from quantkit.parent_card import clean_line

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
