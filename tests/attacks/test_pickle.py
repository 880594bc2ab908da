"""Hostile pickled checkpoints: whatever the file, the reader answers with tensors or a SourceError and runs nothing."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


def test_the_honest_file_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "m.bin", GOOD)
    (t,), raw = read_torch_zip(path)
    assert (t.name, t.dtype, t.shape) == ("weight", "F32", (2, 3))
    assert path.read_bytes()[t.offset : t.offset + t.nbytes] == GOOD[2][1]
    assert raw == GOOD[0][1]
    assert torch.equal(torch.load(path, weights_only=True)["weight"], torch.arange(6.0).reshape(2, 3))


# Code in the pickle


class Call:
    """Pickles as a call of `function`, which whoever loads it then makes."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


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


@pytest.mark.parametrize(
    "raw",
    [
        b"(S'true'\nios\nsystem\n.",  # INST calls without REDUCE
        b"(cos\nsystem\nS'true'\no.",  # OBJ
        b"\x80\x02cos\nsystem\n)\x81.",  # NEWOBJ
        b"\x80\x02\x82\x01.",  # EXT1 takes a global from a registry
        b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",  # a dotted name walks from an allowed one
        b"\x80\x04K\x01K\x02\x93.",  # a global whose name is a number
        b"\x80\x02ctorch\nload\n.",
        b"\x80\x02ctorch._utils\n_import_dotted_name\n.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",  # an allowed name, not one to call
        b"\x80\x02ccollections\nOrderedDict\n}}b.",  # attributes of a class
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}" + text("__code__") + b"Nsb.",
        b"\x80\x02ccollections\nOrderedDict\n(" + text("os") + b"tR.",
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n(" + text("not a tensor") + b"\x89NtR.",
        b"\x80\x02" + text("function") + b")R.",
    ],
)
def test_other_ways_to_code_are_refused(tmp_path: Path, raw: bytes) -> None:
    refused(with_pickle(tmp_path / "m.bin", raw))


def test_names_cannot_drive_the_terminal(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "m.bin", b"\x80\x02c\x1b[2Jos\n" + b"x" * 100_000 + b"\n.")
    message = refused(path).what
    assert "\x1b" not in message
    assert len(message) < 500


# Pickles that exhaust or confuse


