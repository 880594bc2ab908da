"""Figures for published folders, drawn with matplotlib, which is an extra: `pip install quantkit[plot]`.

The same numbers make the same bytes, with one version of matplotlib: fonts are its own, and no date is written.
"""

from __future__ import annotations

import io
import warnings
from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

ALLOCATION = "allocation.png"
LAYERS = "layers.png"
INCHES, DPI = (10.0, 0.32), 100  # width of the figure, height of a row; dots per inch


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return find_spec("matplotlib") is not None


def allocation_plot(linears: Sequence[tuple[int, str, float, int]]) -> bytes:
    """A PNG of the bits per weight of linears (layer, kind, bits, weights): a column for each layer, a row for each
    kind. What has no layer is not in it; several of a kind in one layer, experts, count as their mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sums: dict[tuple[str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for layer, kind, bits, weights in linears:
        if layer >= 0:
            sums[kind, layer][0] += bits * weights
            sums[kind, layer][1] += weights
    kinds = list(dict.fromkeys(kind for kind, _ in sums))
    layers = max((layer for _, layer in sums), default=0) + 1
    table = np.full((len(kinds), layers), np.nan)
    for (kind, layer), (all_bits, all_weights) in sums.items():
        table[kinds.index(kind), layer] = all_bits / all_weights

    width, row = INCHES
    figure = Figure(figsize=(width, row * len(kinds) + 1.2), dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(table, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xticks(range(0, layers, max(1, layers // 16)))
    axes.set_xlabel("layer")
    axes.set_title("bits per weight")
    figure.colorbar(image, ax=axes)
    return _png(canvas)


def layers_plot(errors: Sequence[float]) -> bytes:
    """A PNG of relative errors behind each layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES[0], 3), dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.bar(range(len(errors)), [100 * error for error in errors], width=0.8)
    axes.set_xticks(range(0, len(errors), max(1, len(errors) // 16)))
    axes.set_xlabel("layer")
    axes.set_ylabel("% of the hidden state")
    axes.set_title("distance from the model that it was compared with, behind each layer")
    axes.margins(x=0.01)
    return _png(canvas)


def sizes_plot(points: Sequence[tuple[str, int, float]], parent: float | None, quality: str) -> bytes:
    """A PNG of named folders: bytes of their weights against `quality`, that of the parent as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES[0], 5), dpi=DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    sizes, values = [nbytes / 1e6 for _, nbytes, _ in points], [value for _, _, value in points]
    axes.scatter(sizes, values)
    for (name, _, value), size in zip(points, sizes, strict=True):
        # A dollar sign would begin a formula.
        axes.annotate(name.replace("$", r"\$"), (size, value), xytext=(5, 5), textcoords="offset points", fontsize=8)
    if parent is not None:
        axes.axhline(parent, linestyle="--", linewidth=1, color="grey")
    axes.set_xlabel("MB of weights")
    axes.set_ylabel(quality)
    axes.margins(0.12)
    return _png(canvas)


def _png(canvas: FigureCanvasAgg) -> bytes:
    found = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that its font does not have
        canvas.print_png(found, metadata={"Software": None})  # type: ignore[no-untyped-call]
    return found.getvalue()
