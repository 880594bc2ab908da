"""Forward passes that stop inside a layer: at every linear, until its new weight is there.

A decoder layer is run for one row of calibration text at a time. Where it calls a linear that is still to be solved,
the pass stops, and its input is looked at; when the linear is solved, the pass goes on with the new weight. So the
inputs of every linear are those that the quantized model will give it (true-sequential order), and no linear is
computed twice. A pass that has stopped holds its activations; where that would be too much memory, it is let go and run
again from the start of the layer up to the next stop: the same numbers, bit for bit.

Passes are greenlets: a stack of their own inside one thread, which a thread pool of torch does not notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import nn


@dataclass(frozen=True)
class Stop:
    """A pass stands at this linear, with this input [..., in]."""

    linear: str
    x: torch.Tensor


def apply_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x · weightᵀ in x's dtype; weight [out, in] may be stored in another."""
    return nn.functional.linear(x, weight.to(x.dtype))


def _unanswered(name: str, x: torch.Tensor) -> torch.Tensor:
    raise AssertionError(name)


class Linears:
    """The linears of one layer, taken over: a call of the module asks `answer` for what it gives (without the bias).

    modules: name → module, in memory. `answer(name, x)` may be exchanged at any time.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.answer: Callable[[str, torch.Tensor], torch.Tensor] = _unanswered
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
        for module in self.modules.values():
            del module.forward

    def groups(self, run: Callable[[], object], weights: Mapping[str, torch.Tensor]) -> list[tuple[str, ...]]:
        """The linears by shared input, in the order in which `run()` first calls one of each group."""
        seen: list[tuple[torch.Tensor, list[str]]] = []

        def note(name: str, x: torch.Tensor) -> torch.Tensor:
            group = next((names for tensor, names in seen if tensor is x), None)
            if group is None:
                seen.append((x, [name]))
            else:
                group.append(name)
            return apply_linear(x, weights[name])

        self.answer = note
        run()
        return [tuple(names) for _, names in seen]


class Pass:
    """One row's way through a layer. `begin()` runs the layer and returns what leaves it."""

    def __init__(
        self, linears: Linears, begin: Callable[[], torch.Tensor], weights: Mapping[str, torch.Tensor]
    ) -> None:
        self.linears, self.begin = linears, begin
        self.weights = weights  # what a linear that was passed is computed with
        self.passed: set[str] = set()
        self._inside: greenlet | None = None
        self._at: Stop | None = None

    def stop(self, linear: str) -> torch.Tensor:
        """The input of `linear`, which must be the next not passed: [tokens, in], or what it is called with."""
        if self._at is None:
            found = self._go()
            assert isinstance(found, Stop), f"the layer ended before {linear}"
            self._at = found
        assert self._at.linear == linear, f"{self._at.linear} is called, {linear} was to come"
        return self._at.x

    def go_past(self, linears: Iterable[str]) -> None:
        """From now on these are computed with `weights`."""
        self.passed.update(linears)
        self._at = None

    def finish(self) -> torch.Tensor:
        """Runs to the end of the layer."""
        found = self._go()
        assert isinstance(found, torch.Tensor), "the layer calls a linear that nobody expected"
        self._inside = None
        return found

    def drop(self) -> None:
        """Lets go of the activations: the next `stop` or `finish` runs the layer from its start."""
        if self._inside is not None:
            self._inside.throw()
        self._inside, self._at = None, None

    def _go(self) -> Stop | torch.Tensor:
        self.linears.answer = self._answer
        if self._inside is None:
            self._inside = greenlet(self._run)
        found: Stop | torch.Tensor = self._inside.switch()
        return found

    def _run(self) -> torch.Tensor | None:
        try:
            return self.begin()
        except GreenletExit:
            return None

    def _answer(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if name not in self.passed:
            parent = getcurrent().parent
            assert parent is not None
            parent.switch(Stop(name, x))
        return apply_linear(x, self.weights[name])
