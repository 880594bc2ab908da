"""Hostile pickles in a checkpoint: the reader answers with tensors that lie inside the file or with a SourceError, runs
nothing, and takes neither time nor memory without bounds."""

from __future__ import annotations

import io
import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attacks.torch_files import (
    GOOD,
    HOOKS,
    TENSOR,
    Call,
    number,
    refused,
    sizes,
    table,
    tensor,
    text,
    with_pickle,
    write,
)

from quantkit.checkpoint.torch_zip import read_torch_zip


def test_the_honest_file_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "m.bin", GOOD)
    (t,), raw = read_torch_zip(path)
    assert (t.name, t.dtype, t.shape) == ("weight", "F32", (2, 3))
    assert path.read_bytes()[t.offset : t.offset + t.nbytes] == GOOD[2][1]
    assert raw == GOOD[0][1]
    assert torch.equal(torch.load(path, weights_only=True)["weight"], torch.arange(6.0).reshape(2, 3))


# Code in the pickle


def nested_load(marker: Path) -> Call:
    """`torch.storage._load_from_bytes` unpickles its argument without restriction: to allow `torch.*` is a hole."""
    inner = io.BytesIO()
    torch.save(Call(os.system, f"touch {marker}"), inner)
    return Call(torch.storage._load_from_bytes, inner.getvalue())


PAYLOADS: dict[str, Callable[[Path], Any]] = {
    "posix.system": lambda m: Call(os.system, f"touch {m}"),
    "builtins.eval": lambda m: Call(eval, f"open({str(m)!r}, 'w').close()"),
    "builtins.exec": lambda m: Call(exec, f"open({str(m)!r}, 'w').close()"),
    "io.open": lambda m: Call(open, str(m), "w"),
    "torch.storage._load_from_bytes": nested_load,
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:Detected pickle protocol")
def test_calls_are_refused_and_not_made(tmp_path: Path, name: str, protocol: int, nested: bool) -> None:
    marker, path = tmp_path / "marker", tmp_path / "m.bin"
    payload = PAYLOADS[name](marker)
    raw = pickle.dumps({"weight": payload} if nested else payload, protocol=protocol)
    with_pickle(path, raw)
    message = refused(path).what
    assert not marker.exists()
    assert name in message.replace("__builtin__", "builtins")
    # The same file makes the call elsewhere: without this the test could not fail.
    with zipfile.ZipFile(path) as z, z.open("archive/data.pkl") as f:
        pickle.load(f)
    assert marker.exists()


def test_a_file_that_torch_would_run(tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "m.bin"
    torch.save({"fine": torch.ones(2), "weight": Call(os.system, f"touch {marker}")}, path)
    assert "posix.system" in refused(path).what
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_calls_in_the_oldest_protocol_are_refused(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "m.bin", pickle.dumps(Call(os.system, "true"), protocol=0))
    assert "posix.system" in refused(path).what


FORM = "in a form that torch.save does not write"


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"(S'true'\nios\nsystem\n.", "opcode STRING"),
        (b"(X\4\0\0\0trueios\nsystem\n.", "opcode INST"),  # calls without REDUCE
        (b"(cos\nsystem\nS'true'\no.", "asks for 'os.system'"),  # OBJ
        (b"\x80\x02cos\nsystem\n)\x81.", "asks for 'os.system'"),  # NEWOBJ
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "opcode NEWOBJ"),
        (b"\x80\x02\x82\x01.", "opcode EXT1"),  # takes a global from a registry
        # A dotted name walks from an allowed one.
        (
            b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
            "asks for 'collections.OrderedDict.__init__'",
        ),
        (b"\x80\x04K\x01K\x02\x93.", "a global without a name"),  # whose name is a number
        (b"\x80\x02ctorch\nload\n.", "asks for 'torch.load'"),
        (b"\x80\x02ctorch._utils\n_import_dotted_name\n.", "asks for 'torch._utils._import_dotted_name'"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", f"'torch.FloatStorage' {FORM}"),  # an allowed name, not one to call
        (b"\x80\x02ccollections\nOrderedDict\n}b.", "sets attributes"),  # of a class
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}" + text("__code__") + b"Nsb.", "sets attributes"),
        (b"\x80\x02ccollections\nOrderedDict\n(" + text("os") + b"tR.", FORM),
        (b"\x80\x02ctorch._utils\n_rebuild_parameter\n(" + text("not a tensor") + b"\x89NtR.", FORM),
        (b"\x80\x02" + text("function") + b")R.", f"of type str {FORM}"),
    ],
)
def test_other_ways_to_code_are_refused(tmp_path: Path, raw: bytes, why: str) -> None:
    assert why in refused(with_pickle(tmp_path / "m.bin", raw)).what


def test_names_cannot_drive_the_terminal(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "m.bin", b"\x80\x02c\x1b[2Jos\n" + b"x" * 100_000 + b"\n.")
    message = refused(path).what
    assert "\x1b" not in message
    assert len(message) < 500


# Pickles that exhaust or confuse


