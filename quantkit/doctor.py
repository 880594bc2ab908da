"""What is installed here, what of it works together, and what this machine has."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from quantkit.checkpoint.system import cores
from quantkit.console import human_bytes, table
from quantkit.version import __version__

Installed = Callable[[str], str | None]  # a distribution's version, None if it is not there

# What each extra is for; a test compares the names with pyproject.toml. `dev` is for those who work on quantkit.
EXTRAS = {
    "calibration": "calibration and evaluation texts in Parquet files, as most data sets of the Hub are",
    "plot": "figures on cards and of comparisons",
    "tasks": "lm-evaluation-harness on any folder",
    "preview": "cards as HTML pages",
    "demo": "the small real model of `make demo`",
}


@dataclass(frozen=True)
class Package:
    """wanted: what quantkit asks for, empty if anything will do. version: None if it is not installed."""

    name: str
    wanted: str
    version: str | None

    @property
    def fits(self) -> bool:
        return self.version is not None and SpecifierSet(self.wanted, prereleases=True).contains(self.version)


@dataclass(frozen=True)
class Extra:
    name: str
    use: str
    missing: tuple[str, ...]  # packages; of an extra that this installation does not know, "quantkit"

    @property
    def state(self) -> str:
        return f"`pip install 'quantkit[{self.name}]'`" if self.missing else "installed"


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int


@dataclass(frozen=True)
class Machine:
    """memory: bytes of RAM; limit: of this process's control group, None without one; disk, scratch: bytes free here
    and where temporary files go. compute: the dtype that linears multiply in on the CPU."""

    system: str
    python: str
    cores: int
    memory: int
    limit: int | None
    disk: int
    scratch: int
    compute: str
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class Diagnosis:
    """problems: what keeps quantkit from working as it should; notes: what concerns other programs, or some uses."""

    quantkit: str
    packages: tuple[Package, ...]
    extras: tuple[Extra, ...]
    machine: Machine
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"sound": not self.problems, **asdict(self)}


@dataclass(frozen=True)
class Pair:
    """Versions that do not go together, said where all of them are installed. fatal: for quantkit itself."""

    versions: tuple[tuple[str, str], ...]  # package, the versions concerned
    words: str
    fatal: bool = False

    def met(self, installed: Installed) -> bool:
        return all(
            (found := installed(name)) is not None and SpecifierSet(wanted, prereleases=True).contains(found)
            for name, wanted in self.versions
        )


# Read in their sources and run, or from the advisory that is named.
PAIRS = (
    Pair((("torch", "<2.6"),), "torch before 2.6 runs code that a .bin file brings (CVE-2025-32434)", fatal=True),
    Pair((("transformers", ">=4.56,<5.3"), ("kernels", ">=0")),
         "with `kernels` installed, transformers 4.56 to 5.2 run code that a config.json names (CVE-2026-4372)",
         fatal=True),
    Pair((("transformers", "==5.2.0"),), "transformers 5.2.0 lets a config override trust_remote_code (CVE-2026-5241)",
         fatal=True),
    Pair((("auto-gptq", ">=0"), ("transformers", ">=5")),
         "auto-gptq does not import beside transformers 5: it needs an environment of its own, with transformers 4"),
    Pair((("optimum", ">=2.3"), ("gptqmodel", "<7")), "optimum 2.3 loads GPTQ folders with gptqmodel 7 or later only"),
    Pair((("llmcompressor", ">=0.14,<0.15"), ("transformers", ">5.17.9999")),
         "llm-compressor 0.14 takes transformers up to 5.17: give it an environment of its own"),
    Pair((("bitsandbytes", ">=0.50,<0.51"),),
         "on CPUs with AVX-512 bfloat16, bitsandbytes 0.50 fails on layers whose width 64 does not divide, and a model "
         "saved again after it has run is damaged: quantkit.load avoids the first"),
)  # fmt: skip


def diagnose(installed: Installed | None = None, folder: Path | None = None) -> Diagnosis:
    """Of this environment, and of the disk that `folder` is on (None: the working directory)."""
    found = installed or _version
    own, of_extras = _requirements()
    packages = tuple(Package(r.name, str(r.specifier), found(r.name)) for r in own)
    problems = [
        f"{p.name} {p.version or 'is not installed'}" + (f" does not fit {p.wanted}" if p.version else f" ({p.wanted})")
        for p in packages
        if not p.fits
    ]
    problems += [pair.words for pair in PAIRS if pair.fatal and pair.met(found)]
    notes = [pair.words for pair in PAIRS if not pair.fatal and pair.met(found)]
    if found("gptqmodel") and not found("optimum"):
        notes.append("transformers loads GPTQ folders with gptqmodel and optimum: optimum is missing")
    extras = []
    for name, use in EXTRAS.items():
        needed = [Package(r.name, str(r.specifier), found(r.name)) for r in of_extras[name]]
        missing = tuple(p.name for p in needed if not p.fits) if needed else ("quantkit",)
        extras.append(Extra(name, use, missing))
    machine = _machine(folder or Path.cwd())
    return Diagnosis(__version__, packages, tuple(extras), machine, tuple(problems), tuple(notes))


def diagnosis_text(found: Diagnosis) -> str:
    machine = found.machine
    limit = "" if machine.limit is None else f", {human_bytes(machine.limit)} allowed to this process's group"
    gpus = ", ".join(f"{gpu.name} ({human_bytes(gpu.memory)})" for gpu in machine.gpus)
    rows = [
        ("quantkit", found.quantkit),
        *((p.name, (p.version or "missing") + ("" if p.fits else f", wanted: {p.wanted}")) for p in found.packages),
        *((f"[{extra.name}]", f"{extra.use}: {extra.state}") for extra in found.extras),
        ("system", f"{machine.system}, Python {machine.python}"),
        ("cores", f"{machine.cores}, linears multiply in {machine.compute}"),
        ("RAM", human_bytes(machine.memory) + limit),
        ("disk", f"{human_bytes(machine.disk)} free here, {human_bytes(machine.scratch)} for temporary files"),
        ("GPU", gpus or "none that torch can use"),
        *(("note", note) for note in found.notes),
        *(("problem", problem) for problem in found.problems),
        ("result", "sound" if not found.problems else f"problems: {len(found.problems)}"),
    ]
    return table(rows)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _requirements() -> tuple[list[Requirement], dict[str, list[Requirement]]]:
    """What quantkit's own metadata ask for: always, and by extra."""
    try:
        lines: Iterable[str] = requires("quantkit") or ()
    except PackageNotFoundError:  # run from its source
        lines = ()
    own: list[Requirement] = []
    extras: dict[str, list[Requirement]] = defaultdict(list)
    for requirement in map(Requirement, lines):
        if requirement.marker is None:
            own.append(requirement)
        for name in EXTRAS:
            if requirement.marker is not None and requirement.marker.evaluate({"extra": name}):
                extras[name].append(requirement)
    return own, extras


def _machine(folder: Path) -> Machine:
    compute, gpus = _torch()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(
        f"{platform.system()} {platform.machine()}", platform.python_version(), cores(), memory, _limit(),
        _free(folder), _free(Path(tempfile.gettempdir())), compute, gpus,
    )  # fmt: skip


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _limit() -> int | None:
    """Bytes of RAM that the control group allows, version 2 or 1; None if it names no number, or there is none."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            nbytes = int(Path(path).read_text())
        except (OSError, ValueError):
            continue
        if nbytes < 1 << 60:  # a number beyond that is "no limit" in version 1
            return nbytes
    return None


def _torch() -> tuple[str, tuple[Gpu, ...]]:
    try:
        import torch

        from quantkit.torch_setup import fast_dtype
    except (ImportError, OSError):  # OSError: a library that it loads is missing or damaged
        return "float32", ()
    gpus = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(i)
            gpus.append(Gpu(about.name, about.total_memory))
    return str(fast_dtype(torch.device("cpu"))).removeprefix("torch."), tuple(gpus)
