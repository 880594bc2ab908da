"""Pickled PyTorch weights (`pytorch_model*.bin`, `.pth`): where each tensor's bytes lie. Standard library only.

Format (torch.save since 1.6): a zip of uncompressed members below one folder. `data.pkl` is a pickle program that
builds a table name -> tensor, `data/<key>` holds the bytes of one storage. A pickle can call any function of Python. So
ours is a small machine of our own: it knows the opcodes of a plain table, treats a global as a name only, looks nothing
up and calls nothing. It never hashes, compares or prints a nested value either, which hostile pickles use to hang.

Zip tools disagree about odd archives, and scanners were passed that way. So one form alone is read: members stored,
unencrypted and named once, no overlap, headers that agree, nothing around the archive.
"""

from __future__ import annotations

import math
import pickletools  # reads opcodes, runs none
import struct
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from quantkit.checkpoint.header import DTYPE_BITS, MAX_DIMS, MAX_HEADER, TensorInfo, read_header
from quantkit.errors import SourceError

# A tensor takes about 40 opcodes and 150 bytes: this is enough for 50,000 in one file.
MAX_STEPS = 2_000_000

STORAGES = {
    "torch.DoubleStorage": "F64", "torch.FloatStorage": "F32", "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16", "torch.LongStorage": "I64", "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16", "torch.CharStorage": "I8", "torch.ByteStorage": "U8", "torch.BoolStorage": "BOOL",
    "torch.ComplexFloatStorage": "C64", "torch.storage.UntypedStorage": "U8",
}  # fmt: skip
# Types that have no storage class: torch writes an untyped storage and names the type beside it.
DTYPES = {
    "torch.uint16": "U16", "torch.uint32": "U32", "torch.uint64": "U64", "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2", "torch.float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
REBUILD = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_parameter")
GLOBALS = {"collections.OrderedDict", *REBUILD, *STORAGES, *DTYPES}

DAMAGED = "the file is damaged or was made to mislead: fetch it again, or use the model's safetensors files"
NOT_FLAT = "only a table of names and tensors can be read: save the `state_dict()` alone, best with safetensors"
NOT_ZIP = "if you trust its maker, load it in torch and save its `state_dict()` again, best with safetensors"


@dataclass(frozen=True, slots=True)
class _Member:
    """A zip member: where its local header starts, where its bytes start, their count and CRC-32."""

    header: int
    start: int
    size: int
    crc: int


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str
    numel: int


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor as the pickle describes it, unchecked; offset and strides in elements."""

    storage: _Storage
    dtype: str
    offset: Any
    shape: Any
    stride: Any


def read_torch_zip(path: Path, *, data_present: bool = True) -> tuple[list[TensorInfo], bytes]:
    """Tensors of one torch zip ordered by offset, and the raw `data.pkl` (its identity).

    Tied tensors share an offset. `data_present=False` only words the error: a file cut off has lost its table, which
    stands at its end. Raises SourceError if the file is a Git LFS pointer, a pickle or tar of before torch 1.6, asks
    for any call other than those that rebuild a plain tensor, or breaks the format.
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        start = f.read(264)
        if start.startswith(b"version "):
            read_header(path)  # raises: one wording for every Git LFS pointer
        try:
            if not start.startswith(b"PK\3\4"):
                old = start.startswith(b"\x80") or start[257:262] == b"ustar"
                raise SourceError(
                    "this is a pickle or tar of before torch 1.6" if old else "this is not a torch zip file",
                    hint=NOT_ZIP if old else DAMAGED,
                )
            prefix, members = _read_members(f, size, data_present)
            raw = _content(f, members, f"{prefix}/data.pkl")
            if f"{prefix}/byteorder" in members and _content(f, members, f"{prefix}/byteorder") != b"little":
                raise SourceError("the tensors are big-endian", hint="convert it to safetensors where it was written")
            table = _run(raw)
            if type(table) is not dict:
                raise SourceError(f"the file's content is {_kind(table)}, not a table of tensors", hint=NOT_FLAT)
            tensors = [_locate(name, value, prefix, members, path.name) for name, value in table.items()]
        except SourceError as e:
            raise SourceError(e.what, where=str(path), hint=e.hint or DAMAGED) from None
    return sorted(tensors, key=lambda t: (t.offset, t.name)), raw


def _locate(name: str, view: Any, prefix: str, members: dict[str, _Member], file: str) -> TensorInfo:
    label = f"tensor {_quote(name)}"
    if not isinstance(view, _View):
        raise SourceError(f"{_quote(name)} is {_kind(view)}, not a tensor", hint=NOT_FLAT)
    shape, stride, storage = view.shape, view.stride, view.storage
    member = members.get(f"{prefix}/data/{storage.key}")
    if member is None:
        raise SourceError(f"{label}: the file has no storage {_quote(storage.key)}")
    promised = storage.numel * DTYPE_BITS[storage.dtype] // 8
    if promised != member.size:
        raise SourceError(f"{label}: its storage has {member.size:,} bytes, the pickle promises {promised:,}")
    if type(shape) is not tuple or len(shape) > MAX_DIMS or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise SourceError(f"{label}: its shape is not a list of sizes")
    if type(stride) is not tuple or len(stride) != len(shape) or not all(type(n) is int for n in stride):
        raise SourceError(f"{label}: its strides do not fit its shape")
    expected = 1
    for n, step in zip(reversed(shape), reversed(stride), strict=True):
        if n != 1 and step != expected and math.prod(shape):  # torch's own rule for a contiguous tensor
            hint = "save it again with `.contiguous()`, best with safetensors"
            raise SourceError(f"{label}: strides {stride} of shape {shape} are not row-major"[:300], hint=hint)
        expected *= n
    item = DTYPE_BITS[view.dtype] // 8
    if type(view.offset) is not int or not 0 <= view.offset * item <= member.size - math.prod(shape) * item:
        raise SourceError(f"{label}: it reaches outside its storage of {member.size:,} bytes")
    return TensorInfo(name, view.dtype, shape, file, member.start + view.offset * item)


def _run(raw: bytes) -> Any:
    """The value that `data.pkl` leaves: None, bool, int, float, str, a tuple, a dict with str keys, or one of ours.

    Raises SourceError on anything but a valid program that builds a table of tensors.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under each open mark, out of reach
    memo: dict[int, Any] = {}
    argument: Any
    at = 0
    try:
        for step, (op, argument, position) in enumerate(pickletools.genops(raw)):
            at = position or 0
            if step >= MAX_STEPS:
                raise SourceError(f"data.pkl takes more than {MAX_STEPS:,} steps")
            match op.name:
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "BINUNICODE" | "SHORT_BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                    stack.append(argument)
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[op.name])
                case "EMPTY_DICT":
                    stack.append({})
                case "MARK":
                    below.append(stack)
                    stack = []
                case "TUPLE":
                    items, stack = stack, below.pop()
                    stack.append(tuple(items))
                case "EMPTY_TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = ("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3").index(op.name)
                    stack.append(tuple([stack.pop() for _ in range(count)][::-1]))
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _set_items(stack[-1], [key, value])
                case "SETITEMS":
                    items, stack = stack, below.pop()
                    _set_items(stack[-1], items)
                case "GLOBAL":
                    stack.append(_find_class(*argument.split(" ", 1)))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(_find_class(module, name))
                case "BINPERSID":
                    stack.append(_storage(stack.pop()))
                case "REDUCE":
                    arguments, function = stack.pop(), stack.pop()
                    stack.append(_rebuild(function, arguments))
                case "BUILD":  # attributes of a table, such as `_metadata` (module versions): of no use here
                    stack.pop()
                    if type(stack[-1]) is not dict:
                        raise SourceError(f"data.pkl sets attributes of what is {_kind(stack[-1])}")
                case "PROTO" | "FRAME" | "STOP":
                    pass
                case _:
                    raise SourceError(f"data.pkl uses opcode {op.name}, which no table of tensors needs", hint=NOT_FLAT)
    except (IndexError, KeyError, ValueError, Warning) as e:  # Warning: a bad escape, where warnings are errors
        raise SourceError(f"data.pkl is not a valid pickle ({type(e).__name__} near byte {at:,})") from None
    if below or len(stack) != 1 or at + 1 != len(raw):
        raise SourceError("data.pkl does not end where its table ends")
    return stack[0]


def _set_items(table: Any, items: list[Any]) -> None:
    if type(table) is not dict:
        raise SourceError(f"data.pkl puts items into what is {_kind(table)}", hint=NOT_FLAT)
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:
            raise SourceError(f"a tensor's name is {_kind(key)}, not text", hint=NOT_FLAT)
        if any("\ud800" <= c <= "\udfff" for c in key):  # half a character: no header or terminal can hold it
            raise SourceError(f"the name {_quote(key)} is not valid text")
        if key in table:
            raise SourceError(f"data.pkl names {_quote(key)} twice")
        table[key] = value


def _find_class(module: Any, name: Any) -> _Global:
    """A global as its name alone, nothing imported. Raises SourceError, naming it, unless a plain tensor needs it."""
    asked = f"{module}.{name}" if type(module) is type(name) is str else "a global without a name"
    if asked in GLOBALS:
        return _Global(asked)
    raise SourceError(
        f"the pickle asks for {_quote(asked)}, which a plain tensor does not need; nothing was run",
        hint="do not load this file with other tools unless you trust its maker; use the model's safetensors files",
    )


def _storage(identity: Any) -> _Storage:
    match identity:
        case ("storage", _Global(kind), str(key), str(), int(numel)) if kind in STORAGES:
            return _Storage(STORAGES[kind], key, numel)
    raise SourceError("data.pkl refers to a storage in a form that torch.save does not write")


def _rebuild(function: Any, arguments: Any) -> Any:
    """What the call would return, as data. A view that is lazily conjugated or negated (`rest`) is not one."""
    match function, arguments:
        case _Global("collections.OrderedDict"), ():
            return {}
        case _Global("torch._utils._rebuild_parameter"), (_View() as view, _, _):
            return view
        case _Global("torch._utils._rebuild_tensor_v2"), (_Storage() as s, offset, shape, stride, _, _, *rest):
            if not any(rest):
                return _View(s, s.dtype, offset, shape, stride)
        case (
            _Global("torch._utils._rebuild_tensor_v3"),
            (_Storage() as s, offset, shape, stride, _, _, _Global(dtype), *rest),
        ):
            if dtype in DTYPES and not any(rest):
                return _View(s, DTYPES[dtype], offset, shape, stride)
    called = _quote(function.name) if isinstance(function, _Global) else f"what is {_kind(function)}"
    raise SourceError(f"data.pkl calls {called} in a form that torch.save does not write", hint=NOT_FLAT)


def _quote(text: str) -> str:
    """Text from the file, fit for a terminal: escaped and short."""
    return repr(text if len(text) <= 100 else text[:97] + "...")


def _kind(value: Any) -> str:
    return "a tensor" if isinstance(value, _View) else f"of type {type(value).__name__.lstrip('_')}"


def _read_members(f: BinaryIO, size: int, data_present: bool) -> tuple[str, dict[str, _Member]]:
    """The archive's one folder and its members by full name. Raises SourceError unless the zip is of the one form."""
    table, count, begin = _read_directory(f, size, data_present)
    members: dict[str, _Member] = {}
    at = 0
    for _ in range(count):
        if at + 46 > len(table) or table[at : at + 4] != b"PK\1\2":
            raise SourceError("the zip's table is cut short")
        flags, method, crc, packed, length, *lengths, header = struct.unpack_from("<8x2H4x3I3H8xI", table, at)
        end = at + 46 + sum(lengths)
        raw_name, extra = table[at + 46 : at + 46 + lengths[0]], table[at + 46 + lengths[0] : end - lengths[2]]
        at = end
        name = raw_name.decode(errors="backslashreplace")
        if name in members:
            raise SourceError(f"the zip names member {_quote(name)} twice")
        parts = name.split("/")
        if len(parts) < 2 or {"", ".", ".."} & set(parts) or "\\" in name or "\0" in name:
            raise SourceError(f"member {_quote(name)} is not a plain path below one folder")
        if flags & ~0x0808:  # all but "sizes follow the data" and "names are UTF-8": encryption, patches
            raise SourceError(f"member {_quote(name)} is encrypted or of a form that torch.save does not write")
        length, packed, header = _zip64(extra, length, packed, header)
        if method or packed != length:
            raise SourceError(f"member {_quote(name)} is compressed", hint="torch never compresses: save it again")
        f.seek(min(header, size))
        local = f.read(30 + len(raw_name))
        same = local[:4] == b"PK\3\4" and local[30:] == raw_name
        if not same or struct.unpack_from("<2H16xH", local, 6) != (flags, method, len(raw_name)):
            raise SourceError(f"member {_quote(name)}: its header and the zip's table disagree")
        start = header + 30 + len(raw_name) + int.from_bytes(local[28:30], "little")
        if start + length > begin:
            raise SourceError(f"member {_quote(name)} runs past the zip's data")
        members[name] = _Member(header, start, length, crc)
    if at != len(table) or len({name.split("/")[0] for name in members}) != 1:
        raise SourceError("the zip's members do not lie below one folder, or its table has more than it counts")
    ordered = sorted(members.values(), key=lambda m: m.header)
    if any(a.start + a.size > b.header for a, b in pairwise(ordered)):
        raise SourceError("members of the zip overlap")
    return next(iter(members)).split("/")[0], members


def _zip64(extra: bytes, *values: int) -> list[int]:
    """Sizes and offset of a member, the saturated ones taken from its zip64 field."""
    wide = b""
    while len(extra) >= 4 and not wide:
        kind, length = struct.unpack_from("<2H", extra)
        wide = extra[4 : 4 + length] if kind == 1 else b""
        extra = extra[4 + length :]
    found = iter(struct.unpack(f"<{len(wide) // 8}Q", wide[: len(wide) // 8 * 8]))
    return [next(found, v) if v == 0xFFFFFFFF else v for v in values]


def _read_directory(f: BinaryIO, size: int, data_present: bool) -> tuple[bytes, int, int]:
    """The table at the zip's end, its number of members, and its offset in the file."""
    f.seek(max(size - 98, 0))
    tail = f.read(98)
    if len(tail) < 98 or tail[76:80] != b"PK\5\6":
        raise SourceError(
            "the zip has no end: the file is cut off, or something follows it",
            hint="the download is incomplete: fetch the file again"
            if data_present
            else "a pickled file lists its tensors at its end: fetch all of it, or plan from safetensors files",
        )
    *small, comment = struct.unpack_from("<4H2IH", tail, 80)
    numbers, end = small, size - 22
    if tail[56:60] == b"PK\6\7":  # zip64, which torch always writes
        end = size - 98
        numbers = list(struct.unpack_from("<2I4Q", tail, 16))
        agree = all(s in (n, 0xFFFF, 0xFFFFFFFF) for s, n in zip(small, numbers, strict=True))
        if tail[:4] != b"PK\6\6" or struct.unpack_from("<IQI", tail, 60) != (0, end, 1) or not agree:
            raise SourceError("the zip's two ends disagree")
    disk, table_disk, count_here, count, length, begin = numbers
    if comment or disk or table_disk or count_here != count or not count or begin + length != end:
        raise SourceError("the zip does not fill the file: something stands before, behind or inside it")
    if length > MAX_HEADER:
        raise SourceError(f"the zip's table has {length:,} bytes; the limit is {MAX_HEADER:,}")
    f.seek(begin)
    return f.read(length), count, begin


def _content(f: BinaryIO, members: dict[str, _Member], name: str) -> bytes:
    """A member's bytes, CRC checked: for the small ones, never a storage."""
    member = members.get(name)
    if member is None:
        raise SourceError(f"the zip has no {_quote(name)}", hint="this is no file of torch.save")
    if member.size > MAX_HEADER:
        raise SourceError(f"{_quote(name)} has {member.size:,} bytes; the limit is {MAX_HEADER:,}")
    f.seek(member.start)
    raw = f.read(member.size)
    if len(raw) != member.size or zlib.crc32(raw) != member.crc:
        raise SourceError(f"{_quote(name)} is damaged: its CRC-32 differs")
    return raw
