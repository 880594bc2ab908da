"""Which of a checkpoint's linears are quantized, and which are pruned; and how many bits each of them gets."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from quantkit import architectures
from quantkit.architectures import Linear
from quantkit.checkpoint.header import FLOATS, quote
from quantkit.checkpoint.views import SourceTensor
from quantkit.errors import SourceError, UsageError
from quantkit.layouts import Checkpoint
from quantkit.measurement import Allocated, Losses, allocated
from quantkit.methods.base import Mixed, Selection, WeightSpec
from quantkit.patterns import matches, select
from quantkit.pruning import Prune
from quantkit.recipe import Quantize, Recipe
from quantkit.solvers.pattern import Pattern

UNKNOWN_PART = 0.05  # of the weights of all matrices in the decoder layers
PRUNED_TOGETHER = 128  # columns; solvers.sparsegpt has the same number, beside torch, which no plan loads


def find_linears(checkpoint: Checkpoint, names: Sequence[str]) -> tuple[list[Linear], tuple[str, ...], str, str]:
    """Linears to encode, modules for `llm_int8_skip_modules`, the architecture's name, and its reader warning."""
    row = architectures.find(checkpoint.config)
    if row is not None:
        found = architectures.linears(row, checkpoint.config, names)
        skip = architectures.skip_modules(row, checkpoint.config)
        return found, skip, row.name, row.warning
    from quantkit.derived_architecture import derive  # asks transformers, and so imports torch

    found, skip = derive(checkpoint.config, names)
    return found, skip, str(checkpoint.config.get("model_type")), ""


@dataclass(frozen=True)
class Chosen:
    """Which linears are quantized, and which are pruned, by tensor name; what config.json lists as left alone; the
    architecture's name, and its warning about readers; all linears there are."""

    quantized: Mapping[str, Linear] = field(default_factory=dict)
    pruned: Mapping[str, Linear] = field(default_factory=dict)
    all: Sequence[Linear] = ()
    skipped: tuple[str, ...] = ()
    architecture: str = ""
    warning: str = ""
    derived: bool = False  # transformers was asked, and so torch is there
    refused: Mapping[str, str] = field(default_factory=dict)  # why the format cannot hold them, by module
    params: Any = None  # of the method, nothing left open
    allocation: Allocated | None = None  # of a method that mixes bits

    @property
    def mixed(self) -> dict[str, Linear]:
        """The linears that share a budget of bits, by tensor name, those among them that stay as they are."""
        if self.allocation is None:
            return {}
        dense = {f"{linear.module}.weight": linear for linear in self.allocation.dense}
        return {n: x for n, x in self.quantized.items() if x.module != self.allocation.head} | dense

    @property
    def selection(self) -> Selection:
        encoded = tuple(linear.module for linear in self.quantized.values())
        known = set(encoded)
        return Selection(encoded, tuple(x.module for x in self.all if x.module not in known), self.skipped)


def choose(recipe: Recipe, checkpoint: Checkpoint, tensors: Sequence[SourceTensor], losses: Losses | None) -> Chosen:
    linears, skip_modules, name, warning = find_linears(checkpoint, [t.name for t in tensors])
    known = architectures.find(checkpoint.config) is not None
    found = Chosen({}, {}, linears, (), name, warning, not known)
    if recipe.quantize is not None:
        found = to_quantize(recipe.quantize, checkpoint, tensors, found, skip_modules)
        if recipe.mixing is not None:
            found = _mix(recipe.quantize, checkpoint, tensors, found, losses)
    if recipe.prune is not None:
        found = replace(found, pruned=to_prune(recipe.prune, checkpoint, tensors, linears))
    return found


def _mix(
    quantize: Quantize,
    checkpoint: Checkpoint,
    tensors: Sequence[SourceTensor],
    found: Chosen,
    losses: Losses | None,
) -> Chosen:
    """Bits for the linears chosen, within the budget; and for the head, beside it, if the method writes heads."""
    mixing, params = quantize.implementation.mixing, found.params
    assert mixing is not None
    assert isinstance(params, Mixed)
    specs = specs_of(tensors, found.quantized, str(checkpoint.folder))
    head = _head(quantize, checkpoint, tensors, found)
    if head is None:
        mixed, allocation = allocated(mixing, params, specs, losses)
        return _leave_dense(replace(found, params=mixed, allocation=allocation), mixing.dense)
    linear, mix = head
    name = f"{linear.module}.weight"
    (spec,) = specs_of(tensors, {name: linear}, str(checkpoint.folder))
    others = {pattern: own for pattern, own in params.mixes.items() if pattern != linear.module}
    mixed, allocation = allocated(mixing, params.model_copy(update={"mixes": others}), specs, losses)
    if (why := quantize.implementation.refuses(spec, params)) is not None:
        refused = {**found.refused, linear.module: why}
        return replace(found, params=mixed, allocation=allocation, refused=refused)
    return replace(
        found,
        quantized={**found.quantized, name: linear},
        params=mixed.model_copy(update={"mixes": {**mixed.mixes, linear.module: mix}}),
        allocation=replace(allocation, head=linear.module),
    )


