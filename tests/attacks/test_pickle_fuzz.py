"""Any bytes and any opcodes at all as a checkpoint: the reader answers with tensors that lie inside the file, or with a
SourceError."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path

import torch
from attacks.torch_files import HOOKS, TENSOR, number, refused, sizes, tensor, text, with_pickle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantkit.checkpoint.torch_zip import read_torch_zip
from quantkit.errors import SourceError


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
