"""What a checkpoint is, from its headers and config alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from quantkit import architectures
from quantkit.checkpoint.reader import read_json
from quantkit.checkpoint.views import SourceTensor
from quantkit.console import human_bytes, table
from quantkit.errors import SourceError
from quantkit.layouts import Checkpoint
from quantkit.layouts.base import MANIFEST, STRIPPED
from quantkit.planner import quantized_already, source_tensors
from quantkit.sparsity import KindSparsity, measure


@dataclass(frozen=True)
class Inspection:
    """Facts about a checkpoint. `problems` is what stands in the way of loading or quantizing it."""

    layout: str
    generation: str  # of a native layout
    architecture: str
    known: bool
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    tied: bool | None
    files: tuple[tuple[str, int], ...]
    tensors: int
    linears: int
    quantized: str | None
    recorded: str | None  # of pruning, by the manifest
    sparsity: tuple[KindSparsity, ...]  # counted, if asked for
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "layout": self.layout,
            "generation": self.generation or None,
            "architecture": self.architecture,
            "in_table": self.known,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "parameters_by_dtype": self.dtypes,
            "tied": self.tied,
            "files": [{"name": n, "bytes": b} for n, b in self.files],
            "tensors": self.tensors,
            "linears": self.linears,
            "quantized": self.quantized,
            "pruned": self.recorded,
            "sparsity": [row.to_json() for row in self.sparsity],
            "problems": list(self.problems),
        }

    def _summed(self) -> list[KindSparsity]:
        """The rows by kind, and all of them together."""
        if not self.sparsity:
            return []
        kept = [p for p in self.sparsity[0].patterns if all(p in row.patterns for row in self.sparsity)]
        tensors, weights, zeros = (sum(getattr(r, k) for r in self.sparsity) for k in ("tensors", "weights", "zeros"))
        return [*self.sparsity, KindSparsity("all linears of decoder layers", tensors, weights, zeros, tuple(kept))]

    def text(self) -> str:
        dtypes = ", ".join(f"{d} {n:,}" for d, n in self.dtypes.items())
        rows = [
            ("layout", self.layout + (f", {self.generation}" if self.generation else "")),
            (
                "architecture",
                self.architecture + ("" if self.known else "  (no row in the table; asked of transformers)"),
            ),
            ("parameters", f"{self.parameters:,}"),
            ("dtypes", dtypes),
            ("tied weights", {True: "yes", False: "no", None: "unknown"}[self.tied]),
            ("tensors", f"{self.tensors:,}, of them {self.linears:,} linear layers that can be quantized"),
            ("files", f"{len(self.files)}, {human_bytes(self.nbytes)} of weights"),
            ("quantized", self.quantized or "no"),
            *((("pruned", self.recorded),) if self.recorded else ()),
            *(("zeros", _zeros(row)) for row in self._summed()),
            *(("problem", p) for p in self.problems),
        ]
        return table(rows)


def _zeros(row: KindSparsity) -> str:
    kept = f", every run {' and '.join(row.patterns)}" if row.patterns else ""
    return f"{row.sparsity:.3%} of {row.weights:,} weights{kept}  {row.kind}"


def inspect_checkpoint(checkpoint: Checkpoint, *, sparsity: bool = False) -> Inspection:
    """Reads nothing but what `open_checkpoint` read already, unless zeros are to be counted."""
    config = checkpoint.config
    row = architectures.find(config)
    quantized = quantized_already(checkpoint)
    tied = config.get("tie_word_embeddings")
    tensors = list(checkpoint.tensors.values()) if quantized else source_tensors(checkpoint)
    names = [t.name for t in tensors]
    problems = _problems(checkpoint, row, tensors, quantized is not None)
    dtypes = Counter[str]()
    for t in tensors:
        dtypes[t.dtype] += t.numel
    return Inspection(
        checkpoint.layout,
        checkpoint.generation,
        str(config.get("model_type", "unknown")),
        row is not None,
        sum(dtypes.values()),
        sum(t.nbytes for t in tensors),
        dict(dtypes.most_common()),
        architectures.is_tied(row, config) if row else tied if isinstance(tied, bool) else None,
        tuple((f.name, f.nbytes) for f in checkpoint.files)
        or tuple((n, 0) for n in sorted(set(checkpoint.absent.values()))),
        len(tensors),
        len(architectures.linears(row, config, names)) if row and not quantized else 0,
        quantized,
        _recorded(checkpoint),
        tuple(measure(checkpoint)) if sparsity else (),
        tuple(problems),
    )


def _recorded(checkpoint: Checkpoint) -> str | None:
    """What the manifest, if there is one, says of pruning."""
    try:
        manifest = read_json(checkpoint.folder / MANIFEST)
        how, rows = manifest["pruning"], manifest["sparsity"]
        weights, zeros = (sum(int(row[key]) for row in rows) for key in ("weights", "zeros"))
        return f"{how['method']}, {how['requested']}: {zeros:,} of {weights:,} weights were zero when it was written"
    except (SourceError, KeyError, TypeError, ValueError):
        return None


def _problems(
    checkpoint: Checkpoint, row: architectures.Architecture | None, tensors: list[SourceTensor], quantized: bool
) -> list[str]:
    problems = []
    if checkpoint.absent:
        files = sorted(set(checkpoint.absent.values()))
        problems.append(f"{len(files)} weight files are absent ({files[0]} …): sizes are computed from the config")
    total = sum(t.nbytes for t in tensors)
    if checkpoint.index_total not in (None, total):
        problems.append(f"the index gives {checkpoint.index_total:,} bytes, the tensors have {total:,}")
    if row is not None and not quantized:
        for t in tensors:
            shape = architectures.expected_shape(row, checkpoint.config, t.name)
            if shape is not None and shape != t.shape:
                problems.append(f"{t.name} is {list(t.shape)}, config.json makes it {list(shape)}")
        if row.warning:
            problems.append(row.warning)
    problems += (*checkpoint.notes, *checkpoint.config_notes)
    found = [k for k in STRIPPED if k in checkpoint.config]
    if "auto_map" in found:
        problems.append("config.json names Python code to run (auto_map); quantkit never runs it")
    return problems
