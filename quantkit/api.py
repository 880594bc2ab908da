"""The verbs as functions: what the command line calls, and what `import quantkit` offers."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quantkit import folder_card
from quantkit.checkpoint.reader import read_json
from quantkit.comparer import (
    Compared,
    Comparisons,
    check_comparison,
    check_tokens,
    compared,
    names_of,
    side_by_side,
    write_comparison,
)
from quantkit.console import Console
from quantkit.devices import check_device, check_gpu_memory, own_gpu, warn_if_slow
from quantkit.errors import OutputError, RunError, SourceError, UsageError
from quantkit.evaluation import Evaluation, TaskScore
from quantkit.evaluation_record import Record
from quantkit.evaluator import WINDOWS, Subject, Windows, evaluate_folder
from quantkit.gates import Gates
from quantkit.hub import expand, is_local, resolve
from quantkit.inspector import Inspection, inspect_checkpoint
from quantkit.layouts import Checkpoint, Prefer, open_checkpoint
from quantkit.measurement import Measurement
from quantkit.measuring import known_losses, measure_recipe
from quantkit.outcome import Outcome, already_done
from quantkit.output import check_whole, was_finished
from quantkit.part_folder import finished_meanwhile, job_recipe
from quantkit.parts import check_recipe, execute_part
from quantkit.parts import finish as finish_parts
from quantkit.planner import make_plan
from quantkit.plans import Plan
from quantkit.recipe import Recipe, build_recipe
from quantkit.restored import open_source
from quantkit.runner import execute, help_with
from quantkit.seal import Seal, seal
from quantkit.sharing import Part, parse_part
from quantkit.teamwork import own_share, signed
from quantkit.verifier import Verification, verify_folder

if TYPE_CHECKING:
    from quantkit.solvers.team import Team

_QUIET = Console(quiet=True)


def inspect(source: str, *, revision: str | None = None, sparsity: bool = False) -> Inspection:
    """What the checkpoint at a path or Hub id is; with `sparsity` its weights are read, and zeros counted. Raises
    SourceError."""
    folder, _ = resolve(source, revision, weights=sparsity)
    return inspect_checkpoint(open_checkpoint(folder, data_present=sparsity), sparsity=sparsity)


def plan(source: str | Path, recipe: Mapping[str, Any] | None = None) -> Plan:
    """The plan for `source` under a recipe given as plain data. Raises SourceError, RecipeError or UsageError."""
    return plan_recipe(build_recipe({**(recipe or {}), "source": str(source)}))[0]


def plan_recipe(
    recipe: Recipe,
    *,
    data_present: bool = False,
    measuring: bool = False,
    force: bool = False,
    console: Console = _QUIET,
) -> tuple[Plan, Checkpoint]:
    """The plan and what it reads. With data_present=False a Hub model's weights are not fetched, only their headers.
    measuring: whether what a method needs that mixes bits is measured where it is not known yet, for a run that may
    replace what an earlier one left (`force`)."""
    # An official folder holds both layouts: what is to be written is then not what is read.
    prefer: Prefer = "mistral" if recipe.convert is not None and recipe.convert.to == "hf" else "hf"
    folder, origin = resolve(recipe.source, recipe.revision, weights=data_present, quiet=console.quiet, prefer=prefer)
    checkpoint = open_checkpoint(folder, data_present=data_present, native=recipe.native.options, prefer=prefer)
    measured = None
    if recipe.mixing is not None:
        measured = known_losses(
            recipe, checkpoint, origin, data_present=data_present, measuring=measuring, force=force, console=console
        )
    return make_plan(recipe, checkpoint, origin, quiet=console.quiet, measured=measured), checkpoint


def measure(
    source: str | Path, out: str | Path, recipe: Mapping[str, Any] | None = None, *, console: Console = _QUIET
) -> Measurement:
    """Measures what each linear of `source` loses in each mix of bits, and writes the file `out`, for `quantize` with a
    method that mixes bits. recipe: its quantize, calibration and resources blocks count."""
    table = {"quantize": {"method": "exl2"}, **(recipe or {}), "source": str(source)}
    return measure_recipe(build_recipe(table), expand(str(out)), console=console)


def quantize(
    source: str | Path,
    out: str | Path,
    recipe: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
    console: Console = _QUIET,
) -> Outcome:
    """Quantizes `source` into the folder `out`; see `quantkit.runner.execute` for what it raises."""
    return run_recipe(
        build_recipe({**(recipe or {}), "source": str(source), "output": str(out)}), force=force, console=console
    )


def convert(
    source: str | Path,
    out: str | Path,
    to: Literal["hf", "mistral"],
    recipe: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
    console: Console = _QUIET,
) -> Outcome:
    """Writes `source` into the folder `out` in another layout; more keys of the `convert` block go into `recipe`."""
    table = dict(recipe or {})
    if (table.get("convert") or {}).get("to", to) != to:
        raise UsageError(f"the recipe converts to {table['convert']['to']!r}, the call to {to!r}", hint="leave one out")
    table["convert"] = {**(table.get("convert") or {}), "to": to}
    return run_recipe(build_recipe({**table, "source": str(source), "output": str(out)}), force=force, console=console)


def prune(
    source: str | Path,
    out: str | Path,
    recipe: Mapping[str, Any] | None = None,
    *,
    force: bool = False,
    console: Console = _QUIET,
    **prune: Any,
) -> Outcome:
    """Prunes `source` into the folder `out`: `prune(src, out, sparsity=0.5)`. Keyword arguments are keys of the
    recipe's `prune` block; see `quantkit.runner.execute` for what is raised."""
    table = dict(recipe or {})
    table["prune"] = {**(table.get("prune") or {}), **prune}
    return run_recipe(build_recipe({**table, "source": str(source), "output": str(out)}), force=force, console=console)


