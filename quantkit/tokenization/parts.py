"""What the tokenizer.json of both kinds of tokenizer has in common."""

from __future__ import annotations

from typing import Any


def added_token(place: int, text: str) -> dict[str, Any]:
    """A special token: matched in the text as it stands, before any normalization, and skipped when decoding."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": place, "content": text, **flags}


def bos_template(text: str, place: int) -> dict[str, Any]:
    """The post-processor that puts the token in front of a text, and of each one of a pair."""

    def sequence(name: str, kind: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": text, "type_id": kind}}, {"Sequence": {"id": name, "type_id": kind}}]

    return {
        "type": "TemplateProcessing",
        "single": sequence("A", 0),
        "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": {text: {"id": text, "ids": [place], "tokens": [text]}},
    }


def isolate(pattern: str) -> dict[str, Any]:
    """The pre-tokenizer that cuts a text into what the regular expression matches and what lies between."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
