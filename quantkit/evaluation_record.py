"""evaluation.json: what `quantkit eval` found of a folder, in the folder.

It names the manifest that it belongs to, by its SHA-256, so that nothing measured on other weights is taken for these.
One entry a protocol (text, windows, length, what it was compared with), and one a task of lm-evaluation-harness: to
evaluate again replaces it. Limits stay, and judge the new numbers, until others are set.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from quantkit.checkpoint.reader import read_json
from quantkit.checkpoint.writer import write_file
from quantkit.errors import SourceError, VerifyError
from quantkit.evaluation import Evaluation, TaskScore, Verdict
from quantkit.output import EVALUATION as FILE
from quantkit.version import __version__

FORMAT = 1
LIBRARIES = ("torch", "transformers")
PLOT = ("plot_sha256", "plotted_sha256")
_EVALUATION, _SCORE = TypeAdapter(Evaluation), TypeAdapter(TaskScore)


@dataclass(frozen=True)
class Record:
    """Evaluations, in the order in which they were made, and tasks."""

    evaluations: tuple[Evaluation, ...] = ()
    tasks: tuple[TaskScore, ...] = ()
    plot: str | None = None  # SHA-256 of the plot of layers' errors
    plotted: str | None = None  # SHA-256 of the numbers on it

    @property
    def judgements(self) -> list[tuple[Evaluation, Verdict]]:
        """Limits that count, with what they judge: those against what the folder was made from."""
        judged = [e for e in self.evaluations if e.against is not None and e.against.is_source]
        return [(found, verdict) for found in judged for verdict in found.gates]

    @property
    def has_plot(self) -> bool:
        """Whether a plot was drawn, of the numbers that there are."""
        return self.plot is not None and self.plotted == _sum_of(self.layer_errors)

    @property
    def layer_errors(self) -> tuple[float, ...]:
        """Of the last comparison that has some."""
        found = [e.against.layer_errors for e in self.evaluations if e.against is not None and e.against.layer_errors]
        return found[-1] if found else ()


def read_record(folder: Path) -> Record:
    """What was recorded of the folder as it is; empty if nothing was. VerifyError for a file that is damaged, or that
    belongs to another result."""
    table = _read(folder)
    return Record(
        tuple(map(_evaluation, table["evaluations"])), tuple(map(_score, table["tasks"])), table.get("plot_sha256"),
        table.get("plotted_sha256"),
    )  # fmt: skip


def write_evaluation(folder: Path, found: Evaluation, device: str) -> None:
    """Adds an evaluation to the folder's record, in place of one by the same protocol, whose limits it is judged by
    where it has none of its own."""
    table = _kept(folder)
    found = replace(found, gates=(*found.gates, *_limits_left(found, table["evaluations"])))
    entry = {
        **{key: value for key, value in asdict(found).items() if key != "folder"},
        "device": device.partition(":")[0],
        "versions": {"quantkit": __version__, **{name: version(name) for name in LIBRARIES}},
    }
    table["evaluations"] = [e for e in table["evaluations"] if _protocol(e) != _protocol(entry)] + [entry]
    _write(folder, table)


def write_scores(folder: Path, scores: Sequence[TaskScore]) -> None:
    """Adds scores to the folder's record, in place of those of the same tasks with as many examples."""
    table = _kept(folder)
    new = {(score.task, score.shots, score.samples) for score in scores}
    kept = [row for row in table["tasks"] if (row["task"], row["shots"], row["samples"]) not in new]
    table["tasks"] = kept + [asdict(score) for score in scores]
    _write(folder, table)


def write_plot(folder: Path, sha256: str, errors: Sequence[float]) -> None:
    """Notes the sum of the plot beside it, and that of the numbers on it."""
    _write(folder, {**_read(folder), "plot_sha256": sha256, "plotted_sha256": _sum_of(errors)})


def forget_plot(folder: Path) -> None:
    _write(folder, {key: value for key, value in _read(folder).items() if key not in PLOT})


