"""Several folders of one parent, side by side: size against quality, on one text."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.reader import read_json
from quantkit.checkpoint.writer import write_error, write_file
from quantkit.console import human_bytes, printable, table
from quantkit.errors import OutputError, SourceError, UsageError
from quantkit.evaluation import Evaluation
from quantkit.plots import can_plot, sizes_plot

JSON, MARKDOWN, PLOT = "comparison.json", "comparison.md", "comparison.png"


@dataclass(frozen=True)
class Compared:
    """One folder. weight_bytes: of its weight files. method: in words, as its manifest has it; empty for a folder that
    quantkit did not write. bits: per weight, over the whole model, where the manifest says it."""

    name: str
    method: str
    bits: float | None
    weight_bytes: int
    evaluation: Evaluation


@dataclass(frozen=True)
class Comparisons:
    """Folders, by size; `dominated`: names of those for which another is no larger and predicts no worse."""

    rows: tuple[Compared, ...]
    dominated: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def names_of(folders: Sequence[str | Path]) -> list[str]:
    """What each is called: its last part, or as it was given if another has that. UsageError for one named twice."""
    places = [os.path.realpath(folder) for folder in folders]
    if len(set(places)) < len(places):
        twice = next(str(f) for f, place in zip(folders, places, strict=True) if places.count(place) > 1)
        raise UsageError("a folder is named twice", where=twice, hint="name every folder once")
    last = [Path(place).name if Path(place).exists() else str(f) for f, place in zip(folders, places, strict=True)]
    return [name if last.count(name) == 1 else str(f) for f, name in zip(folders, last, strict=True)]


def check_tokens(rows: Sequence[Compared]) -> None:
    """UsageError if the last of them made other tokens of the text than the first: perplexities say nothing then."""
    first, last = rows[0], rows[-1]
    if first.evaluation.tokens_sha256 != last.evaluation.tokens_sha256:
        raise UsageError(
            f"{first.name} and {last.name} make other tokens of this text", where=last.name,
            hint="compare folders of one parent: their tokenizers are the same",
        )  # fmt: skip


def compared(folder: Path, name: str, weight_bytes: int, evaluation: Evaluation) -> Compared:
    method, bits = "", None
    try:
        manifest = read_json(folder / "quantkit.json")
        method, bits = str(manifest["method"]["title"]), float(manifest["result"]["model_bits_per_weight"])
    except (SourceError, KeyError, TypeError, ValueError):
        pass
    return Compared(name, method, bits, weight_bytes, evaluation)


def side_by_side(rows: Sequence[Compared]) -> Comparisons:
    ordered = sorted(rows, key=lambda row: (row.weight_bytes, row.name))
    dominated = [row.name for row in ordered if any(_dominates(other, row) for other in ordered)]
    return Comparisons(tuple(ordered), tuple(dominated))


def _dominates(one: Compared, other: Compared) -> bool:
    a, b = ((row.weight_bytes, _quality(row)) for row in (one, other))
    return a != b and a[0] <= b[0] and a[1] <= b[1]


def _quality(row: Compared) -> float:
    """The smaller, the better: KL divergence where it was measured, else the loss."""
    against = row.evaluation.against
    return row.evaluation.loss if against is None else against.kl


HEADER = ("folder", "method", "size", "bits/weight", "perplexity", "increase", "KL", "same top")


def _cells(row: Compared) -> tuple[str, ...]:
    found, other = row.evaluation, row.evaluation.against
    error = "" if found.perplexity_error is None else f" ± {found.perplexity_error:.3f}"
    bits = "" if row.bits is None else f"{row.bits:.3f}"
    apart = ("", "", "") if other is None else (f"{other.increase:+.2%}", f"{other.kl:.5f}", f"{other.agreement:.2%}")
    return row.name, row.method, human_bytes(row.weight_bytes), bits, f"{found.perplexity:.4f}{error}", *apart


def comparison_text(found: Comparisons) -> str:
    text = table([_cells(row) for row in found.rows], header=HEADER, right=(2, 3, 4, 5, 6, 7))
    first = found.rows[0].evaluation
    notes = [f"{first.text}, {first.windows:,} windows of {first.length:,} tokens"]
    if first.against is not None:
        notes.append(f"against {first.against.name}, perplexity {first.against.perplexity:.4f}")
    if found.dominated:
        notes.append(f"another is no larger and no worse than: {', '.join(found.dominated)}")
    return "\n".join([text, "", *notes])


def comparison_markdown(found: Comparisons) -> str:
    """A table for a card or a page; names are code, so nothing in them is markup."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---|---|" + "---:|" * 6]
    for row in found.rows:
        name, method, *rest = (printable(cell).replace("|", "\\|") for cell in _cells(row))
        lines.append("| " + " | ".join((f"`{name}`", method, *rest)) + " |")
    first = found.rows[0].evaluation
    note = f"Text: `{first.text}`, {first.windows:,} windows of {first.length:,} tokens (SHA-256 `{first.text_sha256}`)"
    if first.against is not None:
        note += f"; compared with `{first.against.name}`, perplexity {first.against.perplexity:.4f}"
    return "\n".join([*lines, "", note + ".", ""])


def check_comparison(out: Path) -> None:
    """OutputError where a comparison cannot be written; an earlier one may be replaced."""
    existing = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not os.access(existing, os.W_OK):
        raise OutputError("the comparison cannot be written", where=str(out), hint="name another -o")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out.name!r} is a file, not a folder", where=str(out.parent), hint="name another -o")
    others = sorted({p.name for p in out.iterdir()} - {JSON, MARKDOWN, PLOT}) if out.is_dir() else []
    if others:
        raise OutputError(
            f"the output folder holds other files ({', '.join(others[:3])})", where=str(out), hint="name another -o"
        )


def write_comparison(found: Comparisons, out: Path) -> None:
    against = found.rows[0].evaluation.against
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_file(out / JSON, (json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n").encode())
        plotted = can_plot()
        if plotted:
            points = [(row.name, row.weight_bytes, row.evaluation.perplexity) for row in found.rows]
            parent = None if against is None else against.perplexity
            write_file(out / PLOT, sizes_plot(points, parent, "perplexity"))
        image = f"\n![Size against perplexity]({PLOT})\n" if plotted else ""
        write_file(out / MARKDOWN, (comparison_markdown(found) + image).encode())
    except OSError as e:
        raise write_error(e, out) from None
