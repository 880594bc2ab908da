"""What a module of experts gets of all rows, and what it gives of them, on disk, while its experts come one by one.

All rows are taken to the experts first, and what each expert gets of a row is written in one piece. Then each expert
has its turn with its pieces of all rows, and what it gives is written in the same way. What experts give of a token is
added up in the order in which the module adds it, so that the sums are the same to the bit.
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
    """What experts are sent of rows [rows, length], and what they give, expert after expert in each row.

    path: begins the names of the files, which are gone with `files`. shape: rows and length. like: tensors of the
    widths and types that a row has. count: of experts. Each of a team has results of its own rows.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, int],
        like: Routing,
        count: int,
        files: ExitStack,
        device: torch.device,
        team: Team,
    ) -> None:
        self.count, self.device, self.team = count, device, team
        rows, length = shape
        sent, width = like.index.shape[-1], like.hidden.shape[-1]

        def file(kind: str, tokens: int, width: int, dtype: torch.dtype) -> HiddenStates:
            states = HiddenStates(path.with_name(f"{path.name}-{kind}"), rows, tokens, width, dtype)
            files.callback(states.remove)
            states.extend()
            return states

        self.hidden = file("hidden", sent * length, width, like.hidden.dtype)
        self.results = file(f"results-{team.rank}", sent * length, width, like.hidden.dtype)
        self.index = file("index", length, sent, like.index.dtype)
        self.weights = file("weights", length, sent, like.weights.dtype)
        self._ends: dict[int, list[int]] = {}  # of a row, where each expert's tokens begin, and the last one's end

    def write(self, row: int, routing: Routing) -> None:
        self.index.write(row, routing.index)
        self.weights.write(row, routing.weights)
        self._ends.pop(row, None)
        token = _by_expert(routing.index)[1]
        for expert in range(self.count):
            first, last = self._place(row, expert)
            if last > first:
                self.hidden.write_part(row, first, routing.hidden[token[first:last]])

    def share(self) -> None:
        """What experts get of any row can be read by all. To be called by all."""
        self.hidden.share(self.team)
        self.index.share(self.team)

    def _place(self, row: int, expert: int) -> tuple[int, int]:
        """Where in a row's file its tokens begin and end."""
        if row not in self._ends:
            counts = torch.bincount(self.index.read(row).flatten(), minlength=self.count)
            self._ends[row] = [0, *counts.cumsum(0).tolist()]
        return self._ends[row][expert], self._ends[row][expert + 1]

    def inputs(self, row: int, expert: int) -> torch.Tensor:
        """What an expert gets of a row: [tokens, hidden]."""
        first, last = self._place(row, expert)
        return self.hidden.read_part(row, first, last - first, self.device)

    def add(self, row: int, expert: int, result: torch.Tensor) -> None:
        """Takes what an expert gives of what it gets of a row."""
        self.put(self.results, row, expert, result)

    def beside(self, name: str, files: ExitStack) -> HiddenStates:
        """One more file of that size, for something else of what experts get. name: what its name ends with."""
        rows, tokens, width = self.results.shape
        path = self.results.path
        states = HiddenStates(path.with_name(f"{path.name}-{name}"), rows, tokens, width, self.results.dtype)
        files.callback(states.remove)
        states.extend()
        return states

    def put(self, states: HiddenStates, row: int, expert: int, result: torch.Tensor) -> None:
        """Writes an expert's part of a row, [its tokens, hidden], into such a file."""
        first, last = self._place(row, expert)
        assert len(result) == last - first
        states.write_part(row, first, result)

    def total(self, row: int) -> torch.Tensor:
        """What the module gives of a row, once all experts have given: [tokens, hidden], summed in their order."""
        return self.sums(row, self.results, scaled=True)

    def sums(self, row: int, results: HiddenStates, *, scaled: bool) -> torch.Tensor:
        """The same of any such file, scaled by what experts' results are multiplied with, or as it is."""
        index = self.index.read(row)
        order, token = _by_expert(index)
        scale, token = self.weights.read(row).flatten()[order].to(self.device), token.to(self.device)
        sums = torch.zeros((len(index), results.shape[2]), dtype=results.dtype, device=self.device)
        for expert in range(self.count):
            first, last = self._place(row, expert)
            if last > first:
                result = results.read_part(row, first, last - first, self.device)
                result = result * scale[first:last, None] if scaled else result
                sums.index_add_(0, token[first:last], result.to(sums.dtype))
        return sums

    def by_place(self, row: int, values: torch.Tensor) -> torch.Tensor:
        """[tokens, k] of what was found for each token of one expert after the other."""
        index = self.index.read(row)
        order = _by_expert(index)[0].to(values.device)
        return torch.empty_like(values).index_copy_(0, order, values).reshape(index.shape)

    def sent(self, row: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which tokens of a row an expert gets, int64 [n], and what its results are multiplied with, [n]."""
        first, last = self._place(row, expert)
        order, token = _by_expert(self.index.read(row))
        scale = self.weights.read(row).flatten()[order[first:last]]
        return token[first:last].to(self.device), scale.to(self.device)

    def remove(self) -> None:
        for states in (self.hidden, self.results, self.index, self.weights):
            states.remove()


def _by_expert(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all places in index [tokens, k], expert after expert and in the tokens' order: the place, and its token."""
    order = torch.argsort(index.flatten().cpu(), stable=True)
    return order, order // index.shape[-1]


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
