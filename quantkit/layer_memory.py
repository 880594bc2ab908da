"""How much RAM and disk the layer stream takes, and how much speed the RAM may buy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.errors import UsageError

MIB = 1 << 20
# The interpreter with torch, transformers, Numba and its compiler, which a first run needs (150 MiB less with kernels
# from the cache), and the holes in the heap that a long run leaves (200 MiB after 30 layers of a 135M model).
BASE = 850 * MIB
BASE_GPU = 2600 * MIB
# What a run takes where nothing is said, if it can: more rows in memory are faster, and change no bit.
COMFORTABLE = 950 * MIB
FLOAT = 4
# Of a row that is held: what Python's frames keep beside it, and holes that tensors leave between them. Measured.
SCATTERED = 1.6
MOST = 256  # rows that a thread solves at a time: solvers.threads
HOLES = 0.75  # what the heap keeps of freed blocks and of copies that products made: measured on a layer of a 7B model
PART = 12 * FLOAT  # bytes for each weight of these: its error, what is left to round, products, codes


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer: (rows, columns) of its linears to solve, of those that are experts', and the number of its
    other parameters."""

    linears: tuple[tuple[int, int], ...]
    experts: tuple[tuple[int, int], ...]
    others: int


@dataclass(frozen=True)
class StreamShape:
    """What the plan knows of the stream: rows of calibration text and their length, the width of the hidden states,
    the number of embedding rows in use at the most, and whether the full-precision model is followed."""

    rows: int
    length: int
    width: int
    embedding: int
    full: bool


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of RAM by purpose while layers are solved, and the settings that keep to them.

    held: rows whose stopped passes stay in memory; the others run the layer again up to where they stopped. It does not
    change what is written.
    """

    held: int
    base: int
    weights: int
    solver: int
    activations: int
    scratch: int  # bytes of disk, not of RAM

    @property
    def peak(self) -> int:
        return self.base + self.weights + self.solver + self.activations


def plan_layers(
    layers: Sequence[LayerShape], stream: StreamShape, *, threads: int, limit: int | None, device: str
) -> LayerMemory:
    """The fastest arrangement within `limit` bytes, or within a comfortable size where none is named.

    UsageError if even the leanest needs more than `limit`.
    """
    tokens = stream.rows * stream.length
    everything = [shape for layer in layers for shape in (*layer.linears, *layer.experts)]
    widest = max(columns for _, columns in everything)
    tallest = max(rows for rows, _ in everything)
    inputs = max(sum(sorted({c for _, c in (*layer.linears, *layer.experts)})) + 2 * stream.width for layer in layers)
    solver = max(_solver(layer, columns, stream, threads) for layer in layers for columns in _widths(layer))
    # A row's way through a layer: the residual, the norm's output, what attention and the feed-forward part hold.
    one_row = FLOAT * stream.length * (4 * stream.width + 4 * max(widest, tallest))
    per_row = int(SCATTERED * FLOAT * stream.length * (3 * stream.width + max(widest, 3 * stream.width)))
    base = BASE if device == "cpu" else BASE_GPU
    scratch = FLOAT * tokens * (4 * stream.width + inputs if stream.full else 2 * stream.width)

    largest_layer = max(layer.others + sum(r * c for r, c in (*layer.linears, *layer.experts)) for layer in layers)

    def at(held: int) -> LayerMemory:
        weights = FLOAT * max(largest_layer, stream.embedding * stream.width)
        return LayerMemory(held, base, weights, solver, one_row + held * per_row, scratch)

    leanest = at(0)
    if limit is not None and leanest.peak > limit:
        raise UsageError(
            f"--max-memory {limit / MIB:,.0f} MiB is too little: this job needs {leanest.peak / MIB:,.0f} MiB",
            hint=f"allow {-(-leanest.peak // MIB)}MiB, or leave --max-memory out",
        )
    room = (limit or COMFORTABLE) - leanest.peak
    return at(max(0, min(stream.rows, room // per_row)))


def _widths(layer: LayerShape) -> set[int]:
    return {columns for _, columns in (*layer.linears, *layer.experts)}


def _solver(layer: LayerShape, columns: int, stream: StreamShape, threads: int) -> int:
    """Bytes while linears with so many inputs are solved, all but experts taken for one group.

    The Hessian and its factor, what the linears are aimed at, codes of the largest three times. To these comes what
    threads hold of some rows; or, when the factor is gone, the weight restored and packed.
    """
    aimed = sum(rows * c for rows, c in layer.linears if c == columns) if stream.full else 0
    tallest = max(rows for rows, c in (*layer.linears, *layer.experts) if c == columns)
    matrix, codes = FLOAT * columns * columns, 3 * tallest * columns
    at_work = threads * min(tallest, MOST) * columns * PART
    needed = matrix + FLOAT * aimed + codes + max(matrix + at_work, (FLOAT + 1) * tallest * columns)
    return needed + int(HOLES * (matrix + FLOAT * aimed))
