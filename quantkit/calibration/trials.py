"""How far a model moves when all linears of one kind are written otherwise: measured, beside what is expected of it.

To second order, and with errors of several outputs and tokens taken to have nothing to do with each other, expectations
are about half of what happens; and for some kinds of linears less than that. So the model goes forward with each kind
of linear in turn written in about three bits, all layers at once, and is compared with itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from quantkit.calibration.experts import Routed
from quantkit.calibration.hidden import HiddenStates
from quantkit.calibration.layers import Linear, Source, hidden_width, loaded_but_experts
from quantkit.calibration.rows import Routing
from quantkit.calibration.skeleton import Call, Skeleton, Weights
from quantkit.calibration.variants import Variant, through_layer
from quantkit.solvers.team import ALONE

EVERY = 4  # of the tokens, one in so many is predicted
TOKENS = 16  # whose logits are there at a time, of two models
_PLAIN = ""  # the model as it is


def kind_of(module: str, layer: int) -> str:
    """A linear's name within its layer, the same for all experts: "self_attn.o_proj", "mlp.experts.*.down_proj"."""
    return re.sub(r"(^|\.)\d+(?=\.)", r"\1*", module.partition(f".{layer}.")[2])


class Trials:
    """The model as it is, and for each kind of linear one in which those have other weights, over token ids [rows,
    length], layer by layer. kinds: by name of a linear. folder: for hidden states and other weights; its files are the
    caller's to remove."""

    def __init__(
        self,
        skeleton: Skeleton,
        weights: Weights,
        ids: torch.Tensor,
        linears: Sequence[Mapping[str, Linear]],
        kinds: Mapping[str, str],
        folder: Path,
        compute: torch.dtype,
    ) -> None:
        self.skeleton, self.weights, self.ids, self.linears = skeleton, weights, ids, linears
        self.kinds, self.compute = kinds, compute
        names = [_PLAIN, *dict.fromkeys(kinds.values())]
        shape = (*ids.shape, hidden_width(skeleton))
        self.states = {
            kind: [HiddenStates(folder / f"trial-{number}-{i}", *shape, lasting=True) for i in (0, 1)]
            for number, kind in enumerate(names)
        }
        self.calls: list[Call] = []
        self.folder = folder
        self.others: dict[str, tuple[Path, torch.Size]] = {}

    def keep(self, name: str, weight: torch.Tensor) -> None:
        """The other weight [out, in] of a linear of the next layer; on disk, as only one kind is needed at a time."""
        path = self.folder / f"trial-weight-{len(self.others)}"
        weight.to(self.compute).cpu().contiguous().view(torch.uint8).numpy().tofile(path)
        self.others[name] = path, weight.shape

    def _other(self, name: str) -> torch.Tensor:
        path, shape = self.others[name]
        raw = torch.from_numpy(np.fromfile(path, np.uint8))
        return raw.view(self.compute).reshape(shape).to(self.skeleton.device)

    def sums(self, layer: int) -> dict[str, int | None]:
        """By kind, of the hidden states that enter a layer, which this has written."""
        return {kind: states[layer % 2].sum_of(range(len(self.ids))) for kind, states in self.states.items()}

    def kept(self, layer: int, sums: Mapping[str, int | None]) -> bool:
        """Whether the hidden states that enter a layer are on disk as they were written."""
        return all(states[layer % 2].holds(range(len(self.ids)), sums[kind]) for kind, states in self.states.items())

    def begin(self, layer: int) -> None:
        """Prepares for a layer; for the first one, by embedding the text."""
        with self.skeleton.embedded(self.weights, self.ids) as (hidden, self.calls):
            if layer == 0:
                for row, x in enumerate(hidden):
                    for states in self.states.values():
                        states[0].write(row, x)

    @torch.inference_mode()
    def layer(self, index: int) -> None:
        """With the other weights that were kept of it, which are gone then."""
        source, wanted = Source(self.skeleton, self.weights, self.compute), self.linears[index]
        with loaded_but_experts(source, index, wanted) as layer, ExitStack() as files:

            def routed(name: str, like: Routing, count: int) -> Routed:
                path, (rows, length) = self.folder / f"trial-routed-{name}", self.ids.shape
                return Routed(path, (rows, length), like, count, files, self.skeleton.device, ALONE)

            variants = [self._variant(kind, index) for kind in self.states]
            through_layer(layer, variants, range(len(self.ids)), routed)
        for states in self.states.values():
            states[(index + 1) % 2].sync()
        for path, _ in self.others.values():
            path.unlink()
        self.others = {}

    def _variant(self, kind: str, index: int) -> Variant:
        before, after = self.states[kind][index % 2], self.states[kind][(index + 1) % 2]

        def run(row: int) -> torch.Tensor:
            return self.skeleton.run(index, before.read(row, self.skeleton.device), self.calls[index])

        def others(names: Sequence[str]) -> dict[str, torch.Tensor]:
            return {name: self._other(name) for name in names if name in self.others and self.kinds[name] == kind}

        return Variant(run, after.write, others)

    @torch.inference_mode()
    def divergences(self) -> dict[str, float]:
        """By kind, behind the last layer: KL divergence from the model as it is, in nats a token."""
        logits = self.skeleton.logits(self.weights)
        sums = dict.fromkeys((kind for kind in self.states if kind != _PLAIN), 0.0)
        place, tokens = len(self.linears) % 2, range(EVERY - 1, self.ids.shape[1], EVERY)
        for row in range(len(self.ids)):
            every = {kind: states[place].read(row, self.skeleton.device) for kind, states in self.states.items()}
            for some in _parts(tokens):
                plain = logits(every[_PLAIN][:, some]).log_softmax(1)
                for kind in sums:
                    other = logits(every[kind][:, some]).log_softmax(1)
                    sums[kind] += float((plain.exp() * (plain - other)).sum(dtype=torch.float64))
        return {kind: total / (len(self.ids) * len(tokens)) for kind, total in sums.items()}

    def close(self) -> None:
        for states in self.states.values():
            for state in states:
                state.close()


def _parts(tokens: range) -> Iterable[list[int]]:
    return (list(tokens[start : start + TOKENS]) for start in range(0, len(tokens), TOKENS))
