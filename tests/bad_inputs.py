"""A folder to spoil, and the program that must refuse what is wrong with it: what tests of bad inputs share."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from quantkit.checkpoint.header import read_header
from quantkit.cli import main

Spoil = Callable[[Path], object]
LINEAR = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.layers.1.input_layernorm.weight"
LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 1118459450\n"


class Refusal(NamedTuple):
    what: str
    where: str
    hint: str


Refused = Callable[..., Refusal]


def parse(stderr: str) -> Refusal:
    """The three lines and nothing but them."""
    lines = [line.partition(": ") for line in stderr.splitlines()]
    assert [name for name, _, _ in lines] == ["error", "  in", "  hint"], stderr
    assert stderr.replace("\n", "").isprintable()
    return Refusal(*(text for _, _, text in lines))


@pytest.fixture
def _signals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the program's handlers are not for pytest


@pytest.fixture
def refused(_signals: None, capsys: pytest.CaptureFixture[str]) -> Refused:
    """refused("plan", SRC, …) runs the program in this process, and expects it to refuse with exit code 2."""

    def run(*arguments: object) -> Refusal:
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        stdout, stderr = capsys.readouterr()
        assert stop.value.code == 2
        assert stdout == ""
        return parse(stderr)

    return run


@pytest.fixture
def done(_signals: None, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """done("verify", OUT) runs the program in this process and expects success; its stdout."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as stop:
            main([str(a) for a in arguments])
        stdout, stderr = capsys.readouterr()
        assert stop.value.code == 0, stderr
        return stdout

    return run


@pytest.fixture
def model(tiny: Callable[[str], Path], tmp_path: Path) -> Path:
    """A llama of its own for each test, to be spoiled."""
    return shutil.copytree(tiny("llama"), tmp_path / "model")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, str]:
    """Every path below the folder: the SHA-256 of a file, where a link leads, nothing of a folder."""

    def one(path: Path) -> str:
        if path.is_symlink():
            return os.readlink(path)
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""

    return {str(p.relative_to(folder)): one(p) for p in folder.rglob("*")}


def write(name: str, text: str | bytes) -> Spoil:
    data = text.encode() if isinstance(text, str) else text
    return lambda folder: (folder / name).write_bytes(data)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def poke(model: Path, tensor: str, element: int, bits: int) -> None:
    """The bits of one element, of two bytes."""
    infos, _, _ = read_header(model / "model.safetensors")
    offset = next(t.offset for t in infos if t.name == tensor) + 2 * element
    with (model / "model.safetensors").open("r+b") as f:
        f.seek(offset)
        f.write(struct.pack("<H", bits))


class Payload:
    """Pickles as a call that makes the folder `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)
