"""The card of a finished folder, made anew from what lies beside it: manifest, configuration, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from quantkit import evaluation_record
from quantkit.checkpoint.reader import read_json
from quantkit.checkpoint.writer import write_error, write_file
from quantkit.console import Console
from quantkit.errors import SourceError, UsageError, VerifyError
from quantkit.evaluation import Evaluation, TaskScore
from quantkit.evaluation_record import Record
from quantkit.output import COMMITS
from quantkit.plots import LAYERS, can_plot, layers_plot
from quantkit.publication import FORMAT, render_from_manifest

README = "README.md"


def rewrite_card(folder: Path) -> Path:
    """Writes README.md again. Returns the path. UsageError for a folder that is not ours, VerifyError for damage."""
    text = card_text(folder, evaluation_record.read_record(folder))
    write_file(folder / README, text.encode())
    return folder / README


def card_text(folder: Path, record: Record) -> str:
    """README.md, by the manifest."""
    if not (folder / "quantkit.json").is_file():
        raise UsageError("the folder has no quantkit.json, so quantkit did not write it", where=str(folder))
    manifest = read_json(folder / "quantkit.json")
    config = next((read_json(folder / name) for name in COMMITS if (folder / name).exists()), {})
    if manifest.get("format") != FORMAT:
        raise SourceError(f"quantkit.json has format {manifest.get('format')!r}, this version knows {FORMAT}")
    plotted = (folder / LAYERS).is_file()
    try:
        return render_from_manifest(manifest, config, record.evaluations, record.tasks, plotted=plotted)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
        raise VerifyError(f"quantkit.json is damaged: {e!r}", where=str(folder / "quantkit.json")) from None


def record_evaluation(folder: Path, found: Evaluation, device: str, console: Console) -> None:
    """Writes evaluation.json, a plot of the layers' errors where matplotlib is there, and the card anew, unless
    somebody changed it."""

    def write() -> None:
        evaluation_record.write_evaluation(folder, found, device)
        record = evaluation_record.read_record(folder)
        compared = [e.against for e in record.evaluations if e.against is not None]
        if can_plot() and compared and compared[-1].layer_errors:
            write_file(folder / LAYERS, layers_plot(compared[-1].layer_errors))

    _recorded(folder, write, console)


def record_scores(folder: Path, scores: Sequence[TaskScore], console: Console) -> None:
    """The same of tasks."""
    _recorded(folder, lambda: evaluation_record.write_scores(folder, scores), console)


def _recorded(folder: Path, write: Callable[[], None], console: Console) -> None:
    try:
        earlier = evaluation_record.read_record(folder)
    except VerifyError:
        earlier = Record()
    try:
        card = (folder / README).read_text() if (folder / README).is_file() else None
        ours = card is None or card in {card_text(folder, Record()), card_text(folder, earlier)}
        write()
        if ours:
            rewrite_card(folder)
        else:
            console.warn(f"{README} was changed by hand and stays so; `quantkit card` writes it anew, with this in it")
    except OSError as e:
        raise write_error(e, folder) from None
