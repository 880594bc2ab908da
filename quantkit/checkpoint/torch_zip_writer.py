"""A torch zip file (`.pth`, `.bin`) planned to the byte before a weight is known. Standard library only.

Format: that of torch.save since 1.6, which `torch_zip.py` describes and reads. Every member is stored, so where each
tensor lies follows from names, dtypes and shapes. Only CRC-32s need the weights. Each has its place, in the member's
header and in the table at the file's end, and is put there last; without that table nothing takes the file for a zip.

Where we differ from torch.save, and torch need not care:
- Sizes stand in front of the data: we know them. torch streams, so it repeats CRC and sizes behind each member.
- No `.format_version`, no `.storage_alignment`: with those, a newer torch may compute where members lie, and it counts
  what it would have written behind each.
- No `.data/serialization_id`: that of torch differs from run to run.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quantkit.checkpoint.header import MAX_HEADER, TensorSpec, quote
from quantkit.checkpoint.torch_zip import STORAGES
from quantkit.errors import RunError, SourceError

ALIGN = 64  # torch's own, so that a mapped file gives tensors that any processor can load at once
MAX_TENSORS = 50_000  # what our reader takes, at the most sides that a tensor may have

CLASSES = {dtype: name for name, dtype in STORAGES.items() if name != "torch.storage.UntypedStorage"}

INSTEAD = "write safetensors files instead"
UTF8 = 0x0800  # the one flag: names are UTF-8
DATE = 33  # 1980-01-01, the first that a zip can name: the time of writing is nobody's business
FULL32 = 0xFFFFFFFF  # in place of a number of 32 bits: it stands in the zip64 field
ZIP64 = 45  # version "needed" for such fields; without them torch says 0, and so do we


@dataclass(frozen=True, slots=True)
class _Member:
    """A zip member: name with its folder, offset of its local header, size in bytes, CRC-32 (a tensor's: 0 as yet)."""

    name: bytes
    header: int
    size: int
    crc: int

    @property
    def size32(self) -> int:
        return min(self.size, FULL32)


@dataclass(frozen=True)
class TorchZipPlan:
    """Where every byte of a torch zip goes. Offsets count bytes from the start of the file.

    `fixed` holds (offset, bytes) of all that is known by now, in file order; `offsets` where each tensor's bytes begin,
    in the order of the specs, at multiples of 64; `nbytes` is the size of the file. These, each tensor's CRC-32 (u32,
    little-endian) at `crc_offset`, and `ending` make up the file without a hole or an overlap.
    """

    fixed: tuple[tuple[int, bytes], ...]
    offsets: tuple[int, ...]
    nbytes: int
    small: tuple[_Member, ...]  # what `fixed` holds whole, first in the file
    tensors: tuple[_Member, ...]
    end: int  # of the last member

    def crc_offset(self, i: int) -> int:
        """Where the 4 bytes of tensor i's CRC-32 stand in its local header, which `fixed` left zero."""
        return self.tensors[i].header + 14

    def ending(self, crcs: Sequence[int]) -> tuple[int, bytes]:
        """The table of members and the zip's end records, and their offset. Their length does not depend on `crcs`,
        the CRC-32 of each tensor in the order of the specs. ValueError if these are not as many as the tensors."""
        every = [*(m.crc for m in self.small), *crcs]
        return self.end, _ending(self.small + self.tensors, every, self.end)


def plan_torch_zip(specs: Sequence[TensorSpec], *, folder: str = "consolidated.00") -> TorchZipPlan:
    """The layout of a file that torch.load reads as a dict of `specs`, in their order: each tensor contiguous, little-
    endian, in a storage of its own. `folder` is the zip's one folder, a plain name; torch takes the file's stem.

    Specs are those that `parse_header` lets pass. Raises SourceError for a dtype that torch has no storage class for, a
    name that stands twice, and more tensors than one file can hold.
    """
    known = {"data.pkl": _pickled(specs), "byteorder": b"little", "version": b"3\n"}
    sizes = {name: len(content) for name, content in known.items()}
    sizes |= {f"data/{i}": spec.nbytes for i, spec in enumerate(specs)}
    members, fixed, starts = [], [], []
    end = 0
    for name, size in sizes.items():
        content = known.get(name, b"")
        member = _Member(f"{folder}/{name}".encode(), end, size, zlib.crc32(content))
        header = _local_header(member)
        members.append(member)
        fixed.append((end, header + content))
        starts.append(end + len(header))
        end = starts[-1] + size
    nbytes = end + len(_ending(members, [0] * len(members), end))
    n = len(known)
    return TorchZipPlan(tuple(fixed), tuple(starts[n:]), nbytes, tuple(members[:n]), tuple(members[n:]), end)


def member_crc(read: Callable[[int, memoryview], int], offset: int, nbytes: int, buffer: memoryview) -> int:
    """CRC-32 of the `nbytes` at `offset`, read piece by piece into `buffer`: `read(offset, buffer)` fills some of it,
    and says how much. Raises RunError if the file ends before that. Zip tools check it; torch does not."""
    crc, end = 0, offset + nbytes
    while offset < end:
        part = buffer[: min(len(buffer), end - offset)]
        n = read(offset, part)
        if n == 0:
            raise RunError("a file became shorter while its CRC-32 was computed", hint="run the same command again")
        crc = zlib.crc32(part[:n], crc)
        offset += n
    return crc


def _local_header(member: _Member) -> bytes:
    """What stands before a member's bytes, padded so that these are aligned: in a field "FB", as torch does it."""
    wide = member.size >= FULL32
    extra = struct.pack("<2H2Q", 1, 16, member.size, member.size) if wide else b""
    padding = -(member.header + 30 + len(member.name) + len(extra) + 4) % ALIGN
    extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    sizes = (member.size32, member.size32, len(member.name), len(extra))
    start = struct.pack("<4s5H3I2H", b"PK\3\4", ZIP64 * wide, UTF8, 0, 0, DATE, member.crc, *sizes)
    return start + member.name + extra


def _ending(members: Sequence[_Member], crcs: Sequence[int], begin: int) -> bytes:
    """The table of members, which begins at `begin`, and both of the zip's ends. Like torch, we write the one of zip64
    always: no reader minds, and there is one form less."""
    table = b"".join(_table_entry(m, crc) for m, crc in zip(members, crcs, strict=True))
    count, length = len(members), len(table)
    end = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, ZIP64, ZIP64, 0, 0, count, count, length, begin)
    end += struct.pack("<4sIQI", b"PK\6\7", 0, begin + length, 1)
    return table + end + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, length, min(begin, FULL32), 0)


