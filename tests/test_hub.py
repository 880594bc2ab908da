"""A Hub id as source, against a server on this machine that answers what huggingface_hub asks.

Two ports: the Hub, and the other host to which the real Hub redirects for weights. Every test has a cache of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from conftest import Run, make_tiny
from oracle.native_models import make_native

from quantkit import api, hub
from quantkit.checkpoint.header import MAX_HEADER
from quantkit.errors import SourceError, UsageError

SHA, OLD = "a" * 40, "b" * 40
ID = "acme/llama"
HEADER_BUDGET = 64 * 1024
DECOYS = {
    "consolidated.safetensors": b"decoy", "consolidated.00.pth": b"decoy", "pytorch_model.bin": b"decoy",
    "modeling_x.py": b"raise SystemExit", "tokenizer_x.py": b"raise SystemExit", "model.gguf": b"decoy",
    "original/params.json": b"{}", "original/model.safetensors": b"decoy", "onnx/model.onnx": b"decoy",
    "training_args.bin": b"decoy", "pytorch_model.bin.index.json": b"{}", "trainer_state.json": b"{}",
}  # fmt: skip


@dataclass
class Repo:
    """What the server knows of one model. `fault` names a way to misbehave, `token` whom it answers."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    fault: str = ""
    token: str = ""
    listed: tuple[str, ...] = ()
    """Names in the file list that have no file."""


