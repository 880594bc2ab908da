"""What can be wrong with a native folder to convert: three lines that say what, where and what instead; exit code 2;
the source as it was, and no output folder. And what is assumed is said.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_inputs import LFS_POINTER, Payload, Spoil, write
from convert_inputs import (
    DIM,
    ENCODER,
    ESCAPES,
    FP8,
    GONE,
    HEAD_DIM,
    INDEX,
    NORM,
    ONE_FILE,
    PARAMS_FILE,
    PTH,
    SHARD,
    SPM,
    THETA,
    VISION,
    W1,
    WO,
    WQ,
    Program,
    W,
    added,
    assert_same,
    both,
    canonical,
    cast,
    elsewhere,
    enormous,
    hf_name,
    lost,
    params,
    pickled,
    pipe,
    refiled,
    remove,
    same,
    shaped,
    truncated,
    twice,
    written,
)
from oracle.native_models import make_native
from safetensors.torch import load_file
from tokenization.protobuf import spm


def test_the_models_are_one(models: Path, tmp_path: Path, program: Program) -> None:
    """What is spoiled below is sound before, and our own words about the layouts are those of the program."""
    wanted = load_file(models / "hf/model.safetensors")
    for name in ("native", "llama"):
        program.converts(models / name, tmp_path / name, "--to", "hf")
        assert_same(load_file(tmp_path / name / "model.safetensors"), wanted)
    program.converts(models / "hf", tmp_path / "hf", "--to", "mistral")
    assert_same(load_file(tmp_path / "hf/consolidated.safetensors"),
                load_file(models / "native/consolidated.safetensors"))  # fmt: skip
    assert (tmp_path / "native/LICENSE").read_text() == "mine"


BAD_NATIVE: dict[str, tuple[Spoil, str, str]] = {
    "pth beside safetensors": (
        write("consolidated.00.pth", "x"),
        "consolidated.00.pth and consolidated.safetensors are both there",
        "",
    ),
    "numbered beside single": (write(SHARD.format(1), "x"), "are both there", ""),
    "pt beside pth": (both(pickled(), write("consolidated.00.pt", "x")), "are both there", ""),
    "no weights": (remove(ONE_FILE), "no consolidated weights", ""),
    "no params": (remove(PARAMS_FILE), "no params.json", ""),
    "params are no JSON": (write("params.json", "{'dim': 64}"), "params.json is not valid JSON", PARAMS_FILE),
    "params are no text": (write("params.json", b"\xff\xfe"), "params.json is not valid JSON", PARAMS_FILE),
    "params are huge": (enormous, "params.json is larger than", PARAMS_FILE),
    "params are a list": (write("params.json", "[64, 2]"), "params.json holds list, not an object", PARAMS_FILE),
    "params are nested deeply": (write("params.json", '{"a":' * 9999), "nested too deeply", PARAMS_FILE),
    "a key twice": (write("params.json", '{"dim": 64, "dim": 32}'), "the key 'dim' stands twice", PARAMS_FILE),
    "params are a folder": (
        both(remove(PARAMS_FILE), lambda f: (f / "params.json").mkdir()),
        "not a file",
        PARAMS_FILE,
    ),
    "params are a pipe": (pipe, "params.json is not a file", PARAMS_FILE),
    "params lie elsewhere": (
        elsewhere(PARAMS_FILE),
        "params.json is a symbolic link that leaves the folder",
        PARAMS_FILE,
    ),
    "weights lie elsewhere": (elsewhere(ONE_FILE), "symbolic link that leaves", ONE_FILE),
    "tokenizer lies elsewhere": (elsewhere("tokenizer.model"), "symbolic link that leaves", "tokenizer.model"),
    "unknown key": (params(head_dims=16), "unknown key 'head_dims' in params.json", PARAMS_FILE),
    "unknown key that escapes": (params(**{ESCAPES: 1}), "unknown key '\\x1b[2J\\x9b\\n\\u202e'", PARAMS_FILE),
    "NaN for a size": (params(dim=float("nan")), "dim is nan", PARAMS_FILE),
    "NaN for epsilon": (params(norm_eps=float("nan")), "norm_eps is nan", PARAMS_FILE),
    "infinite theta": (params(rope_theta=float("inf")), "rope_theta is inf", PARAMS_FILE),
    "negative theta": (params(rope_theta=-1e6), "rope_theta is -1000000.0", PARAMS_FILE),
    "theta in quotes": (params(rope_theta="1e6"), "rope_theta is '1e6'", PARAMS_FILE),
    "window in quotes": (params(sliding_window="4096"), "sliding_window is '4096', which is no size", PARAMS_FILE),
    "window is zero": (params(sliding_window=0), "sliding_window is 0", PARAMS_FILE),
    "two windows": (params(sliding_window=16, _sliding_window=32), "_sliding_window is 32 but", PARAMS_FILE),
    "windows do not repeat": (params(sliding_window=[16, None, None]), "has 3 entries", PARAMS_FILE),
    "no dim": (params(dim=GONE), "dim is missing from params.json", PARAMS_FILE),
    "dim is negative": (params(dim=-64), "dim is -64, which is no size", PARAMS_FILE),
    "dim is zero": (params(dim=0), "dim is 0, which is no size", PARAMS_FILE),
    "dim is huge": (params(dim=10**30), "which is no size", PARAMS_FILE),
    "dim is large": (params(dim=2**31 - 1), "params.json makes it [320, 2147483647]", ""),
    "vocabulary is large": (params(vocab_size=2**31 - 1), "params.json makes it [2147483647, 64]", ""),
    "vocabulary is negative": (params(vocab_size=-1), "vocab_size is -1, which is no size", PARAMS_FILE),
    "layers without end": (params(n_layers=2**31 - 1), "no model has so many layers", PARAMS_FILE),
    "more layers": (params(n_layers=65536), "tensor 'layers.2.attention_norm.weight' is missing", ""),
    "fewer layers": (params(n_layers=1), "", ""),
    "experts without end": (params(moe={"num_experts": 2**31 - 1, "num_experts_per_tok": 2}), "has no place", ""),
    "dim is true": (params(dim=True), "dim is True, which is no size", PARAMS_FILE),
    "layers are true": (params(n_layers=True), "n_layers is True", PARAMS_FILE),
    "heads are a fraction": (params(n_heads=4.0), "n_heads is 4.0", PARAMS_FILE),
    "odd head_dim": (params(head_dim=15), "head_dim is 15, an odd number", PARAMS_FILE),
    "head_dim does not fit": (params(head_dim=24), "no whole heads of 24 rows", ONE_FILE),
    "heads do not fit": (params(n_heads=8), "params.json makes it", ""),
    "key/value heads do not divide": (params(n_kv_heads=3), "n_kv_heads is 3, which does not divide", PARAMS_FILE),
    "key/value heads left out": (params(n_kv_heads=GONE), "'layers.0.attention.wk.weight' is [32, 64]", ""),
    "wq": (shaped(WQ, 48, DIM), f"tensor '{WQ}' is [48, 64], params.json makes it [64, 64] (4 heads, 2 for", ""),
    "wq in broken heads": (shaped(WQ, 60, DIM), "no whole heads of 16 rows", ONE_FILE),
    "wq flat": (shaped(WQ, DIM * DIM), "no whole heads of 16 rows", ONE_FILE),
    "wk": (
        shaped(W.format("wk"), 64, DIM),
        f"tensor '{W.format('wk')}' is [64, 64], params.json makes it [32, 64]",
        "",
    ),
    "wv": (
        shaped(W.format("wv"), 64, DIM),
        f"tensor '{W.format('wv')}' is [64, 64], params.json makes it [32, 64]",
        "",
    ),
    "wo": (shaped(WO, DIM, 32), f"tensor '{WO}' is [64, 32], params.json makes it [64, 64]", ""),
    "w1 turned": (shaped(W1, DIM, 96), f"tensor '{W1}' is [64, 96], params.json makes it [96, 64]", ""),
    "norm": (shaped(NORM, 63), f"tensor '{NORM}' is [63], params.json makes it [64]", ""),
    "norm of two sides": (shaped(NORM, 1, 64), f"tensor '{NORM}' is [1, 64], params.json makes it [64]", ""),
    "embedding": (shaped("tok_embeddings.weight", 319, DIM), "is [319, 64], params.json makes it [320, 64]", ""),
    "tensor missing": (lost(W1), f"tensor '{W1}' is missing", ""),
    "head missing": (lost("output.weight"), "tensor 'output.weight' is missing", ""),
    "tensor unknown": (added("layers.0.attention.wz.weight"), "'layers.0.attention.wz.weight' has no place", ONE_FILE),
    "bias": (added("layers.0.attention.wq.bias"), "'layers.0.attention.wq.bias' has no place", ONE_FILE),
    "tensor of the other layout": (added("model.norm.weight"), "'model.norm.weight' has no place", ONE_FILE),
    "tensor of a layer that is none": (
        added("layers.00.ffn_norm.weight"),
        "'layers.00.ffn_norm.weight' has no place",
        ONE_FILE,
    ),
    "tensor that escapes": (added(ESCAPES), "tensor '\\x1b[2J\\x9b\\n\\u202e' has no place", ONE_FILE),
    "experts of a dense model": (added("layers.0.feed_forward.experts.0.w1.weight", 96, DIM), "has no place", ONE_FILE),
    "raw pickle": (pickled(lambda f: pickle.dumps({"a": 1})), "before torch 1.6", PTH),
    "truncated pth": (truncated, "", PTH),
    "empty pth": (pickled(lambda f: b""), "", PTH),
    "pth is a pointer": (pickled(lambda f: LFS_POINTER.encode()), "Git LFS pointer", PTH),
    "safetensors is a pointer": (write(ONE_FILE, LFS_POINTER), "Git LFS pointer", ONE_FILE),
    "a middle .pt is missing": (
        refiled("pt-shards", without=("consolidated.03.pt",)),
        "number 3 is missing (7 of 8",
        "",
    ),
    "the first .pt is missing": (
        refiled("pt-shards", without=("consolidated.00.pt",)),
        "number 0 is missing (7 of 8",
        "",
    ),
    "the last .pt is missing": (refiled("pt-shards", without=("consolidated.07.pt",)), "is missing", ""),
    "a middle part is missing": (
        refiled("safetensors-shards", without=(SHARD.format(2),)),
        "number 2 is missing (2 of 3",
        "",
    ),
    "the last part is missing": (
        refiled("safetensors-shards", without=(SHARD.format(3),)),
        "number 3 is missing (2 of 3",
        "",
    ),
    "parts of two downloads": (
        both(
            refiled("safetensors-shards", without=(INDEX,)),
            lambda f: (f / SHARD.format(1)).rename(f / "consolidated-00001-of-00002.safetensors"),
        ),
        "",
        "",
    ),
    "index names an absent file": (
        refiled("safetensors-shards", index={WQ: SHARD.format(4)}),
        f"the index places tensor '{WQ}'",
        "",
    ),
    "index names another file": (
        refiled("safetensors-shards", index={"norm.weight": "x.safetensors"}),
        "the index places tensor 'norm.weight'",
        "",
    ),
    "index climbs": (
        refiled("safetensors-shards", index={WQ: "../x.safetensors"}),
        "'../x.safetensors' is not a plain file name",
        "",
    ),
    "index names a pickle": (refiled("safetensors-shards", index={WQ: "x.pth"}), "placed in 'x.pth'", INDEX),
    "index has too many": (
        refiled("safetensors-shards", index={"extra": SHARD.format(1)}),
        "the index places tensor 'extra'",
        "",
    ),
    "index has too few": (refiled("safetensors-shards", index={WQ: ""}), "but not in the index", ""),
    "tensor in two .pt": (
        twice("pt-shards", "consolidated.00.pt", "consolidated.05.pt"),
        "is stored twice",
        "consolidated.05.pt",
    ),
    "tensor in two parts": (
        twice("safetensors-shards", SHARD.format(1), SHARD.format(3)),
        "is stored twice",
        SHARD.format(3),
    ),
    "image encoder in params": (params(vision_encoder=ENCODER), "has an image or audio encoder", PARAMS_FILE),
    "image encoder in weights": (added(VISION, DIM, DIM), f"tensor '{VISION}' belongs to a vision part", ONE_FILE),
    "FP8 without scale": (cast(W1, FP8), f"tensor '{W1}' is F8_E4M3 without a scale", ONE_FILE),
    "FP8 of the other kind": (
        cast(W1, torch.float8_e5m2, qscale_weight=torch.ones(1)),
        f"tensor '{W1}' is F8_E5M2 without a scale",
        ONE_FILE,
    ),
    "FP8 with scales of blocks": (
        cast(W1, FP8, qscale_weight=torch.ones(6, 4)),
        "qscale_weight' is F32 [6, 4]: neither one scale nor one for each row",
        ONE_FILE,
    ),
    "FP8 with as many scales of blocks as rows": (
        cast(W1, FP8, qscale_weight=torch.ones(24, 4)),
        "qscale_weight' is F32 [24, 4]",
        ONE_FILE,
    ),
    "FP8 with scales of columns": (
        cast(WQ, FP8, qscale_weight=torch.ones(1, 64)),
        "qscale_weight' is F32 [1, 64]",
        ONE_FILE,
    ),
    "FP8 with one scale too few": (cast(W1, FP8, qscale_weight=torch.ones(95)), "is F32 [95]", ONE_FILE),
    "FP8 with integer scales": (cast(W1, FP8, qscale_weight=torch.ones(1, dtype=torch.int32)), "is I32 [1]", ONE_FILE),
    "integers": (cast(W1, torch.int8), "I8", ""),
    "integers for an embedding": (cast("tok_embeddings.weight", torch.int32), "I32", ""),
    "tokenizer missing": (remove("tokenizer.model"), "the folder has no tokenizer", ""),
    "two tokenizers": (
        write("tokenizer.model.v3", spm([("a", -1.0, 1)])),
        "tokenizer.model and tokenizer.model.v3 are both there",
        "",
    ),
    "two kinds of tokenizer": (write("tekken.json", "{}"), "tekken.json and tokenizer.model are both there", ""),
    "tokenizer damaged": (write("tokenizer.model", SPM[:-40] + b"\xff" * 40), "", "tokenizer.model"),
    "tokenizer truncated": (write("tokenizer.model", SPM[:1000]), "", "tokenizer.model"),
    "tokenizer empty": (write("tokenizer.model", b""), "", "tokenizer.model"),
    "tokenizer is a pointer": (write("tokenizer.model", LFS_POINTER), "Git LFS pointer", "tokenizer.model"),
    "tokenizer too large": (
        write("tokenizer.model", spm([(f"a{i}", -1.0, 1) for i in range(99)])),
        "358 tokens, more than the 320 of the model",
        "tokenizer.model",
    ),
    "tekken is no JSON": (both(remove("tokenizer.model"), write("tekken.json", "{")), "not valid JSON", "tekken.json"),
    "tekken is empty": (
        both(remove("tokenizer.model"), write("tekken.json", "{}")),
        "no config or no vocab",
        "tekken.json",
    ),
    "name that escapes": (write("LICENSE-\x1b[2J", "x"), "'LICENSE-\\x1b[2J' is not a plain file name", ""),
}


@pytest.mark.parametrize("to", ["hf", "mistral"])
@pytest.mark.parametrize(("spoil", "what", "place"), BAD_NATIVE.values(), ids=BAD_NATIVE)
def test_a_bad_native_folder_is_refused(
    spoil: Spoil, what: str, place: str, to: str, native: Path, out: Path, program: Program
) -> None:
    spoil(native)
    refusal = program.refuses(native, out, "--to", to)
    assert str(native) in refusal.where or refusal.where == "config.json"
    if to == "hf" or "token" not in what + place:  # which of two tokenizers fits is asked for this layout alone
        assert what in refusal.what
        assert refusal.where.endswith(place)


@pytest.mark.parametrize("value", [{"num_experts": 4}, [], "x", {"num_experts": 0, "num_experts_per_tok": 2}, True,
                                   {"num_experts": 2, "num_experts_per_tok": 3}, {"num_expert": 2}])  # fmt: skip
def test_a_bad_mixture_is_refused(value: Any, native: Path, out: Path, program: Program) -> None:
    params(moe=value)(native)
    refusal = program.refuses(native, out, "--to", "hf")
    assert "moe" in refusal.what
    assert refusal.where == str(native / "params.json")


def test_stacked_experts_in_fp8_are_refused(tmp_path: Path, out: Path, program: Program) -> None:
    """They have no scale that this program reads; without one the numbers are others."""
    folder = make_native(tmp_path / "moe", experts=4, megablocks=True, params_extra=THETA)
    cast("layers.0.block_sparse_moe.w1", FP8)(folder)
    assert "F8_E4M3" in program.refuses(folder, out, "--to", "hf", "--no-tokenizer").what


def test_stacked_experts_of_another_number_are_refused(tmp_path: Path, out: Path, program: Program) -> None:
    folder = make_native(tmp_path / "moe", experts=4, megablocks=True, params_extra=THETA)
    params(moe={"num_experts": 2, "num_experts_per_tok": 2})(folder)
    refusal = program.refuses(folder, out, "--to", "hf", "--no-tokenizer")
    assert "params.json makes it [192, 64]" in refusal.what


def test_a_tied_head_that_is_another_is_not_dropped_in_silence(native: Path, out: Path, program: Program) -> None:
    """tied_embeddings beside an output.weight that is not the embedding: mistral-inference would use the one, vLLM the
    other. Refused, or at least said."""
    params(tied_embeddings=True)(native)
    code, _, stderr = program.run("convert", native, "-o", out, "--to", "hf", "--quiet")
    assert code in (0, 2)
    assert "output.weight" in stderr


class Shell:
    """Pickles as a call of os.system."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["consolidated.00.pth", "consolidated.00.pt"])
