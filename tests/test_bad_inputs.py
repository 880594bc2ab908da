"""What a user can get wrong, through the command line: three lines that say what, where and what instead; exit code 2;
the source as it was, and nothing written."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from conftest import Run
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checkpoint.header import read_header
from quantkit.checkpoint.writer import ShardWriter
from quantkit.cli import main
from quantkit.errors import Interrupted

Spoil = Callable[[Path], object]
LINEAR = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.layers.1.input_layernorm.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Refusal(NamedTuple):
    what: str
    where: str
    hint: str


Refused = Callable[..., Refusal]


def parse(stderr: str) -> Refusal:
    """The three lines, and nothing but them."""
    assert "Traceback" not in stderr
    first, *rest = stderr.splitlines()
    assert first.startswith("error: ")
    where = rest.pop(0).removeprefix("  in: ") if rest[0].startswith("  in: ") else ""
    (hint,) = rest
    assert hint.startswith("  hint: ")
    return Refusal(first.removeprefix("error: "), where, hint.removeprefix("  hint: "))


@pytest.fixture(autouse=True)
def _signals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the program's handlers are not for pytest


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """refused("plan", SRC, …) runs the program in this process, and expects it to refuse with exit code 2."""

    def run(*arguments: object) -> Refusal:
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        stdout, stderr = capsys.readouterr()
        assert stop.value.code == 2
        assert stdout == ""
        return parse(stderr)

    return run


@pytest.fixture
def done(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """done("verify", OUT) runs the program in this process and expects success; its stdout."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        stdout, stderr = capsys.readouterr()
        assert stop.value.code == 0, stderr
        return stdout

    return run


@pytest.fixture
def model(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A llama of its own for each test, to be spoiled."""
    return shutil.copytree(tiny("llama"), tmp_path / "model")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, str]:
    """Every path below the folder: the SHA-256 of a file, where a link leads, nothing of a folder."""

    def one(path: Path) -> str:
        if path.is_symlink():
            return os.readlink(path)
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""

    return {str(p.relative_to(folder)): one(p) for p in folder.rglob("*")}


# --- spoiling a folder ------------------------------------------------------------------------------------------------


def write(name: str, text: str | bytes) -> Spoil:
    data = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / name).write_bytes(data)


def config(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        table = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**table, **changes}))

    return spoil


def reheader(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Changes the header of model.safetensors as a table; the data stays."""

    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        raw = path.read_bytes()
        end = 8 + struct.unpack("<Q", raw[:8])[0]
        table = json.loads(raw[8:end])
        change(table)
        text = json.dumps(table).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + raw[end:])

    return spoil


def shift(name: str, by: int) -> Callable[[dict[str, Any]], None]:
    def change(table: dict[str, Any]) -> None:
        table[name]["data_offsets"] = [n + by for n in table[name]["data_offsets"]]

    return change


