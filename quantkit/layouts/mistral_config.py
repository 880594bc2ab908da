"""The configuration of Mistral's models, both ways: params.json ↔ Facts ↔ config.json. Standard library only.

All that callers need is named here. mistral_facts.py has the pivot and the table of keys, mistral_params.py and
mistral_hf_config.py a file each; here is what neither file can say of the other, and a manifest may have kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantkit.errors import SourceError
from quantkit.layouts.base import strip
from quantkit.layouts.mistral_facts import THETA, Facts, Yarn, default_context, generation
from quantkit.layouts.mistral_hf_config import CLASSES, DTYPES, config_of_facts, context_of_config, facts_of_config
from quantkit.layouts.mistral_params import (
    QUANTIZATION_KEYS,
    Profile,
    context_of_params,
    facts_of_params,
    native_quantization,
    params_of_facts,
)

__all__ = [
    "Facts",
    "Profile",
    "Yarn",
    "config_of_facts",
    "context_of_config",
    "context_of_params",
    "default_context",
    "facts_of_config",
    "facts_of_params",
    "generation",
    "native_quantization",
    "params_of_facts",
    "restore_config",
    "restore_params",
]

# Null in these means "from the other sizes", "none" or "not said"; in others transformers fails over it.
_NULLABLE = ("head_dim", "num_key_value_heads", "tie_word_embeddings", "rope_theta",
             "rope_parameters", "rope_scaling", "dtype", "torch_dtype")  # fmt: skip


def restore_config(
    facts: Facts, recorded: Mapping[str, Any] | None, fresh: dict[str, Any]
) -> tuple[dict[str, Any], bool]:
    """`recorded`, the config.json that this model had before, if it means `facts`, and True; else `fresh`, and False.

    It comes back whole but for the keys that name code or places (`base.STRIPPED`). It stood in a file that strangers
    may have edited: if anything in it is broken, contradicts the facts, or announces quantized weights, it is not used.
    """
    config = _plain_json(recorded)
    if config is None or config.get("quantization_config") is not None or not _alike(config, fresh):
        return fresh, False
    try:
        context = context_of_config(config, where="the manifest")
        found = facts_of_config(config, where="the manifest")[0]
    except SourceError:
        return fresh, False
    # The profile of 2023 has no word for "no window" and says the whole context, which is the same.
    if facts not in (found, found if found.windows else replace(found, windows=(context,))):
        return fresh, False
    if config.get("architectures") not in (None, [CLASSES[config["model_type"]][0]]):  # vLLM goes by this name
        return fresh, False
    # Loaders cast to the dtype that is named: it is that of the weights, whatever the record says.
    said = {key: fresh[key] for key in ("dtype", "torch_dtype") if key in config and key in fresh}
    return strip({**config, **said}, []), True


def restore_params(
    facts: Facts, recorded: Mapping[str, Any] | None, fresh: dict[str, Any]
) -> tuple[dict[str, Any], bool]:
    """The same for params.json. Where `fresh` says rope_theta, so does what comes back; where it does not, it is of the
    profile of 2023, and what comes back must have the same keys."""
    params = _plain_json(recorded)
    if params is None or not _alike(params, fresh) or type(params.get("max_batch_size", 0)) is not int:
        return fresh, False
    if any(
        params.get(key) is not None for key in (*QUANTIZATION_KEYS, "lora")
    ):  # both change what weights are expected
        return fresh, False
    try:
        context_of_params(params, where="the manifest")
        if facts_of_params(params, where="the manifest")[0] != facts:
            return fresh, False
    except SourceError:
        return fresh, False
    if THETA.native not in fresh:
        return (params, True) if params.keys() == fresh.keys() else (fresh, False)
    if params.get(THETA.native) is None:
        params[THETA.native] = facts.rope_theta
    return params, True


def _plain_json(value: object) -> dict[str, Any] | None:
    """A copy of a JSON object; None for what is none (NaN is not JSON)."""
    if not isinstance(value, Mapping):
        return None
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return None
    return copy


def _alike(recorded: Mapping[str, Any], fresh: Mapping[str, Any]) -> bool:
    """Whether the values that the facts do not check are of types that a reader of the file can bear."""
    for key, value in recorded.items():
        if key in ("dtype", "torch_dtype"):
            good = value is None or value in DTYPES.values()
        elif key == "architectures":
            good = isinstance(value, list) and all(isinstance(name, str) for name in value)
        elif key.endswith("_token_id"):
            ids = value if isinstance(value, list) else [value]
            good = all(token is None or (type(token) is int and token >= 0) for token in ids)
        else:
            other = fresh.get(key)
            # A window may be a number, a list or null: the facts read it strictly.
            good = (
                other is None
                or key == "sliding_window"
                or (key in _NULLABLE if value is None else _kind(value) == _kind(other))
            )
        if not good:
            return False
    return True


def _kind(value: object) -> str:
    return "number" if type(value) in (int, float) else type(value).__name__
