"""Forward passes that stop inside a layer: at the first linear whose new weight is not there yet.

A decoder layer is run for one row of calibration text at a time. Where it calls a linear that is still to be solved,
the pass ends, and its input is looked at; when the linear is solved, the layer is run again with the new weight, up to
the next one. So the inputs of every linear are those that the quantized model will give it (true-sequential order),
whatever a layer looks like, and nothing of a pass stays in memory.

What would be run again is mostly cut short: where a module gives what its last linear gives (attention, the
feed-forward part, an expert), and that linear's inputs were kept on disk, the module is not run, but its last linear.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from quantkit.calibration.hidden import HiddenStates


class _Stop(BaseException):
    """Ends a pass at a linear. Not an Exception: no module may catch it."""

    def __init__(self, linear: str, x: torch.Tensor) -> None:
        self.linear, self.x = linear, x


def apply_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x · weightᵀ, computed in the weight's dtype and returned in x's."""
    return nn.functional.linear(x.to(weight.dtype), weight).to(x.dtype)


def _unanswered(*_: object) -> torch.Tensor:
    raise AssertionError("no pass is under way")


class Linears:
    """The linears of one layer, taken over: a call of the module asks `answer` for what it gives (without the bias).

    layer: the module they are in. modules: name → module, in memory. `answer(name, x)` may be exchanged at any time;
    `skip(name)` is asked for what a module gives that ends with this linear, None if it is to be run.
    """

    def __init__(self, layer: nn.Module, modules: Mapping[str, nn.Module]) -> None:
        self.layer, self.modules = layer, modules
        self.answer: Callable[[str, torch.Tensor], torch.Tensor] = _unanswered
        self.skip: Callable[[str], torch.Tensor | None] = lambda _: None
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
        self.answer = _unanswered
        for module in (*self.modules.values(), *self.ends.values()):
            del module.forward
        self.ends = {}

    def groups(self, run: Callable[[], object], weights: Mapping[str, torch.Tensor]) -> list[tuple[str, ...]]:
        """The linears by shared input, in the order in which `run()` first calls one of each group. Finds what ends
        with a linear, too."""
        seen: list[tuple[torch.Tensor, list[str]]] = []

        def note(name: str, x: torch.Tensor) -> torch.Tensor:
            group = next((names for tensor, names in seen if tensor is x), None)
            if group is None:
                seen.append((x, [name]))
            else:
                group.append(name)
            return apply_linear(x, weights[name])

        self.answer = note
        self._find_ends(run)
        return [tuple(names) for _, names in seen]

    def _find_ends(self, run: Callable[[], object]) -> None:
        """Runs the layer; notes the outermost module that gives the very tensor that a linear gives."""
        names = {module: name for name, module in self.modules.items()}
        given: dict[str, torch.Tensor] = {}
        ends: dict[str, tuple[nn.Module, Any]] = {}

        def look(module: nn.Module, _args: object, output: Any) -> None:
            if module in names:
                given[names[module]] = output
                return
            tensors = [t for t in output if t is not None] if isinstance(output, tuple) else [output]
            name = next((n for n, y in given.items() if len(tensors) == 1 and y is tensors[0]), None)
            if name is not None and self.modules[name] in module.modules():  # no dropout behind it
                places = [t is not None for t in output] if isinstance(output, tuple) else None
                ends[name] = (module, places)

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


class Passes:
    """All rows' way through a layer. `begin(row)` runs it and returns what leaves it. `experts`: linears of experts, of
    which none gets what another one gives."""

    def __init__(self, linears: Linears, begin: Callable[[int], torch.Tensor], experts: frozenset[str]) -> None:
        self.linears, self.begin, self.experts = linears, begin, experts
        self.weights: dict[str, torch.Tensor] = {}  # of the linears that were solved
        self.inputs: dict[str, HiddenStates] = {}  # what they get, for those that a module ends with
        self._row, self._wanted = 0, ""

    def stop(self, row: int, linear: str) -> torch.Tensor:
        """What `linear`, the next one without a new weight, is called with."""
        try:
            self._run(row, linear)
            raise AssertionError(f"the layer ended before {linear}")
        except _Stop as stop:
            found, x = stop.linear, stop.x
        assert found == linear, f"{found} is called, {linear} was to come"
        return x

    def finish(self, row: int) -> torch.Tensor:
        """What leaves the layer."""
        return self._run(row, "")

    def keep(self, group: Sequence[str], inputs: HiddenStates) -> bool:
        """Tells what the linears of a group get; whether it is of use: where a module ends with one of them, of which
        no other linear will be asked again."""
        ends = self.linears.ends.keys() & set(group)
        for end in ends:
            self.inputs[end] = inputs
            inside = set(self.linears.ends[end].modules())
            self.weights = {n: w for n, w in self.weights.items() if self.linears.modules[n] not in inside}
        return bool(ends)

    def go_past(self, new: Mapping[str, torch.Tensor]) -> None:
        """From now on these linears are computed with these weights."""
        self.weights |= new

    def close(self) -> None:
        for inputs in self.inputs.values():
            inputs.remove()

    def _run(self, row: int, wanted: str) -> torch.Tensor:
        self._row, self._wanted = row, wanted
        self.linears.answer, self.linears.skip = self._answer, self._skip
        try:
            return self.begin(row)
        finally:
            self.linears.answer, self.linears.skip = _unanswered, lambda _: None

    def _answer(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name not in self.weights:
            raise _Stop(name, x)
        weight = self.weights[name]
        if name in self.experts and self._wanted in self.experts and _parent(name) != _parent(self._wanted):
            return x.new_zeros((*x.shape[:-1], len(weight)))  # of no use for what another expert gets
        return apply_linear(x, weight)

    def _skip(self, name: str) -> torch.Tensor | None:
        weight = self.weights.get(name)
        if weight is None or name not in self.inputs:
            return None
        y = apply_linear(self.inputs[name].read(self._row, weight.device), weight).float()
        bias: torch.Tensor | None = self.linears.modules[name].bias  # type: ignore[assignment]
        return y if bias is None else y + bias


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
