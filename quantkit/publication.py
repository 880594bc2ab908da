"""The manifest (quantkit.json), and the card made from it.

The manifest is the record; the card is its rendering, so `quantkit card OUT` needs nothing else. What only the run can
measure (errors, checksums) enters at fixed places, so that both files have a size before they have their contents.
"""

from __future__ import annotations

import json
import math
import platform
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from quantkit.card import CardFacts, ErrorRow, FileRow, render_card
from quantkit.card_command import command_of
from quantkit.card_facts import Pruning, SparsityRow
from quantkit.errors import RunError
from quantkit.evaluation import Evaluation, TaskScore
from quantkit.layouts import Checkpoint, Target
from quantkit.measurement import Allocated
from quantkit.methods import find_method
from quantkit.methods.base import Report, Selection
from quantkit.parent_card import ParentCard, read_parent_card
from quantkit.plans import CARD, MANIFEST, Plan, PlannedFile, Unit
from quantkit.plots import ALLOCATION
from quantkit.pruning import NAMES, Prune
from quantkit.version import __version__

FORMAT = 1
ERROR_NOTE = "Measured while encoding, on every 16th block (4-bit) or row (8-bit) of every tensor."
LAYER_LIBRARIES = ("torch", "transformers")  # whose versions can change a calibrated result
# As wide in JSON as any error or count that a run can measure.
_WIDEST = 1.23456e-100
_WIDEST_COUNT = 10**12 - 1


@dataclass(frozen=True)
class Measured:
    """What the run found out: a Report for each encoded tensor, SHA-256 of what was written and of what was read, and
    how many rows of calibration text had to be left out, and what linears computed in meanwhile."""

    reports: Mapping[str, Report]
    outputs: Mapping[str, str]
    sources: Mapping[str, str]
    excluded: int = 0
    compute: str = ""

    @classmethod
    def placeholder(cls, plan: Plan, files: Iterable[PlannedFile]) -> Measured:
        """Stand-ins of the widest values."""
        most = _WIDEST_COUNT
        widest = Report(_WIDEST * _WIDEST, 1.0, most, _WIDEST, pruned=most, zeros=most, source_zeros=most)
        return cls(
            {u.name: widest for u in plan.encoded},
            {f.name: "0" * 64 for f in files},
            {row["name"]: "0" * 64 for row in plan.draft["source"]["files"]},
            _WIDEST_COUNT,
            "bfloat16",
        )


