"""A decoder layer with its parameters in memory: all of them, or its experts one by one.

A layer of a large mixture of experts has hundreds of times the weights that it multiplies a token with. Experts do not
get what other experts give, so none has to wait in memory for another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from quantkit.calibration.rows import Group, Linears
from quantkit.calibration.skeleton import Place, Skeleton, Weights
from quantkit.modules import experts_class


@dataclass(frozen=True)
class Linear:
    """A linear to solve: where its weight belongs, whether it lies on disk [in, out], whether it is one of a layer's
    experts. Tokens are routed otherwise in the two streams, so an expert's outputs there cannot be compared."""

    place: Place
    transposed: bool
    expert: bool


@dataclass(frozen=True)
class Source:
    """Where weights come from, and what they become: `compute` is the dtype in which linears multiply."""

    skeleton: Skeleton
    weights: Weights
    compute: torch.dtype


@dataclass(frozen=True)
class Layer:
    """The linears of a layer, or of one expert, and the weights of those not yet solved, [out, in]: as they are on
    disk, and as passes compute with them. The other parameters are in their modules. experts: by name those of which
    no weight is in memory."""

    linears: Linears
    weights: dict[str, torch.Tensor]
    ready: dict[str, torch.Tensor]
    experts: Mapping[str, Experts] = field(default_factory=dict)

    def drop(self, group: Sequence[str]) -> None:
        for name in group:
            del self.weights[name], self.ready[name]


class Experts:
    """The experts of one module of a layer, whose weights come one expert at a time. name: of the module. module: a
    SingleExperts."""

    def __init__(
        self, source: Source, name: str, module: Any, places: Iterable[Place], wanted: Mapping[str, Linear]
    ) -> None:
        self.source, self.name, self.module = source, name, module
        self.count: int = module.count
        self.places: list[list[Place]] = [[] for _ in range(self.count)]
        self.wanted: list[dict[str, Linear]] = [{} for _ in range(self.count)]
        for place in places:
            if (expert := self._expert(place)) is not None:
                self.places[expert].append(place)
        for linear, own in wanted.items():
            if (expert := self._expert(own.place)) is not None:
                self.wanted[expert][linear] = own

    def _expert(self, place: Place) -> int | None:
        """Whose parameter it is."""
        if not place.module.startswith(f"{self.name}."):
            return None
        number = place.module.removeprefix(f"{self.name}.").partition(".")[0]
        return int(number) if number.isdigit() else None

    def groups(self, expert: int) -> list[Group]:
        """Its linears to solve by shared input, in the order in which they are called."""
        names = {linear.place.module.rpartition(".")[2]: name for name, linear in self.wanted[expert].items()}
        calls = (self.module.into, [self.module.out_of])
        return [group for call in calls if (group := tuple(names[leaf] for leaf in call if leaf in names))]

    def last(self, expert: int) -> str | None:
        """The linear that gives what the expert gives, if it is to be solved."""
        path = f"{self.name}.{expert}.{self.module.out_of}"
        return next((name for name, linear in self.wanted[expert].items() if linear.place.module == path), None)

    def looked_at(self) -> list[int]:
        """Experts of which a linear is to be solved that gets the tokens themselves."""
        return [n for n in range(self.count) if any(group != (self.last(n),) for group in self.groups(n))]

    @contextmanager
    def read(self, expert: int) -> Iterator[Layer]:
        """One expert with its weights. Its linears know what it ends with."""
        root = self.module.get_submodule(str(expert))
        with _filled(self.source, root, self.places[expert], self.wanted[expert]) as layer:
            if (last := self.last(expert)) is not None:
                layer.linears.ends[last] = root
            yield layer


def loaded_but_experts(source: Source, index: int, wanted: Mapping[str, Linear]) -> AbstractContextManager[Layer]:
    """A layer with its parameters in memory but those of experts."""
    skeleton = source.skeleton
    root, places = skeleton.layers[index], skeleton.inside[index]
    modules = {
        f"{skeleton.path}.{index}.{name}": module
        for name, module in root.named_modules()
        if isinstance(module, experts_class())
    }
    experts = {name: Experts(source, name, module, places, wanted) for name, module in modules.items()}
    apart = {place for own in experts.values() for some in own.places for place in some}
    others = [place for place in places if place not in apart]
    rest = {name: linear for name, linear in wanted.items() if linear.place not in apart}
    return _filled(source, root, others, rest, experts)


@contextmanager
def _filled(
    source: Source,
    root: nn.Module,
    places: Sequence[Place],
    wanted: Mapping[str, Linear],
    experts: Mapping[str, Experts] | None = None,
) -> Iterator[Layer]:
    """Modules in `root` with the parameters `places`, of which `wanted` are linears to solve."""
    skeleton, compute, experts = source.skeleton, source.compute, experts or {}
    solved = {linear.place for linear in wanted.values()}
    others = [place for place in places if place not in solved]
    skeleton.fill(others, source.weights)
    weights = {name: _weight(source, linear) for name, linear in wanted.items()}
    ready = {name: weight.to(compute) for name, weight in weights.items()}
    modules = {name: skeleton.model.get_submodule(x.place.module) for name, x in wanted.items()}
    linears = Linears(root, modules, {name: own.module for name, own in experts.items()})
    try:
        yield Layer(linears, weights, ready, experts)
    finally:
        linears.release()
        skeleton.clear(others)
        weights.clear()
        ready.clear()


def _weight(source: Source, linear: Linear) -> torch.Tensor:
    value = source.weights.read(linear.place.name).to(source.skeleton.device)
    value = value.T.contiguous() if linear.transposed else value
    return value.float() if source.compute == torch.float32 else value


def hidden_width(skeleton: Skeleton) -> int:
    """Width of the hidden states between layers."""
    config = skeleton.model.config
    return int(getattr(config, "hidden_size", None) or config.n_embd)
