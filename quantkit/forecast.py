"""What a plan takes on so many machines: RAM and bytes, which are arithmetic, and time, from a machine's rates.

A plan has the work in it, tensor by tensor; each kind of work has its rate (see rates). Reading, working and writing
overlap where there is no text; along a text one thing follows the other. Bytes that processes send each other are those
of solvers.team, and what lies in files for all of them to read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from quantkit.architectures import experts_of_a_token, hidden_width
from quantkit.console import human_bytes, human_time
from quantkit.errors import UsageError
from quantkit.layer_memory import FLOAT
from quantkit.methods.gptq_config import SIBLINGS
from quantkit.plans import Plan, Unit
from quantkit.pruning import in_attention
from quantkit.rates import Rates

NETWORK = 1_250_000_000  # bytes a second, of 10 Gbit/s
HELD_OUT = 8  # of so many rows, one judges corrections
CORNER, SHARED = 512, 1024  # of a factor: what each process finds for itself; inputs from which on the rest is shared
AROUND = 1.5  # times that norms and activations of the quantized stream are computed, as passes stop and begin anew
ENDS = ("o_proj", "out_proj", "wo", "attention.dense", "self_attention.dense", "attn.c_proj")  # behind attention


@dataclass(frozen=True)
class Forecast:
    """Of each of `nodes` times `ranks` processes (one to a node, or one to a GPU), bytes: of RAM, of its GPU, read from
    the source, and sent to it by others or written by others to files that it reads. scratch: on disk, for all.
    seconds: of the whole job, by what they are for; empty without a machine's rates. measured: whether it is known
    what linears of mixed bits are worth, which is not in the seconds. parts: whether they are parts
    (--part) and not a team (torchrun)."""

    nodes: int
    ranks: int
    parts: bool
    ram: int
    gpu: int
    read: int
    network: int
    scratch: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    measured: bool = True

    @property
    def total(self) -> float | None:
        return sum(self.seconds.values()) if self.seconds else None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "total_seconds": self.total}

    def rows(self) -> list[tuple[str, str]]:
        """As `plan` prints it."""
        count = self.nodes * self.ranks
        what = "parts" if self.parts else "ranks"
        found = [(f"{count:,} {what}", f"{self.nodes:,} machines, {self.ranks:,} to each")] if count > 1 else []
        each = "" if count == 1 else ", each"
        found.append((f"RAM{each}", human_bytes(self.ram)))
        if self.gpu:
            found.append((f"GPU memory{each}", human_bytes(self.gpu)))
        found.append((f"reads{each}", human_bytes(self.read)))
        if count > 1:
            found.append(("from others, each", human_bytes(self.network)))
        if self.total is not None:
            dear = sorted(self.seconds.items(), key=lambda item: -item[1])[:4]
            shares = ", ".join(f"{name} {value / self.total:.0%}" for name, value in dear if value / self.total > 0.005)
            found.append(("time", f"about {human_time(self.total)}: {shares}"))
            if not self.measured:
                found.append(("not in it", "measuring what linears are worth, which comes first: about two runs more"))
        return found


def forecast(plan: Plan, nodes: int, gpus: int, rates: Rates | None, network: float = NETWORK) -> Forecast:
    """gpus: of each node; 0: one process on its cores. UsageError for what does not go together."""
    cuda = plan.recipe.resources.device != "cpu"
    if cuda != (gpus > 0):
        raise UsageError(
            "this plan is for a GPU" if cuda else "this plan is for CPUs",
            where=f"--device {plan.recipe.resources.device}, --gpus-per-node {gpus}",
            hint="add --gpus-per-node N" if cuda else "add --device cuda, or leave --gpus-per-node out",
        )
    if ":" in plan.recipe.resources.device and nodes * gpus > 1:
        raise UsageError(
            f"{nodes * gpus} processes would all take {plan.recipe.resources.device}", where="--device",
            hint="say --device cuda, and each takes its own",
        )  # fmt: skip
    if rates is not None and cuda != (rates.device != "cpu"):
        raise UsageError(
            f"the profile is of {rates.device!r}, the plan for {plan.recipe.resources.device}", where="--profile",
            hint="make one there: quantkit doctor --calibrate FILE" + (" --device cuda" if cuda else ""),
        )  # fmt: skip
    memory, ranks = plan.memory, max(gpus, 1)
    count = nodes * ranks
    calibrated = [u for u in plan.units if u.calibrated]
    parts = not calibrated
    if parts and plan.allocation is not None and count > 1:
        raise UsageError("mixed bits are not written in parts", where=f"--nodes {nodes}", hint="use one node")
    gpu, ram = memory.gpu, memory.peak
    if parts:
        seconds = {} if rates is None else _without_text(plan, count, rates)
        return Forecast(nodes, ranks, True, ram, gpu, plan.source_bytes // count, 0, 0, seconds)
    work = _Work(plan, calibrated, count)
    sent = work.sent()
    seconds = {} if rates is None else work.seconds(rates, _threads(plan, rates))
    if seconds and count > 1:
        seconds["network"] = sent / network
    read, measured = plan.passes * plan.source_bytes, plan.allocation is None or not plan.allocation.assumed
    return Forecast(nodes, ranks, False, ram, gpu, read, sent, plan.scratch, seconds, measured)


def _threads(plan: Plan, rates: Rates) -> float:
    """How many times as long it takes with the plan's threads."""
    wanted = plan.recipe.resources.threads
    return 1.0 if wanted is None or rates.device != "cpu" else rates.threads / min(wanted, rates.threads)


