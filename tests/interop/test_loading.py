"""`quantkit.loading.load` on bitsandbytes folders that are built here, tensor by tensor, from tiny random models.

The reference of every comparison is the same model, dense, with its weights replaced by the dequantized ones. In train
mode (no dropout in these models) bitsandbytes dequantizes and multiplies in the dtype of the input, so logits agree to
float32 rounding. In eval mode on an AVX512_BF16 CPU it multiplies in bfloat16, and LLM.int8() rounds activations to
8 bits: there the comparison is loose, and only shows that the kernels in use see the same weights.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import SourceError, UsageError
from quantkit.loading import load

LINEAR = re.compile(
    r".*\.(?:query_key_value|dense|dense_h_to_4h|dense_4h_to_h|[qkvo]_proj|gate_proj|up_proj|down_proj|w[123])\.weight"
)
COMMON = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = COMMON | {"intermediate_size": 128, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
MOE = LLAMA | {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_experts": 4, "norm_topk_prob": True}
FALCON = COMMON | {"bos_token_id": 1, "eos_token_id": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon-7b": ("Falcon", FALCON | {"multi_query": True, "parallel_attn": True, "bias": False}),
    "falcon-40b": ("Falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False}),
    "falcon-rw": ("Falcon", FALCON | {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}),
    "mixtral": ("Mixtral", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2Moe", MOE | {"shared_expert_intermediate_size": 128}),
    "qwen3-moe": ("Qwen3Moe", MOE | {"head_dim": 16, "mlp_only_layers": [0]}),
    "llama": ("Llama", LLAMA),
}
KINDS = ("nf4", "nf4-nested", "fp4", "int8")


@dataclass
class Folder:
    """A quantized folder and the dense folder that holds the same weights dequantized."""

    path: Path
    dense: Path
    quantized: list[str]

    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "model.safetensors")

    def write(self, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, self.path / "model.safetensors", metadata={"format": "pt"})

    def reference(self, **kwargs: Any) -> Any:
        from transformers import AutoModelForCausalLM

        # Experts one after the other in float32, as our module adds them up.
        if "experts.0" in " ".join(self.quantized):
            kwargs["experts_implementation"] = "eager"
        return AutoModelForCausalLM.from_pretrained(self.dense, **kwargs).eval()


def settings(kind: str, compute: str) -> dict[str, Any]:
    """`quantization_config` as transformers 5.23 writes it."""
    return {
        "_load_in_4bit": kind != "int8",
        "_load_in_8bit": kind == "int8",
        "bnb_4bit_compute_dtype": compute,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4" if kind == "int8" else kind[:3],
        "bnb_4bit_use_double_quant": kind.endswith("nested"),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_threshold": 6.0,
        "load_in_4bit": kind != "int8",
        "load_in_8bit": kind == "int8",
        "quant_method": "bitsandbytes",
    }


def quantize(name: str, weight: torch.Tensor, kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors on disk of one linear, and its dequantized weight."""
    import bitsandbytes.functional as bnb

    linear = name.removesuffix(".weight")
    if kind == "int8":
        codes, scale, _ = bnb.int8_vectorwise_quant(weight.half())
        written = {name: codes, f"{linear}.SCB": scale, f"{linear}.weight_format": torch.tensor(0, dtype=torch.uint8)}
        return written, (codes.float() * scale[:, None] / 127).to(weight.dtype)
    packed, state = bnb.quantize_4bit(weight, quant_type=kind[:3], compress_statistics=kind.endswith("nested"))
    companions = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    # As one long row: bitsandbytes' AVX-512 code takes wrong scales where a row does not end with a block.
    state.shape = torch.Size((1, weight.numel()))
    return {name: packed, **companions}, bnb.dequantize_4bit(packed, state).view(weight.shape)


