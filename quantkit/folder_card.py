"""The card of a finished folder, made anew from what lies beside it: manifest, configuration, evaluation."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from quantkit import evaluation_record
from quantkit.checkpoint.reader import read_json
from quantkit.checkpoint.writer import write_error, write_file
from quantkit.console import Console
from quantkit.errors import OutputError, QuantkitError, SourceError, UsageError, VerifyError
from quantkit.evaluation import Evaluation, TaskScore
from quantkit.evaluation_record import Record
from quantkit.layouts import Checkpoint
from quantkit.output import COMMITS
from quantkit.plots import LAYERS, can_plot, layers_plot
from quantkit.publication import FORMAT, render_from_manifest
from quantkit.seal import Seal, check_sealed
from quantkit.verifier import config_differences, recorded_recipe, sha256_of

README = "README.md"


def rewrite_card(folder: Path) -> Path:
    """Writes README.md again, and the plot on it. Returns the path. UsageError for a folder that is not ours,
    VerifyError for damage."""
    _check_ours(folder)
    check_place(folder)
    record = evaluation_record.read_record(folder)
    try:
        if record.layer_errors and can_plot():
            plot = layers_plot(record.layer_errors)
            write_file(folder / LAYERS, plot)
            evaluation_record.write_plot(folder, hashlib.sha256(plot).hexdigest(), record.layer_errors)
        elif record.plot is not None and not record.has_plot:  # of other numbers, and no other can be drawn here
            (folder / LAYERS).unlink(missing_ok=True)
            evaluation_record.forget_plot(folder)
        record = evaluation_record.read_record(folder)
        write_file(folder / README, card_text(folder, record).encode())
    except OSError as e:
        raise write_error(e, folder) from None
    return folder / README


def is_written_by_hand(folder: Path, record: Record) -> bool:
    """Whether README.md is not the card of what lies beside it."""
    return not (folder / README).is_file() or read_card(folder) != card_text(folder, record)


def read_card(folder: Path) -> str:
    """README.md, which anybody may have written to, in whatever encoding."""
    return (folder / README).read_text(encoding="utf-8", errors="replace")


def check_place(folder: Path) -> None:
    """OutputError for a folder in which nothing can be written."""
    if not os.access(folder, os.W_OK):
        raise OutputError("the folder cannot be written to", where=str(folder), hint="mend its permissions")


def is_source(folder: Path, parent: Checkpoint) -> bool | None:
    """Whether a folder of ours was made from `parent`, by its configuration and the SHA-256 of its weights; None for
    one that is not ours."""
    try:
        manifest = read_json(folder / "quantkit.json")
        sums = {str(row["name"]): str(row["sha256"]) for row in manifest["source"]["files"]}
        recipe = recorded_recipe(manifest)
    except (QuantkitError, KeyError, TypeError, ValueError, AttributeError):
        return None
    if sums.keys() != {file.name for file in parent.files} or config_differences(folder, recipe, parent):
        return False
    return all(sha256_of(parent.folder / name) == digest for name, digest in sums.items())


def _check_ours(folder: Path) -> None:
    if not (folder / "quantkit.json").is_file():
        what = "the folder has no quantkit.json, so quantkit did not write it"
        raise UsageError(
            what if folder.is_dir() else "there is no such folder", where=str(folder), hint="check the path"
        )


def card_text(folder: Path, record: Record) -> str:
    """README.md, by the manifest."""
    _check_ours(folder)
    manifest = read_json(folder / "quantkit.json")
    config = next((read_json(folder / name) for name in COMMITS if (folder / name).exists()), {})
    if manifest.get("format") != FORMAT:
        raise SourceError(f"quantkit.json has format {manifest.get('format')!r}, this version knows {FORMAT}")
    plotted = record.has_plot and (folder / LAYERS).is_file()
    try:
        return render_from_manifest(manifest, config, record.evaluations, record.tasks, plotted=plotted)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise VerifyError(f"quantkit.json is damaged: {e!r}", where=str(folder / "quantkit.json")) from None


def record_evaluation(folder: Path, sealed: Seal, found: Evaluation, device: str, console: Console) -> None:
    """Writes evaluation.json, a plot of the layers' errors where matplotlib is there, and the card anew, unless
    somebody changed it. RunError if the folder is not what it was when it was sealed."""
    _recorded(folder, sealed, lambda: evaluation_record.write_evaluation(folder, found, device), console)


def record_scores(folder: Path, sealed: Seal, scores: Sequence[TaskScore], console: Console) -> None:
    """The same of tasks."""
    _recorded(folder, sealed, lambda: evaluation_record.write_scores(folder, scores), console)


def _recorded(folder: Path, sealed: Seal, write: Callable[[], None], console: Console) -> None:
    with _alone(folder):
        check_sealed(folder, sealed)
        _add(folder, write, console)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits for others that record something of the folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _add(folder: Path, write: Callable[[], None], console: Console) -> None:
    try:
        earlier = evaluation_record.read_record(folder)
    except VerifyError as e:
        console.warn(f"{e.what}: what was in it is dropped")
        earlier = Record()
    try:
        ours = not (folder / README).is_file() or not all(
            is_written_by_hand(folder, record) for record in (Record(), earlier)
        )
        write()
    except OSError as e:
        raise write_error(e, folder) from None
    if ours:
        rewrite_card(folder)
    else:
        console.warn(f"{README} is not as it was written and stays so; `quantkit card` writes it anew, with this in it")
