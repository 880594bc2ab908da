"""A Hub dataset as calibration text, against a server on this machine (see tests/hub_server.py)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import hub_server
import pytest
from calibration.test_data_tokenizer import byte_level
from hub_server import OLD, SHA, Hub, Repo

from quantkit.calibration.data_hub import Reference, _choose

ID = "acme/texts"
ENDINGS = (".txt", ".jsonl", ".parquet")


class Handler(hub_server.Handler):
    """The Hub's datasets, under the paths that the other handler knows models by."""

    def route(self, path: str) -> None:
        if path.startswith(("/api/datasets/", "/datasets/")):
            return super().route(path.replace("/api/datasets/", "/api/models/").removeprefix("/datasets"))
        if path != "/api/agent-harnesses":
            self.hub.problems.append(f"no dataset: {path}")
        return self.reply(404, {})


@pytest.fixture
def server() -> Iterator[Hub]:
    with hub_server.serving(Handler, "url") as hub:
        yield hub


ASK = """
import json, sys, time
time.sleep = lambda _: None  # huggingface_hub waits between its tries
from quantkit.calibration.data import Calibration, load_tokens
from quantkit.errors import SourceError
tokenizer = sys.argv[1].encode()
for text in json.load(sys.stdin):
    try:
        tokens = load_tokens(Calibration(text=text, samples=1, length=4), tokenizer, vocab_size=300, context=None)
        answer = [tokens.name, bytes(tokens.ids[0].tolist()).decode(), tokens.text_sha256]
    except SourceError as e:
        answer = [e.what, e.where, e.hint]
    print(json.dumps(answer), flush=True)
assert "torch" not in sys.modules
"""


