"""The command line: options in, one call, result out. No logic lives here, and torch is not imported."""

from __future__ import annotations

import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from quantkit.cli_options import follows, half_launched, launched, options, output_options, team
from quantkit.cli_publish import COMMANDS
from quantkit.cli_recipe import (
    CALIBRATION,
    common_options,
    convert_options,
    job_options,
    prune_options,
    quantize_options,
    recipe_of,
    source_argument,
)
from quantkit.cli_text import outcome_text, plan_text
from quantkit.console import Console, table
from quantkit.errors import Interrupted, QuantkitError, RunError, UsageError, VerifyError
from quantkit.version import __version__

if TYPE_CHECKING:
    from quantkit.forecast import Forecast
    from quantkit.plans import Plan
    from quantkit.recipe import Recipe


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="quantkit")
def cli() -> None:
    """Quantize, prune and convert language models into folders fit to publish.

    SRC is a folder with weights and config.json or params.json, or a Hub id such as org/model.
    """


@cli.command()
@click.argument("source", metavar="SRC")
@click.option("--revision", help="Branch, tag or commit of a Hub id.")
@click.option("--sparsity", is_flag=True, help="Read all weights, and count the zeros.")
@output_options
def inspect(source: str, revision: str | None, sparsity: bool, as_json: bool, quiet: bool) -> None:
    """Say what a checkpoint is: layout, architecture, sizes, sparsity, problems."""
    from quantkit import api

    found = api.inspect(source, revision=revision, sparsity=sparsity)
    Console(json=as_json, quiet=quiet).result(found.to_json(), found.text())


@cli.command()
@source_argument
@quantize_options
@common_options
@options(
    click.option("--nodes", type=click.IntRange(1, 100_000), help="Say what it takes on so many machines."),
    click.option("--gpus-per-node", type=click.IntRange(0, 64), help="With so many GPUs each.  [default: 0]"),
    click.option("--profile", "rates", type=click.Path(path_type=Path), help="And how long, by `doctor --calibrate`."),
    click.option("--network", help="Bytes a second between machines.  [default: 1.25GB]"),
)
@output_options
def plan(
    as_json: bool,
    quiet: bool,
    nodes: int | None,
    gpus_per_node: int | None,
    rates: Path | None,
    network: str | None,
    **options: Any,
) -> None:
    """Say every byte that `quantize` would write, and the RAM it takes, without reading a weight."""
    recipe, console = recipe_of(options), Console(json=as_json, quiet=quiet)
    if nodes is None and gpus_per_node is None and rates is None and network is None:
        _print_plan(recipe, console)
        return
    from quantkit.forecast import NETWORK, forecast
    from quantkit.rates import read_rates

    if network is not None and (nodes or 1) == 1:
        raise UsageError("--network is between machines, and there is one", hint="say how many: --nodes 8")
    known = None if rates is None else read_rates(rates)
    speed = NETWORK if network is None else _rate(network)
    _print_plan(recipe, console, lambda job: forecast(job, nodes or 1, gpus_per_node or 0, known, speed))


@cli.command()
@source_argument
@quantize_options
@common_options
@job_options
@output_options
def quantize(as_json: bool, quiet: bool, force: bool, dry_run: bool, part: str | None, **options: Any) -> None:
    """Quantize SRC into OUT. The same command resumes an interrupted run."""
    _plan_or_run(recipe_of(options, "quantize"), Console(json=as_json, quiet=quiet), force, dry_run, part)


@cli.command()
@source_argument
@prune_options
@common_options
@job_options
@output_options
def prune(as_json: bool, quiet: bool, force: bool, dry_run: bool, part: str | None, **options: Any) -> None:
    """Set weights of SRC to zero, into OUT: a part of them, or N of every M. The same command resumes.

    To prune and quantize at once, write a recipe with both blocks and `quantkit run` it.
    """
    _plan_or_run(recipe_of(options, "prune"), Console(json=as_json, quiet=quiet), force, dry_run, part)


@cli.command()
@source_argument
@convert_options
@common_options
@job_options
@output_options
def convert(as_json: bool, quiet: bool, force: bool, dry_run: bool, part: str | None, **options: Any) -> None:
    """Write SRC into OUT in another layout: Mistral's own (params.json) or Hugging Face's.

    Every tensor is mapped back and compared with the source. The same command resumes an interrupted run.
    """
    _plan_or_run(recipe_of(options, "convert"), Console(json=as_json, quiet=quiet), force, dry_run, part)


