"""A calibration text as documents, read as they are asked for: a file, a Hub dataset, or what comes with Python."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from quantkit.calibration.data_chat import Chats
from quantkit.calibration.data_encode import PIECE
from quantkit.calibration.data_hub import DATASET, Reference, fetch
from quantkit.checkpoint.header import quote
from quantkit.errors import InputError

ENDINGS = (".txt", ".jsonl", ".parquet")
KEYS = ("text", "messages", "conversations")
MAX_LINE = 64 * 2**20
LONG = PIECE  # longer documents are read as far as they are needed
PARQUET_BATCH = 256

_Fail = Callable[[str, str], InputError]


@dataclass(frozen=True)
class Document:
    """`open()` reads it from its beginning; `chars` is no less than it has. special: whether a tokenizer's special
    tokens go with it."""

    open: Callable[[], TextIO]
    chars: int
    special: bool = True

    @property
    def long(self) -> bool:
        return self.chars > LONG


@dataclass(frozen=True)
class Source:
    """name: for people, no path of the machine. where: for errors. `sha256()` reads the whole of it."""

    name: str
    where: str
    documents: Callable[[], Iterator[Document]]
    sha256: Callable[[], str]


def open_source(text: str | None, folder: Path | None, *, quiet: bool) -> Source:
    """The text that a recipe names, None for the embedded one. A file wins over a Hub id of the same spelling.

    `folder` is the model's, with the template for chats; None if it has none. Raises InputError and SourceError, here
    and, for what is wrong inside a file, while the documents are read; UnicodeDecodeError for a .txt that is no UTF-8.
    """
    if text is None:
        return _embedded()
    path = Path(os.path.expanduser(text))
    reference = None
    if not os.path.lexists(path):
        reference = Reference.parse(text)
        if reference is None or (reference.id == text and text.lower().endswith(ENDINGS)):
            raise InputError(
                f"there is no file {quote(text)}",
                where=str(path.absolute().parent),
                hint=f"name a file that ends in {', '.join(ENDINGS)}, or a Hub dataset such as {DATASET}",
            )
    if reference is not None:
        path, name = fetch(reference, ENDINGS, quiet=quiet)
    else:
        plain = os.fsencode(path.name).decode("utf-8", "replace")
        name = "".join(c if c.isprintable() else "\ufffd" for c in plain)
    return _file(path, name, folder)


def _file(path: Path, name: str, folder: Path | None) -> Source:
    where = str(path)
    if path.is_dir():
        raise InputError(f"{name} is a folder", where=where, hint="name one of the files in it")
    if not path.is_file():  # opening a pipe would wait for ever
        raise InputError(f"{name} is not a file", where=where, hint="name a file")
    if path.suffix.lower() not in ENDINGS:
        raise InputError(
            f"{name} is no text to read: nothing is known of files that end in {path.suffix!r}",
            where=where, hint=f"name a file that ends in {', '.join(ENDINGS)}",
        )  # fmt: skip
    chats = Chats(folder)

    def documents() -> Iterator[Document]:
        try:
            if path.suffix.lower() == ".txt":
                with _open(path) as f:
                    empty = not f.read(1)
                if not empty:
                    yield Document(lambda: _open(path), path.stat().st_size)
            else:
                yield from (_lines if path.suffix.lower() == ".jsonl" else _rows)(path, name, chats)
        except OSError as e:
            raise _unreadable(e, name, where) from None

    def sha256() -> str:
        try:
            with path.open("rb") as f:
                return hashlib.file_digest(f, "sha256").hexdigest()
        except OSError as e:
            raise _unreadable(e, name, where) from None

    return Source(name, where, documents, sha256)


def _unreadable(e: OSError, name: str, where: str) -> InputError:
    return InputError(f"{name} cannot be read: {e.strerror}", where=where, hint="check its permissions")


def _embedded() -> Source:
    """The reference that `help()` shows, its articles by name: no download, and English beside code."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    name = f"Python {version}'s own language documentation (pydoc_data.topics)"
    return Source(name, name, lambda: iter([_document(text)]), lambda: hashlib.sha256(text.encode()).hexdigest())