def draft_manifest(
    plan: Plan, checkpoint: Checkpoint, target: Target, selection: Selection, loader: str
) -> dict[str, Any]:
    """All of the manifest that is known before the run."""
    parent = read_parent_card(checkpoint.parent_card)
    kept: dict[str, int] = defaultdict(int)
    for unit in plan.units:
        if not unit.quantized if plan.recipe.quantize is not None else unit.linear is None:
            kept[_kind(unit.name)] += sum(t.nbytes for t in unit.outputs)
    table: dict[str, Any] = {
        "format": FORMAT,
        "quantkit": __version__,
        "plan_hash": plan.hash,
        "recipe": plan.recipe.canonical(),
        "recipe_yaml": plan.recipe.to_yaml(plan.origin.name, plan.origin.revision),
        "source": {
            "name": plan.origin.name,
            "base_model": plan.recipe.card.base_model or plan.origin.base_model,
            "revision": plan.origin.revision,
            "layout": checkpoint.layout,
            "architecture": plan.architecture,
            "parameters": plan.parameters,
            "bytes": sum(p.nbytes for u in plan.units for p in u.source.parts),
            "removed_from_config": list(target.stripped),
            "dropped": [*checkpoint.dropped, *(name for name in checkpoint.tensors if name not in target.names)],
            "files": [{"name": f.name, "bytes": f.nbytes} for f in checkpoint.files],
        },
        "method": _about(plan, selection),
        "result": {
            "layout": plan.layout,
            "bits_per_weight": None if plan.bits_per_weight is None else round(plan.bits_per_weight, 4),
            "model_bits_per_weight": round(plan.model_bits_per_weight, 4),
            "weight_bytes": plan.weight_bytes,
            "kept": sorted(([k, n] for k, n in kept.items()), key=lambda row: -int(row[1])),
            "loader": loader,
            "context": checkpoint.config.get("max_position_embeddings"),
            "chat": _has_chat_template(checkpoint) and plan.layout == "hf",
            "bos": _texts_begin_with_bos(plan, checkpoint),
            "warnings": list(plan.warnings),
        },
        "parent": {
            "origin": parent.origin,
            "metadata": _plain(parent.metadata),
            "problems": list(parent.problems),
            "body": parent.body,
        },
        "kinds": {u.name: u.linear.kind for u in plan.encoded if u.linear},
        "tensors": [_tensor_row(u) for u in plan.units],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "numba", *(LAYER_LIBRARIES if plan.tokens else ()))},
        },
    }
    if plan.allocation is not None:
        table["allocation"] = _allocation(plan, plan.allocation)
    if plan.tokens is not None:
        table["calibration"] = plan.tokens.to_json()
    if (prune := plan.recipe.prune) is not None:
        words = {"method": NAMES[prune.method], "requested": prune.requested, "pattern": prune.pattern}
        table["pruning"] = {**words, "compared": prune.compared, "scope": prune.scope, "moved": not prune.keeps_values}
    if target.recorded:
        table["recorded"] = dict(target.recorded)
    return table


def _allocation(plan: Plan, found: Allocated) -> dict[str, Any]:
    """How bits were shared out: by kind of module, bits per weight on disk, and what that is expected to cost."""
    kinds: dict[str, list[tuple[float, int]]] = defaultdict(list)
    head = {}
    dense = {f"{linear.module}.weight": linear for linear in found.dense}
    for unit in plan.units:
        linear = unit.linear if unit.quantized else dense.get(unit.name)
        bits = 8 * sum(t.nbytes for t in unit.outputs) / unit.source.numel
        if linear is not None and linear.module == found.head:
            head = {"head": round(bits, 3)}
        elif linear is not None:
            kinds[linear.kind].append((bits, unit.source.numel))
    rows = [
        {
            "kind": kind,
            "tensors": len(own),
            "bits": round(sum(bits * n for bits, n in own) / sum(n for _, n in own), 3),
            "least": round(min(own)[0], 3),
            "most": round(max(own)[0], 3),
        }
        for kind, own in kinds.items()
    ]
    known: dict[str, Any] = (
        {} if found.loss is None else {"expected_kl": _short(found.loss), "bound": _short(found.bound)}
    )
    known |= {"text": found.text, "tokens_sha256": found.tokens} if known and found.text else {}
    plot = {"plot": ALLOCATION} if ALLOCATION in plan.generated else {}
    return {"bits": round(found.bits, 4), **known, **head, **plot, "rows": rows}


