"""THE check: a folder of ours is the one that transformers and bitsandbytes write on a CPU, tensor by tensor.

The peer is `from_pretrained(BitsAndBytesConfig(…))`, then `save_pretrained`: the way of every published recipe. Both
folders must then load and compute the same. Falcon and Mixtral have no peer (transformers 5 quantizes neither Falcon
nor experts), so their folders are loaded with quantkit.load and compared with the dense model.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny
from safetensors import safe_open
from safetensors.torch import save_file

import quantkit.api as api
from quantkit.loading import load
from quantkit.methods import METHODS
from quantkit.methods.base import WeightSpec

Tiny = Callable[[str], Path]
MODELS = ("llama", "mistral", "qwen2", "gpt2", "bloom")
SETTINGS: dict[str, dict[str, Any]] = {
    "nf4-nested": {"bits": 4, "quant_type": "nf4", "double_quant": True},
    "nf4": {"bits": 4, "quant_type": "nf4", "double_quant": False},
    "fp4-nested": {"bits": 4, "quant_type": "fp4", "double_quant": True},
    "fp4": {"bits": 4, "quant_type": "fp4", "double_quant": False},
    "int8": {"bits": 8},
}
IDS = torch.randint(3, 256, (2, 11), generator=torch.Generator().manual_seed(1))
SKIPPED = {
    "llama": {"lm_head"},
    "mistral": {"lm_head"},
    "qwen2": {"lm_head", "model.embed_tokens"},
    "gpt2": {"lm_head", "transformer.wte"},
    "bloom": {"lm_head", "transformer.word_embeddings"},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The mean of more than 32,768 block maxima depends on it; and so may a matrix product."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_peer(source: Path, out: Path, quantize: dict[str, Any]) -> None:
    """What transformers makes of the model under the same settings."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if quantize["bits"] == 8:
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantize["quant_type"],
            bnb_4bit_use_double_quant=quantize["double_quant"],
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, device_map="cpu", quantization_config=config
    )
    model.save_pretrained(out)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, framework="pt") as f:
        assert f.metadata() == {"format": "pt"}
        return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118


def compare_tensors(ours: Path, theirs: Path) -> int:
    """Names, dtypes, shapes and bytes. Only the blob of quant_state may differ, by spaces at its end. Returns how many
    tensors were compared."""
    a, b = tensors_of(ours), tensors_of(theirs)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        peer = b[name]
        assert tensor.dtype == peer.dtype, name
        if ".quant_state." in name:
            blob, peer_blob = (bytes(t.tolist()) for t in (tensor, peer))
            assert blob.rstrip(b" ") == peer_blob, name
            assert json.loads(blob) == json.loads(peer_blob)
            continue
        assert tensor.shape == peer.shape, name
        # Not torch.equal: bytes tell the zeros apart.
        assert tensor.view(-1).view(torch.uint8).equal(peer.view(-1).view(torch.uint8)), name
    return len(a)


def compare_configs(ours: Path, theirs: Path, skipped: set[str]) -> None:
    """Key by key. Ours says which modules are not quantized, transformers' leaves that to each reader to work out."""
    a, b = (json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (ours, theirs))
    assert a.keys() == b.keys()
    assert {key for key in a if a[key] != b[key]} == {"llm_int8_skip_modules"}
    assert b["llm_int8_skip_modules"] is None
    assert set(a["llm_int8_skip_modules"]) == skipped


def from_pretrained(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options).eval()