BOMBS = {
    "deep tuple": b")" + b"\x85" * 300_000,
    "deep tuple in a table": table(text("weight"), b")" + b"\x85" * 300_000),
    "deep tuple as a name": table(b")" + b"\x85" * 300_000, b"N"),  # its hash would overflow the C stack
    "doubling tuple as a name": table(b")" + b"q\0h\0\x86" * 60, b"N"),  # its hash would take 2**60 steps
    "doubling tuple as a shape": table(text("a"), TENSOR, b"(", b")" + b"q\0h\0\x86" * 60, b"tR"),
    "deep table": b"}" * 300_000 + text("a") * 1 + b"Ns" * 2,
    "table in itself": b"\x80\x02}q\0" + text("a") + b"h\0s.",
    "marks": b"(" * 300_000,
    "missing memo": b"\x80\x02h\x07.",
    "endless text": b"\x80\x02X\xff\xff\xff\xff",
    "endless bytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f",
    "endless frame": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7fN.",
    "long number": b"I" + b"9" * 100_000 + b"\n.",
    "bad escape": b"S'\\q'\n.",
    "no stop": b"\x80\x02}",
    "empty": b"",
    "two values": b"\x80\x02}}.",
    "bytes after stop": b"\x80\x02}.}",
    "open mark": b"\x80\x02(}.",
    "no mark": b"\x80\x02t.",
    "pops below its mark": b"\x80\x02}" + text("a") + b"(Ns.",
    "odd items": b"\x80\x02}(" + text("a") + b"u.",
    "unknown opcode": b"\x80\x02\xff.",
    "name twice": table(text("weight"), tensor(), text("weight"), tensor()),
    "half a character": table(b"X\3\0\0\0\xed\xa0\x80", tensor()),
    "not utf-8": table(b"X\1\0\0\0\xff", tensor()),
    "number as a name": table(b"K\1", tensor()),
    "storage id a number": b"\x80\x02K\1Q.",
    "storage id too short": b"\x80\x02" + text("storage") + b"\x85Q.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(tmp_path: Path, name: str) -> None:
    refused(with_pickle(tmp_path / "m.bin", BOMBS[name]))


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


# Zips that readers disagree about


def test_member_named_twice(tmp_path: Path) -> None:
    evil = ("archive/data.pkl", pickle.dumps(Call(os.system, "true")))
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = write(tmp_path / "m.bin", [evil, *GOOD])
    assert "twice" in refused(path).what


def test_compressed_members(tmp_path: Path) -> None:
    path = write(tmp_path / "m.bin", GOOD, compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(path).what


@pytest.mark.parametrize(
    "name",
    ["../evil", "archive/../evil", "/archive/evil", "archive//evil", "archive/./evil", "archive\\..\\evil",
     "archive/evil\\x", "archive/", "archive", "other/evil", "archive/\x01/..", "C:/evil"],
)  # fmt: skip
def test_path_like_member_names(tmp_path: Path, name: str) -> None:
    refused(write(tmp_path / "m.bin", [*GOOD, (name, b"evil")]))


def test_member_name_with_a_zero_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "m.bin", [*GOOD, ("archive/evil_x", b"evil")])
    path.write_bytes(path.read_bytes().replace(b"evil_x", b"evil\0x"))
    assert "plain path" in refused(path).what


def test_no_pickle(tmp_path: Path) -> None:
    assert "has no 'archive/data.pkl'" in refused(write(tmp_path / "m.bin", GOOD[1:])).what


def test_big_endian(tmp_path: Path) -> None:
    assert "big-endian" in refused(write(tmp_path / "m.bin", [GOOD[0], ("archive/byteorder", b"big"), *GOOD[2:]])).what


def entry(blob: bytes, name: bytes) -> int:
    """Where the zip's table lists a member (its name is found last there)."""
    return blob.rindex(name) - 46


def patch(path: Path, at: int, content: bytes) -> None:
    blob = bytearray(path.read_bytes())
    blob[at : at + len(content)] = content
    path.write_bytes(blob)


# Field of the table's entry of data/0: offset in the entry, and what a liar writes there.
@pytest.mark.parametrize(
    ("field", "value"),
    [
        (8, b"\x01\0"),  # encrypted
        (8, b"\x20\0"),  # patch data
        (8, b"\x40\0"),  # strong encryption
        (10, b"\x08\0"),  # deflated
        (20, struct.pack("<I", 23)),  # stored, in another number of bytes
        (20, struct.pack("<II", 20, 20)),  # a storage cut short
        (20, struct.pack("<II", 28, 28)),  # a storage that runs into the next member
        (20, struct.pack("<II", 2**31, 2**31)),  # past the end
        (20, b"\xff" * 8),  # saturated, without the zip64 field
        (28, struct.pack("<H", 3)),  # the name's length
        (30, struct.pack("<H", 40)),  # the extra field's length
        (42, struct.pack("<I", 0)),  # another member's header
        (42, struct.pack("<I", 2**31)),
        (46, b"Archive"),  # a name that the local header does not have
    ],
)
def test_lying_zip_table(tmp_path: Path, field: int, value: bytes) -> None:
    path = write(tmp_path / "m.bin", GOOD)
    patch(path, entry(path.read_bytes(), b"archive/data/0") + field, value)
    refused(path)


@pytest.mark.parametrize(("field", "value"), [(0, b"PK\1\2"), (6, b"\1\0"), (8, b"\x08\0"), (26, b"\1\0"), (30, b"A")])
def test_lying_local_header(tmp_path: Path, field: int, value: bytes) -> None:
    path = write(tmp_path / "m.bin", GOOD)
    patch(path, path.read_bytes().index(b"archive/data/0") - 30 + field, value)
    assert "disagree" in refused(path).what


@pytest.mark.parametrize(
    ("flags", "method", "message"),
    [
        (1, 0, "encrypted"),
        (0x20, 0, "encrypted"),
        (0x40, 0, "encrypted"),
        (0x2000, 0, "encrypted"),
        (0, 8, "compressed"),
    ],
)
def test_unusual_members_that_agree_with_themselves(tmp_path: Path, flags: int, method: int, message: str) -> None:
    path = write(tmp_path / "m.bin", GOOD)
    blob = path.read_bytes()
    patch(path, blob.index(b"archive/data/0") - 30 + 6, struct.pack("<2H", flags, method))
    patch(path, entry(blob, b"archive/data/0") + 8, struct.pack("<2H", flags, method))
    assert message in refused(path).what


def test_last_member_runs_into_the_table(tmp_path: Path) -> None:
    path = write(tmp_path / "m.bin", GOOD)
    patch(path, entry(path.read_bytes(), b"archive/version") + 20, struct.pack("<II", 3, 3))
    assert "past the zip's data" in refused(path).what


def test_members_that_overlap(tmp_path: Path) -> None:
    """A storage whose bytes are a whole member of their own."""
    inner = b"archive/data/1"
    hidden = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 33, 0, 4, 4, len(inner), 0) + inner + b"evil"
    path = write(tmp_path / "m.bin", [*GOOD, ("archive/data/2", hidden), ("archive/data/1", b"evil")])
    blob = path.read_bytes()
    patch(path, entry(blob, inner) + 42, struct.pack("<I", blob.index(hidden)))
    assert "overlap" in refused(path).what


def test_damaged_pickle(tmp_path: Path) -> None:
    path = write(tmp_path / "m.bin", GOOD)
    patch(path, path.read_bytes().index(b"weight"), b"Weight")
    assert "CRC-32" in refused(path).what


def test_bytes_before_and_behind_the_zip(tmp_path: Path) -> None:
    path = write(tmp_path / "m.bin", GOOD)
    blob = path.read_bytes()
    for around in (blob + b"x", blob + blob, blob[:-2] + b"\1\0x", b"PK\3\4" + blob, b"#!/bin/sh\n" + blob):
        path.write_bytes(around)
        refused(path)


