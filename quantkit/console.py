"""The one place that prints. stdout is the result: text, or one JSON object. stderr is progress and prose."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from quantkit.errors import QuantkitError, RunError


def human_bytes(n: float) -> str:
    """1234567 → '1.23 MB': decimal units, as disks and the Hub count."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(n) < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1000
    raise AssertionError


def human_time(seconds: float) -> str:
    """5400 → '1.5 hours'."""
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} seconds"


def printable(text: str) -> str:
    """Text as one line that only prints: what a stranger's names hold besides is spelled out (`\\n`, `\\x1b`)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table(rows: Sequence[Sequence[object]], *, header: Sequence[str] = (), right: Sequence[int] = ()) -> str:
    """Columns aligned with spaces; those in `right` flush right."""
    cells = [[printable(str(c)) for c in row] for row in ([header, *rows] if header else rows)]
    if not cells:
        return ""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


class Progress:
    """Bytes done: a tqdm bar with an ETA where stderr is a terminal, one line a tensor elsewhere, nothing if quiet."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self._total, self._done = total, 0
        self._lines = not quiet and not sys.stderr.isatty()
        self._bar: Any = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, nbytes: int) -> None:
        self._done += nbytes
        if self._bar is not None:
            self._bar.update(nbytes)

    def unit(self, name: str, nbytes: int) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(printable(name)[-40:], refresh=False)
        elif self._lines:
            percent = 100 * self._done / self._total if self._total else 100
            print(f"{percent:5.1f} %  {printable(name)}  {human_bytes(nbytes)}", file=sys.stderr)


class Console:
    """Human text, or JSON; `quiet` drops everything on stderr but errors and warnings; and one that does not speak has
    no warnings either, as another process has the same."""

    def __init__(self, *, json: bool = False, quiet: bool = False, speaks: bool = True) -> None:
        self.json, self.quiet, self.speaks = json, quiet or not speaks, speaks

    def result(self, data: Mapping[str, Any], text: str) -> None:
        """The command's result: `text` for people, `data` with --json. RunError if it has nowhere to go."""
        shown = json.dumps(data) if self.json else "\n".join(map(printable, text.split("\n")))
        try:
            print(shown, flush=True)
        except OSError as e:
            sys.stdout = None  # or the interpreter would try once more
            raise RunError(
                f"the result cannot be printed: {e.strerror}", hint="what was to be written is written"
            ) from None

    def warn(self, text: str) -> None:
        if self.speaks:
            print(f"warning: {printable(text)}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        if not self.quiet:
            print(printable(text), file=sys.stderr, flush=True)

    def error(self, error: QuantkitError) -> None:
        """Three lines on stderr; with --json also an object on stdout, so that a script reads one place."""
        lines = [("error: ", error.what), ("  in: ", error.where), ("  hint: ", error.hint)]
        for label, text in lines:
            if text:
                print(label + printable(text), file=sys.stderr, flush=True)
        if self.json and sys.stdout is not None:
            block = {"what": error.what, "in": error.where, "hint": error.hint, "exit_code": error.exit_code}
            print(json.dumps({"error": block}), flush=True)

    def progress(self, total: int) -> Progress:
        return Progress(total, quiet=self.quiet)
