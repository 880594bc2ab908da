"""What each linear would cost in each mix of bits, as a file; and the mixes that lose least within a budget.

A loss is in nats a token: by how much the model's distribution is expected to move (KL divergence) when this linear
alone is written so, to second order. It is measured once for a model and a text; allocating bits from it takes no time,
for as many sizes as are wanted.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantkit.architectures import Linear
from quantkit.checkpoint.reader import SourceFiles, elements
from quantkit.errors import UsageError
from quantkit.layouts import Checkpoint
from quantkit.methods.base import M, Mixing, WeightSpec
from quantkit.patterns import select
from quantkit.solvers.allocation import BudgetError, Option, allocate

FORMAT = 1
DIGEST = "sha256"  # of the rest of a file
ROWS = 24  # of calibration text that are looked at, at the most; a third of them is held out
PROBE = 4096  # elements at either end of a weight that tell it from another


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class LinearLosses(_Table):
    """rows, columns: of the weight. losses: by mix, in nats a token, of each that was tried."""

    rows: int = Field(gt=0)
    columns: int = Field(gt=0)
    losses: dict[str, float]


class Measurement(_Table):
    """method: for which it was made (Mixing.label). weights: a digest of the model's linears. tokens: SHA-256 of the
    ids that were looked at, rows of `length`. kinds: by how much the losses of each kind of linear were multiplied, for
    what is expected of it to be what was measured."""

    format: int
    quantkit: str
    method: str
    source: str
    weights: str
    text: str
    tokens: str
    rows: int
    length: int
    kinds: dict[str, float] = {}
    linears: dict[str, LinearLosses]

    @property
    def losses(self) -> dict[str, dict[str, float]]:
        """By module and mix."""
        return {module: linear.losses for module, linear in self.linears.items()}

    def to_bytes(self) -> bytes:
        """As a file keeps it, with a digest: a digit that changes later would be other bits for some linear."""
        table = self.model_dump()
        return (json.dumps({**table, DIGEST: _digest(table)}, indent=1, ensure_ascii=False) + "\n").encode()


def _digest(table: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table).encode()).hexdigest()


def read_measurement(path: Path) -> Measurement:
    """UsageError for a file that is none."""
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise UsageError(
            f"the measurement cannot be read: {e.strerror}", where=str(path), hint="`quantkit measure` writes one"
        ) from None
    try:
        table = json.loads(raw)
        digest = table.pop(DIGEST, "") if isinstance(table, dict) else ""
        found = Measurement.model_validate_json(json.dumps(table))
        if digest != _digest(table):
            raise ValueError("it was altered since it was written")
        if found.format != FORMAT:
            raise ValueError(f"its format is {found.format}, this version knows {FORMAT}")
        for linear in found.linears.values():
            for loss in linear.losses.values():
                if not 0 <= loss < float("inf"):
                    raise ValueError(f"a loss is {loss}")
    except (ValidationError, ValueError) as e:
        why = str(e).partition("\n")[0]
        if isinstance(e, ValidationError):
            (first, *_) = e.errors()
            why = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"].lower())))
        elif isinstance(e, UnicodeDecodeError | json.JSONDecodeError):
            why = "it is no JSON"
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


def check_fits(found: Measurement, path: Path, *, label: str, weights: str, specs: Sequence[WeightSpec]) -> None:
    """UsageError if it was made for another method than `label`; if it is of another model, whose digest is `weights`;
    or does not know one of these linears."""
    if found.method != label:
        raise UsageError(
            f"the measurement was made for {found.method}, and this is {label}", where=str(path),
            hint="leave --measurement out, or measure for this method",
        )  # fmt: skip
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
    measured; bound: no allocation from these losses can have less. assumed: a stand-in decided. head: the module that
    is quantized beside them, with bits of its own. dense: those of the linears that stay as they are. text, tokens:
    what was measured on, and the SHA-256 of its ids."""

    bits: float
    loss: float | None
    bound: float
    assumed: bool
    head: str | None = None
    dense: tuple[Linear, ...] = ()
    text: str = ""
    tokens: str = ""


