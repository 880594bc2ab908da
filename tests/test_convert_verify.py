"""A converted folder is verified against its source: `verify` names the tensors that differ and no others, though the
checksums say that all is well."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle.mistral import read_weights
from oracle.native_models import make_native
from round_trips import (
    Weights,
    assert_sound,
    bits,
    config_of,
    convert,
    expected_hf,
    hf_weights,
    in_halves,
    weight_files,
)

import quantkit as package


def reseal(folder: Path) -> None:
    """Puts the checksums of what is there now into the manifest, as somebody would who has something to hide."""
    path = folder / "quantkit.json"
    manifest = json.loads(path.read_text())
    for row in manifest["files"]:
        row["sha256"] = hashlib.sha256((folder / row["name"]).read_bytes()).hexdigest()
    path.write_text(json.dumps(manifest))


def rewrite(folder: Path, weights: Weights) -> None:
    """The same tensors at the same places, with other contents."""
    (file,) = weight_files(folder)
    if file.suffix == ".safetensors":
        raw = bytearray(file.read_bytes())
        (size,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + size])
        for name, tensor in weights.items():
            begin, end = header[name]["data_offsets"]
            raw[8 + size + begin : 8 + size + end] = bits(tensor)
        file.write_bytes(raw)
    else:
        torch.save(weights, file)


@pytest.mark.parametrize("way", ["to hf", "to native", "to pth"])
@pytest.mark.parametrize(
    "damage", ["a flipped byte", "two swapped tensors", "q in the other order", "v in another order"]
)
def test_verify_finds(damage: str, way: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    if way == "to hf":
        source = make_native(tmp_path / "source", params_extra={"rope_theta": 1e6})
        out = convert(source, tmp_path / "out", "hf")
        names = {k: f"model.layers.1.self_attn.{k}_proj.weight" for k in "qkv"}
        weights = hf_weights(out)
    else:
        source = saved("mistral")
        out = convert(source, tmp_path / "out", "mistral", weights_format="pth" if way == "to pth" else None)
        names = {k: f"layers.1.attention.w{k}.weight" for k in "qkv"}
        weights = read_weights(out)
    assert_sound(out, source)
    sizes = {p.name: p.stat().st_size for p in out.iterdir()}
    canonical = {k: f"model.layers.1.self_attn.{k}_proj.weight" for k in "qkv"}
    if damage == "a flipped byte":
        flipped = weights[names["k"]].clone()
        flipped.view(torch.uint8)[3, 5] ^= 1
        weights[names["k"]] = flipped
        blamed = {canonical["k"]}
    elif damage == "two swapped tensors":
        k, v = (weights[names[x]] for x in "kv")
        weights |= {names["k"]: v, names["v"]: k}
        blamed = {canonical["k"], canonical["v"]}
    else:
        which = damage[0]
        weights[names[which]] = in_halves(weights[names[which]], 16)
        blamed = {canonical[which]}
    rewrite(out, weights)
    assert {p.name: p.stat().st_size for p in out.iterdir()} == sizes or way == "to pth"
    file = weight_files(out)[0].name
    problems = package.verify(out, source=str(source)).problems
    assert any(p.startswith(file) and ("SHA-256" in p or "bytes" in p) for p in problems)
    assert package.verify(out).problems  # and without the source
    if way == "to pth":  # torch.save makes a file of another size: the manifest must not stumble over that
        manifest = json.loads((out / "quantkit.json").read_text())
        for row in manifest["files"]:
            row["bytes"] = (out / row["name"]).stat().st_size
        (out / "quantkit.json").write_text(json.dumps(manifest))
    reseal(out)
    problems = package.verify(out, source=str(source)).problems
    assert {name for name in weights_of(source) if any(repr(name) in p for p in problems)} == blamed
    assert len(problems) == len(blamed)


def weights_of(source: Path) -> list[str]:
    """Canonical names."""
    if (source / "params.json").exists():
        return list(expected_hf(read_weights(source), 16))
    return list(hf_weights(source))


def test_verify_with_another_source(tmp_path: Path) -> None:
    source = make_native(tmp_path / "source", params_extra={"rope_theta": 1e6})
    other = make_native(tmp_path / "other", seed=1, params_extra={"rope_theta": 1e6})
    for to in ("hf", "mistral"):
        out = convert(source, tmp_path / to, to)
        assert_sound(out, source)
        assert len(package.verify(out, source=str(other)).problems) == 21


def test_a_run_without_the_check_writes_the_same(tmp_path: Path) -> None:
    source = make_native(tmp_path / "native", experts=2, megablocks=True, params_extra={"rope_theta": 1e6})
    checked = convert(source, tmp_path / "checked", "hf")
    unchecked = convert(source, tmp_path / "unchecked", "hf", check=False)
    assert (checked / "model.safetensors").read_bytes() == (unchecked / "model.safetensors").read_bytes()
    assert_sound(unchecked, source)
    assert config_of(checked) == config_of(unchecked)
