"""What `gpu.py` has measured in processes of its own: the machine's rates, and solvers piece by piece.

`gpu_pieces.py machine|twins|solve --device cuda [--smoke]` and `gpu_pieces.py disk --folder DIR` print a JSON object a
line, each as soon as it is known. `solve --folder DIR` leaves the layers that it made and solved there, and takes those
it finds, so that a GPU and a CPU solve the same ones.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from quantkit.calibration.statistics import Statistics
from quantkit.checkpoint.system import cores, page_buffer
from quantkit.kernels import columns_triton
from quantkit.methods.exl2_format import Mix
from quantkit.solvers import exl2, gptq
from quantkit.solvers.columns import solve_columns
from quantkit.solvers.factor import Factor
from quantkit.solvers.grids import Columns, Grid, search_scales
from quantkit.solvers.projection import uniform
from quantkit.solvers.refine import descend, refit
from quantkit.solvers.threads import in_threads, parts
from quantkit.torch_setup import fast_dtype, torch_settings

Made = TypeVar("Made")
SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336)]  # of a layer of a 7B model, rows = outputs first
TOKENS, LENGTH = 65_536, 2048
ON_CPU = 16  # parts of the tokens, of which a CPU sums one: its sums go by tokens alone
SETTINGS = gptq.Settings(Grid(4, 128))
MIX = "0.1:5_128/0.9:4_128"
# Operations of float32 on a weight: those of one scale that is tried (multiply, two limits, round, multiply, subtract,
# square, weigh, add; EXL2 has a limit less), times how many are: two signs of 32 ratios and two that are fitted, or 25.
GPTQ_SEARCH, EXL2_SEARCH = 9 * (2 * 32 + 2), 8 * 25


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def clock(work: Callable[[], Made], device: torch.device, least: float = 0.5, most: int = 20) -> tuple[float, Made]:
    """(median seconds of a call, what the last gave). A GPU is warmed up by one, and does three at the least; a CPU
    goes on only with what is short."""
    times: list[float] = []
    made = work() if device.type == "cuda" else None
    fewest = 3 if device.type == "cuda" else 1
    while len(times) < fewest or (sum(times) < least and len(times) < most):
        settle(device)
        begun = time.perf_counter()
        made = work()
        settle(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times), made  # type: ignore[return-value]


def _said(*command: str) -> str:
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().replace("\n", "; ")
    return ""


def machine(device: torch.device, smoke: bool) -> None:
    """What it is, and the most that it was seen to do."""
    say(name="processor", value=f"{_processor()}, {cores()} cores")
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        say(name="GPU", value=f"{about.name}, {about.total_memory / 1e9:.0f} GB, {about.multi_processor_count} SMs")
        used = columns_triton.usable(torch.ones(1, 1, device=device))
        say(name="Triton's kernels", value="used" if used else "not used: columns are solved by torch, one by one")
        say(name="driver", value=_said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"))
    for name in ("torch", "triton", "transformers", "numba", "numpy"):
        try:
            say(name=name, value=str(importlib.import_module(name).__version__))
        except ImportError:
            say(name=name, value="missing")
    size = 512 if smoke else 8192
    products(device, size)
    if device.type == "cuda":
        products(torch.device("cpu"), size // 2)
        transfers(device)
    copies(device, (1 << 24) if smoke else (1 << 32))


def copies(device: torch.device, nbytes: int) -> None:
    source = torch.randint(0, 255, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds, _ = clock(lambda: target.copy_(source), device)
    say(name="copy on the device, read + written", rate=2 * nbytes / seconds, unit="B", key="copy")


def transfers(device: torch.device) -> None:
    pageable = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8)
    there = pageable.to(device)
    for name, here in (("pageable", pageable), ("pinned", pageable.pin_memory())):
        for way, to, of in (("to", there, here), ("from", here, there)):
            seconds, _ = clock(lambda to=to, of=of: to.copy_(of), device)
            say(name=f"copy {way} the device, {name}", rate=here.nbytes / seconds, unit="B")


def _processor() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.machine()


def products(device: torch.device, size: int) -> None:
    """Of random numbers: a GPU multiplies zeros faster. float32 is not tf32, which torch takes only if told to."""
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds, _ = clock(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)
        name = str(dtype).removeprefix("torch.")
        say(name=f"{size}³ {name}, {device.type}", rate=2 * size**3 / seconds, unit="FLOP", key=f"{device.type} {name}")


def disk(folder: Path, smoke: bool) -> None:
    """Bytes a second of fresh files, written until they are on disk, and read when the page cache has let them go."""
    block, count = os.urandom(1 << 26), 2 if smoke else 48
    path = folder / "disk"
    begun = time.perf_counter()
    with path.open("wb", buffering=0) as f:
        for _ in range(count):
            f.write(block)
        os.fsync(f.fileno())
    say(name="disk, written", rate=count * len(block) / (time.perf_counter() - begun), unit="B", key="write")
    buffer = page_buffer(1 << 24)
    with path.open("rb", buffering=0) as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begun = time.perf_counter()
        while f.readinto(buffer.data):
            pass
    say(name="disk, read", rate=count * len(block) / (time.perf_counter() - begun), unit="B", key="read")
    path.unlink()


def twins(device: torch.device) -> None:
    """What can be compared without pytest: codes of one block of columns, for which nothing but the kernel computes, so
    that they are the same bit for bit."""
    torch.manual_seed(0)
    columns, grid = 128, Grid(4, 32)
    target, inputs = torch.randn(777, columns), torch.randn(512, columns)
    factor = gptq.factor_for(inputs.T @ inputs, gptq.Settings(grid))
    assert factor is not None
    scales, zeros = search_scales(target, grid)
    found = []
    for place in (torch.device("cpu"), device):
        moved = {name: value.to(place) for name, value in vars(factor).items() if isinstance(value, Tensor)}
        there = type(factor)(**(vars(factor) | moved))
        projection = uniform(4, scales.to(place), zeros.to(place), grid.natural(columns, place))
        found.append(solve_columns(target.to(place), there, projection).cpu())
    wrong = int((found[0] != found[1]).sum())
    say(name="columns of a block, without pytest", passed=int(not wrong), failed=int(bool(wrong)))


def solve(shape: tuple[int, int], device: torch.device, tokens: int, folder: Path | None, quiet: bool = False) -> None:
    """Seconds of each piece; the bytes that it must move, each number read or written once; the operations that it must
    do, a multiplication and an addition being two. Of R rows, N columns, T tokens:

        Hessian          T N²: half of a square, whose other half is the same
        factor           N³ / 3
        scales           GPTQ_SEARCH, EXL2_SEARCH for each weight
        columns          R N²: each error goes to all columns after its own
        refit, descend   2 R N² each: errors times the Hessian, beside which the rest is little
        losses           R N² each, three times in a whole `solve`: of the weight itself, rounded, and in the end
    """
    job = Job(shape, device, quiet)
    tokens_here = max(tokens // (1 if device.type == "cuda" or quiet else ON_CPU), LENGTH)
    hessian = sums(job, tokens, tokens_here)
    kept = None if folder is None else folder / f"{shape[0]}-{shape[1]}.pt"
    found: dict[str, Any] = torch.load(kept) if kept is not None and kept.exists() else {}
    first = not found
    weight = (0.02 * torch.randn(*shape, device=device)).bfloat16()
    found = found or {"hessian": hessian.cpu(), "weight": weight.cpu()}
    hessian, weight = found["hessian"].to(device), found["weight"].to(device)
    factor = pieces(job, weight, hessian)
    wholes(job, weight, hessian, factor, found)
    if first and kept is not None:
        torch.save(found, kept)


def sums(job: Job, tokens: int, tokens_here: int) -> Tensor:
    """The Hessian, of fewer tokens where that is so slow that the time is told from a part."""
    columns = job.shape[1]
    inputs = made_inputs(columns, tokens_here, job.device)
    cost = (2 * tokens * columns + 4 * columns**2, tokens * columns**2)
    return job("Hessian", cost, lambda: summed(inputs), tokens / tokens_here)


def made_inputs(columns: int, tokens: int, device: torch.device) -> Tensor:
    """Of very different sizes, and with much in common."""
    torch.manual_seed(0)
    common, sizes = torch.randn(64, columns, device=device) / 8, torch.randn(columns, device=device).exp()
    inputs = torch.empty(tokens, columns, dtype=fast_dtype(device), device=device)
    for x in inputs.split(LENGTH):
        own, shared = torch.randn(len(x), columns, device=device), torch.randn(len(x), 64, device=device)
        x.copy_((own + shared @ common) * sizes)
    return inputs


def summed(inputs: Tensor) -> Tensor:
    """The Hessian as a run makes it: from one row of the text after the other."""
    columns = inputs.shape[1]
    seen = Statistics({}, {}, torch.zeros(columns, columns, device=inputs.device))
    for x in inputs.split(LENGTH):
        seen.add(x, None)
    seen.finish_sums()
    return seen.hessian


class Job:
    """Times what is done to weights of one shape, and says so."""

    def __init__(self, shape: tuple[int, int], device: torch.device, quiet: bool) -> None:
        self.shape, self.device, self.quiet = shape, device, quiet

    def __call__(self, piece: str, cost: tuple[float, float], work: Callable[[], Made], times: float = 1) -> Made:
        """cost: bytes, operations. times: what a call does, to have done all."""
        made, facts = self.timed(piece, cost, work, times)
        self.say(facts)
        return made

    def timed(
        self, piece: str, cost: tuple[float, float], work: Callable[[], Made], times: float = 1
    ) -> tuple[Made, dict[str, Any]]:
        seconds, made = clock(work, self.device)
        named = {"shape": f"{self.shape[0]} × {self.shape[1]}", "piece": piece}
        return made, {**named, "seconds": seconds * times, "nbytes": cost[0], "flop": cost[1]}

    def say(self, facts: dict[str, Any]) -> None:
        if not self.quiet:
            say(**facts)

    def by_rows(self, work: Callable[[slice], Made]) -> list[Made]:
        """In the parts in which `solve` does it."""
        rows, columns = self.shape
        return in_threads(work, parts(rows, self.device, columns), self.device)


def pieces(job: Job, weight: Tensor, hessian: Tensor) -> Factor:
    """What `gptq.solve` does with a weight, one after the other; the factor."""
    r, n = weight.shape
    every, square, grid = r * n, n * n, SETTINGS.grid
    scaled = 2 * r * grid.groups(n)
    factor = job("factor", (8 * square, n**3 / 3), lambda: gptq.factor_for(hessian, SETTINGS))
    assert factor is not None
    aim, ridge = weight.float(), factor.damp * factor.scale
    importance, group = hessian.diagonal() / factor.scale + SETTINGS.damp, grid.natural(n, weight.device)
    columns = Columns.of(grid, group, importance)
    cost = (4 * every + scaled, GPTQ_SEARCH * every)
    searched = job("scales", cost, lambda: job.by_rows(lambda p: search_scales(aim[p], grid, columns)))
    scales, zeros = (torch.cat(column) for column in zip(*searched, strict=True))
    projection = uniform(grid.bits, scales, zeros, group)
    cost = (5 * every + 2 * square + scaled, r * square)
    rounded = job("columns", cost, lambda: job.by_rows(lambda p: solve_columns(aim[p], factor, projection.rows(p))))
    codes = torch.cat(rounded)
    cost = (5 * every + 4 * square + 2 * scaled, 2 * r * square)
    fit = job.by_rows
    job("refit", cost, lambda: fit(lambda p: refit(aim[p], hessian, projection.rows(p), codes[p], ridge)))

    def visit(p: slice) -> None:
        descend(aim[p], hessian, projection.rows(p), codes[p].clone(), ridge)

    cost = (6 * every + 4 * square + scaled, 2 * r * square)
    job("descend", cost, lambda: job.by_rows(visit))
    return factor


def wholes(job: Job, weight: Tensor, hessian: Tensor, factor: Factor, found: dict[str, Any]) -> None:
    """A whole `solve` of GPTQ, its factor included; what measuring does for one mix of bits; a whole one of EXL2.
    found: what another device made of the same, to be compared, or where it is left for one."""
    r, n = weight.shape
    products, groups = r * n * n, Mix.parse(MIX).groups(n)
    least = 3 * r * n + 4 * n * n  # the weight, its codes, the Hessian
    gptq_flop, exl2_flop = n**3 / 3 + GPTQ_SEARCH * r * n + 12 * products, EXL2_SEARCH * r * n + 12 * products
    trial = exl2.Work(0, 0)
    jobs: list[tuple[str, float, Callable[[], Any]]] = [
        ("GPTQ, whole", gptq_flop, lambda: gptq.solve(weight, hessian, SETTINGS)),
        ("EXL2, a trial", exl2_flop - 8 * products, lambda: exl2.solve(weight, hessian, groups, factor, work=trial)),
        ("EXL2, whole", exl2_flop, lambda: exl2.solve(weight, hessian, groups, factor)),
    ]
    for piece, flop, work in jobs:
        solved, facts = job.timed(piece, (least, flop), work)
        codes, facts["loss"] = torch.from_numpy(solved.coded.codes), solved.report.loss
        if piece in found:
            facts["differ"] = float((codes != found[piece]).double().mean())
        found.setdefault(piece, codes)
        job.say(facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("machine", "disk", "twins", "solve"))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--smoke", action="store_true", help="small numbers, to try the program itself")
    a = parser.parse_args()
    if a.what == "disk":
        disk(a.folder, a.smoke)
        return
    with torch_settings(cores()), torch.inference_mode():
        if a.what == "machine":
            machine(a.device, a.smoke)
        elif a.what == "twins":
            twins(a.device)
        else:
            solve((64, 256), a.device, 512, None, quiet=True)  # compiles the kernels
            for shape in [(64, 128), (96, 256)] if a.smoke else SHAPES:
                solve(shape, a.device, 4 * LENGTH if a.smoke else TOKENS, a.folder)


if __name__ == "__main__":
    main()
