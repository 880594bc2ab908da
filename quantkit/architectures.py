"""What each architecture calls its weights, and how large they are: a plan is made from config.json and names alone.

A row is names only. Shapes are written in symbols, one letter per size in config.json, so that a config and an index
tell every byte of a checkpoint before a weight is fetched. Nothing here imports torch or transformers; that the table
agrees with transformers, tensor by tensor, is what tests/interop/test_architectures_transformers.py proves.

    V vocabulary      A attention heads    F feed-forward width    E experts per layer
    H hidden width    K key/value heads    M width of an expert    P positions
    L layers          D width of a head    S width of the shared expert    W embedding width, where not H

Three things differ between a file and a model in memory, and the rows speak of the file: the base prefix may be absent
(`h.0.…` for `transformer.h.0.…`), experts lie one by one, and GPT-2 stores its linears [in, out].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from quantkit.checkpoint.header import quote
from quantkit.errors import SourceError

Shape = tuple[str, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class Linear:
    """A weight to quantize, as it is called on disk."""

    module: str  # without ".weight": "model.layers.3.self_attn.q_proj"
    kind: str  # the same in every block and for every expert: "block_sparse_moe.experts.w1"
    layer: int  # -1 outside the blocks (OPT's project_in and project_out); of a head, the number of blocks
    transposed: bool  # on disk [in, out]
    expert: bool  # one of many of its kind in its block


@dataclass(frozen=True, eq=False)
class Architecture:
    """One row. A `*` in a name stands for an index below the block's own: an expert or a head."""

    model_types: tuple[str, ...]
    linears: Shapes  # in a block, in the order of the forward pass: suffix -> (out, in)
    others: Shapes  # in a block, never quantized: norms and routers
    outside: Shapes  # not in a block: norms and embeddings, below the prefix
    outside_linears: Shapes = field(default_factory=dict)
    prefix: str = "model"  # the base model's name inside the whole one; files may lack it
    blocks: str = "layers"  # below the prefix
    embedding: str = "embed_tokens"  # below the prefix; what the head is tied to
    heads: tuple[str, ...] = ("lm_head",)  # the head's names, those of old files included
    head: Shape = ("V", "H")
    tied: bool = False  # where config.json does not say
    transposed: bool = False
    defaults: Mapping[str, int] = field(default_factory=dict)  # the config class's own, where config.json is silent
    wide: bool = False  # F is 4H where config.json does not say
    warning: str = ""  # what a reader other than quantkit makes of a quantized folder

    @property
    def name(self) -> str:
        return self.model_types[0]


# --- the rows ---------------------------------------------------------------------------------------------------------


def _like(row: Architecture, *model_types: str, **changes: Any) -> Architecture:
    return replace(row, model_types=model_types, **changes)


def _gated(width: str, path: str = "mlp") -> Shapes:
    return {f"{path}.gate_proj": (width, "H"), f"{path}.up_proj": (width, "H"), f"{path}.down_proj": ("H", width)}


def _norms(*names: str, size: str = "H") -> Shapes:
    return dict.fromkeys(names, (size,))


_QKV: Shapes = {"self_attn.q_proj": ("A*D", "H"), "self_attn.k_proj": ("K*D", "H"), "self_attn.v_proj": ("K*D", "H")}
_ATTENTION: Shapes = {**_QKV, "self_attn.o_proj": ("H", "A*D")}
_HEAD_NORMS = _norms("self_attn.q_norm", "self_attn.k_norm", size="D")
_WIDE_MLP: Shapes = {"mlp.dense_h_to_4h": ("F", "H"), "mlp.dense_4h_to_h": ("H", "F")}
_EXPERTS_WARNING = (
    "transformers 5 holds the experts of a layer as one 3-D parameter: it quantizes none of them itself and cannot "
    "load them quantized; load this folder with quantkit.load; engines that keep experts apart may read it too, which "
    "was not tried"
)
_FALCON_WARNING = (
    "transformers 5 replaces only exact nn.Linear modules and Falcon's are a subclass: it quantizes nothing there and "
    "cannot load a quantized Falcon folder; load this one with "
    "quantkit.load; vLLM is reported to read such folders, which was not tried"
)

