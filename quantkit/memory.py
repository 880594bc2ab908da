"""How much RAM a run takes, known before it starts. The tests hold a real run's peak against these numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from quantkit.checkpoint.header import DTYPE_BITS
from quantkit.checkpoint.system import cores
from quantkit.checkpoint.views import SourceTensor
from quantkit.errors import UsageError
from quantkit.layer_memory import LayerMemory

MIB = 1 << 20
# Each constant stands some 20 % above what was measured, so that a plan is kept on machines unlike ours.
#
# The interpreter with numpy, Numba and the compiler that a first run needs: 200 MiB at the peak (166 with kernels
# from the cache).
BASE = 240 * MIB
# The interpreter with numpy, where tensors are only moved: no compiler.
BASE_COPY = 110 * MIB
# Before any slab is there, a tokenizer is converted: so many times the file that comes of it (22 and 34 were measured
# for tekken's 4.9 MB and SentencePiece's 1 MB), beside the interpreter alone.
INTERPRETER, TOKENIZER = 60 * MIB, 26
PARSED = 6  # and so many times the file that is only read, to see whether it fits (4.3 were measured)
# transformers and torch on top, where they are asked for an architecture that has no row in our table: 300 MiB.
BASE_DERIVED = 400 * MIB
# torch and bitsandbytes on top, where a GPU encodes: their CUDA libraries and context; and what a context takes there.
BASE_GPU = 2600 * MIB
CONTEXT = 600 * MIB
# What torch's allocator loses there between blocks, and libraries take to work in.
MARGIN = 512 * MIB
ENCODING = 4  # slabs on the GPU for each one that is encoded: its numbers, codes, and sums
SLAB = 4 * MIB
SMALLEST_SLAB = 1 * MIB
# Slabs read ahead of the workers: enough that a slow disk or a slow slab holds up nobody. Where slabs are whole
# tensors (transposed ones), a few must do.
AHEAD, AHEAD_WHOLE = 8, 2
HASH_BUFFER = 4 * MIB
# A tensor's encoder keeps a maximum per 64 weights and three sums per 1,024: 0.075 bytes a weight. Double quantization
# copies the maxima a few times: 0.4 bytes while the last slab is finished. At most two large tensors are between their
# first and last slab.
STATE_PER_WEIGHT = 0.35
TENSORS_IN_FLIGHT = 2
# The plan, the journal and the manifest in memory, for each output tensor: 2 KiB, and more where names are long.
PER_TENSOR = 3 << 10


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of RAM by purpose, and the settings that keep to them. `layers` is of a calibrated method, which works
    layer by layer once all slabs are done: the peak is that of the larger part. context: of a GPU's memory, what is
    taken whatever is done there; 0 without one."""

    threads: int
    in_flight: int
    slab: int
    base: int
    slabs: int
    state: int
    table: int
    layers: LayerMemory | None = None
    context: int = 0

    @property
    def on_gpu(self) -> int:
        """Bytes of numbers on a GPU."""
        if not self.context:
            return 0
        return ENCODING * self.threads * self.slab if self.layers is None else self.layers.at_work

    @property
    def gpu(self) -> int:
        """Bytes of a GPU at the least; what is free beyond them holds hidden states."""
        return self.context + MARGIN + self.on_gpu if self.context else 0

    @property
    def peak(self) -> int:
        both = self.table + 2 * HASH_BUFFER
        slabs = self.base + self.slabs + self.state + both
        return slabs if self.layers is None else max(slabs, self.layers.peak + both)


@dataclass(frozen=True)
class Work:
    """One tensor as the memory plan sees it: what is read, the granule in elements (0: it is one slab), whether it is
    encoded, and how much a worker makes of a slab, in slabs."""

    source: SourceTensor
    granule: int
    encoded: bool
    copies: float


def slab_elements(source: SourceTensor, granule: int, slab: int) -> int:
    """Elements in each slab of a tensor but the last, for slabs of about `slab` bytes."""
    if not granule:
        return source.numel
    return max(granule, slab * 8 // DTYPE_BITS[source.dtype] // granule * granule)


def plan_memory(
    work: Iterable[Work],
    *,
    tensors: int,
    threads: int | None,
    limit: int | None,
    device: str,
    derived: bool = False,
    generated: int = 0,
    parsed: int = 0,
) -> MemoryPlan:
    """MemoryPlan for a job that writes `tensors` tensors; `derived` if the architecture has no row in the table;
    `generated` bytes of tokenizer files are made, and `parsed` bytes of one read, before the weights are read.

    A slab is never smaller than a granule. With `limit` bytes, threads and slabs shrink until they fit; UsageError if
    even the smallest do not.
    """
    work = list(work)
    workers = threads or cores()
    encoded = [w.source.numel for w in work if w.encoded]
    state = int(STATE_PER_WEIGHT * TENSORS_IN_FLIGHT * max(encoded, default=0))
    base = BASE_GPU if device != "cpu" else BASE if encoded else BASE_COPY
    base = max(base, INTERPRETER + TOKENIZER * generated, INTERPRETER + PARSED * parsed) + 3 * generated
    base += BASE_DERIVED if derived else 0
    whole = max((w.source.nbytes for w in work if not w.granule), default=0)
    context = CONTEXT if device != "cpu" else 0

    def at(workers: int, slab: int) -> MemoryPlan:
        largest = beside = 0
        for w in work:
            size = slab_elements(w.source, w.granule, slab) * DTYPE_BITS[w.source.dtype] // 8
            size = min(max(size, slab), max(w.source.nbytes, slab))
            largest, beside = max(largest, size), max(beside, int(w.copies * size))
        in_flight = workers + (AHEAD_WHOLE if whole > SLAB else AHEAD)
        # A buffer for each slab in flight; with each worker what it makes of a slab.
        slabs = in_flight * largest + workers * beside
        return MemoryPlan(workers, in_flight, slab, base, slabs, state, PER_TENSOR * tensors, context=context)

    choices = [at(n, slab) for n in sorted({workers, 1}, reverse=True) for slab in (SLAB, SMALLEST_SLAB)]
    if limit is None:
        return choices[0]
    for plan in choices:
        if plan.peak <= limit:
            return plan
    least = choices[-1].peak
    raise UsageError(
        f"--max-memory {limit / MIB:,.0f} MiB is too little: this job needs {least / MIB:,.0f} MiB",
        hint=f"allow {-(-least // MIB)}MiB, or leave --max-memory out",
    )
