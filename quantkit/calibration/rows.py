"""Forward passes that stop inside a layer: at the first linear whose new weight is not there yet.

A decoder layer is run for one row of calibration text at a time. Where it calls a linear that is still to be solved,
the pass ends, and its input is looked at; when the linear is solved, the layer is run again with the new weight, up to
the next one. So the inputs of every linear are those that the quantized model will give it (true-sequential order),
whatever a layer looks like, and nothing of a pass stays in memory.

What saves running most of it again: where a module gives what its last linear gives (attention, the feed-forward
part), and that linear's inputs were kept on disk, the module is not run, but its last linear. A module of experts is
seen as a whole: a pass ends at it, and what it gives is found elsewhere, expert by expert.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantkit.calibration.hidden import HiddenStates
from quantkit.errors import RunError
from quantkit.modules import in_64s

Group = tuple[str, ...]  # linears that share their inputs, or the module of a layer's experts


@dataclass(frozen=True)
class Routing:
    """What a module of experts is called with: hidden states [tokens, hidden], and of each token which experts it is
    sent to, int [tokens, k], and what their results are multiplied with, float [tokens, k]."""

    hidden: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor


class Stop(BaseException):
    """Ends a pass at a linear, or at experts. Not an Exception: no module may catch it."""

    def __init__(self, linear: str, x: torch.Tensor, routing: Routing | None = None) -> None:
        self.linear, self.x, self.routing = linear, x, routing


def apply_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x · weightᵀ, computed in the weight's dtype and returned in x's."""
    tokens = x.shape[-2]
    y = nn.functional.linear(in_64s(x.to(weight.dtype)), weight)
    return y[..., :tokens, :].to(x.dtype)


def irregular(what: str) -> RunError:
    return RunError(what, hint="such a layer cannot be calibrated; leave it alone with --skip, or use --method rtn")


def _unanswered(*_: object) -> torch.Tensor:
    raise AssertionError("no pass is under way")


def _nothing(_: str) -> None:
    return None