# fmt: off
_LLAMA = Architecture(
    ("llama",),
    linears={**_ATTENTION, **_gated("F")},
    others=_norms("input_layernorm", "post_attention_layernorm"),
    outside={"embed_tokens": ("V", "H"), "norm": ("H",)})
_QWEN3 = _like(
    _LLAMA, "qwen3", others={**_LLAMA.others, **_HEAD_NORMS}, defaults={"num_key_value_heads": 32, "head_dim": 128})
_GEMMA2 = _like(
    _LLAMA, "gemma2", tied=True, defaults={"num_key_value_heads": 4, "head_dim": 256},
    others={**_LLAMA.others, **_norms("pre_feedforward_layernorm", "post_feedforward_layernorm")})
_BLOOM = Architecture(
    ("bloom",),
    # 4H whatever n_inner says: transformers reads no other width here.
    linears={"self_attention.query_key_value": ("3*H", "H"), "self_attention.dense": ("H", "H"),
             "mlp.dense_h_to_4h": ("4*H", "H"), "mlp.dense_4h_to_h": ("H", "4*H")},
    others=_norms("input_layernorm", "post_attention_layernorm"),
    outside={"word_embeddings": ("V", "H"), **_norms("word_embeddings_layernorm", "ln_f")},
    prefix="transformer", blocks="h", embedding="word_embeddings", tied=True)
_QWEN3_MOE = _like(
    _QWEN3, "qwen3_moe", defaults={"num_key_value_heads": 4}, warning=_EXPERTS_WARNING,
    linears={**_QWEN3.linears, **_gated("M", "mlp.experts.*")},
    others={**_QWEN3.others, "mlp.gate": ("E", "H")})

