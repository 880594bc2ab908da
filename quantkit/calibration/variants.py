"""Rows through a layer as it is, or with other weights in some places, its experts one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from quantkit.calibration.experts import Routed, through_expert
from quantkit.calibration.layers import Layer
from quantkit.calibration.rows import Passes, Routing
from quantkit.calibration.stream import at_experts

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Variant:
    """A model that goes through a layer. run: takes a row through, as the layer's linears answer. out: takes what
    leaves it, by row. others: of some linears, the weights that it has in place of the layer's own; asked for when
    their turn comes, and not held longer."""

    run: Callable[[int], torch.Tensor]
    out: Callable[[int, torch.Tensor], None]
    others: Callable[[Sequence[str]], Weights]


def none(_: Sequence[str]) -> Weights:
    return {}


def through_layer(
    layer: Layer, variants: Sequence[Variant], rows: Sequence[int], routed: Callable[[str, Routing, int], Routed]
) -> None:
    """Takes rows through a layer in each variant; experts are read once for all of them. routed(a name, what the module
    of experts is called with, how many there are): files for what they get and give."""
    groups = layer.linears.groups(lambda: variants[0].run(rows[0]), layer.ready)
    passes = [Passes(layer.linears, variant.run) for variant in variants]

    def ready(variant: Variant, layer: Layer = layer) -> Weights:
        return {**layer.ready, **variant.others(list(layer.ready))}

    for number, (_, name) in enumerate(at_experts(groups, layer)):
        if name is None:
            for variant, way in zip(variants, passes, strict=True):
                weights = ready(variant)
                for row in rows:
                    variant.out(row, way.through(row, {}, weights))
                del weights  # before the next one's come
            return
        experts, like = layer.experts[name], layer.linears.routings[name]
        files = [routed(f"{number}-{i}", like, experts.count) for i in range(len(variants))]
        for variant, way, file in zip(variants, passes, files, strict=True):
            weights = ready(variant)
            for row in rows:
                file.write(row, way.routing(row, name, {}, weights))
            del weights
        for expert in range(experts.count):
            with experts.read(expert) as one:
                for variant, file in zip(variants, files, strict=True):
                    weights, inside = ready(variant, one), through_expert(experts, expert, one, file)
                    for row in rows:
                        file.add(row, expert, inside.through(row, {}, weights))
                    del weights, inside
        for way, file in zip(passes, files, strict=True):
            way.totals[name] = file.total