def _document(text: str, *, special: bool = True) -> Document:
    return Document(lambda: io.StringIO(text, newline=""), len(text), special)


def _open(path: Path) -> TextIO:
    # A mark of the byte order is no text; line ends stay what they are.
    return path.open(encoding="utf-8-sig", newline="")


def _lines(path: Path, name: str, chats: Chats) -> Iterator[Document]:
    with path.open("rb") as f:
        number = 0
        while line := f.readline(MAX_LINE + 1):
            number += 1

            def fail(what: str, hint: str, number: int = number) -> InputError:
                return InputError(f"line {number} of {name} {what}", where=str(path), hint=hint)

            if len(line) > MAX_LINE:
                raise fail(f"is longer than {MAX_LINE >> 20} MiB", "cut it into several documents")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except UnicodeDecodeError:
                raise fail("is not UTF-8", "convert the file, for example with iconv -t UTF-8") from None
            except (ValueError, RecursionError) as e:
                raise fail(f"is not JSON: {str(e)[:100]}", "every line is one JSON value") from None
            yield from _value(value, chats, fail)


def _value(value: Any, chats: Chats, fail: _Fail) -> Iterator[Document]:
    """The document of a line: a string, a chat, or an object that holds either."""
    key = None
    if isinstance(value, dict):
        key = next((k for k in KEYS if value.get(k) is not None), None)
        if key is None:
            found = ", ".join(quote(k) for k in list(value)[:4]) or "nothing"
            raise fail(f"has none of the keys {', '.join(KEYS)}", f"it has {found}: rename the key of the text")
        value = value[key]
    if isinstance(value, str) and key in (None, "text"):
        if not (value.isascii() or _sound(value)):
            raise fail("holds half a surrogate pair, which is no text", "write the file again, as UTF-8")
        if value:
            yield _document(value)
    elif isinstance(value, list) and key != "text":
        text = chats.render(value, fail)
        if not _sound(text):
            raise fail("holds half a surrogate pair, which is no text", "write the file again, as UTF-8")
        if text:
            yield _document(text, special=False)
    else:
        what = f"{type(value).__name__} under {key!r}" if key else type(value).__name__
        raise fail(f"holds {what}", "a text is a string; a chat is a list of objects with role and content")


def _sound(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _rows(path: Path, name: str, chats: Chats) -> Iterator[Document]:
    try:
        # Loaded by name: pyarrow is an extra, and its types are not ours to check.
        parquet, lib = import_module("pyarrow.parquet"), import_module("pyarrow.lib")
    except ImportError:
        raise InputError(
            "reading a .parquet file needs pyarrow, which is not installed",
            where=str(path), hint="pip install 'quantkit[calibration]'",
        ) from None  # fmt: skip
    damaged = "fetch the file again"
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            key = next((k for k in KEYS if k in names), None)
            if key is None:
                raise InputError(
                    f"{name} has none of the columns {', '.join(KEYS)}",
                    where=str(path), hint=f"it has {', '.join(quote(n) for n in names[:6]) or 'nothing'}",
                )  # fmt: skip
            number = 0
            for batch in file.iter_batches(batch_size=PARQUET_BATCH, columns=[key]):
                for value in batch.column(0).to_pylist():
                    number += 1

                    def fail(what: str, hint: str, number: int = number) -> InputError:
                        return InputError(f"row {number} of {name} {what}", where=str(path), hint=hint)

                    if value is not None:
                        yield from _value({key: value}, chats, fail)
    except UnicodeDecodeError:
        raise InputError(f"the column {key} of {name} is not UTF-8", where=str(path), hint=damaged) from None
    except (lib.ArrowException, OSError, EOFError) as e:  # of the OSErrors those without a number are pyarrow's own
        if getattr(e, "errno", None) is not None:
            raise
        first = (str(e).strip() or type(e).__name__).splitlines()[0][:150]
        raise InputError(f"{name} is not a sound parquet file: {quote(first)}", where=str(path), hint=damaged) from None
