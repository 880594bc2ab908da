"""What can be wrong with a folder to convert, or with the command: three lines that say what, where and what instead;
exit code 2; the source as it was, and no output folder. And whatever strangers' JSON says: refused, or converted right.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from conftest import make_tiny
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from oracle.native_models import make_native
from safetensors.torch import load_file, save_file
from test_bad_inputs import LFS_POINTER, Payload, contents
from tokenization.protobuf import spm
from torch import Tensor

from quantkit import api
from quantkit.cli import main
from quantkit.errors import InputError, QuantkitError

Spoil = Callable[[Path], object]
HEADS, KEY_VALUE, HEAD_DIM, DIM, VOCABULARY = 4, 2, 16, 64, 320
GONE = object()  # a key to take out
INDEX = "consolidated.safetensors.index.json"
SPM = spm()  # 259 pieces
FP8 = torch.float8_e4m3fn
SHARD = "consolidated-0000{}-of-00003.safetensors"


class Refusal(NamedTuple):
    what: str
    where: str
    hint: str


def parse(stderr: str) -> tuple[list[str], Refusal]:
    """Warnings, and then the three lines and nothing but them; two where the fault lies in the command line."""
    assert "Traceback" not in stderr
    assert all(line.isprintable() for line in stderr.splitlines())
    lines = stderr.splitlines()
    warned = [line for line in lines if line.startswith("warning: ")]
    what, *rest = lines[len(warned) :] or [""]
    assert what.startswith("error: "), stderr
    where = rest.pop(0) if rest and rest[0].startswith("  in: ") else ""
    assert len(rest) == 1, f"no hint, or too much: {stderr}"
    assert rest[0].startswith("  hint: ")
    return warned, Refusal(what.removeprefix("error: "), where.removeprefix("  in: "), rest[0].removeprefix("  hint: "))


def is_pipe(folder: Path) -> bool:
    return any(p.is_fifo() for p in folder.iterdir())


class Program:
    """The command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def run(self, *arguments: object) -> tuple[int, str, str]:
        self.capsys.readouterr()  # what the test itself wrote, or a library it uses
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        assert isinstance(stop.value.code, int)
        return stop.value.code, *self.capsys.readouterr()

    def refuses(self, source: Path, out: Path, *options: object) -> Refusal:
        """`convert SOURCE -o OUT options` is refused with exit code 2, and touches nothing."""
        before = {} if is_pipe(source) else contents(source)
        there = contents(out) if out.is_dir() else None
        code, stdout, stderr = self.run("convert", source, "-o", out, *options, "--quiet")
        _, refusal = parse(stderr)
        assert (code, stdout) == (2, "")
        assert before == ({} if is_pipe(source) else contents(source))
        assert there == (contents(out) if out.is_dir() else None)
        return refusal

    def converts(self, source: Path, out: Path, *options: object) -> str:
        """The same, expected to work. What it warned of."""
        before = contents(source)
        code, _, stderr = self.run("convert", source, "-o", out, *options, "--quiet")
        assert code == 0, stderr
        assert before == contents(source)
        assert all(line.startswith("warning: ") and line.isprintable() for line in stderr.splitlines())
        return stderr


@pytest.fixture(autouse=True)
def _signals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the program's handlers are not for pytest


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    return Program(capsys)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# --- the same model in three layouts ----------------------------------------------------------------------------------

LAYERS = {
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip
WHOLE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
THETA = {"rope_theta": 1e6}
SIZES = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "intermediate_size": "hidden_dim",
         "num_attention_heads": "n_heads", "vocab_size": "vocab_size", "rms_norm_eps": "norm_eps"}  # fmt: skip


def hf_name(native: str) -> str:
    stem = native.removesuffix(".weight")
    if stem in WHOLE:
        return f"{WHOLE[stem]}.weight"
    _, layer, rest = stem.split(".", 2)
    return f"model.layers.{layer}.{LAYERS[rest]}.weight"


