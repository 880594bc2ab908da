"""What can be wrong with the folder to quantize: three lines that say what, where and what instead; exit code 2; the
source as it was, and nothing written."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_inputs import EMBEDDING, LFS_POINTER, LINEAR, NORM, Payload, Refused, Spoil, contents, truncate, write
from safetensors.torch import load_file, save_file

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


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


BAD_SOURCES: dict[str, tuple[Spoil, str, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "the folder has no config.json", ""),
    "config is a folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "not a file", "config.json"
    ),
    "config is no JSON": (write("config.json", "{'model_type': 1}"), "config.json is not valid JSON", "config.json"),
    "config is no text": (write("config.json", b"\xff\xfe"), "config.json is not valid JSON", "config.json"),
    "config is a list": (write("config.json", "[]"), "config.json holds list, not an object", "config.json"),
    "key twice": (write("config.json", '{"a": 1, "a": 2}'), "the key 'a' stands twice", "config.json"),
    "nested deeply": (config(x=json.loads("[" * 400 + "]" * 400)), "nested too deeply", "config.json"),
    "nested absurdly": (write("config.json", '{"x":' + "[" * 99_999), "nested too deeply", "config.json"),
    "half a character": (config(x="\ud800"), "half a surrogate pair", "config.json"),
    "sizes missing": (
        config(hidden_size=None, num_hidden_layers=None),
        "num_hidden_layers or n_layer is missing",
        "config.json (model_type 'llama')",
    ),
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
    assert refusal.where.endswith(place or model.name)
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
