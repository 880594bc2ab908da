"""How much RAM and disk the layer stream takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantkit.errors import UsageError

MIB = 1 << 20
# The interpreter with torch, transformers, Numba and its compiler, which a first run needs (150 MiB less with kernels
# from the cache), and the holes in the heap that a long run leaves.
BASE = 850 * MIB
BASE_GPU = 2600 * MIB
FLOAT = 4
# Of a part of a weight, for each thread; solvers.threads has the same numbers, beside torch, which no plan loads.
MOST, LEAST, LARGEST, OF_GPU = 256, 48, 2**20, 2048
HOLES = 0.25  # what the heap keeps of freed blocks and of copies that products made: measured on a layer of a 7B model
# Of measuring (see measurer): rows and tokens that go forward and back, tokens whose logits are there at a time; rows
# of a trial, and kinds of linears that experts have.
SHORT_ROWS, SHORT, TOKENS = 8, 512, 64
TRIAL_ROWS, EXPERT_KINDS = 4, 3
PART = 12 * FLOAT  # bytes for each weight of these: its error, what is left to round, products, codes


Shapes = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class ExpertShape:
    """One expert: (rows, columns) of its linears to solve, and the number of its other parameters."""

    linears: Shapes
    others: int


@dataclass(frozen=True)
class LayerShape:
    """One decoder layer: (rows, columns) of its linears to solve, its experts, the bytes of a weight on disk, the most
    that one takes in memory, as it is on disk and as passes compute with it, and the number of its other parameters."""

    linears: Shapes
    experts: tuple[ExpertShape, ...]
    itemsize: int
    loaded: int
    others: int

    @property
    def of_experts(self) -> Shapes:
        return tuple(shape for expert in self.experts for shape in expert.linears)


@dataclass(frozen=True)
class StreamShape:
    """What the plan knows of the stream: rows of calibration text and their length, the width of the hidden states,
    the number of embedding rows in use at the most, and whether the full-precision model is followed; whether Hessians
    are made, or the norms of inputs are enough. made: bytes for each weight of the largest linear, beside what a solver
    of codes takes: masks, a pruned weight, what it is encoded to and decoded from. head: of a run that measures first
    what linears are worth, numbers in the head's matrix, and in one row of logits.
    sent: to how many experts a token. heads: of attention."""

    rows: int
    length: int
    width: int
    embedding: int
    full: bool
    hessian: bool = True
    made: int = 0
    head: tuple[int, int] | None = None
    sent: int = 1
    heads: int = 0


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of RAM by purpose while layers are solved; gradients: while a run goes back through the model; scratch:
    bytes of disk; on_gpu: whether all but `base` is on a GPU, and of that in RAM no more than weights."""

    base: int
    weights: int
    solver: int
    activations: int
    scratch: int
    gradients: int = 0
    on_gpu: bool = False

    @property
    def at_work(self) -> int:
        """Of these, what holds numbers."""
        return self.weights + max(self.solver + self.activations, self.gradients)

    @property
    def peak(self) -> int:
        return self.base + (self.weights if self.on_gpu else self.at_work)


def plan_layers(
    layers: Sequence[LayerShape], stream: StreamShape, *, threads: int, limit: int | None, device: str
) -> LayerMemory:
    """UsageError if they take more than `limit` bytes."""
    tokens = stream.rows * stream.length
    everything = [shape for layer in layers for shape in (*layer.linears, *layer.of_experts)]
    largest = max(max(shape) for shape in everything)
    workers = threads if device == "cpu" else None
    solver = max(_solver(layer, columns, stream, workers) for layer in layers for columns in _widths(layer))
    solver += stream.made * max(math.prod(shape) for shape in everything)
    # A row's way through a layer: the residual, the norm's output, what attention and the feed-forward part hold.
    activations = FLOAT * stream.length * (4 * stream.width + 4 * largest) + _scores(stream, stream.length, device)
    base = BASE if device == "cpu" else BASE_GPU
    scratch = FLOAT * tokens * max(_kept(layer, stream) for layer in layers)
    weights = max(map(_weights, layers))
    weights = max(FLOAT * stream.embedding * stream.width, weights)
    gradients = 0
    if stream.head is not None:
        matrix, vocabulary = stream.head
        short = min(stream.length, SHORT)
        saved = FLOAT * short * (12 * stream.width + 6 * largest) + _scores(stream, short, device)
        # The head as it is on disk, and in parts that autograd keeps; logits, probabilities, their sums and gradients.
        stored = layers[0].itemsize
        gradients = max(saved, (FLOAT + stored) * matrix + 10 * FLOAT * TOKENS * vocabulary)
        # A weight as a trial has it, read from where a layer's lie; hidden states of the model and of one for each kind
        # of linear, and what experts get and give in each.
        gradients = max(gradients, *(FLOAT * math.prod(shape) for shape in everything))
        scratch += max(FLOAT * _numbers((*layer.linears, *layer.of_experts)) for layer in layers)
        kinds = max(len(layer.linears) + EXPERT_KINDS * bool(layer.experts) for layer in layers)
        sent = stream.sent if any(layer.experts for layer in layers) else 0
        routed = sent * (2 * stream.width + 3)
        scratch += FLOAT * (kinds + 1) * TRIAL_ROWS * SHORT * (2 * stream.width + routed)
        states = stream.width * (len(layers) + 2) + (routed + (sent + 1) * stream.width if sent else 0)
        scratch = max(scratch, FLOAT * SHORT_ROWS * SHORT * states)
    memory = LayerMemory(base, weights, solver, activations, scratch, gradients, device != "cpu")
    if limit is not None and memory.peak > limit:
        raise UsageError(
            f"--max-memory {limit / MIB:,.0f} MiB is too little: this job needs {memory.peak / MIB:,.0f} MiB",
            hint=f"allow {-(-memory.peak // MIB)}MiB, or leave --max-memory out",
        )
    return memory


