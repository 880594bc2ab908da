"""Checkpoints of torch written by hand, opcode by opcode and member by member, and the reader that must refuse them."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantkit.checkpoint.torch_zip import read_torch_zip
from quantkit.errors import SourceError

Members = list[tuple[str, bytes]]
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
HOOKS = b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    raw = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def sizes(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(
    key: str = "0", numel: int = 6, offset: int = 0, shape: tuple[int, ...] = (2, 3), stride: tuple[int, ...] = (3, 1)
) -> bytes:
    """Opcodes that leave a float32 tensor on the stack, its numbers free to lie."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(numel) + b"tQ"
    return TENSOR + b"(" + storage + number(offset) + sizes(shape) + sizes(stride) + b"\x89" + HOOKS + b"tR"


def table(*items: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(items) + b"u."


GOOD: Members = [
    ("archive/data.pkl", table(text("weight"), tensor())),
    ("archive/byteorder", b"little"),
    ("archive/data/0", struct.pack("<6f", *range(6))),
    ("archive/version", b"3\n"),
]


def write(path: Path, members: Members, **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as z:
        for name, content in members:
            z.writestr(name, content)
    return path


def with_pickle(path: Path, raw: bytes) -> Path:
    return write(path, [("archive/data.pkl", raw), *GOOD[1:]])


def refused(path: Path) -> SourceError:
    with pytest.raises(SourceError) as e:
        read_torch_zip(path)
    assert e.value.what
    assert e.value.where == str(path)
    assert e.value.hint
    return e.value


class Call:
    """Pickles as a call of `function`, which whoever loads it then makes."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call
