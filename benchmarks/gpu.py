"""quantkit on one CUDA GPU, beside its CPU path and its peers, in one call: Markdown tables as they come, and JSON.

`gpu.py [--json FILE] [--budget SECONDS]` runs the sections `machine`, `checks`, `pieces`, `nf4`, `gptq` and `exl2`, of
which --only takes some. Each has a part of the time; what one leaves goes to the next. Every row is a process with a
limit of its own, and one that fails is a row that says why.

--bitsandbytes, --gptqmodel and --exllamav2 name the peers' Pythons (or a line such as "env PYTHONPATH=… python3").
Checkpoints are random ones in Mistral-7B's shape (`make_7b.py`), of few layers, and their tokens are letters: for times
alone. With --model DIR and --calib FILE, GPTQ is of a real model, too, and EXL2 is of that one; --text FILE is what
perplexities are of. What is planned of a GPU is the least; what is free beyond that, hidden states take. --smoke tries
the script itself with a small model, on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bnb_7b import PEER as BITSANDBYTES
from gptq import GPTQMODEL
from measuring import HERE, Column, Facts, Gpu, Report, Watched, evict, shown, watch, write_letters

ROOT = HERE.parent
BUDGET = 540.0
QUANTKIT = [sys.executable, "-m", "quantkit"]
PIECES = [sys.executable, str(HERE / "gpu_pieces.py")]
TESTS = ["kernels/test_columns_triton.py", "kernels/test_bnb4.py", "solvers/test_solve.py"]
# Without flash-attn, exllamav2 0.3.2 has torch's attention, in which tokens see later ones, unless it is told not to.
EXL2_CONVERT = """
import os, pandas, runpy, sys
os.environ["EXLLAMA_NO_SDPA"] = "1"
source, out, text, bits, rows, length = sys.argv[1:]
pandas.DataFrame({"text": [open(text).read()]}).to_parquet(out + ".parquet", engine="fastparquet")
sys.argv = ["convert", "-i", source, "-o", out + "-work", "-cf", out, "-b", bits, "-c", out + ".parquet", "-r", rows,
            "-mr", str(min(16, int(rows))), "-l", length, "-ml", length]
runpy.run_module("exllamav2.conversion.convert_exl2", run_name="__main__")
"""
# By its kernels: perplexity as `quantkit eval` counts it, and a few tokens.
EXL2_READ = """
import json, math, os, sys, torch
os.environ["EXLLAMA_NO_SDPA"] = "1"
from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Config, ExLlamaV2Tokenizer
from exllamav2.generator import ExLlamaV2DynamicGenerator
folder, text, windows, length = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
config = ExLlamaV2Config(folder)
model = ExLlamaV2(config)
cache = ExLlamaV2Cache(model, max_seq_len=2048, lazy=True)
model.load_autosplit(cache)
tokenizer = ExLlamaV2Tokenizer(config)
words = open(text).read()
ids = tokenizer.encode(words[:8 * windows * length])[0]
lost = 0.0
for i in range(windows):
    x = ids[i * length:(i + 1) * length]
    cache.current_seq_len = 0
    logits = model.forward(x[None], cache)[0, :, :config.vocab_size].float().cpu()
    lost += torch.nn.functional.cross_entropy(logits[:-1], x[1:], reduction="sum").item()
