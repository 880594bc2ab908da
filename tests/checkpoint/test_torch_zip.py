"""Files of torch.save read without torch: every byte range must hold exactly the tensor that torch.load sees."""

from __future__ import annotations

import struct
import subprocess
import sys
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.checkpoint.header import TensorInfo
from quantkit.checkpoint.torch_zip import read_torch_zip
from quantkit.errors import SourceError

NAMES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def stored_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    top = 2 if dtype == torch.bool else 256
    return torch.randint(0, top, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


def check(path: Path) -> dict[str, TensorInfo]:
    """Compares names, dtypes, shapes and bytes with those of torch.load; returns the tensors by name."""
    truth = torch.load(path, weights_only=True)
    tensors, _ = read_torch_zip(path)
    assert sorted(t.name for t in tensors) == sorted(truth)
    assert [t.offset for t in tensors] == sorted(t.offset for t in tensors)
    blob = path.read_bytes()
    for t in tensors:
        assert t.file == path.name
        assert t.shape == tuple(truth[t.name].shape)
        assert NAMES[t.dtype] == truth[t.name].dtype
        assert blob[t.offset : t.offset + t.nbytes] == stored_bytes(truth[t.name])
    return {t.name: t for t in tensors}


@pytest.mark.parametrize("dtype", NAMES)
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": random_tensor(NAMES[dtype], 3, 5), "b": random_tensor(NAMES[dtype])}, path)
    assert {t.dtype for t in check(path).values()} == {dtype}


def test_state_dict_with_metadata(tmp_path: Path) -> None:
    path = tmp_path / "consolidated.00.pth"
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    state = model.state_dict()
    assert state._metadata  # type: ignore[attr-defined]
    torch.save(state, path)
    tensors = check(path)
    assert tensors["1.num_batches_tracked"].shape == ()
    assert tensors["1.num_batches_tracked"].dtype == "I64"


def test_kinds_of_tensor(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model-00001-of-00002.bin"
    base = random_tensor(torch.bfloat16, 6, 4)
    table = OrderedDict(
        parameter=torch.nn.Parameter(torch.randn(2, 3)),
        frozen=torch.nn.Parameter(torch.randn(2, 3), requires_grad=False),
        scalar=torch.tensor(3, dtype=torch.int64),
        base=base,
        tied=base,
        rows=base[2:5],  # contiguous, but not at the start of its storage
        column=base[:, :1][:1],  # strides of a side of one do not matter
        empty=torch.zeros(0, 7),
        empty_turned=torch.zeros(4, 0).t(),  # with no elements the strides say nothing
        big=random_tensor(torch.float16, 300, 70),  # sizes of more than a byte
    )
    table["naïve.重み"] = torch.ones(1)
    torch.save(table, path)
    tensors = check(path)
    assert tensors["tied"].offset == tensors["base"].offset
    assert tensors["rows"].offset == tensors["base"].offset + 2 * 4 * 2


@pytest.mark.parametrize("view", [lambda t: t.t(), lambda t: t[:, 1:], lambda t: t[::2], lambda t: t[:1].expand(4, 3)])
def test_other_strides_are_refused(tmp_path: Path, view: Any) -> None:
    path = tmp_path / "model.bin"
    torch.save({"fine": torch.ones(2), "bent": view(torch.randn(4, 3))}, path)
    with pytest.raises(SourceError, match=r"tensor 'bent': strides .* not row-major") as e:
        read_torch_zip(path)
    assert ".contiguous()" in e.value.hint


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickle_protocols(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "model.bin"
    tensor = torch.randn(3, 3)
    torch.save({"weight": tensor, "again": tensor}, path, pickle_protocol=protocol)
    tensors, _ = read_torch_zip(path)
    for t in tensors:
        assert path.read_bytes()[t.offset : t.offset + t.nbytes] == stored_bytes(tensor)


def test_identity_is_data_pkl(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save({"weight": torch.randn(3)}, path)
    with zipfile.ZipFile(path) as z:
        assert read_torch_zip(path)[1] == z.read("model/data.pkl")


def test_many_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"  # more than 256 memo entries, so the long forms of the opcodes
    torch.save({f"layers.{i}.weight": torch.full((2,), i) for i in range(500)}, path)
    assert len(check(path)) == 500


@pytest.mark.parametrize("table", [{}, OrderedDict()])
def test_empty_table(tmp_path: Path, table: dict[str, Any]) -> None:
    torch.save(table, tmp_path / "model.bin")
    assert read_torch_zip(tmp_path / "model.bin")[0] == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"state_dict": {"weight": torch.ones(1)}}, "'state_dict' is of type dict"),
        ({"model": {"weight": torch.ones(1)}, "step": 3}, "'model' is of type dict"),
        ({"weight": torch.ones(1), "step": 3}, "'step' is of type int"),
        ({"weight": torch.ones(1), "note": "hello"}, "'note' is of type str"),
        ({0: torch.ones(1)}, "name is of type int, not text"),
        (torch.ones(1), "content is a tensor, not a table"),
        ([torch.ones(1)], "opcode EMPTY_LIST"),
        ({"weight": torch.ones(1), "names": {"a", "b"}}, "__builtin__.set"),
        ({"weight": torch.zeros(2, dtype=torch.complex128)}, "torch.ComplexDoubleStorage"),
        ({"weight": torch.eye(2).to_sparse()}, "torch._utils._rebuild_sparse_tensor"),
        ({"weight": torch.zeros(2, dtype=torch.complex64).conj()}, "_rebuild_tensor_v2' in a form"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, value: Any, message: str) -> None:
    path = tmp_path / "model.bin"
    torch.save(value, path)
    with pytest.raises(SourceError) as e:
        read_torch_zip(path)
    assert message in e.value.what
    assert e.value.where == str(path)
    assert e.value.hint


def test_old_formats_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save({"weight": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(SourceError, match=r"before torch 1\.6") as e:
        read_torch_zip(path)
    assert "state_dict()" in e.value.hint
    path.write_bytes(b"sys_info".ljust(257, b"\0") + b"ustar\0" + bytes(700))
    with pytest.raises(SourceError, match=r"before torch 1\.6"):
        read_torch_zip(path)


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\3\4", b"\x89PNG", b"PK\5\6" + bytes(18)])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(SourceError):
        read_torch_zip(path)


def test_git_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    with pytest.raises(SourceError, match="Git LFS pointer") as e:
        read_torch_zip(path)
    assert "git lfs pull" in e.value.hint


@pytest.mark.parametrize("data_present", [True, False])
def test_cut_off(tmp_path: Path, data_present: bool) -> None:
    path = tmp_path / "model.bin"
    torch.save({"weight": torch.ones(2)}, path)
    assert len(read_torch_zip(path, data_present=data_present)[0]) == 1
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SourceError, match="cut off") as e:
        read_torch_zip(path, data_present=data_present)
    assert ("safetensors" in e.value.hint) is not data_present


def test_zip64_beyond_four_gigabytes(tmp_path: Path) -> None:
    """A sparse file, its headers written by hand, whose second storage starts past 4 GB."""
    first = 5 * 2**30
    names = [b"m/data.pkl", b"m/data/0", b"m/data/1"]
    pickled = b"\x80\x02}(" + b"".join(
        b"X\1\0\0\0%cctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nByteStorage\nX\1\0\0\0%cX\3\0\0\0cpu"
        b"\x8a\x06%btQK\0\x8a\x06%b\x85K\1\x85\x89ccollections\nOrderedDict\n)RtR" % (97 + i, 48 + i, n, n)
        for i, n in enumerate([first.to_bytes(6, "little"), (4).to_bytes(6, "little")])
    )
    contents = [pickled + b"u.", None, b"data"]
    path = tmp_path / "m.bin"
    table = b""
    with path.open("wb") as f:
        for name, content in zip(names, contents, strict=True):
            at, size = f.tell(), first if content is None else len(content)
            crc = 0 if content is None else zlib.crc32(content)
            f.write(struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 0, crc, 0, 0, len(name), 0) + name)
            f.seek(f.tell() + size) if content is None else f.write(content)
            table += struct.pack("<4s6H3I5H2I", b"PK\1\2", 45, 45, 0, 0, 0, 0, crc, *[2**32 - 1] * 2, len(name), 33,
                                 0, 0, 0, 0, 2**32 - 1)  # fmt: skip
            table += name + struct.pack("<2HB2H3Q", 9, 1, 0, 1, 24, size, size, at)
        begin = f.tell()
        f.write(table)
        f.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 3, 3, len(table), begin))
        f.write(struct.pack("<4sIQI", b"PK\6\7", 0, begin + len(table), 1))
        f.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 3, 3, len(table), 2**32 - 1, 0))
    a, b = read_torch_zip(path)[0]
    assert (a.name, a.dtype, a.shape) == ("a", "U8", (first,))
    assert (b.name, b.shape) == ("b", (4,))
    assert b.offset > first
    with path.open("rb") as f:
        f.seek(b.offset)
        assert f.read(4) == b"data"


def test_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, quantkit.checkpoint.torch_zip; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-I", "-c", code], check=False).returncode == 0
