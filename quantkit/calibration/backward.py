"""Rows gone back through one layer, its experts one by one.

A graph through a layer's experts would hold the weights of all. So the layer is gone back through as if a module of
experts gave constants, as far as these: that is the gradient by what the module gives, of every row. Then each expert
has its turn with all rows, goes forward with what it gets of each, and back from that gradient. At last the layer is
gone back through to its beginning, and the module answers with what its experts found.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantkit.calibration.experts import Routed, old_sums
from quantkit.calibration.hidden import HiddenStates
from quantkit.calibration.layers import Experts, Layer
from quantkit.calibration.rows import Passes, Routing, apply_linear
from quantkit.calibration.stream import at_experts

Route = Callable[[Routing], torch.Tensor]


class Backward:
    """Of one layer. step: takes hidden states [1, length, width] through it. before: what enters it, by row.
    gradients: by what leaves it, by row; `run` puts those by what enters it in their place. routed(a name, what a
    module of experts is called with, how many there are): files for what they get and give. scratch: begins the names
    of other files. device: where the layer is.

    Found: sums, by linear Σ g² over all tokens, g the gradient by what it gives, float64 [out]; tokens, Σ g² over all
    outputs, float32 [rows, length], of linears that are no experts.
    """

    def __init__(
        self,
        layer: Layer,
        step: Callable[[torch.Tensor], torch.Tensor],
        before: HiddenStates,
        gradients: HiddenStates,
        routed: Callable[[str, Routing, int], Routed],
        scratch: Path,
        device: torch.device,
    ) -> None:
        self.layer, self.step, self.before, self.gradients = layer, step, before, gradients
        self.routed, self.scratch = routed, scratch
        self.device = device
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens = {name: torch.zeros(before.shape[:2]) for name in layer.ready}
        self._row = 0

    def run(self) -> None:
        rows = range(self.before.shape[0])
        with ExitStack() as files:
            routes = self._experts(rows, files) if self.layer.experts else {}
            for row in rows:
                x = self.before.read(row, self.device).requires_grad_()
                y = self._through(row, x, routes, noted=True)
                y.backward(self.gradients.read(row, self.device))  # type: ignore[no-untyped-call]
                self.gradients.write(row, _gradient(x))

    def _through(self, row: int, x: torch.Tensor, routes: dict[str, Route], *, noted: bool) -> torch.Tensor:
        self._row = row
        linears = self.layer.linears
        linears.answer = self._answer(self.layer, noted=noted)
        linears.route = lambda name, routing: routes[name](routing)
        return self.step(x)

    def _answer(self, layer: Layer, *, noted: bool) -> Callable[[str, torch.Tensor], torch.Tensor]:
        def answer(name: str, x: torch.Tensor) -> torch.Tensor:
            y = apply_linear(x, layer.ready[name])
            if noted:
                y.register_hook(lambda g: self._note(name, g))  # type: ignore[no-untyped-call]
            return y

        return answer

    def _note(self, name: str, g: torch.Tensor) -> None:
        squares = g.reshape(-1, g.shape[-1]).double().square()
        part = squares.sum(0)
        self.sums[name] = self.sums[name] + part if name in self.sums else part
        if name in self.tokens:
            self.tokens[name][self._row] += squares.sum(1).cpu()

    def _experts(self, rows: range, files: ExitStack) -> dict[str, Route]:
        """By module of experts, what answers in its place, and goes back."""
        layer, totals, routed = self.layer, {}, {}
        with torch.no_grad():
            passes = Passes(layer.linears, lambda row: self.step(self.before.read(row, self.device)))
            groups = layer.linears.groups(lambda: self.step(self.before.read(0, self.device)), layer.ready)
            for number, (_, name) in enumerate(at_experts(groups, layer)):
                if name is None:
                    break
                experts, like = layer.experts[name], layer.linears.routings[name]
                routed[name] = self.routed(str(number), like, experts.count)
                for row in rows:
                    routed[name].write(row, passes.routing(row, name, {}, layer.ready))
                totals[name] = passes.totals[name] = old_sums(experts, routed[name], rows)
        routes: dict[str, Route] = {name: partial(self._constant, total) for name, total in totals.items()}
        for name in reversed(routed):  # what comes behind is known by then
            routes[name] = self._one_by_one(name, routed[name], totals[name], routes, rows, files)
        return routes

    def _constant(self, total: Callable[[int], torch.Tensor], _: Routing) -> torch.Tensor:
        return total(self._row)

    def _one_by_one(
        self,
        name: str,
        routed: Routed,
        total: Callable[[int], torch.Tensor],
        routes: dict[str, Route],
        rows: range,
        files: ExitStack,
    ) -> Route:
        """Goes back through the experts of a module. Returns what answers in its place."""
        given, experts = self._by_what_is_given(name, total, routes, rows, files), self.layer.experts[name]
        back = routed.beside("back", files)
        scales: dict[int, list[torch.Tensor]] = {row: [] for row in rows}
        for expert in range(experts.count):
            with experts.read(expert) as one:
                one.linears.answer = self._answer(one, noted=True)
                for row in rows:
                    token, scale = routed.sent(row, expert)
                    if len(token):
                        x, scale = routed.inputs(row, expert).requires_grad_(), scale.requires_grad_()
                        self._through_expert(experts, expert, x, scale, given.read(row, self.device)[token])
                        routed.put(back, row, expert, _gradient(x))
                        scales[row].append(_gradient(scale))

        def route(routing: Routing) -> torch.Tensor:
            row = self._row
            by_weights = routed.by_place(row, torch.cat(scales[row]))
            gradients = routed.sums(row, back, scaled=False), by_weights
            found: torch.Tensor = _Known.apply(routing.hidden, routing.weights, total(row), *gradients)  # type: ignore[no-untyped-call]
            return found

        return route

    def _through_expert(
        self, experts: Experts, expert: int, x: torch.Tensor, scale: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        """x [tokens, hidden] there, and the gradient by what it gives back. No graph may outlive this: it would hold
        the expert's weights."""
        result = experts.module.one(expert, x) * scale[:, None]
        result.backward(gradient.to(result.dtype))

    def _by_what_is_given(
        self,
        name: str,
        total: Callable[[int], torch.Tensor],
        routes: dict[str, Route],
        rows: range,
        files: ExitStack,
    ) -> HiddenStates:
        """The gradient by what a module of experts gives, by row, on disk."""
        path = self.scratch.with_name(f"{self.scratch.name}-given")
        found: HiddenStates | None = None
        for row in rows:
            leaf = total(row).requires_grad_()
            ways: dict[str, Route] = {**routes, name: partial(_answered, leaf)}
            y = self._through(row, self.before.read(row, self.device), ways, noted=False)
            (gradient,) = torch.autograd.grad(y, leaf, self.gradients.read(row, self.device))
            if found is None:
                found = HiddenStates(path, len(rows), len(gradient), gradient.shape[1], gradient.dtype)
                files.callback(found.remove)
            found.write(row, gradient)
        assert found is not None
        return found


def _gradient(x: torch.Tensor) -> torch.Tensor:
    assert x.grad is not None
    return x.grad


def _answered(leaf: torch.Tensor, _: Routing) -> torch.Tensor:
    return leaf.clone()  # a module may add to it in place


class _Known(torch.autograd.Function):
    """What a module gives, and its gradients, found elsewhere."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weights: torch.Tensor,
        total: torch.Tensor,
        by_hidden: torch.Tensor,
        by_weights: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(by_hidden, by_weights)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        by_hidden, by_weights = ctx.saved_tensors
        return by_hidden, by_weights, None, None, None
