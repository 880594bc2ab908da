"""Draws the tables of `mixed_bits.py`: perplexity against bits per weight, a line for each method.

`curve.py TABLE.md OUT.png [--title TITLE]` reads rows `| method | … | bits per weight | … | perplexity | …` by the
names in the table's head.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path


def points(table: str) -> dict[str, list[tuple[float, float]]]:
    """(bits, perplexity) by method, by rising bits; those of the unquantized model under ""."""
    lines = [
        [cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines() if "|" in line
    ]
    head = next(cells for cells in lines if "bits per weight" in cells)
    bits, perplexity = head.index("bits per weight"), head.index("perplexity")
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for cells in lines:
        if cells != head and cells[perplexity].replace(".", "").isdigit():
            name = "" if cells[0] == "unquantized" else cells[0]
            found[name].append((float(cells[bits]), float(cells[perplexity])))
    return {name: sorted(own) for name, own in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--title", default="")
    a = parser.parse_args()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for name, own in points(a.table.read_text()).items():
        if not name:
            axes.axhline(own[0][1], color="0.6", linestyle=":", label="unquantized")
        else:
            axes.plot(*zip(*own, strict=True), marker="o", linestyle="-" if len(own) > 1 else "", label=name)
    axes.set(xlabel="bits per weight of the linears", ylabel="perplexity", yscale="log", title=a.title)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(a.out, dpi=150)


if __name__ == "__main__":
    main()
