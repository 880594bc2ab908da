"""A Hub that takes uploads, on this machine: the endpoints that huggingface_hub calls for a push, and what it stores.

Written from huggingface_hub's requests: create, branch, tree, preupload, LFS batch and PUT, validate-yaml, commit. It
keeps what a real one keeps apart: LFS objects are there once they are sent, a repository shows what was committed.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_secretsecretsecret"
LARGE = ("*.safetensors", "*.bin", "*.pth", "*.model", "*.png")


@dataclass
class Store:
    """commits: of each repository, by id: files, name → content. heads: branch → id. objects: LFS, by SHA-256.

    fault names a way to misbehave; sent: bytes of LFS objects that came, by SHA-256; drop_after: hang up once, when so
    many bytes of LFS objects came. on_create is called when a repository is asked for, on_put when an LFS object comes;
    asked: how many requests came.
    """

    url: str = ""
    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    heads: dict[str, dict[str, str]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    fault: str = ""
    drop_after: int | None = None
    puts: int = 0
    on_create: Callable[[], object] = lambda: None
    on_put: Callable[[], object] = lambda: None
    asked: int = 0

    def add(self, repo: str, files: dict[str, bytes], branch: str = "main") -> None:
        number = len(self.commits.get(repo, {}))
        commit = hashlib.sha1(f"{repo} {branch} {number}".encode()).hexdigest()
        self.commits.setdefault(repo, {})[commit] = files
        self.heads.setdefault(repo, {})[branch] = commit

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.commits[repo][self.heads[repo][branch]]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *_: object) -> None:
        pass

    def parse_request(self) -> bool:
        self.store.asked += 1
        return super().parse_request()

    def reply(self, status: int, body: Any = None, **headers: str) -> None:
        data = json.dumps({} if body is None else body).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, words: str, code: str = "") -> None:
        self.reply(status, {"error": words}, X_Error_Message=words, **({"X_Error_Code": code} if code else {}))

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if not self.may():
            return None
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            return self.tree(match[1], match[2])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            commit = self.commit_of(match[1], match[2] or "main")
            if commit is None:
                return None
            body = {"id": match[1], "modelId": match[1], "sha": commit, "siblings": []}
            body["private"] = self.store.private.get(match[1], False)
            return self.reply(200, body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*match.groups())
        if path != "/api/agent-harnesses":
            self.store.problems.append(f"unknown {self.command} {path}")
        return self.reply(404)

    def do_HEAD(self) -> None:
        return self.do_GET()

    def resolve(self, repo: str, revision: str, name: str) -> None:
        commit = self.commit_of(repo, revision)
        if commit is None:
            return
        content = self.store.commits[repo][commit][name]
        self.send_response(200)
        etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        for key, value in {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        path, data = unquote(urlsplit(self.path).path), self.body()
        if path == "/api/validate-yaml":
            faults = (
                [{"message": '"license" must be one of those that there are'}] if self.store.fault == "card" else []
            )
            return self.reply(400 if faults else 200, {"errors": faults, "warnings": []})
        if not self.may():
            return None
        if path == "/api/repos/create":
            return self.create(json.loads(data))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", path):
            return self.branch(match[1], match[2])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            return self.preupload(match[1], match[2], json.loads(data))
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(data))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            return self.commit(match[1], match[2], data)
        self.store.problems.append(f"unknown POST {path}")
        return self.reply(404)

    def do_PUT(self) -> None:
        oid, length = self.path.rpartition("/")[2], int(self.headers["Content-Length"])
        if "Authorization" in self.headers:
            self.store.problems.append("the token went to the storage")
        store = self.store
        store.puts += 1
        store.on_put()
        if store.drop_after is not None and sum(store.sent.values()) + length > store.drop_after:
            self.rfile.read(length // 2)
            self.close_connection = True
            return None
        data = self.rfile.read(length)
        if len(data) < length:  # the sender is gone; a storage keeps no part of an object
            self.close_connection = True
            return None
        if store.fault == "damage":
            data = data[:-1] + b"?"
        store.objects[oid] = data
        store.sent[oid] += length
        return self.reply(200)

    def may(self) -> bool:
        store = self.store
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(401, "Invalid username or password.")
        elif store.fault == "forbidden":
            self.refuse(403, f"You don't have the rights to do that with {TOKEN}")
        elif store.fault == "down":
            self.refuse(500, "Internal Error")
        else:
            return True
        return False

    def commit_of(self, repo: str, revision: str) -> str | None:
        if repo not in self.store.heads:
            self.refuse(404, "Repository not found", "RepoNotFound")
            return None
        commit = self.store.heads[repo].get(revision, revision)
        if commit not in self.store.commits[repo]:
            self.refuse(404, "Invalid rev id", "RevisionNotFound")
            return None
        return commit

    def create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        self.store.on_create()
        if repo.startswith("others/"):
            return self.refuse(403, f"You don't have the rights to create a model under the namespace {repo}")
        body = {"url": f"{self.store.url}/{repo}", "name": repo, "id": "x"}
        if repo in self.store.heads:
            return self.reply(409, {**body, "error": "You already created this model repo"})
        # An organization's own default is what holds where nothing is asked for.
        visibility = asked.get("visibility") or {True: "private", False: "public", None: None}[asked.get("private")]
        self.store.private[repo] = visibility == "private" or (visibility is None and repo.startswith("discreet/"))
        self.store.add(repo, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        return self.reply(200, body)

    def branch(self, repo: str, name: str) -> None:
        if ".." in name:
            return self.refuse(400, "Invalid branch name")
        if name in self.store.heads[repo]:
            return self.refuse(409, "Reference already exists")
        self.store.add(repo, dict(self.store.files(repo)), name)
        return self.reply(200)

    def tree(self, repo: str, revision: str) -> None:
        commit = self.commit_of(repo, revision)
        if commit is None:
            return None
        assert parse_qs(urlsplit(self.path).query).get("recursive") in (["True"], ["true"], ["1"])
        if self.store.fault == "blind" and len(self.store.commits[repo]) > 1:
            return self.refuse(500, "Internal Error")
        rows = []
        for name, content in self.store.commits[repo][commit].items():
            row: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
            if large(name):
                digest = hashlib.sha256(content).hexdigest()
                row |= {"oid": "f" * 40, "lfs": {"oid": digest, "size": len(content), "pointerSize": 134}}
            else:
                row["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            rows.append(row)
        return self.reply(200, rows)

    def preupload(self, repo: str, revision: str, asked: dict[str, Any]) -> None:
        commit = self.commit_of(repo, revision)
        if commit is None:
            return None
        files = [
            {"path": f["path"], "uploadMode": "lfs" if large(f["path"]) else "regular", "shouldIgnore": False}
            for f in asked["files"]
        ]
        return self.reply(200, {"files": files})

    def batch(self, asked: dict[str, Any]) -> None:
        if self.store.fault == "quota":
            return self.refuse(403, "Private repository storage limit reached, please upgrade your plan")
        objects: list[dict[str, Any]] = []
        for thing in asked["objects"]:
            found = {"oid": thing["oid"], "size": thing["size"]}
            if thing["oid"] not in self.store.objects:
                found["actions"] = {"upload": {"href": f"{self.store.url}/storage/{thing['oid']}"}}
            objects.append(found)
        return self.reply(200, {"transfer": "basic", "objects": objects})

    def commit(self, repo: str, revision: str, data: bytes) -> None:
        store = self.store
        head = self.commit_of(repo, revision)
        if head is None:
            return None
        files = dict(store.commits[repo][head])
        for line in data.decode().splitlines():
            step = json.loads(line)
            value = step["value"]
            if step["key"] == "header":
                if value.get("parentCommit", head) != head:
                    return self.refuse(412, "A commit has happened since. Please refresh and try again.")
            elif step["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif step["key"] == "lfsFile":
                if value["oid"] not in store.objects:
                    return self.refuse(400, f"no such object {value['oid']}")
                files[value["path"]] = store.objects[value["oid"]]
            elif step["key"] == "deletedFile":
                del files[value["path"]]
        store.add(repo, files, revision)
        commit = store.heads[repo][revision]
        if store.fault == "lost":  # the answer is
            self.close_connection = True
            return None
        body = {"commitUrl": f"{store.url}/{repo}/commit/{commit}", "commitOid": commit, "success": True}
        return self.reply(200, body)


def large(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in LARGE)


@contextmanager
def serving() -> Iterator[Store]:
    store = Store()
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Handler,), {"store": store}))
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    store.url = f"http://127.0.0.1:{http.server_port}"
    try:
        yield store
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
    assert store.problems == []


if __name__ == "__main__":  # a rehearsal: docs/publishing.md
    with serving() as hub, contextlib.suppress(KeyboardInterrupt):
        print(f"export HF_ENDPOINT={hub.url} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1", flush=True)
        threading.Event().wait()
