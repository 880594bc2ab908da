"""The safetensors header: read strictly, write exactly. Standard library only.

Format (safetensors 0.8): u64 little-endian length N, N bytes of JSON that start with `{` and may end in spaces, then
the data. Each tensor has dtype, shape and `data_offsets` relative to the data's start; the data has no hole, no overlap
and no trailing byte. We are stricter than the reference: duplicate keys are refused and the header is capped at 16 MB.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import SourceError

MAX_HEADER = 16 * 1024 * 1024
MAX_DIMS = 8
MAX_DEPTH = 64
ALIGN = 8

# Bits, not bytes: safetensors has types below a byte. Spelling as in the header.
DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
    "C64": 64,
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's name, dtype (safetensors spelling) and shape: what a plan knows before any byte exists."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True, slots=True)
class TensorInfo(TensorSpec):
    """A tensor in a file. `file` is a basename; `offset` counts bytes from the start of that file."""

    file: str
    offset: int


def _abbreviator() -> reprlib.Repr:
    abbreviate = reprlib.Repr()
    abbreviate.maxstring = abbreviate.maxother = 120
    return abbreviate


quote = _abbreviator().repr  # a stranger's value in a message: escaped for terminals, short, and never deep


def strict_json(raw: bytes) -> Any:
    """The value of JSON that strangers wrote. ValueError on what `json.loads` lets pass and later code would fall over:
    a key that stands twice, nesting beyond MAX_DEPTH, half a surrogate pair (which no UTF-8 file can hold)."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = {}
        for key, value in pairs:
            if key in keys:
                raise ValueError(f"the key {quote(key)} stands twice")
            keys[key] = value
        return keys

    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [v for x in level if isinstance(x, (dict, list)) for v in (x.values() if isinstance(x, dict) else x)]
    if level:
        raise ValueError("it is nested too deeply")
    if re.search(rb"\\u[dD][89a-fA-F]", raw):  # a surrogate; the other half of the pair should stand beside it
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text in it has half a surrogate pair") from None
    return value


def parse_header(raw: bytes, *, where: str) -> tuple[list[tuple[TensorSpec, int, int]], dict[str, str]]:
    """Tensors with their (begin, end) offsets, ordered by offset, and `__metadata__`.

    Raises SourceError, with `where` as its second line, on anything that the format does not allow.
    """

    def fail(what: str) -> SourceError:
        return SourceError(what, where=where, hint="the file is damaged or was made to mislead: fetch it again")

    if not raw.startswith(b"{"):
        raise fail("the safetensors header does not start with '{'")
    try:
        table = strict_json(raw)
    except ValueError as e:
        raise fail(f"the safetensors header is not valid JSON: {e}") from None
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise fail("__metadata__ is not a table of strings")
    entries = [_entry(name, value, fail) for name, value in table.items()]
    entries.sort(key=lambda e: (e[1], e[2]))
    position = 0
    for spec, begin, end in entries:
        if begin != position:
            raise fail(f"tensor {quote(spec.name)}: data starts at {begin}, expected {position} (a hole or an overlap)")
        position = end
    return entries, metadata


def _entry(name: str, value: Any, fail: Any) -> tuple[TensorSpec, int, int]:
    label = f"tensor {quote(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise fail(f"{label}: needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise fail(f"{label}: unknown dtype {quote(dtype)}")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMS
        or not all(type(n) is int and 0 <= n < 2**60 for n in shape)
    ):
        raise fail(f"{label}: shape {quote(shape)} is not a list of sizes")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(n) is int and 0 <= n < 2**63 for n in offsets)
    ):
        raise fail(f"{label}: data_offsets {quote(offsets)} is not a pair of offsets")
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        raise fail(f"{label}: {dtype} {shape} needs {bits / 8:g} bytes, its offsets span {end - begin}")
    return TensorSpec(name, dtype, tuple(shape)), begin, end


def read_header(path: Path, *, data_present: bool = True) -> tuple[list[TensorInfo], dict[str, str], bytes]:
    """Tensors of one safetensors file in file order, its metadata, and the raw header (its identity).

    `data_present=False` accepts a file that was cut off after its header: enough to plan from.
    Raises SourceError if the file is a Git LFS pointer, is truncated, or breaks the format.
    """
    hint = "the download is incomplete: fetch the file again"
    size = path.stat().st_size
    with path.open("rb") as f:
        start = f.read(8)
        if start == b"version ":
            raise SourceError(
                "this is a Git LFS pointer, a line of text in place of the weights",
                where=str(path),
                hint="run `git lfs pull` in the clone, or fetch the model with `hf download`",
            )
        if len(start) < 8:
            raise SourceError(f"{size} bytes are too few for a safetensors file", where=str(path), hint=hint)
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER:
            raise SourceError(
                f"the header claims {length:,} bytes; the limit is {MAX_HEADER:,}",
                where=str(path),
                hint="this is not a safetensors file, or one made to exhaust memory",
            )
        raw = f.read(length)
        if len(raw) < length:
            raise SourceError(
                f"the header of {length:,} bytes runs past the file's {size:,}", where=str(path), hint=hint
            )
    entries, metadata = parse_header(raw, where=str(path))
    expected = 8 + length + (entries[-1][2] if entries else 0)
    if size > expected:
        raise SourceError(f"{size - expected:,} bytes follow the last tensor", where=str(path), hint=hint)
    if size < expected and data_present:
        raise SourceError(f"the file has {size:,} bytes, its header promises {expected:,}", where=str(path), hint=hint)
    tensors = [TensorInfo(s.name, s.dtype, s.shape, path.name, 8 + length + begin) for s, begin, _ in entries]
    return tensors, metadata, raw


def build_header(specs: Sequence[TensorSpec]) -> tuple[bytes, list[int]]:
    """Header bytes (length prefix included, padded to 8) for tensors laid out in the given order, and each one's
    absolute offset in the file. The order must keep every tensor aligned to its dtype: see `aligned_order`."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    relative = []
    position = 0
    for spec in specs:
        relative.append(position)
        end = position + spec.nbytes
        table[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGN)
    return struct.pack("<Q", len(text)) + text, [8 + len(text) + r for r in relative]


def aligned_order(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """The order in which tensors lie in a shard: those of a multiple of 8 bytes as they come, then the odd ones by
    falling item size. No padding is needed and every tensor is aligned, and what is written as one unit stays together.
    """
    odd = [s for s in specs if s.nbytes % ALIGN]
    return [s for s in specs if s.nbytes % ALIGN == 0] + sorted(odd, key=lambda s: -DTYPE_BITS[s.dtype])


def fsync_directory(folder: Path) -> None:
    """Makes renames in `folder` durable (POSIX: a rename is only safe once its directory is synced)."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