def build(
    tmp_path: Path, model: str, kind: str, dtype: torch.dtype = torch.float32, skip: str = "^$", **overrides: Any
) -> Folder:
    """Saves a random model, then rewrites its folder with quantized, and a copy of it with dequantized, linears.
    `skip` is a pattern for linears to leave dense."""
    import transformers

    torch.manual_seed(0)
    family, values = MODELS[model]
    config = getattr(transformers, f"{family}Config")(**values | overrides)
    made = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
    for parameter in made.parameters():  # the usual 0.02 leaves experts and biases too faint to tell apart
        torch.nn.init.normal_(parameter, std=0.1)
    result = Folder(tmp_path / "quantized", tmp_path / "dense", [])
    made.save_pretrained(result.path)
    made.save_pretrained(result.dense)
    written, dense = {}, load_file(result.dense / "model.safetensors")
    for name, weight in list(dense.items()):
        if LINEAR.fullmatch(name) and not re.search(skip, name):
            tensors, dense[name] = quantize(name, weight, kind)
            written.update(tensors)
            result.quantized.append(name.removesuffix(".weight"))
        else:
            written[name] = weight
    save_file(dense, result.dense / "model.safetensors", metadata={"format": "pt"})
    result.write({name: tensor.contiguous() for name, tensor in written.items()})
    table = json.loads((result.path / "config.json").read_text())
    table["quantization_config"] = settings(kind, str(dtype).removeprefix("torch."))
    (result.path / "config.json").write_text(json.dumps(table))
    return result


IDS = torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", MODELS)
def test_loaded_model_is_the_dequantized_model(tmp_path: Path, model: str, kind: str) -> None:
    import bitsandbytes as bnb

    folder = build(tmp_path, model, kind)
    loaded = load(folder.path)
    assert not loaded.training
    layers = [m for m in loaded.modules() if isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)]
    assert len(layers) == len(folder.quantized) > 0
    assert {layer.weight.dtype for layer in layers} == {torch.int8 if kind == "int8" else torch.uint8}
    # no dense copy of a quantized weight: what is left is vectors, embeddings and routers
    for name, parameter in loaded.named_parameters():
        assert parameter.device.type == "cpu"
        if parameter.dim() > 1 and parameter.dtype.is_floating_point:
            assert re.search(r"embed|lm_head|gate\.weight|shared_expert_gate", name), name
    assert loaded.is_quantized
    expected = logits(folder.reference())
    torch.testing.assert_close(logits(loaded.train()), expected, rtol=1e-4, atol=1e-4)
    spread = expected.std()
    assert spread > 0.05
    if not re.search("moe|mixtral", model):  # a rounding may send a token to another expert
        assert (logits(loaded.eval()) - expected).abs().max() < 0.1 * spread
    tokens = loaded.eval().generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape[1] > IDS.shape[1]


@pytest.mark.parametrize("kind", KINDS)
def test_experts_in_eval_mode(tmp_path: Path, kind: str) -> None:
    """Every token goes to every expert, so that no rounding can change the routing."""
    folder = build(tmp_path, "mixtral", kind, num_experts_per_tok=4)
    expected = logits(folder.reference())
    assert (logits(load(folder.path)) - expected).abs().max() < 0.1 * expected.std()