def run_recipe(recipe: Recipe, *, force: bool = False, part: str | None = None, console: Console = _QUIET) -> Outcome:
    """Does what a recipe says; see `quantkit.runner.execute` for what is raised. part: "3/8", only the third of eight
    parts, for processes that share the work; `finish` makes a model of the folder when all are done."""
    if not recipe.output:
        raise UsageError("no output folder is named", hint="add -o OUT, or `output:` in the recipe")
    check_device(recipe.resources.device)
    started = time.monotonic()
    share = None if part is None else parse_part(part)
    if share is not None and force:
        raise UsageError(
            "--force would take from the other parts what they did",
            where=recipe.output,
            hint="delete the folder yourself",
        )
    if share is not None:
        check_recipe(recipe)  # before a text is read
    job, checkpoint = plan_recipe(recipe, data_present=True, measuring=share is None, force=force, console=console)
    _check_gpu(job, console)
    out = expand(recipe.output)
    if share is None:
        made = execute(job, checkpoint, out, console, force=force)
    else:
        made = execute_part(job, checkpoint, out, share, console)
    return replace(made, seconds=time.monotonic() - started)


def _check_gpu(job: Plan, console: Console) -> None:
    """UsageError if there is too little memory for a plan on the GPU that it is for."""
    device = job.recipe.resources.device
    check_gpu_memory(device, job.memory.on_gpu)
    if job.recipe.needs == "hessian":
        warn_if_slow(device, console)


def run_together(recipe: Recipe, *, force: bool = False, console: Console = _QUIET) -> Outcome | None:
    """The same by all processes that torchrun has started, or a scheduler in its way. What looks at a text is solved
    together, what does not is done in parts. What the leader did; None for the others."""
    from quantkit.solvers.team import joined

    if not recipe.output:
        raise UsageError("no output folder is named", hint="add -o OUT, or `output:` in the recipe")
    out = expand(recipe.output)
    with joined() as team:
        started = time.monotonic()
        recipe, team = own_share(recipe, team)
        device = recipe.resources.device

        def begin() -> tuple[Plan, Checkpoint]:
            check_device(device)
            job, checkpoint = plan_recipe(recipe, data_present=True, force=force, console=console)
            calibrated = any(u.calibrated for u in job.units)
            if job.allocation is not None and job.allocation.assumed:
                raise UsageError(
                    "bits are not measured yet",
                    where=str(out),
                    hint="run `quantkit measure` first, by as many processes, and name its file: --measurement FILE",
                )
            _check_gpu(job, console)
            if force and not calibrated and job.allocation is None:
                raise UsageError(
                    "--force would take from other processes what they did", where=str(out),
                    hint="delete the folder yourself",
                )  # fmt: skip
            return job, checkpoint

        job, checkpoint = team.begin(begin, lambda made: signed(made[1], made[0].tokens, device, plan=made[0].hash))
        made: Outcome | None = None
        if any(u.calibrated for u in job.units) or job.allocation is not None:
            if team.leads:
                made = execute(job, checkpoint, out, console, force=force, team=team)
            else:
                help_with(job, checkpoint, out, team)
        else:
            part = execute_part(job, checkpoint, out, Part(team.rank + 1, team.size), console)
            team.meet()
            if team.leads:
                made = part if part.already_done else finish_parts(job, checkpoint, out, console)
        team.meet()
        return None if made is None else replace(made, seconds=time.monotonic() - started)


