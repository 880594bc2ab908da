"""How much it matters what a linear gives, and for which tokens: squares of the gradient of the model's own loss.

A model predicts p; let y be drawn from p, and g the gradient of −log p(y) by what a linear gives for a token. A small
change d of that moves the model's distribution by KL ≈ ½·E[(g·d)²] (the Fisher information, as of LeCun et al. 1990 and
Amari 1998). So g² weighs the errors of weights in nats. Which outputs it is large for and which tokens is kept apart:
g² of token t and output o is taken to be in proportion to Σ over outputs for t times Σ over tokens for o. Tokens differ
by orders of magnitude, and those with the largest inputs, the first of a text above all, matter least.

The text goes forward once, every layer's input kept on disk, and back once, a layer in memory at a time, and of its
experts one. These are not gone back through where they are called: first it is found what the gradient is by what they
give, of all rows; then each expert has its turn, with all rows; then the layer is gone back through once more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quantkit.calibration.backward import Backward
from quantkit.calibration.experts import Routed
from quantkit.calibration.hidden import HiddenStates
from quantkit.calibration.layers import Layer, Linear, Source, hidden_width, loaded_but_experts
from quantkit.calibration.rows import Routing
from quantkit.calibration.skeleton import Call, Skeleton, Weights
from quantkit.calibration.variants import Variant, none, through_layer
from quantkit.solvers.team import ALONE

SEED = 20240229  # of the tokens that are drawn
TOKENS = 64  # whose logits are there at a time


@dataclass(frozen=True)
class Squares:
    """Of the gradients by what a linear gives. outputs: the mean of g² over all tokens, float64 [out]. tokens: Σ g²
    over all outputs, float32 [rows, length]; None for an expert, which gets some of the tokens."""

    outputs: torch.Tensor
    tokens: torch.Tensor | None


class Sensitivity:
    """Goes through a model forward and back over token ids [rows, length]. linears: by layer and name, as in
    `calibration.stream`. scratch: a folder for hidden states, which the caller removes."""

    def __init__(
        self,
        skeleton: Skeleton,
        weights: Weights,
        ids: torch.Tensor,
        linears: Sequence[Mapping[str, Linear]],
        scratch: Path,
        compute: torch.dtype,
    ) -> None:
        self.skeleton, self.weights, self.ids, self.linears = skeleton, weights, ids, linears
        self.scratch, self.compute = scratch, compute

    def run(self, done: Callable[[int], None] = lambda _: None) -> dict[str, Squares]:
        """By linear. done: told of each layer, both ways."""
        rows, length = self.ids.shape
        width, count = hidden_width(self.skeleton), len(self.skeleton.layers)
        found: dict[str, Squares] = {}
        with ExitStack() as stack:

            def states(name: str) -> HiddenStates:
                file = HiddenStates(self.scratch / name, rows, length, width)
                stack.callback(file.remove)
                return file

            before = [states(f"before-{index}") for index in range(count + 1)]
            with self.skeleton.embedded(self.weights, self.ids) as (hidden, calls):
                for row, x in enumerate(hidden):
                    before[0].write(row, x)
                calls = [_ordinary(call) for call in calls]
            for index in range(count):
                with self._loaded(index) as layer, ExitStack() as files, torch.no_grad():
                    variant = Variant(
                        partial(self._run, index, calls[index], before[index]), before[index + 1].write, none
                    )
                    through_layer(layer, [variant], range(rows), partial(self._routed, files))
                done(index)
            gradients = states("gradients")
            self._from_logits(before[-1], gradients)
            for index in reversed(range(count)):
                with self._loaded(index) as layer:
                    found |= self._back(index, calls[index], layer, before[index], gradients)
                before[index].remove()
                done(index)
        return found

    def _loaded(self, index: int) -> AbstractContextManager[Layer]:
        return loaded_but_experts(Source(self.skeleton, self.weights, self.compute), index, self.linears[index])

    def _routed(self, files: ExitStack, name: str, like: Routing, count: int) -> Routed:
        path, (rows, length) = self.scratch / f"gradients-{name}", self.ids.shape
        return Routed(path, (rows, length), like, count, files, self.skeleton.device, ALONE)

    def _from_logits(self, states: HiddenStates, gradients: HiddenStates) -> None:
        """The gradients by what leaves the last layer, of a token drawn at every place."""
        generator = torch.Generator().manual_seed(SEED)
        logits = self.skeleton.logits(self.weights, gradients=True)
        for row in range(states.shape[0]):
            whole = states.read(row, self.skeleton.device)
            found = torch.empty_like(whole)
            for start in range(0, whole.shape[1], TOKENS):
                x = whole[:, start : start + TOKENS].clone().requires_grad_()
                scores = logits(x)
                drawn = _drawn(scores.detach(), generator)
                torch.nn.functional.cross_entropy(scores, drawn, reduction="sum").backward()  # type: ignore[no-untyped-call]
                assert x.grad is not None
                found[:, start : start + TOKENS] = x.grad
            gradients.write(row, found)

    def _back(
        self, index: int, call: Call, layer: Layer, before: HiddenStates, gradients: HiddenStates
    ) -> dict[str, Squares]:
        with ExitStack() as files:
            step, routed = partial(self._step, index, call), partial(self._routed, files)
            scratch, device = self.scratch / "gradients", self.skeleton.device
            back = Backward(layer, step, before, gradients, routed, scratch, device)
            back.run()
        count = self.ids.numel()
        return {name: Squares(part / count, back.tokens.get(name)) for name, part in back.sums.items()}

    def _step(self, index: int, call: Call, x: torch.Tensor) -> torch.Tensor:
        return self.skeleton.run(index, x, call)

    def _run(self, index: int, call: Call, before: HiddenStates, row: int) -> torch.Tensor:
        return self._step(index, call, before.read(row, self.skeleton.device))


def _drawn(scores: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """int64 [tokens]: of each row of logits float32 [tokens, vocabulary], a token by its probability."""
    sums = scores.softmax(1).cumsum(1)
    part = torch.rand(len(sums), 1, generator=generator, dtype=torch.float64).to(sums.device, sums.dtype)
    return torch.searchsorted(sums, part * sums[:, -1:]).clamp_(max=sums.shape[1] - 1)[:, 0]


def _ordinary(call: Call) -> Call:
    """The same with tensors that autograd may keep: those made in inference mode it may not."""

    def copied(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.clone()
        if isinstance(value, tuple):
            return tuple(map(copied, value))
        return value

    return Call(copied(call.args), {key: copied(value) for key, value in call.kwargs.items()})
