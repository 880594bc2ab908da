"""What the benchmarks share: a 7B-shaped checkpoint, a clock that starts with the source out of the page cache and
stops when the output is on disk, a watch over processes that may fail, hang, or use a GPU, and tables."""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / ".demo" / "bench"
TICK = 0.03  # seconds between looks at a watched process
LETTERS = range(256, 32_000), range(256, 512)  # that are tokens of a random model, and of a small one


def make_checkpoint(folder: Path, layers: int) -> Path:
    """A random bf16 checkpoint in Mistral-7B's shape, made once."""
    source = folder / f"7b-{layers}"
    if not source.exists():
        print("making the checkpoint", file=sys.stderr)
        partial = source.with_suffix(".partial")
        subprocess.run([sys.executable, str(HERE / "make_7b.py"), str(partial), str(layers)], check=True)
        partial.rename(source)
    return source


def random_model(out: str, layers: int, small: bool) -> None:
    """A checkpoint by make_7b.py, or a small one of its kind, with a tokenizer to which every letter is a token."""
    import make_7b
    from tokenizers import Tokenizer, models, pre_tokenizers

    if small:
        vars(make_7b).update(HIDDEN=128, FEED_FORWARD=256, KEY_VALUE=64, VOCABULARY=512)
    folder = Path(out)
    make_7b.main(folder, layers)
    if small:
        config = json.loads((folder / "config.json").read_text())
        config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer = Tokenizer(models.BPE(vocab={chr(i): i for i in range(make_7b.VOCABULARY)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "\0", "bos_token": "\1", "eos_token": "\2"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def write_letters(path: Path, count: int, small: bool) -> Path:
    """A text of so many tokens of such a model: in words, as whoever reads texts in pieces looks for blanks."""
    drawn = map(chr, random.Random(0).choices(LETTERS[small], k=count))
    path.write_text("".join(" " if i % 9 == 8 else letter for i, letter in enumerate(drawn)))
    return path


def tokens_of(model: str, text: str) -> int:
    from tokenizers import Tokenizer

    return len(Tokenizer.from_file(f"{model}/tokenizer.json").encode(Path(text).read_text()).ids)


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


class Gpu:
    """The first GPU as its driver sees it, whoever uses it: by the library that nvidia-smi asks, which takes no memory
    there. Without a GPU, `read` has nothing to say."""

    def __init__(self) -> None:
        self.device = ctypes.c_void_p()
        try:
            self.library = ctypes.CDLL("libnvidia-ml.so.1")
            wrong = self.library.nvmlInit_v2()
            wrong = wrong or self.library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(self.device))
        except (OSError, AttributeError):
            wrong = True
        self.there = not wrong
        self.idle = (self.read() or (0, 0))[0]

    def read(self) -> tuple[int, int | None] | None:
        """(bytes in use, per cent of the last moments in which anything ran, where the driver tells)"""
        if not self.there:
            return None
        memory, rates = (ctypes.c_ulonglong * 3)(), (ctypes.c_uint * 2)()  # total, free, used; computing, memory
        if self.library.nvmlDeviceGetMemoryInfo(self.device, memory):
            return None
        return memory[2], None if self.library.nvmlDeviceGetUtilizationRates(self.device, rates) else rates[0]


@dataclass(frozen=True)
class Watched:
    """A process that has ended. rss: its peak, bytes. gpu: that of the GPU, beyond what was in use at first; busy: part
    of the time; None without a GPU. error: in a line, empty if there is none; log: the end of what it said then."""

    seconds: float
    rss: int
    gpu: int | None
    busy: float | None
    error: str
    output: str
    log: str = ""


def watch(
    command: Sequence[str],
    limit: float,
    gpu: Gpu,
    variables: Mapping[str, str],
    said: Callable[[str], object] = lambda line: None,
) -> Watched:
    """Runs a command for `limit` seconds at the most, and until what it wrote is on disk. `said` gets each line of its
    output when it comes."""
    with tempfile.NamedTemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors, open(out.name) as lines:
        begun, late, pending, seen = time.monotonic(), False, "", []
        try:
            process = subprocess.Popen(command, stdout=out, stderr=errors, env=variables, start_new_session=True)
        except OSError as e:
            return Watched(0.0, 0, None, None, str(e), "")
        ended = False
        try:
            while not ended:
                time.sleep(TICK)
                if late := time.monotonic() - begun > limit:
                    os.killpg(process.pid, signal.SIGKILL)
                pid, status, usage = os.wait4(process.pid, 0 if late else os.WNOHANG)
                ended = pid != 0
                seen += filter(None, [gpu.read()])
                *whole, pending = (pending + lines.read()).split("\n")
                for line in whole:
                    said(line)
        finally:  # also of what it has started, and when this script is told to end
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.returncode = os.waitstatus_to_exitcode(status)
        os.sync()
        seconds = time.monotonic() - begun
        out.seek(0)
        errors.seek(0)
        output, said_of_it = out.read(), errors.read()
        error = f"stopped after {limit:.0f} s" if late else ""
        if process.returncode and not late:
            error = _last(said_of_it) or _last(output) or f"exit code {process.returncode}"
    peak = max((used for used, _ in seen), default=None)
    parts = [part for _, part in seen if part is not None]
    busy = statistics.fmean(parts) / 100 if parts else None
    used = None if peak is None else peak - gpu.idle
    log = f"{output[-2000:]}\n{said_of_it[-4000:]}" if error else ""
    return Watched(seconds, usage.ru_maxrss * 1024, used, busy, error, output, log)


def _last(text: str) -> str:
    """The line that says what was wrong: ours begin with a word, others' are the last ones."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "")


Facts = dict[str, Any]
Column = tuple[str, Callable[[Facts], str]]  # its head, and what it shows of a row


def shown(key: str, form: Callable[[Any], str]) -> Callable[[Facts], str]:
    return lambda facts: "" if facts.get(key) is None else form(facts[key])


class Report:
    """Tables in Markdown, row by row as they come, so that a run that is cut keeps them; and all facts as JSON. told:
    what goes with every row that follows."""

    def __init__(self, path: Path | None, arguments: Mapping[str, str]) -> None:
        self.path, self.arguments, self.rows, self.told = path, arguments, list[Facts](), Facts()
        self.columns: list[Column] = []
        self.due = ""

    def table(self, title: str, columns: list[Column]) -> None:
        """Is printed with its first row, or not at all."""
        self.told["table"], self.columns = title, columns
        heads = "".join(f" {head} |".replace("  ", " ") for head, _ in columns)
        lines = "".join("--:|" if head else "---|" for head, _ in columns)
        self.due = f"\n### {title}\n\n| |{heads}\n|---|{lines}\n"

    def row(self, name: str, **facts: Any) -> None:
        print(self.due, end="")
        self.due = ""
        self.rows.append({**self.told, "name": name, **facts})
        cells = [name, *(form(facts) for _, form in self.columns)]
        print("| " + " | ".join(re.sub(r"[|\s]+", " ", cell) for cell in cells) + " |", flush=True)
        if self.path:
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps({"arguments": self.arguments, "rows": self.rows}, indent=1))
            partial.replace(self.path)
