"""What a module of experts gets of all rows, and what it gives of them, on disk, while its experts come one by one.

All rows are taken to the experts first. Then each expert has its turn with the tokens that are sent to it, of all rows,
and what it gives of a token is added to what those before it have given: in the order in which the module adds them up.
So the sums are the same to the bit, and rows are read as often as tokens are sent to experts, not once for each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from quantkit.calibration.hidden import HiddenStates
from quantkit.calibration.layers import Experts, Layer
from quantkit.calibration.rows import Passes, Routing
from quantkit.solvers.team import Team


class Routed:
    """Hidden states of rows [rows, length] with what experts are sent of them, and the sums of what they give.

    path: begins the names of the files, which are gone with `files`. shape: rows and length. like: tensors of the
    widths and types that a row has. Each of a team has sums of its own rows.
    """

    def __init__(
        self, path: Path, shape: tuple[int, int], like: Routing, files: ExitStack, device: torch.device, team: Team
    ) -> None:
        self.device, self.team = device, team

        def file(kind: str, tensor: torch.Tensor) -> HiddenStates:
            states = HiddenStates(path.with_name(f"{path.name}-{kind}"), *shape, tensor.shape[-1], tensor.dtype)
            files.callback(states.remove)
            return states

        self.hidden, self.sums = file("hidden", like.hidden), file(f"sums-{team.rank}", like.hidden)
        self.index, self.weights = file("index", like.index), file("weights", like.weights)
        self.sums.clear()

    def write(self, row: int, routing: Routing) -> None:
        self.hidden.write(row, routing.hidden)
        self.index.write(row, routing.index)
        self.weights.write(row, routing.weights)

    def share(self) -> None:
        """What experts get of any row can be read by all. To be called by all."""
        self.hidden.share(self.team)
        self.index.share(self.team)

    def _sent(self, row: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that an expert gets, and in which place of theirs it stands."""
        token, place = torch.where(self.index.read(row) == expert)
        return token, place

    def inputs(self, row: int, expert: int) -> torch.Tensor:
        """What an expert gets of a row: [tokens, hidden]."""
        return self.hidden.read_tokens(row, self._sent(row, expert)[0], self.device)

    def add(self, row: int, expert: int, result: torch.Tensor) -> None:
        """Counts what an expert gives of what it gets of a row."""
        token, place = self._sent(row, expert)
        result = result * self.weights.read(row)[token, place, None].to(self.device)
        some, inverse = torch.unique(token, return_inverse=True)
        sums = self.sums.read_tokens(row, some, self.device)
        sums.index_add_(0, inverse.to(self.device), result.to(sums.dtype))
        self.sums.write_tokens(row, some, sums)

    def total(self, row: int) -> torch.Tensor:
        """What the module gives of a row, once all experts are counted: [tokens, hidden]."""
        return self.sums.read(row, self.device)[0, : len(self.index.read(row))]

    def remove(self) -> None:
        for states in (self.hidden, self.sums, self.index, self.weights):
            states.remove()


def through_expert(experts: Experts, expert: int, layer: Layer, routed: Routed) -> Passes:
    """All rows' way through one expert, whose weights are in memory."""
    last = experts.last(expert)

    def run(row: int) -> torch.Tensor:
        given = None if last is None else layer.linears.skip(last)
        found: torch.Tensor = experts.module.one(expert, routed.inputs(row, expert)) if given is None else given
        return found

    return Passes(layer.linears, run)


def old_sums(experts: Experts, routed: Routed, rows: Sequence[int]) -> Callable[[int], torch.Tensor]:
    """Takes rows through all experts as they are. Returns what the module gives of a row."""
    for expert in range(experts.count):
        with experts.read(expert) as layer:
            passes = through_expert(experts, expert, layer, routed)
            for row in rows:
                routed.add(row, expert, passes.through(row, {}, layer.ready))
    return routed.total
