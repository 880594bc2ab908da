"""Conversions of 130 MB, run in processes of their own: what the tests share that kill, starve or deceive them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import warm
from resuming import (
    FEED_FORWARD,
    HIDDEN,
    KEY_VALUE,
    LAYERS,
    UNITS,
    VOCABULARY,
    Moment,
    at,
    digests,
    make_source,
    stamps,
)

OPTIONS = ("--threads", "1", "--quiet", "--no-tokenizer")


class Job(NamedTuple):
    """A conversion, and what it writes last."""

    source: Path
    options: tuple[str, ...]
    last: str
    reference: dict[str, str]  # SHA-256 of every file that an uninterrupted run writes

    @property
    def weights(self) -> dict[str, str]:
        return {n: d for n, d in self.reference.items() if n.endswith((".safetensors", ".pth"))}


def make_pth(folder: Path) -> Path:
    """130 MB in Mistral's shape as one consolidated.00.pth. No two tensors are alike."""
    folder.mkdir()
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        shapes |= {
            f"layers.{i}.attention.wq.weight": (HIDDEN, HIDDEN), f"layers.{i}.attention.wk.weight": (KEY_VALUE, HIDDEN),
            f"layers.{i}.attention.wv.weight": (KEY_VALUE, HIDDEN), f"layers.{i}.attention.wo.weight": (HIDDEN, HIDDEN),
            f"layers.{i}.feed_forward.w1.weight": (FEED_FORWARD, HIDDEN),
            f"layers.{i}.feed_forward.w2.weight": (HIDDEN, FEED_FORWARD),
            f"layers.{i}.feed_forward.w3.weight": (FEED_FORWARD, HIDDEN),
            f"layers.{i}.attention_norm.weight": (HIDDEN,), f"layers.{i}.ffn_norm.weight": (HIDDEN,),
        }  # fmt: skip
    shapes |= {"norm.weight": (HIDDEN,), "output.weight": (VOCABULARY, HIDDEN)}
    pool = torch.from_numpy(
        np.random.default_rng(1).standard_normal(VOCABULARY * HIDDEN + UNITS, np.float32)
    ).bfloat16()
    weights = {
        name: pool[i : i + torch.Size(shape).numel()].reshape(shape).clone()
        for i, (name, shape) in enumerate(shapes.items())
    }
    torch.save(weights, folder / "consolidated.00.pth")
    params = {"dim": HIDDEN, "n_layers": LAYERS, "head_dim": 128, "hidden_dim": FEED_FORWARD, "n_heads": 8,
              "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": VOCABULARY, "sliding_window": 4096}  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    return folder


@pytest.fixture(scope="session")
def job_sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Read only. That quantkit did not change them is checked at the end."""
    folder = tmp_path_factory.mktemp("convert")
    found = {"hf": make_source(folder / "hf"), "pth": make_pth(folder / "native")}
    before = {name: stamps(path) for name, path in found.items()}
    yield found
    assert {name: stamps(path) for name, path in found.items()} == before


KINDS = {
    "hf to mistral": ("hf", ("--to", "mistral"), "params.json"),
    "hf to pth": ("hf", ("--to", "mistral", "--weights-format", "pth"), "params.json"),
    "pth to hf": ("pth", ("--to", "hf", "--max-shard-size", "12MB"), "config.json"),
}


@pytest.fixture(scope="session")
def jobs(job_sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Job]:
    made: dict[str, Job] = {}

    def get(kind: str) -> Job:
        if kind not in made:
            name, options, last = KINDS[kind]
            job = Job(job_sources[name], (*OPTIONS, *options), last, {})
            out = tmp_path_factory.mktemp("reference") / "out"
            done = finish(job, out)
            assert done.returncode == 0, done.stderr
            made[kind] = job._replace(reference=digests(out))
            assert {"README.md", "quantkit.json", last} < set(made[kind].reference)
            assert len(made[kind].weights) == (1 if last == "params.json" else 14)
            shutil.rmtree(out)
        return made[kind]

    return get


def kinds(*usual: str) -> Any:
    """Parametrizes `job`: with these kinds, and with the others where there is time for them."""
    every = [pytest.param(kind, marks=() if kind in usual else pytest.mark.slow) for kind in KINDS]
    return pytest.mark.parametrize("job", every, indirect=True)


def command(job: Job, out: Path, *options: str) -> list[str]:
    return ["convert", str(job.source), "-o", str(out), *job.options, *options]


def start(job: Job, out: Path, *options: str) -> warm.Process:
    return warm.start(command(job, out, *options))


def finish(job: Job, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return warm.run(command(job, out, *options))


def stop_at(job: Job, out: Path, moment: Moment, what: signal.Signals, *options: str) -> tuple[int, str]:
    """Exit code and stderr of a run that met a signal."""
    process = start(job, out, *options)
    at(process, out, moment, what)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, errors(stderr)


def errors(stderr: str) -> str:
    """Without the warnings that stand before."""
    return "".join(line for line in stderr.splitlines(keepends=True) if not line.startswith("warning: "))


def assert_finished(job: Job, out: Path) -> int:
    """The same command again ends well, and in these bytes. How many tensors it did not do again."""
    done = finish(job, out, "--json")
    assert done.returncode == 0, done.stderr
    assert digests(out) == job.reference
    result = json.loads(done.stdout)
    assert result["units"] == UNITS
    return int(result["reused"])
