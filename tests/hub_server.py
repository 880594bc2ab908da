"""A Hub to download from, on this machine: it answers what huggingface_hub asks.

Two ports: the Hub, and the other host to which the real Hub redirects for weights. Every test has a cache of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
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

from quantkit import api

SHA, OLD = "a" * 40, "b" * 40
ID = "acme/llama"


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


@contextlib.contextmanager
def serving(handler: type[Handler], *kinds: str) -> Iterator[Hub]:
    """A port for each kind of host: "url", the Hub, and "cdn", that of weights."""
    state = Hub()
    started = []
    for kind in kinds:
        http = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (handler,), {"hub": state, "is_cdn": kind == "cdn"}))
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


@pytest.fixture
def server() -> Iterator[Hub]:
    with serving(Handler, "url", "cdn") as hub:
        yield hub


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
