"""Options that are keys of a recipe, and the recipe that they make."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from quantkit.cli_options import Bits, options

if TYPE_CHECKING:
    from quantkit.recipe import Recipe

CALIBRATION = (
    click.option("--calib", metavar="TEXT", help="FILE.txt, .jsonl, .parquet or a Hub dataset to calibrate on."),
    click.option("--calib-samples", type=int, help="Rows of calibration text.  [default: 64]"),
    click.option("--calib-length", type=int, metavar="TOKENS", help="Tokens a row.  [default: 1024, or the context]"),
    click.option("--calib-seed", type=int, help="Draw the rows; otherwise they are taken from the beginning."),
)
# Each is a key of the recipe.
quantize_options = options(
    click.option(
        "--bits",
        type=Bits(),
        help="Bits per weight: 4, 8; gptq, rtn: also 2, 3; any other is mixed.  [default: 4]",
    ),
    click.option("--method", help="bnb; gptq, exl2 (calibrated); rtn (rounding, in gptq's format).  [default: bnb]"),
    click.option("--quant-type", help="4-bit code table, nf4 or fp4.  [default: nf4]"),
    click.option(
        "--double-quant/--no-double-quant", default=None, help="Block maxima in 8 bits, or not.  [default: yes]"
    ),
    click.option("--group-size", type=int, help="gptq, rtn: weights that share a scale; 32, 64, 128 or -1 (a row)."),
    click.option("--sym/--no-sym", default=None, help="gptq, rtn: no zero points, or with.  [default: sym]"),
    click.option("--act-order", help="gptq: static, group (desc_act) or none.  [default: static]"),
    click.option("--effort", help="gptq, exl2: low, default or high.  [default: default]"),
    click.option("--damp", type=float, help="gptq, exl2: part of the mean diagonal added to it.  [default: 0.03]"),
    click.option(
        "--measurement", metavar="FILE", help="Of `quantkit measure`, for mixed bits.  [default: measured first]"
    ),
    click.option("--head-bits", type=int, help="exl2: of a head with a matrix of its own; 16: dense.  [default: 6]"),
    click.option("--min-bits", type=float, help="Mixed bits: those of any linear, at the least."),
    click.option("--max-bits", type=float, help="Mixed bits: those of any linear, at the most."),
    click.option("--checkpoint-format", help="gptq, rtn: gptq or gptq_v2.  [default: gptq]"),
    click.option("--format", help="gptq, rtn: gptq or compressed-tensors.  [default: gptq]"),
    *CALIBRATION,
    click.option("--skip", multiple=True, metavar="PATTERN", help="Leave matching layers as they are. Repeatable."),
    click.option("--device", help="Where to compute: cpu or cuda.  [default: cpu]"),
    click.option("--allow-nonfinite", is_flag=True, default=None, help="Quantize NaN and infinities as zero."),
)
prune_options = options(
    click.option("--sparsity", type=float, metavar="PART", help="Part of each linear's weights to prune: 0.02 is 2 %."),
    click.option("--pattern", metavar="N:M", help="Prune N of every M weights in a row: 2:4, 4:8."),
    click.option("--method", help="wanda, sparsegpt (both calibrated) or magnitude.  [default: wanda]"),
    click.option(
        "--targets", multiple=True, metavar="PATTERN", help="attention, mlp, or names. Repeatable.  [default: all]"
    ),
    click.option("--skip", multiple=True, metavar="PATTERN", help="Leave matching layers as they are. Repeatable."),
    click.option(
        "--variant", is_flag=True, default=None, help="wanda: rows differ, each loses one part of its scores."
    ),
    click.option("--per-row", is_flag=True, default=None, help="magnitude: compare within rows, not the whole matrix."),
    click.option("--damp", type=float, help="sparsegpt: part of the mean diagonal added.  [default: 0.01]"),
    click.option("--owl", is_flag=True, default=None, help="Layers with more outliers keep more; one more pass."),
    *CALIBRATION,
    click.option("--device", help="Where to compute: cpu or cuda.  [default: cpu]"),
    click.option("--allow-nonfinite", is_flag=True, default=None, help="Take NaN and infinities for zero."),
)
convert_options = options(
    click.option("--to", type=click.Choice(["hf", "mistral"]), help="Layout to write."),
    click.option(
        "--profile",
        type=click.Choice(["current", "one-file-ref-2023"]),
        help="For whom a mistral folder is.  [default: current]",
    ),
    click.option(
        "--weights-format",
        type=click.Choice(["safetensors", "pth"]),
        help="Of a mistral folder.  [default: safetensors]",
    ),
    click.option("--tokenizer/--no-tokenizer", default=None, help="Bring the tokenizer along, or not.  [default: yes]"),
    click.option("--check/--no-check", default=None, help="Map back and compare what was written.  [default: yes]"),
)
common_options = options(
    click.option(
        "--shard-size",
        "--max-shard-size",
        metavar="SIZE",
        help="Largest weight file.  [default: 5GB; mistral: no limit]",
    ),
    click.option("--max-memory", metavar="SIZE", help="RAM not to exceed; refused beforehand if too little."),
    click.option("--threads", type=int, help="Threads that work on weights.  [default: all cores]"),
    click.option("--revision", help="Branch, tag or commit of a Hub id."),
    click.option("--rope-theta", type=float, help="Base of the rotary embedding, if params.json has none."),
    click.option("--context", type=int, metavar="TOKENS", help="Longest sequence, if params.json does not say it."),
    click.option("--text-only", is_flag=True, default=None, help="Leave the vision part out."),
    click.option(
        "--language",
        type=click.Choice(["en", "fr", "ja"]),
        help="Of the card's summary, before its English text.  [default: the parent's, if it names one alone]",
    ),
    click.option("--recipe", type=click.Path(path_type=Path), help="YAML file with these settings."),
    click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Set any key of the recipe."),
)
source_argument = click.argument("source", required=False, metavar="SRC")
job_options = options(
    click.option("-o", "--output", "out", metavar="OUT", help="Folder to write."),
    click.option("--force", is_flag=True, help="Replace what an earlier run left in OUT."),
    click.option("--dry-run", is_flag=True, help="Only plan."),
    click.option("--part", metavar="I/N", help="Only the I-th of N parts; `quantkit finish` when all are done."),
)


def recipe_of(options: dict[str, Any], verb: Literal["quantize", "convert", "prune"] | None = None) -> Recipe:
    """What a command's options, by the names of its parameters, its recipe file and its --set make together."""
    from quantkit.recipe import load_recipe

    keys = {
        "source": "source",
        "revision": "revision",
        "out": "output",
        "method": "quantize.method",
        "bits": "quantize.bits",
        "measurement": "quantize.measurement",
        "head_bits": "quantize.head_bits",
        "min_bits": "quantize.min_bits",
        "max_bits": "quantize.max_bits",
        "quant_type": "quantize.quant_type",
        "double_quant": "quantize.double_quant",
        "skip": "quantize.skip",
        "group_size": "quantize.group_size",
        "sym": "quantize.sym",
        "act_order": "quantize.act_order",
        "effort": "quantize.effort",
        "damp": "quantize.damp",
        "checkpoint_format": "quantize.checkpoint_format",
        "format": "quantize.format",
        "calib": "calibration.text",
        "calib_samples": "calibration.samples",
        "calib_length": "calibration.length",
        "calib_seed": "calibration.seed",
        "to": "convert.to",
        "profile": "convert.profile",
        "weights_format": "convert.weights_format",
        "tokenizer": "convert.tokenizer",
        "check": "convert.check",
        "rope_theta": "native.rope_theta",
        "context": "native.context",
        "text_only": "native.text_only",
        "language": "card.language",
        "shard_size": "shard_size",
        "allow_nonfinite": "allow_nonfinite",
        "max_memory": "resources.max_memory",
        "threads": "resources.threads",
        "device": "resources.device",
    }
    if verb == "prune":
        own = ("method", "sparsity", "pattern", "targets", "skip", "variant", "per_row", "damp", "owl")
        keys |= {name: f"prune.{name}" for name in own}
    for name in ("skip", "targets"):
        options[name] = options.get(name) or None
    given = {dotted: options.get(name) for name, dotted in keys.items()}
    return load_recipe(options.get("recipe"), options.get("assignments", ()), given, verb=verb)