def _about(plan: Plan, selection: Selection) -> dict[str, Any]:
    """What was done, as the card names it."""
    prune = plan.recipe.prune
    if (quantize := plan.recipe.quantize) is None and prune is not None:
        title = f"{NAMES[prune.method]}, {prune.requested.partition(' (')[0]}"
        return {"title": title, "slug": prune.slug, "bits": None,
                "tags": _prune_tags(prune), "settings": [*_prune_settings(prune), *_settings(plan)], "encoded": [],
                "left_dense": [], "skipped_modules": [], "sampled": False,
                "decoded": sum(u.source.scales is not None for u in plan.units)}  # fmt: skip
    if quantize is None:
        words = {"hf": "the Hugging Face layout", "mistral": "the mistral-src layout"}[plan.layout]
        return {"title": words, "slug": {"hf": "hf", "mistral": "mistral-src"}[plan.layout], "bits": None,
                "tags": ["conversion"] if plan.layout == "hf" else ["conversion", "mistral-src"],
                "settings": _settings(plan), "encoded": [], "left_dense": [], "skipped_modules": [],
                "sampled": False,
                "decoded": sum(u.source.scales is not None for u in plan.units)}  # fmt: skip
    about = quantize.implementation.describe(quantize.params)
    return {
        "title": about.title,
        "slug": about.slug if prune is None else f"{prune.slug}-{about.slug}",
        "bits": quantize.bits,
        "tags": [*about.tags, *([] if prune is None else _prune_tags(prune))],
        "settings": [*map(list, about.settings), *([] if prune is None else _prune_settings(prune))],
        "encoded": list(selection.encoded),
        "left_dense": list(selection.skipped),
        "skipped_modules": list(selection.listed),
        "sampled": quantize.method == "bnb" and prune is None,  # whether errors are those of a part of the weights
    }


def _prune_tags(prune: Prune) -> list[str]:
    return ["pruned", "sparsity", prune.method, *(["owl"] if prune.owl else [])]


def _prune_settings(prune: Prune) -> list[list[str]]:
    rows = [
        ["Pruned by", f"{NAMES[prune.method]}{', the variant' if prune.variant else ''}"],
        ["Sparsity asked for", prune.requested],
        ["Compared", prune.compared],
        ["Scope", prune.scope],
    ]
    if prune.owl:
        differ = f"by {200 * prune.range:g} points at the most, by their outliers (over {prune.outlier:g} means)"
        rows.append(["Layers differ", differ])
    return rows


def _settings(plan: Plan) -> list[list[str]]:
    turned = sum(u.reordered for u in plan.units)
    decoded = sum(u.source.scales is not None for u in plan.units)
    rows = [
        ["Tensors", f"{len(plan.units):,}"],
        ["Tensors whose rows were put in the other rotary order", f"{turned:,}"],
    ]
    if plan.recipe.convert is None:
        rows = rows[:1]
    if decoded:
        rows.append(["Tensors decoded from FP8 to bfloat16", f"{decoded:,}"])
    if (convert := plan.recipe.convert) is not None and convert.profile != "current":
        rows.append(["Profile", convert.profile])
    return rows


def finish_manifest(draft: Mapping[str, Any], measured: Measured, files: Iterable[PlannedFile]) -> dict[str, Any]:
    """The whole manifest: the draft with errors and checksums. `files` are the planned ones; manifest and card, which
    cannot hold their own checksums, are passed over."""
    manifest = {k: v for k, v in draft.items() if k != "kinds"}
    calibrated = "calibration" in draft
    rows = defaultdict(list)
    for name, kind in draft["kinds"].items():
        rows[kind].append(name)
    shapes = {row["name"]: row["shape"] for row in draft["tensors"]}
    manifest["errors"] = [
        _error_row(kind, names, shapes, measured, calibrated=calibrated) for kind, names in rows.items()
    ]
    manifest["tensors"] = [
        {**row, **_measured(measured.reports[row["name"]], row, calibrated=calibrated)}
        if row["name"] in measured.reports
        else row
        for row in draft["tensors"]
    ]
    if "pruning" in draft:
        pruned = {row["name"] for row in draft["tensors"] if row.get("pruned")}
        manifest["sparsity"] = [
            _sparsity_row(kind, [n for n in names if n in pruned], shapes, measured)
            for kind, names in rows.items()
            if not pruned.isdisjoint(names)
        ]
    if calibrated:
        fallbacks = sum(r.fallback for r in measured.reports.values())
        found = {"excluded": measured.excluded, "fallbacks": fallbacks, "compute": measured.compute}
        manifest["calibration"] = {**draft["calibration"], **found}
    if draft["recipe"]["allow_nonfinite"]:
        manifest["nonfinite"] = min(sum(r.nonfinite for r in measured.reports.values()), _WIDEST_COUNT)
    source = dict(draft["source"])
    source["files"] = [{**row, "sha256": measured.sources[row["name"]]} for row in source["files"]]
    manifest["source"] = source
    manifest["files"] = [
        {"name": f.name, "bytes": f.nbytes, "sha256": measured.outputs[f.name]}
        for f in files
        if f.role not in (MANIFEST, CARD)
    ]
    return manifest


