"""A conversion is planned to the byte, from headers alone, and runs of one plan write the same bytes. Weights that do
not fit their configuration are refused, as is a form that cannot be had."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import headers_alone
from oracle.mistral import read_weights
from oracle.native_models import make_native, random_weights
from round_trips import FILES, GENERATIONS, V01, Weights, config_of, convert, meta_shards, params_of, recipe_of
from safetensors.torch import save_file

import quantkit as package
from quantkit.errors import QuantkitError, UsageError

# --- the plan ---------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def assert_planned(source: Path, out: Path, to: str, **keys: Any) -> None:
    recipe = recipe_of(to=to, **keys)
    job = package.plan(str(source), recipe)
    package.convert(str(source), out, to, recipe)  # type: ignore[arg-type]
    written = {p.name: p.stat().st_size for p in out.iterdir()}
    assert written == {f.name: f.nbytes for f in job.files}
    assert len(job.files) == len(written)
    assert sum(written.values()) == job.disk
    assert json.loads((out / "quantkit.json").read_text())["plan_hash"] == job.hash


@pytest.mark.parametrize("generation", [*GENERATIONS, "megablocks"])
def test_sizes_are_planned_to_the_byte(generation: str, tmp_path: Path) -> None:
    shape = GENERATIONS.get(generation) or {**GENERATIONS["Mixtral"], "megablocks": True}
    ways: tuple[dict[str, Any], ...] = ({}, {"shard_size": "20kB"}, {"check": False})
    for n, files in enumerate(FILES):
        source = make_native(tmp_path / files, files=files, **shape)
        for way in ways if n == 0 else ways[n % 3 : n % 3 + 1]:
            assert_planned(source, tmp_path / f"{files} {[*way]}", "hf", **way)
    hf = tmp_path / "safetensors ['shard_size']"
    for i, keys in enumerate([{}, {"weights_format": "pth"}, {"shard_size": "20kB"}, {"check": False}]):
        assert_planned(hf, tmp_path / f"native {i}", "mistral", **keys)
    if generation == "v0.1":
        assert_planned(hf, tmp_path / "2023", "mistral", profile="one-file-ref-2023")


@pytest.mark.parametrize("way", ["hf", "mistral", "pth", "2023", "meta"])
def test_two_runs_give_the_same_bytes(way: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    if way == "meta":
        shape = {"dim": 64, "n_layers": 1, "head_dim": 16, "hidden_dim": 96, "n_heads": 4, "vocab_size": 128}
        weights = random_weights(shape, "bfloat16", tied=False, megablocks=False, seed=0)
        params = {"dim": 64, "n_layers": 1, "n_heads": 4, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": -1}
        source = meta_shards(tmp_path / "meta", weights, 2, params, columns=True)
    elif way == "hf":
        source = make_native(tmp_path / "native", experts=3, megablocks=True, files="pt-shards", dtype="float32")
    elif way == "2023":
        source = make_native(tmp_path / "native", params_extra=V01)
    else:
        source = saved("mixtral")
    to = "hf" if way in ("hf", "meta") else "mistral"
    keys = {"pth": {"weights_format": "pth"}, "2023": {"profile": "one-file-ref-2023"}, "hf": {"shard_size": "20kB"}}
    outs = []
    for i, resources in enumerate([{"threads": 1}, {"threads": 2}, {"threads": 2, "max_memory": "300MiB"}]):
        outs.append(convert(source, tmp_path / str(i), to, resources=resources, **keys.get(way, {})))
    assert contents(outs[0]) == contents(outs[1]) == contents(outs[2])


@pytest.mark.parametrize("kind", ["safetensors", "safetensors-shards", "megablocks", "tied", "fp8", "HF", "HF, many"])
def test_headers_alone_give_the_same_plan(kind: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    if kind in ("HF", "HF, many"):
        source, to = saved("mixtral"), "mistral"
        if kind == "HF, many":
            source = convert(source, tmp_path / "model", "hf", shard_size="50kB")
    else:
        files: Any = kind if kind in FILES else "safetensors"
        shape: dict[str, Any] = {"experts": 2, "megablocks": True} if kind == "megablocks" else {"tied": kind == "tied"}
        source, to = make_native(tmp_path / "model", files=files, params_extra={"rope_theta": 1e6}, **shape), "hf"
        if kind == "fp8":
            weights = read_weights(source)
            name = "layers.0.attention.wq"
            weights[f"{name}.weight"] = weights[f"{name}.weight"].to(torch.float8_e4m3fn)
            weights[f"{name}.qscale_weight"] = torch.ones(64)
            save_file(weights, source / "consolidated.safetensors")
    (tmp_path / "cut").mkdir()
    cut = headers_alone(source, tmp_path / "cut" / source.name)
    for recipe in (recipe_of(to=to), recipe_of(to=to, shard_size="20kB"), {"quantize": {"bits": 4}}):
        whole, planned = (package.plan(str(folder), recipe) for folder in (source, cut))
        assert planned.hash == whole.hash
        assert planned.to_json() == whole.to_json()
        assert planned.draft == whole.draft
    with pytest.raises(QuantkitError):
        convert(cut, tmp_path / "out", to)
    assert not (tmp_path / "out" / "config.json").exists()


def test_one_hash_is_one_folder(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """The manifest keeps the source's config.json; so two that differ are two plans."""
    recipe = recipe_of(to="mistral")
    one = package.plan(str(saved("mistral")), recipe)
    other = tmp_path / saved("mistral").name
    shutil.copytree(saved("mistral"), other)
    (other / "config.json").write_text(json.dumps({**config_of(other), "bos_token_id": 7}))
    found = package.plan(str(other), recipe)
    assert found.draft["recorded"] != one.draft["recorded"]
    assert found.hash != one.hash


