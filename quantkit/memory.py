"""How much RAM a run takes, known before it starts. The tests hold a real run's peak against these numbers."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from quantkit.checkpoint.header import DTYPE_BITS, TensorInfo
from quantkit.errors import UsageError

MIB = 1 << 20
# The interpreter with numpy, Numba and the compiler that a first run needs: measured 250 MiB, with some air.
BASE = 320 * MIB
# torch and bitsandbytes on top, where a GPU encodes: their CUDA libraries and context.
BASE_GPU = 2600 * MIB
SLAB = 4 * MIB
SMALLEST_SLAB = 1 * MIB
HASH_BUFFER = 4 * MIB
# A tensor's encoder keeps a maximum per 64 weights and three sums per 1,024; double quantization copies the maxima a
# few times. At most two tensors are between their first and last slab.
STATE_PER_WEIGHT = 0.35
TENSORS_IN_FLIGHT = 2


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
) -> MemoryPlan:
    """MemoryPlan for (source tensor, transposed, granule in elements) of every tensor to encode.

    A slab is never smaller than a granule; a transposed tensor is read whole. With `limit` bytes, threads and slabs
    shrink until they fit; UsageError if even the smallest do not.
    """
    linears = list(linears)
    workers = threads or len(os.sched_getaffinity(0))
    state = int(STATE_PER_WEIGHT * TENSORS_IN_FLIGHT * max((t.numel for t, _, _ in linears), default=0))
    # The plan and its journal in memory: about 4 KB for each tensor of a large index.
    table = 4096 * tensors
    base = BASE if device == "cpu" else BASE_GPU

    def at(workers: int, slab: int) -> MemoryPlan:
        largest = max([slab, *(g * DTYPE_BITS[t.dtype] // 8 for t, _, g in linears)])
        # A slab in flight has its bytes and what they encode to; a transposed tensor is there twice over.
        whole = max((t.nbytes for t, transposed, _ in linears if transposed), default=0)
        in_flight = workers + 8
        return MemoryPlan(workers, in_flight, slab, base, 2 * max(largest, 2 * whole) * in_flight, state, table)

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
