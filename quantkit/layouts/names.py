"""A two-way table of tensor names. Written once, native name beside canonical one; the reverse is derived."""

from __future__ import annotations

from collections.abc import Iterable


class NameTable:
    """Rows of (native, canonical); a `*` stands for an index, and the indices of both names are in one order."""

    def __init__(self, rows: Iterable[tuple[str, str]]) -> None:
        self.rows = tuple(rows)
        self._canonical = dict(self.rows)
        self._native = {canonical: native for native, canonical in self.rows}
        if not len(self._canonical) == len(self._native) == len(self.rows):
            raise ValueError("a name stands twice: the table has no reverse")

    def canonical(self, native: str) -> str | None:
        return _translate(native, self._canonical)

    def native(self, canonical: str) -> str | None:
        return _translate(canonical, self._native)


def pattern_of(name: str) -> tuple[str, list[str]]:
    """The name with its indices as `*`, and the indices. `07` is none: one tensor must not have two names."""
    parts = name.split(".")
    indices = [p for p in parts if _is_index(p)]
    return ".".join("*" if _is_index(p) else p for p in parts), indices


def fill(pattern: str, indices: Iterable[object]) -> str:
    """The inverse of `pattern_of`."""
    rest = iter(indices)
    return ".".join(str(next(rest)) if p == "*" else p for p in pattern.split("."))


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) < 10 and part == str(int(part))


def _translate(name: str, table: dict[str, str]) -> str | None:
    pattern, indices = pattern_of(name)
    target = table.get(pattern)
    if target is None or len(indices) != target.count("*"):  # a `*` in a stranger's name is no index
        return None
    return fill(target, indices)