# --- what is refused --------------------------------------------------------------------------------------------------


def without(folder: Path, name: str) -> Iterator[tuple[str, Weights]]:
    weights = read_weights(folder)
    yield "missing", {k: v for k, v in weights.items() if k != name}
    yield "of another shape", {**weights, name: weights[name][:-1].clone()}
    yield "left over", {**weights, name.replace("layers.0", "layers.0.again"): weights[name].clone()}


def test_a_tensor_missing_misshapen_or_left_over_is_refused(tmp_path: Path) -> None:
    for name in ("layers.0.attention.wk.weight", "layers.0.ffn_norm.weight", "layers.0.feed_forward.w2.weight"):
        source = make_native(tmp_path / name, params_extra={"rope_theta": 1e6})
        for what, weights in without(source, name):
            save_file(weights, source / "consolidated.safetensors")
            with pytest.raises(QuantkitError):
                package.plan(str(source), recipe_of(to="hf"))
            with pytest.raises(QuantkitError):
                convert(source, tmp_path / f"{name} {what}", "hf")


def test_a_layer_too_many_is_refused(tmp_path: Path) -> None:
    """mistral-inference loads strictly. With its config.json, transformers would leave the layer out, and say so in a
    line of its log: a model cut short."""
    source = make_native(tmp_path / "native", n_layers=3, params_extra={"rope_theta": 1e6})
    hf = convert(source, tmp_path / "hf", "hf")
    (source / "params.json").write_text(json.dumps({**params_of(source), "n_layers": 2}))
    with pytest.raises(QuantkitError, match="layer"):
        package.plan(str(source), recipe_of(to="hf"))
    (hf / "config.json").write_text(json.dumps({**config_of(hf), "num_hidden_layers": 2}))
    with pytest.raises(QuantkitError, match="layer"):
        package.plan(str(hf), recipe_of(to="mistral"))


def test_an_expert_too_many_is_refused(tmp_path: Path) -> None:
    source = make_native(tmp_path / "native", experts=2, params_extra={"rope_theta": 1e6})
    weights = read_weights(source)
    more = {
        k.replace("experts.1", "experts.2"): v.clone()
        for k, v in weights.items()
        if "layers.0" in k and "experts.1" in k
    }
    save_file({**weights, **more}, source / "consolidated.safetensors")
    with pytest.raises(QuantkitError, match="expert"):
        package.plan(str(source), recipe_of(to="hf"))


def test_one_file_cannot_be_many(saved: Callable[[str], Path], tmp_path: Path) -> None:
    for keys in ({"weights_format": "pth"}, {"profile": "one-file-ref-2023"}):
        with pytest.raises(UsageError, match="one file"):
            convert(saved("llama"), tmp_path / "out", "mistral", shard_size="20kB", **keys)
    with pytest.raises(UsageError, match="safetensors"):
        convert(saved("llama"), tmp_path / "out", "mistral", profile="one-file-ref-2023", weights_format="safetensors")
