"""The safetensors header against literal bytes, and against safetensors itself in both directions."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from quantkit.checkpoint.header import (
    DTYPE_BITS,
    MAX_HEADER,
    TensorSpec,
    aligned_order,
    build_header,
    parse_header,
    read_header,
)
from quantkit.errors import SourceError

TEXT = (
    b'{"__metadata__":{"format":"pt"},'
    b'"w":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
    b'"b":{"dtype":"U8","shape":[],"data_offsets":[12,13]}}'
)
GOLDEN = b"\x90\0\0\0\0\0\0\0" + TEXT + b"  "  # 142 bytes and two of padding are 0x90
SPECS = [TensorSpec("w", "BF16", (2, 3)), TensorSpec("b", "U8", ())]
TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
         "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
         "F8_E4M3": torch.float8_e4m3fn}  # fmt: skip


def file_of(specs: list[TensorSpec], path: Path) -> Path:
    header, offsets = build_header(specs)
    end = offsets[-1] + specs[-1].nbytes if specs else len(header)
    path.write_bytes(header + bytes(i % 251 for i in range(end - len(header))))
    return path


def test_golden_bytes() -> None:
    assert build_header(SPECS) == (GOLDEN, [152, 164])


def test_golden_bytes_read_back(tmp_path: Path) -> None:
    tensors, metadata, raw = read_header(file_of(SPECS, tmp_path / "a.safetensors"))
    assert [(t.name, t.dtype, t.shape, t.file, t.offset) for t in tensors] == [
        ("w", "BF16", (2, 3), "a.safetensors", 152),
        ("b", "U8", (), "a.safetensors", 164),
    ]
    assert metadata == {"format": "pt"}
    assert raw == GOLDEN[8:]


def test_the_same_file_as_safetensors_writes(tmp_path: Path) -> None:
    tensors = {"b.weight": torch.arange(6.0).reshape(2, 3), "a.weight": torch.arange(4.0), "c": torch.ones(4)}
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    specs = [TensorSpec(n, "F32", tuple(tensors[n].shape)) for n in sorted(tensors)]  # their order within a dtype
    header, _ = build_header(aligned_order(specs))
    ours = header + b"".join(tensors[s.name].numpy().tobytes() for s in specs)
    assert ours == (tmp_path / "theirs").read_bytes()


def test_we_read_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {f"{name}.ü": torch.ones(3, 5).to(dtype) for name, dtype in TORCH.items()}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors", metadata={"key": "value"})
    infos, metadata, _ = read_header(tmp_path / "x.safetensors")
    assert metadata == {"key": "value"}
    assert {i.name: (i.dtype, i.shape) for i in infos} == {
        **{f"{name}.ü": (name, (3, 5)) for name in TORCH},
        "scalar": ("F32", ()),
        "empty": ("F32", (0, 4)),
    }
    data = (tmp_path / "x.safetensors").read_bytes()
    for info in infos:
        expected = tensors[info.name].contiguous().view(torch.uint8) if info.shape else tensors[info.name].numpy()
        assert data[info.offset : info.offset + info.nbytes] == np.asarray(expected).tobytes()


shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)
names = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda name: name != "__metadata__")
specs = st.lists(
    st.builds(TensorSpec, names, st.sampled_from(sorted(TORCH)), shapes), max_size=12, unique_by=lambda spec: spec.name
)


@settings(max_examples=150, deadline=1000)
@given(specs)
def test_any_mix_is_aligned_and_loads(tmp_path_factory: pytest.TempPathFactory, specs: list[TensorSpec]) -> None:
    ordered = aligned_order(specs)
    assert sorted(ordered, key=lambda s: s.name) == sorted(specs, key=lambda s: s.name)
    path = file_of(ordered, tmp_path_factory.getbasetemp() / "mix.safetensors")
    data = path.read_bytes()
    infos, _, raw = read_header(path)  # which refuses holes and overlaps
    assert len(raw) % 8 == 0
    assert all(info.offset % (DTYPE_BITS[info.dtype] // 8) == 0 for info in infos)
    with safe_open(path, "pt") as theirs:
        assert set(theirs.keys()) == {s.name for s in specs}
        for info in infos:
            tensor = theirs.get_tensor(info.name)
            assert (tensor.dtype, tuple(tensor.shape)) == (TORCH[info.dtype], info.shape)
            if info.dtype != "BOOL":  # which has but two values
                run = data[info.offset : info.offset + info.nbytes]
                assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == run


def test_numpy_loads_it(tmp_path: Path) -> None:
    loaded = safetensors.numpy.load_file(file_of([TensorSpec("a", "I32", (2, 2))], tmp_path / "a"))
    assert loaded["a"].tobytes() == bytes(range(16))


def test_what_is_one_unit_stays_together() -> None:
    parts = [TensorSpec(f"{unit}.{part}", "U8", (n,)) for unit in "ba" for part, n in (("w", 64), ("s", 8), ("x", 3))]
    assert [s.name for s in aligned_order(parts)] == ["b.w", "b.s", "a.w", "a.s", "b.x", "a.x"]


def entry(dtype: object = "U8", shape: object = (1,), offsets: object = (0, 1)) -> bytes:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


BOTH_REFUSE = {
    "no table": b"[]",
    "a space first": b" {}",
    "something after it": b"{}{}",
    "not UTF-8": b'{"\xff":1}',
    "metadata of numbers": b'{"__metadata__":{"a":1}}',
    "a key missing": b'{"a":{"dtype":"U8","shape":[1]}}',
    "unknown dtype": entry("F33"),
    "dtype is a list": entry(["U8"]),
    "negative size": entry(shape=(-1,)),
    "size is a fraction": entry(shape=(1.0,)),
    "size is true": entry(shape=(True,)),
    "sizes are nested": entry(shape=((1,),)),
    "product overflows": entry(shape=(2**32, 2**32)),
    "size of 4,000 digits": entry(shape=(10**4000,)),
    "size of 5,000 digits": b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}',
    "offsets backwards": entry(offsets=(1, 0)),
    "three offsets": entry(offsets=(0, 1, 1)),
    "starts late": entry(offsets=(1, 2)),
    "too few bytes": entry("F32"),
    "half a byte": entry("F4", (1,), (0, 0)),
    "nested without end": b'{"a":' * 200_000,
    "shape without end": b'{"a":{"dtype":"U8","shape":' + b"[" * 100_000,
}
WE_REFUSE = {
    "name twice": b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],'
    b'"data_offsets":[0,1]}}',
    "metadata twice": b'{"__metadata__":{"a":"1","a":"2"}}',
    "many dimensions": entry(shape=(1,) * 9),
}


@pytest.mark.parametrize("raw", [*BOTH_REFUSE.values(), *WE_REFUSE.values()], ids=[*BOTH_REFUSE, *WE_REFUSE])
def test_refused(raw: bytes) -> None:
    with pytest.raises(SourceError) as refusal:
        parse_header(raw, where="x.safetensors")
    assert refusal.value.where == "x.safetensors"
    assert len(str(refusal.value)) < 600


@pytest.mark.parametrize("raw", BOTH_REFUSE.values(), ids=BOTH_REFUSE)
def test_refused_by_safetensors_too(raw: bytes) -> None:
    with pytest.raises(SafetensorError):
        safetensors.numpy.load(struct.pack("<Q", len(raw)) + raw + b"\0")


@pytest.mark.parametrize("raw", WE_REFUSE.values(), ids=WE_REFUSE)
def test_accepted_by_safetensors_alone(raw: bytes) -> None:
    safetensors.numpy.load(struct.pack("<Q", len(raw)) + raw + (b"\0" if b"shape" in raw else b""))


def test_a_file_cut_after_its_header(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(GOLDEN)
    tensors, _, _ = read_header(path, data_present=False)
    assert [t.name for t in tensors] == ["w", "b"]
    with pytest.raises(SourceError, match=r"the file has 152 bytes, its header promises 165"):
        read_header(path)


@pytest.mark.parametrize("length", [MAX_HEADER + 1, 2**63, 2**64 - 1])
def test_a_large_claim_is_not_believed(length: int, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(SourceError, match=f"the header claims {length:,} bytes"):
        read_header(tmp_path / "x")


def test_every_dtype_has_its_size() -> None:
    for name, dtype in TORCH.items():
        assert DTYPE_BITS[name] == 8 * torch.empty((), dtype=dtype).element_size()
    assert all(TensorSpec("a", d, (8, 3)).nbytes == math.prod((8, 3)) * bits // 8 for d, bits in DTYPE_BITS.items())