def _sparsity_row(kind: str, names: list[str], shapes: Mapping[str, list[int]], measured: Measured) -> dict[str, Any]:
    reports = [measured.reports[n] for n in names]
    return {
        "kind": kind,
        "tensors": len(names),
        "weights": sum(math.prod(shapes[n]) for n in names),
        **{k: min(sum(getattr(r, k) for r in reports), _WIDEST_COUNT) for k in ("pruned", "zeros", "source_zeros")},
    }


def _measured(report: Report, tensor: Mapping[str, Any], *, calibrated: bool) -> dict[str, Any]:
    """What is noted of one tensor."""
    row: dict[str, Any] = {"error": _short(report.relative_error)}
    if calibrated:
        known = report.output_error
        row |= {"output_error": None if known is None else _short(known), "fallback": report.fallback}
    if tensor.get("pruned"):
        row |= {"masked": report.pruned, "zeros": report.zeros}
    return row


def _error_row(
    kind: str, names: list[str], shapes: Mapping[str, list[int]], measured: Measured, *, calibrated: bool
) -> dict[str, Any]:
    reports = [measured.reports[n] for n in names]
    error, norm = (math.fsum(x) for x in zip(*((r.squared_error, r.squared_norm) for r in reports), strict=True))
    return {
        "kind": kind,
        "tensors": len(names),
        "weights": sum(math.prod(shapes[n]) for n in names),
        "mean": _short(math.sqrt(error / norm) if norm > 0 else 0.0),
        "worst": _short(max(r.relative_error for r in reports)),
        **({"output": _mean([r.output_error for r in reports if r.output_error is not None])} if calibrated else {}),
    }


def _mean(values: list[float]) -> float | None:
    return _short(math.fsum(values) / len(values)) if values else None


def _tensor_row(unit: Unit) -> dict[str, Any]:
    """A source tensor as the manifest lists it: a weight [out, in] if it was quantized, else as it is stored."""
    shape = [unit.weight.rows, unit.weight.columns] if unit.quantized and unit.weight else list(unit.source.shape)
    row = {"name": unit.name, "dtype": unit.source.dtype, "shape": shape, "quantized": unit.quantized}
    if unit.pruned:
        row["pruned"] = True
    if not unit.quantized and unit.outputs[0].name != unit.name:
        row["written_as"] = unit.outputs[0].name
    return {**row, "transposed": True} if unit.linear is not None and unit.linear.transposed else row


def _short(x: float) -> float:
    return float(f"{x:.6g}")