@pytest.mark.parametrize("payload", [Shell, Payload])
@pytest.mark.parametrize("form", ["zip", "bare", "beside weights"])
def test_a_pickle_is_not_run(
    form: str, payload: type, name: str, native: Path, out: Path, tmp_path: Path, program: Program
) -> None:
    marker = tmp_path / "executed"
    weights = load_file(native / "consolidated.safetensors")
    (native / "consolidated.safetensors").unlink()
    if form == "bare":
        (native / name).write_bytes(pickle.dumps(payload(marker)))
    else:
        torch.save({**(weights if form == "beside weights" else {}), "a": payload(marker)}, native / name)
    refusal = program.refuses(native, out, "--to", "hf")
    assert ("before torch 1.6" if form == "bare" else "posix.") in refusal.what
    assert refusal.where == str(native / name)
    assert not marker.exists()


def test_no_theta_beside_a_window_is_v01(native: Path, out: Path, program: Program) -> None:
    params(rope_theta=GONE, sliding_window=64)(native)
    stderr = program.converts(native, out, "--to", "hf")
    assert "10000 is taken" in stderr
    assert "--rope-theta" in stderr
    table = written(out)
    assert table["rope_theta"] == table["rope_parameters"]["rope_theta"] == 10000
    assert table["sliding_window"] == 64