def _leave_dense(found: Chosen, option: str | None) -> Chosen:
    """Without the linears whose mix is that option."""
    dense = {name: x for name, x in found.quantized.items() if found.params.mixes[x.module] == option}
    assert found.allocation is not None
    if len(dense) == len(found.quantized):
        raise UsageError(
            f"{found.params.bits:g} bits per weight are enough to leave all linears as they are", hint="ask for fewer"
        )
    return replace(
        found,
        quantized={name: x for name, x in found.quantized.items() if name not in dense},
        skipped=(*found.skipped, *(x.module for x in dense.values())),
        allocation=replace(found.allocation, dense=tuple(dense.values())),
    )


def _head(
    quantize: Quantize, checkpoint: Checkpoint, tensors: Sequence[SourceTensor], found: Chosen
) -> tuple[Linear, str] | None:
    """The head as one more linear, behind the last layer, and the mix that it gets; None where it stays as it is: it
    has no matrix of its own, is skipped, or the method does not write heads."""
    row = architectures.find(checkpoint.config)
    if row is None or architectures.is_tied(row, checkpoint.config):
        return None
    stored = next((t for t in tensors if t.name in [f"{head}.weight" for head in row.heads]), None)
    if stored is None:
        return None
    module = stored.name.removesuffix(".weight")
    mix = found.params.mixes.get(module) or quantize.implementation.head(found.params)
    if mix is None or any(matches(module, pattern) for pattern in quantize.skip):
        return None
    return Linear(module, module, max(x.layer for x in found.all) + 1, transposed=False, expert=False), mix


def specs_of(tensors: Sequence[SourceTensor], chosen: Mapping[str, Linear], where: str) -> list[WeightSpec]:
    """Of the linears chosen, by tensor name, in their order."""
    by_name = {t.name: t for t in tensors}
    return [spec_of(by_name[name], linear, where) for name, linear in chosen.items()]


def to_prune(
    prune: Prune, checkpoint: Checkpoint, tensors: Sequence[SourceTensor], linears: Sequence[Linear]
) -> dict[str, Linear]:
    modules = [x.module for x in linears if x.layer >= 0]
    if not modules:
        raise SourceError(
            "there are no linears of decoder layers to prune", where=str(checkpoint.folder),
            hint="check that config.json belongs to these weights",
        )  # fmt: skip
    wanted = prune.chosen(modules)
    if not wanted:
        raise UsageError(
            f"nothing is left to prune: {len(modules):,} linears found, none of them chosen",
            hint="check --targets and --skip",
        )
    chosen = {f"{x.module}.weight": x for x in linears if x.module in wanted}
    by_name = {t.name: t for t in tensors}
    specs = [spec_of(by_name[name], linear, str(checkpoint.folder)) for name, linear in chosen.items()]
    if prune.amount == 0 or not any(n is None or n for n in (prune.count(s.rows, s.columns) for s in specs)):
        widest = max(spec.columns for spec in specs)
        raise UsageError(
            f"nothing would be pruned: {prune.requested} of {widest:,} inputs is less than one", hint="ask for more"
        )
    if isinstance(amount := prune.amount, Pattern):
        for name, linear in chosen.items():
            columns = spec_of(by_name[name], linear, str(checkpoint.folder)).columns
            if columns % amount.of:
                raise UsageError(
                    f"{linear.module} has {columns:,} inputs, which groups of {amount.of} do not divide",
                    where=f"{checkpoint.folder}/{by_name[name].file}",
                    hint=f"take another --pattern, or leave it alone with --skip {linear.kind.rpartition('.')[2]}",
                )
        if prune.method == "sparsegpt" and PRUNED_TOGETHER % amount.of:
            raise UsageError(
                f"sparsegpt takes {PRUNED_TOGETHER} columns at a time, which groups of {amount.of} do not divide",
                hint="take --method wanda, or another --pattern",
            )
    return chosen


