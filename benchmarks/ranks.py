"""What a second process is good for: jobs by one process on one core, and by two on a core each.

`ranks.py --calib valid.txt` quantizes SmolLM2-135M by GPTQ, by torchrun with one rank and with two, and a larger random
checkpoint (`make_7b.py` makes it; --big names its folder) to NF4, by one part and by two with `finish`. Every process
has one thread, and is bound to one core; what they write is compared. "One beside another" is the time of two jobs that
have nothing to do with each other, on a core each: twice `one` by that is what two cores are worth here. --runs: of how
many the median is taken. --shard: the largest file that NF4 is written to. --out: where; with --big in memory
(/dev/shm), the disk does not count.
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
from collections.abc import Sequence
from pathlib import Path

QUANTKIT = [sys.executable, "-m", "quantkit"]
# A rank, bound to a core: from `first` on, the one that its number in the team is.
BOUND = """import os
os.sched_setaffinity(0, {{sorted(os.sched_getaffinity(0))[{first} + int(os.environ["LOCAL_RANK"])]}})
from quantkit.cli import main
main()
"""
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
    print(
        "| | one, seconds | two | | one beside another, seconds | the same bytes |\n|---|--:|--:|--:|--:|---|",
        flush=True,
    )
    for name, job in (("gptq", gptq), ("nf4", nf4)):
        if (job is nf4 and a.big is None) or a.only not in (None, name):
            continue
        ways = {
            "one": lambda job=job: job(a, work / "1", 1),
            "two": lambda job=job: job(a, work / "2", 2),
            "beside": lambda job=job: [job(a, work / "1", 1)[0] + job(a, work / "beside", 1, 1)[0]],
        }
        found: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(a.runs):
            for way, stages in ways.items():
                for folder in ("1", "2", "beside"):
                    if way == "one" or (way, folder) != ("two", "1"):
                        shutil.rmtree(work / folder, ignore_errors=True)
                each = [timed(*stage) for stage in stages()]
                print(f"{name}, {way}:", *(f"{seconds:.1f}" for seconds in each), file=sys.stderr, flush=True)
                found[way].append(sum(each))
                if way == "two" and not same(work / "1", work / "2"):
                    sys.exit("other bytes")
        one, two, beside = (statistics.median(times) for times in found.values())
        print(f"| {name} | {one:.1f} | {two:.1f} | {one / two:.2f} × | {beside:.1f} | yes |", flush=True)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
