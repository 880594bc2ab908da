"""Converted folders mean the same: transformers computes on the one what Mistral's own program computes on the other.

The native side is computed by the oracle (float64, from the description alone), the other by transformers in fp32.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, Run, make_tiny
from oracle import mistral, mistral_2023
from oracle.native_models import make_native, save_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantkit as package
from quantkit.errors import QuantkitError, SourceError, UsageError

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"trained models in {SHARED} are absent")
TOKENS = [(7 * t * t + 3 * t + 5) % 250 for t in range(24)]
CLOSE = 1e-4
THETA = {"rope_theta": 1e6}


# --- models -----------------------------------------------------------------------------------------------------------


def widen(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices of deviation 0.2: wide enough for attention to choose, so that a mistake shows."""
    return {name: tensor * 4 if tensor.dim() > 1 else tensor for name, tensor in weights.items()}


def wide_native(folder: Path, **shape: Any) -> Path:
    made = make_native(folder, **{"dtype": "float32", **shape})
    save_weights(made, widen(mistral.read_weights(made)), "safetensors")
    return made


def wide_hf(folder: Path, model_type: str, **changes: Any) -> Path:
    made = make_tiny(model_type, folder, dtype="float32", **changes)
    weights = load_file(made / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in weights.items():
        if tensor.dim() == 1:  # transformers makes every norm 1, and any of them could be any other
            weights[name] = 1 + 0.2 * torch.randn(tensor.shape, generator=generator)
    save_file(widen(weights), made / "model.safetensors", {"format": "pt"})
    return made


def convert(source: Path, out: Path, to: Any, **keys: Any) -> Path:
    block = {k: keys.pop(k) for k in ("profile", "weights_format", "tokenizer") if k in keys}
    package.convert(str(source), out, to, {"convert": {"tokenizer": False, **block}, **keys})
    assert package.verify(out, source=str(source)).problems == ()
    return out


def load(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def config_of(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text())
    assert isinstance(config, dict)
    return config


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@torch.no_grad()
def theirs(folder: Path) -> Tensor:
    logits = load(folder)(torch.tensor([TOKENS])).logits[0]
    assert isinstance(logits, Tensor)
    return logits.double()


def ours(folder: Path) -> Tensor:
    return mistral.logits(mistral.load_native(folder), TOKENS)


def furthest(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    assert min(a.std(), b.std()) > 0.3
    return float((a - b).abs().max())


# --- the same logits --------------------------------------------------------------------------------------------------

NATIVE: dict[str, dict[str, Any]] = {
    "head_dim is not dim / n_heads": {"dim": 40, "params_extra": THETA},
    "window, base by rule": {"params_extra": {"sliding_window": 5}},
    "windows that differ": {"n_layers": 4, "params_extra": {"rope_theta": 1e4, "sliding_window": [None, 5]}},
    "windows that differ, by the other key": {"n_layers": 4, "params_extra": {**THETA, "_sliding_window": [5, None]}},
    "tied": {"tied": True, "params_extra": THETA},
    "no base, no window": {},
    "all heads alike": {"n_kv_heads": 4, "params_extra": {"rope_theta": 500.0}},
    "one head for keys": {"n_kv_heads": 1, "params_extra": {"rope_theta": 500.0}},
    "experts": {"experts": 4, "params_extra": THETA},
    "stacked experts": {"experts": 4, "megablocks": True, "params_extra": THETA},
    "three of five experts": {"experts": 5, "experts_per_token": 3, "megablocks": True, "params_extra": THETA},
}


@pytest.mark.parametrize("case", NATIVE)
def test_native_to_hf_gives_the_same_logits(case: str, tmp_path: Path) -> None:
    source = wide_native(tmp_path / "native", **NATIVE[case])
    expected = ours(source)
    for size in ("5GB", "60kB"):
        out = convert(source, tmp_path / size, "hf", shard_size=size)
        assert furthest(theirs(out), expected) < CLOSE
    back = convert(out, tmp_path / "back", "mistral")
    if NATIVE[case].get("megablocks"):  # they come back one by one, and float64 adds up in another order
        assert furthest(ours(back), expected) < 1e-12
    else:
        assert torch.equal(ours(back), expected)


MINISTRAL = {**TINY["mistral"], "num_hidden_layers": 4, "sliding_window": 5,
             "layer_types": ["sliding_attention", "full_attention"] * 2}  # fmt: skip
HF: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {}),
    "mistral, window": ("mistral", {"sliding_window": 5}),
    "mistral, tied": ("mistral", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "mistral, another base": ("mistral", {"rope_parameters": {"rope_type": "default", "rope_theta": 321.5}}),
    "llama": ("llama", {}),
    "llama, one head for keys": ("llama", {"num_key_value_heads": 1}),
    "ministral": ("ministral", MINISTRAL),
    "mixtral": ("mixtral", {}),
    "mixtral, window": ("mixtral", {"sliding_window": 5, "num_experts_per_tok": 1}),
}


@pytest.fixture
def tiny_ministral(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TINY, "ministral", {})


@pytest.mark.usefixtures("tiny_ministral")
@pytest.mark.parametrize("case", HF)
def test_hf_to_native_gives_the_same_logits(case: str, tmp_path: Path) -> None:
    model_type, changes = HF[case]
    source = wide_hf(tmp_path / "hf", model_type, **changes)
    expected = theirs(source)
    for form in ("safetensors", "pth"):
        out = convert(source, tmp_path / form, "mistral", weights_format=form)
        assert furthest(ours(out), expected) < CLOSE
    back = convert(out, tmp_path / "back", "hf")
    assert torch.equal(theirs(back), expected)


def swap(folder: Path, one: str, other: str) -> None:
    weights = load_file(folder / "model.safetensors")
    pairs = [(n, n.replace(one, other)) for n in weights if one in n]
    changed = {a: weights[b] for a, b in pairs} | {b: weights[a] for a, b in pairs}
    save_file({**weights, **changed}, folder / "model.safetensors", {"format": "pt"})


def reorder(folder: Path, name: str, head_dim: int) -> None:
    """Rows of each head of that size, in pairs → in halves."""
    weights = load_file(folder / "model.safetensors")
    for n in [n for n in weights if name in n]:
        heads = weights[n].unflatten(0, (-1, head_dim))
        weights[n] = torch.cat([heads[:, 0::2], heads[:, 1::2]], 1).flatten(0, 1).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def setting(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **changes)


MISTAKES: dict[str, Callable[[Path], None]] = {
    "q permuted twice": lambda f: reorder(f, "q_proj", 16),
    "k permuted twice": lambda f: reorder(f, "k_proj", 16),
    "k permuted as if it had q's heads": lambda f: reorder(f, "k_proj", 8),
    "v permuted": lambda f: reorder(f, "v_proj", 16),
    "norms swapped": lambda f: swap(f, "input_layernorm", "post_attention_layernorm"),
    "w1 and w3 swapped": lambda f: swap(f, "gate_proj", "up_proj"),
    "eps": setting(rms_norm_eps=1e-1),
    "window left": setting(sliding_window=5),
    "base": setting(rope_theta=1e4, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
    "tied": setting(tie_word_embeddings=True),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(mistake: str, tmp_path: Path) -> None:
    """A hundred times the tolerance, and that is the mildest of them."""
    source = wide_native(tmp_path / "native", dim=40, params_extra=THETA)
    out = convert(source, tmp_path / "hf", "hf")
    MISTAKES[mistake](out)
    if mistake == "tied":
        weights = load_file(out / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, out / "model.safetensors", {"format": "pt"})
    assert furthest(theirs(out), ours(source)) > 100 * CLOSE


def test_the_users_base_and_context(tmp_path: Path) -> None:
    source = wide_native(tmp_path / "native")
    out = convert(source, tmp_path / "hf", "hf", native={"rope_theta": 777.0, "context": 96})
    edit(source / "params.json", rope_theta=777.0)
    assert furthest(theirs(out), ours(source)) < CLOSE
    config = load(out).config
    assert (config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (96, 777.0)
    with pytest.raises(QuantkitError, match="rope_theta is 777"):
        convert(source, tmp_path / "other", "hf", native={"rope_theta": 5.0})
    back = convert(out, tmp_path / "back", "mistral")
    assert torch.equal(ours(back), ours(source))


def test_only_the_text_part(tmp_path: Path) -> None:
    source = wide_native(tmp_path / "native", params_extra=THETA)
    weights, expected = mistral.read_weights(source), ours(source)
    params = json.loads((source / "params.json").read_text())
    seeing = {
        "vision_encoder.transformer.layers.0.attention.wq.weight": torch.ones(8, 8), "vision_encoder.ln_pre.weight":
        torch.ones(8), "vision_language_adapter.w_in.weight": torch.ones(64, 8), "patch_merger.merging_layer.weight":
        torch.ones(8, 32), "pre_mm_projector_norm.weight": torch.ones(8),
    }  # fmt: skip
    save_file({**weights, **seeing}, source / "consolidated.safetensors")
    edit(source / "params.json", vision_encoder={"hidden_size": 8})
    with pytest.raises(SourceError, match="image"):
        convert(source, tmp_path / "refused", "hf")
    out = convert(source, tmp_path / "hf", "hf", native={"text_only": True})
    assert furthest(theirs(out), expected) < CLOSE
    native = convert(source, tmp_path / "text", "mistral", native={"text_only": True})
    assert torch.equal(ours(native), expected)
    assert json.loads((native / "params.json").read_text()) == params
    assert torch.equal(ours(convert(out, tmp_path / "back", "mistral")), expected)


# --- the traps, as transformers sees them -----------------------------------------------------------------------------


def test_nothing_is_left_to_the_defaults_of_a_class(tmp_path: Path) -> None:
    """Those of MistralConfig: a window of 4096, eps 1e-6, base 10,000, 8 heads for keys, heads of dim / n_heads,
    131,072 positions."""
    source = make_native(tmp_path / "native", dim=40, params_extra={"rope_theta": 1e6})
    config = load(convert(source, tmp_path / "hf", "hf")).config
    assert (config.model_type, config.architectures) == ("mistral", ["MistralForCausalLM"])
    assert config.sliding_window is None
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert (config.head_dim, config.num_key_value_heads, config.num_attention_heads) == (16, 2, 4)
    assert config.max_position_embeddings == 32768
    assert (config.tie_word_embeddings, config.hidden_act) == (False, "silu")
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    written = config_of(tmp_path / "hf")
    for key in ("sliding_window", "rms_norm_eps", "rope_theta", "rope_parameters", "head_dim", "num_key_value_heads",
                "max_position_embeddings", "tie_word_embeddings"):  # fmt: skip
        assert key in written, key
    # both generations of readers
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("extra", "window", "theta"),
    [
        ({"sliding_window": 4096}, 4096, 1e4),  # 7B v0.1 says no base: it is 10,000
        ({"sliding_window": 4096, "rope_theta": 1e6}, 4096, 1e6),
        ({"sliding_window": None, "rope_theta": 1e6}, None, 1e6),
        ({}, None, 1e6),
        ({"rope_theta": 1e8}, None, 1e8),
    ],
)
@pytest.mark.parametrize("experts", [0, 2])
def test_window_and_base(extra: dict[str, Any], window: int | None, theta: float, experts: int, tmp_path: Path) -> None:
    source = make_native(tmp_path / "native", experts=experts, params_extra=extra)
    config = load(convert(source, tmp_path / "hf", "hf")).config
    assert config.model_type == ("mixtral" if experts else "mistral")
    assert (config.sliding_window, config.rope_parameters["rope_theta"]) == (window, theta)
    params = json.loads((convert(tmp_path / "hf", tmp_path / "back", "mistral") / "params.json").read_text())
    assert (params.get("sliding_window"), params["rope_theta"]) == (window, theta)  # a base is always written


def test_every_tensor_is_where_transformers_computes_with_it(tmp_path: Path) -> None:
    """Read from the loaded model, not from the file; every tensor of the source has other values, the norms too."""
    shape: dict[str, Any] = {"dim": 48, "hidden_dim": 48, "n_heads": 3, "n_kv_heads": 3, "vocab_size": 48}
    source = make_native(tmp_path / "native", dtype="float32", params_extra=THETA, **shape)
    native = mistral.read_weights(source)
    model = load(convert(source, tmp_path / "hf", "hf"))
    for i, layer in enumerate(model.model.layers):
        at = {name.removeprefix(f"layers.{i}."): t for name, t in native.items() if name.startswith(f"layers.{i}.")}
        plain = {
            "attention_norm.weight": layer.input_layernorm, "ffn_norm.weight": layer.post_attention_layernorm,
            "attention.wv.weight": layer.self_attn.v_proj, "attention.wo.weight": layer.self_attn.o_proj,
            "feed_forward.w1.weight": layer.mlp.gate_proj, "feed_forward.w2.weight": layer.mlp.down_proj,
            "feed_forward.w3.weight": layer.mlp.up_proj,
        }  # fmt: skip
        for name, module in plain.items():
            assert torch.equal(module.weight, at[name]), name
        for name, module in (
            ("attention.wq.weight", layer.self_attn.q_proj),
            ("attention.wk.weight", layer.self_attn.k_proj),
        ):
            for head in range(3):
                for j in range(8):
                    assert torch.equal(module.weight[16 * head + j], at[name][16 * head + 2 * j])
                    assert torch.equal(module.weight[16 * head + 8 + j], at[name][16 * head + 2 * j + 1])
    assert torch.equal(model.model.embed_tokens.weight, native["tok_embeddings.weight"])
    assert torch.equal(model.lm_head.weight, native["output.weight"])
    assert torch.equal(model.model.norm.weight, native["norm.weight"])


def test_experts_are_where_transformers_computes_with_them(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"dim": 48, "hidden_dim": 48, "experts": 3, "dtype": "float32", "params_extra": THETA}
    native = mistral.read_weights(make_native(tmp_path / "native", **shape))
    for megablocks in (False, True):
        source = make_native(tmp_path / f"source {megablocks}", megablocks=megablocks, **shape)
        model = load(convert(source, tmp_path / f"hf {megablocks}", "hf"))
        for i, layer in enumerate(model.model.layers):
            assert torch.equal(layer.mlp.gate.weight, native[f"layers.{i}.feed_forward.gate.weight"])
            for e in range(3):
                w1, w2, w3 = (native[f"layers.{i}.feed_forward.experts.{e}.w{n}.weight"] for n in (1, 2, 3))
                assert torch.equal(layer.mlp.experts.gate_up_proj[e], torch.cat([w1, w3]))
                assert torch.equal(layer.mlp.experts.down_proj[e], w2)


def test_layers_of_two_kinds(tmp_path: Path) -> None:
    source = make_native(tmp_path / "native", n_layers=4, params_extra={**THETA, "sliding_window": [None, 7]})
    model = load(convert(source, tmp_path / "hf", "hf"))
    assert model.config.model_type == "ministral"
    assert model.config.layer_types == ["full_attention", "sliding_attention"] * 2
    assert model.config.sliding_window == 7


def test_a_tied_head_is_tied(tmp_path: Path) -> None:
    source = make_native(tmp_path / "native", tied=True, params_extra=THETA)
    model = load(convert(source, tmp_path / "hf", "hf"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "hf" / "model.safetensors")


def test_the_dtype_stays(tmp_path: Path) -> None:
    import transformers

    for dtype in ("bfloat16", "float16", "float32"):
        source = make_native(tmp_path / f"{dtype} native", dtype=dtype, params_extra=THETA)
        out = convert(source, tmp_path / dtype, "hf")
        model = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}


# --- tokenizers -------------------------------------------------------------------------------------------------------

TEXTS = ["Once upon a time", "  two  spaces ", "", "Zoë said: “naïve café” — 1,234.5\n\tτέλος 😀", "a</s>b", "<0x41>"]


@pytest.fixture(scope="session")
def spm() -> bytes:
    """A small tokenizer.model with the settings of Mistral's, trained here."""
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    words = ["once upon a time there was a little girl who loved to play", "the big red ball rolled away from her dog"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 20), model_writer=written, vocab_size=330, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, minloglevel=3,
        character_coverage=1.0, hard_vocab_limit=False,
    )  # fmt: skip
    return written.getvalue()


def assert_same_ids(folder: Path, raw: bytes) -> None:
    import transformers
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=raw)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [t for t in TEXTS if "</s>" not in t]  # there sentencepiece sees letters, transformers the end
    for text in texts:
        assert tokenizer(text)["input_ids"] == [processor.bos_id(), *processor.encode(text)], text
        assert tokenizer.decode(processor.encode(text)) == processor.decode(processor.encode(text))


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.model.v3", "tokenizer.model.v1"])
def test_a_tokenizer_keeps_its_name_and_its_ids(name: str, spm: bytes, tmp_path: Path) -> None:
    source = make_native(tmp_path / "native", vocab_size=330, params_extra=THETA)
    (source / name).write_bytes(spm)
    (source / "LICENSE").write_text("ours")
    hf = convert(source, tmp_path / "hf", "hf", tokenizer=True)
    assert (hf / name).read_bytes() == spm
    assert (hf / "LICENSE").read_text() == "ours"
    assert_same_ids(hf, spm)
    back = convert(hf, tmp_path / "back", "mistral", tokenizer=True)
    # as Mistral's own programs want it: one file of weights, one tokenizer, nothing of the other layout
    assert sorted(p.name for p in back.iterdir()) == sorted(
        ["LICENSE", "README.md", "consolidated.safetensors", "params.json", "quantkit.json", name]
    )
    assert (back / name).read_bytes() == spm
    bare = convert(source, tmp_path / "bare", "hf")
    assert sorted(p.name for p in bare.iterdir()) == [
        "LICENSE", "README.md", "config.json", "model.safetensors", "quantkit.json",
    ]  # fmt: skip


def test_a_folder_without_a_tokenizer_is_asked_for_one(tmp_path: Path) -> None:
    source = make_native(tmp_path / "native", params_extra=THETA)
    with pytest.raises(SourceError, match="no tokenizer"):
        convert(source, tmp_path / "out", "hf", tokenizer=True)


def test_a_tokenizer_config_beside_a_native_tokenizer_is_planned_once(spm: bytes, tmp_path: Path) -> None:
    """It is made anew, so the one that lies in the native folder has no place in the output."""
    source = make_native(tmp_path / "native", vocab_size=330, params_extra=THETA)
    (source / "tokenizer.model").write_bytes(spm)
    (source / "tokenizer_config.json").write_text("{}")
    job = package.plan(str(source), {"convert": {"to": "hf"}})
    out = convert(source, tmp_path / "out", "hf", tokenizer=True)
    assert_same_ids(out, spm)
    assert job.disk == sum(p.stat().st_size for p in out.iterdir())
    assert sorted(f.name for f in job.files) == sorted(p.name for p in out.iterdir())


# --- trained models ---------------------------------------------------------------------------------------------------

STORIES = ("stories15m", "stories260k")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[int], list[int]]]:
    """By the name of a trained model: its folder converted to HF, a prompt, and the oracle's 60 tokens after it."""
    pytest.importorskip("sentencepiece")
    made: dict[str, tuple[Path, list[int], list[int]]] = {}

    def get(name: str) -> tuple[Path, list[int], list[int]]:
        if name not in made:
            source = SHARED / f"{name}-mistral-src"
            out = convert(source, tmp_path_factory.mktemp(name) / "hf", "hf", tokenizer=True)
            prompt = mistral_2023.tokens_2023(source, "Once upon a time")
            made[name] = out, prompt, mistral.greedy(mistral.load_native(source), prompt, 60)
        return made[name]

    return get