INVALID = "not a valid pickle"
BOMBS: dict[str, tuple[bytes, str]] = {
    "deep tuple": (b")" + b"\x85" * 300_000, INVALID),
    "deep tuple in a table": (table(text("weight"), b")" + b"\x85" * 300_000), "'weight' is of type tuple"),
    "deep tuple as a name": (
        table(b")" + b"\x85" * 300_000, b"N"),
        "name is of type tuple",
    ),  # its hash would overflow the C stack
    "doubling tuple as a name": (
        table(b")" + b"q\0h\0\x86" * 60, b"N"),
        "name is of type tuple",
    ),  # its hash would take 2**60 steps
    "doubling tuple as a shape": (
        table(text("a"), TENSOR, b"(", b")" + b"q\0h\0\x86" * 60, b"tR"),
        "in a form that torch.save does not write",
    ),
    "deep table": (b"}" * 300_000 + text("a") + b"Ns" * 2, "name is of type dict"),
    "table in itself": (b"\x80\x02}q\0" + text("a") + b"h\0s.", "'a' is of type dict"),
    "marks": (b"(" * 300_000, INVALID),
    "missing memo": (b"\x80\x02h\x07.", INVALID),
    "endless text": (b"\x80\x02X\xff\xff\xff\xff", INVALID),
    "endless bytes": (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f", INVALID),
    "endless frame": (b"\x80\x04\x95" + b"\xff" * 7 + b"\x7fN.", "not a table of tensors"),
    "long number": (b"I" + b"9" * 100_000 + b"\n.", INVALID),
    "bad escape": (b"S'\\q'\n.", INVALID),
    "no stop": (b"\x80\x02}", INVALID),
    "empty": (b"", INVALID),
    "two values": (b"\x80\x02}}.", "does not end where"),
    "bytes after stop": (b"\x80\x02}.}", "does not end where"),
    "open mark": (b"\x80\x02(}.", "does not end where"),
    "no mark": (b"\x80\x02t.", INVALID),
    "pops below its mark": (b"\x80\x02}" + text("a") + b"(Ns.", INVALID),
    "odd items": (b"\x80\x02}(" + text("a") + b"u.", INVALID),
    "unknown opcode": (b"\x80\x02\xff.", INVALID),
    "name twice": (table(text("weight"), tensor(), text("weight"), tensor()), "names 'weight' twice"),
    "half a character": (table(b"X\3\0\0\0\xed\xa0\x80", tensor()), "is not valid text"),
    "not utf-8": (table(b"X\1\0\0\0\xff", tensor()), "UnicodeDecodeError"),
    "number as a name": (table(b"K\1", tensor()), "name is of type int"),
    "storage id a number": (b"\x80\x02K\1Q.", "refers to a storage in a form"),
    "storage id too short": (b"\x80\x02" + text("storage") + b"\x85Q.", "refers to a storage in a form"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(tmp_path: Path, name: str) -> None:
    raw, why = BOMBS[name]
    assert why in refused(with_pickle(tmp_path / "m.bin", raw)).what


def test_a_far_memo_costs_nothing(tmp_path: Path) -> None:
    """Python's own unpickler would reserve a list of 64 GB here."""
    assert read_torch_zip(with_pickle(tmp_path / "m.bin", b"\x80\x02}r\xff\xff\xff\xff."))[0] == []


def test_steps_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.checkpoint.torch_zip.MAX_STEPS", 1000)
    path = with_pickle(tmp_path / "m.bin", b"\x80\x02" + b"N" * 1001)
    assert "more than 1,000 steps" in refused(path).what


def test_a_large_pickle_is_not_read(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "m.bin", bytes(17 * 2**20))
    tracemalloc.start()
    try:
        assert "the limit is" in refused(path).what
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


# Tensors that reach outside their storage


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"key": "7"}, "has no storage '7'"),
        ({"key": "../version"}, "has no storage"),
        ({"numel": 7}, "has 24 bytes, the pickle promises 28"),
        ({"numel": 5}, "has 24 bytes, the pickle promises 20"),
        ({"numel": -6}, "promises -24"),
        ({"offset": 1}, "outside its storage"),
        ({"offset": -1}, "outside its storage"),
        ({"offset": 2**62}, "outside its storage"),
        ({"shape": (3, 3)}, "outside its storage"),
        ({"shape": (2**47, 3)}, "outside its storage"),
        ({"shape": (2**63, 3)}, "not a list of sizes"),
        ({"shape": (-2, 3)}, "not a list of sizes"),
        ({"shape": (1,) * 9, "stride": (1,) * 9}, "not a list of sizes"),
        ({"shape": (2,), "stride": (3, 1)}, "do not fit"),
        ({"stride": (0, 0)}, "not row-major"),
        ({"stride": (-3, -1)}, "not row-major"),
        ({"shape": (0, 3), "offset": 7}, "outside its storage"),
    ],
)
def test_lying_tensors(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    what = refused(with_pickle(tmp_path / "m.bin", table(text("weight"), tensor(**wrong)))).what
    assert "tensor 'weight'" in what
    assert message in what


def test_lazy_bits_are_refused(tmp_path: Path) -> None:
    """The seventh argument, in the form for types without a storage class: a view to be negated when it is read."""
    storage = (
        b"(" + text("storage") + b"ctorch.storage\nUntypedStorage\n" + text("0") + text("cpu") + number(24) + b"tQ"
    )
    start = b"ctorch._utils\n_rebuild_tensor_v3\n(" + storage + number(0) + sizes((12,)) + sizes((1,)) + b"\x89" + HOOKS
    raw = table(text("weight"), start + b"ctorch\nuint16\ntR")
    assert read_torch_zip(with_pickle(tmp_path / "m.bin", raw))[0][0].dtype == "U16"
    raw = table(text("weight"), start + b"ctorch\nuint16\n}" + text("neg") + b"\x88stR")
    assert "_rebuild_tensor_v3' in a form" in refused(with_pickle(tmp_path / "m.bin", raw)).what
