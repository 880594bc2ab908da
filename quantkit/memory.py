"""How much RAM a run takes, known before it starts. The tests hold a real run's peak against these numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from quantkit.checkpoint.header import DTYPE_BITS, TensorInfo
from quantkit.checkpoint.system import cores
from quantkit.errors import UsageError

MIB = 1 << 20
# Each constant stands some 20 % above what was measured, so that a plan is kept on machines unlike ours.
#
# The interpreter with numpy, Numba and the compiler that a first run needs: 200 MiB at the peak (166 with kernels
# from the cache).
BASE = 240 * MIB
# transformers and torch on top, where they are asked for an architecture that has no row in our table: 300 MiB.
BASE_DERIVED = 400 * MIB
# torch and bitsandbytes on top, where a GPU encodes: their CUDA libraries and context.
BASE_GPU = 2600 * MIB
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
    """Bytes of RAM by purpose, and the settings that keep to them."""

    threads: int
    in_flight: int
    slab: int
    base: int
    slabs: int
    state: int
    table: int

    @property
    def peak(self) -> int:
        return self.base + self.slabs + self.state + self.table + 2 * HASH_BUFFER


def plan_memory(
    linears: Iterable[tuple[TensorInfo, bool, int]],
    *,
    tensors: int,
    threads: int | None,
    limit: int | None,
    device: str,
    derived: bool = False,
) -> MemoryPlan:
    """MemoryPlan for (source tensor, transposed, granule in elements) of every tensor to encode; `derived` if the
    architecture has no row in the table.

    A slab is never smaller than a granule; a transposed tensor is read whole. With `limit` bytes, threads and slabs
    shrink until they fit; UsageError if even the smallest do not.
    """
    linears = list(linears)
    workers = threads or cores()
    state = int(STATE_PER_WEIGHT * TENSORS_IN_FLIGHT * max((t.numel for t, _, _ in linears), default=0))
    base = (BASE if device == "cpu" else BASE_GPU) + (BASE_DERIVED if derived else 0)
    whole = max((t.nbytes for t, transposed, _ in linears if transposed), default=0)

    def at(workers: int, slab: int) -> MemoryPlan:
        largest = max([slab, whole, *(g * DTYPE_BITS[t.dtype] // 8 for t, _, g in linears)])
        in_flight = workers + (AHEAD_WHOLE if whole > SLAB else AHEAD)
        # A buffer for each slab in flight; with each worker what it encodes to, at most half of it (int8 from 16 bits),
        # and the copy that turns a transposed tensor.
        slabs = in_flight * largest + workers * (largest // 2 + whole)
        return MemoryPlan(workers, in_flight, slab, base, slabs, state, PER_TENSOR * tensors)

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
