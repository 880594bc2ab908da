"""The contract of a quantization method. Methods are pure: arrays in, arrays out; they never open a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from quantkit.checkpoint.header import TensorSpec
from quantkit.solvers.coded import Coded

Array = npt.NDArray[Any]


class Parameters(BaseModel):
    """Base of every method's parameters: the schema of the recipe's `quantize:` block and the text of `--help`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Mixed(Parameters):
    """Of a method whose linears differ in bits: how many it may spend, and on what. mixes: how each linear is written,
    in the method's own names (Mixing). importance: by how much the losses of some linears count more, or less, than
    was measured; of several patterns that match one, the last."""

    bits: float = Field(4.0, gt=0, le=32, description="bits per weight of the linears together, at the most")
    min_bits: float = Field(0.0, ge=0, le=32, description="bits per weight of every linear, at the least")
    max_bits: float = Field(32.0, gt=0, le=32, description="bits per weight of every linear, at the most")
    mixes: dict[str, str] = Field(default_factory=dict, description="mixes by module or pattern; others are allocated")
    importance: dict[str, float] = Field(default_factory=dict, description="factors of losses by module or pattern")
    measurement: str | None = Field(None, description="file of what each linear loses in each mix; else measured first")

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min_bits > self.max_bits:
            raise ValueError(f"min_bits is {self.min_bits:g}, above max_bits, which is {self.max_bits:g}")
        if self.bits > self.max_bits:
            raise ValueError(f"bits is {self.bits:g}, and no linear may have more than {self.max_bits:g} (max_bits)")
        return self

    @field_validator("importance")
    @classmethod
    def _factors(cls, value: dict[str, float]) -> dict[str, float]:
        for pattern, factor in value.items():
            if not 0 < factor < float("inf"):
                raise ValueError(f"the factor of {pattern!r} is {factor}\nname a number above 0, such as 2.0")
        return value


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """A linear as a method sees it: [rows = out_features, columns = in_features], stored in `dtype`."""

    module: str
    dtype: str
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Report:
    """What encoding one tensor cost: Σ(w − ŵ)² and Σw² over the sampled weights, and how many were not finite.

    Of a calibrated method also the energy of the error in its output relative to that of the output, over the
    calibration text, None where it is not known, and whether it fell back to plain rounding, or to plain magnitude.
    Of a pruned weight also how many were pruned, and how many are zero in the end and were in the source.
    """

    squared_error: float
    squared_norm: float
    nonfinite: int = 0
    output_error: float | None = None
    fallback: bool = False
    pruned: int = 0
    zeros: int = 0
    source_zeros: int = 0

    def row(self) -> list[float | None]:
        """As the journal keeps it."""
        counts = [self.pruned, self.zeros, self.source_zeros]
        return [self.squared_error, self.squared_norm, self.nonfinite, self.output_error, float(self.fallback), *counts]

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Report:
        error, norm, nonfinite, output_error, fallback, *counts = row
        return cls(error, norm, int(nonfinite), output_error, bool(fallback), *map(int, counts))

    @property
    def relative_error(self) -> float:
        """‖W − Ŵ‖ / ‖W‖ (Frobenius)."""
        return float((self.squared_error / self.squared_norm) ** 0.5) if self.squared_norm > 0 else 0.0


class Encoder(Protocol):
    """One tensor being encoded, slab by slab. Slabs begin at multiples of the method's granule, in elements of the
    row-major weight; disjoint slabs may be encoded in any order and by several threads at once."""

    def encode(self, x: Array, start: int) -> Array:
        """x: bit patterns of the elements from `start` on. Returns that run of the main tensor, ready to write."""
        ...

    def main_offset(self, start: int) -> int:
        """Byte offset in the main tensor at which the slab that begins at element `start` lies."""
        ...

    def finish(self) -> tuple[dict[str, Array], Report]:
        """The companions (all outputs but the first), once every slab was encoded."""
        ...


class Decoder(Protocol):
    """The inverse: built from the companions, decodes runs of the main tensor."""

    def decode(self, raw: npt.NDArray[np.uint8], start: int, count: int) -> npt.NDArray[np.float32]:
        """`count` elements from `start` (a multiple of the method's granule), as the loader will see them."""
        ...


P = TypeVar("P", bound=Parameters)
M = TypeVar("M", bound=Mixed)


