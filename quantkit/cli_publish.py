"""The commands around a finished folder: judged, compared, described, published."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import click

from quantkit.cli_options import follows, options, output_options, team
from quantkit.cli_text import evaluation_text, pushed_text, scores_text
from quantkit.console import Console
from quantkit.errors import GateError, Interrupted, UsageError, VerifyError

protocol_options = options(
    click.option(
        "--windows", metavar="N|all", default="12", show_default=True, help="Stretches of the text, from its beginning."
    ),
    click.option("--length", type=int, metavar="TOKENS", help="Of a window.  [default: 1024, or the context]"),
    click.option("--threads", type=int, help="Threads that compute.  [default: all cores]"),
    click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu or cuda."),
)


@click.command("eval")
@click.argument("folder", metavar="FOLDER")
@click.option("--text", metavar="FILE", help="Text to predict: .txt, .jsonl, .parquet, or a Hub dataset.")
@click.option("--against", metavar="SRC", help="Also compare with this model, token by token.")
@click.option(
    "--max-ppl-increase", metavar="P%", help="Exit with 3 if perplexity rises by more, over that of --against."
)
@click.option("--max-kl", type=float, metavar="NATS", help="Exit with 3 if the KL divergence is more, nats a token.")
@click.option(
    "--record/--no-record",
    default=True,
    help="Whether to write evaluation.json into a folder of ours, and its card anew.",
)
@click.option("--lm-eval", "tasks", metavar="TASKS", help="In place of a text: tasks of lm-evaluation-harness, a,b,c.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Of --lm-eval: N texts of each task.")
@click.option("--shots", type=click.IntRange(0), metavar="N", help="Of --lm-eval: N examples ahead of each text.")
@click.option("--include", type=click.Path(path_type=Path), metavar="DIR", help="Of --lm-eval: tasks of one's own.")
@protocol_options
@output_options
def evaluate(
    folder: str,
    windows: str,
    tasks: str | None,
    limit: int | None,
    shots: int | None,
    include: Path | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Perplexity of any folder on a text, one layer in memory; with --against, how far it is from its source.

    Or, with --lm-eval, its scores in tasks of lm-evaluation-harness.
    """
    from quantkit import api
    from quantkit.gates import check as check_gates

    console = Console(json=as_json, quiet=quiet)
    if (tasks is None) == (given["text"] is None):
        raise UsageError("what to evaluate on is one of --text and --lm-eval", hint="name a text: --text FILE")
    if tasks is not None:
        if unfit := [key for key in ("against", "max_ppl_increase", "max_kl", "length") if given[key] is not None]:
            raise UsageError(f"--{unfit[0].replace('_', '-')} is for --text", hint="leave it out")
        if follows():  # the harness's tasks are not shared out
            return
        own = {key: given[key] for key in ("record", "threads", "device")}
        scores = api.evaluate_tasks(
            folder, tasks.split(","), limit=limit, shots=shots, include=include, console=console, **own
        )
        console.result({"folder": folder, "tasks": [asdict(score) for score in scores]}, scores_text(scores))
        return
    if unfit := [key for key, value in (("limit", limit), ("shots", shots), ("include", include)) if value is not None]:
        raise UsageError(f"--{unfit[0]} is for --lm-eval", hint="leave it out")
    with team() as joined:
        found = api.evaluate(
            folder,
            windows=_windows(windows),
            team=joined,
            console=Console(speaks=False) if follows() else console,
            **given,
        )
    if follows():
        return
    data = {**asdict(found), "passed": all(verdict.passed for verdict in found.gates)}
    console.result(data, evaluation_text(found))
    try:
        check_gates(found.gates, folder)
    except GateError as e:
        Console(quiet=quiet).error(e)  # on stderr alone: stdout has its one result
        sys.exit(e.exit_code)