def _table_entry(member: _Member, crc: int) -> bytes:
    wide = [n for n in (member.size, member.size, member.header) if n >= FULL32]
    extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    version = ZIP64 * bool(wide)
    start = struct.pack("<4s6H", b"PK\1\2", version, version, UTF8, 0, 0, DATE)
    start += struct.pack("<3I2H", crc, member.size32, member.size32, len(member.name), len(extra))
    return start + struct.pack("<3H2I", 0, 0, 0, 0, min(member.header, FULL32)) + member.name + extra


def _pickled(specs: Sequence[TensorSpec]) -> bytes:
    """data.pkl: a pickle of protocol 2, as torch.save writes, that builds {name: tensor}. What recurs is memoized, and
    nothing else: so one byte numbers the memo, however many the tensors."""
    memo: dict[bytes, int] = {}

    def once(code: bytes) -> bytes:
        if code in memo:
            return b"h" + bytes([memo[code]])  # BINGET
        memo[code] = len(memo)
        return code + b"q" + bytes([memo[code]])  # BINPUT

    names: set[str] = set()
    out = [b"\x80\2}("]  # PROTO 2, EMPTY_DICT, MARK
    for i, spec in enumerate(specs):
        if spec.dtype not in CLASSES:
            what = f"tensor {quote(spec.name)}: a torch file that old versions read cannot hold {spec.dtype}"
            raise SourceError(what, hint=INSTEAD)
        if spec.name in names:
            raise SourceError(f"tensor {quote(spec.name)} stands twice", hint="rename one: a file holds a name once")
        names.add(spec.name)
        step = 1
        stride: list[int] = []
        for n in reversed(spec.shape):
            stride.insert(0, step)
            step *= max(n, 1)  # torch's own rule, for tensors without elements too
        out += [_text(spec.name), once(_class("torch._utils._rebuild_tensor_v2")), b"(("]  # MARK for each tuple
        out += [once(_text("storage")), once(_class(CLASSES[spec.dtype])), _text(str(i)), once(_text("cpu"))]
        out += [_int(spec.numel), b"tQ", _int(0), _tuple(spec.shape), _tuple(stride)]  # TUPLE, BINPERSID; no offset
        out += [b"\x89", once(_class("collections.OrderedDict")), b")RtR"]  # NEWFALSE: no gradient; no hooks; REDUCE
    raw = b"".join([*out, b"u."])  # SETITEMS, STOP
    if len(specs) > MAX_TENSORS or len(raw) > MAX_HEADER:
        raise SourceError(f"{len(specs):,} tensors are too many for one torch file", hint=INSTEAD)
    return raw


def _class(name: str) -> bytes:
    return "c{}\n{}\n".format(*name.rsplit(".", 1)).encode()  # GLOBAL


def _text(text: str) -> bytes:
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw  # BINUNICODE


def _int(n: int) -> bytes:
    """A number from 0 up, as short as pickle knows it: BININT1, BININT2, BININT, LONG1."""
    if n < 1 << 8:
        return b"K" + struct.pack("<B", n)
    if n < 1 << 16:
        return b"M" + struct.pack("<H", n)
    if n < 1 << 31:
        return b"J" + struct.pack("<i", n)
    raw = n.to_bytes(n.bit_length() // 8 + 1, "little")  # signed, so a bit to spare
    return b"\x8a" + bytes([len(raw)]) + raw


def _tuple(numbers: Sequence[int]) -> bytes:
    items = b"".join(map(_int, numbers))
    short = {0: b")", 1: b"\x85", 2: b"\x86", 3: b"\x87"}.get(len(numbers))  # EMPTY_TUPLE, TUPLE1 to 3
    return items + short if short else b"(" + items + b"t"  # MARK, TUPLE
