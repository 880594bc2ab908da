"""What the benchmarks share: a 7B-shaped checkpoint, and a clock that starts with the source out of the page cache and
stops when the output is on disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / ".demo" / "bench"


def make_checkpoint(folder: Path, layers: int) -> Path:
    """A random bf16 checkpoint in Mistral-7B's shape, made once."""
    source = folder / f"7b-{layers}"
    if not source.exists():
        print("making the checkpoint", file=sys.stderr)
        partial = source.with_suffix(".partial")
        subprocess.run([sys.executable, str(HERE / "make_7b.py"), str(partial), str(layers)], check=True)
        partial.rename(source)
    return source


def evict(folder: Path) -> None:
    """Takes the folder's files out of the page cache."""
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def measure(command: list[str], source: Path, out: Path) -> tuple[float, float]:
    """(seconds until the output is on disk, peak RSS in GB)."""
    shutil.rmtree(out, ignore_errors=True)
    evict(source)
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        sys.exit(f"failed: {command}")
    os.sync()
    return time.monotonic() - started, usage.ru_maxrss * 1024 / 1e9