@click.command()
@click.argument("folders", metavar="FOLDER...", nargs=-1, required=True)
@click.option("--text", required=True, metavar="FILE", help="Text to predict, as for eval.")
@click.option("--against", metavar="SRC", help="Their parent: also how far each is from it.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder for the comparison as JSON, table and plot.")
@protocol_options
@output_options
def compare(folders: tuple[str, ...], windows: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Several folders of one parent side by side: size against perplexity, and KL divergence with --against."""
    from quantkit import api
    from quantkit.comparer import comparison_text

    found = api.compare(folders, windows=_windows(windows), console=Console(json=as_json, quiet=quiet), **given)
    Console(json=as_json, quiet=quiet).result(found.to_json(), comparison_text(found))


def _windows(given: str) -> int | Literal["all"]:
    if given == "all":
        return "all"
    try:
        return int(given)
    except ValueError:
        raise UsageError(f"--windows {given!r} is no number", hint="a number of windows, or all") from None


@click.command()
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--preview", type=click.Path(path_type=Path), metavar="FILE.html", help="Leave the card alone; show it as a page."
)
@output_options
def card(folder: Path, preview: Path | None, as_json: bool, quiet: bool) -> None:
    """Write README.md of a finished folder again, from its manifest; or, with --preview, make an HTML page of it."""
    from quantkit import api
    from quantkit.preview import write_preview

    path = api.rewrite_card(folder) if preview is None else write_preview(folder, preview)
    Console(json=as_json, quiet=quiet).result({"card" if preview is None else "preview": str(path)}, str(path))


@click.command()
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.argument("repo_id", metavar="REPO_ID")
@click.option("--private", is_flag=True, help="Make the repository private, if it has to be made.")
@click.option("--revision", metavar="BRANCH", help="Push to this branch, which is made if need be.  [default: main]")
@click.option("--replace", is_flag=True, help="Delete what else the repository holds, in the same commit.")
@click.option("--ungated", is_flag=True, help="Push what no limit of `quantkit eval` was kept for.")
@click.option("--dry-run", is_flag=True, help="Prove and judge the folder, list what would go up, and stop.")
@output_options
def push(folder: Path, repo_id: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Upload a finished folder to the Hub: verified, judged, in one commit, and compared with what arrived."""
    from quantkit.push import push_folder

    console = Console(json=as_json, quiet=quiet)
    found = push_folder(folder, repo_id, console=console, **given)
    console.result(asdict(found), pushed_text(found))


@click.command()
@click.option("--calibrate", type=click.Path(path_type=Path), metavar="FILE", help="Measure the machine's rates.")
@click.option("--device", help="With --calibrate: cpu or cuda.  [default: cpu]")
@output_options
def doctor(as_json: bool, quiet: bool, calibrate: Path | None, device: str | None) -> None:
    """What is installed and what each extra would add, versions that do not go together, and what this machine has.

    --calibrate measures instead how fast this machine is, in two minutes if nothing else runs, with files in FILE's
    folder, and writes it to FILE, for `quantkit plan --profile`.
    """
    if calibrate is not None:
        from quantkit.devices import check_device
        from quantkit.rates import check_target, measure_rates

        check_target(calibrate)
        check_device(device or "cpu")
        console = Console(json=as_json, quiet=quiet)
        try:
            rates = measure_rates(calibrate.absolute().parent, console, device or "cpu")
        except (Interrupted, KeyboardInterrupt):  # of a job within, whose advice would be wrong here
            hint = "run the same command again: it begins anew"
            raise Interrupted("interrupted; nothing is kept", where=str(calibrate), hint=hint) from None
        rates.save(calibrate)
        console.result(asdict(rates), rates.text())
        return
    if device is not None:
        raise UsageError(
            "--device goes with --calibrate",
            where=f"--device {device}",
            hint="quantkit doctor --calibrate FILE --device cuda",
        )
    from quantkit.doctor import diagnose, diagnosis_text

    found = diagnose()
    Console(json=as_json, quiet=quiet).result(found.to_json(), diagnosis_text(found))
    if found.problems:
        sys.exit(VerifyError.exit_code)


COMMANDS = (evaluate, compare, card, push, doctor)