def _without_text(plan: Plan, count: int, rates: Rates) -> dict[str, float]:
    recipe = plan.recipe
    names = [] if recipe.prune is None else ["magnitude"]
    if recipe.quantize is not None:
        names.append("rtn" if recipe.quantize.method == "rtn" else "int8" if recipe.quantize.bits == 8 else "nf4")
    encoded = sum(u.source.nbytes for u in plan.encoded)
    slower = _threads(plan, rates)
    work = (plan.source_bytes - encoded) / rates.encode["convert"] * slower
    work += sum(encoded / rates.encode[name] * slower for name in names)
    disk = plan.source_bytes / rates.read + plan.weight_bytes / rates.write
    found = {"start": rates.start_copy}
    found["disk" if disk > work else "work"] = max(work, disk) / count
    if count > 1:
        # What several write to, the last of them hashes at its end. The end of all is a process of its own.
        found["finish"] = rates.start_copy + max(s.nbytes for s in plan.shards) / min(rates.sha256, rates.read)
    return found


@dataclass(frozen=True)
class _Group:
    """Linears with one input: (rows, columns) of each, `times` of them in the model; what part of the tokens they get;
    whether it is in attention, and attention ends with it; whether corrections are made."""

    shapes: tuple[tuple[int, int], ...]
    part: float
    attention: bool
    ends: bool
    aimed: bool

    @property
    def columns(self) -> int:
        return self.shapes[0][1]

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.shapes)