def test_no_theta_is_a_million_and_a_warning(native: Path, out: Path, program: Program) -> None:
    params(rope_theta=GONE)(native)
    stderr = program.converts(native, out, "--to", "hf")
    assert "1000000 is taken" in stderr
    assert "--rope-theta" in stderr
    assert written(out)["rope_theta"] == 1e6


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("to", ["hf", "mistral"])
def test_theta_can_be_said(window: int | None, to: str, native: Path, out: Path, program: Program) -> None:
    params(rope_theta=GONE, sliding_window=window)(native)
    stderr = program.converts(native, out, "--to", to, "--rope-theta", 5000)
    assert "rope_theta" not in stderr
    assert written(out, "config.json" if to == "hf" else "params.json")["rope_theta"] == 5000


@pytest.mark.parametrize("layout", ["native", "llama"])
def test_theta_cannot_be_contradicted(layout: str, request: pytest.FixtureRequest, out: Path, program: Program) -> None:
    source = request.getfixturevalue(layout)
    params(rope_theta=1e6)(source)
    refusal = program.refuses(source, out, "--to", "hf", "--rope-theta", 10000)
    assert "rope_theta is 1e+06 in params.json, not 10000" in refusal.what
    assert "--rope-theta" in refusal.hint
    program.converts(source, out, "--to", "hf", "--rope-theta", 1000000)


