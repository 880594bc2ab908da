"""Conversion moves every byte to where the other layout has it, and back: tensors and configurations come back equal.
What was kept for the way back returns only while it still describes the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle.mistral import read_weights
from oracle.native_models import make_native
from round_trips import (
    DTYPES,
    FILES,
    GENERATIONS,
    HF_MODELS,
    SIZES,
    V01,
    assert_same,
    assert_sound,
    config_of,
    convert,
    expected_hf,
    hf_weights,
    params_of,
    recipe_of,
    weight_files,
)

import quantkit as package


def typed(value: Any) -> Any:
    """1e6 and 1000000 are not the same line in a file."""
    return json.dumps(value, sort_keys=True)


# --- native → HF → native ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", FILES)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_native_comes_back(generation: str, files: Any, tmp_path: Path) -> None:
    turn = list(GENERATIONS).index(generation) + FILES.index(files)
    source = make_native(tmp_path / "native", files=files, dtype=DTYPES[turn % 3], **GENERATIONS[generation])
    native, params = read_weights(source), params_of(source)
    ways = {"20kB": [(None, "safetensors"), ("20kB", None)], None: [(None, None), (None, "pth")]}
    for size in SIZES if turn % 4 == 0 else SIZES[turn % 2 :][:1]:
        hf = convert(source, tmp_path / f"hf {size}", "hf", shard_size=size)
        assert (len(weight_files(hf)) > 1) == (size is not None)
        assert_same(hf_weights(hf), expected_hf(native, params["head_dim"]))
        assert_sound(hf, source)
        for size_back, form in ways[size]:
            back = convert(
                hf, tmp_path / f"{size} {size_back} {form}", "mistral", shard_size=size_back, weights_format=form
            )
            assert_same(read_weights(back), native)
            # The one key that is added: without it, today's programs would take a million.
            assert typed(params_of(back)) == typed({"rope_theta": 1e4, **params})
            assert {p.suffix for p in weight_files(back)} == {".pth" if form == "pth" else ".safetensors"}
            assert (len(weight_files(back)) > 1) == (size_back is not None)
            # read_weights has looked into it
            assert (back / "consolidated.safetensors.index.json").exists() == (size_back is not None)
            assert_sound(back, hf)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("files", FILES)
def test_the_first_release_comes_back_with_its_nine_keys(files: Any, dtype: str, tmp_path: Path) -> None:
    source = make_native(tmp_path / "native", files=files, dtype=dtype, params_extra=V01)
    hf = convert(source, tmp_path / "hf", "hf")
    back = convert(hf, tmp_path / "back", "mistral", profile="one-file-ref-2023")
    assert params_of(back) == params_of(source)
    assert list(params_of(back)) == [
        "dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size",
        "sliding_window",
    ]  # fmt: skip
    assert [p.name for p in weight_files(back)] == ["consolidated.00.pth"]
    assert_same(read_weights(back), read_weights(source))
    assert_sound(back, hf)
    # and by itself, without the detour
    straight = convert(source, tmp_path / "straight", "mistral", profile="one-file-ref-2023")
    assert params_of(straight) == params_of(source)
    assert_same(read_weights(straight), read_weights(source))
    assert_sound(straight, source)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_native_from_one_kind_of_file_into_another(generation: str, tmp_path: Path) -> None:
    for files, form in product(FILES, ("safetensors", "pth")):
        source = make_native(tmp_path / files, files=files, **GENERATIONS[generation])
        out = convert(source, tmp_path / f"{files} {form}", "mistral", weights_format=form)
        one = "consolidated.00.pth" if form == "pth" else "consolidated.safetensors"
        assert [p.name for p in weight_files(out)] == [one]
        assert_same(read_weights(out), read_weights(source))
        assert typed(params_of(out)) == typed({"rope_theta": 1e4, **params_of(source)})
        assert_sound(out, source)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    n_kv_heads = draw(st.integers(1, 3))
    experts = draw(st.sampled_from([0, 0, 2, 3, 4]))
    return {
        "n_kv_heads": n_kv_heads,
        "n_heads": n_kv_heads * draw(st.integers(1, 4)),
        "head_dim": 2 * draw(st.integers(1, 32)),
        "dim": draw(st.integers(1, 40)),
        "hidden_dim": draw(st.integers(1, 40)),
        "n_layers": draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(1, 70)),
        "experts": experts,
        "experts_per_token": draw(st.integers(1, max(1, experts))),
        "megablocks": bool(experts) and draw(st.booleans()),
        "tied": draw(st.booleans()),
        "dtype": draw(st.sampled_from(DTYPES)),
        "files": draw(st.sampled_from(FILES)),
        "seed": draw(st.integers(0, 1000)),
        "params_extra": {"rope_theta": draw(st.sampled_from([1e4, 500.0, 1e6, 123456.75]))},
    }


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes(), st.sampled_from([None, 1000, 5000]), st.sampled_from([None, 1000, 5000]), st.booleans())
def test_any_shape_comes_back(
    tmp_path: Path, shape: dict[str, Any], size: int | None, size_back: int | None, pth: bool
) -> None:
    shutil.rmtree(tmp_path)
    source = make_native(tmp_path / "native", **shape)
    apart = make_native(tmp_path / "apart", **{**shape, "megablocks": False})  # the same numbers
    hf = convert(source, tmp_path / "hf", "hf", shard_size=size)
    assert_same(hf_weights(hf), expected_hf(read_weights(apart), shape["head_dim"]))
    assert_sound(hf, source)
    form, size_back = ("pth", None) if pth else (None, size_back)
    back = convert(hf, tmp_path / "back", "mistral", shard_size=size_back, weights_format=form)
    assert_same(read_weights(back), read_weights(apart))
    assert params_of(back) == params_of(source)
    assert_sound(back, hf)
    again = convert(back, tmp_path / "again", "hf", shard_size=size)
    assert_same(hf_weights(again), hf_weights(hf))
    assert typed(config_of(again)) == typed(config_of(hf))


# --- HF → native → HF -------------------------------------------------------------------------------------------------


def old_style(source: Path, folder: Path, *, shards: int) -> Path:
    """The same model as it was published in 2023: pytorch_model.bin with rotary buffers, a config.json of v4."""
    folder.mkdir()
    weights, config = hf_weights(source), config_of(source)
    for i in range(config["num_hidden_layers"]):
        weights[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        where = {}
        for i in range(shards):
            part = dict(list(weights.items())[i::shards])
            file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
            torch.save(part, folder / file)
            where.update(dict.fromkeys(part, file))
        index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": where}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    config |= {
        "torch_dtype": config.pop("dtype"), "rope_theta": config.pop("rope_parameters")["rope_theta"],
        "rope_scaling": None, "transformers_version": "4.36.0", "_name_or_path": "/home/somebody/model",
    }  # fmt: skip
    if config["model_type"] == "llama":
        config.pop("head_dim")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def without_code(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != "_name_or_path"}


@pytest.mark.parametrize("name", HF_MODELS)
def test_hf_comes_back(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    modern = saved(name)
    many = tmp_path / "many"
    assert config_of(modern)["model_type"] == HF_MODELS[name][0]
    package.convert(str(modern), many, "hf", recipe_of(shard_size="50kB"))
    sources = [modern, many] + [old_style(modern, tmp_path / f"old {n}", shards=n) for n in (1, 3)]
    ways = [(None, "safetensors", "20kB"), (None, "pth", None), ("20kB", None, None)]
    for n, source in enumerate(sources):
        original = {k: v for k, v in hf_weights(source).items() if not k.endswith("inv_freq")}
        for size, form, size_back in ways if n == 0 else ways[n - 1 : n]:
            native = convert(
                source, tmp_path / f"{source.name}, {size} {form}", "mistral", shard_size=size, weights_format=form
            )
            assert_same(expected_hf(read_weights(native), config_of(modern).get("head_dim") or 16), original)
            assert_sound(native, source)
            back = convert(native, tmp_path / f"{native.name} {size_back}", "hf", shard_size=size_back)
            assert_same(hf_weights(back), original)
            assert typed(config_of(back)) == typed(without_code(config_of(source)))
            assert_sound(back, native)


def test_hf_folders_of_the_two_generations_say_the_same_natively(saved: Callable[[str], Path], tmp_path: Path) -> None:
    for name in HF_MODELS:
        new = convert(saved(name), tmp_path / f"{name} new", "mistral")
        old_source = old_style(saved(name), tmp_path / f"{name} source", shards=1)
        old = convert(old_source, tmp_path / f"{name} old", "mistral")
        assert typed(params_of(new)) == typed(params_of(old))
        assert_same(read_weights(new), read_weights(old))


def test_a_second_way_round_changes_nothing(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """What is kept for the way back is handed on: there and back, there and back."""
    folders = [saved("llama")]
    for i in range(4):
        folders.append(convert(folders[-1], tmp_path / str(i), "hf" if i % 2 else "mistral"))
    assert typed(config_of(folders[4])) == typed(config_of(folders[2])) == typed(config_of(folders[0]))
    assert typed(params_of(folders[3])) == typed(params_of(folders[1]))
    assert_same(hf_weights(folders[4]), hf_weights(folders[0]))
    # through a change of the files on the native side, and on the HF side
    native = convert(folders[1], tmp_path / "native", "mistral", weights_format="pth")
    assert typed(config_of(convert(native, tmp_path / "hf", "hf"))) == typed(config_of(folders[0]))


def test_what_was_kept_survives_other_files_of_the_same_layout(tmp_path: Path) -> None:
    """native → HF → HF in many files → native."""
    source = make_native(tmp_path / "source", params_extra={**V01, "max_batch_size": 3})
    hf = convert(source, tmp_path / "one", "hf")
    many = convert(hf, tmp_path / "many", "hf", shard_size="20kB")
    assert params_of(convert(many, tmp_path / "end", "mistral")) == {**params_of(source), "rope_theta": 1e4}


# --- what is kept for the way back is not believed blindly ------------------------------------------------------------


def test_what_was_kept_does_not_return_if_the_model_changed(saved: Callable[[str], Path], tmp_path: Path) -> None:
    native = convert(saved("llama"), tmp_path / "native", "mistral")
    params = params_of(native)
    (native / "params.json").write_text(json.dumps({**params, "rope_theta": 5e5}))
    config = config_of(convert(native, tmp_path / "hf", "hf"))
    assert config["rope_parameters"]["rope_theta"] == config["rope_theta"] == 5e5
    assert config["model_type"] == "mistral"
    source = make_native(tmp_path / "source", params_extra={"sliding_window": 6, "max_batch_size": 3})
    hf = convert(source, tmp_path / "there", "hf")
    (hf / "config.json").write_text(json.dumps({**config_of(hf), "sliding_window": 7}))
    back = params_of(convert(hf, tmp_path / "back", "mistral"))
    assert (back["sliding_window"], back["rope_theta"]) == (7, 1e4)
    assert "max_batch_size" not in back


def test_the_users_context_goes_before_what_was_kept(saved: Callable[[str], Path], tmp_path: Path) -> None:
    native = convert(saved("llama"), tmp_path / "native", "mistral")
    kept = config_of(saved("llama"))["max_position_embeddings"]
    assert config_of(convert(native, tmp_path / "kept", "hf"))["max_position_embeddings"] == kept
    said = convert(native, tmp_path / "said", "hf", native={"context": 999})
    assert config_of(said)["max_position_embeddings"] == 999


def test_the_files_context_goes_before_what_was_kept(saved: Callable[[str], Path], tmp_path: Path) -> None:
    native = convert(saved("llama"), tmp_path / "native", "mistral")
    (native / "params.json").write_text(json.dumps({**params_of(native), "max_seq_len": 777}))
    assert config_of(convert(native, tmp_path / "hf", "hf"))["max_position_embeddings"] == 777
