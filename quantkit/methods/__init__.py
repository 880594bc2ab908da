"""The registry: one line per method. (name, bits) picks one, as `--method bnb --bits 4` does."""

from __future__ import annotations

from typing import Any

from quantkit.methods import bnb_4bit, bnb_int8, gptq
from quantkit.methods.base import Method

METHODS: dict[tuple[str, int], Method[Any]] = {
    ("bnb", 4): bnb_4bit.METHOD,
    ("bnb", 8): bnb_int8.METHOD,
    **gptq.METHODS,
}
