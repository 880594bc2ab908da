"""The command line in a process of its own, without the seconds that imports take.

A process that has imported what commands need is forked once for each of them; the child has folder, variables and
files of its own, and runs `python -m quantkit` to its end, signals and exit code included. What looks at how a process
begins, or at its memory, starts an interpreter instead. With `torch`, torch and transformers are imported already, and
with them huggingface_hub, which reads its variables then: a command that is given others is run without.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

LIGHT = ("quantkit.api", "quantkit.cli_text", "quantkit.cli_publish", "quantkit.runner", "quantkit.kernels.bnb4")
HEAVY = ("torch", "transformers.models.llama.modeling_llama", "quantkit.calibration.stream", "quantkit.evaluator")


class Process:
    """As far as tests use it, a subprocess.Popen with pipes of text."""

    def __init__(self, server: Server, request: Mapping[str, Any], outputs: tuple[Path, Path]) -> None:
        self._server, self._outputs = server, outputs
        self.pid: int = server.ask(request)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = 120) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("quantkit", timeout)
            time.sleep(0.003)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (path.read_text() for path in self._outputs)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server:
    """The process that is forked."""

    def __init__(self, modules: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        self._count = 0
        atexit.register(self.close)

    def ask(self, request: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, words: Sequence[str], cwd: Path | None, env: Mapping[str, str] | None) -> Process:
        self._count += 1
        outputs = [Path(self._folder.name) / f"{self._count}-{name}" for name in ("out", "err")]
        for path in outputs:
            path.touch()
        request = {
            "words": list(words), "cwd": str(cwd or Path.cwd()), "env": dict(os.environ if env is None else env),
            "outputs": [str(path) for path in outputs],
        }  # fmt: skip
        return Process(self, request, (outputs[0], outputs[1]))

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._process.wait()
        self._folder.cleanup()


@cache
def server(torch: bool) -> Server:
    return Server((*LIGHT, *HEAVY) if torch else LIGHT)


def start(
    words: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, torch: bool = False
) -> Process:
    """`quantkit` with these words. torch: with torch and transformers imported."""
    return server(torch).start(words, cwd, env)


def run(
    words: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    torch: bool = False,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    process = start(words, cwd=cwd, env=env, torch=torch)
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(["quantkit", *words], process.wait(), out, err)


def _ended(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _become(request: dict[str, Any]) -> None:
    """In the child: the process that was asked for."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for fd, path in enumerate(["/dev/null", *request["outputs"]]):
        flags = os.O_RDONLY if fd == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, fd)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
    if "torch" in sys.modules and (threads := request["env"].get("OMP_NUM_THREADS")):
        sys.modules["torch"].set_num_threads(int(threads))
    sys.argv = ["quantkit", *request["words"]]
    sys.path[0] = request["cwd"]
    try:
        runpy.run_module("quantkit", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        _end(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        _end(1)
    _end(0)


def _end(code: int) -> None:
    """As an interpreter ends, but for what takes it a second: to take apart what was imported."""
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    os._exit(code)


def _work() -> None:
    """What modules put off until they work the first time, and takes them longer than that work."""
    from numba.core.registry import cpu_target

    from quantkit import card

    cpu_target.target_context.refresh()
    cpu_target.typing_context.refresh()
    for template in Path(card.__file__).with_name("templates").glob("*.md.j2"):
        card._template(template.name.removesuffix(".md.j2"))


def _serve() -> None:
    import importlib

    for name in sys.argv[1:]:
        importlib.import_module(name)
    _work()
    gc.collect()
    gc.freeze()  # a child that looks for cycles does not copy all of it
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            print(json.dumps(_ended(request["poll"])), file=answers)
            continue
        if (pid := os.fork()) == 0:
            answers.close()
            _become(request)
        print(pid, file=answers)


if __name__ == "__main__":
    _serve()