class _Work:
    """What a team of `count` processes does along a text."""

    def __init__(self, plan: Plan, units: Sequence[Unit], count: int) -> None:
        assert plan.tokens is not None
        self.plan, self.count = plan, count
        self.rows, self.length = plan.tokens.ids.shape
        self.tokens = self.rows * self.length
        self.full = "full" in plan.streams
        self.hessian = plan.recipe.needs == "hessian"
        self.layers = 1 + max(u.linear.layer for u in units if u.linear is not None)
        self.width = hidden_width(plan.config)
        self.groups = _groups(units, plan.config, self.full)

    def seconds(self, rates: Rates, slower: float) -> dict[str, float]:
        tokens, count = self.tokens, self.count
        held = tokens / HELD_OUT if self.full and self.rows > 1 else 0.0
        shared = math.ceil(self.rows / count) / self.rows  # of the text, by the process that has most of it
        streams = 2 if self.full else 1
        passes = sums = solving = factors = 0.0
        for group in self.groups:
            n, size = group.columns, group.rows * group.columns
            some, linear = tokens * group.part, rates.linear.at(group.columns)
            # What norms are taken of is run twice where it is looked at all at once: with old weights, and with new.
            times = streams + 2 * group.ends if self.hessian or group.attention else 2
            passes += size * some * linear * times
            if not self.hessian:
                sums += some * n * rates.around / 4
                continue
            sums += rates.sums.at(n) * n * n * some / 2
            if group.aimed:
                seen = some - held
                if n < 2 * group.rows:
                    sums += rates.sums.at(n) * n * n * (seen + group.rows)
                else:
                    sums += size * seen * (rates.sums.at(n) + linear)
                solving += size * (n * rates.aim.at(n) + 2 * held * linear)
            factor = n**3 * rates.factor.at(n) * (1 + group.aimed)
            alone = min(CORNER / n, 1.0) if n >= SHARED else 1.0
            factors += factor * (alone + (1 - alone) / count)
        kept = sum(tokens * g.part * g.columns * (1 + g.aimed) for g in self.groups) if self.hessian else 0.0
        kept += self.layers * tokens * self.width * streams
        for name in self._solvers():
            solving += sum(g.rows * g.columns**2 * rates.solve[name].at(g.columns) for g in self.groups)
        around = self.layers * tokens * self.width * (streams - 1 + AROUND) * rates.around
        around += self.layers * tokens * self.length * self.width * streams * rates.attention
        copied = self.plan.source_bytes / rates.encode["convert"]
        return {
            "start": rates.start,
            "copying": copied * slower,
            "passes": passes * slower * shared,
            "attention and norms": around * slower * shared,
            "hidden states": kept * rates.hidden,
            "Hessians": sums * slower * (1 / count if self.hessian else shared),
            "factors": factors * slower,
            "solving": solving * slower / (count if self.hessian else 1),
        }

    def _solvers(self) -> list[str]:
        """Whose rates hold for what is done to weights."""
        recipe = self.plan.recipe
        pruner = [] if recipe.prune is None else ["sparsegpt" if recipe.prune.method == "sparsegpt" else "mask"]
        return pruner + ([recipe.quantize.method] if recipe.quantize is not None and self.hessian else [])

    def sent(self) -> int:
        """Bytes that a process gets from others."""
        if self.count == 1:
            return 0
        nbytes = 0.0
        for group in self.groups:
            n, size = group.columns, group.rows * group.columns
            if not self.hessian:
                nbytes += self.rows * n * FLOAT
                continue
            matrices = n * n * (2 if group.aimed else 1) + (n * n / 2 * (1 + group.aimed) if n >= SHARED else 0)
            aimed = (min(n * n, size) + size) if group.aimed else 0
            # Inputs of all rows lie in files; of the full model's, too.
            seen = self.tokens * group.part * n * (1 + group.aimed)
            nbytes += FLOAT * (matrices + aimed + seen) + size
        return int(nbytes * (self.count - 1) / self.count)


def _groups(units: Sequence[Unit], config: Mapping[str, Any], full: bool) -> list[_Group]:
    """Of all layers. Experts' linears get the tokens that are routed to them, all alike."""
    experts: dict[tuple[int, str], int] = {}
    for unit in units:
        assert unit.linear is not None
        if unit.linear.expert:
            key = (unit.linear.layer, unit.linear.kind)
            experts[key] = experts.get(key, 0) + 1
    chosen = experts_of_a_token(config)
    sets: dict[str, list[Unit]] = {}
    for unit in units:
        assert unit.linear is not None
        sets.setdefault(_together(unit.linear.module), []).append(unit)
    found = []
    for members in sets.values():
        linear = members[0].linear
        assert linear is not None
        part = min(chosen / experts[linear.layer, linear.kind], 1.0) if linear.expert else 1.0
        shapes = tuple((u.weight.rows, u.weight.columns) for u in members if u.weight is not None)
        name = linear.module
        found.append(_Group(shapes, part, in_attention(name), name.endswith(ENDS), full and not linear.expert))
    return found


def _together(module: str) -> str:
    """The same for linears with one input."""
    parent, _, name = module.rpartition(".")
    return next((f"{parent}.{'+'.join(names)}" for names in SIBLINGS if name in names), module)
