"""A Hub id as source: planned by headers alone, fetched once and no further than needed, then read from the cache."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from conftest import Run, make_tiny
from hub_server import ID, OLD, SHA, Hub, Repo, ask, local_hash, ok
from oracle.native_models import make_native

from quantkit import api
from quantkit.checkpoint.header import MAX_HEADER
from quantkit.errors import UsageError

HEADER_BUDGET = 64 * 1024
DECOYS = {
    "consolidated.safetensors": b"decoy", "consolidated.00.pth": b"decoy", "pytorch_model.bin": b"decoy",
    "modeling_x.py": b"raise SystemExit", "tokenizer_x.py": b"raise SystemExit", "model.gguf": b"decoy",
    "original/params.json": b"{}", "original/model.safetensors": b"decoy", "onnx/model.onnx": b"decoy",
    "training_args.bin": b"decoy", "pytorch_model.bin.index.json": b"{}", "trainer_state.json": b"{}",
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A model with megabytes of weights in one file, and all that a repository holds besides."""
    folder = make_tiny("llama", tmp_path_factory.mktemp("hub") / "llama", intermediate_size=4096)
    files = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert len(files["model.safetensors"]) > 3_000_000
    return {
        **files,
        **DECOYS,
        "README.md": b"---\nlicense: mit\n---\n# Llama\n",
        "LICENSE": b"MIT\n",
        ".gitattributes": b"",
    }


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same model as its maker's own program stores it."""
    folder = make_native(tmp_path_factory.mktemp("hub") / "native", vocab_size=256)
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_plan_by_headers_then_run_from_the_cache(
    quantkit: Run, server: Hub, env: dict[str, str], llama: dict[str, bytes], tmp_path: Path
) -> None:
    server.add(ID, llama)
    size = len(llama["model.safetensors"])
    wanted = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
        "LICENSE",
    }

    planned = ok(quantkit("plan", ID, "--json", env=env))
    assert server.fetched() == wanted | {"model.safetensors"}
    assert server.served[f"{ID}/model.safetensors"] <= HEADER_BUDGET
    assert planned["source"] == {"name": ID, "base_model": ID, "revision": SHA}
    assert planned["plan_hash"] == local_hash(llama, tmp_path)
    assert list((tmp_path / "tmp").iterdir()) == []

    server.served.clear()
    seen, again = ask(env, ("inspect", ID, None), ("plan", ID, None))
    assert size - HEADER_BUDGET < seen < size
    assert again == planned["plan_hash"]
    assert server.fetched() == {"model.safetensors"}
    assert server.served[f"{ID}/model.safetensors"] <= 2 * HEADER_BUDGET

    server.served.clear()
    ok(quantkit("quantize", ID, "-o", tmp_path / "out", "--json", env=env))
    manifest = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert manifest["plan_hash"] == planned["plan_hash"]
    assert manifest["source"]["revision"] == SHA
    assert server.served == {f"{ID}/model.safetensors": size}
    snapshot = tmp_path / "hf" / "hub" / "models--acme--llama" / "snapshots" / SHA
    assert {p.name for p in snapshot.iterdir()} == wanted | {"model.safetensors"}

    # Everything after this is served by the cache: online, offline, with the network gone, and named by its path.
    server.served.clear()
    nowhere = {**env, "HF_ENDPOINT": "http://127.0.0.1:9"}
    offline = {**nowhere, "HF_HUB_OFFLINE": "1"}
    for environment in (env, nowhere):
        assert ask(environment, ("plan", ID, None), ("fetch", ID, None)) == [planned["plan_hash"], str(snapshot)]
    ok(quantkit("quantize", ID, "-o", tmp_path / "again", "--json", env=offline))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()
    assert json.loads((tmp_path / "again" / "quantkit.json").read_text())["plan_hash"] == planned["plan_hash"]
    assert api.plan(str(snapshot)).hash == planned["plan_hash"]
    assert server.fetched() == set()


def with_metadata(weights: bytes, nbytes: int) -> bytes:
    """The same tensors behind a header that is longer by about `nbytes`."""
    (length,) = struct.unpack("<Q", weights[:8])
    header = json.loads(weights[8 : 8 + length])
    header["__metadata__"]["note"] = "x" * nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + weights[8 + length :]


def test_long_headers_and_servers_without_ranges(
    server: Hub, env: dict[str, str], llama: dict[str, bytes], small: dict[str, bytes], tmp_path: Path
) -> None:
    long = {**small, "model.safetensors": with_metadata(small["model.safetensors"], 100_000)}
    server.add("acme/long", long)
    server.add("acme/long-no-ranges", long, fault="no ranges")
    server.add("acme/huge", {**llama, "model.safetensors": struct.pack("<Q", MAX_HEADER + 1) + bytes(3_000_000)})
    server.add("acme/short", {**small, "model.safetensors": b"short"})
    server.add("acme/empty", {**small, "model.safetensors": b""})
    server.add("acme/lfs", {**small, "model.safetensors": b"version https://git-lfs.github.com/spec/v1\n"})
    names = ["acme/long", "acme/long-no-ranges", "acme/huge", "acme/short", "acme/empty", "acme/lfs"]
    found = dict(zip(names, ask(env, *(("plan", n, None) for n in names)), strict=True))
    for name in names[:2]:
        assert found[name] == local_hash(long, tmp_path, name)
    assert 100_000 < server.served["acme/long/model.safetensors"] < 120_000
    assert "the limit is" in found["acme/huge"][0]
    assert "acme/huge/model.safetensors" in found["acme/huge"][1]
    assert server.served["acme/huge/model.safetensors"] <= HEADER_BUDGET
    assert "too few" in found["acme/short"][0]
    assert isinstance(found["acme/empty"], list)
    assert "Git LFS pointer" in found["acme/lfs"][0]


