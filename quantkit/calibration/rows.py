"""Forward passes that stop inside a layer: at the first linear whose new weight is not there yet.

A decoder layer is run for one row of calibration text at a time. Where it calls a linear that is still to be solved,
the pass ends, and its input is looked at; when the linear is solved, the layer is run again with the new weight, up to
the next one. So the inputs of every linear are those that the quantized model will give it (true-sequential order),
whatever a layer looks like, and nothing of a pass stays in memory.

Two things save running most of it again. Where a module gives what its last linear gives (attention, the feed-forward
part), and that linear's inputs were kept on disk, the module is not run, but its last linear. And experts do not get
what other experts give: one pass tells what all of them get.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from quantkit.calibration.hidden import HiddenStates
from quantkit.errors import RunError
from quantkit.modules import in_64s

Group = tuple[str, ...]  # linears that share their inputs


class Stop(BaseException):
    """Ends a pass at a linear. Not an Exception: no module may catch it."""

    def __init__(self, linear: str, x: torch.Tensor) -> None:
        self.linear, self.x = linear, x


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

    layer: the module they are in. modules: name → module, in memory. `answer(name, x)` may be exchanged at any time;
    before a module that ends with a linear is run, `skip(name)` is asked for what it gives: None lets it run.
    """

    def __init__(self, layer: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        self.layer, self.modules = layer, modules
        self.answer: Callable[[str, torch.Tensor], torch.Tensor] = _unanswered
        self.skip: Callable[[str], torch.Tensor | None] = _nothing
        self.ends: dict[str, nn.Module] = {}
        for name, module in modules.items():
            module.forward = self._forward(name, module)

    def _forward(self, name: str, module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            y = self.answer(name, x)
            return y if module.bias is None else y + module.bias

        return forward

    def release(self) -> None:
        """Gives the modules their own forward back, and lets go of what answered."""
        self.answer, self.skip = _unanswered, _nothing
        for module in (*self.modules.values(), *self.ends.values()):
            del module.forward
        self.ends = {}

    def groups(self, run: Callable[[], object], weights: Mapping[str, torch.Tensor]) -> list[Group]:
        """The linears by shared input, in the order in which `run()` first calls one of each group. Finds what ends
        with a linear, too. RunError for a linear that is called twice."""
        seen: list[tuple[weakref.ref[torch.Tensor], list[str]]] = []

        def note(name: str, x: torch.Tensor) -> torch.Tensor:
            if any(name in names for _, names in seen):
                raise irregular(f"{name} is called more than once for a text")
            group = next((names for tensor, names in seen if tensor() is x), None)
            if group is None:
                seen.append((weakref.ref(x), [name]))
            else:
                group.append(name)
            return apply_linear(x, weights[name])

        self.answer = note
        self._find_ends(run)
        return [tuple(names) for _, names in seen]

    def _find_ends(self, run: Callable[[], object]) -> None:
        """Runs the layer; notes the outermost module that gives the very tensor that its last linear gives, with
        nothing added to it in place."""
        names = {module: name for name, module in self.modules.items()}
        inside = {m: {names[x] for x in m.modules() if x in names} for m in self.layer.modules()}
        given: dict[str, tuple[weakref.ref[torch.Tensor], float]] = {}  # in the order of calls
        ends: dict[str, tuple[nn.Module, list[bool] | None]] = {}

        def look(module: nn.Module, _args: object, output: Any) -> None:
            if module in names:
                given[names[module]] = weakref.ref(output), _fingerprint(output)
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


def in_stages(groups: Sequence[Group], experts: frozenset[str]) -> list[list[Group]]:
    """Groups whose inputs one pass can tell, in the order of their first: those of the experts of one module that come
    first in their expert, those that come second, …; every other group is a stage of its own."""
    stages: dict[tuple[str, int], list[Group]] = {}
    rank: dict[str, int] = {}
    for number, group in enumerate(groups):
        expert = group[0].rpartition(".")[0]
        rank[expert] = rank.get(expert, -1) + 1
        key = (expert.rpartition(".")[0], rank[expert]) if group[0] in experts else ("", -1 - number)
        stages.setdefault(key, []).append(group)
    return list(stages.values())


class Passes:
    """All rows' way through a layer. `begin(row)` runs it and returns what leaves it; `weights`: of the linears that
    were solved; `inputs`: what they get, for those that a module ends with."""

    def __init__(self, linears: Linears, begin: Callable[[int], torch.Tensor]) -> None:
        self.linears, self.begin = linears, begin
        self.weights: dict[str, torch.Tensor] = {}
        self.inputs: dict[str, HiddenStates] = {}
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
        """Hands what linears without a new weight are called with to `wanted`, by name, and goes on with their old
        ones, up to the last of them."""
        missing = dict(wanted)

        def answer(name: str, x: torch.Tensor) -> torch.Tensor:
            if name in self.weights:
                return self._answer(name, x)
            if name in missing:
                missing.pop(name)(x)
                if not missing:
                    raise Stop(name, x)
            return apply_linear(x, old[name])

        with suppress(Stop):
            self._run(row, answer)
        self._all_called(missing)

    def collect(
        self, row: int, wanted: Mapping[str, Callable[[torch.Tensor], None]], outputs: Mapping[str, int]
    ) -> None:
        """Hands what experts' linears are called with to `wanted`, by name. `outputs`: how many numbers each of the
        experts' linears that are not solved gives a token: zeros here, as no other expert gets them."""
        missing = dict(wanted)

        def answer(name: str, x: torch.Tensor) -> torch.Tensor:
            if name in self.weights or name not in outputs:
                return self._answer(name, x)
            if name in missing:
                missing.pop(name)(x)
            return x.new_zeros((*x.shape[:-1], outputs[name]))

        with suppress(Stop):  # at something behind the experts
            self._run(row, answer)
        self._all_called(missing)

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
        self.linears.answer, self.linears.skip = answer, self._skip
        try:
            return self.begin(row)
        finally:
            self.linears.answer, self.linears.skip = _unanswered, _nothing

    def _answer(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name not in self.weights:
            raise Stop(name, x)
        return apply_linear(x, self.weights[name])

    def _skip(self, name: str) -> torch.Tensor | None:
        weight = self.weights.get(name)
        if weight is None or name not in self.inputs:
            return None
        y = apply_linear(self.inputs[name].read(self._row, weight.device), weight).float()
        bias: torch.Tensor | None = self.linears.modules[name].bias  # type: ignore[assignment]
        return y if bias is None else y + bias