def manifest_text(manifest: Mapping[str, Any], nbytes: int | None = None) -> bytes:
    """JSON, padded with spaces before its last newline to the size that the plan gave it."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False).encode()
    if nbytes is not None and len(text) >= nbytes:
        raise RunError(f"the manifest has {len(text) + 1} bytes, the plan says {nbytes}: a fault of quantkit")
    return text.ljust((nbytes or 0) - 1) + b"\n"


def render_from_manifest(
    manifest: Mapping[str, Any],
    config: Mapping[str, Any],
    evaluated: tuple[Evaluation, ...] = (),
    tasks: tuple[TaskScore, ...] = (),
    *,
    plotted: bool = False,
) -> str:
    """README.md from the manifest, config.json and what was evaluated; plotted: there is a plot of layers' errors."""
    source, method, result, parent = (manifest[k] for k in ("source", "method", "result", "parent"))
    card = manifest["recipe"]["card"]
    facts = CardFacts(
        name=_titled(source["name"].rsplit("/", 1)[-1], method["slug"]),
        layout=result["layout"],
        checked=manifest["recipe"].get("convert", {}).get("check", False),
        tensors=len(manifest["tensors"]),
        decoded=method.get("decoded", 0),
        context=result.get("context"),
        old_reference=manifest["recipe"].get("convert", {}).get("profile") == "one-file-ref-2023",
        base_model=source["base_model"],
        source_name=source["name"],
        revision=source["revision"],
        license=card["license"],
        quantized_by=card["quantized_by"],
        language=card.get("language"),
        parent=ParentCard(parent["metadata"], parent["body"], parent["origin"], tuple(parent["problems"])),
        method_title=method["title"],
        bits=method["bits"],
        tags=tuple(method["tags"]),
        settings=tuple((a, b) for a, b in method["settings"]),
        source_bytes=source["bytes"],
        output_bytes=result["weight_bytes"],
        bits_per_weight=result["bits_per_weight"],
        model_bits_per_weight=result["model_bits_per_weight"],
        parameters=source["parameters"],
        architecture=source["architecture"],
        kept=tuple((k, n) for k, n in result["kept"]),
        errors=tuple(ErrorRow(**row) for row in manifest["errors"]),
        error_note=ERROR_NOTE if method["sampled"] else "",
        calibration=manifest.get("calibration"),
        pruning=_pruning(manifest),
        solved=_solved(manifest["recipe"]),
        allocation=manifest.get("allocation"),
        evaluated=evaluated,
        tasks=tasks,
        plotted=plotted,
        nonfinite=(("pruned tensors" if method["bits"] is None else "quantized tensors", manifest["nonfinite"]),)
        if "nonfinite" in manifest
        else (),
        files=tuple(FileRow(row["name"], row["bytes"], row["sha256"]) for row in manifest["files"]),
        loader=result["loader"],
        chat=result["chat"],
        bos=result.get("bos", False),
        warnings=tuple(result["warnings"]),
        config=config,
        stripped=tuple(source["removed_from_config"]),
        command=command_of(manifest),
        recipe_yaml=manifest["recipe_yaml"],
        versions=(("quantkit", manifest["quantkit"]), *manifest["versions"].items()),
        plan_hash=manifest["plan_hash"],
    )
    return render_card(facts)


def _solved(recipe: Mapping[str, Any]) -> bool:
    """Whether something was done about the errors of outputs, so that they were measured."""
    quantize = recipe.get("quantize")
    method = find_method(quantize["method"], quantize["bits"], mixed="mixes" in quantize) if quantize else None
    return (method is not None and method.needs == "hessian") or recipe.get("prune", {}).get("method") == "sparsegpt"


def _pruning(manifest: Mapping[str, Any]) -> Pruning | None:
    if "pruning" not in manifest:
        return None
    rows = tuple(SparsityRow(**row) for row in manifest["sparsity"])
    return Pruning(**manifest["pruning"], rows=rows)


def _titled(name: str, slug: str) -> str:
    return name if name.endswith(f"-{slug}") else f"{name}-{slug}"


def _kind(name: str) -> str:
    """A tensor's name without the indices of layers and experts."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def _has_chat_template(checkpoint: Checkpoint) -> bool:
    if any(name.startswith("chat_template") for name, _ in checkpoint.side_files):
        return True
    path = checkpoint.folder / "tokenizer_config.json"
    return path.exists() and b'"chat_template"' in path.read_bytes()


def _texts_begin_with_bos(plan: Plan, checkpoint: Checkpoint) -> bool:
    """Whether the tokenizer puts it before a text, as far as a calibration text has shown."""
    bos = checkpoint.config.get("bos_token_id")
    return plan.tokens is not None and type(bos) is int and bool((plan.tokens.ids[:, 0] == bos).all())


def _plain(value: Any) -> Any:
    """Metadata as JSON can hold it: YAML knows dates."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