Story = Callable[[str], tuple[Path, list[int], list[int]]]


@torch.no_grad()
def say(model: Any, prompt: list[int]) -> list[int]:
    said = model.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False, pad_token_id=0)[0].tolist()
    return list(said[len(prompt) :])


@real
@pytest.mark.parametrize("name", STORIES)
def test_a_converted_model_tells_the_same_story(name: str, story: Story) -> None:
    import transformers

    out, prompt, expected = story(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer("Once upon a time")["input_ids"] == prompt
    assert say(load(out), prompt) == expected
    text = tokenizer.decode(prompt + expected, skip_special_tokens=True)
    assert text.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside")
    assert {"One", "day,", "she", "saw", "big,", "red", "wanted"} <= set(text.split())
    assert_same_ids(out, (SHARED / f"{name}-mistral-src" / "tokenizer.model").read_bytes())


@real
@pytest.mark.parametrize("name", STORIES)
def test_a_trained_model_comes_back(name: str, story: Story, tmp_path: Path) -> None:
    source = SHARED / f"{name}-mistral-src"
    old = {"profile": "one-file-ref-2023"} if name == "stories15m" else {}
    back = convert(story(name)[0], tmp_path / "back", "mistral", tokenizer=True, **old)
    expected, found = mistral.read_weights(source), mistral.read_weights(back)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key
    assert json.loads((back / "params.json").read_text()) == json.loads((source / "params.json").read_text())
    assert (back / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    names = {"consolidated.00.pth" if old else "consolidated.safetensors", "params.json", "tokenizer.model"}
    assert {p.name for p in back.iterdir()} == names | {"quantkit.json", "README.md"}


@real
@pytest.mark.parametrize("name", STORIES)
def test_the_program_of_2023_tells_the_same_story(name: str, story: Story, tmp_path: Path) -> None:
    """stories260k never was in that form: its base is 10,000 and it has no window, so one as wide as its context."""
    hf, prompt, expected = story(name)
    old = convert(hf, tmp_path / "old", "mistral", tokenizer=True, profile="one-file-ref-2023")
    assert mistral_2023.run_2023(old, prompt, 60) == expected
    source = SHARED / f"{name}-mistral-src"
    straight = convert(source, tmp_path / "straight", "mistral", tokenizer=True, profile="one-file-ref-2023")
    for file in ("consolidated.00.pth", "params.json", "tokenizer.model"):
        assert (straight / file).read_bytes() == (old / file).read_bytes()


# --- the program of 2023 ----------------------------------------------------------------------------------------------


def test_a_llama_in_the_form_of_2023(spm: bytes, tmp_path: Path) -> None:
    source = wide_hf(tmp_path / "hf", "llama", vocab_size=330)
    (source / "tokenizer.model").write_bytes(spm)
    out = convert(source, tmp_path / "old", "mistral", tokenizer=True, profile="one-file-ref-2023")
    params = json.loads((out / "params.json").read_text())
    assert len(params) == 9
    assert params["sliding_window"] == load(source).config.max_position_embeddings
    model = mistral_2023.load_2023(out)
    assert furthest(mistral.logits(model, TOKENS), theirs(source)) < CLOSE
    answer = mistral_2023.run_2023(out, TOKENS, 60)
    again = convert(out, tmp_path / "again", "hf", tokenizer=True)
    for folder in (source, again):
        assert say(load(folder), TOKENS) == answer[: len(say(load(folder), TOKENS))]
    assert {p.name for p in out.iterdir()} == {
        "consolidated.00.pth", "params.json", "tokenizer.model", "quantkit.json", "README.md",
    }  # fmt: skip


def test_a_later_tokenizer_gets_the_name_of_2023(spm: bytes, tmp_path: Path) -> None:
    source = make_native(tmp_path / "native", vocab_size=330, params_extra={"sliding_window": 6})
    (source / "tokenizer.model.v1").write_bytes(spm)
    out = convert(source, tmp_path / "old", "mistral", tokenizer=True, profile="one-file-ref-2023")
    assert (out / "tokenizer.model").read_bytes() == spm
    assert not (out / "tokenizer.model.v1").exists()
    assert len(mistral_2023.run_2023(out, TOKENS, 3)) == 3


@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ({"params_extra": {"rope_theta": 1e6, "sliding_window": 6}}, "rope_theta 1e\\+06"),
        ({"params_extra": THETA}, "rope_theta"),
        ({}, "rope_theta"),  # by rule
        ({"experts": 2, "params_extra": {"sliding_window": 6}}, "mixture of experts"),
        ({"tied": True, "params_extra": {"sliding_window": 6}}, "head that is the embedding"),
        ({"n_layers": 4, "params_extra": {"rope_theta": 1e4, "sliding_window": [None, 6]}}, "differ between layers"),
    ],
    ids=["base", "base, no window", "no base", "experts", "tied", "windows that differ"],
)
def test_what_the_program_of_2023_cannot_run_is_refused(shape: dict[str, Any], match: str, tmp_path: Path) -> None:
    source = make_native(tmp_path / "native", **shape)
    hf = convert(source, tmp_path / "hf", "hf")
    for folder in (source, hf):
        with pytest.raises(SourceError, match=match):
            convert(folder, tmp_path / "out", "mistral", profile="one-file-ref-2023")
    assert not (tmp_path / "out").exists()


