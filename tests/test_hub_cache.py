"""Hub ids and folders of the Hub's cache, without a network: a snapshot is read with its links and knows its origin,
and what is no Hub id is told from a folder."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import Refused
from conftest import Run
from hub_server import SHA, local_hash

from quantkit import api, hub
from quantkit.errors import SourceError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


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


def test_blobs_shared_by_the_whole_cache_may_be_read(tmp_path: Path, small: dict[str, bytes]) -> None:
    """huggingface_hub 2 keeps Xet files once for all models: snapshot → the model's blobs → the cache's blobs."""
    expected = local_hash(small, tmp_path / "plain")
    model, digest = tmp_path / "models--acme--llama", "ab" + "0" * 62
    snapshot = model / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (tmp_path / "blobs" / "ab").mkdir(parents=True)
    for name, content in small.items():
        (snapshot / name).write_bytes(content)
    (snapshot / "model.safetensors").rename(tmp_path / "blobs" / "ab" / digest)
    (model / "blobs" / "etag").symlink_to(f"../../blobs/ab/{digest}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/etag")
    assert api.plan(str(snapshot)).hash == expected
    (tmp_path / "elsewhere").write_bytes(small["model.safetensors"])
    (model / "blobs" / "etag").unlink()
    (model / "blobs" / "etag").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SourceError, match="leaves the folder"):
        api.plan(str(snapshot))


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


def test_a_folder_needs_no_hub(tmp_path: Path, small: dict[str, bytes]) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for name, content in small.items():
        (folder / name).write_bytes(content)
    code = (
        f"import sys; from quantkit import api; api.plan({str(folder)!r}); assert 'huggingface_hub' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(SourceError, match="--revision is for Hub ids"):
        hub.resolve(str(folder), "main")
    for name in ("no-such-folder", "a/b/c", "org/", "/no/such", "org/mödel"):
        with pytest.raises(SourceError, match="there is no folder"):
            hub.resolve(name)
