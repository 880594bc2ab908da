"""What linears lose in each mix of bits, for methods that mix them: from a file, or measured."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.console import Console, human_bytes
from quantkit.devices import check_device, check_gpu_memory, warn_if_slow
from quantkit.errors import OutputError, UsageError
from quantkit.hub import expand, is_local, resolve
from quantkit.job_memory import measuring_memory
from quantkit.layer_memory import LayerMemory
from quantkit.layouts import Checkpoint, open_checkpoint
from quantkit.measurement import ROWS, Measurement, allocated, check_fits, digest_of_weights, read_measurement
from quantkit.measurer import Job
from quantkit.measurer import measure as measure_job
from quantkit.methods.base import Mixed, WeightSpec
from quantkit.output import check_place
from quantkit.patterns import matches
from quantkit.planner import linears_to_mix, make_plan, source_tensors, tokens_for
from quantkit.plans import Origin
from quantkit.recipe import Recipe
from quantkit.restored import open_files
from quantkit.teamwork import own_share, signed

if TYPE_CHECKING:
    from quantkit.solvers.team import Team

MEASURED = ".measurement.json"  # behind the name of the output folder


def _known(recipe: Recipe) -> dict[str, Any]:
    """Keys of a quantize block that allocation leaves as they are."""
    table: dict[str, Any] = recipe.canonical()["quantize"]
    return {
        key: table[key] for key in ("method", "bits", "min_bits", "max_bits", "head_bits", "effort") if key in table
    }


def known_losses(
    recipe: Recipe,
    checkpoint: Checkpoint,
    origin: Origin,
    *,
    data_present: bool,
    measuring: bool,
    force: bool,
    console: Console,
) -> Measurement | None:
    """What was measured of a source: in the file that the recipe names, or in one beside the output, where a run leaves
    it; measuring: or what is measured now, for a run that may replace what an earlier one left (`force`). None if
    nothing was, or all mixes are given."""
    mixing = recipe.mixing
    assert mixing is not None
    if measuring and recipe.output is not None:  # which may take hours, and be for nothing
        check_place(expand(recipe.output), checkpoint.folder, force=force, quantize=_known(recipe))
    linears, specs, params = linears_to_mix(recipe, checkpoint)
    given = params.mixes
    if all(any(matches(spec.module, pattern) for pattern in given) for spec in specs):
        return None

    # A plan reads no weights but those that tell a measurement of this model from another's, if they are here.
    readable = data_present or (is_local(recipe.source) and not checkpoint.absent)

    def fits(found: Measurement, path: Path) -> None:
        with open_files(checkpoint) if readable else nullcontext() as files:
            weights = found.weights if files is None else digest_of_weights(checkpoint, files, found.linears)
        check_fits(found, path, label=mixing.label(params), weights=weights, specs=specs)

    if (named := params.measurement) is not None:
        path = expand(named)
        found = read_measurement(path)
        fits(found, path)
        return found
    if recipe.output is None:
        return None
    out = expand(recipe.output)
    path = out.with_name(out.name + MEASURED)
    tokens = tokens_for(recipe, checkpoint) if path.exists() or measuring else None
    if path.exists() and tokens is not None:
        try:
            found = read_measurement(path)
            fits(found, path)
            if found.tokens == tokens.first(ROWS).sha256:
                return found
        except UsageError:
            pass  # of another model, or of another text: it is measured again
    if not measuring or tokens is None:
        return None
    allocated(mixing, params, specs, None)  # what cannot be had is refused before anything is measured
    job = Job.of(recipe, checkpoint, origin.name, linears, specs, params, tokens)
    if job.device != "cpu":  # of what is measured, and of what comes after it
        memory = measuring_memory(recipe, checkpoint, source_tensors(checkpoint), linears, job.tokens)
        assumed = make_plan(recipe, checkpoint, origin, quiet=True)
        check_gpu_memory(job.device, max(memory.at_work, assumed.memory.on_gpu))
    console.note(f"measuring what {len(specs):,} linears lose, into {path.name}; the rest follows")
    return measure_job(job, path, console)


def expected_losses(found: Measurement, recipe: Recipe) -> dict[float, float]:
    """By bits per weight, the loss that the best mixes are expected to have, with the recipe's method."""
    mixing, params = recipe.mixing, None if recipe.quantize is None else recipe.quantize.params
    assert mixing is not None
    assert isinstance(params, Mixed)
    specs = [WeightSpec(module, "F16", linear.rows, linear.columns) for module, linear in found.linears.items()]
    curve: dict[float, float] = {}
    for bits in (2.5, 3.0, 3.5, 4.0, 5.0, 6.0):
        with suppress(UsageError):  # below what these linears take at the least
            loss = allocated(mixing, params.model_copy(update={"bits": bits}), specs, found.losses)[1].loss
            assert loss is not None
            curve[bits] = loss
    return curve


def measure_recipe(recipe: Recipe, out: Path, *, team: Team | None = None, console: Console) -> Measurement:
    if recipe.mixing is None:
        raise UsageError("only methods that mix bits are measured for", hint="name exl2, gptq or bnb, or none")
    if team is not None:
        recipe, team = own_share(recipe, team)

    def begin() -> Job:
        check_device(recipe.resources.device)
        folder, origin = resolve(recipe.source, recipe.revision, quiet=console.quiet)
        checkpoint = open_checkpoint(folder, native=recipe.native.options)
        linears, specs, params = linears_to_mix(recipe, checkpoint)
        job = Job.of(recipe, checkpoint, origin.name, linears, specs, params, tokens_for(recipe, checkpoint))
        check_gpu_memory(job.device, memory_of(job).at_work)
        return job

    def memory_of(job: Job) -> LayerMemory:
        return measuring_memory(recipe, job.checkpoint, source_tensors(job.checkpoint), job.linears, job.tokens)

    path = expand(str(out))
    if team is None:
        job, there = begin(), path.exists()
    else:
        job = team.begin(begin, lambda made: signed(made.checkpoint, made.tokens, made.device, method=made.label))
        there = team.tell(path.exists())
    if there:
        return _measured(job, path)
    memory = memory_of(job)
    warn_if_slow(job.device, console)
    console.note(f"peak RAM {human_bytes(memory.peak)}, scratch on disk {human_bytes(memory.scratch)}")
    return measure_job(job, path, console, team)


def _measured(job: Job, path: Path) -> Measurement:
    """The file, if it holds what this job would find. OutputError if it does not."""
    with open_files(job.checkpoint) as files:
        weights = digest_of_weights(job.checkpoint, files, [s.module for s in job.specs])
    try:
        found = read_measurement(path)
        check_fits(found, path, label=job.label, weights=weights, specs=job.specs)
    except UsageError:
        found = None
    if found is None or found.tokens != job.tokens.sha256:
        raise OutputError(
            "the file exists, and is not what would be measured", where=str(path), hint="name another, or remove it"
        )
    return found
