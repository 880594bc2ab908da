"""Proves a written folder: files, headers, index, config, manifest and checksums; decodes every quantized tensor; and,
with the source at hand, measures its error and compares what should be untouched."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from quantkit.checkpoint.reader import SourceFiles, read_json
from quantkit.console import Console, Progress
from quantkit.equality import Elements, relative, relative_error, same_but_zeros, same_elements
from quantkit.errors import QuantkitError, UsageError, VerifyError
from quantkit.layouts import Checkpoint, open_checkpoint
from quantkit.layouts.hf import SIDE_FILES
from quantkit.manifest_rows import Row, mismatch, strings
from quantkit.methods.base import Array, Selection
from quantkit.output import COMMITS, EVALUATION, JOB, WEIGHT_SUFFIXES
from quantkit.packed import UNDECODABLE, Packed, decoded
from quantkit.planner import target_of
from quantkit.plots import LAYERS
from quantkit.pruning import Prune
from quantkit.publication import FORMAT
from quantkit.recipe import Quantize, Recipe, build_recipe
from quantkit.restored import open_source
from quantkit.sharing import Part, runs
from quantkit.solvers.pattern import Pattern
from quantkit.sparsity import ZeroCount, count_dense

WHOLE = Part(1, 1)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Verification:
    """Outcome: what is wrong (nothing, if the folder is sound), how much was looked at, and, where a source was given,
    the relative error of each quantized tensor over all its weights, and how many others are equal to it, and how many
    but for zeros. pruned, sparsity: zeros of the pruned tensors, together and by kind of module; nothing where none
    was pruned, or read."""

    problems: tuple[str, ...]
    files: int
    tensors: int
    quantized: int
    compared: int
    equal: int
    equal_but_zeros: int
    errors: Mapping[str, float]
    pruned: Zeros | None = None
    sparsity: Mapping[str, Zeros] = field(default_factory=dict)


@dataclass(frozen=True)
class Zeros:
    """tensors, their weights, and how many of these are zero."""

    tensors: int
    weights: int
    zeros: int

    @property
    def text(self) -> str:
        return f"{self.zeros:,} of {self.weights:,} weights, {self.zeros / max(self.weights, 1):.3%}"

    def plus(self, count: ZeroCount) -> Zeros:
        return Zeros(self.tensors + 1, self.weights + count.weights, self.zeros + count.zeros)


def verify_folder(
    folder: Path, source: Path | None, *, quick: bool, console: Console, part: Part = WHOLE
) -> Verification:
    """Checks `folder`. `quick` reads headers and sizes only; `source` adds the comparison with what it was made from;
    of a `part` are the checksums and the tensors that are read.

    Raises UsageError if this is no folder that quantkit wrote; everything else that is wrong is in `problems`.
    """
    if quick and source is not None:
        raise UsageError("--quick reads no weights, so it cannot compare with --source", hint="leave one of them out")
    if not (folder / "quantkit.json").is_file():
        if (folder / ".quantkit" / JOB).exists():
            raise UsageError(
                "the folder holds parts of a job", where=str(folder), hint="when all are done: `quantkit finish`"
            )
        if (folder / ".quantkit" / "journal").exists():
            raise UsageError(
                "the folder holds an unfinished run", where=str(folder), hint="run its command again first"
            )
        what = "the folder has no quantkit.json, so quantkit did not write it"
        raise UsageError(
            what if folder.is_dir() else "there is no such folder", where=str(folder), hint="check the path"
        )
    parent = open_source(folder, source) if source is not None else None
    check = _Check(folder, console, part)
    try:
        check.run(parent, quick=quick)
    except QuantkitError as e:
        check.problems.append(f"{Path(e.where).name or folder.name}: {e.what}")
    except OSError as e:
        check.problems.append(f"{e.filename or folder.name}: {e.strerror or e}")
    return Verification(
        tuple(check.problems),
        check.files,
        check.tensors,
        check.quantized,
        check.compared,
        check.equal,
        check.equal_but_zeros,
        dict(check.errors),
        check.pruned,
        dict(check.sparsity),
    )


def recorded_recipe(manifest: Mapping[str, Any]) -> Recipe:
    """What a manifest says was done; KeyError, TypeError, ValueError, AttributeError or QuantkitError if it says
    nothing of the kind."""
    made = {k: v for k, v in manifest["recipe"].items() if k in ("quantize", "convert", "prune")}
    return build_recipe({"source": "", **made})


def config_differences(folder: Path, recipe: Recipe, parent: Checkpoint) -> list[str]:
    """Where a folder's configuration is not what source and recipe make of it: a wrong number there gives fluent
    nonsense."""
    target = target_of(recipe, parent, tokenizer=False)
    found = read_json(folder / target.config_file)
    wanted = dict(target.config)
    if recipe.quantize is not None:
        wanted |= recipe.quantize.implementation.reader_config(wanted)
    return [
        f"{target.config_file}: {key} is {found.get(key)!r}, the source makes it {wanted.get(key)!r}"
        for key in sorted({*found, *wanted} - {"quantization_config"})
        if found.get(key) != wanted.get(key)
    ]


class _Side(NamedTuple):
    """One of two folders that are compared."""

    checkpoint: Checkpoint
    files: SourceFiles


class _Check:
    """Collects problems; one broken file does not hide the next."""

    def __init__(self, folder: Path, console: Console, part: Part) -> None:
        self.folder, self.console, self.part = folder, console, part
        self.problems: list[str] = []
        self.files = self.tensors = self.quantized = self.compared = self.equal = self.equal_but_zeros = 0
        self.errors: dict[str, float] = {}
        self.pruned: Zeros | None = None
        self.sparsity: dict[str, Zeros] = {}
        self.quantize: Quantize | None = None
        self.prune: Prune | None = None
        self.encoded: tuple[str, ...] = ()  # modules, as the manifest lists them
        self.left_dense: tuple[str, ...] = ()
        self.skipped: tuple[str, ...] = ()

    def run(self, parent: Checkpoint | None, *, quick: bool) -> None:
        manifest = read_json(self.folder / "quantkit.json")
        if manifest.get("format") != FORMAT:
            self.problems.append(f"quantkit.json: format {manifest.get('format')!r}, this version knows {FORMAT}")
            return
        try:
            recipe = recorded_recipe(manifest)
            self.quantize, self.prune = recipe.quantize, recipe.prune
            if self.prune is None and any(row.get("pruned") for row in manifest["tensors"]):
                raise ValueError("it lists pruned tensors, and its recipe prunes nothing")
            if self.quantize is None and any(row["quantized"] for row in manifest["tensors"]):
                raise ValueError("it lists quantized tensors, and its recipe quantizes nothing")
            rows = [Row.read(row) for row in manifest["tensors"]]
            encoded, dense, listed_ = (manifest["method"][k] for k in ("encoded", "left_dense", "skipped_modules"))
            self.encoded, self.left_dense, self.skipped = map(strings, (encoded, dense, listed_))
            dropped = {str(name) for name in manifest["source"].get("dropped", ())}
            listed = {str(f["name"]): (int(f["bytes"]), str(f["sha256"])) for f in manifest["files"]}
        except (QuantkitError, KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
            why = e.what if isinstance(e, QuantkitError) else repr(e)
            self.problems.append(f"quantkit.json: not a manifest of quantkit ({why})")
            return
        self._check_files(listed, quick=quick)
        checkpoint = open_checkpoint(self.folder)
        self.tensors, self.quantized = len(checkpoint.tensors), sum(row.quantized for row in rows)
        sound = self._check_tensors(checkpoint, rows)
        self._check_config(checkpoint, rows)
        if parent is not None:
            self.problems += config_differences(self.folder, recipe, parent)
        if quick:
            return
        costs = {row.name: 1 + sum(t.nbytes for t in row.outputs(self.quantize)) for row in sound}
        sound = self._mine(sound, list(costs.values()))
        total = sum(costs[row.name] for row in sound)
        with SourceFiles(self.folder, checkpoint.files) as files, self.console.progress(total) as progress:
            if parent is None:
                self._decode_all(_Side(checkpoint, files), sound, progress)
            else:
                left_out = sorted(parent.tensors.keys() - {row.name for row in rows} - dropped)
                self.problems += [f"tensor {name!r}: the source has it, the manifest does not" for name in left_out]
                with SourceFiles(parent.folder, parent.files) as parent_files:
                    for row in sound:
                        self._compare(_Side(checkpoint, files), _Side(parent, parent_files), row)
                        progress.advance(sum(checkpoint.tensors[t.name].nbytes for t in row.outputs(self.quantize)))
                        progress.unit(row.name, row.spec.nbytes)

    def _mine(self, things: list[_T], costs: list[int]) -> list[_T]:
        """Those that this part looks at."""
        owners = runs(costs, self.part.count)
        return [thing for thing, owner in zip(things, owners, strict=True) if owner == self.part.index - 1]

    def _check_files(self, listed: Mapping[str, tuple[int, str]], *, quick: bool) -> None:
        hashed = set(self._mine(list(listed), [1 + size for size, _ in listed.values()]))
        self.files = len(hashed)
        for name, (size, digest) in listed.items():
            path = self.folder / name
            if "/" in name or not path.is_file():
                self.problems.append(f"{name}: missing")
            elif path.stat().st_size != size:
                self.problems.append(f"{name}: {path.stat().st_size:,} bytes, the manifest says {size:,}")
            elif not quick and name in hashed and sha256_of(path) != digest:
                self.problems.append(f"{name}: its SHA-256 is not the manifest's")
        self._check_evaluation()
        if not (self.folder / "README.md").is_file():
            self.problems.append("README.md: missing; `quantkit card` writes it again")
        for path in sorted(self.folder.iterdir()):
            # Anything may lie beside a model, but not what a loader would pick up in place of it.
            loaded = path.name.endswith((*WEIGHT_SUFFIXES, ".index.json", ".partial")) or SIDE_FILES.fullmatch(
                path.name
            )
            if (loaded or path.name in COMMITS) and path.name not in listed:
                self.problems.append(f"{path.name}: a stray file that the manifest does not list")

    def _check_evaluation(self) -> None:
        """What was evaluated, if anything was, is of these weights."""
        if not (self.folder / EVALUATION).exists():
            return
        from quantkit.evaluation_record import read_record

        try:
            record = read_record(self.folder)
        except VerifyError as e:
            self.problems.append(f"{e.what}; {e.hint}")
            return
        if record.plot is None:
            return
        plot = self.folder / LAYERS
        if not plot.is_file() or sha256_of(plot) != record.plot:
            self.problems.append(f"{LAYERS}: missing, or not what was drawn; `quantkit card` draws it again")

    def _check_tensors(self, checkpoint: Checkpoint, rows: list[Row]) -> list[Row]:
        """Compares every header entry with what the manifest's tensors must have become; returns the rows that fit."""
        sound = []
        unclaimed = dict(checkpoint.tensors)
        for row in rows:
            wanted = row.outputs(self.quantize)
            wrong = [mismatch(unclaimed.pop(spec.name, None), spec) for spec in wanted]
            self.problems += [w for w in wrong if w]
            if not any(wrong):
                sound.append(row)
        self.problems += [f"tensor {name!r}: the manifest does not know it" for name in unclaimed]
        return sound

    def _check_config(self, checkpoint: Checkpoint, rows: list[Row]) -> None:
        found = checkpoint.config.get("quantization_config")
        if self.quantize is None:
            if found is not None:
                self.problems.append("config.json: a quantization_config, though nothing is quantized")
            return
        if not isinstance(found, dict):
            self.problems.append("config.json: no quantization_config")
            return
        dtype = next((row.spec.dtype for row in rows if row.quantized), "F32")
        selection = Selection(self.encoded, self.left_dense, self.skipped)
        wanted = self.quantize.implementation.config(self.quantize.params, dtype, selection)
        for key in sorted({*found, *wanted}):
            if found.get(key) != wanted.get(key):
                what = f"is {found.get(key)!r}, the recipe makes it {wanted.get(key)!r}"
                self.problems.append(f"config.json: quantization_config.{key} {what}")

    def _decode_all(self, found: _Side, rows: list[Row], progress: Progress) -> None:
        for row in rows:
            if row.quantized:
                try:
                    for _ in self._decoded(found, row):
                        pass
                except UNDECODABLE as e:
                    self.problems.append(f"tensor {row.name!r} does not decode: {e}")
            elif row.pruned:
                patterns = self._patterns(row)
                tensor = found.checkpoint.tensors[row.name]
                self._counted(row, count_dense(tensor, found.files, patterns, turned=row.transposed))
            progress.advance(sum(t.nbytes for t in row.outputs(self.quantize)))
            progress.unit(row.name, row.spec.nbytes)

    def _decoded(self, found: _Side, row: Row) -> Iterator[tuple[int, Array]]:
        """(first element, fp32 values) of a quantized tensor, slab by slab. ValueError if it does not decode."""
        assert self.quantize is not None, "only a quantize recipe has quantized rows"
        packed = Packed(row.weight, self.quantize.implementation, self.quantize.params, row.transposed)
        count = ZeroCount(self._patterns(row)) if row.pruned else None
        for start, values in decoded(found.checkpoint.tensors, found.files, packed):
            if count is not None:
                count.feed(values == 0)
            yield start, values
        if count is not None:
            self._counted(row, count)

    def _patterns(self, row: Row) -> tuple[Pattern, ...]:
        amount = self.prune.amount if self.prune is not None else None
        return (amount,) if isinstance(amount, Pattern) else ()

    def _counted(self, row: Row, count: ZeroCount) -> None:
        """Takes note of the zeros of a pruned tensor, and of what they should be."""
        self.pruned = (self.pruned or Zeros(0, 0, 0)).plus(count)
        kind = ".".join(part for part in row.name.removesuffix(".weight").split(".") if not part.isdigit())
        self.sparsity[kind] = self.sparsity.get(kind, Zeros(0, 0, 0)).plus(count)
        asked = self.prune.count(row.weight.rows, row.weight.columns) if self.prune is not None else None
        if asked is not None and asked != row.masked:
            what = f"the manifest says {row.masked:,} weights were pruned, its recipe makes it {asked:,}"
            self.problems.append(f"tensor {row.name!r}: {what}")
        if count.zeros < row.masked:
            what = f"{count.zeros:,} weights are zero, fewer than the {row.masked:,} that the manifest says were pruned"
            self.problems.append(f"tensor {row.name!r}: {what}")
        if count.zeros != row.zeros:
            what = f"{count.zeros:,} weights are zero, the manifest says {row.zeros:,}"
            self.problems.append(f"tensor {row.name!r}: {what}")
        for pattern, broken in count.broken.items():
            if broken:
                what = f"{broken:,} groups of {pattern.of} weights hold fewer than {pattern.pruned} zeros"
                self.problems.append(f"tensor {row.name!r}: {what}")

    def _compare(self, found: _Side, parent: _Side, row: Row) -> None:
        source = parent.checkpoint.tensors.get(row.name)
        if source is None or source.dtype != row.spec.dtype or source.numel != row.spec.numel:
            self.problems.append(f"tensor {row.name!r}: the source has no such {row.spec.dtype} tensor")
            return
        self.compared += 1
        if row.quantized:
            self._compare_quantized(found, row, Elements(source, parent.files, turned=row.transposed))
            return
        tensor = found.checkpoint.tensors[row.name]
        if not row.pruned:
            if same_elements(tensor, found.files, source, parent.files):
                self.equal += tensor.dtype == source.dtype
            else:
                self.problems.append(f"tensor {row.name!r}: not equal to the source, though it was only copied")
            return
        self._counted(row, count_dense(tensor, found.files, self._patterns(row), turned=row.transposed))
        if self.prune is None or not self.prune.keeps_values:
            self._judge(row, relative_error(tensor, found.files, source, parent.files))
        elif same_but_zeros(tensor, found.files, source, parent.files):
            self.equal_but_zeros += 1
        else:
            self.problems.append(f"tensor {row.name!r}: weights that were not pruned are not the source's")

    def _compare_quantized(self, found: _Side, row: Row, original: Elements) -> None:
        from quantkit.kernels.floats import to_float32

        error = norm = 0.0
        try:
            for start, restored in self._decoded(found, row):
                expected = to_float32(original.run(start, restored.size), row.spec.dtype)
                expected[~np.isfinite(expected)] = 0
                # In float64: squares of very small or large weights leave float32's range.
                difference, expected = (expected - restored).astype(np.float64), expected.astype(np.float64)
                error += float(np.vdot(difference, difference))
                norm += float(np.vdot(expected, expected))
        except UNDECODABLE as e:
            self.problems.append(f"tensor {row.name!r} does not decode: {e}")
            return
        self._judge(row, relative(error, norm))

    def _judge(self, row: Row, measured: float) -> None:
        self.errors[row.name] = measured
        # The manifest's figure may be of a sample of the blocks: a small tensor may differ from it, but not by this.
        sampled = 0.001 * row.error + 1e-6 if row.pruned else 2 * row.error + 0.02
        if measured > row.error + sampled:
            what = f"relative error {measured:.4f} against the source, the manifest says {row.error:.4f}"
            self.problems.append(f"tensor {row.name!r}: {what}")


def sha256_of(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