class Linears:
    """The linears of one layer, taken over: a call of the module asks `answer` for what it gives (without the bias).

    layer: the module they are in. modules: name → module, in memory. experts: the same of modules of experts, which ask
    `route`. `answer(name, x)` and `route(name, routing)` may be exchanged at any time; before a module that ends with a
    linear is run, `skip(name)` is asked for what it gives: None lets it run.
    """

    def __init__(
        self, layer: nn.Module, modules: Mapping[str, nn.Module], experts: Mapping[str, nn.Module] | None = None
    ) -> None:
        self.layer, self.modules, self.experts = layer, modules, experts or {}
        self.answer: Callable[[str, torch.Tensor], torch.Tensor] = _unanswered
        self.route: Callable[[str, Routing], torch.Tensor] = _unanswered
        self.skip: Callable[[str], torch.Tensor | None] = _nothing
        self.ends: dict[str, nn.Module] = {}
        self.routings: dict[str, Routing] = {}  # of `experts`, on the meta device, for the row that `groups` looked at
        for name, module in modules.items():
            module.forward = self._forward(name, module)
        for name, module in self.experts.items():
            module.forward = self._routed(name)

    def _forward(self, name: str, module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            y = self.answer(name, x)
            return y if module.bias is None else y + module.bias

        return forward

    def _routed(self, name: str) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        def forward(
            hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
        ) -> torch.Tensor:
            return self.route(name, Routing(hidden_states, top_k_index, top_k_weights))

        return forward

    def release(self) -> None:
        """Gives the modules their own forward back, and lets go of what answered."""
        self.answer, self.route, self.skip = _unanswered, _unanswered, _nothing
        for module in (*self.modules.values(), *self.experts.values(), *self.ends.values()):
            vars(module).pop("forward", None)
        self.ends = {}

    def groups(self, run: Callable[[], object], weights: Mapping[str, torch.Tensor]) -> list[Group]:
        """The linears by shared input, and experts, in the order in which `run()` first calls one of each group. Finds
        what ends with a linear, too. RunError for a linear that is called twice."""
        seen: list[tuple[Callable[[], torch.Tensor | None], list[str]]] = []

        def once(name: str) -> None:
            if any(name in names for _, names in seen):
                raise irregular(f"{name} is called more than once for a text")

        def route(name: str, routing: Routing) -> torch.Tensor:
            once(name)
            seen.append((lambda: None, [name]))
            shapes = (routing.hidden, routing.index, routing.weights)
            self.routings[name] = Routing(*(torch.empty_like(tensor, device="meta") for tensor in shapes))
            return routing.hidden.clone()  # numbers, so that it can be seen where they are added to something

        def note(name: str, x: torch.Tensor) -> torch.Tensor:
            once(name)
            group = next((names for tensor, names in seen if tensor() is x), None)
            if group is None:
                seen.append((weakref.ref(x), [name]))
            else:
                group.append(name)
            return apply_linear(x, weights[name])

        self.answer, self.route = note, route
        self._find_ends(run)
        return [tuple(names) for _, names in seen]

    def _find_ends(self, run: Callable[[], object]) -> None:
        """Runs the layer; notes the outermost module that gives the very tensor that its last linear gives, with
        nothing added to it in place."""
        names = {module: name for name, module in (*self.modules.items(), *self.experts.items())}
        inside = {m: {names[x] for x in m.modules() if x in names} for m in self.layer.modules()}
        given: dict[str, tuple[Callable[[], torch.Tensor | None], float]] = {}  # in the order of calls
        ends: dict[str, tuple[nn.Module, list[bool] | None]] = {}

        def look(module: nn.Module, _args: object, output: Any) -> None:
            if module in names:
                alone = names[module] in self.modules  # what experts give, no linear does
                given[names[module]] = weakref.ref(output) if alone else lambda: None, _fingerprint(output)
                return
            last = next((name for name in reversed(given) if name in inside[module]), None)
            several = type(output) is tuple
            tensors = [t for t in output if t is not None] if several else [output]
            if last is None or len(tensors) != 1 or not isinstance(tensors[0], torch.Tensor):
                return
            if given[last][0]() is tensors[0] and given[last][1] == _fingerprint(tensors[0]):
                ends[last] = (module, [t is not None for t in output] if several else None)

        hooks = [m.register_forward_hook(look) for m in self.layer.modules() if m is not self.layer]
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        for name, (module, places) in ends.items():
            module.forward = self._cut_short(name, module.forward, places)
            self.ends[name] = module

    def _cut_short(self, name: str, own: Callable[..., Any], places: list[bool] | None) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            y = self.skip(name)
            if y is None:
                return own(*args, **kwargs)
            return y if places is None else tuple(y if here else None for here in places)

        return forward


def _fingerprint(tensor: torch.Tensor) -> float:
    """Another one after a change in place, of some thousand numbers that are spread over it."""
    some = tensor.flatten()[:: max(1, tensor.numel() // 4096)].double()
    return float(some @ torch.arange(1, some.numel() + 1, dtype=torch.float64, device=some.device))


class Passes:
    """All rows' way through a layer, or through an expert. `begin(row)` runs it and returns what leaves it; `weights`:
    of the linears that were solved; `inputs`: what they get, for those that a module ends with; `totals`: what modules
    of experts give of a row."""

    def __init__(self, linears: Linears, begin: Callable[[int], torch.Tensor]) -> None:
        self.linears, self.begin = linears, begin
        self.weights: dict[str, torch.Tensor] = {}
        self.inputs: dict[str, HiddenStates] = {}
        self.totals: dict[str, Callable[[int], torch.Tensor]] = {}
        self._row = 0

    def stop(self, row: int, linear: str) -> torch.Tensor:
        """What `linear`, the next one without a new weight, is called with."""
        try:
            self._run(row, self._answer)
        except Stop as stop:
            if stop.linear == linear:
                return stop.x
        raise irregular(f"{linear} is not called, or later than for another text")

    def watch(
        self, row: int, wanted: Mapping[str, Callable[[torch.Tensor], None]], old: Mapping[str, torch.Tensor]
    ) -> None:
        """Hands what linears are called with to `wanted`, by name, and goes on, with the old weights of those that have
        no new one, up to the last of them."""
        with suppress(Stop):
            self._watch(row, wanted, old, to_the_end=False)

    def through(
        self, row: int, wanted: Mapping[str, Callable[[torch.Tensor], None]], old: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """The same, all the way. Returns what leaves the layer."""
        try:
            return self._watch(row, wanted, old, to_the_end=True)
        except Stop as stop:
            raise irregular(f"{stop.linear} is called for some texts only") from None

    def routing(
        self,
        row: int,
        experts: str,
        wanted: Mapping[str, Callable[[torch.Tensor], None]] | None = None,
        old: Mapping[str, torch.Tensor] | None = None,
    ) -> Routing:
        """What `experts`, the next of whose results nothing is known, are called with. The rest as for `watch`."""
        try:
            self._watch(row, wanted or {}, old or {}, to_the_end=True)
        except Stop as stop:
            if stop.linear == experts and stop.routing is not None:
                return stop.routing
        raise irregular(f"{experts} is not called, or later than for another text")

    def _watch(
        self,
        row: int,
        wanted: Mapping[str, Callable[[torch.Tensor], None]],
        old: Mapping[str, torch.Tensor],
        *,
        to_the_end: bool,
    ) -> torch.Tensor:
        missing = dict(wanted)

        def answer(name: str, x: torch.Tensor) -> torch.Tensor:
            if name in missing:
                missing.pop(name)(x)
                if not missing and not to_the_end:
                    raise Stop(name, x)
            if name in old and name not in self.weights:
                return apply_linear(x, old[name])
            return self._answer(name, x)

        try:
            found = self._run(row, answer)
        except Stop:
            self._all_called(missing)
            raise
        self._all_called(missing)
        return found

    def _all_called(self, missing: Mapping[str, object]) -> None:
        if missing:
            raise irregular(f"{next(iter(missing))} is not called, or later than for another text")

    def finish(self, row: int) -> torch.Tensor:
        """What leaves the layer."""
        try:
            return self._run(row, self._answer)
        except Stop as stop:
            raise irregular(f"{stop.linear} is called for some texts only") from None

    def keeps(self, group: Group) -> bool:
        """Whether a module ends with a linear of this group, so that its inputs are of use later."""
        return not self.linears.ends.keys().isdisjoint(group)

    def keep(self, group: Group, inputs: HiddenStates) -> None:
        """Takes what the linears of a group get. Of other linears in the module that ends with one of them nobody will
        ask any more."""
        for end in self.linears.ends.keys() & set(group):
            self.inputs[end] = inputs
            inside = set(self.linears.ends[end].modules())
            self.weights = {n: w for n, w in self.weights.items() if self.linears.modules[n] not in inside}

    def _run(self, row: int, answer: Callable[[str, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        self._row = row
        linears = self.linears
        linears.answer, linears.route, linears.skip = answer, self._route, self._skip
        try:
            return self.begin(row)
        finally:
            linears.answer, linears.route, linears.skip = _unanswered, _unanswered, _nothing

    def _answer(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name not in self.weights:
            raise Stop(name, x)
        return apply_linear(x, self.weights[name])

    def _route(self, name: str, routing: Routing) -> torch.Tensor:
        if name not in self.totals:
            raise Stop(name, routing.hidden, routing)
        return self.totals[name](self._row)

    def _skip(self, name: str) -> torch.Tensor | None:
        weight = self.weights.get(name)
        if weight is None or name not in self.inputs:
            return None
        y = apply_linear(self.inputs[name].read(self._row, weight.device), weight).float()
        bias: torch.Tensor | None = self.linears.modules[name].bias  # type: ignore[assignment]
        return y if bias is None else y + bias