def to_quantize(
    quantize: Quantize,
    checkpoint: Checkpoint,
    tensors: Sequence[SourceTensor],
    found: Chosen,
    skip_modules: Sequence[str],
) -> Chosen:
    linears = found.all
    modules = [t.name.removesuffix(".weight") for t in tensors if t.name.endswith(".weight")]
    left_out = select(modules, quantize.skip)
    method, by_name = quantize.implementation, {t.name: t for t in tensors}
    wanted = [x for x in linears if x.module not in left_out]
    specs = {x.module: spec_of(by_name[f"{x.module}.weight"], x, str(checkpoint.folder)) for x in wanted}
    params = method.resolve(quantize.params, tuple(specs.values()))
    refused = {module: why for module, spec in specs.items() if (why := method.refuses(spec, params)) is not None}
    chosen = {f"{x.module}.weight": x for x in wanted if x.module not in refused}
    if not chosen:
        why = f"{len(linears)} linear layers found, all of them skipped"
        hint = "check --skip, and that config.json belongs to these weights"
        if refused:
            module, reason = next(iter(refused.items()))
            why = f"{module}, as an example, {reason}"
            hint = "try --method bnb" + (", or another --group-size" if "group size" in reason else "")
        raise SourceError(
            f"nothing is left to quantize: {why}",
            where=str(checkpoint.folder),
            hint=hint,
        )  # fmt: skip
    skipped = tuple(dict.fromkeys((*skip_modules, *sorted(x.module for x in linears if x.module in left_out))))
    return replace(found, quantized=chosen, skipped=skipped, refused=refused, params=params)


def spec_of(source: SourceTensor, linear: Linear, where: str) -> WeightSpec:
    """A linear as the method sees it. SourceError if it is none."""
    if source.dtype not in FLOATS or len(source.shape) != 2 or not source.numel:
        raise SourceError(
            f"tensor {source.name!r} is {source.dtype} {list(source.shape)}: no 16- or 32-bit float matrix",
            where=f"{where}/{source.file}", hint="name the unquantized parent, or leave the tensor alone with --skip",
        )  # fmt: skip
    rows, columns = reversed(source.shape) if linear.transposed else source.shape
    return WeightSpec(linear.module, source.dtype, rows, columns)


def misfits(checkpoint: Checkpoint, tensors: Sequence[SourceTensor], chosen: Chosen) -> list[str]:
    """Where config.json and the weights contradict each other: what is written then will not load, or not work."""
    row = architectures.find(checkpoint.config)
    if row is None:
        return []
    linears = chosen.all or architectures.linears(row, checkpoint.config, [t.name for t in tensors])
    found = []
    for t in tensors:
        shape = architectures.expected_shape(row, checkpoint.config, t.name)
        if shape is not None and shape != t.shape:
            found.append(f"tensor {quote(t.name)} is {list(t.shape)}, config.json makes it {list(shape)}")
    layers = len({x.layer for x in linears if x.layer >= 0})
    stated = checkpoint.config.get("num_hidden_layers", checkpoint.config.get("n_layer"))
    if type(stated) is int and stated != layers:
        found.append(f"config.json speaks of {stated:,} layers, the weights hold {layers:,}")
    kinds = Counter(x.kind for x in linears if x.layer >= 0 and not x.expert)
    # With experts, a layer may be of one kind or the other.
    odd = [kind for kind, n in kinds.items() if n != layers and not any(x.expert for x in linears)]
    if odd:
        found.append(f"{odd[0]} is there in {kinds[odd[0]]} of {layers} layers: the checkpoint is incomplete")
    return [f"the weights do not fit config.json: {what}" for what in found[:3]]


def unknown(tensors: Sequence[SourceTensor], chosen: Chosen) -> list[str]:
    """Whether much of the decoder layers is in matrices that are not known to be linears, such as stacked experts."""
    layers = {x.module.partition(f".{x.layer}.")[0] for x in chosen.all if x.layer >= 0}
    known = {f"{x.module}.weight" for x in chosen.all}
    inside = [t for t in tensors if any(re.match(re.escape(p) + r"\.\d+\.", t.name) for p in layers)]
    inside = [t for t in inside if len(t.shape) > 1 and t.dtype in FLOATS]
    others = sorted((t for t in inside if t.name not in known), key=lambda t: -t.numel)
    weights, left = sum(t.numel for t in inside), sum(t.numel for t in others)
    if left <= UNKNOWN_PART * weights:
        return []
    what = f"{len(others):,} tensors of the decoder layers, such as {quote(others[0].name)}"
    return [f"{what}, with {left / weights:.0%} of their weights, are not known here as linears: they stay as they are"]
