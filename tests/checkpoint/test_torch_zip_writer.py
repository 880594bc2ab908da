"""Torch zips of our own layout: torch, zipfile and our reader must each find every tensor where the plan says."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import random
import struct
import subprocess
import sys
import zipfile
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.checkpoint.header import DTYPE_BITS, TensorSpec
from quantkit.checkpoint.torch_zip import MAX_STEPS, read_torch_zip
from quantkit.checkpoint.torch_zip_writer import CLASSES, TorchZipPlan, member_crc, plan_torch_zip
from quantkit.errors import RunError, SourceError

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64,
}  # fmt: skip
SHAPES = [(), (0,), (1,), (7,), (0, 7), (4, 0, 3), (3, 5), (2, 3, 4), (1, 2, 1, 2, 1), (300, 3)]


def content(spec: TensorSpec, rng: random.Random) -> bytes:
    return bytes(rng.choices((0, 1), k=spec.nbytes)) if spec.dtype == "BOOL" else rng.randbytes(spec.nbytes)


def write(path: Path, specs: list[TensorSpec], *, seed: int = 0, **options: str) -> tuple[TorchZipPlan, list[bytes]]:
    """The file as a run makes it: what is fixed, the tensors in any order, CRC-32s of what was written, the ending."""
    rng = random.Random(seed)
    plan = plan_torch_zip(specs, **options)
    data = [content(spec, rng) for spec in specs]
    written = bytearray(plan.nbytes)  # how often each byte was written

    def pwrite(at: int, raw: bytes) -> None:
        assert os.pwrite(fd, raw, at) == len(raw)
        for i in range(at, at + len(raw)):
            written[i] += 1

    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        os.ftruncate(fd, plan.nbytes)
        steps: list[tuple[int, bytes]] = [*plan.fixed, *zip(plan.offsets, data, strict=True)]
        rng.shuffle(steps)
        for at, raw in steps:
            pwrite(at, raw)
        buffer = memoryview(bytearray(rng.randint(1, 100)))
        crcs = []
        for i, (at, spec) in enumerate(zip(plan.offsets, specs, strict=True)):
            crcs.append(member_crc(lambda offset, part: os.preadv(fd, [part], offset), at, spec.nbytes, buffer))
            assert os.pwrite(fd, struct.pack("<I", crcs[-1]), plan.crc_offset(i)) == 4
        pwrite(*plan.ending(crcs))
    finally:
        os.close(fd)
    assert written == bytes([1]) * plan.nbytes, "a byte was left out, or written twice"
    return plan, data


def same(table: Any, specs: list[TensorSpec], data: list[bytes]) -> None:
    assert type(table) is dict
    assert list(table) == [s.name for s in specs]
    for spec, raw in zip(specs, data, strict=True):
        tensor = table[spec.name]
        assert (tensor.dtype, tuple(tensor.shape)) == (TORCH[spec.dtype], spec.shape)
        assert tensor.stride() == torch.empty(spec.shape).stride()
        assert not tensor.requires_grad
        assert (tensor.storage_offset(), tensor.untyped_storage().nbytes()) == (0, spec.nbytes)
        assert tensor.clone().reshape(-1).view(torch.uint8).numpy().tobytes() == raw


def prove(path: Path, specs: list[TensorSpec], plan: TorchZipPlan, data: list[bytes]) -> None:
    """Everybody who reads such files sees the same tensors."""
    assert path.stat().st_size == plan.nbytes
    blob = path.read_bytes()
    for offset, spec, raw in zip(plan.offsets, specs, data, strict=True):
        assert offset % 64 == 0
        assert blob[offset : offset + spec.nbytes] == raw
    same(torch.load(path, weights_only=True), specs, data)
    same(torch.load(path, weights_only=False), specs, data)
    same(torch.load(path, weights_only=True, mmap=True), specs, data)
    infos, _ = read_torch_zip(path)
    found = {t.name: (t.dtype, t.shape, t.offset, t.file) for t in infos}
    expected = zip(specs, plan.offsets, strict=True)
    assert found == {s.name: (s.dtype, s.shape, offset, path.name) for s, offset in expected}
    with zipfile.ZipFile(path) as z:
        assert z.testzip() is None  # every CRC-32, and names against those of the local headers
        for m in z.infolist():
            assert m.extra == b""
            assert blob[m.header_offset + 14 : m.header_offset + 26] == struct.pack("<3I", m.CRC, *[m.file_size] * 2)


@pytest.mark.parametrize("dtype", CLASSES)
def test_dtypes_and_shapes(tmp_path: Path, dtype: str) -> None:
    specs = [TensorSpec(f"t{i}", dtype, shape) for i, shape in enumerate(SHAPES)]
    prove(tmp_path / "a.pth", specs, *write(tmp_path / "a.pth", specs))


def test_every_type_with_a_storage_class() -> None:
    assert set(CLASSES) == set(TORCH)


@pytest.mark.parametrize("specs", [[], [TensorSpec("empty", "F32", (0,))], [TensorSpec("", "U8", (1,))]])
def test_smallest(tmp_path: Path, specs: list[TensorSpec]) -> None:
    prove(tmp_path / "a.pth", specs, *write(tmp_path / "a.pth", specs))


def test_names(tmp_path: Path) -> None:
    names = ["naïve.重み", "a/b\\..", "x\n\0'\"", "🦙" * 80, "layers.0.attention.wq.weight", "storage", "cpu", "0"]
    specs = [TensorSpec(name, "BF16", (2, 2)) for name in names]
    for folder in ("consolidated.00", "重み", "f" * 200):
        prove(tmp_path / "a.pth", specs, *write(tmp_path / "a.pth", specs, folder=folder))
        with zipfile.ZipFile(tmp_path / "a.pth") as z:
            assert {name.partition("/")[0] for name in z.namelist()} == {folder}


def test_thousands_of_tensors(tmp_path: Path) -> None:
    rng = random.Random(1)
    specs = [TensorSpec(f"layers.{i}.weight", rng.choice(list(TORCH)), (rng.randrange(4),)) for i in range(3000)]
    prove(tmp_path / "a.pth", specs, *write(tmp_path / "a.pth", specs))


@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=6, unique=True),
    seed=st.integers(0, 2**32),
    draw=st.data(),
)
def test_any_specs(tmp_path_factory: pytest.TempPathFactory, names: list[str], seed: int, draw: st.DataObject) -> None:
    shapes = st.lists(st.integers(0, 4), max_size=5).map(tuple)
    specs = [TensorSpec(n, draw.draw(st.sampled_from(sorted(TORCH))), draw.draw(shapes)) for n in names]
    path = tmp_path_factory.getbasetemp() / "any.pth"
    prove(path, specs, *write(path, specs, seed=seed))


@pytest.mark.parametrize("n", [0, 1, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32, 2**39, 2**47 + 5])
def test_numbers(n: int) -> None:
    """Every length that a number can have, in the pickle's storage, shape and stride."""

    class Names(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return dict if name == "OrderedDict" else lambda *arguments: arguments

        def persistent_load(self, pid: Any) -> Any:
            return pid[0], *pid[2:]

    plan = plan_torch_zip([TensorSpec("w", "U8", (3, n))])
    view = (("storage", "0", "cpu", 3 * n), 0, (3, n), (max(n, 1), 1), False, {})
    assert Names(io.BytesIO(plan.fixed[0][1][64:])).load() == {"w": view}


GOLDEN = {  # torch 1.13, 2.1 and 2.13, zipfile and Info-ZIP's unzip read these bytes
    0: b"PK\3\4\0\0\0\x08\0\0\0\0!\0\xaf\x80\xf2\x8b\x94\0\0\0\x94\0\0\0\n\0\x18\0m/data.pklFB\x14\0" + b"Z" * 20,
    64: b"\x80\2}(X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\nq\0((X\7\0\0\0storageq\1ctorch\nBFloat16Storage\nq\2",
    150: b"X\1\0\0\x000X\3\0\0\0cpuq\3K\3tQK\0K\3\x85K\1\x85\x89ccollections\nOrderedDict\nq\4)RtRu.",
    212: b"PK\3\4\0\0\0\x08\0\0\0\0!\0\x85=\xe3\x19\6\0\0\0\6\0\0\0\x0b\0C\0m/byteorderFB?\0" + b"Z" * 63 + b"little",
    326: b"PK\3\4\0\0\0\x08\0\0\0\0!\0\xd1\x9egU\2\0\0\0\2\0\0\0\t\0\x13\0m/versionFB\x0f\0" + b"Z" * 15 + b"3\n",
    386: b"PK\3\4\0\0\0\x08\0\0\0\0!\0\x0f\xac\xd9\xf7\6\0\0\0\6\0\0\0\x08\0\x18\0m/data/0FB\x14\0" + b"Z" * 20,
    448: b"\x80?\0@\xc0\x7f",
    454: b"PK\1\2\0\0\0\0\0\x08\0\0\0\0!\0\xaf\x80\xf2\x8b\x94\0\0\0\x94\0\0\0\n" + bytes(17) + b"m/data.pkl",
    510: b"PK\1\2\0\0\0\0\0\x08\0\0\0\0!\0\x85=\xe3\x19\6\0\0\0\6\0\0\0\x0b" + bytes(13) + b"\xd4\0\0\0m/byteorder",
    567: b"PK\1\2\0\0\0\0\0\x08\0\0\0\0!\0\xd1\x9egU\2\0\0\0\2\0\0\0\t" + bytes(13) + b"F\1\0\0m/version",
    622: b"PK\1\2\0\0\0\0\0\x08\0\0\0\0!\0\x0f\xac\xd9\xf7\6\0\0\0\6\0\0\0\x08" + bytes(13) + b"\x82\1\0\0m/data/0",
    676: b"PK\6\6," + bytes(7) + b"-\0-" + bytes(9) + b"\4\0\0\0\0\0\0\0\4\0\0\0\0\0\0\0",
    716: b"\xde\0\0\0\0\0\0\0\xc6\1\0\0\0\0\0\0PK\6\7\0\0\0\0\xa4\2\0\0\0\0\0\0\1\0\0\0",
    752: b"PK\5\6\0\0\0\0\4\0\4\0\xde\0\0\0\xc6\1\0\0\0\0",
}


def test_golden() -> None:
    plan = plan_torch_zip([TensorSpec("w", "BF16", (3,))], folder="m")
    blob = bytearray(plan.nbytes)
    data = torch.tensor([1, 2, float("nan")], dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    crc = zlib.crc32(data)
    pieces = [*plan.fixed, (plan.offsets[0], data), (plan.crc_offset(0), struct.pack("<I", crc)), plan.ending([crc])]
    for at, raw in pieces:
        blob[at : at + len(raw)] = raw
    assert [(at, bytes(blob[at : at + len(raw)])) for at, raw in GOLDEN.items()] == list(GOLDEN.items())
    assert sum(map(len, GOLDEN.values())) == len(blob)


def huge(path: Path, specs: list[TensorSpec]) -> TorchZipPlan:
    """A file as sparse as the system allows: zeros for tensors, and no CRC-32 of them."""
    plan = plan_torch_zip(specs)
    with path.open("wb") as f:
        f.truncate(plan.nbytes)
        for at, raw in [*plan.fixed, plan.ending([0xFFFFFFFF - i for i in range(len(specs))])]:
            f.seek(at)
            f.write(raw)
        assert f.tell() == plan.nbytes
    return plan


GIB = 2**30
HUGE = {
    "one tensor": [("a", "BF16", (5 * GIB // 2,)), ("b", "F32", (3,)), ("c", "U8", (0,))],
    "a sum": [("a", "U8", (3 * GIB,)), ("b", "U8", (2 * GIB,)), ("c", "F32", (3,)), ("d", "I8", (4 * GIB,))],
    "the largest without zip64": [("a", "U8", (2**32 - 2,)), ("b", "U8", (1,))],
    "the smallest with zip64": [("a", "U8", (2**32 - 1,)), ("b", "U8", (1,))],
}
for wanted in (2**32 - 2, 2**32 - 1, 2**32):  # where the header of b starts
    a, b = TensorSpec("a", "U8", (2**32 - 2000,)), TensorSpec("b", "U8", ())
    size = wanted - plan_torch_zip([a, b]).offsets[0]
    HUGE[f"a header at {wanted}"] = [("a", "U8", (size,)), ("b", "U8", ())]


@pytest.mark.parametrize("case", HUGE)
def test_beyond_four_gigabytes(tmp_path: Path, case: str) -> None:
    specs = [TensorSpec(*entry) for entry in HUGE[case]]
    path = tmp_path / "consolidated.00.pth"
    plan = huge(path, specs)
    marks = [bytes([65 + i]) for i in range(len(specs))]
    with path.open("r+b") as f:
        for spec, offset, mark in zip(specs, plan.offsets, marks, strict=True):
            if spec.nbytes:  # its last byte
                f.seek(offset + spec.nbytes - 1)
                f.write(mark)
    infos, _ = read_torch_zip(path)
    assert sorted((t.name, t.shape, t.offset) for t in infos) == [
        (s.name, s.shape, offset) for s, offset in zip(specs, plan.offsets, strict=True)
    ]
    with zipfile.ZipFile(path) as z, path.open("rb") as f:
        for i, spec in enumerate(specs):
            m = z.getinfo(f"consolidated.00/data/{i}")
            assert (m.file_size, m.compress_size, m.CRC) == (spec.nbytes, spec.nbytes, 0xFFFFFFFF - i)
            assert m.header_offset + 14 == plan.crc_offset(i)
            wide = [n for n in (m.file_size, m.compress_size, m.header_offset) if n >= 2**32 - 1]
            assert m.extra == (struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b"")
            f.seek(m.header_offset)
            local = f.read(plan.offsets[i] - m.header_offset)
            sizes, lengths = struct.unpack_from("<2I", local, 18), struct.unpack_from("<2H", local, 26)
            assert len(local) == 30 + sum(lengths)
            field = local[30 + lengths[0] :]
            assert field.startswith(struct.pack("<2H", 1, 16)) is (spec.nbytes >= 2**32 - 1)
            assert local[4] == (45 if spec.nbytes >= 2**32 - 1 else 0)
            if spec.nbytes >= 2**32 - 1:  # here the format wants both sizes
                assert sizes == (2**32 - 1, 2**32 - 1)
                sizes = struct.unpack_from("<2Q", field, 4)
            assert sizes == (spec.nbytes, spec.nbytes)
    # mapped, torch reads no data; unmapped, it checks no CRC-32 either
    table = torch.load(path, weights_only=True, mmap=True)
    for spec, mark in zip(specs, marks, strict=True):
        assert (table[spec.name].dtype, tuple(table[spec.name].shape)) == (TORCH[spec.dtype], spec.shape)
        if spec.nbytes:
            assert table[spec.name].reshape(-1)[-1:].view(torch.uint8).numpy().tobytes()[-1:] == mark
    assert path.stat().st_blocks * 512 < 2**20, "the file should be sparse"


def test_torch_lays_out_the_same(tmp_path: Path) -> None:
    """Where torch's own file needs the same fields, they hold the same values."""
    path = tmp_path / "m.pth"
    torch.save({"w": torch.zeros(3)}, path)
    with zipfile.ZipFile(path) as z:
        theirs = {m.filename: m for m in z.infolist()}
        contents = {name: z.read(name) for name in ("m/version", "m/byteorder")}
    plan, _ = write(path, [TensorSpec("w", "F32", (3,))], folder="m")
    with zipfile.ZipFile(path) as z:
        assert contents == {name: z.read(name) for name in contents}
        for m in z.infolist():
            their = theirs[m.filename]
            assert (m.create_version, m.extract_version, m.flag_bits) == (0, 0, their.flag_bits & ~0x0008)
            assert (m.create_system, m.external_attr) == (their.create_system, their.external_attr)
        assert z.infolist()[0].filename == "m/data.pkl"
    assert plan.offsets[0] % 64 == 0


@pytest.mark.parametrize("dtype", sorted(set(DTYPE_BITS) - set(TORCH)))
def test_other_dtypes_are_refused(dtype: str) -> None:
    with pytest.raises(SourceError, match=rf"tensor 'w': .* cannot hold {dtype}") as e:
        plan_torch_zip([TensorSpec("v", "F32", (2,)), TensorSpec("w", dtype, (8,))])
    assert "safetensors" in e.value.hint


def test_a_name_that_stands_twice_is_refused() -> None:
    with pytest.raises(SourceError, match="tensor 'w' stands twice"):
        plan_torch_zip([TensorSpec("w", "F32", (2,)), TensorSpec("w", "F32", (3,))])


def test_most_tensors() -> None:
    """As many as the plan lets pass, our reader takes."""
    specs = [TensorSpec(f"{i}", "U8", (300,) * 7 + (1,)) for i in range(50_001)]
    with pytest.raises(SourceError, match="50,001 tensors are too many"):
        plan_torch_zip(specs)
    steps = [sum(1 for _ in pickletools.genops(plan_torch_zip(specs[:n]).fixed[0][1][64:])) for n in (1, 2)]
    assert steps[0] + 50_000 * (steps[1] - steps[0]) < MAX_STEPS


def test_the_ending_waits_for_every_crc() -> None:
    plan = plan_torch_zip([TensorSpec("v", "F32", (2,)), TensorSpec("w", "F32", (2,))])
    at, raw = plan.ending([0, 2**32 - 1])
    assert at + len(raw) == plan.nbytes
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        plan.ending([0])
    with pytest.raises(IndexError):
        plan.crc_offset(2)


def test_crc_in_pieces() -> None:
    raw = random.Random(0).randbytes(1000)

    def read(most: int, offset: int, buffer: memoryview) -> int:
        part = raw[offset : offset + min(most, len(buffer))]
        buffer[: len(part)] = part
        return len(part)

    for size, most in [(1, 1), (7, 1000), (64, 10), (1000, 1000), (5000, 5000)]:
        buffer = memoryview(bytearray(size))
        assert member_crc(partial(read, most), 3, 990, buffer) == zlib.crc32(raw[3:993])
        assert member_crc(partial(read, most), 3, 0, buffer) == 0
    with pytest.raises(RunError, match="shorter"):
        member_crc(partial(read, 100), 3, 998, memoryview(bytearray(64)))


def test_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, quantkit.checkpoint.torch_zip_writer; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-I", "-c", code], check=False).returncode == 0
