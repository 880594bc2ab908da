"""What a second process is good for: jobs by one process on one core, and by two on a core each.

`ranks.py --calib valid.txt` quantizes SmolLM2-135M by GPTQ, by torchrun with one rank and with two, and a larger random
checkpoint (`make_7b.py` makes it; --big names its folder) to NF4, by one part and by two with `finish`. Every process
has one thread, and is bound to one core; what they write is compared. "Two cores" is what these are worth at most: two
jobs that have nothing to do with each other, on a core each, against one alone. Seconds are medians of --runs rounds,
and so are ratios, each of one round, as the machine may be another a minute later. --shard: the largest file that NF4
is written to. --out: where; with --big in memory (/dev/shm), the disk does not count.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

QUANTKIT = [sys.executable, "-m", "quantkit"]
# A rank, bound to a core: from `first` on, the one that its number in the team is.
BOUND = """import os
os.sched_setaffinity(0, {{sorted(os.sched_getaffinity(0))[{first} + int(os.environ["LOCAL_RANK"])]}})
from quantkit.cli import main
main()
"""
WAYS = ("one", "two", "beside")
Stage = list[tuple[Sequence[str], int | None]]  # commands that run at once, and on which core each


def started(command: Sequence[str], core: int | None = None) -> subprocess.Popen[bytes]:
    line = [*command] if core is None else ["taskset", "-c", str(core), *command]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(line, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def timed(*commands: tuple[Sequence[str], int | None]) -> float:
    """Seconds until all have ended."""
    begun = time.monotonic()
    processes = [started(command, core) for command, core in commands]
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit("failed")
    return time.monotonic() - begun


def gptq(a: argparse.Namespace, out: Path, size: int, first: int = 0) -> list[Stage]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    words = ["quantize", str(a.model), "-o", str(out), "--method", "gptq", "--calib", str(a.calib), "--threads", "1"]
    words += ["--calib-samples", str(a.samples), "--calib-length", "1024", "--quiet"]
    script = out.with_suffix(".py")
    script.write_text(BOUND.format(first=first))
    return [[([*launcher, str(script), *words], None)]]


def nf4(a: argparse.Namespace, out: Path, size: int, first: int = 0) -> list[Stage]:
    words = [*QUANTKIT, "quantize", str(a.big), "-o", str(out), "--bits", "4", "--threads", "1", "--quiet"]
    words += ["--shard-size", a.shard]
    if size == 1:
        return [[(words, first)]]
    parts: Stage = [([*words, "--part", f"{n + 1}/{size}"], n) for n in range(size)]
    return [parts, [([*QUANTKIT, "finish", str(out), "--quiet"], None)]]


def stages(way: str, job: Callable[..., list[Stage]], a: argparse.Namespace, work: Path) -> list[Stage]:
    if way == "beside":
        return [[*job(a, work / "beside", 1)[0], *job(a, work / "another", 1, 1)[0]]]
    return job(a, work / way, WAYS.index(way) + 1)


def same(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".demo/SmolLM2-135M-Instruct"))
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--big", type=Path)
    parser.add_argument("--shard", default="5GB")
    parser.add_argument("--out", type=Path, default=Path.cwd())
    parser.add_argument("--only", choices=("gptq", "nf4"))
    parser.add_argument("--runs", type=int, default=3)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="ranks-", dir=a.out))
    print("| | one, seconds | two | | two cores | the same bytes |\n|---|--:|--:|--:|--:|---|", flush=True)
    for name, job in (("gptq", gptq), ("nf4", nf4)):
        if (job is nf4 and a.big is None) or a.only not in (None, name):
            continue
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(a.runs):
            shutil.rmtree(work)
            work.mkdir()
            for way, times in found.items():
                each = [timed(*stage) for stage in stages(way, job, a, work)]
                print(f"{name}, {way}:", *(f"{seconds:.1f}" for seconds in each), file=sys.stderr, flush=True)
                times.append(sum(each))
            if not same(work / "one", work / "two"):
                sys.exit("other bytes")
        one, two = (statistics.median(found[way]) for way in ("one", "two"))
        ratio = statistics.median(x / y for x, y in zip(found["one"], found["two"], strict=True))
        cores = statistics.median(2 * x / y for x, y in zip(found["one"], found["beside"], strict=True))
        print(f"| {name} | {one:.1f} | {two:.1f} | {ratio:.2f} × | {cores:.2f} × | yes |", flush=True)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