def test_bfloat16(tmp_path: Path) -> None:
    """The dtype on disk is kept, and can be overridden for what is not quantized."""
    folder = build(tmp_path, "falcon-rw", "nf4", torch.bfloat16)
    loaded = load(folder.path)
    assert loaded.get_input_embeddings().weight.dtype == loaded.dtype == torch.bfloat16
    expected = logits(folder.reference())
    assert (logits(loaded) - expected).abs().max() < 0.1 * expected.std()  # bfloat16 carries 8 bits
    assert load(folder.path, dtype="float32").get_input_embeddings().weight.dtype == torch.float32


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("model", ["falcon-7b", "mixtral"])
def test_names_without_the_base_prefix(tmp_path: Path, model: str, kind: str) -> None:
    folder = build(tmp_path, model, kind)
    folder.write({re.sub(r"^(transformer|model)\.", "", name): t for name, t in folder.tensors().items()})
    torch.testing.assert_close(logits(load(folder.path).train()), logits(folder.reference()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", ["falcon-40b", "mixtral"])
def test_shards_need_not_keep_companions_together(tmp_path: Path, model: str) -> None:
    folder = build(tmp_path, model, "nf4-nested")
    shard(folder)
    torch.testing.assert_close(logits(load(folder.path).train()), logits(folder.reference()), rtol=1e-4, atol=1e-4)


def shard(folder: Folder) -> dict[str, str]:
    """Spreads the tensors over three shards, one after the other, and returns the index."""
    tensors = folder.tensors()
    weight_map = {name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, folder.path / file, metadata={"format": "pt"})
    (folder.path / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder.path / "model.safetensors.index.json").write_text(json.dumps(index))
    return weight_map


@pytest.mark.parametrize("model", ["llama", "falcon-7b"])
def test_a_layer_left_dense(tmp_path: Path, model: str) -> None:
    """A recipe may leave linears alone, whether or not the skip list of config.json says so."""
    folder = build(tmp_path, model, "nf4", skip=r"\.1\.mlp\.")
    assert any(".0.mlp." in name for name in folder.quantized)
    assert not any(".1.mlp." in name for name in folder.quantized)
    torch.testing.assert_close(logits(load(folder.path).train()), logits(folder.reference()), rtol=1e-4, atol=1e-4)


def test_experts_left_dense(tmp_path: Path) -> None:
    """Some experts dense, and in one layer all of them: they load as linears of their own."""
    folder = build(tmp_path, "mixtral", "nf4", skip=r"layers\.1\..*experts|experts\.2\.|w2")
    loaded = load(folder.path)
    experts = loaded.model.layers[0].mlp.experts
    assert type(experts.get_submodule("0.w1")).__name__ == "Linear4bit"
    assert {type(experts.get_submodule(n)) for n in ("0.w2", "2.w1")} == {torch.nn.Linear}
    torch.testing.assert_close(logits(loaded.train()), logits(folder.reference()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("model", "shape"), [("llama", {"intermediate_size": 96}), ("falcon-7b", {"hidden_size": 80})])
def test_shapes_that_cannot_be_repacked(tmp_path: Path, model: str, shape: dict[str, int]) -> None:
    """On an AVX512_BF16 CPU bitsandbytes alone fails in the first forward; elsewhere this tests nothing new."""
    folder = build(tmp_path, model, "nf4", **shape)
    expected = logits(folder.reference())
    assert (logits(load(folder.path)) - expected).abs().max() < 0.1 * expected.std()


def test_plain_architectures_are_left_to_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    called = []
    original = AutoModelForCausalLM.from_pretrained

    def spy(*args: Any, **kwargs: Any) -> Any:
        called.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spy)
    load(build(tmp_path / "a", "llama", "nf4").path)
    (arguments,) = called
    assert arguments["local_files_only"] is True
    assert arguments["trust_remote_code"] is False
    load(build(tmp_path / "b", "falcon-7b", "nf4").path)
    load(build(tmp_path / "c", "qwen3-moe", "nf4").path)
    assert len(called) == 1


@pytest.mark.parametrize("same", [True, False])
def test_tied_head_that_is_on_disk_too(tmp_path: Path, same: bool) -> None:
    """Falcon ties its head; a copy on disk is tied if equal, and kept if it differs, as transformers does."""
    folder = build(tmp_path, "falcon-7b", "nf4")
    tensors = folder.tensors()
    embedding = tensors["transformer.word_embeddings.weight"]
    folder.write(tensors | {"lm_head.weight": embedding.clone() if same else embedding + 1})
    loaded = load(folder.path)
    head = loaded.get_output_embeddings().weight
    assert (head is loaded.get_input_embeddings().weight) is same
    torch.testing.assert_close(head.data, embedding if same else embedding + 1)


def test_generation_config_is_loaded(tmp_path: Path) -> None:
    folder = build(tmp_path, "falcon-7b", "nf4")
    (folder.path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "max_length": 33}))
    assert load(folder.path).generation_config.eos_token_id == [2, 7]


COMPANIONS = {
    "nf4": ["weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"],
    "nf4-nested": ["weight.nested_absmax", "weight.nested_quant_map"],
    "int8": ["weight", "SCB"],
}


@pytest.mark.parametrize(("kind", "part"), [(kind, part) for kind, parts in COMPANIONS.items() for part in parts])
@pytest.mark.parametrize("model", ["falcon-7b", "qwen2-moe", "llama"])
def test_missing_companion(tmp_path: Path, model: str, kind: str, part: str) -> None:
    folder = build(tmp_path, model, kind)
    tensors = folder.tensors()
    del tensors[f"{folder.quantized[-1]}.{part}"]
    folder.write(tensors)
    with pytest.raises(SourceError, match=re.escape(folder.quantized[-1])) as caught:
        load(folder.path)
    assert caught.value.where
    assert caught.value.hint