generator = ExLlamaV2DynamicGenerator(model=model, cache=cache, tokenizer=tokenizer, paged=False)
answer = generator.generate(prompt=words[:200], max_new_tokens=8, add_bos=False)
print(json.dumps({"perplexity": math.exp(lost / (windows * (length - 1))), "answer": answer[-40:]}))
"""


def gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"


def rate(facts: Facts) -> str:
    if "rate" not in facts:
        return str(facts.get("value", ""))
    return f"{facts['rate'] / 1e12:.1f} TFLOP/s" if facts["unit"] == "FLOP" else gigabytes(facts["rate"]) + "/s"


def failure(ran: Watched) -> Facts:
    return {"note": ran.error, "log": ran.log} if ran.error else {}


SECONDS: Column = ("seconds", shown("seconds", "{:.1f}".format))
NOTE: Column = ("", shown("note", str))
MACHINE: list[Column] = [("", rate), NOTE]
CHECKS: list[Column] = [*((word, shown(word, str)) for word in ("passed", "failed", "skipped")), SECONDS, NOTE]
COMMANDS: list[Column] = [
    SECONDS, ("ratio", shown("ratio", "{:.2f}".format)),
    ("peak RAM", shown("rss", gigabytes)), ("planned", shown("planned_rss", gigabytes)),
    ("GPU memory", shown("gpu", gigabytes)), ("planned, at the least", shown("planned_gpu", gigabytes)),
    ("GPU busy", shown("busy", "{:.0%}".format)), ("perplexity", shown("perplexity", "{:.3f}".format)), NOTE,
]  # fmt: skip
PIECE: list[Column] = [("", shown("piece", str)), ("ms", shown("seconds", lambda s: f"{1e3 * s:.2f}"))]
ON_GPU: list[Column] = [
    *PIECE, ("GB to move", shown("nbytes", lambda n: f"{n / 1e9:.2f}")),
    ("TFLOP to do", shown("flop", lambda n: f"{n / 1e12:.3f}")),
    ("of the ceilings", shown("utilization", "{:.0%}".format)), NOTE,
]  # fmt: skip
ON_CPU: list[Column] = [
    *PIECE, ("times the GPU's", shown("times", "{:.1f}".format)),
    ("loss, of the GPU's", shown("loss_ratio", "{:.4f}".format)),
    ("codes that differ", shown("differ", "{:.2%}".format)), NOTE,
]  # fmt: skip


class Bench(Report):
    """Runs processes while there is time."""

    def __init__(self, a: argparse.Namespace) -> None:
        super().__init__(a.json, {key: str(value) for key, value in vars(a).items()})
        self.a, self.gpu = a, Gpu()
        self.work = Path(tempfile.mkdtemp(prefix="gpu-", dir=a.work))
        self.begun = self.until = time.monotonic()  # until when a section may go on: `main` says
        self.rates: dict[str, float] = {}
        self.first: float | None = None

    def table(self, title: str, columns: list[Column]) -> None:
        super().table(title, columns)
        self.first = 0.0

    def run(
        self, command: Sequence[str], limit: float, said: Callable[[str], object] = lambda line: None, ours: bool = True
    ) -> Watched:
        """limit: seconds, with the usual budget. A peer has a Python of its own: what ours imports is none of its."""
        left = self.until - time.monotonic()
        if left < 5:
            return Watched(0.0, 0, None, None, "no time left", "")
        variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        path = [str(ROOT), str(HERE), *filter(None, [variables.pop("PYTHONPATH", "")])]
        if ours or shutil.which(command[0]) == sys.executable:
            variables["PYTHONPATH"] = os.pathsep.join(path)
        return watch(command, min(limit * max(self.a.budget / BUDGET, 1), left), self.gpu, variables, said)

    def lines(self, command: Sequence[str], limit: float, use: Callable[[Facts], object]) -> None:
        """A process that prints JSON objects, each a row."""
        ran = self.run(command, limit, lambda line: use(json.loads(line)) if line.startswith("{") else None)
        if ran.error:
            self.row("the rest", **failure(ran))

    def command(
        self, name: str, command: Sequence[str], limit: float, source: Path, ours: bool = False, **facts: Any
    ) -> float:
        """A whole command as a row, and the facts that its last line has; seconds, or 0 if it failed. `first` is what
        others are compared with; None: nothing is."""
        with suppress(OSError):
            evict(source)
        ran = self.run(command, limit, ours=ours)
        if not ran.error:
            self.first = ran.seconds if self.first == 0 else self.first
            facts |= {"seconds": ran.seconds, "rss": ran.rss, "gpu": ran.gpu, "busy": ran.busy}
            facts["ratio"] = self.first and ran.seconds / self.first
            last = (ran.output.splitlines() or [""])[-1]
            facts |= json.loads(last) if last.startswith("{") else {}
        self.row(name, **facts, **failure(ran))
        return 0.0 if ran.error else ran.seconds

    def quantkit(self, name: str, words: Sequence[str], device: str, limit: float, source: Path) -> float:
        """words: of the command line, which begin with the verb, the source, and where to. With memory as planned."""
        words, planned = [*words, "--device", device, "--quiet"], Facts()
        ran = self.run([*QUANTKIT, "plan", str(source), *words[4:], "--json"], 60)
        with suppress(ValueError, KeyError):
            memory = json.loads(ran.output)["memory"]
            planned = {"planned_rss": memory["peak"], "planned_gpu": memory["gpu"] or None}
        return self.command(name, [*QUANTKIT, *words], limit, source, ours=True, **planned)

    def peer(self, option: str) -> tuple[str, list[str]]:
        """Name and version, and the command that is its Python; none, and a row that says why, if it is not there."""
        if not (python := shlex.split(getattr(self.a, option) or "")):
            self.row(option, note="not given")
            return option, []
        code = f"import {option}; from importlib.metadata import version; print(version('{option}'))"
        ran = self.run([*python, "-c", code], 240, ours=False)
        if ran.error:
            self.row(option, **failure(ran))
            return option, []
        return f"{option} {ran.output.split()[-1]}", python

    def perplexity(self, name: str, folder: Path, text: Path, windows: int) -> None:
        words = ["eval", str(folder), "--text", str(text), "--windows", str(windows), "--length", str(self.a.window)]
        ran = self.run([*QUANTKIT, *words, "--device", self.a.device, "--no-record", "--quiet", "--json"], 60)
        found = {} if ran.error else {"perplexity": json.loads(ran.output)["perplexity"], "seconds": ran.seconds}
        self.row(name, **found, gpu=ran.gpu, **failure(ran))

    def checkpoint(self, layers: int) -> Path | None:
        """A random one, made once."""
        out = self.work / f"{layers}-layers"
        if not out.exists():
            code = f"import sys, measuring; measuring.random_model(sys.argv[1], {layers}, {self.a.smoke})"
            ran = self.run([sys.executable, "-c", code, f"{out}.partial"], 120)
            if ran.error:
                self.row("making a checkpoint", **failure(ran))
                return None
            Path(f"{out}.partial").rename(out)
        return out

    def fresh(self, name: str) -> Path:
        """Where there is nothing, not even what was left by a run that was stopped."""
        shutil.rmtree(self.work / name, ignore_errors=True)
        return self.work / name

    def letters(self, rows: int) -> Path:
        return write_letters(self.work / "letters.txt", rows * self.a.length, self.a.smoke)


def machine(b: Bench) -> None:
    b.table("Machine", MACHINE)

    def use(facts: Facts) -> None:
        if "key" in facts:
            b.rates[facts["key"]] = facts["rate"]
        b.row(**facts)

    b.lines([*PIECES, "machine", *b.a.words], 75, use)
    b.lines([*PIECES, "disk", *b.a.words, "--folder", str(b.work)], 60, use)


def checks(b: Bench) -> None:
    """Tests that have to do with a GPU by name, and those of solvers, which compile what later rows call."""
    b.table("Kernel checks", CHECKS)
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        b.lines([*PIECES, "twins", *b.a.words], 60, lambda facts: b.row(**facts))
    if "pytest" in missing:
        b.row("tests", note="pytest is missing")
        return
    tests = [str(ROOT / "tests" / test) for test in (TESTS[:1] if missing else TESTS)]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "filterwarnings="]
    command += ["--continue-on-collection-errors", "-k", "columns_triton or cuda or gpu or test_solve"]
    ran = b.run([*command, *tests, *(["--noconftest"] if missing else [])], 90)  # it takes hypothesis, too
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped)", ran.output)}
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)", ran.output, re.MULTILINE)
    name = ", ".join(Path(test).name for test in tests)
    more = failure(ran) | ({"note": "; ".join(failed[:3])} if failed else {})
    b.row(name, **counts, seconds=ran.seconds, **more)


def pieces(b: Bench) -> None:
    b.table(f"Solvers, on {b.a.device}", ON_GPU)
    kept = b.fresh("layers")
    kept.mkdir()
    seen: dict[tuple[str, str], Facts] = {}
    flops, copied = b.rates.get(f"{b.a.device} float32"), b.rates.get("copy")

    def on_gpu(facts: Facts) -> None:
        seen[facts["shape"], facts["piece"]] = facts
        if flops and copied:
            facts["utilization"] = max(facts["flop"] / flops, facts["nbytes"] / copied) / facts["seconds"]
        b.row(facts["shape"], **facts)

    def on_cpu(facts: Facts) -> None:
        there = seen.get((facts["shape"], facts["piece"]), {})
        for key, more in (("seconds", "times"), ("loss", "loss_ratio")):
            if there.get(key):
                facts[more] = facts[key] / there[key]
        b.row(facts["shape"], **facts)

    b.lines([*PIECES, "solve", *b.a.words, "--folder", str(kept)], 90, on_gpu)
    b.table("The same on the CPU", ON_CPU)
    b.lines([*PIECES, "solve", *b.a.words, "--device", "cpu", "--folder", str(kept)], 100, on_cpu)
    b.fresh("layers")


def nf4(b: Bench) -> None:
    layers = b.a.layers or layers_for(b)
    b.table(f"NF4 with double quantization, Mistral-7B's shape, {layers} layers", COMMANDS)
    source, out = b.checkpoint(layers), b.work / "nf4"
    if source is None:
        return
    words = ["quantize", str(source), "-o", str(out), "--bits", "4"]
    b.run([*QUANTKIT, *words, "--part", "1/16", "--quiet"], 60)  # compiles the CPU's kernels, once for this machine
    for name, device in ((f"quantkit --device {b.a.device}", b.a.device), ("quantkit", "cpu")):
        b.fresh("nf4")
        b.quantkit(name, words, device, 90, source)
    b.fresh("nf4")
    name, python = b.peer("bitsandbytes")
    if python:
        code = BITSANDBYTES.replace('device_map="cpu"', f'device_map="{b.a.device}"')
        b.command(f"transformers + {name}", [*python, "-c", code, str(source), str(out)], 120, source)
    b.fresh("nf4")
    b.fresh(source.name)


def layers_for(b: Bench) -> int:
    """The most of a model of 7B that take half of what time is left: written once, read three times, and a third of it
    written three times."""
    if b.a.smoke:
        return 2
    seconds = 2 / b.rates.get("write", 1e9) + 3 / b.rates.get("read", 1e9)
    left = (b.until - time.monotonic()) / 2
    return next((n for n in (32, 16, 8) if (0.5e9 + 0.44e9 * n) * seconds < left), 4)


def gptq(b: Bench) -> None:
    b.table("GPTQ", COMMANDS)
    if b.a.gptq_layers and (source := b.checkpoint(b.a.gptq_layers)):
        text, rows = b.letters(b.a.samples), b.a.samples
        gptq_rows(b, f"Mistral-7B's shape, {b.a.gptq_layers} layers", source, text, rows, 128, None)
    if b.a.model and b.a.calib and (rows := rows_of(b, b.a.samples)):
        config = json.loads((b.a.model / "config.json").read_text())
        group = math.gcd(128, config["hidden_size"], config["intermediate_size"])
        gptq_rows(b, b.a.model.name, b.a.model, b.a.calib, rows, group, b.a.text)


def rows_of(b: Bench, most: int) -> int:
    """As many rows as the text has for the real model, and no more than are asked for."""
    code = "import sys, measuring; print(measuring.tokens_of(*sys.argv[1:]))"
    ran = b.run([sys.executable, "-c", code, str(b.a.model), str(b.a.calib)], 60)
    rows = 0 if ran.error else min(int(ran.output) // b.a.length, most)
    if not rows:
        b.row(b.a.calib.name, note=ran.error or f"has no {b.a.length} tokens")
    return rows


def calibrated(verb: str, source: Path, out: Path, text: Path, rows: int, length: int, *more: str) -> list[str]:
    words = [verb, str(source), "-o", str(out), "--calib", str(text), "--calib-samples", str(rows)]
    return [*words, "--calib-length", str(length), *more]


def gptq_rows(b: Bench, name: str, source: Path, calib: Path, rows: int, group: int, text: Path | None) -> None:
    """text: to be predicted, of a real model. A CPU would take minutes for each layer of 7B: it has fewer rows, and so
    has the GPU once more."""
    title, outs = f"GPTQ, 4 bits, groups of {group}, {name}", dict[str, Path]()

    def ours(name: str, device: str, count: int, effort: str) -> None:
        out = b.fresh(f"gptq-{device}-{effort}-{count}")
        words = calibrated("quantize", source, out, calib, count, b.a.length, "--method", "gptq", "--effort", effort)
        if b.quantkit(name, [*words, "--group-size", str(group)], device, 120, source):
            outs[name] = out

    b.table(f"{title}, {rows} · {b.a.length} tokens", COMMANDS)
    for effort in ("default", "low"):
        ours(f"quantkit --device {b.a.device} --effort {effort}", b.a.device, rows, effort)
    peer, python = b.peer("gptqmodel")
    if python:
        out = b.fresh("gptq-peer")
        code = GPTQMODEL.replace('device="cpu"', f'device="{b.a.device}"')
        words = [str(source), str(out), str(calib), "4", str(group), str(rows), str(b.a.length)]
        if b.command(peer, [*python, "-c", code, *words], 150, source):
            outs[peer] = out
    if text is not None:
        for what, out in {"unquantized": source, **outs}.items():
            b.perplexity(f"perplexity, {what}", out, text, b.a.windows)
    some = min(rows, b.a.cpu_samples)
    b.table(f"{title}, {some} · {b.a.length} tokens, effort low", COMMANDS)
    for what, device in ((f"quantkit --device {b.a.device}", b.a.device), ("quantkit", "cpu")):
        ours(what, device, some, "low")
    for out in outs.values():
        b.fresh(out.name)


def exl2(b: Bench) -> None:
    """Of the real model, or a random one, whose perplexity says only whether two programs read the same in it."""
    b.table("EXL2", COMMANDS)
    if b.a.model and b.a.calib:
        source, calib, rows, name = b.a.model, b.a.calib, rows_of(b, b.a.exl2_samples), b.a.model.name
        text, windows = b.a.text or calib, b.a.windows
    else:
        source, rows, windows = b.checkpoint(b.a.exl2_layers), b.a.exl2_samples, 2
        calib = text = b.letters(rows)
        name = f"Mistral-7B's shape, {b.a.exl2_layers} layers"
    if source is None or not rows:
        return
    b.table(f"EXL2, 4.0 bits, {name}, {rows} · {b.a.length} tokens", COMMANDS)
    out, theirs, measured, b.first = b.work / "exl2", b.work / "exl2-peer", b.work / "measurement.json", None
    words = calibrated("measure", source, measured, calib, rows, b.a.length, "--method", "exl2")
    first = b.quantkit(f"quantkit measure --device {b.a.device}", words, b.a.device, 150, source)
    words = calibrated("quantize", source, out, calib, rows, b.a.length, "--method", "exl2", "--bits", "4.0")
    words += ["--measurement", str(measured)]
    solved = first and b.quantkit(f"quantkit quantize --device {b.a.device}", words, b.a.device, 120, source)
    if solved:
        b.row("quantkit, both", seconds=first + solved, ratio=1.0)
        b.perplexity("quantkit eval", out, text, windows)
    peer, python = b.peer("exllamav2")
    if not python:
        return
    if solved:
        command = [*python, "-c", EXL2_READ, str(out), str(text), str(windows), str(b.a.window)]
        b.command(f"{peer} reads it", command, 90, out)
        b.first = first + solved
    command = [*python, "-c", EXL2_CONVERT, str(source), str(theirs), str(calib), "4.0", str(rows), str(b.a.length)]
    if b.command(f"{peer}, measuring included", command, 200, source):
        b.perplexity("quantkit eval of its folder", theirs, text, windows)


SECTIONS: dict[str, tuple[Callable[[Bench], None], int]] = {  # and their parts of the time
    "machine": (machine, 9), "checks": (checks, 11), "pieces": (pieces, 19), "nf4": (nf4, 14), "gptq": (gptq, 27),
    "exl2": (exl2, 20),
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where all that is found is written after each row")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds, all in all")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, a,b,c")
    parser.add_argument("--work", type=Path, help="a folder on the disk to be used; by default one for temporary files")
    parser.add_argument("--layers", type=int, help="of the checkpoint for NF4; by default what there is time for")
    parser.add_argument("--gptq-layers", type=int, default=2, help="of that for GPTQ; 0: none")
    parser.add_argument("--exl2-layers", type=int, default=1, help="of that for EXL2")
    for name in ("model", "calib", "text"):
        parser.add_argument(f"--{name}", type=Path)
    for name, number, what in (
        ("samples", 128, "rows of GPTQ"), ("cpu-samples", 8, "of those on the CPU"), ("exl2-samples", 32, "of EXL2"),
        ("length", 2048, "tokens of a row"), ("windows", 12, "of --text"), ("window", 1024, "tokens of a window"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=number, help=what)
    for peer in ("bitsandbytes", "gptqmodel", "exllamav2"):
        parser.add_argument(f"--{peer}", metavar="PYTHON")
    parser.add_argument("--smoke", action="store_true")
    a = parser.parse_args()
    a.device, a.words = "cuda", ["--device", "cuda"]
    if a.smoke:
        a.device, a.words = "cpu", ["--device", "cpu", "--smoke"]
        a.samples, a.length, a.cpu_samples, a.exl2_samples, a.window = 4, 64, 2, 4, 64
    if unknown := set(a.only.split(",")) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(unknown)}")
    return a


def main() -> None:
    a = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))  # and with it what runs at the moment
    b = Bench(a)
    chosen = [(name, *SECTIONS[name]) for name in a.only.split(",")]
    whole, done = sum(part for _, _, part in chosen), 0
    try:
        for name, section, part in chosen:
            done += part
            b.told["section"], b.until = name, b.begun + a.budget * done / whole
            try:
                section(b)
            except Exception as e:  # a full disk, say: the other sections have nothing to do with it
                b.row(name, note=f"{type(e).__name__}: {e}")
    finally:
        shutil.rmtree(b.work, ignore_errors=True)
    print(f"\n{time.monotonic() - b.begun:.0f} seconds")


if __name__ == "__main__":
    main()
