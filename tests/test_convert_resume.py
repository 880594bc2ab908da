"""A conversion that is killed, interrupted, starved of disk or deceived: the same command ends in the same bytes, and
until then no loader takes the folder for a model. What is written wrongly is found out before it is called done."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import warm
from oracle.native_models import make_native
from resuming import (
    FEED_FORWARD,
    HIDDEN,
    KEY_VALUE,
    LAYERS,
    SIGNAL_AFTER_RENAME,
    UNITS,
    VOCABULARY,
    Moment,
    assert_three_lines,
    at,
    delay,
    digests,
    journal_lines,
    lines,
    make_source,
    modify,
    replace,
    stamps,
    truncate,
)
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.writer import ShardWriter
from quantkit.cli import main
from quantkit.errors import RunError

OPTIONS = ("--threads", "1", "--quiet", "--no-tokenizer")


class Job(NamedTuple):
    """A conversion; what it writes last; how many renames of weight files come before that."""

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
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
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
def jobs(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Job]:
    made: dict[str, Job] = {}

    def get(kind: str) -> Job:
        if kind not in made:
            name, options, last = KINDS[kind]
            job = Job(sources[name], (*OPTIONS, *options), last, {})
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


@pytest.fixture(params=KINDS)
def job(request: pytest.FixtureRequest, jobs: Callable[[str], Job]) -> Job:
    return jobs(request.param)


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


def signal_after_rename(n: int, what: signal.Signals, job: Job, out: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", SIGNAL_AFTER_RENAME, str(n), str(int(what)), *command(job, out)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60)


def assert_no_model(job: Job, out: Path) -> None:
    """No loader takes `out` for a model, or else it is the finished one."""
    if (out / job.last).exists():
        assert job.reference.items() <= digests(out).items()


def assert_finished(job: Job, out: Path) -> int:
    """The same command again ends well, and in these bytes. How many tensors it did not do again."""
    done = finish(job, out, "--json")
    assert done.returncode == 0, done.stderr
    assert digests(out) == job.reference
    result = json.loads(done.stdout)
    assert result["units"] == UNITS
    return int(result["reused"])


def assert_sound(out: Path) -> None:
    """A torch file that zip tools and torch take for whole."""
    path = out / "consolidated.00.pth"
    with zipfile.ZipFile(path) as z:
        assert z.testzip() is None
    assert len(torch.load(path, weights_only=True, mmap=True)) == UNITS


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def chain(job: Job, out: Path, seed: int, kills: int) -> int:
    """Kills, each in the run that takes up what the one before had left. How many met a run."""
    chance = random.Random(seed)
    counts = sorted(chance.sample(range(1, UNITS), kills - 2))
    met = 0
    for moment in [delay(chance.uniform(0, 0.3)), *map(lines, counts), delay(chance.uniform(0.1, 0.6))]:
        code, stderr = stop_at(job, out, moment, signal.SIGKILL)
        assert code in (0, -signal.SIGKILL), stderr
        met += code != 0
        assert_no_model(job, out)
    return met


def test_killed_at_random_moments(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert chain(job, out, seed=0, kills=4) >= 2
    assert_finished(job, out)
    if "pth" in job.options:
        assert_sound(out)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_killed_at_many_random_moments(seed: int, job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert chain(job, out, seed, kills=6) >= 2
    assert_finished(job, out)
    if "pth" in job.options:
        assert_sound(out)


@kinds("pth to hf")
def test_killed_after_renames(job: Job, tmp_path: Path) -> None:
    """The finishing phase, exactly: after the first weight file, the last, the index, the manifest, the card, and after
    config.json or params.json, when only the look at the whole and the removal of the journal are left."""
    out = tmp_path / "out"
    shards = sorted(job.weights)
    index = [n for n in job.reference if n.endswith(".index.json")]
    order = [*shards, *index, "quantkit.json", "README.md", job.last]
    renamed = 0  # weight files are renamed once and for all; the small files are written again by each run
    for last in dict.fromkeys([shards[0], shards[-1], *index, "quantkit.json", "README.md", job.last]):
        n = order.index(last) + 1 - renamed
        killed = signal_after_rename(n, signal.SIGKILL, job, out)
        assert killed.returncode == -signal.SIGKILL, (last, killed.stderr)
        assert (out / last).exists()
        assert (out / job.last).exists() == (last == job.last)
        assert_no_model(job, out)
        renamed = max(renamed, min(order.index(last) + 1, len(shards)))
    assert assert_finished(job, out) == UNITS


@kinds("hf to pth", "pth to hf")
def test_resuming_keeps_what_was_done(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_at(job, out, lines(UNITS // 2), signal.SIGKILL)
    sources = (out / ".quantkit" / "journal").read_text().count('"source"')
    kept = journal_lines(out) - 1 - sources
    assert UNITS > assert_finished(job, out) == kept > 0
    if "pth" in job.options:
        assert_sound(out)


def test_a_torch_file_is_none_before_its_end(jobs: Callable[[str], Job], tmp_path: Path) -> None:
    job, out = jobs("hf to pth"), tmp_path / "out"
    stop_at(job, out, lines(UNITS // 2), signal.SIGKILL)
    (partial,) = out.glob("consolidated*")
    assert partial.name == "consolidated.00.pth.partial"
    assert not zipfile.is_zipfile(partial)


# --- signals ----------------------------------------------------------------------------------------------------------


@kinds("hf to pth")
@pytest.mark.parametrize("what", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(what: signal.Signals, job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stderr = stop_at(job, out, lines(6), what)
    assert code == 130
    assert_three_lines(stderr, "interrupted", str(out), "the same command")
    assert not (out / job.last).exists()
    assert assert_finished(job, out) > 0


@kinds("pth to hf")
def test_interrupted_in_the_finishing_phase(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped = signal_after_rename(len(job.weights) + 1, signal.SIGTERM, job, out)
    assert stopped.returncode == 130
    assert_three_lines(errors(stopped.stderr), "interrupted", str(out), "the same command")
    assert not (out / job.last).exists()
    assert assert_finished(job, out) == UNITS


# --- the finished folder, and the journal -----------------------------------------------------------------------------


@kinds("hf to pth")
def test_finished_folder_is_left_alone(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert assert_finished(job, out) == 0
    before = stamps(out)
    again = finish(job, out)
    assert (again.returncode, stamps(out)) == (0, before)
    assert "finished already" in again.stdout
    assert json.loads(finish(job, out, "--json").stdout)["already_done"] is True


@kinds("hf to pth")
def test_the_check_changes_no_weight(job: Job, tmp_path: Path) -> None:
    unchecked = finish(job, tmp_path / "out", "--no-check", "--json")
    assert unchecked.returncode == 0, unchecked.stderr
    assert json.loads(unchecked.stdout)["checked"] == ""
    found = digests(tmp_path / "out")
    assert job.weights.items() <= found.items()
    differ = {n for n in job.reference if job.reference[n] != found[n]}
    assert differ <= {"quantkit.json", "README.md"}


@kinds("pth to hf")
def test_the_number_of_threads_changes_nothing(job: Job, tmp_path: Path) -> None:
    done = finish(job, tmp_path / "out", "--threads", "5")
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "out") == job.reference


@pytest.mark.parametrize("cut", [-7, 30], ids=["last line", "first line"])
def test_torn_journal(cut: int, jobs: Callable[[str], Job], tmp_path: Path) -> None:
    """Of a torch file it also keeps the CRC-32s."""
    job, out = jobs("hf to pth"), tmp_path / "out"
    stop_at(job, out, lines(8), signal.SIGKILL)
    journal = out / ".quantkit" / "journal"
    journal.write_bytes(journal.read_bytes()[:cut])
    assert_finished(job, out)
    assert_sound(out)


def test_another_plan_does_not_take_over(jobs: Callable[[str], Job], tmp_path: Path) -> None:
    """Not the other format, nor the other direction, nor quantizing."""
    job, out = jobs("hf to mistral"), tmp_path / "out"
    stop_at(job, out, lines(4), signal.SIGKILL)
    before = stamps(out)
    others = [start(jobs(kind), out) for kind in ("hf to pth", "pth to hf")]
    quantize = ["quantize", str(job.source), "-o", str(out), "--quiet"]
    others.append(warm.start(quantize))
    for other in others:
        _, stderr = other.communicate(timeout=60)
        assert other.returncode == 2
        assert_three_lines(errors(stderr), "unfinished run of another plan", "--force")
    assert stamps(out) == before
    pth = jobs("hf to pth")
    assert finish(pth, out, "--force").returncode == 0
    assert digests(out) == pth.reference, "nothing is left of the other"


@kinds("hf to pth")
def test_two_runs_on_one_folder(job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start(job, out)
    at(first, out, lines(2), signal.SIGSTOP)
    try:
        second = finish(job, out)
        assert second.returncode == 2
        assert_three_lines(errors(second.stderr), "another run is writing", str(out))
        assert finish(job, out, "--force").returncode == 2
    finally:
        first.send_signal(signal.SIGCONT)
        first.communicate(timeout=60)
    assert first.returncode == 0
    assert digests(out) == job.reference


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """tmpfs(n) is a disk of n bytes, the same one with each call."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(nbytes: int) -> Path:
        how = ["-o", f"remount,size={nbytes}"] if folder.is_mount() else ["-t", "tmpfs", "-o", f"size={nbytes}"]
        try:
            done = subprocess.run(["mount", *how, "tmpfs", str(folder)], capture_output=True, text=True)
        except OSError as e:
            pytest.skip(f"there is no mount program: {e}")
        if done.returncode:
            pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
        return folder

    yield sized
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def planned(job: Job) -> dict[str, Any]:
    line = [sys.executable, "-m", "quantkit", "convert", str(job.source), *job.options, "--dry-run", "--json"]
    table: dict[str, Any] = json.loads(subprocess.run(line, capture_output=True, check=True, text=True).stdout)
    return table