def _scores(stream: StreamShape, length: int, device: str) -> int:
    """Bytes of attention's scores, with a mask and their softmax. On a CPU they are never there whole; on a GPU they
    may be: for float32, torch has no kernel without them where several heads share keys."""
    return 0 if device == "cpu" else 3 * FLOAT * stream.heads * length**2


def _kept(layer: LayerShape, stream: StreamShape) -> int:
    """Numbers for each token on disk while a layer is under way: of each stream two files of hidden states, and what
    linears get. Of one at a time what experts get and give, and how tokens are sent to them, an index being two
    numbers; and what the last linear of one expert gets, which may be of all tokens."""
    streams = 2 if stream.full else 1
    kept = streams * (4 * stream.width + sum({columns for _, columns in layer.linears}))
    if layer.experts:
        kept += stream.sent * (2 * stream.width + 3)
        if stream.hessian:
            kept += max((columns for _, columns in layer.of_experts), default=0)
    return kept


def _weights(layer: LayerShape) -> int:
    """Bytes of a layer's parameters: of its experts those of one, and a new weight of it beside."""
    alone = FLOAT * layer.others + layer.loaded * _numbers(layer.linears)
    return alone + max((_weights_of_one(expert, layer.loaded) for expert in layer.experts), default=0)


def _weights_of_one(expert: ExpertShape, loaded: int) -> int:
    solved = max((math.prod(shape) for shape in expert.linears), default=0)
    return FLOAT * (expert.others + solved) + loaded * _numbers(expert.linears)


def _numbers(shapes: Shapes) -> int:
    return sum(rows * columns for rows, columns in shapes)


def _widths(layer: LayerShape) -> set[int]:
    return {columns for _, columns in (*layer.linears, *layer.of_experts)}


def _solver(layer: LayerShape, columns: int, stream: StreamShape, threads: int | None) -> int:
    """Bytes while linears with so many inputs are solved, all but experts taken for one group. threads: None on a GPU.

    The Hessian and its factor, what the linears are aimed at, the codes of the largest. To these comes what threads
    hold of some rows; or, when the factor is gone, the weight restored and packed.
    """
    tallest = max(rows for rows, c in (*layer.linears, *layer.of_experts) if c == columns)
    if not stream.hessian:
        sums = FLOAT * sum(c for _, c in layer.of_experts)
        return _parts(columns, tallest, threads) + sums
    aimed = sum(rows * c for rows, c in layer.linears if c == columns) if stream.full else 0
    matrix, codes = FLOAT * columns * columns, tallest * columns
    at_work = _parts(columns, tallest, threads)
    weighed = 0
    if stream.head is not None:  # measuring weighs tokens anew for every linear, and solves a whole weight, in float32
        weighed = matrix * sum(c == columns for _, c in layer.linears) + FLOAT * tallest * columns
    needed = matrix + weighed + FLOAT * aimed + codes + max(matrix + at_work, (FLOAT + 1) * tallest * columns)
    return needed + int(HOLES * (matrix + weighed + FLOAT * aimed))


def _parts(columns: int, tallest: int, threads: int | None) -> int:
    """Bytes that threads, or a GPU, hold of some rows."""
    if threads is None:
        return min(tallest, OF_GPU) * columns * PART
    return threads * min(tallest, max(min(MOST, LARGEST // columns), LEAST)) * columns * PART
