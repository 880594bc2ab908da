"""How much RAM a job takes: of its units, and of the layers that it streams."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from quantkit import architectures
from quantkit.architectures import Linear
from quantkit.calibration.data import Tokens
from quantkit.checkpoint.system import cores, multiplies_in_bf16
from quantkit.checkpoint.views import SourceTensor
from quantkit.layer_memory import FLOAT, ExpertShape, LayerMemory, LayerShape, StreamShape, plan_layers
from quantkit.layouts import Checkpoint, Target
from quantkit.memory import MemoryPlan, Work, plan_memory
from quantkit.plans import Unit
from quantkit.recipe import Recipe
from quantkit.selection import Chosen

# Bytes for each weight of a linear that is pruned or encoded whole: its mask, what it becomes, its bits turned, what it
# is encoded to and decoded from; and while SparseGPT moves weights, four copies of it in float32.
MADE, PRUNING = 16, 17
EXPERT = re.compile(r".*?\bexperts\.\d+\.")  # whose weights are one expert's, and come when it is that one's turn


def streams_of(recipe: Recipe, tokens: Tokens | None) -> tuple[str, ...]:
    """Which models are followed through the text: the "quantized" one that is made, the "full" one it is made of."""
    if tokens is None:
        return ()
    if recipe.needs == "nothing":  # only what bits are worth was measured on them
        return ()
    streams = () if recipe.quantize is None else recipe.quantize.implementation.streams(recipe.quantize.params)
    if not streams and recipe.prune is not None and recipe.prune.method == "sparsegpt":
        return ("quantized", "full")
    return streams or ("quantized",)


def memory_of(
    units: Sequence[Unit],
    recipe: Recipe,
    chosen: Chosen,
    target: Target,
    checkpoint: Checkpoint,
    tokens: Tokens | None,
) -> MemoryPlan:
    """Of a whole job. UsageError if that is more than it may take."""
    checked = recipe.convert is not None and recipe.convert.check
    layers = None
    if tokens is not None:  # first: it is the larger part, and so the one to name where there is too little
        full, hessian = "full" in streams_of(recipe, tokens), recipe.needs == "hessian"
        stream = _stream(recipe, checkpoint, tokens, full=full, hessian=hessian, made=_made(recipe, units))
        linears = {u.name: u.linear for u in units if u.calibrated and u.linear is not None} | chosen.mixed
        layers = _plan_layers(recipe, [u.source for u in units], linears, stream)
    plan = plan_memory(
        (
            Work(u.source, u.granule, u.linear is not None and not u.calibrated, _copies(u, checked=checked))
            for u in units
        ),
        tensors=sum(len(u.outputs) for u in units),
        threads=recipe.resources.threads,
        limit=recipe.resources.max_memory,
        device=recipe.resources.device,
        # Rounding and pruning take torch, too.
        derived=chosen.derived
        or (recipe.quantize is not None and recipe.quantize.method == "rtn")
        or any(u.pruned and not u.calibrated for u in units),
        generated=sum(map(len, target.generated.values())) - len(target.generated.get("quantize_config.json", b"")),
        parsed=max((f.nbytes for f in target.copies), default=0) if target.layout == "mistral" else 0,
    )
    return replace(plan, layers=layers)


def _stream(
    recipe: Recipe, checkpoint: Checkpoint, tokens: Tokens, *, full: bool, hessian: bool, made: int = 0
) -> StreamShape:
    rows, length = tokens.ids.shape
    width = architectures.hidden_width(checkpoint.config)
    head = None
    if recipe.mixing is not None:
        head = width * int(checkpoint.config["vocab_size"]), int(checkpoint.config["vocab_size"])
    used = len(set(tokens.ids.ravel().tolist()))
    sent = architectures.experts_of_a_token(checkpoint.config)
    heads = architectures.attention_heads(checkpoint.config)
    return StreamShape(rows, length, width, used, full, hessian, made, head, sent, heads)


def _plan_layers(
    recipe: Recipe, sources: Sequence[SourceTensor], linears: Mapping[str, Linear], stream: StreamShape
) -> LayerMemory:
    resources = recipe.resources
    known = {name: linear for name, linear in linears.items() if linear.layer >= 0}
    layers = _layers(sources, known, resources.device)
    threads = resources.threads or cores()
    return plan_layers(layers, stream, threads=threads, limit=resources.max_memory, device=resources.device)


def measuring_memory(
    recipe: Recipe, checkpoint: Checkpoint, sources: Sequence[SourceTensor], linears: Sequence[Linear], tokens: Tokens
) -> LayerMemory:
    """What it takes to measure the losses of linears on these tokens. UsageError if that is more than it may."""
    stream = _stream(recipe, checkpoint, tokens, full=False, hessian=True)
    return _plan_layers(recipe, sources, {f"{x.module}.weight": x for x in linears}, stream)


def _made(recipe: Recipe, units: Sequence[Unit]) -> int:
    """Bytes for each weight of a linear while it is pruned, and encoded whole, in a stream."""
    solved = recipe.quantize is not None and recipe.quantize.implementation.solve is not None
    if solved and all(u.quantized for u in units if u.calibrated):
        made = 3 if recipe.prune is not None else 0  # masks of all linears of a group
    else:
        made = MADE
    return made + (PRUNING if recipe.prune is not None and recipe.prune.method == "sparsegpt" else 0)


def _layers(sources: Sequence[SourceTensor], linears: Mapping[str, Linear], device: str) -> list[LayerShape]:
    """The decoder layers as the memory plan sees them. linears: those that are solved or measured, by tensor name;
    other tensors of a layer are called like these up to its number. A layer without any is followed all the same."""
    before = {name.partition(f".{linear.layer}.")[0] for name, linear in linears.items()}
    place = re.compile(f"(?:{'|'.join(map(re.escape, sorted(before)))})\\.(\\d+)\\.")
    numbers = {source.name: int(match[1]) for source in sources if (match := place.match(source.name))}
    # Of each layer its parts by name: an expert, or "" for what belongs to none.
    known = {*numbers.values(), *(linear.layer for linear in linears.values())}  # the head is behind the last
    solved: dict[int, dict[str, list[tuple[int, int]]]] = {layer: {"": []} for layer in sorted(known)}
    others: dict[int, dict[str, int]] = {layer: {"": 0} for layer in solved}
    for source in sources:
        found = EXPERT.match(source.name)
        part = found[0] if found else ""
        if (one := linears.get(source.name)) is not None:
            rows, columns = reversed(source.shape) if one.transposed else source.shape
            solved[one.layer].setdefault(part, []).append((rows, columns))
            continue
        if (layer := numbers.get(source.name)) is not None:
            others[layer][part] = others[layer].get(part, 0) + source.numel

    def experts(layer: int) -> tuple[ExpertShape, ...]:
        names = [name for name in {**solved[layer], **others[layer]} if name]
        return tuple(ExpertShape(tuple(solved[layer].get(n, ())), others[layer].get(n, 0)) for n in names)

    itemsize = max(s.nbytes // s.numel for s in sources if s.name in linears)
    loaded = max(_loaded(s.dtype, s.nbytes // s.numel, device) for s in sources if s.name in linears)
    return [LayerShape(tuple(solved[n][""]), experts(n), itemsize, loaded, others[n][""]) for n in solved]


def _loaded(dtype: str, itemsize: int, device: str) -> int:
    """Bytes of a weight in memory: as it is on disk and in bfloat16, if that is another, or else in float32."""
    if device != "cpu":
        return max(FLOAT, itemsize + 2)
    if multiplies_in_bf16():
        return itemsize if dtype == "BF16" else itemsize + 2
    return FLOAT


def _copies(unit: Unit, *, checked: bool) -> float:
    """How many slabs a worker makes of one, at the most at one time."""
    arranged = (unit.source.head_dim > 0) + (len(unit.source.parts) > 1) + unit.source.turned
    arranged += 2 * (unit.source.scales is not None)
    if unit.pruned:  # the mask, the pruned weight, what it encodes to and is decoded from
        return (10 if unit.quantized else 6) + arranged
    if unit.linear is not None:  # what it encodes to: at most half of it (int8 from 16 bits)
        return 0.5 + unit.linear.transposed + arranged
    written = (unit.head_dim > 0) + 3 * unit.cast
    # Read back, turned back step by step, and compared eight bytes at a time.
    return arranged + written + (1.25 + written + arranged if checked else 0)
