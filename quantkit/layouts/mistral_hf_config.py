"""config.json of the classes that compute what Mistral's own layout can say: read into Facts, written from them.

What is read is what transformers 5.23 computes, its class defaults included. What is written leaves no fact to a
default and is read alike by both generations: rope_theta and rope_parameters, dtype and torch_dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from quantkit.checkpoint.header import quote
from quantkit.errors import SourceError
from quantkit.layouts.hf import CONFIG
from quantkit.layouts.mistral_facts import (
    COMMON,
    MOE,
    QUERY_BETA,
    THETA,
    TIED,
    YARN,
    Facts,
    Fields,
    Kind,
    Windows,
    Yarn,
    check,
    hf_of,
    shortest_pattern,
)

FULL, SLIDING = "full_attention", "sliding_attention"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
VISION_TYPES = ("mistral3", "pixtral", "llava")

# The classes of transformers 5.23: the architecture of each model_type, and what counts where config.json is silent.
# The sizes that make a model (width, depth, heads, vocabulary) are no matter of defaults: without them a file
# is broken.
_MISTRAL = {"num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": 4096,
            "max_position_embeddings": 131072}  # fmt: skip
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("MistralForCausalLM", _MISTRAL),
    "mixtral": ("MixtralForCausalLM", {**_MISTRAL, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None,
                                       "num_local_experts": 8, "num_experts_per_tok": 2}),
    "ministral": ("MinistralForCausalLM", _MISTRAL),
    "ministral3": ("Ministral3ForCausalLM", {**_MISTRAL, "rms_norm_eps": 1e-5, "sliding_window": None, "head_dim": 128,
                                             "max_position_embeddings": 262144}),
    "llama": ("LlamaForCausalLM", {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": None,
                                   "max_position_embeddings": 2048}),
}  # fmt: skip
# Ministral3Config's, where rope_parameters is absent.
MINISTRAL3_ROPE = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip

_NAMES = {**{row.fact: row.hf for row in (*COMMON, *MOE)}, **{row.fact: f"rope_parameters.{row.hf}" for row in YARN}}
# Keys that change the computation, or hold weights that Mistral's layout has no place for, at any other value.
_PLAIN = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0,
          "per_layer_config": None}  # fmt: skip
# What rope_parameters may hold; max_position_embeddings stands in published files and is read by nothing.
_ROPE_KEYS = ("rope_type", "type", THETA.hf, *(row.hf for row in YARN), "attention_factor", "mscale", "mscale_all_dim",
              "truncate", "partial_rotary_factor", QUERY_BETA.hf, "max_position_embeddings")  # fmt: skip
_Said = Callable[[str, Kind], Any]  # a key's value; where it is absent, the default of the class, with a note


# --- config.json → facts ----------------------------------------------------------------------------------------------


def facts_of_config(config: Mapping[str, Any], *, where: str, text_only: bool = False) -> tuple[Facts, list[str]]:
    """The facts in the object of a config.json, and sentences about the defaults that counted.

    For model_type mistral, mixtral, ministral and ministral3, and llama where it is the same computation. `text_only`
    takes the language model out of a vision model's configuration. Raises SourceError, naming the key.
    """
    notes: list[str] = []
    fields = _text_part(Fields(config, where, CONFIG), text_only, notes)
    model_type = _model_type(fields)
    defaults = CLASSES[model_type][1]
    for key, plain in _PLAIN.items():
        value = fields.table.get(key)
        if value is not None and value != plain:
            raise fields.fail(
                key, f"is {quote(value)}, which Mistral's own layout cannot say", "such a model stays as it is"
            )

    def said(key: str, kind: Kind) -> Any:
        # Absent is not null: absent asks the class for its default, null means none, or "from the other sizes".
        if key in fields.table or defaults.get(key) is None:
            return fields.value(key, kind)
        notes.append(f"{fields.path}{key} is not in {CONFIG}: {defaults[key]} is what {model_type} means by that")
        return defaults[key]

    values = {row.fact: said(row.hf, row.kind) for row in COMMON}
    for row in COMMON:
        if values[row.fact] is None and row.fact not in ("n_kv_heads", "head_dim"):
            raise fields.missing(row.hf)
    values["n_kv_heads"] = values["n_kv_heads"] or values["n_heads"]
    values["head_dim"] = values["head_dim"] or values["dim"] // values["n_heads"]  # rounded down, as transformers does
    if not values["head_dim"]:
        raise fields.fail("num_attention_heads", f"is {values['n_heads']}, more than hidden_size", "mend the number")
    windows = _read_windows(fields, model_type, values["n_layers"], said)
    theta, yarn = _read_rope(fields, model_type, said, notes)
    moe = _read_moe(fields, said) if model_type == "mixtral" else {}
    tied = bool(fields.flag(TIED.hf))
    return check(Facts(**values, **moe, rope_theta=theta, windows=windows, tied=tied, yarn=yarn), fields, _NAMES), notes


def _text_part(fields: Fields, text_only: bool, notes: list[str]) -> Fields:
    """The table that describes the language model: the whole of config.json, or its text_config."""
    model_type = fields.text("model_type")
    if model_type not in VISION_TYPES and fields.table.get("vision_config") is None:
        return fields
    if not text_only:
        raise SourceError(
            f"the model reads images (model_type {quote(model_type)}), which Mistral's text layout has no place for",
            where=fields.where, hint="--text-only takes the language model alone",
        )  # fmt: skip
    text = fields.below("text_config")
    if text is None:
        raise fields.missing("text_config", "without it there is no language model to take")
    notes.append("the image encoder was left aside: only the language model is taken")
    whole = fields.flag(TIED.hf)
    if text.flag(TIED.hf) is None and whole is not None:
        text.table = {**text.table, TIED.hf: whole}
    return text


def _model_type(fields: Fields) -> str:
    model_type = fields.text("model_type")
    if model_type in CLASSES:
        return model_type
    said = "is missing" if model_type is None else f"is {quote(model_type)}"
    raise fields.fail("model_type", f"{said}: Mistral's own layout has no such model", f"it has {', '.join(CLASSES)}")


def _read_windows(fields: Fields, model_type: str, n_layers: int, said: _Said) -> Windows:
    window: int | None = said("sliding_window", "size")
    if model_type == "llama" and window is not None:
        raise fields.fail("sliding_window", f"is {window}, which a llama model ignores", "set it to null")
    if window is not None and fields.flag("use_sliding_window") is False:
        raise fields.fail(
            "use_sliding_window", f"is false and sliding_window is {window}: transformers uses the window all the same",
            "set sliding_window to null, or take use_sliding_window out",
        )  # fmt: skip
    uniform = () if window is None else (window,)
    types = fields.list("layer_types")
    if types is None:
        return uniform
    odd = [name for name in types if name not in (FULL, SLIDING)]
    if odd or len(types) != n_layers:
        problem = f"has {quote(odd[0])}" if odd else f"has {len(types)} entries for {n_layers} layers"
        raise fields.fail("layer_types", problem, f"one of {FULL} and {SLIDING} for each layer")
    if SLIDING in types and window is None:
        raise fields.fail("layer_types", f"has {SLIDING}, but there is no sliding_window", "say how many tokens it has")
    pattern = shortest_pattern([window if name == SLIDING else None for name in types])
    if model_type != "ministral" and pattern != uniform:
        raise fields.fail(
            "layer_types", f"and sliding_window disagree: {model_type} has one window ({window}) for every layer",
            "windows that differ are model_type ministral",
        )  # fmt: skip
    return pattern


def _read_moe(fields: Fields, said: _Said) -> dict[str, int]:
    experts, alias = fields.size("num_local_experts"), fields.size("num_experts")
    if None not in (experts, alias) and experts != alias:
        raise fields.fail(
            "num_experts", f"is {alias} and num_local_experts is {experts}", "they are two names of one thing: keep one"
        )
    if alias is not None:
        fields.table = {**fields.table, "num_local_experts": alias}  # as transformers does; `said` looks there too
    values = {row.fact: said(row.hf, row.kind) for row in MOE}
    for row in MOE:
        if values[row.fact] is None:
            raise fields.missing(row.hf)
    return values


def _read_rope(fields: Fields, model_type: str, said: _Said, notes: list[str]) -> tuple[float, Yarn | None]:
    """transformers 5 goes by rope_scaling before rope_parameters, and by a theta in them before the one outside;
    transformers 4 reads no rope_parameters. So a file that says two things is refused."""
    tables = [t for t in (fields.below("rope_parameters"), fields.below("rope_scaling")) if t is not None]
    if not tables and model_type == "ministral3":
        notes.append(f"rope_parameters is not in {CONFIG}: the yarn of Ministral 3 is what ministral3 means by that")
        tables = [Fields(MINISTRAL3_ROPE, fields.where, fields.file, "rope_parameters.")]
    path = tables[0].path if tables else ""
    rope = Fields(_one_rope(tables), fields.where, fields.file, path)
    inner, outer = rope.number(THETA.hf), fields.number(THETA.hf)
    if inner is not None and outer is not None and inner != outer:
        raise fields.fail(
            THETA.hf, f"is {outer:g} and {inner:g} in rope_parameters", "transformers 4 reads the one and 5 the other"
        )
    theta = said(THETA.hf, "number") if inner is None else inner
    if theta is None:
        raise fields.missing(THETA.hf)
    original = "original_max_position_embeddings"
    if (outside := fields.size(original)) is not None:  # goes before the one in the table
        if rope.table.get(original, outside) != outside:
            raise rope.fail(original, f"is not the {outside} outside of {path[:-1]}", "they must be equal")
        rope.table = {**rope.table, original: outside}
    return theta, _read_yarn(rope, model_type)


def _one_rope(tables: list[Fields]) -> dict[str, Any]:
    """What the tables say together: rope_type instead of type, no nulls; only rope_theta may be left to another."""
    found: list[dict[str, Any]] = []
    for table in tables:
        for key in table.table:
            if key not in _ROPE_KEYS:
                raise table.fail(key, "is nothing that Mistral's own layout can say", "such a model stays as it is")
        rope = {key: value for key, value in table.table.items() if value is not None}
        if not rope:
            continue
        kind = rope.setdefault("rope_type", rope.get("type", "default"))
        if rope.pop("type", kind) != kind:
            raise table.fail("type", f"is not what rope_type is, {quote(kind)}", "they are two names: keep one")
        found.append(rope)
    merged: dict[str, Any] = {}
    for rope in found:
        merged = {**rope, **merged}
    for key in sorted(merged, key="rope_type".__ne__) if len(found) > 1 else ():
        if any(rope.get(key) != merged[key] and (key in rope or key != THETA.hf) for rope in found):
            raise SourceError(
                f"rope_parameters and rope_scaling differ in {key}", where=tables[0].where,
                hint="which one counts depends on the reader: keep one",
            )  # fmt: skip
    return merged


def _read_yarn(rope: Fields, model_type: str) -> Yarn | None:
    rope_type = rope.text("rope_type") or "default"
    beta = rope.number(QUERY_BETA.hf, zero=True) or None
    if beta and model_type != "ministral3":
        raise rope.fail(
            QUERY_BETA.hf, f"means nothing to {model_type}", "it is model_type ministral3 that scales queries"
        )
    if rope.number("partial_rotary_factor") not in (None, 1.0):
        raise rope.fail("partial_rotary_factor", "is not 1: Mistral turns whole heads", "such a model stays as it is")
    if rope_type == "default":
        if beta:
            raise rope.fail(QUERY_BETA.hf, "stands without yarn", "no released model is so; compare with the original")
        return None
    if rope_type != "yarn" or model_type == "llama":
        raise rope.fail(
            "rope_type", f"is {quote(rope_type)}, which Mistral's own layout cannot say", "such a model stays as it is"
        )
    if rope.flag("truncate") is False:
        raise rope.fail("truncate", "is false, which Mistral's yarn cannot say", "such a model stays as it is")
    table = {"beta_fast": 32.0, "beta_slow": 1.0, **rope.table}  # transformers' defaults
    rope = Fields(table, rope.where, rope.file, rope.path)
    values = {row.fact: rope.need(row.hf, row.kind) for row in YARN}
    return Yarn(**values, apply_scale=_scales(rope, values["factor"]), query_beta=beta)


def _scales(rope: Fields, factor: float) -> bool:
    """Whether queries and keys grow by the usual 1 + 0.1·ln(factor), or not at all; SourceError for anything else."""
    factor = max(factor, 1.0)  # below that the check of the facts refuses it
    usual = 1 + 0.1 * math.log(factor)
    growth = rope.number("attention_factor")
    if growth is None:
        up, down = rope.number("mscale", zero=True), rope.number("mscale_all_dim", zero=True)
        if not (up and down):
            return True
        growth = (1 + 0.1 * up * math.log(factor)) / (1 + 0.1 * down * math.log(factor))
    if math.isclose(growth, 1):
        return False
    if math.isclose(growth, usual):
        return True
    raise rope.fail(
        "attention_factor", f"comes to {growth:g}, and Mistral's yarn knows 1 and {usual:g}",
        "compare attention_factor, mscale and mscale_all_dim with the original file",
    )  # fmt: skip


def context_of_config(config: Mapping[str, Any], *, where: str) -> int:
    """max_position_embeddings in tokens, or the default of the class; SourceError if it is no number of tokens."""
    fields = Fields(config, where, CONFIG)
    text = fields.below("text_config")
    fields = text or fields
    size: int = fields.size("max_position_embeddings") or CLASSES[_model_type(fields)][1]["max_position_embeddings"]
    return size


# --- facts → config.json ----------------------------------------------------------------------------------------------


def config_of_facts(facts: Facts, *, dtype: str | None, context: int) -> dict[str, Any]:
    """The whole object for a config.json, keys sorted as transformers sorts them.

    dtype is the weights', as safetensors spells it (BF16, F16, F32); None leaves it out. context is the longest
    sequence in tokens. Raises SourceError for a model that is none of the classes.
    """
    model_type = _class_for(facts)
    if dtype is not None and dtype not in DTYPES:
        raise SourceError(
            f"weights in {quote(dtype)} are none that config.json can announce", where=CONFIG,
            hint=f"{', '.join(DTYPES)} can be converted",
        )  # fmt: skip
    config: dict[str, Any] = {
        **hf_of((*COMMON, THETA, TIED), facts),
        "architectures": [CLASSES[model_type][0]],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": context,
        "model_type": model_type,
        "rope_parameters": {"rope_type": "default", **hf_of((THETA,), facts)},
        "sliding_window": next((size for size in facts.windows if size is not None), None),
        "use_cache": True,
    }
    if dtype is not None:
        config |= {"dtype": DTYPES[dtype], "torch_dtype": DTYPES[dtype]}
    if model_type == "mixtral":
        config |= {**hf_of(MOE, facts), "output_router_logits": False, "router_aux_loss_coef": 0.02}
    if model_type == "ministral":
        config["layer_types"] = [FULL if size is None else SLIDING for size in facts.layer_windows]
    if model_type == "ministral3":
        config["pad_token_id"] = None  # its class means 11, which a smaller vocabulary does not have
    if facts.yarn:
        rope = config["rope_parameters"] | {"rope_type": "yarn"} | hf_of(YARN, facts.yarn)
        if not facts.yarn.apply_scale:  # said twice: some readers know only the one, some only the others
            rope |= {"attention_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
        if facts.yarn.query_beta is not None:
            rope |= hf_of((QUERY_BETA,), facts.yarn)
        else:
            config["rope_scaling"] = dict(rope)  # transformers 4 looks here; it has no ministral3
        config["rope_parameters"] = rope
    return dict(sorted(config.items()))


def _class_for(facts: Facts) -> str:
    """The model_type that computes just this. yarn alone needs no ministral3, whose code fails without a query_beta."""
    wanted = {
        "mixtral": bool(facts.experts),
        "ministral": facts.mixed_windows,
        "ministral3": facts.yarn is not None and facts.yarn.query_beta is not None,
    }
    found = [model_type for model_type, applies in wanted.items() if applies]
    if len(found) > 1:
        words = {"mixtral": "experts", "ministral": "windows that differ", "ministral3": "scaled queries"}
        raise SourceError(
            f"{words[found[0]]} and {words[found[1]]} in one model: transformers has no class for that", where=CONFIG,
            hint="such a model stays in Mistral's own layout",
        )  # fmt: skip
    return found[0] if found else "mistral"
