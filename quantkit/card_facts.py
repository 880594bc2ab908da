"""What a card says, as data: filled from the manifest by `publication`, rendered by `card`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quantkit.evaluation import Evaluation, TaskScore
from quantkit.parent_card import ParentCard


@dataclass(frozen=True)
class ErrorRow:
    """Relative Frobenius error, |restored - original| / |original|, over the tensors of one kind of module.

    output: of a calibrated method, the energy of the error in the module's output relative to that of the output, the
    mean of the tensors that did not fall back to rounding; None if there are none.
    """

    kind: str
    tensors: int
    weights: int
    mean: float
    worst: float
    output: float | None = None


@dataclass(frozen=True)
class SparsityRow:
    """Of the pruned tensors of one kind of module: weights, how many were pruned, how many are zero in what was written
    and were in the source."""

    kind: str
    tensors: int
    weights: int
    pruned: int
    zeros: int
    source_zeros: int


@dataclass(frozen=True)
class Pruning:
    """What was pruned, in words, and what was counted; moved: the weights that stay are not the parent's."""

    method: str
    requested: str
    pattern: str | None
    compared: str
    scope: str
    moved: bool
    rows: tuple[SparsityRow, ...]

    @property
    def total(self) -> SparsityRow:
        def added(key: str) -> int:
            return min(sum(int(getattr(row, key)) for row in self.rows), 10**12 - 1)  # as wide as any count on a card

        counts = {key: added(key) for key in ("tensors", "weights", "pruned", "zeros", "source_zeros")}
        return SparsityRow("all", **counts)


@dataclass(frozen=True)
class FileRow:
    """A written file; `sha256` is 64 hexadecimal digits, any digits while the card is only being planned."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class CardFacts:
    """All that a card says. `errors`, `nonfinite` and the sums in `files` are measured; the rest the plan knows.

    For the planned size to hold, `errors`, `nonfinite` and `files` must have the same rows before and after a run:
    give every kind of module its row, with zeros before.
    """

    name: str
    base_model: str | None  # Hub id of the direct parent, if there is one
    source_name: str  # Hub id or folder name
    revision: str | None
    license: str | None  # named by the recipe; see `front_matter.licence_of`
    quantized_by: str | None
    parent: ParentCard
    method_title: str
    bits: float | None  # None: converted or pruned, not quantized
    tags: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]
    source_bytes: int
    output_bytes: int
    bits_per_weight: float | None  # of the quantized layers
    model_bits_per_weight: float
    parameters: int
    architecture: str
    kept: tuple[tuple[str, int], ...]  # kind of module left unquantized, bytes
    errors: tuple[ErrorRow, ...]
    error_note: str
    nonfinite: tuple[tuple[str, int], ...]  # kind of module, weights that are NaN or infinite in the source
    files: tuple[FileRow, ...]
    loader: Literal["transformers", "quantkit", "gptqmodel", "auto-gptq", "exllamav2", "none"]
    chat: bool
    warnings: tuple[str, ...]
    config: Mapping[str, Any]
    stripped: tuple[str, ...]
    command: str
    recipe_yaml: str
    versions: tuple[tuple[str, str], ...]
    plan_hash: str
    layout: str = "hf"
    checked: bool = False  # every tensor was mapped back and compared while it was written
    tensors: int = 0
    decoded: int = 0  # tensors that the parent stores in FP8
    context: int | None = None  # longest sequence in tokens
    bos: bool = False  # the tokenizer puts a BOS before a text
    calibration: Mapping[str, Any] | None = None  # as in the manifest
    pruning: Pruning | None = None
    allocation: Mapping[str, Any] | None = None  # as in the manifest, of a method that mixes bits
    language: str | None = None  # as in the recipe
    evaluated: tuple[Evaluation, ...] = ()
    tasks: tuple[TaskScore, ...] = ()
    plotted: bool = False  # there is a plot of the layers' errors
    solved: bool = True  # whether a calibrated method looked at what its errors do to outputs
    old_reference: bool = False  # for the reference program of 2023