@pytest.mark.parametrize("key", ["max_seq_len", "max_position_embeddings"])
def test_context_cannot_be_contradicted(key: str, native: Path, out: Path, program: Program) -> None:
    params(**{key: 2048})(native)
    refusal = program.refuses(native, out, "--to", "hf", "--context", 4096)
    assert "2,048" in refusal.what
    assert "--context" in refusal.hint
    program.converts(native, out, "--to", "hf", "--context", 2048)
    assert written(out)["max_position_embeddings"] == 2048


def test_llamas_context_cannot_be_contradicted(llama: Path, out: Path, program: Program) -> None:
    params(max_seq_len=2048)(llama)
    assert "--context" in program.refuses(llama, out, "--to", "hf", "--context", 4096).hint


@pytest.mark.parametrize("layout", ["native", "llama"])
def test_context_is_assumed_with_a_word(
    layout: str, request: pytest.FixtureRequest, out: Path, tmp_path: Path, program: Program
) -> None:
    source = request.getfixturevalue(layout)
    assert "--context" in program.converts(source, out, "--to", "hf")
    assert "context" not in program.converts(source, tmp_path / "said", "--to", "hf", "--context", 8192)
    assert written(tmp_path / "said")["max_position_embeddings"] == 8192


@pytest.mark.parametrize("in_weights", [True, False])
def test_text_only_leaves_the_encoder_out(in_weights: bool, native: Path, out: Path, program: Program) -> None:
    wanted = canonical(load_file(native / "consolidated.safetensors"), HEAD_DIM)
    if in_weights:
        both(added(VISION, DIM, DIM), added("patch_merger.merging_layer.weight", DIM, DIM))(native)
    params(vision_encoder=ENCODER)(native)
    stderr = program.converts(native, out, "--to", "hf", "--text-only")
    assert "vision_encoder was left aside" in stderr
    assert ("the vision part is left out: 2 tensors" in stderr) is in_weights
    assert_same(load_file(out / "model.safetensors"), wanted)
    dropped = written(out, "quantkit.json")["source"]["dropped"]
    assert sorted(dropped) == (["patch_merger.merging_layer.weight", VISION] if in_weights else [])


def test_a_scale_of_a_weight_that_is_not_fp8_is_not_dropped_in_silence(
    native: Path, out: Path, program: Program
) -> None:
    """It is in the file, and not in what is made of it."""
    added("layers.0.attention.wq.qscale_weight", 1)(native)
    code, _, _ = program.run("convert", native, "-o", out, "--to", "hf", "--quiet")
    assert code == 2 or "layers.0.attention.wq.qscale_weight" in written(out, "quantkit.json")["source"]["dropped"]


@pytest.mark.parametrize("shape", [(), (1,), (96,), (96, 1)])
def test_fp8_with_a_scale_is_decoded(shape: tuple[int, ...], native: Path, out: Path, program: Program) -> None:
    scale = torch.full(shape, 0.5) + torch.arange(max(1, torch.Size(shape).numel())).reshape(shape) / 128
    cast(W1, FP8, qscale_weight=scale)(native)
    stored = load_file(native / "consolidated.safetensors")[W1].float()
    assert "FP8" in program.converts(native, out, "--to", "hf")
    rows = scale.reshape(-1, 1) if scale.dim() else scale
    assert same(load_file(out / "model.safetensors")[hf_name(W1)], (stored * rows).bfloat16())
