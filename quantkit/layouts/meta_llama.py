"""The layout of Meta's own Llama programs: the sibling of Mistral's, in one file a device.

Names and row order are Mistral's. Each device holds a share of every matrix (`consolidated.00.pth`, `.01.pth`, …), and
the norms whole. params.json does not say the width of the feed-forward layers, but how it was computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.checkpoint.header import TensorInfo, quote
from quantkit.checkpoint.reader import WeightFile, read_weight_files, safe_path
from quantkit.checkpoint.views import SourceTensor
from quantkit.errors import SourceError
from quantkit.layouts.base import Checkpoint, NativeOptions
from quantkit.layouts.hf import side_files
from quantkit.layouts.mistral import check_plain, read_params, weight_names
from quantkit.layouts.mistral_config import facts_of_config
from quantkit.layouts.mistral_facts import MAX_LAYERS, Fields
from quantkit.layouts.mistral_hf_config import DTYPES
from quantkit.layouts.mistral_names import BUFFERS, DENSE, ROTARY, check_complete
from quantkit.layouts.mistral_params import PARAMS

# Which way the devices' shares of a matrix are joined: 0 below each other, 1 side by side. Norms are not shared out.
_SIDE_BY_SIDE = ("attention.wo.weight", "feed_forward.w2.weight")
_BELOW = ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight", "feed_forward.w1.weight",
          "feed_forward.w3.weight", "output.weight")  # fmt: skip
_EMBEDDING = "tok_embeddings.weight"
_KNOWN = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "vocab_size",
          "rope_theta", "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor", "max_seq_len",
          "max_batch_size", "model_parallel_size")  # fmt: skip


def is_meta_llama(params: Mapping[str, Any]) -> bool:
    return "multiple_of" in params and "hidden_dim" not in params


def open_meta_llama(folder: Path, options: NativeOptions, *, data_present: bool = True) -> Checkpoint:
    """Reads params and the headers of all shards. Raises SourceError, naming the file at fault."""
    params, where = read_params(folder), str(folder / PARAMS)
    shards: list[list[TensorInfo]] = []
    files: list[WeightFile] = []
    for name in weight_names(folder):  # one by one: each holds the same names
        tensors, (file,) = read_weight_files(folder, [name], data_present=data_present)
        shards.append(tensors)
        files.append(file)
    found, dropped = _joined(shards, params, folder, data_present=data_present)
    config, notes = _config(params, {t.name: t for t in found}, options, where)
    check_plain(params, where)
    facts, _ = facts_of_config(_plain_rope(config), where=where)
    heads = facts.head_dim
    found = [replace(t, head_dim=heads) if t.name.endswith(ROTARY) else t for t in found]
    check_complete(facts, config, found, where=str(folder), native=True)
    return Checkpoint(
        folder, "meta-llama", config, {t.name: t for t in found}, tuple(files), {}, None, side_files(folder),
        params=params, generation="Llama", dropped=tuple(dropped), notes=tuple(notes),
    )  # fmt: skip


def _joined(
    shards: Sequence[Sequence[TensorInfo]], params: Mapping[str, Any], folder: Path, *, data_present: bool
) -> tuple[list[SourceTensor], list[str]]:
    """Every tensor with the shares of all devices, in the order of the first file; names left out."""
    by_name = [{t.name: t for t in shard} for shard in shards]
    found, dropped = [], []
    for info in (t for shard in shards[1:] for t in shard if t.name not in by_name[0]):
        raise SourceError(
            f"tensor {quote(info.name)} is not in the first shard", where=str(folder / info.file),
            hint=f"the shards and {PARAMS} must be of one download",
        )  # fmt: skip
    for info in shards[0]:
        if BUFFERS.fullmatch(info.name):
            dropped.append(info.name)
            continue
        canonical = DENSE.canonical(info.name)
        parts = [shard.get(info.name) for shard in by_name]
        shares = [p for p in parts if p is not None and (p.shape, p.dtype) == (info.shape, info.dtype)]
        if canonical is None or len(shares) < len(parts):
            what = "has no place in this layout" if canonical is None else "is not in every shard in one shape"
            raise SourceError(
                f"tensor {quote(info.name)} {what}", where=str(folder / info.file),
                hint=f"the shards and {PARAMS} must be of one download",
            )  # fmt: skip
        axis = _axis(info, params)
        if axis is None and data_present and len({_digest(folder, share) for share in shares}) > 1:
            raise SourceError(
                f"tensor {quote(info.name)} is not the same in every shard, though every device has all of it",
                where=str(folder / info.file), hint="the shards must be of one download",
            )  # fmt: skip
        if axis is None or len(shares) == 1:
            found.append(SourceTensor(canonical, info.dtype, info.shape, (info,)))
            continue
        shape = tuple(n * len(shares) if i == axis else n for i, n in enumerate(info.shape))
        found.append(SourceTensor(canonical, info.dtype, shape, tuple(shares), axis=axis))
    return found, dropped


def _digest(folder: Path, info: TensorInfo) -> bytes:
    """The SHA-256 of a tensor that is whole in every shard: a norm, a few kilobytes."""
    digest = hashlib.sha256()
    with safe_path(folder, info.file).open("rb") as f:
        f.seek(info.offset)
        for start in range(0, info.nbytes, 1 << 20):
            digest.update(f.read(min(1 << 20, info.nbytes - start)))
    return digest.digest()


def _axis(info: TensorInfo, params: Mapping[str, Any]) -> int | None:
    if len(info.shape) != 2:
        return None
    if info.name == _EMBEDDING:  # Llama 1 and 2 share out its columns, Llama 3 its rows
        return 1 if info.shape[1] != params.get("dim") else 0
    return 1 if info.name.endswith(_SIDE_BY_SIDE) else 0 if info.name.endswith(_BELOW) else None


def _config(
    params: Mapping[str, Any], tensors: Mapping[str, SourceTensor], options: NativeOptions, where: str
) -> tuple[dict[str, Any], list[str]]:
    """config.json as transformers' LlamaConfig wants it, and notes about what was assumed. Widths come from the
    tensors: params.json only says how they were computed."""
    fields = Fields(params, where, PARAMS)
    for key in params:
        if key not in _KNOWN:
            raise fields.unknown(key, _KNOWN)
    dim, layers, heads = (fields.need(key, "size") for key in ("dim", "n_layers", "n_heads"))
    if layers > MAX_LAYERS:
        raise fields.fail("n_layers", f"is {layers:,}: no model has so many layers", "fetch the original file")
    if dim % heads:
        raise fields.fail("n_heads", f"is {heads}, which does not divide dim, {dim}", "fetch the original file")
    embedding = tensors.get("model.embed_tokens.weight")
    gate = tensors.get("model.layers.0.mlp.gate_proj.weight")
    if embedding is None or gate is None or len(embedding.shape) != 2 or len(gate.shape) != 2:
        raise SourceError("the embedding or the first layer is missing", where=where, hint="fetch the shards again")
    notes: list[str] = []
    theta = fields.said("rope_theta", "number", options.rope_theta, "--rope-theta")
    if theta is None:
        theta = 10000.0
        notes.append(f"rope_theta is not in {PARAMS}: 10000, as in Llama 1 and 2 (--rope-theta says otherwise)")
    scaled = bool(fields.flag("use_scaled_rope"))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if scaled:
        factor = fields.number("rope_scaling_factor")
        if factor is None:
            notes.append(f"rope_scaling_factor is not in {PARAMS}: 8 is taken, as in Llama 3.1")
        rope = {"rope_type": "llama3", "factor": factor or 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": fields.number("rope_high_freq_factor") or 4.0,
                "original_max_position_embeddings": 8192, "rope_theta": theta}  # fmt: skip
    context = fields.said("max_seq_len", "size", options.context, "--context")
    if context is None:
        context = 131072 if scaled else 8192 if theta >= 500_000 else 4096
        notes.append(
            f"{PARAMS} does not say how long a context may be; {context:,} tokens are assumed "
            "(--context says otherwise)"
        )
    epsilon = fields.need("norm_eps", "number")
    if epsilon >= 1:
        raise fields.fail("norm_eps", f"is {epsilon}: no model adds so much", "mend the number")
    first, last = (128000, 128001) if embedding.shape[0] > 100_000 else (1, 2)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        "vocab_size": embedding.shape[0], "hidden_size": dim, "intermediate_size": gate.shape[0],
        "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": fields.size("n_kv_heads") or heads, "head_dim": dim // heads, "hidden_act": "silu",
        "max_position_embeddings": context, "rms_norm_eps": epsilon,
        "rope_theta": theta, "rope_parameters": rope,
        "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
        "initializer_range": 0.02, "use_cache": True, "bos_token_id": first, "eos_token_id": last,
        "dtype": DTYPES.get(embedding.dtype), "torch_dtype": DTYPES.get(embedding.dtype),
    }  # fmt: skip
    if scaled:  # for transformers 4
        config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return config, notes


def _plain_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without its rope scaling, which Mistral's facts have no word for: sizes are all that is asked here."""
    theta = config["rope_theta"]
    rest = {k: v for k, v in config.items() if k != "rope_scaling"}
    return {**rest, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