def halves(x: Tensor, head_dim: int) -> Tensor:
    """Rows of each head from pairs to halves."""
    return x.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def canonical(weights: Mapping[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """A dense native model's tensors as the Hugging Face layout has them."""
    return {hf_name(n): halves(x, head_dim) if n.endswith((".wq.weight", ".wk.weight")) else x
            for n, x in weights.items()}  # fmt: skip


def hf_config(params: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
        **{hf: params[native] for hf, native in SIZES.items()},
        "num_key_value_heads": params["n_kv_heads"], "head_dim": params["head_dim"],
        "rope_theta": params["rope_theta"], "max_position_embeddings": 512, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", **more,
    }  # fmt: skip


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """native, hf, llama (two shards of Meta's): one random model, to be copied before it is spoiled."""
    folder = tmp_path_factory.mktemp("models")
    native = make_native(folder / "native", vocab_size=VOCABULARY, params_extra=THETA)
    (native / "tokenizer.model").write_bytes(SPM)
    (native / "LICENSE").write_text("mine")
    params, weights = json.loads((native / "params.json").read_text()), load_file(native / "consolidated.safetensors")
    (folder / "hf").mkdir()
    save_file(canonical(weights, HEAD_DIM), folder / "hf/model.safetensors", metadata={"format": "pt"})
    (folder / "hf/config.json").write_text(json.dumps(hf_config(params)))
    (folder / "hf/tokenizer.model").write_bytes(SPM)
    make_meta(folder / "llama", weights)
    return folder


def make_meta(folder: Path, weights: Mapping[str, Tensor], *, shards: int = 2) -> Path:
    """Meta's layout: each of the shards has its share of every matrix, and the norms whole."""
    folder.mkdir()
    for i in range(shards):
        part = {}
        for name, x in weights.items():
            axis = 1 if name.endswith(("wo.weight", "w2.weight")) or name.startswith("tok_") else 0
            part[name] = x if x.dim() == 1 else x.chunk(shards, axis)[i].clone()
        torch.save({**part, "rope.freqs": torch.ones(8)}, folder / f"consolidated.{i:02}.pth")
    params = {"dim": DIM, "n_layers": 2, "n_heads": HEADS, "n_kv_heads": KEY_VALUE, "multiple_of": 32,
              "norm_eps": 1e-5, "vocab_size": -1}  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_bytes(SPM)
    return folder


@pytest.fixture
def native(models: Path, tmp_path: Path) -> Path:
    """A v0.3 of its own for each test, to be spoiled."""
    return shutil.copytree(models / "native", tmp_path / "native")


@pytest.fixture
def hf(models: Path, tmp_path: Path) -> Path:
    return shutil.copytree(models / "hf", tmp_path / "hf")


@pytest.fixture
def llama(models: Path, tmp_path: Path) -> Path:
    return shutil.copytree(models / "llama", tmp_path / "llama")


def same(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_same(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, x in wanted.items():
        assert same(got[name], x), name


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


# --- spoiling a folder ------------------------------------------------------------------------------------------------


def write(name: str, text: str | bytes) -> Spoil:
    data = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / name).write_bytes(data)


def edit(file: str, changes: Mapping[str, Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        table = {**json.loads((folder / file).read_text()), **changes}
        (folder / file).write_text(json.dumps({k: v for k, v in table.items() if v is not GONE}))

    return spoil


def params(**changes: Any) -> Spoil:
    return edit("params.json", changes)


def config(**changes: Any) -> Spoil:
    return edit("config.json", changes)


def remove(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    """Changes the one safetensors file of the folder as a dict."""

    def spoil(folder: Path) -> None:
        (path,) = folder.glob("*.safetensors")
        table = load_file(path)
        change(table)
        save_file(table, path, metadata={"format": "pt"})

    return spoil


def shaped(name: str, *shape: int) -> Spoil:
    return tensors(lambda t: t.update({name: torch.zeros(shape, dtype=torch.bfloat16)}))


def added(name: str, *shape: int) -> Spoil:
    return shaped(name, *shape or (DIM,))


def lost(name: str) -> Spoil:
    return tensors(lambda t: t.pop(name))


def renamed(old: str, new: str) -> Spoil:
    return tensors(lambda t: t.update({new: t.pop(old)}))


def cast(name: str, dtype: torch.dtype, **beside: Tensor) -> Spoil:
    """The tensor in another dtype, and others beside it (qscale_weight=…)."""

    def change(table: dict[str, Tensor]) -> None:
        table[name] = table[name].float().to(dtype)
        table.update({name.removesuffix("weight") + leaf: x for leaf, x in beside.items()})

    return tensors(change)


def both(*spoils: Spoil) -> Spoil:
    return lambda folder: [spoil(folder) for spoil in spoils]


def refiled(files: Any, *, without: tuple[str, ...] = (), index: Mapping[str, str] = {}) -> Spoil:
    """The weights in several files, some of which then go, and an index that is then changed."""

    def spoil(folder: Path) -> None:
        (folder / "consolidated.safetensors").unlink()
        make_native(folder, vocab_size=VOCABULARY, params_extra=THETA, files=files)
        for name in without:
            (folder / name).unlink()
        if index:
            table = json.loads((folder / INDEX).read_text())
            table["weight_map"] = {k: v for k, v in {**table["weight_map"], **index}.items() if v}
            (folder / INDEX).write_text(json.dumps(table))

    return spoil


def twice(files: Any, first: str, second: str) -> Spoil:
    def spoil(folder: Path) -> None:
        refiled(files, without=(INDEX,) if files == "safetensors-shards" else ())(folder)
        load, save = (load_file, save_file) if first.endswith(".safetensors") else (torch.load, torch.save)
        one, two = load(folder / first), load(folder / second)
        name = next(iter(one))
        save({**two, name: one[name]}, folder / second)

    return spoil


def pickled(raw: Callable[[Path], bytes] | None = None) -> Spoil:
    """consolidated.00.pth instead of the safetensors file: as torch saves it, or these bytes."""

    def spoil(folder: Path) -> None:
        path = folder / "consolidated.safetensors"
        if raw is None:
            torch.save(load_file(path), folder / "consolidated.00.pth")
        else:
            (folder / "consolidated.00.pth").write_bytes(raw(folder))
        path.unlink()

    return spoil


def truncated(folder: Path) -> None:
    pickled()(folder)
    path = folder / "consolidated.00.pth"
    os.truncate(path, path.stat().st_size - 100)


def enormous(folder: Path) -> None:
    with (folder / "params.json").open("r+b") as f:
        f.truncate((64 << 20) + 1)  # sparse


def elsewhere(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return spoil


def pipe(folder: Path) -> None:
    (folder / "params.json").unlink()
    os.mkfifo(folder / "params.json")


W = "layers.0.attention.{}.weight"
WQ, WO, W1, NORM = W.format("wq"), W.format("wo"), "layers.1.feed_forward.w1.weight", "layers.1.ffn_norm.weight"
ENCODER = {"hidden_size": 64, "image_size": 64}
VISION = "vision_encoder.transformer.layers.0.attention.wq.weight"
ESCAPES = "\x1b[2J\x9b\n\u202e"

PARAMS_FILE, ONE_FILE, PTH = "params.json", "consolidated.safetensors", "consolidated.00.pth"
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


# --- pickles ----------------------------------------------------------------------------------------------------------


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


# --- what is assumed is said ------------------------------------------------------------------------------------------


def written(out: Path, name: str = "config.json") -> dict[str, Any]:
    def refuse(token: str) -> Any:
        raise AssertionError(f"{name} holds {token}, which is no JSON")

    table: dict[str, Any] = json.loads((out / name).read_text(), parse_constant=refuse)
    return table


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


# --- tokenizers -------------------------------------------------------------------------------------------------------

TOKENIZERS: dict[str, Spoil] = {
    "none": remove("tokenizer.model"),
    "two": write("tokenizer.model.v3", spm([("a", -1.0, 1)])),
    "damaged": write("tokenizer.model", SPM[:1000]),
    "tekken is no JSON": both(remove("tokenizer.model"), write("tekken.json", "{")),
    "tekken beside": write("tekken.json", "{"),
}


@pytest.mark.parametrize("spoil", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("to", ["hf", "mistral"])
@pytest.mark.parametrize("layout", ["native", "hf"])
def test_no_tokenizer_helps(
    layout: str, to: str, spoil: Spoil, request: pytest.FixtureRequest, out: Path, program: Program
) -> None:
    source = request.getfixturevalue(layout)
    spoil(source)
    program.converts(source, out, "--to", to, "--no-tokenizer")
    assert not [p.name for p in out.iterdir() if "token" in p.name or "tekken" in p.name]


BAD_HF_TOKENIZERS: dict[str, tuple[Spoil, str]] = {
    "none": (remove("tokenizer.model"), "the folder has no tokenizer"),
    "tokenizer.json alone": (both(remove("tokenizer.model"), write("tokenizer.json", "{}")),
                             "tokenizer.json is there, but neither tokenizer.model nor tekken.json"),
    "two": (write("tokenizer.model.v3", spm([("a", -1.0, 1)])), "both fit the model"),
    "damaged": (write("tokenizer.model", SPM[:1000]), ""),
    "tekken is no JSON": (both(remove("tokenizer.model"), write("tekken.json", "{")), "not valid JSON"),
    "too large": (write("tokenizer.model", spm([(f"a{i}", -1.0, 1) for i in range(99)])), "358 tokens, more than"),
    "pointer": (write("tokenizer.model", LFS_POINTER), "Git LFS pointer"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "what"), BAD_HF_TOKENIZERS.values(), ids=BAD_HF_TOKENIZERS)
def test_a_tokenizer_that_cannot_be_native(spoil: Spoil, what: str, hf: Path, out: Path, program: Program) -> None:
    spoil(hf)
    refusal = program.refuses(hf, out, "--to", "mistral")
    assert what in refusal.what
    assert str(hf) in refusal.where


# --- Hugging Face models that Mistral's layout cannot hold ------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2", "falcon", "bloom"])
def test_another_architecture(
    model_type: str, tiny: Callable[[str], Path], tmp_path: Path, out: Path, program: Program
) -> None:
    refusal = program.refuses(tiny(model_type), out, "--to", "mistral", "--no-tokenizer")
    assert f"model_type is {model_type!r}" in refusal.what
    assert "mistral, mixtral" in refusal.hint


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"mlp_bias": True}])
def test_a_llama_with_biases(changes: dict[str, bool], tmp_path: Path, out: Path, program: Program) -> None:
    folder = make_tiny("llama", tmp_path / "llama", **changes)
    refusal = program.refuses(folder, out, "--to", "mistral", "--no-tokenizer")
    assert f"{next(iter(changes))} is True" in refusal.what


LINEAR = "model.layers.0.self_attn.q_proj.weight"


def indexed(place: str) -> Spoil:
    """An index beside model.safetensors that says that one tensor lies elsewhere."""

    def spoil(folder: Path) -> None:
        where = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**where, LINEAR: place}}))

    return spoil


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 1e6}  # fmt: skip
BAD_HF: dict[str, tuple[Spoil, str, str]] = {
    "no config": (remove("config.json"), "no config.json", ""),
    "config is a list": (write("config.json", "[]"), "config.json holds list", "config.json"),
    "llama with scaled rope": (config(model_type="llama", rope_theta=GONE, rope_parameters=LLAMA3), "", "config.json"),
    "linear rope": (config(rope_scaling={"type": "linear", "factor": 2.0}), "'linear'", "config.json"),
    "another activation": (config(hidden_act="gelu"), "hidden_act is 'gelu'", "config.json"),
    "activation that escapes": (config(hidden_act=ESCAPES), "hidden_act is '\\x1b[2J", "config.json"),
    "type that escapes": (config(model_type=ESCAPES), "model_type is '\\x1b[2J", "config.json"),
    "half of each head": (config(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5", "config.json"),
    "odd head_dim": (config(head_dim=15), "head_dim is 15, an odd number", "config.json"),
    "heads do not fit": (config(num_attention_heads=8), f"tensor '{LINEAR}' is [64, 64], config.json makes it", ""),
    "kv heads do not fit": (config(num_key_value_heads=4), "k_proj.weight' is [32, 64], config.json makes it", ""),
    "size in quotes": (config(hidden_size="64"), "hidden_size is '64'", "config.json"),
    "sizes missing": (config(num_hidden_layers=GONE), "num_hidden_layers is missing", "config.json"),
    "layers without end": (config(num_hidden_layers=2**31 - 1), "no model has so many layers", "config.json"),
    "NaN": (config(rms_norm_eps=float("nan")), "rms_norm_eps is nan", "config.json"),
    "tensor missing": (lost(LINEAR), f"tensor '{LINEAR}' is missing", ""),
    "head missing": (lost("lm_head.weight"), "tensor 'lm_head.weight' is missing", ""),
    "tensor too many": (
        added("model.layers.0.self_attn.q_norm.weight", 16),
        "has no place in the mistral-src layout",
        "model.safetensors",
    ),
    "layer too many": (added("model.layers.2.mlp.up_proj.weight", 96, DIM), "model.layers.2.", ""),
    "bias": (
        added("model.layers.0.self_attn.q_proj.bias"),
        "has no place in the mistral-src layout",
        "model.safetensors",
    ),
    "native name": (
        added("layers.0.attention.wq.weight", DIM, DIM),
        "has no place in the mistral-src layout",
        "model.safetensors",
    ),
    "wrong shape": (shaped(LINEAR, 48, DIM), f"tensor '{LINEAR}' is [48, 64], config.json makes it [64, 64]", ""),
    "quantized by config": (config(quantization_config={"quant_method": "gptq"}), "(gptq)", ""),
    "quantized by a method that escapes": (config(quantization_config={"quant_method": ESCAPES}), "\\x1b[2J", ""),
    "quantized by names": (renamed(LINEAR, LINEAR.replace(".weight", ".qweight")), ".qweight", ""),
    "FP8 by names": (added(LINEAR + "_scale_inv", 1, 1), "weight_scale_inv", ""),
    "FP8": (cast(LINEAR, FP8), "F8_E4M3", ""),
    "integers": (cast(LINEAR, torch.int8), "I8", ""),
    "index names an absent file": (indexed("x.safetensors"), "the index names x.safetensors, which is not there", ""),
    "index climbs": (indexed("../x.safetensors"), "'../x.safetensors' is not a plain file name", ""),
    "config lies elsewhere": (
        elsewhere("config.json"),
        "config.json is a symbolic link that leaves the folder",
        "config.json",
    ),
}


@pytest.mark.parametrize("options", [(), ("--weights-format", "pth")], ids=["safetensors", "pth"])
@pytest.mark.parametrize(("spoil", "what", "place"), BAD_HF.values(), ids=BAD_HF)
def test_a_bad_hugging_face_folder_is_refused(
    spoil: Spoil, what: str, place: str, options: tuple[str, ...], hf: Path, out: Path, program: Program
) -> None:
    spoil(hf)
    refusal = program.refuses(hf, out, "--to", "mistral", *options)
    assert what in refusal.what
    assert refusal.where.endswith(place)


def test_our_own_output_is_no_source(hf: Path, tmp_path: Path, out: Path, program: Program) -> None:
    code, _, stderr = program.run("quantize", hf, "-o", tmp_path / "bnb", "--quiet")
    assert code == 0, stderr
    for to in ("mistral", "hf"):
        refusal = program.refuses(tmp_path / "bnb", out, "--to", to)
        assert "(bitsandbytes)" in refusal.what
        assert "parent" in refusal.hint
    # Nor with its mark taken out: the names speak.
    config(quantization_config=GONE)(tmp_path / "bnb")
    assert ".weight.absmax" in program.refuses(tmp_path / "bnb", out, "--to", "mistral").what


# --- the profile of 2023 ----------------------------------------------------------------------------------------------

OLD = {"rope_theta": 10000.0, "sliding_window": 64}
BAD_2023: dict[str, tuple[Spoil, list[str], str]] = {
    "theta": (config(rope_theta=1e6), [], "rope_theta 1e+06"),
    "safetensors": (lambda f: None, ["--weights-format", "safetensors"], "reads no safetensors"),
    "tekken": (both(remove("tokenizer.model"), write("tekken.json", "{")), [], ""),
    "tied": (both(config(tie_word_embeddings=True), lost("lm_head.weight")), [], "a head that is the embedding"),
    "two files": (lambda f: None, ["--max-shard-size", "50KB"], "is one file of"),
    "windows that differ": (
        config(model_type="ministral", layer_types=["full_attention", "sliding_attention"]),
        [],
        "windows that differ",
    ),
    "no window and no context": (
        config(sliding_window=None, max_position_embeddings=GONE),
        [],
        "whose context is not known",
    ),
    "context is negative": (config(sliding_window=None, max_position_embeddings=-5), [], "max_position_embeddings"),
    "context is huge": (config(sliding_window=None, max_position_embeddings=2**40), [], "max_position_embeddings"),
}


@pytest.mark.parametrize(("spoil", "options", "what"), BAD_2023.values(), ids=BAD_2023)
def test_what_the_reference_of_2023_cannot_run(
    spoil: Spoil, options: list[str], what: str, hf: Path, out: Path, program: Program
) -> None:
    config(**OLD)(hf)
    spoil(hf)
    assert what in program.refuses(hf, out, "--to", "mistral", "--profile", "one-file-ref-2023", *options).what


def test_mixtures_and_2023(tmp_path: Path, out: Path, program: Program) -> None:
    folder = make_native(tmp_path / "moe", experts=4, params_extra=OLD)
    options = ("--to", "mistral", "--profile", "one-file-ref-2023", "--no-tokenizer")
    assert "a mixture of experts" in program.refuses(folder, out, *options).what


def test_what_the_reference_of_2023_can_run(hf: Path, out: Path, program: Program) -> None:
    config(**OLD)(hf)
    program.converts(hf, out, "--to", "mistral", "--profile", "one-file-ref-2023")
    assert len(written(out, "params.json")) == 9
    assert (out / "consolidated.00.pth").exists()


# --- options and recipes ----------------------------------------------------------------------------------------------

TO_HF, TO_MISTRAL = ["--to", "hf"], ["--to", "mistral"]
BAD_OPTIONS: list[tuple[str, list[str], str, str]] = [
    ("hf", [], "which layout is to be written", "--to hf or --to mistral"),
    ("hf", ["--to", "gguf"], "'gguf' is not one of 'hf', 'mistral'", "quantkit convert --help"),
    ("hf", ["--to", ESCAPES], "is not one of 'hf', 'mistral'", ""),
    ("hf", ["--too", "hf"], "No such option '--too'", "quantkit convert --help"),
    ("hf", [*TO_MISTRAL, "--profile", "2023"], "'2023' is not one of 'current'", "--help"),
    ("hf", [*TO_MISTRAL, "--weights-format", "bin"], "'bin' is not one of 'safetensors'", "--help"),
    ("native", [*TO_HF, "--weights-format", "pth"], "weights_format pth is for a folder in the mistral layout", ""),
    ("native", [*TO_HF, "--profile", "one-file-ref-2023"], "profile is for a folder in the mistral layout", ""),
    ("hf", [*TO_MISTRAL, "--weights-format", "pth", "--max-shard-size", "50KB"], "is one file of", "--shard-size"),
    ("hf", [*TO_MISTRAL, "--max-shard-size", "0"], "shard_size: input should be greater than 0", "'0'"),
    ("hf", [*TO_MISTRAL, "--rope-theta", "10000"], "--rope-theta", "leave"),
    ("hf", [*TO_MISTRAL, "--context", "4096"], "are for folders with params.json", "leave"),
    ("hf", [*TO_MISTRAL, "--text-only"], "", "leave"),
    ("native", [*TO_HF, "--rope-theta", "0"], "native.rope_theta: input should be greater than 0", "0"),
    ("native", [*TO_HF, "--rope-theta", "nan"], "native.rope_theta", ""),
    ("native", [*TO_HF, "--rope-theta", "inf"], "native.rope_theta", ""),
    ("native", [*TO_HF, "--rope-theta", "x"], "'x' is not a valid float", "quantkit convert --help"),
    ("native", [*TO_HF, "--context", "0"], "native.context: input should be greater than or equal to 1", "0"),
    ("native", [*TO_HF, "--context", str(2**31)], "native.context", ""),
    ("native", [*TO_HF, "--max-memory", "1MB"], "--max-memory 1 MiB is too little", "allow "),
    ("native", [*TO_HF, "--threads", "0"], "resources.threads", "0"),
    ("native", [*TO_HF, "--bits", "4"], "No such option '--bits'", "quantkit convert --help"),
    ("native", [*TO_HF, "--set", "convert.tokeniser=no"], "unknown key 'convert.tokeniser'", "'tokenizer'"),
    ("native", [*TO_HF, "--set", "convert=hf"], "convert is not a block", "keys below"),
    ("native", [*TO_HF, "--revision", "main"], "--revision is for Hub ids", "leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "options", "what", "hint"),
    BAD_OPTIONS,
    ids=[" ".join(["convert", *o])[:50] for _, o, _, _ in BAD_OPTIONS],
)
def test_a_bad_option_is_refused(
    layout: str, options: list[str], what: str, hint: str, models: Path, out: Path, program: Program
) -> None:
    """Two lines where there is no place to name: the command line is all."""
    before = contents(models)
    code, stdout, stderr = program.run("convert", models / layout, "-o", out, *options, "--quiet")
    assert (code, stdout) == (2, "")
    assert "Traceback" not in stderr
    lines = stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert what in lines[0]
    assert lines[-1].startswith("  hint: ")
    assert hint in lines[-1]
    assert len(lines) <= 3
    assert all(line.isprintable() for line in lines)
    assert not out.exists()
    assert contents(models) == before


def test_no_output_is_named(native: Path, program: Program) -> None:
    code, _, stderr = program.run("convert", native, "--to", "hf")
    assert code == 2
    assert "no output folder is named" in stderr


BAD_RECIPES = {
    "unknown key": ("convert:\n  to: hf\n  tokeniser: false\n", "unknown key 'convert.tokeniser'", 3, "tokenizer"),
    "unknown native key": ("convert:\n  to: hf\nnative:\n  theta: 5\n", "unknown key 'native.theta'", 4, "rope_theta"),
    "no layout": ("convert:\n  profile: current\n", "convert.to is missing", None, ""),
    "text for a block": ("convert: hf\n", "convert is not a block of keys", 1, "indent"),
    "null for a block": ("convert:\n", "convert is not a block of keys", 1, "indent"),
    "wrong type": ("convert:\n  to: hf\n  check: 3\n", "convert.check: input should be a valid boolean", 3, "3"),
    "quantized mistral": ("quantize:\n  bits: 4\nconvert:\n  to: mistral\n", "no form in the mistral layout", 4, ""),
    "pth for hf": ("convert:\n  to: hf\n  weights_format: pth\n", "is for a folder in the mistral layout", 1, ""),
}  # fmt: skip


@pytest.mark.parametrize(("text", "what", "line", "hint"), BAD_RECIPES.values(), ids=BAD_RECIPES)
@pytest.mark.parametrize("verb", ["run", "convert"])
def test_a_bad_recipe_is_refused(
    verb: str, text: str, what: str, line: int | None, hint: str, native: Path, out: Path, program: Program
) -> None:
    path = out.with_name("recipe.yaml")
    path.write_text(yaml.safe_dump({"source": str(native)}).strip() + "\n" + text)
    arguments = ("run", path) if verb == "run" else ("convert", "--recipe", path)
    code, stdout, stderr = program.run(*arguments, "-o", out)
    _, refusal = parse(stderr)
    assert (code, stdout) == (2, "")
    assert what in refusal.what
    assert refusal.where == (f"{path}, line {line + 1}" if line else str(path))
    assert hint in refusal.hint
    assert not out.exists()


def test_quantizing_into_mistrals_layout(native: Path, out: Path, program: Program) -> None:
    code, _, stderr = program.run("quantize", native, "-o", out, "--set", "convert.to=mistral", "--quiet")
    assert code == 2
    assert "no form in the mistral layout" in stderr
    assert not out.exists()


# --- the folder to write ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relation", ["same", "inside", "around", "same by link", "inside by link"])
@pytest.mark.parametrize(("layout", "to"), [("native", "hf"), ("hf", "mistral")])
def test_output_and_source_lie_apart(
    layout: str, to: str, relation: str, request: pytest.FixtureRequest, tmp_path: Path, program: Program
) -> None:
    source = request.getfixturevalue(layout)
    link = tmp_path / "link"
    link.symlink_to(source, target_is_directory=True)
    target = {"same": source, "inside": source / "out", "around": tmp_path, "same by link": link,
              "inside by link": link / "out"}[relation]  # fmt: skip
    before = contents(tmp_path)
    for force in ([], ["--force"]):
        assert "contain each other" in program.refuses(source, target, "--to", to, *force).what
    assert contents(tmp_path) == before


def test_a_folder_of_other_things_is_left_alone(native: Path, out: Path, program: Program) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refusal = program.refuses(native, out, "--to", "hf")
    assert refusal.what == "the output folder is not empty (notes.txt)"
    assert "--force" in refusal.hint
    program.converts(native, out, "--to", "hf", "--force")
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["consolidated.safetensors", "consolidated.00.pth", "consolidated.00.pt",
                                  "model.safetensors", "consolidated-00001-of-00002.safetensors"])  # fmt: skip
@pytest.mark.parametrize(("layout", "to"), [("native", "hf"), ("hf", "mistral")])
def test_force_deletes_nobody_elses_weights(
    layout: str, to: str, name: str, request: pytest.FixtureRequest, out: Path, program: Program
) -> None:
    source = request.getfixturevalue(layout)
    out.mkdir()
    for file in ("params.json", "config.json", name):
        (out / file).write_text("mine")
    refusal = program.refuses(source, out, "--to", to, "--force")
    assert refusal.what == f"{name} is a weight file that quantkit did not write; --force does not delete it"
    assert "is not empty" in program.refuses(source, out, "--to", to).what


def test_the_other_layout_takes_over_with_force_only(
    native: Path, hf: Path, out: Path, tmp_path: Path, program: Program
) -> None:
    program.converts(native, out, "--to", "hf")
    before = contents(out)
    for source in (native, hf):
        refusal = program.refuses(source, out, "--to", "mistral")
        assert refusal.what == "the output folder holds the result of another plan"
    assert contents(out) == before
    code, stdout, _ = program.run("convert", native, "-o", out, "--to", "hf", "--quiet")
    assert (code, "is finished already" in stdout) == (0, True)
    program.converts(hf, out, "--to", "mistral", "--force")
    program.converts(hf, tmp_path / "fresh", "--to", "mistral")
    assert contents(out) == contents(tmp_path / "fresh"), "nothing of the earlier result is left"
    # And back.
    program.converts(native, out, "--to", "hf", "--force")
    assert contents(out) == before


def test_weights_of_the_other_format_do_not_stay(hf: Path, out: Path, program: Program) -> None:
    """Both files in one folder is what Mistral's own programs refuse."""
    program.converts(hf, out, "--to", "mistral", "--weights-format", "pth")
    program.converts(hf, out, "--to", "mistral", "--force")
    assert [p.name for p in out.glob("consolidated*")] == ["consolidated.safetensors"]


# --- Meta's Llama -----------------------------------------------------------------------------------------------------


def shard(i: int, change: Callable[[dict[str, Tensor]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / f"consolidated.{i:02}.pth"
        table = torch.load(path)
        change(table)
        torch.save(table, path)

    return spoil


def third_shard(folder: Path) -> None:
    shutil.copy(folder / "consolidated.01.pth", folder / "consolidated.03.pth")


BAD_LLAMA: dict[str, tuple[Spoil, str]] = {
    "first shard missing": (remove("consolidated.00.pth"), "number 0 is missing (1 of 2"),
    "last shard missing": (remove("consolidated.01.pth"), "params.json makes it"),
    "middle shard missing": (third_shard, "number 2 is missing (3 of 4"),
    "shard of another shape": (
        shard(1, lambda t: t.update({WQ: t[WQ][:16].clone()})),
        "not in every shard in one shape",
    ),
    "shard of another dtype": (shard(1, lambda t: t.update({WQ: t[WQ].float()})), "not in every shard in one shape"),
    "tensor in one shard": (shard(1, lambda t: t.pop(WQ)), "not in every shard in one shape"),
    "tensor in the other shard": (shard(0, lambda t: t.pop(WQ)), "attention.wq"),
    "one tensor more in the other shard": (shard(1, lambda t: t.update({"layers.0.x": t[WQ]})), "'layers.0.x'"),
    "norms that differ": (shard(1, lambda t: t.update({NORM: t[NORM] + 1})), f"tensor '{NORM}' is not the same"),
    "unknown tensor": (shard(0, lambda t: t.update({"layers.0.x": t[WQ]})), "'layers.0.x' has no place"),
    "heads do not fit": (params(n_heads=8), "params.json makes it"),
    "heads do not divide": (params(n_heads=5), "is"),
    "kv heads do not fit": (params(n_kv_heads=4), "params.json makes it"),
    "kv heads left out": (params(n_kv_heads=GONE), "params.json makes it"),
    "kv heads in quotes": (params(n_kv_heads="2"), "'2'"),
    "kv heads are true": (params(n_kv_heads=True), "True"),
    "dim does not fit": (params(dim=128), ""),
    "dim is negative": (params(dim=-64), "dim is -64"),
    "dim is true": (params(dim=True), "dim is True"),
    "layers do not fit": (params(n_layers=3), "tensor 'layers.2."),
    "layers without end": (params(n_layers=2**31 - 1), "no model has so many layers"),
    "no layers": (params(n_layers=GONE), "n_layers is missing"),
    "more layers in the weights": (params(n_layers=1), "layers.1."),
    "unknown key": (params(n_experts=4), "'n_experts'"),
    "unknown key that escapes": (params(**{ESCAPES: 4}), "'\\x1b[2J"),
    "epsilon in quotes": (params(norm_eps="1e-5"), "norm_eps"),
    "epsilon is NaN": (params(norm_eps=float("nan")), "norm_eps is nan"),
    "epsilon is negative": (params(norm_eps=-1e-5), "norm_eps is -1e-05"),
    "no epsilon": (params(norm_eps=GONE), "norm_eps"),
    "theta is NaN": (params(rope_theta=float("nan")), "rope_theta"),
    "theta is infinite": (params(rope_theta=float("inf")), "rope_theta"),
    "theta is beyond all measure": (params(rope_theta=10**400), "rope_theta"),
    "context is negative": (params(max_seq_len=-5), "max_seq_len"),
    "context in quotes": (params(max_seq_len="2048"), "max_seq_len"),
    "context is huge": (params(max_seq_len=2**40), "max_seq_len"),
    "scaled by text": (params(use_scaled_rope=True, rope_scaling_factor="eight"), "rope_scaling_factor"),
    "scaled by a list": (params(use_scaled_rope=True, rope_high_freq_factor=[4]), "rope_high_freq_factor"),
    "scaled by zero": (params(use_scaled_rope=True, rope_scaling_factor=0), "rope_scaling_factor"),
    "scaled by NaN": (params(use_scaled_rope=True, rope_scaling_factor=float("nan")), "rope_scaling_factor"),
    "scaled by 1": (params(use_scaled_rope=1), "use_scaled_rope"),
    "FP8": (both(*(shard(i, lambda t: t.update({WQ: t[WQ].to(FP8)})) for i in range(2))), "F8_E4M3"),
    "truncated": (lambda f: os.truncate(f / "consolidated.01.pth", 20_000), ""),
    "embedding missing": (both(*(shard(i, lambda t: t.pop("tok_embeddings.weight")) for i in range(2))), "missing"),
}


@pytest.mark.parametrize(("spoil", "what"), BAD_LLAMA.values(), ids=BAD_LLAMA)
def test_a_bad_llama_folder_is_refused(spoil: Spoil, what: str, llama: Path, out: Path, program: Program) -> None:
    spoil(llama)
    refusal = program.refuses(llama, out, "--to", "hf")
    assert what in refusal.what
    assert str(llama) in refusal.where


def test_a_scaled_llama_stays_out_of_mistrals_layout(llama: Path, out: Path, program: Program) -> None:
    params(rope_theta=500000.0, use_scaled_rope=True)(llama)
    assert "rope_parameters" in program.refuses(llama, out, "--to", "mistral").what


@pytest.mark.parametrize("theta", [None, GONE])
def test_a_llamas_theta_can_be_said(theta: Any, llama: Path, out: Path, program: Program) -> None:
    params(rope_theta=theta)(llama)
    program.converts(llama, out, "--to", "hf", "--rope-theta", 5000)
    assert written(out)["rope_theta"] == 5000


# --- what an earlier conversion recorded ------------------------------------------------------------------------------


def recorded(**files: Any) -> Spoil:
    """quantkit.json of a stranger: `config` or `params` as what the other layout said."""
    kept = {f"{name}.json": value for name, value in files.items()}
    return lambda folder: (folder / "quantkit.json").write_text(json.dumps({"recorded": kept}))


def base_config() -> dict[str, Any]:
    sizes = {"dim": DIM, "n_layers": 2, "head_dim": HEAD_DIM, "hidden_dim": 96, "n_heads": HEADS,
             "n_kv_heads": KEY_VALUE, "norm_eps": 1e-5, "vocab_size": VOCABULARY, "rope_theta": 1e6}  # fmt: skip
    return hf_config(sizes)


@pytest.mark.parametrize("said", ["params", "option"])
def test_a_record_does_not_outrank_the_context(said: str, native: Path, out: Path, program: Program) -> None:
    recorded(config={**base_config(), "max_position_embeddings": 512})(native)
    options = ()
    if said == "params":
        params(max_position_embeddings=2048)(native)
    else:
        options = ("--context", "2048")
    program.converts(native, out, "--to", "hf", *options)
    assert written(out)["max_position_embeddings"] == 2048


def test_a_record_does_not_change_the_dtype(native: Path, out: Path, program: Program) -> None:
    """transformers loads in the dtype that config.json announces: from bfloat16 to float16 loses weights."""
    recorded(config={**base_config(), "torch_dtype": "float16", "dtype": "float16"})(native)
    program.converts(native, out, "--to", "hf")
    table = written(out)
    assert table.get("dtype", "bfloat16") == table.get("torch_dtype", "bfloat16") == "bfloat16"


def test_a_record_does_not_change_the_class(native: Path, out: Path, program: Program) -> None:
    """vLLM goes by architectures: LlamaForCausalLM would leave the window out."""
    params(sliding_window=64)(native)
    recorded(config={**base_config(), "sliding_window": 64, "architectures": ["LlamaForCausalLM"]})(native)
    program.converts(native, out, "--to", "hf")
    assert written(out)["architectures"] == ["MistralForCausalLM"]


@pytest.mark.parametrize("to", ["hf", "mistral"])
def test_a_record_that_names_code_does_not_travel(to: str, native: Path, out: Path, program: Program) -> None:
    """Nor does it from one manifest into the next."""
    evil = {**base_config(), "auto_map": {"AutoModel": "evil.Evil"}, "_name_or_path": "/home/somebody",
            "rope_scaling": None, "attn_implementation": "evil/kernel"}  # fmt: skip
    recorded(config=evil)(native)
    program.converts(native, out, "--to", to)
    for file in out.glob("*.json"):
        assert "evil" not in file.read_text(), file.name
        assert "somebody" not in file.read_text(), file.name


# --- fuzz: refused, or right ------------------------------------------------------------------------------------------

fuzz = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
odd_text = st.text(st.characters(), max_size=6) | st.sampled_from(["", "\ud800", ESCAPES, "fp8_e4m3", "auto_map"])
odd_number = (
    st.integers(-2, 130) | st.sampled_from([2**31 - 1, 2**31, 2**63, 10**30, 10**400, 1e-9, 1e6, 1e308]) | st.floats()
)
json_value = st.recursive(
    st.none() | st.booleans() | odd_number | odd_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_text, inner, max_size=3),
    max_leaves=5,
)
PARAMS = {"dim": DIM, "n_layers": 2, "head_dim": HEAD_DIM, "hidden_dim": 96, "n_heads": HEADS, "n_kv_heads": KEY_VALUE,
          "norm_eps": 1e-5, "vocab_size": VOCABULARY, **THETA}  # fmt: skip
MORE_PARAMS = ("sliding_window", "_sliding_window", "moe", "yarn", "llama_4_scaling", "tied_embeddings", "max_seq_len",
               "max_position_embeddings", "vision_encoder", "multimodal", "quantization", "quantization_config",
               "model_type", "activation", "use_biases", "max_batch_size", "lora", "dtype", "torch_dtype",
               "multiple_of", "ffn_dim_multiplier", "q_lora_rank", "hidden_size")  # fmt: skip
params_key = st.sampled_from([*PARAMS, *MORE_PARAMS])
MORE_CONFIG = ("rope_parameters", "rope_scaling", "layer_types", "attention_bias", "mlp_bias", "quantization_config",
               "partial_rotary_factor", "num_local_experts", "num_experts_per_tok", "text_config", "vision_config",
               "use_sliding_window", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "auto_map",
               "_attn_implementation", "attention_dropout", "use_cache", "per_layer_config")  # fmt: skip
config_key = st.sampled_from([*base_config(), *MORE_CONFIG])
yarn = st.fixed_dictionaries(
    {"factor": odd_number, "original_max_position_embeddings": odd_number, "beta": odd_number, "alpha": odd_number},
    optional={"apply_scale": st.booleans() | json_value},
)
windows = st.lists(st.sampled_from([None, 16, 32]), min_size=1, max_size=2)


def windows_of(table: Mapping[str, Any]) -> list[int | None]:
    """Of each layer, by params.json."""
    given = next((table[k] for k in ("sliding_window", "_sliding_window") if table.get(k) is not None), None)
    return (given if isinstance(given, list) else [given]) * 2


def windows_of_config(table: Mapping[str, Any]) -> list[int | None]:
    types = table.get("layer_types") or ["sliding_attention"] * table["num_hidden_layers"]
    return [table.get("sliding_window") if t == "sliding_attention" else None for t in types]


def theta_of(table: Mapping[str, Any]) -> float:
    if table.get("rope_theta") is not None:
        return float(table["rope_theta"])
    return 1e4 if type(table.get("sliding_window")) is int else 1e6


def theta_of_config(table: Mapping[str, Any]) -> float:
    tables = (table, table.get("rope_parameters") or {}, table.get("rope_scaling") or {})
    (theta,) = {float(t["rope_theta"]) for t in tables if t.get("rope_theta") is not None}
    return theta


def assert_facts(native: Mapping[str, Any], table: Mapping[str, Any]) -> None:
    """params.json and config.json say the same, and neither says anything else that counts."""
    for hf, key in SIZES.items():
        assert type(table[hf]) in (int, float)
        assert table[hf] == native[key]
    heads, kv = native["n_heads"], native.get("n_kv_heads") or native["n_heads"]
    assert (table.get("num_key_value_heads") or heads) == kv
    head_dim = native.get("head_dim") or native["dim"] // heads
    assert (table.get("head_dim") or table["hidden_size"] // heads) == head_dim
    assert theta_of(native) == theta_of_config(table)
    layers = native["n_layers"]
    assert (windows_of(native) * layers)[:layers] == windows_of_config(table)
    assert bool(native.get("tied_embeddings")) == bool(table.get("tie_word_embeddings"))
    stretched = native.get("yarn")
    for rope in (table.get("rope_parameters"), table.get("rope_scaling")):
        kind = (rope or {}).get("rope_type", (rope or {}).get("type", "default"))
        assert kind == ("yarn" if stretched and rope else "default")
        if stretched and rope:
            ours = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
            theirs = ("factor", "original_max_position_embeddings", "beta", "alpha")
            assert [float(rope[k]) for k in ours] == [float(stretched[k]) for k in theirs]
    assert table.get("hidden_act", "silu") == "silu"
    for key in ("attention_bias", "mlp_bias", "quantization_config", "vision_config", "per_layer_config"):
        assert not table.get(key)
    assert table.get("partial_rotary_factor") in (None, 1)
    for key in ("moe", "lora", "quantization", "quantization_config", "vision_encoder", "multimodal", "use_biases"):
        assert not native.get(key)
    assert native.get("activation") in (None, "silu")
    context = native.get("max_position_embeddings") or native.get("max_seq_len")
    said = table.get("max_position_embeddings")
    assert context is None or said == context
    assert said is None or (type(said) is int and 0 < said < 2**31)
    for key in ("auto_map", "_attn_implementation", "attn_implementation", "_name_or_path"):
        assert f'"{key}": ' not in json.dumps(table)


def convert(source: Path, out: Path, to: Any) -> bool:
    """Whether it was converted. Anything but success and a QuantkitError escapes."""
    shutil.rmtree(out, ignore_errors=True)
    refusal: QuantkitError | None = None
    try:
        api.convert(str(source), out, to, {"convert": {"tokenizer": False}})
    except QuantkitError as e:
        refusal = e
    if refusal is not None:
        assert len(str(refusal)) < 5000
        assert refusal.where
        assert refusal.hint
        assert isinstance(refusal, InputError)
        assert not out.exists(), "refused, and yet written"
        return False
    manifest = written(out, "quantkit.json")
    assert not api.verify(out, source=str(source)).problems
    assert manifest["result"]["layout"] == to
    return True


WEIGHT_NAMES = ("tok_embeddings.weight", "norm.weight", "output.weight", W1, NORM, WQ, WO)


def without_computed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what is no weight: buffers, and scales of what is not in FP8."""
    ends = ("rope.freqs", ".rotary_emb.inv_freq", ".qscale_weight", ".qscale_act")
    return {n: x for n, x in weights.items() if not n.endswith(ends)}


def in_doubles(value: Any) -> Any:
    """A JSON value with every number as readers of JSON hold it."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: in_doubles(v) for k, v in items}
    return float(value) if type(value) in (int, float) else value


def to_hf_and_back(native: Path, out: Path) -> bool:
    """Whether it could be converted; if so, what was written is right, and so is what is made of that again."""
    if not convert(native, out, "hf"):
        return False
    says = json.loads((native / "params.json").read_text(encoding="utf-8-sig"))
    stored = without_computed(load_file(native / "consolidated.safetensors"))
    wanted = canonical(stored, says.get("head_dim") or says["dim"] // says["n_heads"])
    if says.get("tied_embeddings"):
        wanted.pop("lm_head.weight", None)
        stored.pop("output.weight", None)
    assert_same(load_file(out / "model.safetensors"), wanted)
    table = written(out)
    effective = {**says, "quantization": None, "quantization_config": None, "lora": None}  # of the weights' storage
    assert_facts(effective, table)
    back = out.with_name("back")
    assert convert(out, back, "mistral")
    assert_same(load_file(back / "consolidated.safetensors"), stored)
    again = written(back, "params.json")
    assert_facts(again, table)
    for key in PARAMS:
        if says.get(key) is not None:
            assert in_doubles(again[key]) == in_doubles(says[key])
    return True


@pytest.fixture
def soft_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    """Notes go to stderr, thousands of them."""


@fuzz
@given(json_value | st.dictionaries(params_key | odd_text, json_value, max_size=12))
@example(PARAMS)
@example({**PARAMS, "lora": float("nan")})
@example({**PARAMS, "dtype": {"a": [float("inf")]}})
@example({**PARAMS, "max_batch_size": 10**400})
def test_any_json_as_params(native: Path, out: Path, value: Any) -> None:
    (native / "params.json").write_text(json.dumps(value))
    to_hf_and_back(native, out)


@fuzz
@given(
    params_key | odd_text,
    json_value | yarn | windows | st.sampled_from(["transformer", "silu", 16, 64]),
    st.booleans(),
)
@example("head_dim", None, False)
@example("n_kv_heads", None, False)
@example("sliding_window", [16, None], False)
@example("sliding_window", [None, None], True)
@example("sliding_window", 16, True)
@example("yarn", {"factor": 4, "original_max_position_embeddings": 64, "beta": 32, "alpha": 1}, False)
@example("quantization", {"qformat_weight": "fp8_e4m3"}, False)
@example("model_type", "transformer", False)
def test_one_value_of_params_is_any_other(native: Path, out: Path, key: str, value: Any, silent: bool) -> None:
    """`silent`: without rope_theta, whose default hangs on the rest."""
    table = {**PARAMS, key: value}
    if silent:
        table.pop("rope_theta", None)
    (native / "params.json").write_text(json.dumps(table))
    done = to_hf_and_back(native, out)
    if table == PARAMS:
        assert done


odd_name = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=6) | st.sampled_from(
    [*WEIGHT_NAMES, hf_name(WQ), "rope.freqs", "layers.0.attention.rotary_emb.inv_freq", "layers.2.ffn_norm.weight",
     "layers.0.attention.wq.qscale_weight", "layers.0.attention.wq.qscale_act", "layers.01.ffn_norm.weight", VISION,
     "layers.0.block_sparse_moe.w1", "layers.-1.ffn_norm.weight", "layers.9999999999.ffn_norm.weight", "../x"]
)  # fmt: skip
odd_tensor = st.tuples(
    st.lists(st.sampled_from([0, 1, 2, 16, 32, 64, 96, 320]), max_size=3),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float16, torch.int8, FP8, torch.bool]),
)


@fuzz
@given(
    st.dictionaries(odd_name, odd_tensor, max_size=3),
    st.sets(st.sampled_from(WEIGHT_NAMES), max_size=1),
    st.sampled_from(["safetensors", "pth"]),
)
@example({"rope.freqs": ([16], torch.float32)}, set(), "safetensors")
@example({"layers.0.attention.wq.qscale_weight": ([], torch.float32)}, set(), "safetensors")
@example({W1: ([96, 64], torch.int8)}, set(), "safetensors")
@example({NORM: ([64], torch.float32)}, set(), "safetensors")
def test_any_tensors_beside_valid_params(
    models: Path, native: Path, out: Path, more: dict[str, tuple[list[int], torch.dtype]], less: set[str], form: str
) -> None:
    weights = load_file(models / "native/consolidated.safetensors")
    weights = {n: x for n, x in weights.items() if n not in less}
    for name, (shape, dtype) in more.items():
        weights[name] = torch.zeros(shape, dtype=dtype)
    for path in native.glob("consolidated*"):
        path.unlink()
    if form == "safetensors":
        save_file(weights, native / "consolidated.safetensors")
        to_hf_and_back(native, out)
    else:
        torch.save(weights, native / "consolidated.00.pth")
        if convert(native, out, "hf"):
            assert_same(load_file(out / "model.safetensors"), canonical(without_computed(weights), HEAD_DIM))


@fuzz
@given(st.data())
def test_any_record_beside_a_native_folder(models: Path, native: Path, out: Path, data: st.DataObject) -> None:
    """quantkit.json comes from anybody. It may bring back what config.json said besides the facts, and nothing else."""
    changes = data.draw(st.dictionaries(config_key | odd_text, json_value | windows, max_size=2))
    kept = data.draw(json_value | st.just({**base_config(), **changes}))
    extra = data.draw(st.sampled_from([{}, {"sliding_window": 16}, {"sliding_window": [None, 16]}]))
    (native / "params.json").write_text(json.dumps({**PARAMS, **extra}))
    whole = data.draw(json_value | st.just({"recorded": kept}) | st.just({"recorded": {"config.json": kept}}))
    (native / "quantkit.json").write_text(json.dumps(whole))
    assert to_hf_and_back(native, out), "a manifest is not the model: what it says refuses nothing"


@fuzz
@given(st.data())
def test_any_record_beside_a_hugging_face_folder(models: Path, hf: Path, out: Path, data: st.DataObject) -> None:
    changes = data.draw(st.dictionaries(params_key | odd_text, json_value | windows | yarn, max_size=2))
    kept = data.draw(json_value | st.just({**PARAMS, **changes}))
    whole = data.draw(json_value | st.just({"recorded": kept}) | st.just({"recorded": {"params.json": kept}}))
    (hf / "quantkit.json").write_text(json.dumps(whole))
    assert convert(hf, out, "mistral"), "a manifest is not the model: what it says refuses nothing"
    assert_same(load_file(out / "consolidated.safetensors"), load_file(models / "native/consolidated.safetensors"))
    table = json.loads((hf / "config.json").read_text())
    native = written(out, "params.json")
    assert_facts({k: v for k, v in native.items() if k not in ("max_seq_len", "max_position_embeddings")}, table)


LLAMA = {"dim": DIM, "n_layers": 2, "n_heads": HEADS, "n_kv_heads": KEY_VALUE, "multiple_of": 32, "norm_eps": 1e-5,
         "vocab_size": -1}  # fmt: skip
llama_key = st.sampled_from(
    [*LLAMA, "rope_theta", "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor", "max_seq_len",
     "max_batch_size", "ffn_dim_multiplier", "model_parallel_size", "hidden_dim"]
)  # fmt: skip


@fuzz
@given(llama_key | odd_text, json_value, st.booleans())
def test_one_value_of_llamas_params_is_any_other(
    models: Path, llama: Path, out: Path, key: str, value: Any, scaled: bool
) -> None:
    table = {**LLAMA, **({"use_scaled_rope": True, "rope_theta": 5e5} if scaled else {}), key: value}
    (llama / "params.json").write_text(json.dumps(table))
    if convert(llama, out, "hf"):
        assert_same(load_file(out / "model.safetensors"), load_file(models / "hf/model.safetensors"))
        found = written(out)
        context = found["max_position_embeddings"]
        assert type(context) is int
        assert 0 < context < 2**31
        assert 0 < found["rms_norm_eps"] < 1e9
        assert found["rms_norm_eps"] == table["norm_eps"]
        assert found["num_key_value_heads"] == (table.get("n_kv_heads") or HEADS)
        assert found["rope_theta"] == (table.get("rope_theta") or 10000)
        assert (found["rope_parameters"]["rope_type"] == "llama3") == (table.get("use_scaled_rope") is True)