ARCHITECTURES: tuple[Architecture, ...] = (
    _LLAMA,
    _like(_LLAMA, "mistral", defaults={"num_key_value_heads": 8}),
    _like(_LLAMA, "ministral", defaults={"num_key_value_heads": 8}),
    _like(_LLAMA, "ministral3", defaults={"num_key_value_heads": 8, "head_dim": 128}),
    _like(_LLAMA, "qwen2", defaults={"num_key_value_heads": 32}),
    _QWEN3,
    _like(_LLAMA, "gemma", tied=True, defaults={"num_key_value_heads": 16, "head_dim": 256}),
    _GEMMA2,
    _like(_GEMMA2, "gemma3_text", others={**_GEMMA2.others, **_HEAD_NORMS}),
    _like(
        _LLAMA, "phi",
        linears={**_QKV, "self_attn.dense": ("H", "A*D"), "mlp.fc1": ("F", "H"), "mlp.fc2": ("H", "F")},
        others={**_norms("input_layernorm"), **_norms("self_attn.q_layernorm", "self_attn.k_layernorm", size="D")},
        outside={"embed_tokens": ("V", "H"), "final_layernorm": ("H",)}),
    _like(
        _LLAMA, "phi3",
        linears={"self_attn.qkv_proj": ("A*D+2*K*D", "H"), "self_attn.o_proj": ("H", "A*D"),
                 "mlp.gate_up_proj": ("2*F", "H"), "mlp.down_proj": ("H", "F")}),
    _like(
        _LLAMA, "starcoder2", tied=True, defaults={"num_key_value_heads": 2},
        linears={**_ATTENTION, "mlp.c_fc": ("F", "H"), "mlp.c_proj": ("H", "F")}),
    _like(
        _LLAMA, "stablelm", defaults={"num_key_value_heads": 32},
        others={**_LLAMA.others,
                **_norms("self_attn.q_layernorm.norms.*", "self_attn.k_layernorm.norms.*", size="D")}),
    _like(
        _LLAMA, "olmo2",
        others={**_norms("post_attention_layernorm", "post_feedforward_layernorm"),
                "self_attn.q_norm": ("A*D",), "self_attn.k_norm": ("K*D",)}),
    _like(_LLAMA, "granite"),
    _like(
        _LLAMA, "cohere", tied=True,
        others={**_norms("input_layernorm"), "self_attn.q_norm": ("A", "D"), "self_attn.k_norm": ("K", "D")}),
    _like(_LLAMA, "smollm3", tied=True, defaults={"num_key_value_heads": 4}),
    Architecture(
        ("gpt_neox",),
        linears={"attention.query_key_value": ("3*H", "H"), "attention.dense": ("H", "H"), **_WIDE_MLP},
        others=_norms("input_layernorm", "post_attention_layernorm"),
        outside={"embed_in": ("V", "H"), "final_layer_norm": ("H",)},
        # On disk, and in memory since transformers 5.
        prefix="gpt_neox", embedding="embed_in", heads=("embed_out", "lm_head")),
    Architecture(
        ("opt",),
        linears={**{f"self_attn.{name}": ("H", "H") for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
                 "fc1": ("F", "H"), "fc2": ("H", "F")},
        others=_norms("self_attn_layer_norm", "final_layer_norm"),
        # Positions begin at 2, as in fairseq. The projections exist where W is not H.
        outside={"decoder.embed_tokens": ("V", "W"), "decoder.embed_positions": ("P+2", "H"),
                 "decoder.final_layer_norm": ("H",)},
        outside_linears={"decoder.project_in": ("H", "W"), "decoder.project_out": ("W", "H")},
        blocks="decoder.layers", embedding="decoder.embed_tokens", head=("V", "W"), tied=True),
    Architecture(
        ("gpt2",),
        linears={"attn.c_attn": ("3*H", "H"), "attn.c_proj": ("H", "H"),
                 "mlp.c_fc": ("F", "H"), "mlp.c_proj": ("H", "F")},
        others=_norms("ln_1", "ln_2"),
        outside={"wte": ("V", "H"), "wpe": ("P", "H"), "ln_f": ("H",)},
        prefix="transformer", blocks="h", embedding="wte", tied=True, transposed=True, wide=True),
    _BLOOM,
    _like(
        _BLOOM, "falcon", "RefinedWebModel", "RefinedWeb", wide=True, warning=_FALCON_WARNING,
        # One formula for three generations: K is 1 (7B), A (rw) or the number of groups (40B); see _symbol.
        linears={"self_attention.query_key_value": ("A*D+2*K*D", "H"), "self_attention.dense": ("H", "H"), **_WIDE_MLP},
        others={**_BLOOM.others, **_norms("ln_attn", "ln_mlp")},
        outside={"word_embeddings": ("V", "H"), "ln_f": ("H",)}),
    _like(
        _LLAMA, "mixtral", defaults={"num_key_value_heads": 8}, warning=_EXPERTS_WARNING,
        linears={**_ATTENTION, "block_sparse_moe.experts.*.w1": ("F", "H"),
                 "block_sparse_moe.experts.*.w3": ("F", "H"), "block_sparse_moe.experts.*.w2": ("H", "F")},
        others={**_LLAMA.others, "block_sparse_moe.gate": ("E", "H")}),
    _like(
        _QWEN3_MOE, "qwen2_moe", defaults={"num_key_value_heads": 16},
        # The gate of the shared expert is a linear of one row, and transformers quantizes it like any other.
        linears={**_QWEN3_MOE.linears, **_gated("S", "mlp.shared_expert"), "mlp.shared_expert_gate": ("1", "H")},
        others={**_LLAMA.others, "mlp.gate": ("E", "H")}),
    _QWEN3_MOE,
    _like(
        _QWEN3_MOE, "deepseek_v3", defaults={"num_key_value_heads": 128},
        # Attention through low ranks. The first layers are dense; q_proj is where there is no rank for it.
        linears={"self_attn.q_proj": ("A*N+A*R", "H"), "self_attn.q_a_proj": ("Q", "H"),
                 "self_attn.q_b_proj": ("A*N+A*R", "Q"), "self_attn.kv_a_proj_with_mqa": ("C+R", "H"),
                 "self_attn.kv_b_proj": ("A*N+A*U", "C"), "self_attn.o_proj": ("H", "A*U"),
                 **_gated("F"), **_gated("M", "mlp.experts.*"), **_gated("M*B", "mlp.shared_experts")},
        others={**_LLAMA.others, "self_attn.q_a_layernorm": ("Q",), "self_attn.kv_a_layernorm": ("C",),
                "mlp.gate": ("E", "H"), "mlp.gate.e_score_correction_bias": ("E",)}),
)
# fmt: on

_BY_TYPE = {model_type: row for row in ARCHITECTURES for model_type in row.model_types}

# --- reading them -----------------------------------------------------------------------------------------------------


def find(config: Mapping[str, Any]) -> Architecture | None:
    """The row of a config.json, by its model_type; None where there is none (see derived_architecture)."""
    model_type = config.get("model_type")
    return _BY_TYPE.get(model_type) if isinstance(model_type, str) else None


def linears(architecture: Architecture, config: Mapping[str, Any], names: Iterable[str]) -> list[Linear]:
    """Those of the tensors `names` to quantize, by layer, expert by expert, in the order of the forward pass.

    They are what transformers and bitsandbytes convert by default, and besides what transformers 5 cannot convert but
    its models are made of: Falcon's linears and single experts. The head stays as it is.
    """
    order = {kind: i for i, kind in enumerate([*architecture.outside_linears, *architecture.linears])}
    found = []
    for name in names:
        place = _locate(architecture, config, name)
        if place is None or place.leaf != "weight" or place.pattern not in order:
            continue
        linear = Linear(
            module=name.removesuffix(".weight"),
            kind=place.pattern.replace(".*", ""),
            layer=place.layer,
            transposed=architecture.transposed,
            expert=place.index >= 0,
        )
        found.append(((place.layer, place.index, order[place.pattern]), linear))
    return [linear for _, linear in sorted(found, key=lambda pair: pair[0])]


def expected_shape(architecture: Architecture, config: Mapping[str, Any], name: str) -> tuple[int, ...] | None:
    """Shape on disk of any parameter; None for a name that this model does not have, and for buffers of old files
    (causal masks, rotary frequencies), which are no parameters and do not follow the config's dtype."""
    place = _locate(architecture, config, name)
    if place is None:
        return None
    shape = place.shape
    if place.leaf == "bias":
        shape = shape[:1]
    elif architecture.transposed and place.pattern in architecture.linears:
        shape = shape[::-1]
    return tuple(_value(architecture, config, expression) for expression in shape)


def experts_of_a_token(config: Mapping[str, Any]) -> int:
    """To how many experts a token is sent; 1 where config.json does not say it."""
    return next((int(config[k]) for k in ("num_experts_per_tok", "moe_topk", "top_k_experts") if config.get(k)), 1)


def attention_heads(config: Mapping[str, Any]) -> int:
    """How many; 0 where config.json does not say it."""
    return next((int(config[key]) for key in _KEYS["A"] if type(config.get(key)) is int), 0)


def hidden_width(config: Mapping[str, Any]) -> int:
    """Width of the hidden states between layers. SourceError where config.json does not say it."""
    width = next((config[key] for key in (*_KEYS["H"], "d_model") if type(config.get(key)) is int), None)
    if width is None or not 0 < width < 2**31:
        raise SourceError(
            "config.json does not say how wide the hidden states are", where=str(config.get("model_type")),
            hint="a calibrated method needs a causal language model; try --method rtn or bnb",
        )  # fmt: skip
    return int(width)


def is_tied(architecture: Architecture, config: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding, and so is not in the file."""
    tied = config.get("tie_word_embeddings")
    return architecture.tied if tied is None else bool(tied)


def skip_modules(architecture: Architecture, config: Mapping[str, Any]) -> tuple[str, ...]:
    """`llm_int8_skip_modules`, spelled out. A list replaces the defaults of transformers, so it must name all of them:
    the head, and the embedding where the two are one."""
    embedding = f"{architecture.prefix}.{architecture.embedding}"
    return ((embedding,) if is_tied(architecture, config) else ()) + architecture.heads


_WHOLE = ("e_score_correction_bias",)  # parameters that are called by no module's leaf


@dataclass(frozen=True, slots=True)
class _Place:
    pattern: str  # a key of the row: below the block, or below the prefix
    leaf: str  # "weight" or "bias"
    shape: Shape
    layer: int = -1
    index: int = -1  # of the expert or head


def _locate(architecture: Architecture, config: Mapping[str, Any], name: str) -> _Place | None:
    path, _, leaf = name.rpartition(".")
    if leaf in _WHOLE:
        path, leaf = name, "weight"
    if leaf not in ("weight", "bias"):
        return None
    if path in architecture.heads:
        return _Place(path, leaf, architecture.head)
    path = path.removeprefix(architecture.prefix + ".")
    layer = index = -1
    inside = path.startswith(architecture.blocks + ".")
    if inside:
        number, _, path = path[len(architecture.blocks) + 1 :].partition(".")
        layer = _index(number)
        if not 0 <= layer < _value(architecture, config, "L"):
            return None
        parts = path.split(".")
        indices = [_index(part) for part in parts]
        index = max(indices)
        path = ".".join("*" if i >= 0 else part for i, part in zip(indices, parts, strict=True))
        if ".experts.*." in path and index >= _value(architecture, config, "E"):
            return None
    quantized = architecture.linears if inside else architecture.outside_linears
    kept = architecture.others if inside else architecture.outside
    shape = quantized.get(path) or kept.get(path)
    if shape is None or (leaf == "bias" and len(shape) > 1 and path not in quantized):
        return None  # embeddings and routers have no bias
    return _Place(path, leaf, shape, layer, index)


def _index(part: str) -> int:
    """The index that a part of a name spells in full, or -1. `07` is none: one tensor must not have two names."""
    return int(part) if part.isascii() and part.isdigit() and part == str(int(part[:9])) else -1


# A symbol's spellings in config.json, the first that is there counts.
_KEYS = {
    "V": ("vocab_size",),
    "H": ("n_embed", "hidden_size", "n_embd"),
    "L": ("num_hidden_layers", "n_layer"),
    "A": ("num_attention_heads", "n_head"),
    "F": ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"),
    "E": ("num_local_experts", "num_experts", "n_routed_experts"),
    "M": ("moe_intermediate_size",),
    "B": ("n_shared_experts",),
    "S": ("shared_expert_intermediate_size",),
    "P": ("max_position_embeddings", "n_positions"),
    "K": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "D": ("head_dim",),
    "W": ("word_embed_proj_dim",),
    "Q": ("q_lora_rank",),
    "C": ("kv_lora_rank",),
    "R": ("qk_rope_head_dim",),
    "N": ("qk_nope_head_dim",),
    "U": ("v_head_dim",),
}


def _value(architecture: Architecture, config: Mapping[str, Any], expression: str) -> int:
    """A size: a sum of products of symbols and numbers, "A*D+2*K*D"."""
    return sum(
        math.prod(int(term) if term.isdigit() else _symbol(architecture, config, term) for term in product.split("*"))
        for product in expression.split("+")
    )


def _symbol(architecture: Architecture, config: Mapping[str, Any], symbol: str) -> int:
    if architecture.name == "falcon":
        if symbol == "D":
            return _symbol(architecture, config, "H") // _symbol(architecture, config, "A")
        # The 40B was first called RefinedWeb and always had the new layout; its config did not say so.
        new = config.get("new_decoder_architecture", config.get("model_type") == "RefinedWeb")
        if symbol == "K" and not new:  # num_kv_heads means nothing here: the published 7B says 71
            return 1 if config.get("multi_query", True) else _symbol(architecture, config, "A")
    keys = _KEYS[symbol]
    value = next((config[key] for key in keys if config.get(key) is not None), None)
    if value is None and not any(key in config for key in keys):
        # Absent is not null: absent asks the config class for its default, null means "from the other sizes".
        value = architecture.defaults.get(keys[0])
    if value is None:
        match symbol:
            case "K":
                return _symbol(architecture, config, "A")
            case "D":
                return _symbol(architecture, config, "H") // _symbol(architecture, config, "A")
            case "W":
                return _symbol(architecture, config, "H")
            case "F" if architecture.wide:
                return 4 * _symbol(architecture, config, "H")
    if type(value) is not int or not 0 < value < 2**31:
        state = "is missing" if value is None else f"is {quote(value)}, which is no size"
        raise SourceError(
            f"{' or '.join(keys)} {state}",
            where=f"config.json (model_type {config.get('model_type')!r})",
            hint=f"a {architecture.name} model cannot be measured without it; fetch the original config.json",
        )
    return value
