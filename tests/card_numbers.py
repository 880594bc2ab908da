"""Numbers of a card that no JSON file beside it has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# How a card says a value: itself, per cent, places of 100, kB, MB, GB, GiB.
SCALES = (1.0, 100.0, 1e-3, 1e-6, 1e-9, 2.0**-30)
# What is not the card's own statement of a number: code, pictures and links, the parent's text, versions of programs.
NOT_SAID = re.compile(
    r"^---\n.*?\n---\n|```.*?```|`[^`\n]*`|<details>.*?</details>|\]\([^)]*\)|^Minimum versions.*?$"
    r"|mistral-inference [\d.]+",
    re.S | re.M,
)
FILES = ("quantkit.json", "evaluation.json", "config.json", "params.json")
FRENCH = re.compile(r"^## En bref, en français\n.*?^La suite", re.S | re.M)
NUMBER = re.compile(r"(?<![\w.,:-])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w:]|\.\d)")


def values(tree: Any) -> Iterator[float]:
    """All numbers in a JSON value, those in its texts, too; and the part of weights that are zero, from counts."""
    if isinstance(tree, dict):
        for value in tree.values():
            yield from values(value)
        if "zeros" in tree and tree.get("weights"):
            yield tree["zeros"] / tree["weights"]
    elif isinstance(tree, list):
        for value in tree:
            yield from values(value)
        if tree and all(isinstance(value, dict) and "zeros" in value for value in tree):  # a table with a last row
            counts = [key for key, value in tree[0].items() if isinstance(value, int)]
            yield from values({key: sum(row[key] for row in tree) for key in counts})
    elif isinstance(tree, str):
        yield from (number(found) for found in NUMBER.findall(tree))
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield float(tree)


def number(text: str) -> float:
    return float(text.replace(",", ""))


def unexplained(folder: Path) -> list[str]:
    """The numbers in README.md's own sentences and tables that are not, as they are rounded there, a value of a JSON
    file in the folder."""
    card = NOT_SAID.sub(" ", (folder / "README.md").read_text())
    card = FRENCH.sub(lambda part: re.sub(r"(?<=\d),(?=\d)", ".", part[0]), card)
    files = [folder / name for name in FILES if (folder / name).exists()]
    known = [v for path in files for v in values(json.loads(path.read_text()))]
    found = []
    for text in NUMBER.findall(card):
        mantissa = text.partition("e")[0]
        decimals = len(mantissa.partition(".")[2])
        step = 10.0**-decimals * (10.0 ** int(text.partition("e")[2]) if "e" in text else 1.0)
        said = abs(number(text))
        if not any(abs(abs(v) * scale - said) <= 0.5001 * step for v in known for scale in SCALES):
            found.append(text)
    return found
