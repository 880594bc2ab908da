"""The plan: pure data that says every byte of the output before a weight is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from quantkit.architectures import Linear
from quantkit.calibration.data import Tokens
from quantkit.checkpoint.header import TensorInfo
from quantkit.checkpoint.torch_zip_writer import TorchZipPlan
from quantkit.checkpoint.views import SourceTensor
from quantkit.layouts import CopiedFile
from quantkit.measurement import Allocated
from quantkit.memory import MemoryPlan
from quantkit.methods.base import WeightSpec
from quantkit.recipe import Recipe

WEIGHTS, INDEX, CONFIG, MANIFEST, CARD = "weights", "index", "config", "manifest", "card"
COPY, GENERATED = "copy", "generated"
MEASURING = 5  # passes over the source


@dataclass(frozen=True)
class Origin:
    """Where the source comes from: its public name, its Hub id and commit where known."""

    name: str
    base_model: str | None
    revision: str | None


@dataclass(frozen=True)
class Unit:
    """The smallest thing committed: one tensor of the model and what is written for it.

    `linear` and `weight` are set where it is quantized or pruned, or both; otherwise its elements are copied, or cast
    to the output's dtype. What is not quantized has a single output, with the rows of each head of `head_dim` in pairs
    where that is not 0. A unit is worked on in runs of whole granules, in elements; 0: all at once. `calibrated`: it
    is solved with its layer, see layer_runner.
    """

    source: SourceTensor
    outputs: tuple[TensorInfo, ...]
    linear: Linear | None = None
    weight: WeightSpec | None = None
    head_dim: int = 0
    granule: int = 8
    calibrated: bool = False
    quantized: bool = False
    pruned: bool = False

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def cast(self) -> bool:
        """Whether it is copied into another dtype."""
        return self.linear is None and self.outputs[0].dtype != self.source.dtype

    @property
    def reordered(self) -> bool:
        """Whether its rows are written in another order than they are stored in."""
        return (self.head_dim > 0) != (self.source.head_dim > 0)


@dataclass(frozen=True)
class PlannedFile:
    name: str
    nbytes: int
    role: str


@dataclass(frozen=True)
class Shard:
    """One weight file: what of it is known beforehand, by offset, and its size. `zip` if it is a torch file."""

    name: str
    fixed: tuple[tuple[int, bytes], ...]
    nbytes: int
    tensors: tuple[TensorInfo, ...]
    zip: TorchZipPlan | None = None


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    origin: Origin
    architecture: str
    hash: str
    units: tuple[Unit, ...]
    shards: tuple[Shard, ...]
    files: tuple[PlannedFile, ...]
    config: Mapping[str, Any]  # of the output's layout
    layout: str
    config_file: str
    index_file: str
    copies: tuple[CopiedFile, ...]
    generated: Mapping[str, bytes]
    memory: MemoryPlan
    warnings: tuple[str, ...]
    draft: Mapping[str, Any]  # the manifest without what only the run can measure
    tokens: Tokens | None = None  # what a calibrated method looks at
    streams: tuple[str, ...] = ()  # the models that are followed through it: quantized, and perhaps full
    allocation: Allocated | None = None  # of a method that mixes bits

    @property
    def encoded(self) -> tuple[Unit, ...]:
        """The units whose weights are not the source's: quantized, pruned, or both."""
        return tuple(u for u in self.units if u.linear is not None)

    @property
    def quantized(self) -> tuple[Unit, ...]:
        return tuple(u for u in self.units if u.quantized)

    @property
    def pruned(self) -> tuple[Unit, ...]:
        return tuple(u for u in self.units if u.pruned)

    @property
    def source_bytes(self) -> int:
        return sum(u.source.nbytes for u in self.units)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all output tensors, headers excluded."""
        return sum(t.nbytes for u in self.units for t in u.outputs)

    @property
    def disk(self) -> int:
        return sum(f.nbytes for f in self.files)

    @property
    def parameters(self) -> int:
        return sum(u.source.numel for u in self.units)

    @property
    def to_prune(self) -> tuple[int | None, int]:
        """How many weights are pruned, where that is known beforehand, of how many."""
        prune = self.recipe.prune
        specs = [u.weight for u in self.pruned if u.weight is not None]
        counts = [] if prune is None else [prune.count(w.rows, w.columns) for w in specs]
        known = [n for n in counts if n is not None]
        return sum(known) if len(known) == len(counts) else None, sum(w.numel for w in specs)

    @property
    def bits_per_weight(self) -> float | None:
        """Of the quantized linears, companions included, but for a head that has bits of its own; None if there are
        none."""
        if self.allocation is not None:
            return self.allocation.bits
        weights = sum(u.source.numel for u in self.quantized)
        return 8 * sum(t.nbytes for u in self.quantized for t in u.outputs) / weights if weights else None

    @property
    def passes(self) -> int:
        """How often the source is read: to copy and hash it; layer by layer to calibrate, once or twice; and, where
        what linears lose is still to be measured, for its sum, forward, back, for losses and for trials. Experts, which
        are most of their models, come once more for the full-precision stream, for norms, and for OWL's mean and what
        is above it."""
        owl = self.recipe.prune is not None and self.recipe.prune.owl
        calibrated = 0 if not self.streams else 2 if owl else 1
        if self.streams and any(u.calibrated and u.linear is not None and u.linear.expert for u in self.units):
            calibrated += (len(self.streams) - 1 if self.recipe.needs == "hessian" else 1) + 2 * owl
        measured = MEASURING if self.allocation is not None and self.allocation.assumed else 0
        return 1 + calibrated + measured

    @property
    def scratch(self) -> int:
        """Bytes on disk while the run is under way, beside the result: hidden states, what linears get."""
        return 0 if self.memory.layers is None else self.memory.layers.scratch

    @property
    def checked(self) -> bool:
        """Whether what is copied is mapped back and compared with the source."""
        return self.recipe.convert is not None and self.recipe.convert.check

    @property
    def model_bits_per_weight(self) -> float:
        return 8 * self.weight_bytes / self.parameters

    def to_json(self) -> dict[str, Any]:
        """What `plan --json` prints."""
        return {
            "plan_hash": self.hash,
            "source": asdict(self.origin),
            "architecture": self.architecture,
            "layout": self.layout,
            "recipe": self.recipe.canonical(),
            "parameters": self.parameters,
            "source_bytes": self.source_bytes,
            "weight_bytes": self.weight_bytes,
            "bits_per_weight": self.bits_per_weight,
            "pruned": None if self.recipe.prune is None else dict(zip(("weights", "of"), self.to_prune, strict=True)),
            "model_bits_per_weight": self.model_bits_per_weight,
            "allocation": None if self.allocation is None else asdict(self.allocation),
            "disk_bytes": self.disk,
            "passes_over_source": self.passes,
            "calibration": None if self.tokens is None else self.tokens.to_json(),
            "scratch_bytes": self.scratch,
            "memory": {**asdict(self.memory), "peak": self.memory.peak, "gpu": self.memory.gpu},
            "files": [asdict(f) for f in self.files],
            "tensors": [
                {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.nbytes, "file": t.file}
                for u in self.units
                for t in u.outputs
            ],
            "warnings": list(self.warnings),
        }


def digest(value: Any) -> str:
    """SHA-256 of plain data in one canonical spelling."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
