"""What Mistral's own programs call a model's tensors, and which tensors a model is made of.

Facts: names and shapes of mistral-src 09-2023 to mistral-inference 1.6; the stacked experts of the first Mixtral.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from quantkit import architectures
from quantkit.checkpoint.header import FLOATS, quote
from quantkit.checkpoint.views import SourceTensor
from quantkit.errors import SourceError
from quantkit.layouts.hf import CONFIG
from quantkit.layouts.mistral_facts import Facts
from quantkit.layouts.mistral_params import PARAMS
from quantkit.layouts.names import NameTable, fill

_LAYER = "layers.*."
_ALWAYS = (
    ("tok_embeddings.weight", "model.embed_tokens.weight"),
    (_LAYER + "attention_norm.weight", "model.layers.*.input_layernorm.weight"),
    (_LAYER + "attention.wq.weight", "model.layers.*.self_attn.q_proj.weight"),
    (_LAYER + "attention.wk.weight", "model.layers.*.self_attn.k_proj.weight"),
    (_LAYER + "attention.wv.weight", "model.layers.*.self_attn.v_proj.weight"),
    (_LAYER + "attention.wo.weight", "model.layers.*.self_attn.o_proj.weight"),
    (_LAYER + "ffn_norm.weight", "model.layers.*.post_attention_layernorm.weight"),
    ("norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
)
_DENSE = (  # w1 gates, w3 goes up, w2 comes down
    (_LAYER + "feed_forward.w1.weight", "model.layers.*.mlp.gate_proj.weight"),
    (_LAYER + "feed_forward.w2.weight", "model.layers.*.mlp.down_proj.weight"),
    (_LAYER + "feed_forward.w3.weight", "model.layers.*.mlp.up_proj.weight"),
)
_EXPERT = "model.layers.*.block_sparse_moe.experts.*."
_EXPERTS = (
    (_LAYER + "feed_forward.gate.weight", "model.layers.*.block_sparse_moe.gate.weight"),
    *((f"{_LAYER}feed_forward.experts.*.w{n}.weight", f"{_EXPERT}w{n}.weight") for n in (1, 2, 3)),
)
DENSE, MIXTURE = NameTable(_ALWAYS + _DENSE), NameTable(_ALWAYS + _EXPERTS)
ROTARY = ("self_attn.q_proj.weight", "self_attn.k_proj.weight")
HEAD = "lm_head.weight"
# The first Mixtral stacked the experts of a layer in one tensor (as megablocks does), w2 turned.
STACKED_GATE = _LAYER + "block_sparse_moe.gate.weight"
STACKED = {f"{_LAYER}block_sparse_moe.w{n}": f"w{n}.weight" for n in (1, 2, 3)}
VISION = ("vision_encoder.", "vision_language_adapter.", "patch_merger.", "pre_mm_projector_norm.")
BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq|rope\.freqs")  # computed, not learnt; old files carry them


def table_of(facts: Facts) -> NameTable:
    return MIXTURE if facts.experts else DENSE


def expected_names(facts: Facts) -> Iterator[tuple[str, str]]:
    """(native, canonical) of every tensor that a model of these facts is made of."""
    for native, canonical in table_of(facts).rows:
        if canonical == HEAD and facts.tied:
            continue
        stars = canonical.count("*")
        for layer in range(facts.n_layers if stars else 1):
            for expert in range(facts.experts if stars == 2 else 1):
                indices = (layer, expert)[:stars]
                yield fill(native, indices), fill(canonical, indices)


def check_complete(
    facts: Facts, config: Mapping[str, Any], tensors: Iterable[SourceTensor], *, where: str, native: bool
) -> None:
    """SourceError unless every tensor of the model is there, in the shape that its configuration gives it. A wrong
    shape would be cut into wrong heads without a word. `native`: call tensors by their native names."""
    row = architectures.find(config)
    assert row is not None, "whatever has facts has a row in the table of architectures"
    by_name = {t.name: t for t in tensors}
    source = PARAMS if native else CONFIG
    table = table_of(facts)
    surplus = dict(by_name)
    for name, canonical in expected_names(facts):
        surplus.pop(canonical, None)
        called = quote(name if native else canonical)
        tensor = by_name.get(canonical)
        if tensor is None:
            raise SourceError(
                f"tensor {called} is missing", where=where,
                hint=f"the download is incomplete, or {source}, with its {facts.n_layers} layers, is of another model",
            )  # fmt: skip
        if tensor.dtype not in FLOATS:
            raise SourceError(
                f"tensor {called} is {tensor.dtype}: no 16- or 32-bit float weight", where=where,
                hint="fetch the weights in bfloat16; packed and scaled ones have rows that cannot be told apart",
            )  # fmt: skip
        expected = architectures.expected_shape(row, config, canonical)
        if expected != tensor.shape:
            heads = "" if not canonical.endswith((*ROTARY, "v_proj.weight", "o_proj.weight")) else (
                f" ({facts.n_heads} heads, {facts.n_kv_heads} for keys and values, of {facts.head_dim})"
            )  # fmt: skip
            raise SourceError(
                f"tensor {called} is {list(tensor.shape)}, {source} makes it {list(expected or ())}{heads}",
                where=where, hint=f"{source} and the weights are of different models, or a shard of them is missing",
            )  # fmt: skip
    if surplus:
        name = next(iter(surplus))
        experts = f" with {facts.experts} experts each" if facts.experts else ""
        raise SourceError(
            f"tensor {quote(table.native(name) or name if native else name)} is left over: {source} speaks of "
            f"{facts.n_layers} layers{experts}", where=where, hint=f"{source} and the weights are of different models",
        )  # fmt: skip