def _read(folder: Path) -> dict[str, Any]:
    path = folder / FILE
    if not path.is_file():
        return {"evaluations": [], "tasks": []}
    hint = "run `quantkit eval` again, or remove the file"
    try:
        found = read_json(path)
        if found.get("format") != FORMAT:
            raise ValueError(f"format {found.get('format')!r}, this version knows {FORMAT}")
        table: dict[str, Any] = {key: [dict(row) for row in found[key]] for key in ("evaluations", "tasks")}
        table |= {key: str(found[key]) for key in PLOT if key in found}
        for entry in table["evaluations"]:
            _evaluation(entry)
        for row in table["tasks"]:
            _score(row)
    except (SourceError, ValidationError, ValueError, KeyError, TypeError, ArithmeticError) as e:
        raise VerifyError(f"{FILE} is damaged ({_reason(e)})", where=str(path), hint=hint) from None
    if found.get("manifest_sha256") != _manifest(folder):
        raise VerifyError(f"{FILE} belongs to another result than quantkit.json", where=str(path), hint=hint)
    return table


def _limits_left(found: Evaluation, earlier: Sequence[Mapping[str, Any]]) -> Iterator[Verdict]:
    """Limits of earlier evaluations by the same protocol that the new one does not set, judging what it found."""
    other = found.against
    if other is None:
        return
    protocol = _protocol(asdict(found))
    measured = {"kl": other.kl, "perplexity_increase": other.increase}
    for entry in filter(lambda e: _protocol(e) == protocol, earlier):
        for verdict in _evaluation(entry).gates:
            if verdict.measure not in {own.measure for own in found.gates}:
                yield replace(verdict, value=measured[verdict.measure])


def _sum_of(errors: Sequence[float]) -> str:
    return hashlib.sha256(json.dumps(list(errors)).encode()).hexdigest()


def _reason(e: Exception) -> str:
    if isinstance(e, SourceError):
        return "it is not valid JSON"
    if isinstance(e, ValidationError):
        return ".".join(map(str, e.errors()[0]["loc"])) + ": " + e.errors()[0]["msg"]
    return f"{e} is missing" if isinstance(e, KeyError) else str(e)


def _kept(folder: Path) -> dict[str, Any]:
    """What of the record stays when something is added."""
    try:
        return _read(folder)
    except VerifyError:  # of what was here before
        return {"evaluations": [], "tasks": []}


def _write(folder: Path, table: Mapping[str, Any]) -> None:
    whole = {"format": FORMAT, "manifest_sha256": _manifest(folder), **table}
    write_file(folder / FILE, (json.dumps(whole, indent=1, ensure_ascii=False) + "\n").encode())


def _evaluation(entry: Mapping[str, Any]) -> Evaluation:
    own = {key: value for key, value in entry.items() if key not in ("device", "versions")}
    found = _EVALUATION.validate_python({"folder": "", **own})
    if fault := _contradiction(found):
        raise ValueError(fault)
    return found


def _contradiction(found: Evaluation) -> str:
    """In words, where its numbers do not agree with each other; empty if they do."""

    def differ(a: float, b: float) -> bool:
        return not math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)

    if differ(found.perplexity, math.exp(min(found.loss, 700))):
        return "the perplexity is not that of the loss"
    other = found.against
    if other is not None and differ(1 + other.increase, found.perplexity / other.perplexity):
        return "the increase is not that of the perplexities"
    for verdict in found.gates:
        measured = {} if other is None else {"kl": other.kl, "perplexity_increase": other.increase}
        if verdict.measure not in measured or differ(verdict.value, measured[verdict.measure]):
            return "a limit was judged by another value than was measured"
    return ""


def _score(row: Mapping[str, Any]) -> TaskScore:
    return _SCORE.validate_python(row)


def _protocol(entry: Mapping[str, Any]) -> tuple[object, ...]:
    against = entry["against"]["name"] if entry["against"] else None
    return entry["tokens_sha256"], entry["windows"], entry["length"], against


def _manifest(folder: Path) -> str:
    return hashlib.sha256((folder / "quantkit.json").read_bytes()).hexdigest()