def test_table_of_more_members_than_it_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "m.bin", GOOD)
    patch(path, len(path.read_bytes()) - 22 + 8, struct.pack("<2H", 3, 3))
    assert "more than it counts" in refused(path).what


def test_comment_that_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "m.bin", GOOD)
    patch(path, len(path.read_bytes()) - 2, b"\1\0")
    assert "fill the file" in refused(path).what


def test_other_zip64_end(tmp_path: Path) -> None:
    """A locator that leads elsewhere: readers that follow it would see another table than those that do not."""
    path = tmp_path / "m.bin"
    torch.save({"weight": torch.ones(2)}, path)
    patch(path, len(path.read_bytes()) - 42 + 8, struct.pack("<Q", 64))
    assert "two ends disagree" in refused(path).what


@pytest.mark.parametrize("field", [8, 10, 12, 16])
def test_lying_end_of_the_zip(tmp_path: Path, field: int) -> None:
    """Counts, length and offset of the table, in the end that Python writes and in the two that torch writes."""
    path = write(tmp_path / "m.bin", GOOD)
    patch(path, len(path.read_bytes()) - 22 + field, b"\1\0")
    refused(path)
    torch.save({"weight": torch.ones(2)}, path)
    patch(path, len(path.read_bytes()) - 22 + field, b"\1\0")
    assert "two ends disagree" in refused(path).what


def test_a_large_table_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    with path.open("wb") as f:
        f.write(b"PK\3\4")
        f.seek(2**32)  # sparse
        f.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 9, 9, 2**32 - 4, 4, 0))
    assert "the limit is" in refused(path).what


# Any bytes at all


def saved() -> bytes:
    file = io.BytesIO()
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    torch.save({"a": base, "b": base[1:], "c": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))}, file)
    return file.getvalue()


SAVED = saved()
PICKLE_AT = SAVED.index(b"\x80\x02")
PICKLE_SIZE = zipfile.ZipFile(io.BytesIO(SAVED)).getinfo("archive/data.pkl").file_size
QUICK = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def attempt(path: Path, blob: bytes) -> None:
    """Reads; tensors that come back must lie inside the file."""
    path.write_bytes(blob)
    try:
        tensors, _ = read_torch_zip(path)
    except SourceError:
        return
    for t in tensors:
        assert 0 <= t.offset <= t.offset + t.nbytes <= len(blob)


def flip(blob: bytes, flips: list[tuple[int, int]]) -> bytes:
    changed = bytearray(blob)
    for at, value in flips:
        changed[at % len(changed)] = value
    return bytes(changed)


FLIPS = st.lists(st.tuples(st.integers(0, len(SAVED) - 1), st.integers(0, 255)), min_size=1, max_size=4)


@given(FLIPS)
@settings(QUICK, max_examples=400)
def test_fuzz_flipped_bytes(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    attempt(tmp_path / "m.bin", flip(SAVED, flips))


@given(FLIPS)
@settings(QUICK, max_examples=600)
def test_fuzz_flipped_pickle(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    """The CRC is mended, so that the change reaches the pickle's machine."""
    raw = flip(SAVED[PICKLE_AT : PICKLE_AT + PICKLE_SIZE], flips)
    blob = SAVED[:PICKLE_AT] + raw + SAVED[PICKLE_AT + PICKLE_SIZE :]
    at = blob.index(b"PK\1\2") + 16
    attempt(tmp_path / "m.bin", blob[:at] + struct.pack("<I", zlib.crc32(raw)) + blob[at + 4 :])


# Whole opcodes in any order go deeper than bytes do.
OPCODES = [
    b"}", b")", b"(", b"t", b"u", b"s", b"R", b"b", b"Q", b"N", b"\x88", b"\x85", b"\x86", b"\x87", b"q\0", b"h\0",
    b"\x94", b"\x93", b"K\1", b"G" + bytes(8), TENSOR, HOOKS, b"ctorch._utils\n_rebuild_tensor_v3\n",
    b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nuint16\n", b"ctorch\nFloatStorage\n",
    b"ctorch.storage\nUntypedStorage\n", text("storage"), text("0"), number(2**70), tensor(), sizes((2, 3)),
]  # fmt: skip


@given(st.lists(st.sampled_from(OPCODES), max_size=30))
@settings(QUICK, max_examples=400)
def test_fuzz_opcodes(tmp_path: Path, opcodes: list[bytes]) -> None:
    attempt(with_pickle(tmp_path / "m.bin", b"".join(opcodes) + b"."), (tmp_path / "m.bin").read_bytes())


@given(st.binary(max_size=300), st.sampled_from([b"", b"PK\3\4", SAVED[:100], SAVED[:-98]]))
@settings(QUICK, max_examples=200)
def test_fuzz_random_bytes(tmp_path: Path, noise: bytes, start: bytes) -> None:
    attempt(tmp_path / "m.bin", start + noise)
    attempt(tmp_path / "m.bin", start + noise + SAVED[-98:])


def test_every_truncation(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    for size in range(0, len(SAVED), 7):
        path.write_bytes(SAVED[:size])
        refused(path)
