"""Chats as the model sees them: rendered by its own template, which nothing but transformers' sandbox may run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quantkit.calibration.data_tokenizer import load_with_transformers
from quantkit.checkpoint.header import quote
from quantkit.errors import InputError, SourceError

# Who speaks, in data sets that were written before there was a `role`.
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
         "assistant": "assistant", "model": "assistant", "system": "system"}  # fmt: skip

_Fail = Callable[[str, str], InputError]


@dataclass(frozen=True)
class Chats:
    """folder: of the model with the template; None for a model that is known to have none."""

    folder: Path | None

    def render(self, turns: list[Any], fail: _Fail) -> str:
        """A chat as text: objects with `role` and `content`, or with `from` and `value`. Imports torch.

        Raises what `fail(what, hint)` makes of a chat that is none or that the template refuses, and SourceError if
        there is no template.
        """
        messages = [_message(turn) for turn in turns]
        if not messages or None in messages:
            raise fail("is no chat", "a chat is a list of objects with role and content")
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        except SourceError:
            raise
        except Exception as e:  # a template may raise anything, and means the chat by it
            first = quote((str(e).strip() or type(e).__name__).splitlines()[0][:150])
            raise fail(f"is a chat that the model's template refuses: {first}", "take it out, or mend it") from None
        if not isinstance(text, str):
            raise fail("is a chat that the model's template makes no text of", "take it out, or mend it")
        return text

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = None if self.folder is None else load_with_transformers(self.folder)
        if getattr(tokenizer, "chat_template", None) is None:
            raise SourceError(
                "the text holds chats, and the model has no chat template",
                where="the native layout has none" if self.folder is None else str(self.folder),
                hint="add its chat_template.jinja, or name a text in which each document is a string",
            )
        return tokenizer


def _message(turn: Any) -> dict[str, Any] | None:
    if not isinstance(turn, dict):
        return None
    if isinstance(turn.get("role"), str):
        # Columns of a table have every key in every row; a template asks whether one is there.
        return {key: value for key, value in turn.items() if value is not None or key == "content"}
    speaker, said = turn.get("from"), turn.get("value")
    if isinstance(speaker, str) and isinstance(said, str):
        return {"role": ROLES.get(speaker, speaker), "content": said}
    return None