@dataclass
class Hub:
    repos: dict[str, Repo] = field(default_factory=dict)
    served: Counter[str] = field(default_factory=Counter)
    """Body bytes of files by "id/name"."""
    problems: list[str] = field(default_factory=list)
    url: str = ""
    cdn: str = ""

    def add(self, name: str, files: dict[str, bytes], **options: Any) -> None:
        self.repos[name] = Repo({SHA: files}, {"main": SHA}, **options)

    def fetched(self, name: str = ID) -> set[str]:
        return {key.removeprefix(f"{name}/") for key, n in self.served.items() if n and key.startswith(f"{name}/")}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    is_cdn = False

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that has enough may hang up
            super().handle()

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.route(unquote(urlsplit(self.path).path))  # a proxy is asked for whole URLs

    do_GET = do_HEAD  # noqa: N815

    def route(self, path: str) -> None:
        if self.is_cdn:
            if "Authorization" in self.headers:
                self.hub.problems.append("the token went to another host")
            commit, _, key = path.removeprefix("/cdn/").partition("/")
            name, _, file = key.rpartition("/")
            return self.body(name, self.hub.repos[name], commit, file)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self.info(match[1], match[2] or "main")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(match[1], match[2], match[3])
        if path != "/api/agent-harnesses":  # of huggingface_hub, once a day
            self.hub.problems.append(f"unknown request {path}")
        return self.reply(404, {})

    def reply(self, status: int, headers: dict[str, str], body: bytes = b"", *, length: int | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body) if length is None else length), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def may(self, repo: Repo | None) -> bool:
        if repo is None:
            self.reply(404, {"X-Error-Code": "RepoNotFound"})
        elif repo.token and self.headers.get("Authorization") != f"Bearer {repo.token}":
            self.reply(401, {"X-Error-Code": "RepoNotFound"})
        elif repo.fault == "forbidden":
            self.reply(403, {})
        elif repo.fault == "down":
            self.reply(503, {})
        else:
            return True
        return False

    def info(self, name: str, revision: str) -> None:
        repo = self.hub.repos.get(name)
        if not self.may(repo):
            return None
        assert repo is not None
        if repo.fault == "silent":
            time.sleep(3)
            self.close_connection = True
            return None
        if repo.fault == "html":
            return self.reply(200, {"Content-Type": "text/html"}, b"<html>log in to the hotel</html>")
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return self.reply(404, {"X-Error-Code": "RevisionNotFound"})
        files = repo.commits[commit]
        siblings = [{"rfilename": f, "size": len(b), "blobId": "x"} for f, b in files.items()]
        siblings += [{"rfilename": f, "size": 1, "blobId": "x"} for f in repo.listed]
        body = {"id": name, "modelId": name, "sha": commit, "siblings": siblings}
        return self.reply(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def resolve(self, name: str, revision: str, file: str) -> None:
        repo = self.hub.repos.get(name)
        if not self.may(repo):
            return None
        assert repo is not None
        if repo.fault == "gated":
            return self.reply(403, {"X-Error-Code": "GatedRepo"})
        commit = repo.refs.get(revision, revision)
        content = repo.commits[commit].get(file)
        if content is None:
            return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        if not file.endswith((".safetensors", ".bin")):
            return self.body(name, repo, commit, file)
        size = len(content) + 1 if repo.fault == "wrong size" else len(content)
        headers = {"X-Repo-Commit": commit, "X-Linked-Etag": etag, "X-Linked-Size": str(size), "ETag": '"pointer"'}
        return self.reply(302, {**headers, "Location": f"{self.hub.cdn}/cdn/{commit}/{name}/{file}"})

    def body(self, name: str, repo: Repo, commit: str, file: str) -> None:
        content = repo.commits[commit][file]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        status, sent = 200, content
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and repo.fault != "no ranges":
            begin, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
            status, sent = 206, content[begin : end + 1]
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
        length = len(sent)
        if repo.fault == "truncated" and self.is_cdn:
            sent, self.close_connection = sent[: length // 2], True
            if asked and int(asked[1]):
                sent = b""
        if self.command == "GET":
            self.hub.served[f"{name}/{file}"] += len(sent)
        self.reply(status, headers, sent, length=length)


@pytest.fixture
def server() -> Iterator[Hub]:
    state = Hub()
    started = []
    for kind in ("url", "cdn"):
        handler = type("H", (Handler,), {"hub": state, "is_cdn": kind == "cdn"})
        http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        started.append((http, thread))
        setattr(state, kind, f"http://127.0.0.1:{http.server_port}")
    yield state
    for http, thread in started:
        http.shutdown()
        http.server_close()
        thread.join()
    assert state.problems == []


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
def small(tiny: Callable[[str], Path]) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in tiny("llama").iterdir()}


@pytest.fixture
def env(server: Hub, tmp_path: Path) -> dict[str, str]:
    """The environment of a user whose Hub is our server, with a cache of their own."""
    (tmp_path / "tmp").mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    return {
        **kept, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "TMPDIR": str(tmp_path / "tmp"),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "PYTHONWARNINGS": "error", "HF_HUB_VERBOSITY": "error",
    }  # fmt: skip


def ok(result: subprocess.CompletedProcess[str]) -> Any:
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def local_hash(files: dict[str, bytes], tmp_path: Path, name: str = ID, sha: str = SHA) -> str:
    """The plan hash of these files as a cache holds them: what fetching them must come to."""
    folder = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / sha
    folder.mkdir(parents=True)
    for file, content in files.items():
        if "/" not in file and not file.endswith(".py"):
            (folder / file).write_bytes(content)
    return api.plan(str(folder)).hash


ASK = """
import json, sys, time
time.sleep = lambda _: None  # huggingface_hub waits between its tries
from quantkit import api
from quantkit.errors import SourceError
for verb, source, revision in json.load(sys.stdin):
    try:
        if verb == "plan":
            answer = api.plan(source, {"revision": revision} if revision else {}).hash
        elif verb == "inspect":
            answer = api.inspect(source, revision=revision).nbytes
        else:
            answer = str(api.resolve(source, revision)[0])
    except SourceError as e:
        answer = [e.what, e.where, e.hint]
    print(json.dumps(answer), flush=True)
"""


def ask(env: dict[str, str], *questions: tuple[str, str, str | None]) -> list[Any]:
    """Answers to ("plan" | "inspect" | "fetch", id, revision) from one process: a hash, a size, a folder, or the three
    lines of an error."""
    result = subprocess.run(
        [sys.executable, "-c", ASK], input=json.dumps(questions), env=env, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


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


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same model as its maker's own program stores it."""
    folder = make_native(tmp_path_factory.mktemp("hub") / "native", vocab_size=256)
    return {p.name: p.read_bytes() for p in folder.iterdir()}


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


def test_a_private_model_needs_the_token_and_no_other_host_sees_it(
    server: Hub, env: dict[str, str], small: dict[str, bytes], tmp_path: Path
) -> None:
    server.add(ID, small, token="hf_secret")
    ((what, _, hint),) = ask(env, ("plan", ID, None))
    assert "no Hub model that you may read" in what
    assert "hf auth login" in hint
    planned, fetched = ask({**env, "HF_TOKEN": "hf_secret"}, ("plan", ID, None), ("fetch", ID, None))
    assert planned == local_hash(small, tmp_path)
    assert fetched.endswith(SHA)  # and the server's problems, checked at its end, would name a token that strayed


def test_a_proxy_is_used(server: Hub, env: dict[str, str], small: dict[str, bytes], tmp_path: Path) -> None:
    server.add(ID, small)
    proxied = {**env, "HF_ENDPOINT": "http://hub.invalid", "HTTP_PROXY": server.url, "NO_PROXY": "127.0.0.1"}
    assert ask(proxied, ("plan", ID, None)) == [local_hash(small, tmp_path)]


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


def test_what_can_go_wrong_is_said_in_three_lines(
    quantkit: Run, server: Hub, env: dict[str, str], small: dict[str, bytes]
) -> None:
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../../../etc/passwd.safetensors"}}
    without = {n: b for n, b in small.items() if n != "model.safetensors"}
    server.add(ID, small)
    for fault in ("gated", "forbidden", "down", "silent", "html", "truncated"):
        server.add(f"acme/{fault}", small, fault=fault)
    server.add("acme/wrong-size", small, fault="wrong size")
    server.add("acme/names", small, listed=("../x.json",))
    server.add("acme/absolute", small, listed=("/etc/x.json",))
    server.add("acme/index", {**without, "model.safetensors.index.json": json.dumps(index).encode()})
    server.add("acme/no-config", {n: b for n, b in small.items() if n != "config.json"})
    server.add("acme/no-weights", {**without, "consolidated.safetensors": b"x"})
    server.repos["acme/no-sha"] = Repo({"../../x": small}, {"main": "../../x"})
    cases = [
        ("plan", "acme/none", None, "no Hub model that you may read"),
        ("fetch", "acme/gated", None, "is a gated Hub model"),
        ("plan", "acme/forbidden", None, "is not given to you by the Hub (HTTP 403)"),
        ("fetch", "acme/down", None, "could not be fetched from the Hub"),
        ("plan", "acme/silent", None, "the connection to the Hub failed"),
        ("plan", "acme/html", None, "could not be fetched from the Hub"),
        ("plan", "acme/truncated", None, "the connection to the Hub failed"),
        ("fetch", "acme/wrong-size", None, "could not be fetched from the Hub"),
        ("plan", "acme/names", None, "the file list names '../x.json'"),
        ("fetch", "acme/absolute", None, "the file list names '/etc/x.json'"),
        ("fetch", "acme/index", None, "'../../../etc/passwd.safetensors', which the Hub model does not have"),
        ("plan", "acme/index", None, "'../../../etc/passwd.safetensors', which the Hub model does not have"),
        ("plan", "acme/no-config", None, "has no config.json, and no params.json"),
        ("fetch", "acme/no-weights", None, "no model.safetensors or pytorch_model.bin"),
        ("fetch", "acme/no-sha", None, "could not be fetched from the Hub"),
        ("fetch", "acme/a--b", None, "no Hub id"),
        ("fetch", ID, "nowhere", "has no revision 'nowhere'"),
        ("fetch", ID, "c" * 40, "has no revision"),
        ("fetch", ID, "../../x", "is no revision"),
    ]
    started = time.monotonic()
    answers = ask(env, *((verb, name, revision) for verb, name, revision, _ in cases))
    assert time.monotonic() - started < 15
    for (_, name, _, expected), answer in zip(cases, answers, strict=True):
        assert isinstance(answer, list), (name, answer)
        assert expected in answer[0], name
        assert all(line and "\n" not in line for line in answer), name

    shutil.rmtree(env["HF_HOME"])
    closed = {**env, "HF_ENDPOINT": "http://127.0.0.1:9"}
    ((what, where, _),) = ask(closed, ("fetch", ID, None))
    assert "the connection to the Hub failed" in what
    assert "127.0.0.1:9" in where
    result = quantkit("quantize", ID, "-o", Path(env["HF_HOME"]) / "out", env={**env, "HF_HUB_OFFLINE": "1"})
    assert result.returncode == 2
    assert [line.split(":")[0].strip() for line in result.stderr.splitlines()] == ["error", "in", "hint"]
    assert "HF_HUB_OFFLINE" in result.stderr
    assert not (Path(env["HF_HOME"]) / "out").exists()


def test_a_download_that_breaks_off_leaves_nothing_half(
    server: Hub, env: dict[str, str], small: dict[str, bytes], tmp_path: Path
) -> None:
    server.add(ID, small, fault="truncated")
    ((what, _, _),) = ask(env, ("fetch", ID, None))
    assert "the connection to the Hub failed" in what
    snapshot = tmp_path / "hf" / "hub" / "models--acme--llama" / "snapshots" / SHA
    assert not (snapshot / "model.safetensors").exists()
    ((what, _, _),) = ask({**env, "HF_HUB_OFFLINE": "1"}, ("plan", ID, None))  # the small files alone are no model
    assert "the Hub's cache does not hold all of it" in what
    server.repos[ID].fault = ""
    assert ask(env, ("fetch", ID, None)) == [str(snapshot)]


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