@pytest.mark.parametrize("model", ["falcon-7b", "mixtral", "llama"])
def test_tensors_and_model_must_match(tmp_path: Path, model: str) -> None:
    """An unused, a missing and a misshapen tensor, with the loader in use for each kind of architecture."""
    folder = build(tmp_path, model, "nf4")
    tensors = folder.tensors()
    extra = folder.quantized[0].replace(".0.", ".7.")
    first = {n: t for n, t in tensors.items() if n.startswith(folder.quantized[0])}
    copied = {n.replace(folder.quantized[0], extra): t.clone() for n, t in first.items()}
    norm = next(name for name in tensors if "norm" in name)
    for changed, fault in [
        (tensors | {"stray.weight": torch.zeros(4)}, "'stray.weight' is not in the model"),
        (tensors | copied, f"'{extra}.weight' is not in the model"),
        ({n: t for n, t in tensors.items() if n != norm}, f"'{norm}' is not in the folder"),
        (tensors | {norm: torch.zeros(63)}, f"'{norm}' is of "),
    ]:
        folder.write(changed)
        with pytest.raises(SourceError, match=re.escape(fault)):
            load(folder.path)


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    folder = build(tmp_path, "falcon-7b", "nf4")
    tensors = folder.tensors()
    folder.write(tensors | {"ln_f.bias": tensors["transformer.ln_f.bias"] + 1})
    with pytest.raises(SourceError, match="under two names"):
        load(folder.path)


def test_missing_expert(tmp_path: Path) -> None:
    folder = build(tmp_path, "qwen3-moe", "int8")
    gone = "model.layers.1.mlp.experts.2.up_proj"
    folder.write({n: t for n, t in folder.tensors().items() if not n.startswith(gone)})
    with pytest.raises(SourceError, match=re.escape(f"'{gone}.weight' is not in the folder")):
        load(folder.path)


@pytest.mark.parametrize(
    "change", [{"blocksize": 128}, {"blocksize": 0}, {"shape": [64, 65]}, {"shape": 4}, {"dtype": "load"}, {"more": 1}]
)
@pytest.mark.parametrize("model", ["falcon-7b", "llama"])
def test_quant_state_is_checked(tmp_path: Path, model: str, change: dict[str, Any]) -> None:
    """transformers alone loads a wrong block size without a word, and computes with wrong numbers."""
    folder = build(tmp_path, model, "nf4")
    tensors = folder.tensors()
    key = f"{folder.quantized[0]}.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[key].tolist())) | change
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    folder.write(tensors)
    with pytest.raises(SourceError, match="quant_state"):
        load(folder.path)


def test_transposed_quant_state(tmp_path: Path) -> None:
    """Sizes agree, shapes do not."""
    folder = build(tmp_path, "falcon-7b", "nf4")
    tensors = folder.tensors()
    key = "transformer.h.0.mlp.dense_h_to_4h.weight.quant_state.bitsandbytes__nf4"
    text = bytes(tensors[key].tolist()).replace(b"[256, 64]", b"[64, 256]")
    tensors[key] = torch.tensor(list(text), dtype=torch.uint8)
    folder.write(tensors)
    with pytest.raises(SourceError, match=re.escape("of shape [64, 256]; the model wants [256, 64]")):
        load(folder.path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/x.safetensors", "model.bin", 3])
def test_hostile_shard_names(tmp_path: Path, name: Any) -> None:
    folder = build(tmp_path, "llama", "nf4")
    weight_map: dict[str, Any] = dict(shard(folder))
    outside = folder.path.parent / "outside.safetensors"
    outside.write_bytes((folder.path / "model-00001-of-00003.safetensors").read_bytes())
    moved = {n: name if file.startswith("model-00001") else file for n, file in weight_map.items()}
    index = {"metadata": {}, "weight_map": moved}
    (folder.path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError):
        load(folder.path)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"quantization_config": None}, "no quantization_config"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"model_type": "nobody-knows"}, "nobody-knows"),
    ],
)
def test_config_that_does_not_fit(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    folder = build(tmp_path, "falcon-7b", "nf4")
    table = json.loads((folder.path / "config.json").read_text())
    (folder.path / "config.json").write_text(json.dumps(table | change))
    with pytest.raises(SourceError, match=fault):
        load(folder.path)


def test_usage(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"config\.json"):
        load(tmp_path)
    with pytest.raises(UsageError, match="device"):
        load(tmp_path, device="teapot")
    with pytest.raises(UsageError, match="dtype"):
        load(tmp_path, dtype="nn")


def test_import_does_not_import_torch() -> None:
    code = "import sys, quantkit.loading; sys.exit(bool({'torch', 'transformers', 'bitsandbytes'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