def finish(out: str | Path, *, source: str | None = None, console: Console = _QUIET) -> Outcome:
    """Makes a model of a folder whose parts are all done; see `quantkit.parts.finish` for what is raised. source: where
    the model they are made from lies here, if elsewhere than for the first part."""
    started, out = time.monotonic(), expand(str(out))
    if was_finished(out):
        check_whole(out)
        return already_done(out)
    try:
        made = _finish(out, source, console)
    except (OutputError, RunError):
        if not finished_meanwhile(out):
            raise
        return already_done(out)
    return replace(made, seconds=time.monotonic() - started)


def _finish(out: Path, source: str | None, console: Console) -> Outcome:
    recipe = job_recipe(out, source)
    if source is None and Path(recipe.source).is_absolute() and not Path(recipe.source).exists():
        hint = "say where it lies here: --source FOLDER"
        raise SourceError("the model that the parts were made from is gone", where=recipe.source, hint=hint)
    job, checkpoint = plan_recipe(recipe, data_present=True, console=console)
    return finish_parts(job, checkpoint, out, console)


def verify(
    folder: str | Path,
    *,
    source: str | None = None,
    quick: bool = False,
    part: str | None = None,
    console: Console = _QUIET,
) -> Verification:
    """Checks a written folder. Returns what was found wrong; raises UsageError if it is not ours to check. part: "3/8",
    only the third of eight parts of what weights are read for; all headers are, in each."""
    share = Part(1, 1) if part is None else parse_part(part)
    folder = expand(str(folder))
    parent = Path(source) if source is not None else None
    # What verify_folder will refuse is not fetched first.
    if source is not None and not quick and (folder / "quantkit.json").is_file():
        commit, layout = _recorded(folder, source)
        parent, _ = resolve(source, commit, quiet=console.quiet, prefer=layout)
    return verify_folder(folder, parent, quick=quick, console=console, part=share)


def evaluate(
    folder: str | Path,
    text: str,
    *,
    against: str | None = None,
    max_ppl_increase: str | float | None = None,
    max_kl: float | None = None,
    record: bool = False,
    windows: Windows = WINDOWS,
    length: int | None = None,
    threads: int | None = None,
    device: str = "cpu",
    team: Team | None = None,
    console: Console = _QUIET,
) -> Evaluation:
    """Perplexity of a model on a text, and how far it is from the model `against`; see `quantkit.evaluator` for the
    protocol and for what is raised. Models are folders, dense or quantized, or Hub ids. text: a .txt, .jsonl or
    .parquet file or a Hub dataset. windows: how many are taken from its beginning, or "all". max_ppl_increase ("3%" or
    0.03), max_kl (nats a token): limits, judged in what is returned. record: write evaluation.json into a folder that
    quantkit wrote, and its card anew. team: who shares the windows (`quantkit.solvers.team.joined`); its leader
    records."""

    def begin() -> tuple[Path, Seal | None, Gates, Subject, Subject | None, bool | None]:
        gates = Gates.parse(max_ppl_increase, max_kl)
        check_device(device)
        place, origin = resolve(str(folder), None, quiet=console.quiet)
        sealed = _sealed(folder, place) if record and (team is None or team.leads) else None
        subject = Subject(open_checkpoint(place), origin.name)
        source, is_source = None, None
        if against is not None:
            commit, layout = _recorded(place, against)
            parent, origin = resolve(against, commit, quiet=console.quiet, prefer=layout)
            source = Subject(open_source(place, parent), origin.name)
            is_source = folder_card.is_source(place, source.checkpoint)
            if is_source is False:
                console.warn(
                    f"{origin.name} is not what {subject.name} was made from: no limit counts for a publication"
                )
        return place, sealed, gates, subject, source, is_source

    if team is not None:
        device = own_gpu(device, team)
    begun = begin() if team is None else team.begin(begin, lambda _: {})
    place, sealed, gates, subject, source, is_source = begun
    found = evaluate_folder(
        subject, text, against=source, gates=gates, windows=windows, length=length, threads=threads, device=device,
        team=team, console=console,
    )  # fmt: skip
    if found.against is not None:
        found = replace(found, against=replace(found.against, is_source=is_source))
    if sealed is not None:
        folder_card.record_evaluation(place, sealed, found, device, console)
    return found