def ask(env: dict[str, str], *texts: str) -> list[Any]:
    """For each text its name, its first four characters and its hash; or the three lines of an error."""
    table = byte_level()
    # Ids that can be read: each character's own number.
    vocabulary = {chr(i): i for i in range(33, 127)} | {f"w{i}": i for i in [*range(33), *range(127, 256)]}
    table |= {"pre_tokenizer": None, "post_processor": None, "decoder": None, "added_tokens": []}
    table["model"] = {"type": "BPE", "vocab": vocabulary, "merges": []}
    command = [sys.executable, "-c", ASK, json.dumps(table)]
    result = subprocess.run(command, input=json.dumps(texts), env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


FILES = {
    "README.md": b"---\n---\n", "LICENSE.txt": b"LICE", ".gitattributes": b"", "data/test.jsonl": b'"test"\n',
    "data/train-00001-of-00002.jsonl": b'"two2"\n', "data/train-00000-of-00002.jsonl": b'"one1"\n',
    "data/a.csv": b"no,t\n",
}  # fmt: skip


def test_a_file_is_chosen_fetched_and_found_again_without_the_network(server: Hub, env: dict[str, str]) -> None:
    server.add(ID, FILES)
    first = f"{ID}:data/train-00000-of-00002.jsonl@{SHA}"
    named = f"{ID}:data/test.jsonl"
    online = ask(env, ID, named, first)
    assert [answer[:2] for answer in online] == [[first, "one1"], [f"{named}@{SHA}", "test"], [first, "one1"]]
    assert server.fetched(ID) == {"data/train-00000-of-00002.jsonl", "data/test.jsonl"}
    server.served.clear()
    assert ask(env, ID, named, first) == online
    nowhere = {**env, "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert ask({**nowhere, "HF_HUB_OFFLINE": "1"}, ID, named, first) == online
    assert ask(nowhere, ID, named, first) == online
    server.repos[ID].fault = "down"
    assert ask(env, ID, named) == online[:2]
    assert server.fetched(ID) == set()


def test_revisions(server: Hub, env: dict[str, str]) -> None:
    server.repos[ID] = Repo({OLD: {"t.txt": b"old text"}, SHA: {"t.txt": b"new text"}}, {"main": SHA, "v1": OLD})
    answers = ask(env, ID, f"{ID}@v1", f"{ID}:t.txt@v1", f"{ID}@{OLD}", f"{ID}@v2")
    assert [a[1] for a in answers[:4]] == ["newt", "oldt", "oldt", "oldt"]
    assert {a[0] for a in answers[1:4]} == {f"{ID}:t.txt@{OLD}"}
    assert answers[4] == [f"'{ID}' has no revision 'v2' on the Hub", f"{ID}, revision v2",
                          "name a branch, a tag or a commit"]  # fmt: skip


def test_what_can_go_wrong_is_said_in_three_lines(server: Hub, env: dict[str, str]) -> None:
    server.add(ID, FILES)
    for fault in ("gated", "forbidden", "down", "html", "silent"):
        server.add(f"acme/{fault}", FILES, fault=fault)
    server.add("acme/private", FILES, token="hf_secret")
    server.add("acme/csv", {"README.md": b"", "a.csv": b""})
    server.add("acme/ghost", {"README.md": b""}, listed=("train.jsonl",))
    server.add("acme/names", {"README.md": b""}, listed=("../train.jsonl", "/etc/train.txt"))
    server.repos["acme/no-sha"] = Repo({"../../x": FILES}, {"main": "../../x"})
    cases = {
        "acme/none": "is no file here, and no Hub dataset that you may read",
        "acme/private": "is no file here, and no Hub dataset that you may read",
        "acme/gated": "is a gated Hub dataset",
        "acme/forbidden": "is not given to you by the Hub (HTTP 403)",
        "acme/down": "could not be fetched from the Hub",
        "acme/html": "could not be fetched from the Hub",
        "acme/silent": "the connection to the Hub failed",
        "acme/no-sha": "could not be fetched from the Hub",
        "acme/ghost": "could not be fetched from the Hub",
        "acme/csv": "the Hub dataset has no file that ends in .txt, .jsonl, .parquet",
        "acme/names": "the Hub dataset has no file that ends in",
        "acme/a--b": "no Hub id",
        f"{ID}:data/none.jsonl": "the Hub dataset has no file 'data/none.jsonl'",
    }
    answers = dict(zip(cases, ask(env, *cases), strict=True))
    for text, message in cases.items():
        assert message in answers[text][0], text
        assert all(line and "\n" not in line for line in answers[text]), text
        assert "model" not in "".join(answers[text]), text
    assert answers["acme/csv"][2] == "it has 'README.md', 'a.csv'"
    assert "data/test.jsonl" in answers[f"{ID}:data/none.jsonl"][2]
    shutil.rmtree(env["HF_HOME"])
    ((what, _, hint),) = ask({**env, "HF_HUB_OFFLINE": "1"}, ID)
    assert "the Hub's cache does not hold all of it" in what
    assert "HF_HUB_OFFLINE" in hint
    assert ask({**env, "HF_TOKEN": "hf_secret"}, "acme/private")[0][1] == "one1"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", Reference("org/name", None, None)),
        ("org/name@v1.0", Reference("org/name", None, "v1.0")),
        ("org/name:a b/c.txt", Reference("org/name", "a b/c.txt", None)),
        ("org/name:a/c.txt@refs/convert/parquet", Reference("org/name", "a/c.txt", "refs/convert/parquet")),
        ("name", None), ("a/b/c", None), ("/org/name", None), ("org/", None), ("org/name:", None), ("org/name@", None),
        ("org/name:/etc/x", None), ("org/name:a//b", None), ("org/name:../x", None), ("org/name@/x", None),
        ("org/name@a..b", None), ("org/name@\x1b", None), ("org/name:a\n", None), ("örg/name", None),
    ],
)  # fmt: skip
def test_references(text: str, expected: Reference | None) -> None:
    assert Reference.parse(text) == expected


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["b.jsonl", "a.parquet", "c.txt"], "a.parquet"),
        (["test.jsonl", "valid.jsonl", "other.jsonl"], "other.jsonl"),
        (["latest.txt", "test.txt"], "latest.txt"),
        (["a/test.parquet", "b/train.parquet", "a/train.parquet"], "a/train.parquet"),
        (["test.txt", "LICENSE.txt", "requirements.txt", "README.txt"], "test.txt"),
        (["Notes.TXT"], "Notes.TXT"),
        (["LICENSE.txt", "a.csv", "../train.txt", "/train.txt"], None),
        ([], None),
    ],
)
def test_which_file_is_taken(names: list[str], chosen: str | None) -> None:
    assert _choose(names, None, ENDINGS) == _choose(names[::-1], None, ENDINGS) == chosen