@cli.command()
@source_argument
@options(
    click.option("-o", "--output", "file", required=True, metavar="FILE", type=click.Path(path_type=Path)),
    click.option("--method", help="For which method: exl2, gptq, bnb.  [default: exl2]"),
    click.option("--quant-type", help="bnb: nf4 or fp4.  [default: nf4]"),
    click.option("--group-size", type=int, help="gptq: 32, 64, 128 or -1 (a row).  [default: each linear chooses]"),
    click.option("--sym/--no-sym", default=None, help="gptq: no zero points, or with.  [default: sym]"),
    *CALIBRATION,
    click.option("--skip", multiple=True, metavar="PATTERN", help="Leave matching layers out. Repeatable."),
    click.option("--device", help="Where to compute: cpu or cuda.  [default: cpu]"),
    click.option("--threads", type=int, help="Threads that work on weights.  [default: all cores]"),
    click.option("--revision", help="Branch, tag or commit of a Hub id."),
    click.option("--recipe", type=click.Path(path_type=Path), help="YAML file with these settings."),
    click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set any key of the recipe."),
)
@output_options
def measure(file: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure what every linear of SRC loses in every mix of bits, for `quantize --method exl2 --measurement FILE`.

    The same command resumes. What it finds serves for any number of bits.
    """
    from quantkit.measuring import expected_losses, measure_recipe

    console = Console(json=as_json, quiet=quiet)
    if options["method"] == "rtn":
        raise UsageError("rtn does not mix bits, so there is nothing to measure for it", hint="name exl2, gptq or bnb")
    named = {"method": "exl2", "min_bits": 0.0} | {key: value for key, value in options.items() if value is not None}
    recipe = recipe_of(named, "quantize")  # min_bits: whatever they are, they are mixed
    with team() as joined:
        found = measure_recipe(recipe, file, team=joined, console=Console(speaks=False) if follows() else console)
    if follows():
        return
    curve = expected_losses(found, recipe)
    rows = [
        ("measured", f"{len(found.linears):,} linear layers, {found.rows:,} rows of {found.length:,} tokens"),
        ("file", str(file)),
        ("bits per weight", "expected KL divergence, nats a token"),
        *((f"{bits:g}", f"{loss:.4g}") for bits, loss in curve.items()),
    ]
    console.result({"file": str(file), "linears": len(found.linears), "expected_kl": curve}, table(rows))


@cli.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set any key of the recipe.")
@job_options
@output_options
def run(as_json: bool, quiet: bool, force: bool, dry_run: bool, part: str | None, **options: Any) -> None:
    """Do what a recipe file says."""
    _plan_or_run(recipe_of(options), Console(json=as_json, quiet=quiet), force, dry_run, part)


@cli.command()
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--source", metavar="SRC", help="Where the source lies here.  [default: as for the first part]")
@output_options
def finish(folder: Path, source: str | None, as_json: bool, quiet: bool) -> None:
    """Make a model of a folder whose parts (--part I/N) are all done."""
    from quantkit import api

    outcome = api.finish(folder, source=source, console=Console(json=as_json, quiet=quiet))
    data = {**asdict(outcome), "out": str(outcome.out)}
    Console(json=as_json, quiet=quiet).result(data, outcome_text(outcome))


@cli.command()
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--source", metavar="SRC", help="Also compare every tensor with what it was made from.")
@click.option("--quick", is_flag=True, help="Headers and sizes only.")
@click.option("--part", metavar="I/N", help="All headers, and of what else is read the I-th of N parts.")
@output_options
def verify(folder: Path, source: str | None, quick: bool, part: str | None, as_json: bool, quiet: bool) -> None:
    """Prove a written folder; exit code 3 and a list if anything is wrong."""
    from quantkit import api
    from quantkit.evaluation_record import read_record
    from quantkit.folder_card import is_written_by_hand

    console = Console(json=as_json, quiet=quiet)
    folder = folder.expanduser()
    found = api.verify(folder, source=source, quick=quick, part=part, console=console)
    if not found.problems and is_written_by_hand(folder, read_record(folder)):
        console.warn(
            "README.md is not the card that quantkit.json makes; if nobody meant to change it: `quantkit card`"
        )
    rows = [
        ("files", f"{found.files} {'sizes' if quick else 'checksums'} compared"),
        ("tensors", f"{found.tensors:,} headers compared, {found.quantized:,} quantized"),
    ]
    if found.quantized:
        decoded = f"{found.quantized:,}" if part is None else f"those of part {part}"
        rows.append(("decoded", "skipped (--quick)" if quick else decoded))
    if source is not None:
        but_zeros = f", {found.equal_but_zeros:,} but for zeros" if found.equal_but_zeros else ""
        rows.append(("source", f"{found.compared:,} tensors compared, {found.equal:,} equal bit for bit{but_zeros}"))
    if found.pruned is not None:
        rows.append(("zeros", found.pruned.text))
        rows += [("", f"{kind.text}  {name}") for name, kind in found.sparsity.items()]
    if found.errors:
        worst = max(found.errors, key=lambda name: found.errors[name])
        rows.append(("largest error", f"{found.errors[worst]:.4f}  {worst}"))
    rows += [("problem", problem) for problem in found.problems]
    what = "1 problem" if len(found.problems) == 1 else f"{len(found.problems)} problems"
    rows.append(("result", what if found.problems else "sound"))
    console.result({"sound": not found.problems, **asdict(found)}, table(rows))
    if found.problems:
        beside = ("README.md", "evaluation.json", "layers.png")
        if all(problem.startswith(beside) for problem in found.problems):
            hint = "mend what lies beside the weights, as each problem says"
        else:
            hint = "write the folder again with --force"
            if source is not None:
                hint += ", unless --source is not what it was made from"
        error = VerifyError(f"{what} found", where=str(folder), hint=hint)
        Console(quiet=quiet).error(error)  # on stderr alone: stdout has its one result, and the problems in it
        sys.exit(error.exit_code)


for command in COMMANDS:
    cli.add_command(command)


def _rate(text: str) -> int:
    from quantkit.recipe import parse_size

    try:
        found = int(parse_size(text))
    except ValueError as e:
        raise UsageError(str(e), where="--network", hint="bytes a second, such as 12.5GB") from None
    if found <= 0:
        raise UsageError("a network moves bytes", where="--network", hint="bytes a second, such as 12.5GB")
    return found


def _print_plan(
    recipe: Recipe, console: Console, look_ahead: Callable[[Plan], Forecast] | None = None, part: str | None = None
) -> None:
    from quantkit import api
    from quantkit.parts import check_part, check_recipe
    from quantkit.sharing import parse_part

    share = None if part is None else parse_part(part)
    if share is not None:
        check_recipe(recipe)
    job, _ = api.plan_recipe(recipe)
    if share is not None:
        check_part(job, share)
    for warning in job.warnings:
        console.warn(warning)
    if look_ahead is None:
        console.result(job.to_json(), plan_text(job))
        return
    found = look_ahead(job)
    console.result({**job.to_json(), "forecast": found.to_json()}, plan_text(job, found.rows()))


def _plan_or_run(recipe: Recipe, console: Console, force: bool, dry_run: bool, part: str | None) -> None:
    if launched() and part is not None:
        raise UsageError("it is for processes that do not know of each other", where="--part", hint="leave it out")
    if dry_run:
        if not follows():
            _print_plan(recipe, console, part=part)
        return
    from quantkit import api

    if launched():
        together = api.run_together(recipe, force=force, console=Console(speaks=False) if follows() else console)
        if together is None:
            return
        outcome = together
    else:
        outcome = api.run_recipe(recipe, force=force, part=part, console=console)
    of = {} if part is None else {"part": str(part)}
    console.result({**asdict(outcome), "out": str(outcome.out), **of}, outcome_text(outcome, part))


LINGER = 3.0  # seconds
TEAMWORK = {"quantize", "prune", "convert", "run", "measure", "eval"}


def _linger() -> None:
    """Waits while another process says what is wrong: torchrun ends all where one has ended."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    time.sleep(LINGER)


def _error_of(e: BaseException) -> QuantkitError | None:
    """What a user is told of it; None if it is a fault of this program."""
    if isinstance(e, QuantkitError):
        return e
    if isinstance(e, click.ClickException):
        context = getattr(e, "ctx", None)
        command = context.command_path if context is not None else "quantkit"
        return UsageError(e.format_message().rstrip("."), where=command, hint=f"see `{command} --help`")
    if isinstance(e, (KeyboardInterrupt, click.Abort)):
        return Interrupted("interrupted", hint="run the same command again")
    if isinstance(e, OSError):
        hint = "mend that, and run the same command again"
        error: QuantkitError | None = RunError(
            f"the system refused: {e.strerror or e}", where=str(e.filename or ""), hint=hint
        )
    else:
        from quantkit.devices import out_of_memory

        error = out_of_memory(e) if isinstance(e, (RuntimeError, MemoryError)) else None
    if error is not None:
        error.own = True
    return error


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 1 failed, 2 wrong usage or input, 3 not sound or not good enough, 130
    interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    console = Console(json="--json" in arguments, quiet="--quiet" in arguments)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: no terminal's alphabet stops a result
    if TEAMWORK & set(arguments[:1]):
        if missing := half_launched():
            console.warn(f"RANK and WORLD_SIZE name a team, without {missing}: this process works alone")
    elif follows():  # the first one does it alone
        sys.exit(0)
    # Files of the source, of the output and journals of parts are open at once, and shells allow 1,024.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # no limit, on some systems, cannot be asked for
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # A scheduler's SIGTERM ends a run as Ctrl-C does: what is finished is kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        cli.main(arguments, prog_name="quantkit", standalone_mode=False)
    except (QuantkitError, click.ClickException, KeyboardInterrupt, OSError, RuntimeError, MemoryError) as e:
        if (error := _error_of(e)) is None:
            raise
        # torchrun stops who is left of a team. Nothing is to be stopped any more, and torch would say so at length.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if isinstance(e, OSError) and e.filename is None:
            sys.stdout = None  # it may be what failed, and the interpreter would try once more
        error.where = error.where or " ".join(["quantkit", *arguments[:1]])  # of options that do not go together, say
        if error.own or not follows():
            console.error(error)
        elif not isinstance(error, Interrupted):
            _linger()
        sys.exit(error.exit_code)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(0)
