"""params.json, the configuration of Mistral's own layout, of every generation: read into Facts, written from them.

The keys are those of `TransformerArgs` in mistral_inference 1.6.0, and those that only vLLM reads: max_seq_len,
max_position_embeddings, tied_embeddings, yarn, llama_4_scaling, quantization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from quantkit.checkpoint.header import quote
from quantkit.errors import SourceError
from quantkit.layouts.mistral_facts import (
    COMMON,
    MOE,
    QUERY_BETA,
    THETA,
    TIED,
    YARN,
    Facts,
    Fields,
    Windows,
    Yarn,
    check,
    native_of,
    shortest_pattern,
)

PARAMS = "params.json"
Profile = Literal["current", "one-file-ref-2023"]

THETA_2023 = 1e4  # a constant of the code of September 2023, whose params.json had no such key
THETA_DEFAULT = 1e6  # `args.rope_theta or 1000000.0`, from May 2024 on
POSITIONS_2023 = 128_000  # rows of the table of rotations in one_file_ref.py

# Every key that params.json may have, by what becomes of it here. One that stands nowhere is refused: it may be a
# slip, or change the computation.
FACT_KEYS = (*(row.native for row in COMMON), THETA.native, TIED.native,
             "sliding_window", "_sliding_window", "moe", "yarn", "llama_4_scaling")  # fmt: skip
CONTEXT_KEYS = ("max_position_embeddings", "max_seq_len")
ENCODER_KEYS = ("vision_encoder", "multimodal")
QUANTIZATION_KEYS = ("quantization", "quantization_config")  # of the weights' storage; see native_quantization
NEUTRAL_KEYS = {"model_type": "transformer", "activation": "silu", "use_biases": False}  # ignored at this one value
IGNORED_KEYS = ("max_batch_size", "lora", "dtype", "torch_dtype")  # of one runtime, or said by the weights
KNOWN_KEYS = (*FACT_KEYS, *CONTEXT_KEYS, *ENCODER_KEYS, *QUANTIZATION_KEYS, *NEUTRAL_KEYS, *IGNORED_KEYS)

_ALIASES = {row.hf: row.native for row in (*COMMON, THETA, TIED)}
# Other models and layouts whose configuration also lies in a params.json.
_META_KEYS = ("multiple_of", "ffn_dim_multiplier", "use_scaled_rope")
_LATENT_KEYS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_NAMES = {
    **{row.fact: row.native for row in COMMON},
    **{row.fact: f"moe.{row.native}" for row in MOE},
    **{row.fact: f"yarn.{row.native}" for row in YARN},
}


def facts_of_params(
    params: Mapping[str, Any], *, where: str, rope_theta: float | None = None, text_only: bool = False
) -> tuple[Facts, list[str]]:
    """The facts in the object of a params.json, and sentences for the user about what had to be assumed.

    `where` is named in errors. `rope_theta` is the user's word for a file that has none; a file that has another is an
    error. `text_only` leaves an image or audio encoder aside. Raises SourceError, naming the key.
    """
    fields = Fields(params, where, PARAMS)
    notes: list[str] = []
    _refuse_others(fields)
    encoders = [key for key in ENCODER_KEYS if params.get(key) is not None]
    if encoders and not text_only:
        raise SourceError(
            f"the model has an image or audio encoder ({encoders[0]}), which has no place in a text model",
            where=where, hint="--text-only takes the language model alone",
        )  # fmt: skip
    if encoders:
        notes.append(f"{encoders[0]} was left aside: only the language model is taken")

    values = {row.fact: fields.value(row.native, row.kind) for row in COMMON}
    if values["hidden_dim"] is None:
        raise fields.missing(
            "hidden_dim",
            "without it and with multiple_of this would be Meta's layout of Llama; fetch the original file",
        )
    for fact in ("dim", "n_layers", "n_heads", "vocab_size", "norm_eps"):
        if values[fact] is None:
            raise fields.missing(fact)
    if values["n_kv_heads"] is None:
        values["n_kv_heads"] = values["n_heads"]
        notes.append(f"n_kv_heads is not in {PARAMS}: taken to be n_heads, {values['n_heads']}")
    if values["head_dim"] is None:
        if values["dim"] % values["n_heads"]:
            raise fields.missing("head_dim", "n_heads does not divide dim, so it cannot be guessed: add the key")
        values["head_dim"] = values["dim"] // values["n_heads"]
        notes.append(f"head_dim is not in {PARAMS}: taken to be dim / n_heads, {values['head_dim']}")

    windows = _read_windows(fields, values["n_layers"])
    values["rope_theta"] = _read_theta(fields, rope_theta, notes)
    values["tied"] = bool(fields.flag(TIED.native))
    values |= _read_moe(fields)
    facts = Facts(**values, windows=windows, yarn=_read_yarn(fields, notes))
    return check(facts, fields, _NAMES), notes


def _refuse_others(fields: Fields) -> None:
    params = fields.table
    meta = [key for key in _META_KEYS if key in params]
    if meta and params.get("hidden_dim") is None:
        raise SourceError(
            f"{meta[0]} instead of hidden_dim: this is Meta's layout of Llama, not Mistral's", where=fields.where,
            hint="convert it with transformers' Llama conversion first, or fetch the Hugging Face folder",
        )  # fmt: skip
    latent = [key for key in _LATENT_KEYS if params.get(key) is not None]
    if latent:
        raise SourceError(
            f"{latent[0]}: a model with latent attention (Mistral Large 3), which is another computation",
            where=fields.where, hint="mistral, mixtral, ministral and ministral3 models can be converted",
        )  # fmt: skip
    for key, neutral in NEUTRAL_KEYS.items():
        value = params.get(key)
        if value is not None and (value != neutral or type(value) is not type(neutral)):
            raise fields.fail(
                key, f"is {quote(value)}: another computation than Mistral's", f"only {quote(neutral)} can be converted"
            )
    for key in params:
        if key not in KNOWN_KEYS:
            raise fields.unknown(key, KNOWN_KEYS, _ALIASES)


def _read_theta(fields: Fields, stated: float | None, notes: list[str]) -> float:
    theta: float | None = fields.said(THETA.native, THETA.kind, stated, "--rope-theta")
    if theta is not None:
        return theta
    if type(fields.table.get("sliding_window")) is int:
        notes.append(
            f"rope_theta is not in {PARAMS}: 10000 is taken, because a sliding_window without it is the file of "
            "7B v0.1 (--rope-theta says otherwise)"
        )
        return THETA_2023
    notes.append(
        f"rope_theta is not in {PARAMS}: 1000000 is taken, as mistral-inference does; a model made with "
        "another writes wrong text without an error (--rope-theta says otherwise)"
    )
    return THETA_DEFAULT


def _read_windows(fields: Fields, n_layers: int) -> Windows:
    params = fields.table
    keys = [key for key in ("sliding_window", "_sliding_window") if params.get(key) is not None]
    if not keys:
        return ()
    found = {key: _one_window(fields, key, n_layers) for key in keys}
    if len(set(found.values())) > 1:
        raise fields.fail(
            "_sliding_window", f"is {quote(params[keys[1]])} but sliding_window is {quote(params[keys[0]])}",
            "they are two names of one thing: keep one",
        )  # fmt: skip
    return found[keys[0]]


def _one_window(fields: Fields, key: str, n_layers: int) -> Windows:
    if not isinstance(fields.table[key], list):
        size = fields.size(key)
        return () if size is None else (size,)
    windows = fields.list(key) or []
    at = Fields({f"{key}[{i}]": window for i, window in enumerate(windows)}, fields.where, fields.file)
    sizes = {at.size(name) for name in at.table} - {None}
    if n_layers % len(windows):
        raise fields.fail(
            key, f"has {len(windows)} entries, which do not repeat to {n_layers} layers",
            "its length must divide n_layers",
        )  # fmt: skip
    if len(sizes) > 1:
        raise fields.fail(
            key, f"has windows of {len(sizes)} sizes, and config.json can say one",
            "only one size beside null can be converted",
        )  # fmt: skip
    return shortest_pattern(windows)


def _read_moe(fields: Fields) -> dict[str, int]:
    moe = fields.below("moe")
    if moe is None:
        return {}
    known = [row.native for row in MOE]
    for key in moe.table:
        if key not in known:
            raise moe.unknown(key, known, {row.hf: row.native for row in MOE})
    return {row.fact: moe.need(row.native, row.kind) for row in MOE}


def _read_yarn(fields: Fields, notes: list[str]) -> Yarn | None:
    table, scaling = fields.below("yarn"), fields.below("llama_4_scaling")
    if table is None:
        if scaling is not None:
            raise fields.fail(
                "llama_4_scaling", "stands without yarn", "no Hugging Face configuration can say that: add yarn"
            )
        return None
    known = [*(row.native for row in YARN), "apply_scale"]
    for key in table.table:
        if key not in known:
            raise table.unknown(key, known, {row.hf: row.native for row in YARN})
    scale = table.flag("apply_scale")
    if scale is None:
        notes.append("yarn.apply_scale is not said: true is taken, as vLLM does")
    yarn = Yarn(**{row.fact: table.need(row.native, row.kind) for row in YARN}, apply_scale=scale is not False)
    if scaling is None:
        return yarn
    original = "original_max_position_embeddings"
    for key in scaling.table:
        if key not in (original, QUERY_BETA.native):
            raise scaling.unknown(key, (original, QUERY_BETA.native))
    beta = scaling.number(QUERY_BETA.native, zero=True)
    if beta is None:
        raise scaling.missing(QUERY_BETA.native)
    if scaling.need(original, "size") != yarn.original_context:
        raise scaling.fail(
            original, f"is {scaling.table[original]}, and yarn's is {yarn.original_context}",
            "config.json can say one number for both: they must be equal",
        )  # fmt: skip
    return replace(yarn, query_beta=beta or None)


def context_of_params(params: Mapping[str, Any], *, where: str) -> int | None:
    """Longest sequence in tokens, where the file says it (few do); SourceError if it is no number of tokens."""
    fields = Fields(params, where, PARAMS)
    found = [fields.size(key) for key in CONTEXT_KEYS]
    return next((size for size in found if size is not None), None)


def native_quantization(params: Mapping[str, Any]) -> str | None:
    """In words, how a file says that its weights are quantized; None if it does not. The facts are the same without.

    qformat_weight names the weights' type; qscheme_act is TENSOR for one stored scale per activation, NO_SCALES for
    scales found at run time (vLLM's reading).
    """
    for key in QUANTIZATION_KEYS:
        value = params.get(key)
        if not value:
            continue
        if not isinstance(value, Mapping):
            return f"quantized ({key} {quote(value)})"
        form = value.get("qformat_weight") or value.get("quant_method")
        scheme = value.get("qscheme_act")
        activations = {None: "", "TENSOR": ", one stored scale per activation", "NO_SCALES": ", no stored scales"}
        known = scheme is None or isinstance(scheme, str)
        words = activations.get(scheme, f", activations {quote(scheme)}") if known else f", activations {quote(scheme)}"
        return f"{form if isinstance(form, str) and form.isidentifier() else quote(form)} weights{words}"
    return None


def params_of_facts(facts: Facts, *, profile: Profile, context: int | None) -> tuple[dict[str, Any], list[str]]:
    """The object for a params.json, and sentences for the user about who can read it. `context` is in tokens.

    "current" always says rope_theta. "one-file-ref-2023" has exactly the nine keys that the code of September 2023
    takes, and SourceError if the model is more than they say.
    """
    if profile == "one-file-ref-2023":
        return _params_2023(facts, context)
    params = {**native_of(COMMON, facts), **native_of((THETA,), facts)}
    notes = []
    if facts.windows:
        params["sliding_window"] = list(facts.windows) if facts.mixed_windows else facts.windows[0]
    if facts.experts:
        params["moe"] = native_of(MOE, facts)
    if facts.tied:
        params[TIED.native] = True
        notes.append("the head is the embedding, which vLLM understands; mistral-inference 1.6 misses output.weight")
    if facts.yarn:
        params["yarn"] = {**native_of(YARN, facts.yarn), "apply_scale": facts.yarn.apply_scale}
        if facts.yarn.query_beta is not None:
            original = {"original_max_position_embeddings": facts.yarn.original_context}
            params["llama_4_scaling"] = {**original, **native_of((QUERY_BETA,), facts.yarn)}
        if context is not None:
            params["max_position_embeddings"] = context
        notes.append("mistral-inference 1.6 ignores yarn and would run the model wrongly; vLLM reads it")
    return params, notes


def _params_2023(facts: Facts, context: int | None) -> tuple[dict[str, Any], list[str]]:
    reasons = (
        (facts.experts, "a mixture of experts"),
        (facts.yarn, "a model with yarn"),
        (facts.tied, "a head that is the embedding"),
        (facts.mixed_windows, "windows that differ between layers"),
        (facts.rope_theta != THETA_2023, f"rope_theta {facts.rope_theta:g}: its own is fixed at 10000"),
        (not facts.windows and context is None, "a model without a window whose context is not known"),
    )
    for applies, reason in reasons:
        if applies:
            raise SourceError(
                f"the one-file reference of 2023 cannot run {reason}", where="profile one-file-ref-2023",
                hint="take the profile current",
            )  # fmt: skip
    notes = []
    window = facts.windows[0] if facts.windows else context
    if not facts.windows:
        notes.append(
            f"the code of 2023 needs a sliding_window: {context} was written, the whole context, so every sequence "
            "within it is computed the same"
        )
    if context is not None and context > POSITIONS_2023:
        notes.append(f"the code of 2023 ends at {POSITIONS_2023} tokens")
    return {**native_of(COMMON, facts), "sliding_window": window}, notes