def logits_of(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def generate(model: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tiny models have no pad token and no generation_config to speak of
        return model.generate(IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("model", MODELS)
def test_folder_is_the_peers(tiny: Tiny, tmp_path: Path, model: str, kind: str) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    api.quantize(str(tiny(model)), ours, {"quantize": SETTINGS[kind]})
    write_peer(tiny(model), theirs, SETTINGS[kind])
    compare_tensors(ours, theirs)
    compare_configs(ours, theirs, SKIPPED[model])
    our_model, their_model = from_pretrained(ours), from_pretrained(theirs)
    expected = logits_of(their_model)
    assert torch.isfinite(expected).all()
    assert logits_of(our_model).equal(expected)
    assert logits_of(load(ours)).equal(expected)
    tokens = generate(our_model)
    assert tokens.shape == (2, 16)
    assert tokens.equal(generate(their_model))


@pytest.mark.parametrize("kind", ["nf4-nested", "fp4", "int8"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_source_dtypes(tmp_path: Path, dtype: str, kind: str) -> None:
    """The peer loads in the source's own dtype: quant_state and its companions follow it."""
    from conftest import make_tiny
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    source = make_tiny("llama", tmp_path / "source", dtype=dtype)
    four = {f"bnb_4bit_{k}": v for k, v in (("quant_type", kind[:3]), ("use_double_quant", kind.endswith("nested")))}
    config = BitsAndBytesConfig(
        **({"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, **four}),
    )
    peer = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map="cpu", quantization_config=config)
    peer.save_pretrained(tmp_path / "theirs")
    api.quantize(str(source), tmp_path / "ours", {"quantize": SETTINGS[kind]})
    compare_tensors(tmp_path / "ours", tmp_path / "theirs")


def test_several_shards_and_slabs(tmp_path: Path) -> None:
    """Weights of several slabs, and files of several shards, hold the same tensors as the peer's one file."""
    from conftest import make_tiny

    source = make_tiny("llama", tmp_path / "source", hidden_size=128, intermediate_size=20480, num_hidden_layers=1)
    job = {"quantize": SETTINGS["nf4-nested"], "shard_size": 2_000_000}
    api.quantize(str(source), tmp_path / "ours", job)
    write_peer(source, tmp_path / "theirs", SETTINGS["nf4-nested"])
    weight_map = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) > 1
    theirs = tensors_of(tmp_path / "theirs")
    assert weight_map.keys() == theirs.keys()
    for name, file in weight_map.items():
        with safe_open(tmp_path / "ours" / file, framework="pt") as f:
            if ".quant_state." not in name:
                assert f.get_tensor(name).equal(theirs[name]), name
    assert logits_of(from_pretrained(tmp_path / "ours")).equal(logits_of(from_pretrained(tmp_path / "theirs")))


# --- what transformers cannot quantize --------------------------------------------------------------------------------


def likeness(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine between two sets of logits, the mean over all tokens."""
    return float(torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1).mean())


def restore_into(folder: Path, source: Path, quantized: Path, settings: dict[str, Any]) -> None:
    """A copy of `source` with each weight that `quantized` has encoded replaced by what our decoder makes of it."""
    method = METHODS["bnb", settings["bits"]]
    params = method.params(**{k: v for k, v in settings.items() if k != "bits"})
    shutil.copytree(source, folder)
    ours, dense = tensors_of(quantized), tensors_of(source)
    for name, weight in dense.items():
        if ours[name].dtype in (torch.uint8, torch.int8):
            spec = WeightSpec(name.removesuffix(".weight"), "BF16", *weight.shape)
            main, *companions = (s.name for s in method.outputs(spec, params))
            decoder = method.decoder(spec, params, {n: ours[n].numpy() for n in companions})
            raw = ours[main].numpy().reshape(-1).view("u1")
            dense[name] = torch.from_numpy(decoder.decode(raw, 0, spec.numel)).view(weight.shape).to(weight.dtype)
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize(("model", "linears"), [("falcon", 2 * 4), ("mixtral", 2 * (4 + 4 * 3))])
def test_architectures_without_a_peer(tiny: Tiny, tmp_path: Path, model: str, linears: int, kind: str) -> None:
    import bitsandbytes

    api.quantize(str(tiny(model)), tmp_path / "ours", {"quantize": SETTINGS[kind]})
    loaded = load(tmp_path / "ours")
    wanted = bitsandbytes.nn.Linear8bitLt if kind == "int8" else bitsandbytes.nn.Linear4bit
    assert sum(isinstance(module, wanted) for module in loaded.modules()) == linears
    ours = logits_of(loaded).float()
    # What 4 bits cost a random model of two layers. That it is them and no fault of loading, the next line shows.
    least = {"nf4": 0.97, "fp4": 0.95, "int8": 0.99}[kind.removesuffix("-nested")]
    assert least < likeness(ours, logits_of(from_pretrained(tiny(model), dtype=torch.bfloat16))) < 0.99999
    restore_into(tmp_path / "dense", tiny(model), tmp_path / "ours", SETTINGS[kind])
    assert likeness(ours, logits_of(from_pretrained(tmp_path / "dense", dtype=torch.bfloat16))) > 0.9995
    assert generate(loaded).shape == (2, 16)


@pytest.mark.parametrize("model", ["falcon", "mixtral"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_their_tensors_are_bitsandbytes_own(tiny: Tiny, tmp_path: Path, model: str, kind: str) -> None:
    """No peer folder, but each single linear has one: bitsandbytes' quantizer on the source tensor."""
    import bitsandbytes.functional as bnb

    api.quantize(str(tiny(model)), tmp_path / "ours", {"quantize": SETTINGS[kind]})
    ours, source = tensors_of(tmp_path / "ours"), tensors_of(tiny(model))
    settings, expected = SETTINGS[kind], {}
    for name, weight in source.items():
        if f"{name}.quant_map" in ours:
            double = settings["double_quant"]
            packed, state = bnb.quantize_4bit(weight, quant_type=settings["quant_type"], compress_statistics=double)
            companions = {f"{name}.{part}": value for part, value in state.as_dict(packed=True).items()}
            expected |= {name: packed, **companions}
        elif (scale := f"{name.removesuffix('.weight')}.SCB") in ours:
            codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
            expected |= {name: codes, scale: scales, f"{scale[:-4]}.weight_format": torch.tensor(0, dtype=torch.uint8)}
        else:
            assert weight.dim() == 1 or any(part in name for part in ("embed", "lm_head", "block_sparse_moe.gate")), (
                name
            )
            expected[name] = weight
    assert ours.keys() == expected.keys()
    for name, tensor in ours.items():
        if ".quant_state." in name:
            assert json.loads(bytes(tensor.tolist())) == json.loads(bytes(expected[name].tolist()))
        else:
            assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
            assert tensor.equal(expected[name]), name


@pytest.mark.parametrize(("hidden", "feed_forward"), [(288, 768), (80, 192), (64, 96)])
def test_rows_that_do_not_end_with_a_block(tmp_path: Path, hidden: int, feed_forward: int) -> None:
    """bitsandbytes' AVX-512 code decodes such weights wrongly; quantkit.load must not pass that on."""
    settings: dict[str, Any] = {"bits": 4}
    changes = {"hidden_size": hidden, "intermediate_size": feed_forward, "num_attention_heads": 2}
    source = make_tiny("llama", tmp_path / "source", **changes)
    api.quantize(str(source), tmp_path / "ours", {"quantize": settings})
    restore_into(tmp_path / "restored", source, tmp_path / "ours", settings)
    tokens = torch.arange(24)[None]
    with torch.no_grad():
        found = load(tmp_path / "ours")(tokens).logits
        wanted = from_pretrained(tmp_path / "restored", dtype=torch.bfloat16)(tokens).logits
    assert likeness(found, wanted) > 0.9995