@kinds("hf to pth")
def test_disk_too_small(job: Job, tmpfs: Callable[[int], Path]) -> None:
    size = planned(job)["disk_bytes"]
    out = tmpfs(size // 2) / "out"
    full = finish(job, out)
    assert full.returncode == 1
    assert_three_lines(errors(full.stderr), "No space left", "free some space", str(out))
    assert journal_lines(out) == 1, "no work is done in vain: the space is asked for first"
    assert not [p for p in out.iterdir() if p.name.endswith((".safetensors", ".pth", ".json"))]
    tmpfs(size + (4 << 20))
    assert_finished(job, out)


@kinds("hf to pth", "pth to hf")
def test_disk_fills_up_under_way(job: Job, tmpfs: Callable[[int], Path]) -> None:
    """The weights have their space from the start; journal, manifest and card do not."""
    folder = tmpfs(planned(job)["disk_bytes"] + (16 << 20))
    out = folder / "out"
    process = start(job, out)
    at(process, out, lines(2), signal.SIGSTOP)
    free = os.statvfs(folder)
    with (folder / "somebody else's").open("wb") as f:
        os.posix_fallocate(f.fileno(), 0, free.f_bavail * free.f_frsize)
    process.send_signal(signal.SIGCONT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert_three_lines(errors(stderr), "No space left", "free some space")
    assert not (out / job.last).exists()
    os.unlink(folder / "somebody else's")
    assert_finished(job, out)


# --- the source -------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(job: Job, tmp_path: Path) -> Job:
    """The job on a copy under the same name, so that it has the same plan, to do harm to."""
    folder = tmp_path / "copy" / job.source.name
    shutil.copytree(job.source, folder)
    return job._replace(source=folder)


def weight_file(source: Path) -> Path:
    return max([*source.glob("*.safetensors"), *source.glob("*.pth")])


@kinds("pth to hf")
@pytest.mark.parametrize("harm", [truncate, modify, replace])
def test_source_changes_under_way(harm: Callable[[Path], None], own: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(own, out)
    at(process, out, lines(1), signal.SIGSTOP)
    harm(weight_file(own.source))
    process.send_signal(signal.SIGCONT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    changed = f"{weight_file(own.source).name} changed while it was being read"
    assert_three_lines(errors(stderr), changed, str(own.source), "--force")
    assert not (out / own.last).exists()
    again = finish(own, out)
    assert again.returncode == 2
    assert not (out / own.last).exists()


@kinds("pth to hf")
def test_source_changed_before_resuming(own: Job, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop_at(own, out, lines(10), signal.SIGKILL)
    os.utime(weight_file(own.source))
    refused = finish(own, out)
    assert refused.returncode == 2
    assert_three_lines(errors(refused.stderr), "the source changed", str(own.source), "--force")
    restarted = finish(own, out, "--force", "--json")
    assert json.loads(restarted.stdout)["reused"] == 0
    assert digests(out) == own.reference


# --- what the check finds ---------------------------------------------------------------------------------------------

THETA = {"rope_theta": 1e6}


def fp8(folder: Path) -> Path:
    make_native(folder, params_extra=THETA)
    path = folder / "consolidated.safetensors"
    table = load_file(path)
    for name in [n for n in table if n.endswith(("wq.weight", "w1.weight"))]:
        table[name] = table[name].float().to(torch.float8_e4m3fn)
        table[name.replace(".weight", ".qscale_weight")] = torch.tensor([0.25])
    save_file(table, path)
    return folder


def devices(folder: Path) -> Path:
    """Meta's layout, two shards."""
    make_native(folder, params_extra=THETA)
    weights = load_file(folder / "consolidated.safetensors")
    (folder / "consolidated.safetensors").unlink()
    side_by_side = ("wo.weight", "w2.weight", "tok_embeddings.weight")
    for i in range(2):
        shares = {n: x if x.dim() == 1 else x.chunk(2, int(n.endswith(side_by_side)))[i] for n, x in weights.items()}
        torch.save({n: x.clone() for n, x in shares.items()}, folder / f"consolidated.{i:02}.pth")
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-5,
              "vocab_size": -1}  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def converted(folder: Path) -> Path:
    """A Hugging Face folder."""
    native = make_native(folder.with_name("before"), params_extra=THETA)
    run("convert", native, "-o", folder, "--to", "hf", "--no-tokenizer", "--quiet")
    return folder


Make = Callable[[Path], Path]
native, TO_PTH = partial(make_native, params_extra=THETA), ("--to", "mistral", "--weights-format", "pth")
CHECKED: dict[str, tuple[Make, tuple[str, ...]]] = {
    "native to hf": (native, ("--to", "hf")),
    "native to hf in shards": (native, ("--to", "hf", "--max-shard-size", "50KB")),
    "native to pth": (native, TO_PTH),
    "pth to hf": (partial(native, files="pth"), ("--to", "hf")),
    "hf to mistral": (converted, ("--to", "mistral")),
    "hf to pth": (converted, TO_PTH),
    "stacked experts": (partial(native, experts=4, megablocks=True), ("--to", "hf")),
    "FP8": (fp8, ("--to", "hf")),
    "Meta's shards": (devices, ("--to", "hf")),
}


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.fixture
def slip(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], list[str]]:
    """slip(n, at): the n-th write of a slab has one bit turned at its byte `at`, on its way to the disk. The list that
    comes back is empty until that has happened."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the program's handlers are not for pytest
    write = ShardWriter.write

    def plan(n: int, byte: int) -> list[str]:
        seen, done = [0], list[str]()

        def wrong(self: ShardWriter, file: str, offset: int, data: Any) -> None:
            seen[0] += data.nbytes > 4  # a CRC-32 is no slab
            if seen[0] == n and not done:
                raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8).copy()
                raw[byte] ^= 1
                data = raw
                done.append(file)
            write(self, file, offset, data)

        monkeypatch.setattr(ShardWriter, "write", wrong)
        return done

    return plan


@pytest.mark.parametrize("byte", [0, -1], ids=["first byte", "last byte"])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize(("make", "options"), CHECKED.values(), ids=CHECKED)
def test_one_wrong_bit_is_found(
    make: Make, options: tuple[str, ...], n: int, byte: int, tmp_path: Path, slip: Any, capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In whatever way a tensor is put together. And the same command, on a disk that does not lie, does the rest."""
    source = make(tmp_path / "source")
    if source.with_name("before").exists():
        shutil.rmtree(source.with_name("before"))
    last = "config.json" if "hf" in options else "params.json"
    line = ("convert", source, *options, "--no-tokenizer", "--threads", "1", "--quiet")
    assert run(*line, "-o", tmp_path / "sound") == 0
    capsys.readouterr()
    done = slip(n, byte)
    assert run(*line, "-o", tmp_path / "out") == 1
    assert done
    stderr = errors(capsys.readouterr().err)
    assert_three_lines(stderr, "mapped back, is not what was read", str(tmp_path / "out" / done[0]), "the same command")
    assert not (tmp_path / "out" / last).exists()
    monkeypatch.undo()
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert run(*line, "-o", tmp_path / "out") == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "sound")


def test_a_wrong_bit_in_the_end_of_a_torch_file_is_found(tmp_path: Path, slip: Any, capsys: Any) -> None:
    """The table of members is written last, and is no slab: the look at the whole finds it, before it is a model."""
    source, out = make_native(tmp_path / "source", params_extra=THETA), tmp_path / "out"
    done = slip(22, 20)  # 21 tensors
    code = run("convert", source, *TO_PTH, "-o", out, "--no-tokenizer", "--threads", "1", "--quiet")
    assert done
    stderr = errors(capsys.readouterr().err)
    assert code == 1, stderr
    assert_three_lines(stderr, str(out))
    assert not (out / "params.json").exists()


def test_without_the_check_it_is_not_found(tmp_path: Path, slip: Any) -> None:
    """So it is the check that found it."""
    source = make_native(tmp_path / "source", params_extra=THETA)
    line = ("convert", source, "--to", "hf", "--no-tokenizer", "--threads", "1", "--quiet")
    assert run(*line, "-o", tmp_path / "sound") == 0
    assert slip(4, 0) == []
    assert run(*line, "-o", tmp_path / "out", "--no-check") == 0
    assert digests(tmp_path / "out")["model.safetensors"] != digests(tmp_path / "sound")["model.safetensors"]


def test_an_error_from_python_is_a_run_error(tmp_path: Path, slip: Any) -> None:
    from quantkit import api

    source = make_native(tmp_path / "source", params_extra=THETA)
    slip(3, 0)
    with pytest.raises(RunError, match="mapped back") as e:
        api.convert(str(source), tmp_path / "out", "hf", {"convert": {"tokenizer": False}})
    assert e.value.exit_code == 1
