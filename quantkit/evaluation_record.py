"""evaluation.json: what `quantkit eval` found of a folder, in the folder.

It names the manifest that it belongs to, by its SHA-256, so that nothing measured on other weights is taken for these.
One entry a protocol (text, windows, length, what it was compared with), and one a task of lm-evaluation-harness: to
evaluate again replaces it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
_EVALUATION, _SCORE = TypeAdapter(Evaluation), TypeAdapter(TaskScore)


@dataclass(frozen=True)
class Record:
    """Evaluations, in the order in which they were made, and tasks."""

    evaluations: tuple[Evaluation, ...] = ()
    tasks: tuple[TaskScore, ...] = ()
    plot: str | None = None  # SHA-256 of the plot of layers' errors

    @property
    def judgements(self) -> list[tuple[str, Verdict]]:
        """Limits that count, with the text: those against what the folder was made from."""
        judged = [e for e in self.evaluations if e.against is not None and e.against.is_source]
        return [(found.text, verdict) for found in judged for verdict in found.gates]

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
        tuple(map(_evaluation, table["evaluations"])), tuple(map(_score, table["tasks"])), table.get("plot_sha256")
    )


def write_evaluation(folder: Path, found: Evaluation, device: str) -> None:
    """Adds an evaluation to the folder's record, in place of one by the same protocol."""
    entry = {
        **{key: value for key, value in asdict(found).items() if key != "folder"},
        "device": device,
        "versions": {"quantkit": __version__, **{name: version(name) for name in LIBRARIES}},
    }
    table = _kept(folder)
    table["evaluations"] = [e for e in table["evaluations"] if _protocol(e) != _protocol(entry)] + [entry]
    _write(folder, table)


def write_scores(folder: Path, scores: Sequence[TaskScore]) -> None:
    """Adds scores to the folder's record, in place of those of the same tasks with as many examples."""
    table = _kept(folder)
    new = {(score.task, score.shots) for score in scores}
    kept = [row for row in table["tasks"] if (row["task"], row["shots"]) not in new]
    table["tasks"] = kept + [asdict(score) for score in scores]
    _write(folder, table)


def write_plot(folder: Path, sha256: str) -> None:
    """Notes the sum of the plot beside it."""
    _write(folder, {**_read(folder), "plot_sha256": sha256})


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
        if (plot := found.get("plot_sha256")) is not None:
            table["plot_sha256"] = str(plot)
        for entry in table["evaluations"]:
            _evaluation(entry)
        for row in table["tasks"]:
            _score(row)
    except (SourceError, ValidationError, ValueError, KeyError, TypeError) as e:
        raise VerifyError(f"{FILE} is damaged ({_reason(e)})", where=str(path), hint=hint) from None
    if found.get("manifest_sha256") != _manifest(folder):
        raise VerifyError(f"{FILE} belongs to another result than quantkit.json", where=str(path), hint=hint)
    return table


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