def evaluate_tasks(
    folder: str | Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    include: str | Path | None = None,
    record: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    console: Console = _QUIET,
) -> tuple[TaskScore, ...]:
    """Scores of lm-evaluation-harness's tasks; see `quantkit.harness`. record: as `evaluate` does."""
    from quantkit.harness import evaluate_tasks as run

    check_device(device)
    place, origin = resolve(str(folder), None, quiet=console.quiet)
    sealed = _sealed(folder, place) if record else None
    found = run(
        open_checkpoint(place), origin.name, tasks, limit=limit, shots=shots, include=include, device=device,
        threads=threads, console=console,
    )  # fmt: skip
    if sealed is not None:
        folder_card.record_scores(place, sealed, found, console)
    return found


def compare(
    folders: Sequence[str | Path],
    text: str,
    *,
    against: str | None = None,
    out: Path | None = None,
    windows: Windows = WINDOWS,
    length: int | None = None,
    threads: int | None = None,
    device: str = "cpu",
    console: Console = _QUIET,
) -> Comparisons:
    """Evaluates each folder as `evaluate` does, and puts them side by side. out: a folder for comparison.json,
    comparison.md and, where matplotlib is there, comparison.png. Raises what `evaluate` raises; OutputError if they
    cannot be written."""
    if out is not None:
        check_comparison(out)
    rows: list[Compared] = []
    names = names_of(folders)
    places = [resolve(str(folder), None, quiet=console.quiet)[0] for folder in folders]
    # Of all, before one is evaluated: that takes long, and another may be no model.
    sizes = [sum(file.nbytes for file in open_checkpoint(place).files) for place in places]
    for folder, name, place, nbytes in zip(folders, names, places, sizes, strict=True):
        options = {"against": against, "windows": windows, "length": length, "threads": threads, "device": device}
        found = evaluate(folder, text, **options, console=console)  # type: ignore[arg-type]
        rows.append(compared(place, name, nbytes, found))
        check_tokens(rows)
    found_all = side_by_side(rows)
    if out is not None:
        write_comparison(found_all, out)
    return found_all


def _sealed(given: str | Path, place: Path) -> Seal | None:
    """A folder of ours, here, in which something will be recorded; None for any other. OutputError if nothing can be
    written in it, VerifyError if it is not sound."""
    if not is_local(str(given)) or not (place / "quantkit.json").is_file():
        return None
    folder_card.check_place(place)
    sealed = seal(place)
    folder_card.card_text(place, Record())  # raises what would otherwise come after hours
    return sealed


def _recorded(folder: Path, source: str) -> tuple[str | None, Prefer]:
    """The commit of the Hub model `source` that the folder was made from, for its branch may have moved on since; and
    the layout that was read."""
    try:
        made_from = read_json(folder / "quantkit.json").get("source")
    except SourceError:
        return None, "hf"
    if is_local(source) or not isinstance(made_from, dict) or made_from.get("name") != source:
        return None, "hf"
    commit, layout = made_from.get("revision"), made_from.get("layout")
    known = isinstance(commit, str) and re.fullmatch("[0-9a-f]{40}", commit)
    return (str(commit) if known else None), "mistral" if layout in ("mistral", "meta-llama") else "hf"


def rewrite_card(folder: str | Path) -> Path:
    """Writes README.md of a finished folder again, from its manifest and what was evaluated. Returns the path."""
    return folder_card.rewrite_card(expand(str(folder)))
