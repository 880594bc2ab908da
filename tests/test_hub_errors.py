"""What stands between a user and a model on the Hub: tokens, proxies, servers and lines that fail. What goes wrong is
said in three lines, and leaves nothing half."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from conftest import Run
from hub_server import ID, SHA, Hub, Repo, ask, local_hash


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
