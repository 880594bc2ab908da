"""The native oracle against transformers, against trained models, and against itself in every form of file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import mistral, mistral_2023
from oracle.native_models import make_native, save_weights
from torch import Tensor

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason=f"trained models in {SHARED} are absent")

DIM, HEADS, KV, HEAD_DIM, HIDDEN, VOCAB = 40, 4, 2, 16, 72, 64  # 16 is not 40 / 4
TOKENS = [(7 * t * t + 3 * t + 5) % VOCAB for t in range(24)]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}

# HF model type, its config, what params.json says of it, the RoPE base
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], float]] = {
    "base by rule 1e6": ("mistral", {"sliding_window": None}, {}, 1e6),
    "base stated": ("mistral", {"sliding_window": None}, {"rope_theta": 500.0}, 500.0),
    "window, base by rule 1e4": ("mistral", {"sliding_window": 5}, {"sliding_window": 5}, 1e4),
    "window as text": ("mistral", {"sliding_window": 5}, {"sliding_window": "5", "rope_theta": 1e6}, 1e6),
    "tied": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}, {"tied_embeddings": True}, 1e6),
    "windowed layers": (
        "ministral",
        {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"] * 2, "num_hidden_layers": 4},
        {"n_layers": 4, "_sliding_window": [None, 5], "rope_theta": 1e4},
        1e4,
    ),
    "experts": ("mixtral", {"sliding_window": None, "num_local_experts": 4}, {"moe": EXPERTS}, 1e6),
}


def hf_model(case: str) -> Any:
    import transformers

    model_type, changes, _, theta = CASES[case]
    config = {
        "hidden_size": DIM, "intermediate_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": HEADS,
        "num_key_value_heads": KV, "head_dim": HEAD_DIM, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta}, "attn_implementation": "eager",
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(model_type, **{**config, **changes})
    ).float()
    with torch.no_grad():
        for parameter in model.parameters():  # wide enough for attention to choose
            parameter.normal_(0, 0.2) if parameter.dim() > 1 else parameter.normal_(1, 0.2)
    return model.eval()


def native_rows(weight: Tensor) -> Tensor:
    """HF's q or k → native: in each head, HF row c · D/2 + j is native row 2j + c."""
    rows = torch.empty_like(weight)
    for head in range(len(weight) // HEAD_DIM):
        for j in range(HEAD_DIM // 2):
            for c in (0, 1):
                rows[head * HEAD_DIM + 2 * j + c] = weight[head * HEAD_DIM + c * HEAD_DIM // 2 + j]
    return rows


def as_they_are(weight: Tensor) -> Tensor:
    return weight


NAMES = {
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
    "mlp.gate": "feed_forward.gate",
}  # fmt: skip


def write_native(folder: Path, model: Any, case: str, order: Callable[[Tensor], Tensor], **params: Any) -> Path:
    weights = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().clone()
        if not name.startswith("model.layers."):
            new = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight"}
            weights[new.get(name, "output.weight")] = tensor
            continue
        _, _, i, rest = name.split(".", 3)
        if rest == "mlp.experts.gate_up_proj":  # [E, 2F, H], in memory only
            for e in range(len(tensor)):
                weights[f"layers.{i}.feed_forward.experts.{e}.w1.weight"] = tensor[e, :HIDDEN].clone()
                weights[f"layers.{i}.feed_forward.experts.{e}.w3.weight"] = tensor[e, HIDDEN:].clone()
        elif rest == "mlp.experts.down_proj":  # [E, H, F]
            for e in range(len(tensor)):
                weights[f"layers.{i}.feed_forward.experts.{e}.w2.weight"] = tensor[e].clone()
        else:
            is_rotated = rest in ("self_attn.q_proj.weight", "self_attn.k_proj.weight")
            weights[f"layers.{i}.{NAMES[rest.removesuffix('.weight')]}.weight"] = (
                order(tensor) if is_rotated else tensor
            )
    if model.config.tie_word_embeddings:
        weights.pop("output.weight", None)
    common = {
        "dim": DIM, "n_layers": 2, "head_dim": HEAD_DIM, "hidden_dim": HIDDEN, "n_heads": HEADS, "n_kv_heads": KV,
        "norm_eps": 1e-5, "vocab_size": VOCAB,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps({**common, **CASES[case][2], **params}))
    save_weights(folder, weights, "safetensors")
    return folder


@torch.no_grad()
def difference(model: Any, folder: Path) -> float:
    theirs = model(torch.tensor([TOKENS])).logits[0]
    return float((mistral.logits(mistral.load_native(folder), TOKENS) - theirs).abs().max())


@pytest.mark.parametrize("case", CASES)
def test_same_logits_as_transformers(case: str, tmp_path: Path) -> None:
    model = hf_model(case)
    assert difference(model, write_native(tmp_path, model, case, native_rows)) < 1e-4


@pytest.mark.parametrize(
    ("case", "order", "params"),
    [
        ("base stated", as_they_are, {}),
        ("base stated", lambda w: native_rows(native_rows(w)), {}),
        ("base stated", native_rows, {"rope_theta": 1e4}),
        ("base stated", native_rows, {"norm_eps": 1e-2}),
        ("window, base by rule 1e4", native_rows, {"sliding_window": 6}),
        ("window, base by rule 1e4", native_rows, {"sliding_window": None}),
        ("windowed layers", native_rows, {"_sliding_window": [5, None]}),
        ("experts", native_rows, {"moe": {**EXPERTS, "num_experts_per_tok": 1}}),
    ],
    ids=["rows in HF's order", "permuted twice", "base", "eps", "window", "no window", "other layers", "top 1"],
)
def test_a_mistake_shows(case: str, order: Callable[[Tensor], Tensor], params: dict[str, Any], tmp_path: Path) -> None:
    """A hundred times the tolerance, and that is the mildest of them."""
    model = hf_model(case)
    assert difference(model, write_native(tmp_path, model, case, order, **params)) > 1e-2


@pytest.mark.parametrize("shape", [{}, {"tied": True, "dtype": "float16"}, {"experts": 3}, {"n_kv_heads": 4}])
def test_every_form_of_file_gives_the_same_logits(shape: dict[str, Any], tmp_path: Path) -> None:
    forms = ("safetensors", "pth", "pt-shards", "safetensors-shards")
    models = {form: mistral.load_native(make_native(tmp_path / form, files=form, **shape)) for form in forms}
    expected = mistral.logits(models["safetensors"], TOKENS)
    assert expected.std() > 0.1
    for form in forms:
        assert torch.equal(mistral.logits(models[form], TOKENS), expected), form
    other = mistral.load_native(make_native(tmp_path / "other", seed=1, **shape))
    assert (mistral.logits(other, TOKENS) - expected).abs().max() > 0.1


def test_stacked_experts_are_the_same_experts(tmp_path: Path) -> None:
    apart = mistral.load_native(make_native(tmp_path / "apart", experts=3))
    stacked = mistral.load_native(make_native(tmp_path / "stacked", experts=3, megablocks=True, files="pt-shards"))
    assert "layers.0.block_sparse_moe.w1" in stacked.weights
    torch.testing.assert_close(mistral.logits(stacked, TOKENS), mistral.logits(apart, TOKENS), rtol=0, atol=1e-12)


def test_what_is_missing_left_over_or_twice_is_refused(tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match):
            mistral.load_native(tmp_path)

    params, weights = tmp_path / "params.json", tmp_path / "consolidated.safetensors"
    whole = mistral.read_weights(make_native(tmp_path))
    save_weights(tmp_path, {k: v for k, v in whole.items() if "layers.1.attention.wv" not in k}, "safetensors")
    refused("layers.1.attention.wv")
    save_weights(tmp_path, {**whole, "rope.freqs": torch.ones(8)}, "safetensors")
    refused("rope.freqs")
    save_weights(tmp_path, {**whole, "norm.weight": torch.ones(63)}, "safetensors")
    refused("norm.weight")
    save_weights(tmp_path, whole, "safetensors")
    save_weights(tmp_path, whole, "pth")
    refused("in 2 forms")
    weights.unlink()
    torch.save({"norm.weight": torch.ones(64)}, tmp_path / "consolidated.01.pth")
    refused("were in an earlier file")
    (tmp_path / "consolidated.01.pth").unlink()
    said = json.loads(params.read_text())
    for change, match in [
        ({"yarn": {}}, "yarn"),
        ({"tied_embeddings": True}, "contradict"),
        ({"sliding_window": 4, "_sliding_window": 4}, "both"),
        ({"sliding_window": [4, None, 4]}, "3 windows"),
    ]:
        params.write_text(json.dumps({**said, **change}))
        refused(match)


def test_2023_takes_its_nine_keys_and_one_file(tmp_path: Path) -> None:
    def folder(name: str, *, without: str = "", **options: Any) -> Path:
        made = make_native(tmp_path / name, **{"files": "pth", "params_extra": {"sliding_window": 6}, **options})
        params = json.loads((made / "params.json").read_text())
        params.pop(without, None)
        (made / "params.json").write_text(json.dumps(params))
        return made

    good = folder("good")
    expected = mistral.logits(mistral.load_native(good), TOKENS)
    assert torch.equal(mistral.logits(mistral_2023.load_2023(good), TOKENS), expected)
    for name, extra in [
        ("theta", {"sliding_window": 6, "rope_theta": 1e4}),
        ("no", {}),
        ("null", {"sliding_window": None}),
    ]:
        with pytest.raises(TypeError):
            mistral_2023.load_2023(folder(name, params_extra=extra))
    with pytest.raises(TypeError, match="n_kv_heads"):
        mistral_2023.load_2023(folder("kv", without="n_kv_heads"))
    with pytest.raises(FileNotFoundError):
        mistral_2023.load_2023(folder("safetensors", files="safetensors"))
    with pytest.raises(RuntimeError, match="output"):
        mistral_2023.load_2023(folder("tied", tied=True, without="tied_embeddings"))
    pytest.importorskip("sentencepiece")
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        mistral_2023.run_2023(good, TOKENS, 1)


def test_2023_counts_the_window_in_two_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The literal is what one_file_ref.py itself (c18d5b9, fp32 on a CPU) printed for this folder and prompt."""
    monkeypatch.setattr(mistral_2023, "tokens_2023", lambda folder, text: [])  # a folder without a tokenizer
    folder = make_native(tmp_path, files="pth", params_extra={"sliding_window": 6})
    printed = [77, 130, 140, 125, 9, 226, 172, 19, 175, 253, 192, 192, 160, 160, 160, 5]
    assert mistral_2023.run_2023(folder, TOKENS, 16) == printed
    assert mistral.greedy(mistral_2023.load_2023(folder), TOKENS, 16) != printed  # one window for prompt and answer


# What one_file_ref.py printed for stories15m after "Once upon a time": ", there was a little girl named Lily. She …"
STORY_2023 = [
    29892, 727, 471, 263, 2217, 7826, 4257, 365, 2354, 29889, 2296, 18012, 304, 1708, 5377, 297, 278, 6575, 845, 457,
    29889, 3118, 2462, 29892, 1183, 4446, 263, 4802, 29892, 2654, 8287, 297, 278, 14744, 29889, 739, 471, 278, 6575,
    29991,
]  # fmt: skip


@real
def test_2023_tells_the_same_story() -> None:
    pytest.importorskip("sentencepiece")
    folder = SHARED / "stories15m-mistral-src"
    prompt = mistral_2023.tokens_2023(folder, "Once upon a time")
    assert mistral_2023.run_2023(folder, prompt, 40) == STORY_2023
    with pytest.raises(TypeError, match="rope_theta"):
        mistral_2023.run_2023(SHARED / "stories260k-mistral-src", prompt, 1)


@real
@pytest.mark.parametrize("name", ["stories15m", "stories260k"])
def test_trained_models_speak(name: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = SHARED / f"{name}-mistral-src"
    prompt = mistral_2023.tokens_2023(folder, "Once upon a time")
    answer = mistral.greedy(mistral.load_native(folder), prompt, 60)
    text = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).decode(prompt + answer)
    print(text)
    assert text.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside")
    assert {"One", "day,", "she", "saw", "big,", "red", "wanted"} <= set(text.split())


def loss(model: mistral.NativeModel, texts: list[list[int]]) -> float:
    """Nats a token."""
    each = []
    for tokens in texts:
        known = torch.log_softmax(mistral.logits(model, tokens), dim=-1)
        each += [-float(known[t, tokens[t + 1]]) for t in range(len(tokens) - 1)]
    return sum(each) / len(each)


@real
@pytest.mark.parametrize(("name", "expected"), [("stories15m", 1.04), ("stories260k", 1.35)])
def test_trained_models_predict(name: str, expected: float) -> None:
    """Whole stories, each from its start. (A stream of them cut anywhere costs stories15m 1.5.)"""
    pytest.importorskip("sentencepiece")
    folder = SHARED / f"{name}-mistral-src"
    stories = (SHARED / "text" / "tinystories.txt").read_text().split("<|endoftext|>")[:4]
    texts = [mistral_2023.tokens_2023(folder, story.strip())[:256] for story in stories]
    model = mistral.load_native(folder)
    assert loss(model, texts) == pytest.approx(expected, abs=0.02)
    assert loss(replace(model, theta=1e6), texts) > expected + 0.5  # a base that is not the model's
    swapped = {**model.weights}
    for i in range(model.params["n_layers"]):  # rows in HF's order
        for w in ("wq", "wk"):
            heads = swapped[f"layers.{i}.attention.{w}.weight"].unflatten(0, (-1, model.params["head_dim"]))
            swapped[f"layers.{i}.attention.{w}.weight"] = torch.cat([heads[:, 0::2], heads[:, 1::2]], 1).flatten(0, 1)
    assert loss(replace(model, weights=swapped), texts) > expected + 2