def twice_in_header(folder: Path) -> None:
    entry = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    text = b"{" + entry + b"," + entry + b"}"
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def lengthen(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")


def shard(folder: Path) -> dict[str, str]:
    """Splits the weights over two files with an index; its weight_map."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = dict(zip(SHARDS, (names[::2], names[1::2]), strict=True))
    for file, part in parts.items():
        save_file({n: tensors[n] for n in part}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {n: file for file, part in parts.items() for n in part}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def reindex(**changes: str | None) -> Spoil:
    """Sharded, its index then changed: a tensor placed elsewhere, or (None) left out."""

    def spoil(folder: Path) -> None:
        weight_map = {**shard(folder), **changes}
        write_index(folder, {k: v for k, v in weight_map.items() if v is not None})

    return spoil


def in_two_shards(folder: Path) -> None:
    shard(folder)
    first = load_file(folder / SHARDS[0])
    second = load_file(folder / SHARDS[1])
    save_file({**second, next(iter(first)): next(iter(first.values()))}, folder / SHARDS[1])


def weights_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


def card_elsewhere(folder: Path) -> None:
    (folder.parent / "secret.txt").write_text("a private key")
    (folder / "README.md").symlink_to(folder.parent / "secret.txt")


def link_in_circles(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")


def pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 1118459450\n"
BAD_SOURCES: dict[str, tuple[Spoil, str, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "the folder has no config.json", ""),
    "config is a folder": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "not a file", ""),
    "config is no JSON": (write("config.json", "{'model_type': 1}"), "config.json is not valid JSON", "config.json"),
    "config is no text": (write("config.json", b"\xff\xfe"), "config.json is not valid JSON", "config.json"),
    "config is a list": (write("config.json", "[]"), "config.json holds list, not an object", "config.json"),
    "key twice": (write("config.json", '{"a": 1, "a": 2}'), "the key 'a' stands twice", "config.json"),
    "nested deeply": (config(x=json.loads("[" * 400 + "]" * 400)), "nested too deeply", "config.json"),
    "nested absurdly": (write("config.json", '{"x":' + "[" * 99_999), "nested too deeply", "config.json"),
    "half a character": (config(x="\ud800"), "half a surrogate pair", "config.json"),
    "sizes missing": (config(hidden_size=None, num_hidden_layers=None), "num_hidden_layers or n_layer is missing", ""),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors or pytorch_model.bin", ""),
    "LFS pointer": (write("model.safetensors", LFS_POINTER), "Git LFS pointer", "model.safetensors"),
    "empty file": (write("model.safetensors", ""), "0 bytes are too few", "model.safetensors"),
    "truncated": (truncate, "its header promises", "model.safetensors"),
    "trailing byte": (lengthen, "1 bytes follow the last tensor", "model.safetensors"),
    "header beyond the file": (
        write("model.safetensors", struct.pack("<Q", 1000) + b"{}"),
        "the header of 1,000 bytes runs past the file's 10",
        "model.safetensors",
    ),
    "header of 100 MB": (
        write("model.safetensors", struct.pack("<Q", 100_000_000) + b"{}"),
        "the header claims 100,000,000 bytes",
        "model.safetensors",
    ),
    "tensor twice in a header": (twice_in_header, "the key 'a' stands twice", "model.safetensors"),
    "overlap": (reheader(shift(NORM, -2)), "a hole or an overlap", "model.safetensors"),
    "hole": (reheader(shift(NORM, 2)), "a hole or an overlap", "model.safetensors"),
    "offsets missing": (
        reheader(lambda t: t[NORM].pop("data_offsets")),
        f"tensor '{NORM}': needs exactly dtype, shape and data_offsets",
        "model.safetensors",
    ),
    "offsets too near": (reheader(lambda t: t[NORM]["shape"].append(2)), "needs 256 bytes", "model.safetensors"),
    "shard above": (reindex(**{NORM: "../x.safetensors"}), "'../x.safetensors' is not a plain file name", ""),
    "shard absolute": (reindex(**{NORM: "/x.safetensors"}), "'/x.safetensors' is not a plain file name", ""),
    "shard with a long name": (reindex(**{NORM: "x" * 300 + ".safetensors"}), "File name too long", ".safetensors"),
    "shard of another kind": (reindex(**{NORM: "x.bin"}), "placed in 'x.bin', not a .safetensors file", INDEX),
    "shard absent": (reindex(**{NORM: "x.safetensors"}), "the index names x.safetensors, which is not there", ""),
    "index has too many": (reindex(extra=SHARDS[0]), "the index places tensor 'extra'", ""),
    "index has too few": (reindex(**{NORM: None}), f"tensor '{NORM}' is in", ""),
    "index places it wrongly": (reindex(**{EMBEDDING: SHARDS[0]}), f"the index places tensor '{EMBEDDING}'", ""),
    "index is empty": (write(INDEX, '{"weight_map": {}}'), "weight_map is not a table", INDEX),
    "tensor in two shards": (in_two_shards, "is stored twice", SHARDS[1]),
    "quantized by config": (config(quantization_config={"quant_method": "gptq"}), "quantized already (gptq)", ""),
    "quantized by names": (
        reheader(lambda t: t.update({LINEAR.replace(".weight", ".qweight"): t.pop(LINEAR)})),
        "quantized already (tensor 'model.layers.0.self_attn.q_proj.qweight')",
        "",
    ),
    "link out of the folder": (weights_elsewhere, "symbolic link that leaves the folder", "model.safetensors"),
    "card from elsewhere": (card_elsewhere, "README.md is a symbolic link that leaves the folder", "README.md"),
    "link in circles": (link_in_circles, "cannot be read: Too many levels of symbolic links", "model.safetensors"),
    "pipe": (pipe, "model.safetensors is not a file", "model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "what", "place"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_a_bad_source_is_refused(
    spoil: Spoil, what: str, place: str, model: Path, out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantkit.output.Journal", None)  # nobody may come as far as writing
    spoil(model)
    before = contents(model) if spoil is not pipe else {}
    refusal = refused("quantize", model, "-o", out)
    assert what in refusal.what
    assert str(model) in refusal.where or refusal.where.startswith("config.json")
    assert refusal.where.endswith(place)
    assert not out.exists()
    assert before == (contents(model) if spoil is not pipe else {})


def test_a_pointer_says_how_to_fetch_the_weights(model: Path, refused: Refused) -> None:
    (model / "model.safetensors").write_text(LFS_POINTER)
    assert "git lfs pull" in refused("inspect", model).hint


@pytest.mark.parametrize("name", ["nowhere", "x" * 300, "~nobody-by-this-name/model"])
def test_a_missing_folder(name: str, refused: Refused) -> None:
    refusal = refused("inspect", name)
    assert refusal.what == f"there is no folder {name!r}"
    assert "Hub id" in refusal.hint


def test_a_file_for_a_folder(model: Path, refused: Refused) -> None:
    refusal = refused("plan", model / "config.json")
    assert refusal == ("'config.json' is a file", str(model / "config.json"), refusal.hint)


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["zip", "bare"])
def test_a_pickle_is_not_run(form: str, model: Path, out: Path, tmp_path: Path, refused: Refused) -> None:
    marker = tmp_path / "executed"
    (model / "model.safetensors").unlink()
    if form == "zip":
        torch.save({"a": Payload(marker)}, model / "pytorch_model.bin")
    else:
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    refusal = refused("quantize", model, "-o", out)
    assert refusal.where == str(model / "pytorch_model.bin")
    assert ("posix.mkdir" if form == "zip" else "before torch 1.6") in refusal.what
    assert not marker.exists()
    assert not out.exists()


def test_a_pickled_tensor_with_the_name_of_the_metadata(model: Path, refused: Refused) -> None:
    (model / "model.safetensors").unlink()
    torch.save({"__metadata__": torch.ones(1)}, model / "pytorch_model.bin")
    assert refused("plan", model).what == "no tensor may be called '__metadata__'"


def test_our_own_output_is_no_source(model: Path, out: Path, tmp_path: Path, done: Any, refused: Refused) -> None:
    done("quantize", model, "-o", out, "--quiet")
    refusal = refused("quantize", out, "-o", tmp_path / "again")
    assert "quantized already (bitsandbytes)" in refusal.what
    assert "parent" in refusal.hint


# --- options and recipes ----------------------------------------------------------------------------------------------

BAD_OPTIONS = [
    (["--method", "bmb"], "unknown method 'bmb'", "did you mean 'bnb'?"),
    (["--metod", "bnb"], "No such option '--metod'", "see `quantkit quantize --help`"),
    (["--method", "rtn", "--bits", "5"], "method rtn has no 5-bit form", "use --bits 2 or 3 or 4 or 8"),
    (["--bits", "x"], "'x' is not a number", "see `quantkit quantize --help`"),
    (["--quant-type", "nf5"], "quantize.quant_type: input should be 'nf4' or 'fp4'", "it is 'nf5'"),
    (["--bits", "8", "--quant-type", "nf4"], "quant_type does not apply to bnb with 8 bits", "leave it out"),
    (["--skip", "lm_haed"], "the pattern 'lm_haed' matches no tensor", "a name looks like 'model.layers."),
    (["--skip", "*"], "nothing is left to quantize", "check --skip"),
    (["--set", "quantize.bits"], "--set 'quantize.bits' is not KEY=VALUE", "--set quantize.bits=8"),
    (["--set", "=8"], "--set '=8' is not KEY=VALUE", "--set quantize.bits=8"),
    (["--set", "card.licence=mit"], "unknown key 'card.licence'", "did you mean 'license'?"),
    (["--set", "quantise.bits=8"], "unknown key 'quantise'", "did you mean 'quantize'?"),
    (["--set", "card.license=[mit"], "the value is not YAML", "quote it"),
    (["--set", "card.license=2024-13-45"], "the value is not YAML", "quote it"),
    (["--set", "card.license=" + "[" * 2000], "the value is not YAML", "quote it"),
    (["--set", "resources=1", "--threads", "2"], "resources is not a block, so resources.threads", "keys"),
    (["--shard-size", "0"], "shard_size: input should be greater than 0", "it is '0'"),
    (["--shard-size", "foo"], "shard_size: 'foo' is not a size", "it is 'foo'"),
    (["--shard-size", "9" * 400], "shard_size: the size is beyond all measure", "it is '999"),
    (["--max-memory", "1MB"], "--max-memory 1 MiB is too little", "allow "),
    (["--threads", "0"], "resources.threads: input should be greater than or equal to 1", "it is 0"),
    (["--device", "abacus"], "no abacus device is usable here", "--device cpu"),
    (["--device", "cpu:0"], "no cpu:0 device is usable here", "--device cpu"),
    (["--device", "cuda:99"], "no cuda:99 device is usable here", "--device cpu"),
    (["--device", "cuda:x"], "no cuda:x device is usable here", "--device cpu"),
    (["--revision", "main"], "--revision is for Hub ids", "leave it out"),
    (["--recipe", "no.yaml"], "the recipe cannot be read: No such file", "check the path"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "what", "hint"), BAD_OPTIONS, ids=[" ".join(o)[:40] for o, _, _ in BAD_OPTIONS])
def test_a_bad_option_is_refused(
    options: list[str], what: str, hint: str, model: Path, out: Path, refused: Refused
) -> None:
    refusal = refused("quantize", model, "-o", out, *options)
    assert what in refusal.what
    assert hint in refusal.hint
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(model: Path, out: Path, refused: Refused) -> None:
    assert refused("quantize", model, "-o", out, "--device", "cuda").what == "no cuda device is usable here"
    assert not out.exists()


def test_a_network_of_one_machine(model: Path, refused: Refused) -> None:
    refusal = refused("plan", model, "--network", "1GB")
    assert refusal.what == "--network is between machines, and there is one"
    assert "--nodes 8" in refusal.hint


def test_nothing_said(refused: Refused, model: Path) -> None:
    assert refused().what == "Missing command"
    assert refused("plan").what == "source is missing"
    assert "-o OUT" in refused("quantize", model).hint


BAD_RECIPES = {
    "unknown key": ("quantize:\n  bits: 4\n  quant_tpye: fp4\n", "unknown key 'quantize.quant_tpye'", 3, "quant_type"),
    "unknown block": ("shard_size: 5GB\ncards: {}\n", "unknown key 'cards'", 2, "'card'"),
    "wrong type": ("quantize:\n  bits: four\n", "method bnb has no 'four'-bit form", 2, "4 or 8"),
    "wrong type inside": ("resources:\n  threads: many\n", "resources.threads: input should be", 2, "'many'"),
    "text for a block": ("quantize: bnb\n", "quantize is not a block of keys", 1, "indent"),
    "skip is a number": ("quantize:\n  skip: 3\n", "skip is not a list of patterns", 2, "lm_head"),
    "number for a key": ("1: 2\n", "1: keys should be strings", 1, ""),
    "not YAML": ("quantize:\n  bits: [4\n", "the recipe is not valid YAML", 3, "key: value"),
    "python tag": ("card: !!python/object/apply:os.getcwd []\n", "not valid YAML: could not determine", 1, "key:"),
    "not UTF-8": (b"card: \xff", "the recipe is not UTF-8 text", None, "UTF-8"),
    "not a mapping": ("- quantize\n", "the recipe is not a table of keys", None, "source:"),
    "empty": ("", "the recipe is not a table of keys", None, "source:"),
    "key twice": ("shard_size: 5GB\nshard_size: 6GB\n", "the key 'shard_size' stands twice", 2, "leave one"),
    "inner key twice": ("quantize:\n  bits: 4\n  bits: 8\n", "the key 'quantize.bits' stands twice", 3, "leave one"),
    "refers to itself": ("&a\ncard: *a\n", "unknown key 'card.card'", 2, "known: base_model"),
    "laughs": (
        "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklmnopqrstuvwx",
        "bcdefghijklmnopqrstuvwxy", strict=True)) + "quantize: {method: *y}\n", "unknown method [[[", 26, "known: bnb"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "what", "line", "hint"), BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_a_bad_recipe_is_refused(
    text: str | bytes, what: str, line: int | None, hint: str, model: Path, out: Path, tmp_path: Path, refused: Refused
) -> None:
    path = tmp_path / "recipe.yaml"
    write(path.name, text)(tmp_path)
    refusal = refused("quantize", model, "--recipe", path, "-o", out)
    assert what in refusal.what
    assert refusal.where == (f"{path}, line {line}" if line else str(path))
    assert hint in refusal.hint
    assert not out.exists()


def test_an_option_outranks_set_and_set_the_file(model: Path, tmp_path: Path, done: Any) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"source": str(model), "quantize": {"bits": 8}, "shard_size": 1}))
    settings = ["--recipe", tmp_path / "r.yaml", "--set", "quantize.bits=8", "--set", "shard_size=100KB", "--bits", 4]
    recipe = json.loads(done("plan", *settings, "--json"))["recipe"]
    assert recipe["quantize"]["bits"] == 4
    assert recipe["shard_size"] == 100_000


# --- weights that are not finite --------------------------------------------------------------------------------------

NAN, INF = 0x7FC0, 0xFF80  # bf16; the infinity is the negative one


def poke(model: Path, tensor: str, element: int, bits: int) -> None:
    infos, _, _ = read_header(model / "model.safetensors")
    offset = next(t.offset for t in infos if t.name == tensor) + 2 * element
    with (model / "model.safetensors").open("r+b") as f:
        f.seek(offset)
        f.write(struct.pack("<H", bits))


@pytest.mark.parametrize(
    ("tensor", "element", "index", "bits"),
    [(LINEAR, 64 * 3 + 5, "[3, 5]", NAN), (LINEAR, 0, "[0, 0]", INF), (EMBEDDING, 64 * 255 + 63, "[255, 63]", INF),
     (NORM, 7, "[7]", NAN)],
)  # fmt: skip
def test_a_nonfinite_weight_is_named(
    tensor: str, element: int, index: str, bits: int, model: Path, out: Path, refused: Refused
) -> None:
    poke(model, tensor, element, bits)
    before = contents(model)
    refusal = refused("quantize", model, "-o", out, "--quiet")
    assert refusal.what == f"tensor {tensor!r} holds a NaN or an infinity at {index}"
    assert refusal.where == str(model / "model.safetensors")
    assert "--allow-nonfinite" in refusal.hint
    assert contents(model) == before
    assert not out.exists()  # no run of this plan can end: nothing of it is in the way of another


def leave_unfinished(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **recipe: Any) -> None:
    """A run that is interrupted when all is written and nothing is committed."""

    def interrupt(_writer: ShardWriter) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "commit", interrupt)
        with pytest.raises(Interrupted):
            quantkit.quantize(str(model), out, recipe)


def test_after_the_source_was_changed_the_run_does_not_resume(
    model: Path, out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_unfinished(model, out, monkeypatch)
    poke(model, LINEAR, 0, 0)
    refusal = refused("quantize", model, "-o", out, "--quiet")
    assert refusal.what == "the source changed since the unfinished run began"
    assert refusal.hint == "start over with --force"


def test_nonfinite_weights_can_be_allowed(model: Path, out: Path, done: Any) -> None:
    for element, bits in enumerate((NAN, INF, NAN)):
        poke(model, LINEAR, element, bits)
    poke(model, NORM, 0, NAN)
    done("quantize", model, "-o", out, "--quiet", "--allow-nonfinite")
    assert "sound" in done("verify", out, "--source", model, "--quiet")
    assert json.loads((out / "quantkit.json").read_text())["nonfinite"] == 3
    card = (out / "README.md").read_text()
    assert "NaN" in card
    assert re.search(r"\| `quantized tensors` \| +3 \|", card)
    assert load_file(out / "model.safetensors")[NORM][0].isnan()  # a copied tensor is copied


# --- the folder to write ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relation", ["same", "inside", "around", "same by link", "inside by link", "dotted"])
def test_output_and_source_lie_apart(relation: str, model: Path, tmp_path: Path, refused: Refused) -> None:
    link = tmp_path / "link"
    link.symlink_to(model, target_is_directory=True)
    target = {"same": model, "inside": model / "out", "around": tmp_path, "same by link": link,
              "inside by link": link / "out", "dotted": f"{model}/../model/out"}[relation]  # fmt: skip
    before = contents(tmp_path)
    for force in ([], ["--force"]):
        assert "contain each other" in refused("quantize", model, "-o", target, *force).what
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "below a file", "long name", "dangling link"])
def test_an_output_that_can_be_no_folder(kind: str, model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nothing")
    name = {"file": "file", "below a file": "file/out", "long name": "x" * 300, "dangling link": "link"}[kind]
    before = contents(tmp_path)
    refusal = refused("quantize", model, "-o", tmp_path / name)
    assert str(tmp_path) in refusal.where
    assert "-o" in refusal.hint
    assert contents(tmp_path) == before


def test_an_output_in_nobodys_home(model: Path, tmp_path: Path, refused: Refused, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    refused("quantize", model, "-o", "~nobody-by-this-name/../model/out")


def test_a_folder_of_other_things_is_left_alone(model: Path, out: Path, refused: Refused, done: Any) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refusal = refused("quantize", model, "-o", out)
    assert refusal.what == "the output folder is not empty (notes.txt)"
    assert "--force" in refusal.hint
    assert contents(out).keys() == {"notes.txt"}
    done("quantize", model, "-o", out, "--quiet", "--force")
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model-00001-of-00002.safetensors"])
def test_force_deletes_nobody_elses_weights(name: str, model: Path, out: Path, refused: Refused) -> None:
    out.mkdir()
    for file in ("config.json", name):
        (out / file).write_text("mine")
    before = contents(out)
    refusal = refused("quantize", model, "-o", out, "--force")
    assert refusal.what == f"{name} is a weight file that quantkit did not write; --force does not delete it"
    # Nor does the refused try open the door for the next one.
    assert "is not empty" in refused("quantize", model, "-o", out).what
    assert contents(out) == before


def test_another_plan_needs_force(model: Path, out: Path, refused: Refused, done: Any) -> None:
    done("quantize", model, "-o", out, "--quiet")
    before = contents(out)
    assert "is finished already" in done("quantize", model, "-o", out, "--quiet")
    refusal = refused("quantize", model, "-o", out, "--quiet", "--bits", 8)
    assert refusal.what == "the output folder holds the result of another plan"
    assert contents(out) == before
    done("quantize", model, "-o", out, "--quiet", "--bits", 8, "--force", "--shard-size", "100KB")
    assert "sound" in done("verify", out, "--quiet")  # with no stray file of the earlier result
    assert not (out / "model.safetensors").exists()


def test_an_unfinished_run_of_another_plan(
    model: Path, out: Path, refused: Refused, done: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_unfinished(model, out, monkeypatch, shard_size="100KB")
    before = contents(out)
    refusal = refused("quantize", model, "-o", out, "--quiet")
    assert refusal.what == "the output folder holds an unfinished run of another plan"
    assert contents(out) == before
    done("quantize", model, "-o", out, "--quiet", "--force")
    assert "sound" in done("verify", out, "--quiet")


# --- verify and card --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["verify", "card"])
def test_a_folder_that_is_not_ours(verb: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(model)
    with pytest.raises(SystemExit) as stop:
        main([verb, str(model)])
    assert stop.value.code == 2
    what, where, *_ = capsys.readouterr().err.splitlines()
    assert what == "error: the folder has no quantkit.json, so quantkit did not write it"
    assert where == f"  in: {model}"
    assert contents(model) == before


def test_verify_of_an_unfinished_run(model: Path, out: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_unfinished(model, out, monkeypatch)
    assert refused("verify", out).what == "the folder holds an unfinished run"


def test_quick_and_source_do_not_go_together(model: Path, out: Path, refused: Refused, done: Any) -> None:
    done("quantize", model, "-o", out, "--quiet")
    assert "--quick" in refused("verify", out, "--quick", "--source", model).what


# --- the Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def snapshot(model: Path, tmp_path: Path) -> Path:
    """The model as huggingface_hub caches it: links into a folder of blobs. Its HF_HOME is tmp_path / "home"."""
    home = tmp_path / "home" / "hub" / "models--org--model-7b"
    folder = home / "snapshots" / COMMIT
    for sub in (folder, home / "blobs", home / "refs"):
        sub.mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    for path in model.iterdir():
        blob = hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(home / "blobs" / blob)
        (folder / path.name).symlink_to(f"../../blobs/{blob}")
    return folder


@pytest.mark.parametrize("by", ["path", "link"])
def test_a_cached_snapshot_knows_its_origin(by: str, snapshot: Path, tmp_path: Path, out: Path, done: Any) -> None:
    (tmp_path / "link").symlink_to(snapshot)
    done("quantize", snapshot if by == "path" else tmp_path / "link", "-o", out, "--quiet")
    source = json.loads((out / "quantkit.json").read_text())["source"]
    assert (source["name"], source["base_model"], source["revision"]) == ("org/model-7b", "org/model-7b", COMMIT)
    assert not any(path.is_symlink() for path in out.iterdir())


def test_links_into_blobs_are_for_snapshots_only(snapshot: Path, refused: Refused) -> None:
    elsewhere = snapshot.parent.parent / "other"
    elsewhere.mkdir()
    moved = snapshot.rename(elsewhere / COMMIT)
    assert "leaves the folder" in refused("inspect", moved).what


def test_a_hub_id_is_found_in_the_cache(snapshot: Path, tmp_path: Path, out: Path, quantkit: Run) -> None:
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    result = quantkit("quantize", "org/model-7b", "-o", out, "--quiet", env=environment)
    assert result.returncode == 0, result.stderr
    source = json.loads((out / "quantkit.json").read_text())["source"]
    assert (source["name"], source["revision"]) == ("org/model-7b", COMMIT)
    assert "base_model: org/model-7b" in (out / "README.md").read_text()


@pytest.mark.parametrize("name", ["org/not-in-the-cache", "org/two..dots", "a--b/c", "org/model.git"])
def test_a_hub_id_that_cannot_be_had(name: str, refused: Refused) -> None:
    refusal = refused("inspect", name)
    assert refusal.what.startswith(f"{name!r} is no folder here, and ")


@pytest.mark.parametrize("name", ["org/model/file", "-org/model", "org/", "http://huggingface.co/org/model"])
def test_what_is_no_hub_id(name: str, refused: Refused) -> None:
    assert refused("inspect", "--", name).what == f"there is no folder {name!r}"


# --- the program as a whole -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["inspect", "nowhere"], ["plan", "nowhere", "--bits", "x"], ["verify", "."], ["--json"], ["nonsense"]]
)
def test_an_error_as_json(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, "--json"])
    stdout, stderr = capsys.readouterr()
    error = json.loads(stdout)["error"]
    assert error.keys() == {"what", "in", "hint", "exit_code"}
    assert error["exit_code"] == 2
    assert parse(stderr) == (error["what"], error["in"], error["hint"])


def test_a_failed_verify_is_one_json_object(
    model: Path, out: Path, done: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    done("quantize", model, "-o", out, "--quiet")
    (out / "tokenizer.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(out), "--json", "--quiet"])
    stdout, stderr = capsys.readouterr()
    found = json.loads(stdout)
    assert stop.value.code == 3
    assert found["sound"] is False
    assert found["problems"]
    count = len(found["problems"])
    assert parse(stderr).what == ("1 problem found" if count == 1 else f"{count} problems found")


def test_a_process_of_its_own(model: Path, out: Path, quantkit: Run) -> None:
    truncate(model)
    result = quantkit("quantize", model, "-o", out)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "its header promises" in parse(result.stderr).what
    assert not out.exists()


def test_a_terminal_without_unicode(model: Path) -> None:
    line = [sys.executable, "-m", "quantkit", "plan", str(model)]
    result = subprocess.run(line, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "plan hash" in result.stdout