@dataclass(frozen=True)
class Mixing(Generic[M]):
    """How a method spends bits on linears that need not all have the same.

    label: of parameters, what a measurement was made for, in words. options: how a linear may be written, by name; the
    last is the best there is. cost: bits on disk of a linear written so, companions included. trial: for an option, a
    solvers.group.Solver that writes every linear so, without refinement. together: of a module, a name that it shares
    with those that a reader computes at once, and which must be written alike. dense: the option that leaves a linear
    as it is.
    """

    label: Callable[[M], str]
    options: Callable[[M, WeightSpec], tuple[str, ...]]
    cost: Callable[[M, WeightSpec, str], int]
    trial: Callable[[M, str], Any]
    together: Callable[[str], str] = lambda module: module
    dense: str | None = None


@dataclass(frozen=True)
class Description:
    """How a method with its parameters is named on the card."""

    title: str
    slug: str  # ends the name of the published model
    tags: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """Which linears of a model a method takes, as module names.

    encoded: in the order of the forward pass. skipped: linears left dense. listed: what bitsandbytes' configuration
    lists as left alone, modules that are no linears of a block among them.
    """

    encoded: tuple[str, ...]
    skipped: tuple[str, ...]
    listed: tuple[str, ...]


@dataclass(frozen=True)
class Method(Generic[P]):
    """A method: a name, its parameters, and the functions of the contract.

    outputs: exact tensors written for a weight, the main one (streamed) first, its companions after it.
    granule: slabs of a weight begin at multiples of this many elements.
    encoder / decoder: see the protocols; `device` is "cpu" or a torch device. decoder raises ValueError if the
    companions do not fit the weight.
    config: what goes into config.json as `quantization_config`, from the source's dtype and the modules left alone.
    resolve: the parameters with nothing left open, for these weights. refuses: why a weight must stay dense, or None.
    loader: by architecture, the program that loads the folder ("none" if none that was tried does) and a warning about
    others; None: transformers, or quantkit.load where the architecture's row warns.
    extra_files: written beside config.json, from its quantization_config. reader_notes: what readers cannot be told.
    Of calibrated methods: streams, the models that are followed (see calibration.stream); solve, from the
    calibration.statistics.Statistics of linears that share their inputs, targets and masks (solvers.group). Of methods
    whose weights are codes: pack, these as the outputs; unpack, the inverse, which raises ValueError where outputs
    contradict each other. reader_config: keys that its readers look for in config.json beside those that are there.
    others: the dtype of all other float tensors, if they are not left in their own. mixing: linears differ in
    bits; parameters are Mixed, and the `bits` of the method is 0. head: of parameters, how a head that has a matrix of
    its own is written then, by name of a mix; None: it is left dense.
    """

    name: str
    bits: int
    needs: Literal["nothing", "norms", "hessian"]
    params: type[P]
    outputs: Callable[[WeightSpec, P], tuple[TensorSpec, ...]]
    granule: Callable[[WeightSpec], int]
    encoder: Callable[[WeightSpec, P, str], Encoder]
    decoder: Callable[[WeightSpec, P, Mapping[str, Array]], Decoder]
    config: Callable[[P, str, Selection], dict[str, Any]]
    describe: Callable[[P], Description]
    devices: tuple[str, ...] = ("cpu",)
    resolve: Callable[[P, Sequence[WeightSpec]], P] = lambda params, _specs: params
    refuses: Callable[[WeightSpec, P], str | None] = lambda _spec, _params: None
    extra_files: Callable[[Mapping[str, Any]], dict[str, bytes]] = lambda _config: {}
    reader_notes: Callable[[Selection, P], tuple[str, ...]] = lambda _selection, _params: ()
    loader: Callable[[str, P], tuple[str, str]] | None = None
    streams: Callable[[P], tuple[str, ...]] = lambda _params: ()
    solve: Callable[[Any, P, Any, Any], Iterator[tuple[str, Any]]] | None = None
    pack: Callable[[Any, WeightSpec, P], dict[str, Array]] | None = None
    unpack: Callable[[Mapping[str, Array], WeightSpec, P], Coded] | None = None
    reader_config: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda _config: {}
    others: str | None = None
    head: Callable[[P], str | None] = lambda _params: None
    mixing: Mixing[Any] | None = None


def apply(method: Method[P], weight: Array, spec: WeightSpec, params: P) -> tuple[dict[str, Array], Report]:
    """All outputs for one weight held whole (bit patterns, row-major): the contract without the streaming."""
    encoder = method.encoder(spec, params, "cpu")
    main, *_ = method.outputs(spec, params)
    first = encoder.encode(weight.reshape(-1), 0)
    companions, report = encoder.finish()
    return {main.name: first.reshape(main.shape), **companions}, report
