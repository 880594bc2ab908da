"""evaluation.json: what `quantkit eval` found of a folder, in the folder.

It names the manifest that it belongs to, by its SHA-256, so that nothing measured on other weights is taken for these.
One entry a protocol (text, windows, length, what it was compared with): to evaluate again replaces it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from quantkit.checkpoint.reader import read_json
from quantkit.checkpoint.writer import write_file
from quantkit.errors import SourceError, VerifyError
from quantkit.evaluation import Evaluation
from quantkit.output import EVALUATION as FILE
from quantkit.version import __version__

FORMAT = 1
LIBRARIES = ("torch", "transformers")
_EVALUATION = TypeAdapter(Evaluation)


def read_record(folder: Path) -> list[dict[str, Any]]:
    """What was recorded of the folder as it is, in the order in which it was; empty if nothing was. VerifyError for a
    file that is damaged, or that belongs to another result."""
    path = folder / FILE
    if not path.is_file():
        return []
    hint = "run `quantkit eval` again, or remove the file"
    try:
        found = read_json(path)
        if found.get("format") != FORMAT:
            raise ValueError(f"format {found.get('format')!r}, this version knows {FORMAT}")
        entries = [dict(entry) for entry in found["evaluations"]]
        for entry in entries:
            _evaluation(entry)
            {**entry["versions"]}
    except (SourceError, ValidationError, ValueError, KeyError, TypeError) as e:
        why = e.what if isinstance(e, SourceError) else repr(e).partition("\n")[0]
        raise VerifyError(f"{FILE} is damaged: {why}", where=str(path), hint=hint) from None
    if found.get("manifest_sha256") != _manifest(folder):
        raise VerifyError(f"{FILE} belongs to another result than quantkit.json", where=str(path), hint=hint)
    return entries


def write_record(folder: Path, found: Evaluation, device: str) -> None:
    """Adds an evaluation to the folder's record, in place of one by the same protocol."""
    try:
        entries = read_record(folder)
    except VerifyError:  # of what was here before
        entries = []
    entry = {
        **{key: value for key, value in asdict(found).items() if key != "folder"},
        "device": device,
        "versions": {"quantkit": __version__, **{name: version(name) for name in LIBRARIES}},
    }
    kept = [e for e in entries if _protocol(e) != _protocol(entry)]
    table = {"format": FORMAT, "manifest_sha256": _manifest(folder), "evaluations": [*kept, entry]}
    write_file(folder / FILE, (json.dumps(table, indent=1, ensure_ascii=False) + "\n").encode())


def gated(entries: Iterable[Mapping[str, Any]]) -> bool:
    """Whether limits were set, and all of them kept."""
    verdicts = [verdict for entry in entries for verdict in _evaluation(entry).gates]
    return bool(verdicts) and all(verdict.passed for verdict in verdicts)


def _evaluation(entry: Mapping[str, Any]) -> Evaluation:
    own = {key: value for key, value in entry.items() if key not in ("device", "versions")}
    return _EVALUATION.validate_python({"folder": "", **own})


def evaluations(entries: Iterable[Mapping[str, Any]]) -> tuple[Evaluation, ...]:
    return tuple(map(_evaluation, entries))


def _protocol(entry: Mapping[str, Any]) -> tuple[object, ...]:
    against = entry["against"]["name"] if entry["against"] else None
    return entry["tokens_sha256"], entry["windows"], entry["length"], against


def _manifest(folder: Path) -> str:
    return hashlib.sha256((folder / "quantkit.json").read_bytes()).hexdigest()