def test_what_the_native_layout_cannot_say_is_refused(tmp_path: Path) -> None:
    for i, changes in enumerate([
        {"attention_bias": True}, {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                             "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    ]):  # fmt: skip
        source = make_tiny("llama", tmp_path / f"hf {i}", **changes)
        with pytest.raises(SourceError):
            convert(source, tmp_path / "out", "mistral")
    for name in ("qwen2", "gpt2"):
        with pytest.raises(SourceError):
            convert(make_tiny(name, tmp_path / name), tmp_path / "out", "mistral")
    with pytest.raises(UsageError, match=r"params\.json"):
        convert(make_tiny("llama", tmp_path / "plain"), tmp_path / "out", "mistral", native={"rope_theta": 1e4})


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_line(spm: bytes, tmp_path: Path, quantkit: Run) -> None:
    source = wide_native(tmp_path / "native", vocab_size=330, params_extra={"sliding_window": 5})
    (source / "tokenizer.model").write_bytes(spm)
    done = quantkit("convert", source, "-o", tmp_path / "hf", "--to", "hf", "--context", 64, "--max-shard-size", "60kB")
    assert done.returncode == 0, done.stderr
    assert furthest(theirs(tmp_path / "hf"), ours(source)) < CLOSE
    assert config_of(tmp_path / "hf")["max_position_embeddings"] == 64
    done = quantkit(
        "convert", tmp_path / "hf", "-o", tmp_path / "back", "--to", "mistral", "--profile", "one-file-ref-2023"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "back" / "params.json").read_text()) == json.loads(
        (source / "params.json").read_text()
    )
    assert "21 tensors mapped back, each equal to the source bit for bit" in done.stdout
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == spm
    found = quantkit("verify", tmp_path / "back", "--source", tmp_path / "hf")
    assert found.returncode == 0
    assert "sound" in found.stdout
    assert "21 tensors compared" in found.stdout  # that is what was asked for
    shutil.copyfile(source / "consolidated.safetensors", tmp_path / "back" / "consolidated.safetensors")
    assert quantkit("verify", tmp_path / "back", "--source", tmp_path / "hf").returncode == 3