def allocated(mixing: Mixing[M], params: M, specs: Sequence[WeightSpec], losses: Losses | None) -> tuple[M, Allocated]:
    """The parameters with a mix for each linear: those that lose least within `params.bits` a weight. UsageError where
    that is too little.

    What `params.mixes` names, by module or pattern, the last that matches, is not up for choice, but counts. The loss
    found is that of the measurement, whatever `params.importance` makes of it.
    """
    modules = [spec.module for spec in specs]
    pinned = {module: mix for pattern, mix in params.mixes.items() for module in select(modules, [pattern])}
    factors = {module: f for pattern, f in params.importance.items() for module in select(modules, [pattern])}
    known = assumed_losses(mixing, params, specs) if losses is None else losses
    weighed = {m: {name: loss * factors.get(m, 1.0) for name, loss in own.items()} for m, own in known.items()}
    weights = sum(spec.numel for spec in specs)
    units = _units(mixing, specs)
    choices = {unit: _alike(mixing, params, members, pinned, weighed) for unit, members in units.items()}
    try:
        found = allocate({unit: list(own.values()) for unit, own in choices.items()}, int(params.bits * weights))
    except BudgetError as e:
        least = -(-e.least * 1000 // weights) / 1000
        raise UsageError(
            f"{params.bits:g} bits per weight are too few: these linears take {least:.3f} at the least",
            hint=f"use --bits {least:.3f} or more",
        ) from None
    names = {unit: list(own)[found.chosen[unit]] for unit, own in choices.items()}
    chosen = {spec.module: names[unit] for unit, members in units.items() for spec in members}
    assumed = losses is None and not chosen.keys() <= pinned.keys()
    loss, bound = found.loss, found.bound
    if factors:
        plain = {unit: _alike(mixing, params, members, pinned, known) for unit, members in units.items()}
        loss = sum(plain[unit][name].loss for unit, name in names.items())
        bound = allocate({unit: list(own.values()) for unit, own in plain.items()}, int(params.bits * weights)).bound
    how = Allocated(found.cost / weights, None if losses is None else loss, bound, assumed)
    return params.model_copy(update={"mixes": chosen, "measurement": None}), how


def _units(mixing: Mixing[M], specs: Sequence[WeightSpec]) -> dict[str, list[WeightSpec]]:
    """Linears that have to be written alike, by a name for all of them."""
    units: dict[str, list[WeightSpec]] = defaultdict(list)
    for spec in specs:
        units[mixing.together(spec.module) or spec.module].append(spec)
    return units


def _alike(
    mixing: Mixing[M], params: M, members: Sequence[WeightSpec], pinned: Mapping[str, str], known: Losses
) -> dict[str, Option]:
    """By mix, what linears cost and lose together that are all written so."""
    each = [_choices(mixing, params, spec, pinned.get(spec.module), known) for spec in members]
    names = [name for name in each[0] if all(name in own for own in each)]
    if not names:
        raise UsageError(
            f"{members[0].module} and {members[-1].module} cannot be written alike, and readers take them as one",
            hint="name the same mix for both",
        )
    return {n: Option(sum(own[n].cost for own in each), sum(own[n].loss for own in each)) for n in names}


def _choices(mixing: Mixing[M], params: M, spec: WeightSpec, pinned: str | None, known: Losses) -> dict[str, Option]:
    """By mix, what a linear costs and loses that is written so."""
    own = known.get(spec.module, {})
    if pinned is not None:
        return {pinned: Option(mixing.cost(params, spec, pinned), own.get(pinned, 0.0))}
    costs = {name: mixing.cost(params, spec, name) for name in mixing.options(params, spec) if name in own}
    within = {n: c for n, c in costs.items() if params.min_bits <= c / spec.numel <= params.max_bits}
    if not within:
        raise UsageError(
            f"no mix of {spec.module} has between {params.min_bits:g} and {params.max_bits:g} bits per weight",
            hint="allow more with --min-bits and --max-bits",
        )
    return {name: Option(cost, own[name]) for name, cost in within.items()}


def assumed_losses(mixing: Mixing[M], params: M, specs: Sequence[WeightSpec]) -> dict[str, dict[str, float]]:
    """Stand-ins for what is not measured yet: a fourth for each bit more on disk, the same for all weights. For a
    plan's sizes, which the budget bounds."""
    return {
        spec.module: {
            name: spec.numel * 4.0 ** (-mixing.cost(params, spec, name) / spec.numel)
            for name in mixing.options(params, spec)
        }
        for spec in specs
    }
