"""Patterns that choose modules: `lm_head`, `mlp.down_proj`, `model.layers.0`, `*.layers.1?.self_attn.*`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from quantkit.errors import UsageError


def matches(module: str, pattern: str) -> bool:
    """Whether the pattern names the module, a part of it between dots, or a module that contains it."""
    return any(fnmatchcase(module, p) for p in (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*"))


def select(modules: Iterable[str], patterns: Sequence[str], what: str = "tensor") -> set[str]:
    """The modules, which are tensors or what else is said, that any pattern matches. A pattern that matches none is a
    UsageError: it is a typo."""
    modules = list(modules)
    chosen: set[str] = set()
    for pattern in patterns:
        found = {m for m in modules if matches(m, pattern)}
        if not found:
            raise UsageError(
                f"the pattern {pattern!r} matches no {what}",
                hint=f"a name looks like {modules[len(modules) // 2]!r}" if modules else "",
            )
        chosen |= found
    return chosen
