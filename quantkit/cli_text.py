"""What the command line prints of plans and runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantkit.console import human_bytes, table

if TYPE_CHECKING:
    from quantkit.evaluation import Evaluation, TaskScore
    from quantkit.outcome import Outcome
    from quantkit.plans import Plan
    from quantkit.push import Pushed


def plan_text(job: Plan, forecast: Sequence[tuple[str, str]] = ()) -> str:
    """forecast: rows on what it takes on some machines."""
    tensors = table(
        [
            (t.name, t.dtype, "×".join(map(str, t.shape)) or "scalar", f"{t.nbytes:,}")
            for u in job.units
            for t in u.outputs
        ],
        header=("tensor", "dtype", "shape", "bytes"),
        right=(3,),
    )
    files = table([(f.name, f.role, f"{f.nbytes:,}") for f in job.files], header=("file", "kind", "bytes"), right=(2,))
    totals = table(
        [
            ("parameters", f"{job.parameters:,}"),
            *_job_rows(job),
            ("weights", f"{human_bytes(job.source_bytes)} → {human_bytes(job.weight_bytes)}"),
            ("peak RAM", f"{human_bytes(job.memory.peak)} at most, {job.memory.threads} threads"),
            *([("GPU memory", f"{human_bytes(job.memory.gpu)} at least")] if job.memory.gpu else []),
            ("disk", f"{job.disk:,} bytes ({human_bytes(job.disk)})"),
            *_calibration_rows(job),
            ("passes", f"{job.passes} over the source"),
            ("plan hash", job.hash),
            *forecast,
        ]
    )
    return f"{tensors}\n\n{files}\n\n{totals}"


def _calibration_rows(job: Plan) -> list[tuple[str, str]]:
    if job.tokens is None:
        return []
    rows, length = job.tokens.ids.shape
    return [
        ("calibration", f"{rows:,} rows of {length:,} tokens from {job.tokens.name}"),
        ("scratch", f"{human_bytes(job.scratch)} of disk while it runs"),
    ]


def _job_rows(job: Plan) -> list[tuple[str, str]]:
    rows = []
    if (prune := job.recipe.prune) is not None:
        rows.append(("pruned", f"{len(job.pruned):,} linear layers of {job.architecture}, {prune.requested}"))
        zeros, weights = job.to_prune
        known = "how many weights, the run will say" if zeros is None else f"{zeros:,} weights, {zeros / weights:.3%}"
        rows.append(("", f"{known} of {weights:,}"))
    if job.bits_per_weight is None and rows:
        return rows
    if job.bits_per_weight is None:
        moved = sum(u.reordered for u in job.units)
        return [
            ("converted", f"{len(job.units):,} tensors of {job.architecture}, {moved:,} with rows in another order")
        ]
    bits = f"{job.bits_per_weight:.3f} in quantized layers, {job.model_bits_per_weight:.3f} over all"
    quantized = f"{len(job.quantized):,} linear layers of {job.architecture}"
    return [*rows, ("quantized", quantized), ("bits per weight", bits)]


def outcome_text(outcome: Outcome, part: str | None = None) -> str:
    if outcome.already_done:
        return f"{outcome.out} is finished already; `quantkit verify` checks it"
    rows = [
        ("folder", str(outcome.out)),
        *([("part", part)] if part else []),
        (
            "tensors",
            f"{outcome.units:,}" + (f", {outcome.reused:,} kept from an earlier run" if outcome.reused else ""),
        ),
        *([("checked", outcome.checked)] if outcome.checked else []),
        *([("zeros", _zeros_text(outcome.zeros, outcome.source_zeros))] if outcome.zeros is not None else []),
        ("seconds", f"{outcome.seconds:.1f}"),
        ("peak RAM", human_bytes(outcome.peak_rss)),
        ("next", f"`quantkit finish {outcome.out}`, when all parts are done")
        if part
        else ("card", str(outcome.out / "README.md")),
    ]
    return table(rows)


def _zeros_text(zeros: int, before: int | None) -> str:
    sparse = f"; the source was sparse already, {before:,} of them were zero" if before and before > zeros / 100 else ""
    return f"{zeros:,} in the pruned layers{sparse}"


def evaluation_text(found: Evaluation) -> str:
    rows = [
        ("text", f"{found.text}, {found.windows:,} windows of {found.length:,} tokens"),
        ("predicted", f"{found.tokens:,} tokens"),
        ("loss", f"{found.loss:.5f}{spread(found.loss_error, '.5f')} nats a token"),
        ("perplexity", f"{found.perplexity:.4f}{spread(found.perplexity_error, '.4f')}"),
    ]
    if (other := found.against) is not None:
        rows += [
            ("against", f"{other.name}, perplexity {other.perplexity:.4f}"),
            ("increase", f"{other.increase:+.2%}{spread(other.increase_error, '.2%')}"),
            ("KL divergence", f"{other.kl:.5f} nats a token, 99th percentile {other.kl_99:.4f}"),
            ("same top token", f"{other.agreement:.2%}"),
        ]
        if errors := other.layer_errors:
            worst = max(range(len(errors)), key=errors.__getitem__)
            rows.append(("furthest apart", f"behind layer {worst}: {errors[worst]:.2%} of the hidden state"))
    rows += [("limit", verdict.text) for verdict in found.gates]
    return table(rows)


def scores_text(scores: Sequence[TaskScore]) -> str:
    rows = [
        (s.task, s.metric, f"{s.value:.4f}{spread(s.error, '.4f')}", "" if s.samples is None else f"{s.samples:,}")
        for s in scores
    ]
    return table(rows, header=("task", "metric", "value", "texts"), right=(3,))


def pushed_text(found: Pushed) -> str:
    files = f"{len(found.files):,} files, {human_bytes(found.nbytes)}"
    if not found.commit:
        return table([("repository", found.repo_id), ("would hold", files), *(("", name) for name in found.files)])
    rows = [
        ("repository", found.repo_id),
        ("holds", files),
        ("changed", human_bytes(found.changed)),
        *([("deleted", ", ".join(found.deleted))] if found.deleted else []),
        ("commit", found.commit),
        ("url", found.url),
    ]
    return table(rows)


def spread(error: float | None, form: str) -> str:
    return "" if error is None else f" ± {error:{form}}"
