"""quantization_config in both formats, literally, and what is said of readers that refuse a folder."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from quantkit.methods import METHODS
from quantkit.methods.base import Selection
from quantkit.methods.gptq import Gptq, Rtn
from quantkit.version import __version__

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
         "mlp.up_proj", "mlp.down_proj")  # fmt: skip
GROUPS = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
          ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]  # fmt: skip


def selection(*skipped: str, kinds: tuple[str, ...] = KINDS, layers: int = 12) -> Selection:
    """Of a model with these linears in every layer, those left dense whose names end so."""
    modules = [f"model.layers.{n}.{kind}" for n in range(layers) for kind in kinds]
    dense = tuple(m for m in modules if m.endswith(skipped or "nothing"))
    return Selection(tuple(m for m in modules if m not in dense), dense, ("lm_head", *dense))


def test_gptq_literally() -> None:
    block = METHODS["gptq", 4].config(Gptq(group_size=128), "BF16", selection())
    assert json.dumps(block) == (
        '{"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false, "sym": true, "lm_head": false, '
        '"checkpoint_format": "gptq", "pack_dtype": "int32", "true_sequential": true, "static_groups": false, '
        f'"damp_percent": 0.03, "meta": {{"quantizer": ["quantkit:{__version__}"]}}}}'
    )


def test_what_parameters_change() -> None:
    plain = METHODS["rtn", 3].config(Rtn(group_size=-1, sym=False, checkpoint_format="gptq_v2"), "F16", selection())
    assert "damp_percent" not in plain
    assert [plain[key] for key in ("bits", "group_size", "sym", "checkpoint_format")] == [3, -1, False, "gptq_v2"]
    acting = METHODS["gptq", 4].config(Gptq(group_size=64, act_order="group", damp=0.05), "F16", selection())
    assert (acting["desc_act"], acting["damp_percent"]) == (True, 0.05)
    row = METHODS["gptq", 4].config(Gptq(group_size=-1, act_order="group"), "F16", selection())
    assert row["desc_act"] is False
    for block in (plain, acting, row):
        assert not {"is_marlin_format", "dynamic", "modules_in_block_to_quantize"} & block.keys()


def test_a_kind_that_is_dense_everywhere() -> None:
    chosen = selection("o_proj", "down_proj")
    block = METHODS["gptq", 4].config(Gptq(group_size=128), "BF16", chosen)
    assert block["modules_in_block_to_quantize"] == [GROUPS[0], GROUPS[2]]
    assert list(block["dynamic"])[:2] == [
        r"-:^model\.layers\.0\.self_attn\.o_proj$", r"-:^model\.layers\.0\.mlp\.down_proj$"]  # fmt: skip
    patterns = [re.compile(p.removeprefix("-:")) for p in block["dynamic"]]
    for module in chosen.skipped + chosen.encoded:
        assert any(p.match(module) for p in patterns) == (module in chosen.skipped)


def test_a_kind_that_is_dense_in_some_layers() -> None:
    """Ends of names cannot tell layers apart; whole names can, in optimum and in vLLM."""
    chosen = selection("layers.1.mlp.down_proj")
    lists = METHODS["gptq", 4].config(Gptq(group_size=128), "BF16", chosen)["modules_in_block_to_quantize"]
    assert lists[:2] == [[f"model.layers.0.{kind}" for kind in GROUPS[0]], ["model.layers.0.self_attn.o_proj"]]
    named = [name for part in lists for name in part]
    assert named == list(chosen.encoded)
    for module in chosen.encoded + chosen.skipped:
        assert any(module.endswith(name) for name in named) == (module in chosen.encoded)
        assert any(name in module for name in named) == (module in chosen.encoded)


def test_experts_keep_their_numbers() -> None:
    kinds = ("self_attn.q_proj", "block.experts.0.w1", "block.experts.0.w3", "block.experts.0.w2", "block.experts.1.w1")
    lists = METHODS["rtn", 4].config(Rtn(group_size=32), "F16", selection("q_proj", kinds=kinds))
    assert lists["modules_in_block_to_quantize"] == [
        ["block.experts.0.w1", "block.experts.0.w3"], ["block.experts.0.w2"], ["block.experts.1.w1"]]  # fmt: skip


def test_the_file_of_its_own_is_the_same() -> None:
    method = METHODS["gptq", 4]
    block = method.config(Gptq(group_size=128), "BF16", selection("o_proj"))
    (name, data), *more = method.extra_files(block).items()
    assert not more
    assert name == "quantize_config.json"
    assert json.loads(data) == block
    compressed = method.config(Gptq(group_size=128, format="compressed-tensors"), "BF16", selection())
    assert method.extra_files(compressed) == {}


@pytest.mark.parametrize(("group_size", "strategy"), [(128, "group"), (-1, "channel")])
def test_compressed_tensors_literally(group_size: Any, strategy: str) -> None:
    params = Rtn(group_size=group_size, sym=False, format="compressed-tensors")
    block = METHODS["rtn", 4].config(params, "BF16", selection("layers.3.mlp.down_proj"))
    assert block == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4, "type": "int", "symmetric": False, "strategy": strategy,
                    "group_size": group_size if group_size > 0 else None, "dynamic": False, "actorder": None,
                    "block_structure": None, "observer": "minmax", "observer_kwargs": {},
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head", "model.layers.3.mlp.down_proj"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": "0.19.0",
    }  # fmt: skip


# --- notes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "params", "words"), [
    (4, Gptq(group_size=64), []),
    (8, Gptq(group_size=-1, act_order="group"), []),
    (4, Gptq(group_size=64, checkpoint_format="gptq_v2"), []),
    (3, Gptq(group_size=64), ["vLLM reads the gptq format with 4 or 8 bits"]),
    (4, Gptq(group_size=64, act_order="group"), ["vLLM reads"]),
    (4, Gptq(group_size=64, sym=False), ["gptqmodel refuses asymmetric folders of version 1", "vLLM reads"]),
    (4, Gptq(group_size=64, sym=False, checkpoint_format="gptq_v2"), ["vLLM reads"]),
    (3, Gptq(group_size=64, sym=False, format="compressed-tensors"), []),
])  # fmt: skip
def test_notes_on_formats(bits: int, params: Gptq, words: list[str]) -> None:
    notes = METHODS["gptq", bits].reader_notes(selection(), params)
    assert len(notes) == len(words)
    assert all(note.startswith(start) for note, start in zip(notes, words, strict=True))


@pytest.mark.parametrize("format_", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize(("skipped", "torn"), [
    (("layers.1.self_attn.k_proj",), ("1.self_attn.k_proj", "1.self_attn.q_proj")),
    (("up_proj",), ("0.mlp.up_proj", "0.mlp.gate_proj")),
    (("layers.1.self_attn.q_proj", "layers.1.self_attn.k_proj", "layers.1.self_attn.v_proj"), None),
    (("gate_proj", "up_proj"), None),
    (("down_proj",), None),
])  # fmt: skip
def test_notes_on_what_vllm_joins(skipped: tuple[str, ...], torn: tuple[str, str] | None, format_: Any) -> None:
    notes = METHODS["gptq", 4].reader_notes(selection(*skipped), Gptq(group_size=64, format=format_))
    if torn is None:
        assert notes == ()
    else:
        dense, quantized = (f"model.layers.{name}" for name in torn)
        assert notes[0].startswith(f"{dense} is dense and {quantized} is quantized")


def test_notes_on_experts() -> None:
    kinds = ("mlp.experts.0.w1", "mlp.experts.0.w2", "mlp.experts.1.w1", "mlp.experts.1.w2")
    notes = METHODS["gptq", 4].reader_notes(selection("layers.2.mlp.experts.1.w2", kinds=kinds), Gptq(group_size=64))
    assert notes[0].startswith("model.layers.2.mlp.experts.1.w2 is dense and model.layers.2.mlp.experts.0.w1")


def test_a_head_that_is_called_like_an_embedding() -> None:
    """compressed-tensors takes every linear that is not listed for a packed one."""
    chosen = Selection(("gpt_neox.layers.0.mlp.dense_h_to_4h",), (), ("gpt_neox.embed_in", "embed_out", "lm_head"))
    block = METHODS["rtn", 4].config(Rtn(group_size=32, format="compressed-tensors"), "F16", chosen)
    assert block["ignore"] == ["embed_out", "lm_head"]