def test_shards_revisions_and_verify_after_the_branch_moved(
    quantkit: Run, server: Hub, env: dict[str, str], small: dict[str, bytes], tmp_path: Path
) -> None:
    folder = make_tiny("llama", tmp_path / "sharded", max_shard_size="100kB")
    sharded = {p.name: p.read_bytes() for p in folder.iterdir()}
    shards = {n for n in sharded if n.endswith(".safetensors")}
    assert len(shards) > 2
    extra = {"model-00009-of-00009.safetensors": b"no shard of the index"}
    server.repos[ID] = Repo({OLD: {**sharded, **DECOYS, **extra}, SHA: small}, {"main": OLD, "v1.0": OLD})

    expected = local_hash(sharded, tmp_path, sha=OLD)
    answers = ask(env, ("plan", ID, None), ("plan", ID, "v1.0"), ("plan", ID, OLD))
    assert answers[0] == expected
    assert shards < server.fetched()
    server.served.clear()
    ok(quantkit("quantize", ID, "-o", tmp_path / "out", "--json", env=env))
    assert json.loads((tmp_path / "out" / "quantkit.json").read_text())["plan_hash"] == expected
    assert server.served == {f"{ID}/{name}": len(sharded[name]) for name in shards}

    server.repos[ID].refs["main"] = SHA
    server.served.clear()
    checked = ok(quantkit("verify", tmp_path / "out", "--source", ID, "--json", env=env))
    assert checked["sound"]
    assert checked["compared"] > 0
    assert server.fetched() == set()
    with pytest.raises(UsageError, match="--quick"):  # and not that the model cannot be fetched
        api.verify(tmp_path / "out", source=ID, quick=True)
    after = ask(env, ("plan", ID, "v1.0"), ("plan", ID, OLD), ("fetch", ID, None), ("plan", ID, "v2"))
    assert after[:2] == answers[1:]
    assert after[2].endswith(SHA)
    assert "has no revision 'v2'" in after[3][0]


def test_torch_files_are_planned_from_the_cache_only(
    quantkit: Run, server: Hub, env: dict[str, str], small: dict[str, bytes], tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load

    torch.save(load(small["model.safetensors"]), tmp_path / "pytorch_model.bin")
    files = {n: b for n, b in small.items() if n != "model.safetensors"}
    server.add(ID, {**files, "pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()})
    ((what, _, hint),) = ask(env, ("plan", ID, None))
    assert what.startswith("the Hub model has pytorch_model.bin files only")
    assert hint == f"fetch them first: hf download {ID} --revision {SHA}"
    assert "pytorch_model.bin" not in server.fetched()
    ok(quantkit("quantize", ID, "-o", tmp_path / "out", "--json", env=env))
    recorded = json.loads((tmp_path / "out" / "quantkit.json").read_text())["plan_hash"]
    assert ask(env, ("plan", ID, None)) == [recorded]


def test_a_native_model_is_planned_by_headers_and_converted(
    quantkit: Run, server: Hub, env: dict[str, str], native: dict[str, bytes], tmp_path: Path
) -> None:
    server.add(ID, {**native, "README.md": b"# Native\n", "original/config.json": b"{}"})
    arguments = ("convert", ID, "--to", "hf", "--no-tokenizer", "--json")
    planned = ok(quantkit(*arguments, "--dry-run", env=env))
    assert server.fetched() == {"params.json", "README.md", "consolidated.safetensors"}
    assert planned["source"]["revision"] == SHA
    done = ok(quantkit(*arguments, "-o", tmp_path / "out", env=env))
    manifest = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    assert manifest["plan_hash"] == planned["plan_hash"]
    assert manifest["source"]["layout"] == "mistral"
    server.repos.clear()  # the cache has all of it by now
    verified = ok(quantkit("verify", tmp_path / "out", "--source", ID, "--json", env={**env, "HF_HUB_OFFLINE": "1"}))
    assert verified["sound"]
    assert verified["compared"] == done["units"]


def test_of_two_layouts_the_one_that_is_read_is_fetched(
    quantkit: Run, server: Hub, env: dict[str, str], small: dict[str, bytes], native: dict[str, bytes]
) -> None:
    server.add(ID, {**small, **native})
    ok(quantkit("convert", ID, "--to", "hf", "--dry-run", "--json", env=env))
    assert {n for n in server.fetched() if n.endswith((".safetensors", "s.json", "g.json"))} == {
        "params.json", "consolidated.safetensors", "generation_config.json", "tokenizer_config.json",
    }  # fmt: skip
    server.served.clear()
    ok(quantkit("convert", ID, "--to", "mistral", "--no-tokenizer", "--dry-run", "--json", env=env))
    assert {n for n in server.fetched() if n.endswith(".safetensors")} == {"model.safetensors"}
    assert "params.json" not in server.fetched()
