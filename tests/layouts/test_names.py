"""The table of names, both ways."""

from __future__ import annotations

import pytest

from quantkit.layouts.mistral_names import DENSE, MIXTURE
from quantkit.layouts.names import NameTable, fill, pattern_of


@pytest.mark.parametrize("table", [DENSE, MIXTURE])
def test_there_and_back(table: NameTable) -> None:
    for native, canonical in table.rows:
        assert native.count("*") == canonical.count("*")
        here, there = fill(native, [3, 11]), fill(canonical, [3, 11])
        assert table.canonical(here) == there
        assert table.native(there) == here


def test_the_rows_that_scripts_confuse() -> None:
    pairs = {
        "layers.7.attention_norm.weight": "model.layers.7.input_layernorm.weight",
        "layers.7.ffn_norm.weight": "model.layers.7.post_attention_layernorm.weight",
        "layers.7.feed_forward.w1.weight": "model.layers.7.mlp.gate_proj.weight",
        "layers.7.feed_forward.w2.weight": "model.layers.7.mlp.down_proj.weight",
        "layers.7.feed_forward.w3.weight": "model.layers.7.mlp.up_proj.weight",
        "output.weight": "lm_head.weight",
    }
    assert {name: DENSE.canonical(name) for name in pairs} == pairs
    assert MIXTURE.canonical("layers.0.feed_forward.experts.10.w3.weight") == (
        "model.layers.0.block_sparse_moe.experts.10.w3.weight"
    )


@pytest.mark.parametrize(
    "name", ["layers.07.ffn_norm.weight", "layers.-1.ffn_norm.weight", "layers.x.ffn_norm.weight", "", "layers",
             "layers.1.attention.wq.bias", "layers.٣.ffn_norm.weight", "layers.*.ffn_norm.weight"],
)  # fmt: skip
def test_names_that_are_none(name: str) -> None:
    assert DENSE.canonical(name) is None


def test_indices_are_kept_in_order() -> None:
    assert pattern_of("a.1.b.22.c") == ("a.*.b.*.c", ["1", "22"])
    with pytest.raises(ValueError, match="stands twice"):
        NameTable([("a.*", "b.*"), ("c.*", "b.*")])
