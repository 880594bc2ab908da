"""What each linear would cost in each mix of bits, as a file; and the mixes that lose least within a budget.

A loss is in nats a token: by how much the model's distribution is expected to move (KL divergence) when this linear
alone is written so, to second order. It is measured once for a model and a text; allocating bits from it takes no time,
for as many sizes as are wanted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantkit.checkpoint.reader import SourceFiles, elements
from quantkit.errors import UsageError
from quantkit.layouts import Checkpoint
from quantkit.methods.base import WeightSpec
from quantkit.methods.exl2 import OPTIONS, Exl2
from quantkit.methods.exl2_format import Mix
from quantkit.patterns import select
from quantkit.solvers.allocation import BudgetError, Option, allocate

FORMAT = 1
PROBE = 4096  # elements at either end of a weight that tell it from another


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class LinearLosses(_Table):
    """rows, columns: of the weight. losses: by mix, in nats a token, of each that was tried."""

    rows: int = Field(gt=0)
    columns: int = Field(gt=0)
    losses: dict[str, float]


class Measurement(_Table):
    """weights: a digest of the model's linears. tokens: SHA-256 of the ids that were looked at, rows of `length`."""

    format: int
    quantkit: str
    source: str
    weights: str
    text: str
    tokens: str
    rows: int
    length: int
    linears: dict[str, LinearLosses]

    @property
    def losses(self) -> dict[str, dict[str, float]]:
        """By module and mix."""
        return {module: linear.losses for module, linear in self.linears.items()}

    def to_bytes(self) -> bytes:
        return (json.dumps(self.model_dump(), indent=1, ensure_ascii=False) + "\n").encode()


def read_measurement(path: Path) -> Measurement:
    """UsageError for a file that is none."""
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise UsageError(
            f"the measurement cannot be read: {e.strerror}", where=str(path), hint="`quantkit measure` writes one"
        ) from None
    try:
        found = Measurement.model_validate_json(raw)
        if found.format != FORMAT:
            raise ValueError(f"its format is {found.format}, this version knows {FORMAT}")
        for linear in found.linears.values():
            for mix, loss in linear.losses.items():
                Mix.parse(mix)
                if not 0 <= loss < float("inf"):
                    raise ValueError(f"a loss is {loss}")
    except (ValidationError, ValueError) as e:
        why = "its keys are others" if isinstance(e, ValidationError) else str(e).partition("\n")[0]
        raise UsageError(
            f"this is no measurement that can be used: {why}", where=str(path), hint="measure again"
        ) from None
    return found


def digest_of_weights(checkpoint: Checkpoint, files: SourceFiles, modules: Iterable[str]) -> str:
    """Tells a model's linears from those of another, or of another step of its training: SHA-256 of their names, shapes
    and dtypes, and of some elements of each. Empty where one of them is not there."""
    found = hashlib.sha256()
    for module in sorted(modules):
        tensor = checkpoint.tensors.get(f"{module}.weight")
        if tensor is None:
            return ""
        found.update(f"{module} {tensor.dtype} {list(tensor.shape)}\n".encode())
        step = tensor.granule or tensor.numel
        count = min(-(-PROBE // step) * step, tensor.numel)
        found.update(elements(tensor, files, 0, count).tobytes())
        found.update(elements(tensor, files, (tensor.numel - count) // step * step, count).tobytes())
    return found.hexdigest()


def check_fits(found: Measurement, path: Path, *, weights: str, specs: Sequence[WeightSpec]) -> None:
    """UsageError if it is of another model, whose digest is `weights`, or does not know one of these linears."""
    missing = [s.module for s in specs if s.module not in found.linears]
    other = [s.module for s in specs if s.module not in missing and _shape(found, s) != (s.rows, s.columns)]
    if missing or other or found.weights != weights:
        what = "its weights are others"
        if missing:
            what = f"it knows nothing of {missing[0]}"
        elif other:
            what = f"{other[0]} is {list(_shape(found, next(s for s in specs if s.module == other[0])))} there"
        raise UsageError(
            f"the measurement is of another model, {found.source!r}: {what}", where=str(path),
            hint="leave --measurement out, or measure this model",
        )  # fmt: skip


def _shape(found: Measurement, spec: WeightSpec) -> tuple[int, int]:
    return found.linears[spec.module].rows, found.linears[spec.module].columns


Losses = Mapping[str, Mapping[str, float]]  # in nats a token, by module and mix


@dataclass(frozen=True)
class Allocated:
    """bits: per weight of all linears, companions included. loss: expected, in nats a token, None where nothing was
    measured; bound: no allocation from these losses can have less. assumed: a stand-in decided."""

    bits: float
    loss: float | None
    bound: float
    assumed: bool


def allocated(params: Exl2, specs: Sequence[WeightSpec], losses: Losses | None) -> tuple[Exl2, Allocated]:
    """The parameters with a mix for each linear: those that lose least within `params.bits` a weight. UsageError where
    that is too little.

    What `params.mixes` names, by module or pattern, the last that matches, is not up for choice, but counts.
    """
    modules = [spec.module for spec in specs]
    pinned = {module: mix for pattern, mix in params.mixes.items() for module in select(modules, [pattern])}
    known = assumed_losses(specs) if losses is None else losses
    items: dict[str, list[Option]] = {}
    mixes: dict[str, list[str]] = {}
    for spec in specs:
        own = known.get(spec.module, {})
        names = [pinned[spec.module]] if spec.module in pinned else list(own)
        costs = {name: Mix.parse(name).cost(spec) for name in names}
        if spec.module not in pinned:
            names = [n for n in names if params.min_bits <= costs[n] / spec.numel <= params.max_bits]
        if not names:
            raise UsageError(
                f"no mix of {spec.module} has between {params.min_bits:g} and {params.max_bits:g} bits per weight",
                hint="allow more with --min-bits and --max-bits",
            )
        mixes[spec.module] = names
        items[spec.module] = [Option(costs[n], own.get(n, 0.0)) for n in names]
    weights = sum(spec.numel for spec in specs)
    try:
        found = allocate(items, int(params.bits * weights))
    except BudgetError as e:
        least = -(-e.least * 1000 // weights) / 1000
        raise UsageError(
            f"{params.bits:g} bits per weight are too few: these linears take {least:.3f} at the least",
            hint=f"use --bits {least:.3f} or more",
        ) from None
    chosen = {module: mixes[module][found.chosen[module]] for module in modules}
    assumed = losses is None and not chosen.keys() <= pinned.keys()
    how = Allocated(found.cost / weights, None if losses is None else found.loss, found.bound, assumed)
    return params.model_copy(update={"mixes": chosen, "measurement": None}), how


def assumed_losses(specs: Sequence[WeightSpec]) -> dict[str, dict[str, float]]:
    """Stand-ins for what is not measured yet: a fourth for each bit more, the same for all weights. For a plan's sizes,
    which the budget bounds."""
    shares = {name: Mix.parse(name).parts for name in OPTIONS}
    losses = {n: sum(float(share) * 4.0**-bits for share, bits, _ in parts) for n, parts in shares.items()}
    total = sum(spec.numel for spec in specs)
    return {spec.module: {n: loss * spec.numel / total for n, loss in losses.items()} for spec in specs}
