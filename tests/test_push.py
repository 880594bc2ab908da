"""`quantkit push` against a Hub on this machine: what goes up, what is refused, what an interruption leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
from eval_models import build, quiet_transformers, text_of
from safetensors.torch import load_file, save_file
from upload_server import TOKEN, Store, serving

import quantkit
from quantkit import api

SCRIPT = Path(__file__).parents[1] / "docs" / "ci" / "publish.sh"
ID = "me/llama-bnb-4bit"


@pytest.fixture
def hub() -> Iterator[Store]:
    with serving() as store:
        yield store


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judged folder in several shards."""
    work = tmp_path_factory.mktemp("push")
    with quiet_transformers():
        source = build(work / "source")
        (work / "text.txt").write_text(text_of(600))
        quantkit.quantize(source, work / "out", {"quantize": {"bits": 4}, "shard_size": "100KB"})
        quantkit.evaluate(
            work / "out", str(work / "text.txt"), against=str(source), max_kl=10.0, record=True, windows=4, length=32
        )
    assert len(list((work / "out").glob("*.safetensors"))) > 2
    return work / "out"


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    copy = tmp_path / "out"
    copy.mkdir()
    for path in published.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def environment(hub: Store, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    table = {**kept, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return table if token is None else {**table, "HF_TOKEN": token}


def push(
    hub: Store, folder: Path, *options: str, repo: str = ID, token: str | None = TOKEN
) -> subprocess.CompletedProcess[str]:
    done = warm.run(["push", str(folder), repo, *options], env=environment(hub, folder.parent / "hf", token))
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done


def pushed(hub: Store, folder: Path, *options: str, **more: Any) -> dict[str, Any]:
    done = push(hub, folder, "--json", "--quiet", *options, **more)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_whole_folder_and_nothing_else(hub: Store, folder: Path) -> None:
    (folder / "notes.txt").write_text("for nobody else")
    (folder / "__pycache__").mkdir()
    found = pushed(hub, folder, "--private")
    ours = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != "notes.txt"}
    there = hub.files(ID)
    assert there.keys() == ours.keys() | {".gitattributes"}
    assert {name: there[name] for name in ours} == ours
    assert hub.private[ID] is True
    assert found["url"] == f"{hub.url}/{ID}/commit/{hub.heads[ID]['main']}"
    assert found["nbytes"] == sum(map(len, there.values()))
    assert len(hub.commits[ID]) == 2, "one commit on top of the first"
    for line in there[".gitattributes"].decode().splitlines():
        assert line.endswith(" filter=lfs diff=lfs merge=lfs -text")


def test_a_second_push_sends_nothing_and_makes_no_commit(hub: Store, folder: Path) -> None:
    first = pushed(hub, folder)
    puts = hub.puts
    second = pushed(hub, folder)
    assert (second["changed"], second["commit"], hub.puts) == (0, first["commit"], puts)


def test_a_branch(hub: Store, folder: Path) -> None:
    pushed(hub, folder, "--revision", "4bit")
    assert set(hub.heads[ID]) == {"main", "4bit"}
    assert "quantkit.json" in hub.files(ID, "4bit")
    assert "quantkit.json" not in hub.files(ID)


def test_dry_run_asks_nobody(hub: Store, folder: Path) -> None:
    done = push(hub, folder, "--dry-run", token=None)
    assert done.returncode == 0, done.stderr
    assert "quantkit.json" in done.stdout
    assert hub.asked == 0


@pytest.mark.slow  # huggingface_hub waits, and tries again
def test_broken_off_and_taken_up(hub: Store, folder: Path) -> None:
    """The connection dies in the middle of the weights: nothing is committed, and nothing that arrived goes again."""
    shards = sorted(p.stat().st_size for p in folder.glob("*.safetensors"))
    hub.drop_after = sum(shards[:-1])
    done = push(hub, folder, "--quiet")
    assert done.returncode == 1
    assert [line.split(":")[0].strip() for line in done.stderr.splitlines()[-3:]] == ["error", "in", "hint"]
    assert "nothing was committed" in done.stderr
    assert "sends only what is missing" in done.stderr
    assert set(hub.files(ID)) == {".gitattributes"}
    arrived = dict(hub.sent)
    assert arrived
    hub.drop_after = None
    pushed(hub, folder)
    assert "quantkit.json" in hub.files(ID)
    assert all(hub.sent[oid] == nbytes for oid, nbytes in arrived.items())


def test_interrupted_by_hand(hub: Store, folder: Path) -> None:
    process = warm.start(["push", str(folder), ID, "--quiet"], env=environment(hub, folder.parent / "hf"))
    until = time.monotonic() + 60
    while not hub.puts and time.monotonic() < until:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert "Traceback" not in said
    if process.returncode == 0:
        pytest.skip("it was faster")
    assert process.returncode == 130
    assert set(hub.files(ID)) == {".gitattributes"}
    pushed(hub, folder)
    assert "quantkit.json" in hub.files(ID)


@pytest.mark.parametrize(("fault", "code", "words"), [
    ("forbidden", 2, "may not write to"), ("quota", 1, "no room"), ("card", 3, "the Hub refuses the card"),
    ("damage", 1, "is not on the Hub what it is here"), ("down", 1, "the Hub failed; nothing was committed"),
    ("lost", 1, "whether it was committed is not known"),
    pytest.param("blind", 1, "it was committed, and could not be compared", marks=pytest.mark.slow),
])  # fmt: skip
def test_what_the_hub_may_answer(hub: Store, folder: Path, fault: str, code: int, words: str) -> None:
    hub.fault = fault
    done = push(hub, folder, "--quiet")
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert done.stdout == ""
    if fault not in ("damage", "lost", "blind"):  # which are found out when it is committed
        assert "quantkit.json" not in (hub.files(ID) if ID in hub.heads else {})
    hub.fault = ""
    if fault == "damage":
        hub.objects.clear()
    assert pushed(hub, folder)["url"]


@pytest.mark.parametrize(("token", "words"), [(None, "there is no token"), ("hf_wrongwrongwrong", "does not accept")])
def test_tokens(hub: Store, folder: Path, token: str | None, words: str) -> None:
    done = push(hub, folder, token=token)
    assert done.returncode == 2
    assert words in done.stderr
    assert "hf auth login" in done.stderr
    assert "wrongwrong" not in done.stderr
    assert hub.heads == {}


@pytest.mark.parametrize("repo", ["no spaces/x", "a/b/c", "--", "others/llama"])
def test_ids_that_cannot_be(hub: Store, folder: Path, repo: str) -> None:
    done = push(hub, folder, "--quiet", repo=repo)
    assert done.returncode == 2
    assert hub.heads == {}


def test_a_repository_of_something_else(hub: Store, folder: Path) -> None:
    hub.add(ID, {"README.md": b"mine", "model.safetensors": b"another model"})
    done = push(hub, folder, "--quiet")
    assert done.returncode == 2
    assert "model.safetensors" in done.stderr
    assert hub.files(ID) == {"README.md": b"mine", "model.safetensors": b"another model"}
    found = pushed(hub, folder, "--replace")
    assert found["deleted"] == ["model.safetensors"]
    assert "model.safetensors" not in hub.files(ID)
    assert hub.files(ID)["README.md"] == (folder / "README.md").read_bytes()


def test_an_empty_repository_or_one_with_a_card_alone_is_filled(hub: Store, folder: Path) -> None:
    hub.add(ID, {".gitattributes": b"", "README.md": b"---\nlicense: mit\n---\n"})
    pushed(hub, folder)
    assert "quantkit.json" in hub.files(ID)


def test_a_folder_that_is_not_sound(hub: Store, folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = push(hub, folder, "--quiet")
    assert done.returncode == 3
    assert "not sound" in done.stderr
    assert hub.heads == {}


def test_a_folder_that_nobody_judged_or_that_failed(hub: Store, folder: Path, published: Path) -> None:
    record = json.loads((folder / "evaluation.json").read_text())
    record["evaluations"][0]["gates"][0]["limit"] = 0.0
    (folder / "evaluation.json").write_text(json.dumps(record))
    done = push(hub, folder, "--quiet")
    assert (done.returncode, "above the limit" in done.stderr) == (3, True)
    (folder / "evaluation.json").unlink()
    done = push(hub, folder, "--quiet")
    assert (done.returncode, "not judged by any limit" in done.stderr) == (3, True)
    assert hub.heads == {}
    pushed(hub, folder, "--ungated")


def test_a_card_that_the_hub_would_refuse(hub: Store, folder: Path) -> None:
    text = (folder / "README.md").read_text()
    (folder / "README.md").write_text(text.replace("license:", "licence:", 1) if "\nlicense:" in text else text[4:])
    done = push(hub, folder, "--quiet")
    assert done.returncode == 3, done.stderr
    assert "front matter" in done.stderr
    assert hub.heads == {}


def test_a_folder_that_is_not_ours(hub: Store, published: Path) -> None:
    done = push(hub, published.parent / "source")
    assert done.returncode == 2
    assert "no quantkit.json" in done.stderr


@pytest.mark.slow
def test_the_script_for_ci(hub: Store, tmp_path: Path) -> None:
    """docs/ci/publish.sh as it is: published, or stopped by a limit before anything is uploaded."""
    with quiet_transformers():
        source = build(tmp_path / "source", hidden_size=128, intermediate_size=256)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] *= 8  # a model that is sure of what it says
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    for name in ("text.txt", "calib.txt"):
        (tmp_path / name).write_text(text_of(6000) * 5)
    binary = Path(sys.executable).parent
    env = environment(hub, tmp_path / "hf")
    env["PATH"] = f"{binary}:{env['PATH']}"
    for repo, bits, code in (("me/eight", "8", 0), ("me/two", "2", 3)):
        options = ["--method", "gptq", "--bits", bits, "--group-size", "32", "--calib-length", "64"]
        words = ["sh", str(SCRIPT), str(source), repo, "text.txt", "calib.txt", "0.1", *options]
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert (repo in hub.heads) == (code == 0)
        assert (tmp_path / repo.rpartition("/")[2] / "evaluation.json").exists()


def test_nothing_goes_up_through_a_link(hub: Store, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes((folder / "evaluation.json").read_bytes())
    (folder / "evaluation.json").unlink()
    (folder / "evaluation.json").symlink_to(tmp_path / "secret")
    done = push(hub, folder, "--quiet")
    assert (done.returncode, "symbolic link" in done.stderr) == (3, True)
    assert hub.heads == {}


def test_a_file_that_changes_meanwhile_is_not_committed(hub: Store, folder: Path) -> None:
    """Between the proof and the upload: the server's answer to the first question is when it happens."""
    weights = sorted(folder.glob("*.safetensors"))[0]
    data = weights.read_bytes()
    hub.on_create = lambda: weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    done = push(hub, folder, "--quiet")
    assert (done.returncode, "changed while it was pushed" in done.stderr) == (1, True)
    assert set(hub.files(ID)) == {".gitattributes"}


def test_another_writers_commit_is_not_overwritten(hub: Store, folder: Path) -> None:
    hub.on_put = lambda: hub.add(ID, {"README.md": b"Mine."}) if len(hub.commits[ID]) == 1 else None
    done = push(hub, folder, "--quiet")
    assert done.returncode == 1
    assert "changed meanwhile; nothing was committed" in done.stderr
    assert hub.files(ID) == {"README.md": b"Mine."}


def test_another_model_of_ours_is_not_replaced(hub: Store, folder: Path, tmp_path: Path) -> None:
    """It has files of the same names."""
    pushed(hub, folder)
    manifest = json.loads((folder / "quantkit.json").read_text())
    manifest["source"]["files"][0]["sha256"] = "0" * 64
    hub.add(ID, {**hub.files(ID), "quantkit.json": json.dumps(manifest).encode()})
    done = push(hub, folder, "--quiet")
    assert (done.returncode, "holds another model" in done.stderr) == (2, True)
    manifest = json.loads((folder / "quantkit.json").read_text())
    manifest["method"] = {**(manifest["method"] or {}), "slug": "exl2-4.0"}
    hub.add(ID, {**hub.files(ID), "quantkit.json": json.dumps(manifest).encode()})
    done = push(hub, folder, "--quiet")
    assert (done.returncode, "holds this model as exl2-4.0, not " in done.stderr) == (2, True)
    pushed(hub, folder, "--replace")
    assert hub.files(ID)["quantkit.json"] == (folder / "quantkit.json").read_bytes()


def test_other_shards_of_the_same_model_take_the_place_of_the_earlier_ones(
    hub: Store, folder: Path, tmp_path: Path
) -> None:
    pushed(hub, folder)
    source, again = folder.parent / "source", tmp_path / "again"
    with quiet_transformers():
        build(source)
        quantkit.quantize(source, again, {"quantize": {"bits": 4}})
    shards = {path.name for path in folder.glob("*.safetensors")}
    found = pushed(hub, again, "--ungated")
    assert shards <= set(found["deleted"])
    assert "model.safetensors" in hub.files(ID)


def test_who_may_see_it(hub: Store, folder: Path) -> None:
    """What an organization has chosen stays; a public repository is not taken for a private one."""
    pushed(hub, folder, repo="discreet/model")
    assert hub.private["discreet/model"] is True
    pushed(hub, folder)
    assert hub.private[ID] is False
    done = push(hub, folder, "--private", "--quiet")
    assert (done.returncode, "it is public" in done.stderr) == (2, True)


def test_a_branch_that_cannot_be(hub: Store, folder: Path) -> None:
    for name in ("a..b", "x y", "-a", "a.lock", "a//b", "a/", "@", ""):
        done = push(hub, folder, f"--revision={name}", "--quiet")
        assert (done.returncode, "for a branch" in done.stderr) == (2, True), name
    assert ID not in hub.heads, "and no repository is made for it"


def test_a_token_that_cannot_be_read(hub: Store, folder: Path, tmp_path: Path) -> None:
    env = {**environment(hub, tmp_path / "hf", None), "HF_TOKEN_PATH": str(tmp_path)}
    done = warm.run(["push", str(folder), ID], env=env)
    assert (done.returncode, "the token for the Hub cannot be read" in done.stderr) == (2, True)
    assert hub.heads == {}


def test_a_card_in_another_encoding(hub: Store, folder: Path) -> None:
    with (folder / "README.md").open("ab") as f:
        f.write(b"\nd\xe9j\xe0 vu\n")
    done = push(hub, folder, "--quiet")
    assert (done.returncode, "README.md is not in UTF-8" in done.stderr) == (3, True)
    assert hub.asked == 0


def test_a_card_changed_by_hand_goes_up_with_a_warning(hub: Store, folder: Path) -> None:
    with (folder / "README.md").open("a") as f:
        f.write("\nMy own words.\n")
    done = push(hub, folder, "--quiet")
    assert done.returncode == 0
    assert "is not the card that" in done.stderr
    assert hub.files(ID)["README.md"].endswith(b"My own words.\n")


def test_what_an_earlier_push_left_is_ours_to_delete(hub: Store, folder: Path) -> None:
    pushed(hub, folder)
    (folder / "evaluation.json").unlink()
    (folder / "layers.png").unlink()
    api.rewrite_card(folder)
    assert pushed(hub, folder, "--ungated")["deleted"] == ["evaluation.json", "layers.png"]
