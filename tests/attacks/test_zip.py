"""Checkpoints whose zip is one that readers disagree about: each is refused, whatever lies in its members."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from attacks.torch_files import GOOD, Call, refused, write


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
    message = refused(write(tmp_path / "m.bin", [*GOOD, (name, b"evil")])).what
    assert ("do not lie below one folder" if name in ("other/evil", "C:/evil") else "is not a plain path") in message


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
    ("field", "value", "why"),
    [
        (8, b"\x01\0", "encrypted or of a form"),  # encrypted
        (8, b"\x20\0", "encrypted or of a form"),  # patch data
        (8, b"\x40\0", "encrypted or of a form"),  # strong encryption
        (10, b"\x08\0", "compressed"),  # deflated
        (20, struct.pack("<I", 23), "compressed"),  # stored, in another number of bytes
        (20, struct.pack("<II", 20, 20), "has 20 bytes, the pickle promises 24"),  # a storage cut short
        (20, struct.pack("<II", 28, 28), "overlap"),  # a storage that runs into the next member
        (20, struct.pack("<II", 2**31, 2**31), "runs past the zip's data"),  # past the end
        (20, b"\xff" * 8, "runs past the zip's data"),  # saturated, without the zip64 field
        (28, struct.pack("<H", 3), "member 'arc' is not a plain path"),  # the name's length
        (30, struct.pack("<H", 40), "cut short"),  # the extra field's length
        (42, struct.pack("<I", 0), "disagree"),  # another member's header
        (42, struct.pack("<I", 2**31), "disagree"),
        (46, b"Archive", "disagree"),  # a name that the local header does not have
    ],
)
def test_lying_zip_table(tmp_path: Path, field: int, value: bytes, why: str) -> None:
    path = write(tmp_path / "m.bin", GOOD)
    patch(path, entry(path.read_bytes(), b"archive/data/0") + field, value)
    assert why in refused(path).what


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
