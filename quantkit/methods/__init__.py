"""The registry: one line per method. (name, bits) picks one, as `--method bnb --bits 4` does; bits is 0
where linears differ in them, and any number of bits is one that they have together."""

from __future__ import annotations

from typing import Any

from quantkit.methods import bnb_4bit, bnb_int8, bnb_mixed, exl2, gptq, gptq_mixed
from quantkit.methods.base import Method

METHODS: dict[tuple[str, int], Method[Any]] = {
    ("bnb", 4): bnb_4bit.METHOD,
    ("bnb", 8): bnb_int8.METHOD,
    ("bnb", 0): bnb_mixed.METHOD,
    **gptq.METHODS,
    ("gptq", 0): gptq_mixed.METHOD,
    ("exl2", 0): exl2.METHOD,
}


def find_method(name: str, bits: float, *, mixed: bool) -> Method[Any] | None:
    """The method of that name for so many bits, if there is one. mixed: linears are to differ in them."""
    if mixed:
        return METHODS.get((name, 0))
    return METHODS.get((name, int(bits))) if bits == int(bits) else None
