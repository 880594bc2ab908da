"""How fast a machine does what jobs consist of: measured once, kept in a file; forecasts are made of it.

What is measured are the functions that a run calls, on all cores (or a GPU), with numbers of a common shape. Of what is
done to matrices with n inputs, a part grows with n once more, and another does not; so each is measured at two n.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.reader import read_json
from quantkit.checkpoint.system import cores, page_buffer
from quantkit.checkpoint.writer import write_file
from quantkit.console import Console, table
from quantkit.errors import OutputError, RunError, SourceError, UsageError

if TYPE_CHECKING:
    import torch

MIB = 1 << 20
SAMPLE = 256 * MIB  # of a file that is written and read
TOKENS = 512  # of a row of text
WIDTHS = (640, 1920)  # inputs of the linears that are measured
LENGTHS = (256, 1024)  # tokens of the rows that a layer is measured with
HEAD = 64  # numbers in a head
FORMAT = 1
SOLVED = ("gptq", "exl2", "sparsegpt", "mask")
ENCODED = ("nf4", "int8", "rtn", "magnitude", "convert")


@dataclass(frozen=True)
class Cost:
    """Seconds of a unit of work on matrices with n inputs: always + once / n."""

    always: float
    once: float

    def at(self, n: int) -> float:
        return self.always + self.once / n

    @classmethod
    def through(cls, points: dict[int, float]) -> Cost:
        """What gives these seconds at these two n; or at the larger n alone, where of these less than a tenth would
        be left for larger ones: that was noise."""
        (n, first), (m, second) = sorted(points.items())
        once = min(max((first - second) / (1 / n - 1 / m), 0.0), 0.9 * second * m)
        return cls(second - once / m, once)


@dataclass(frozen=True)
class Rates:
    """threads: that all was measured with. device: "cpu" or a GPU's name. start_copy, start: seconds until a process
    works that needs no torch, and one that streams layers. read, write, sha256: bytes a second, of the disk and of one
    thread. encode: bytes of the source a second, of jobs without a text, from the page cache to synced files.

    Along a text, seconds: linear, of a multiplication of a pass; sums, of one for a Hessian; aim, and solve by method,
    of each weight and input of a linear; factor, of inputs cubed; around, of a token and a number of the hidden state,
    for what is no linear; attention, of a pair of tokens and a number; hidden, of a number of what linears get that is
    written to a file and read again.
    """

    threads: int
    device: str
    start_copy: float
    start: float
    read: float
    write: float
    sha256: float
    encode: dict[str, float]
    linear: Cost
    sums: Cost
    aim: Cost
    factor: Cost
    solve: dict[str, Cost]
    around: float
    attention: float
    hidden: float

    def save(self, path: Path) -> None:
        write_file(path, json.dumps({"quantkit-rates": FORMAT, **asdict(self)}, indent=1).encode() + b"\n")

    def text(self) -> str:
        """As `doctor --calibrate` prints it."""
        at = WIDTHS[1]

        def each(cost: Cost, per: float = 1.0) -> str:
            return f"{1e-9 * per / cost.at(at):,.1f} G a second"

        speed = [(f"{name}, of the source", f"{value / 1e6:,.0f} MB/s") for name, value in self.encode.items()]
        rows = [
            ("device", f"{self.device}, {self.threads} threads"),
            ("start", f"{self.start_copy:.1f} s, {self.start:.1f} s with torch"),
            ("disk", f"{self.read / 1e6:,.0f} MB/s read, {self.write / 1e6:,.0f} MB/s written"),
            ("SHA-256", f"{self.sha256 / 1e6:,.0f} MB/s by one thread"),
            *speed,
            ("passes", f"multiplications of linears: {each(self.linear)}"),
            ("Hessians", f"multiplications: {each(self.sums)}"),
            *((name, f"weights and inputs: {each(cost)}") for name, cost in self.solve.items()),
        ]
        return table(rows)


def read_rates(path: Path) -> Rates:
    """UsageError for a file that is none of `doctor --calibrate`."""
    wrong = UsageError(
        "this is no profile of a machine" if path.is_file() else "there is no such profile", where=str(path),
        hint="`quantkit doctor --calibrate FILE` makes it",
    )  # fmt: skip
    if not path.is_file():
        raise wrong
    try:
        found: dict[str, Any] = read_json(path)
    except SourceError:
        raise wrong from None
    names = {field.name for field in fields(Rates)}
    if repr(found.pop("quantkit-rates", None)) != repr(FORMAT) or found.keys() != names:
        raise wrong
    try:
        for name in ("linear", "sums", "aim", "factor"):
            found[name] = Cost(**found[name])
        found["solve"] = {name: Cost(**cost) for name, cost in found["solve"].items()}
        rates = Rates(**found)
        costs = [rates.linear, rates.sums, rates.aim, rates.factor, *rates.solve.values()]
        numbers = [x for cost in costs for x in (cost.always, cost.once)]
        speeds = [rates.read, rates.write, rates.sha256, *rates.encode.values(), rates.threads]
        numbers += [rates.start_copy, rates.start, rates.around, rates.attention, rates.hidden]
        if any(type(x) not in (int, float) for x in (*numbers, *speeds)) or type(rates.threads) is not int:
            raise ValueError
        if not all(0 <= x < 1e4 for x in numbers) or not all(1 <= x < 1e15 for x in speeds):
            raise ValueError
        if rates.solve.keys() != set(SOLVED) or rates.encode.keys() != set(ENCODED):
            raise ValueError
    except (TypeError, ValueError, AttributeError):
        raise wrong from None
    return rates


def check_target(path: Path) -> None:
    """UsageError for a place where no profile can be written, or something else is."""
    if path.is_file():
        with suppress(UsageError):
            read_rates(path)
            return
    if path.exists() or path.is_symlink() or not path.name:
        raise UsageError(
            "something else is there already", where=str(path) or "--calibrate ''",
            hint="name a new file, or a profile, which is replaced",
        )  # fmt: skip


def measure_rates(folder: Path, console: Console, device: str = "cpu") -> Rates:
    """Of this machine, in two minutes if it does nothing else, with files of a gigabyte in `folder`, which are deleted.
    OutputError if they cannot be written there."""
    import torch

    from quantkit.torch_setup import torch_settings

    threads = cores()
    with _in(folder) as name:
        work = Path(name)
        console.note("the disk")
        read, write = _disk(work)
        console.note("starting up")
        start_copy, start = _starts(work, device)
        console.note("jobs without a text")
        encode = _encode(work, device)
        console.note("what is done along a text")
        with torch_settings(threads), torch.inference_mode():
            place = torch.device(device)
            found = {n: _matrices(n, place) for n in WIDTHS}
            around, attention = _layer(place)
            hidden = _hidden(work, place)
    every = {key: Cost.through({n: found[n][key] for n in WIDTHS}) for key in found[WIDTHS[0]]}
    passes = {key: every.pop(key) for key in ("linear", "sums", "aim", "factor")}
    name = "cpu" if device == "cpu" else torch.cuda.get_device_name(place)
    return Rates(
        threads=threads, device=name, start_copy=start_copy, start=start, read=read, write=write, sha256=_sha256(),
        encode=encode, solve=every, around=around, attention=attention, hidden=hidden, **passes,
    )  # fmt: skip


@contextmanager
def _in(folder: Path) -> Iterator[str]:
    try:
        with tempfile.TemporaryDirectory(prefix="quantkit-rates-", dir=folder) as name:
            yield name
    except OSError as e:
        raise OutputError(
            f"this machine cannot be measured here: {e.strerror or e}", where=str(e.filename or folder),
            hint="name a file in a folder on the disk that jobs write to, with a gigabyte of room",
        ) from None  # fmt: skip


def seconds(work: Callable[[], object], least: float = 0.3) -> float:
    """The median time of a call, of as many as take `least` seconds together and three at the least; the first, which
    may compile, is not counted."""
    import torch

    found: list[float] = []
    work()
    while len(found) < 3 or sum(found) < least:
        begun = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the device that check_device has made the current one
        found.append(time.perf_counter() - begun)
    return statistics.median(found)


def _starts(work: Path, device: str) -> tuple[float, float]:
    """Seconds of a job with hardly any weights, without a text and along one."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    from quantkit.solvers.team import VARIABLES

    tiny = work / "tiny"
    _model(tiny, 64, 1, torch.randn)
    words = {word: n for n, word in enumerate(["<unk>", *map(str, range(100))])}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tiny / "tokenizer.json"))
    (tiny / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    text = work / "text.txt"
    text.write_text(" ".join(map(str, range(100))) * 20)

    def run(*words: str) -> float:
        command = [sys.executable, "-m", "quantkit", "quantize", str(tiny), "-o", str(work / "started"), "--force"]
        # Not one of a team that this process may be of.
        alone = {key: value for key, value in os.environ.items() if key not in VARIABLES}

        def job() -> None:
            done = subprocess.run([*command, *words], capture_output=True, text=True, env=alone, check=False)
            if done.returncode:
                what = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()
                raise RunError(
                    f"a job to measure by failed: {next((w for w in what if w.startswith('error')), what[-1])}",
                    where=" ".join(words), hint="see whether `quantkit quantize` works on this machine at all",
                )  # fmt: skip

        return seconds(job, 0)

    along = ("--method", "gptq", "--calib", str(text), "--calib-samples", "1", "--calib-length", "64")
    return run("--bits", "4"), run(*along, "--device", device)


def _sha256() -> float:
    data = bytes(64 * MIB)
    return len(data) / seconds(lambda: hashlib.sha256(data).digest())


def _disk(work: Path) -> tuple[float, float]:
    """Bytes a second, read and written, past the page cache."""
    path, block = work / "disk", os.urandom(16 * MIB)

    def write() -> None:
        with path.open("wb", buffering=0) as f:
            for _ in range(SAMPLE // len(block)):
                f.write(block)
            os.fsync(f.fileno())

    written = seconds(write, 0)
    buffer = page_buffer(len(block))

    def read() -> None:
        with path.open("rb", buffering=0) as f:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while f.readinto(buffer.data):
                pass

    found = SAMPLE / seconds(read, 0), SAMPLE / written
    path.unlink()
    return found


def _encode(work: Path, device: str) -> dict[str, float]:
    """Bytes of the source a second, of jobs without a text, by what they do."""
    import torch

    from quantkit import api
    from quantkit.recipe import build_recipe

    source = work / "model"
    size = _model(source, 2048, 16, torch.randn)
    jobs: dict[str, dict[str, Any]] = {
        "nf4": {"quantize": {"method": "bnb", "bits": 4}},
        "int8": {"quantize": {"method": "bnb", "bits": 8}},
        "rtn": {"quantize": {"method": "rtn", "bits": 4}},
        "magnitude": {"prune": {"method": "magnitude", "sparsity": 0.5}},
        "convert": {"convert": {"to": "mistral", "tokenizer": False}},
    }
    found = {}
    for name, table_ in jobs.items():

        def job(name: str = name, table_: dict[str, Any] = table_) -> None:
            recipe = {"source": str(source), "output": str(work / name), "resources": {"device": device}, **table_}
            api.run_recipe(build_recipe(recipe), force=True)

        found[name] = size / seconds(job, 0)
    return found


def _model(folder: Path, width: int, layers: int, random: Callable[..., torch.Tensor]) -> int:
    """Writes a Llama of so many layers, bfloat16; its bytes."""
    from safetensors.torch import save_file

    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "intermediate_size": width,
        "num_hidden_layers": layers, "num_attention_heads": width // HEAD, "num_key_value_heads": width // HEAD,
        "vocab_size": 512, "tie_word_embeddings": False, "dtype": "bfloat16", "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "max_position_embeddings": 512,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {f"{name}.weight": random(512, width) for name in ("model.embed_tokens", "lm_head")}
    tensors["model.norm.weight"] = random(width)
    for layer in range(layers):
        p = f"model.layers.{layer}."
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down"):
            tensors[f"{p}{name}_proj.weight"] = random(width, width)
        tensors |= {f"{p}{name}_layernorm.weight": random(width) for name in ("input", "post_attention")}
    save_file({n: t.bfloat16() for n, t in tensors.items()}, folder / "model.safetensors")
    return sum(2 * t.numel() for t in tensors.values())


def _matrices(n: int, device: torch.device) -> dict[str, float]:
    """Seconds of a unit of each work along a text, with n inputs."""
    import torch

    from quantkit.calibration.rows import apply_linear
    from quantkit.calibration.statistics import Statistics
    from quantkit.encoding import compare
    from quantkit.methods.base import WeightSpec
    from quantkit.methods.exl2 import METHOD, OPTIONS, Exl2
    from quantkit.methods.gptq import METHODS, Gptq
    from quantkit.solvers.gptq import ridge_factor, step_toward
    from quantkit.solvers.group import RIDGE
    from quantkit.solvers.masks import wanda
    from quantkit.solvers.restoring import restored
    from quantkit.solvers.sparsegpt import prune_columns
    from quantkit.torch_setup import fast_dtype

    compute = fast_dtype(device)
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator).to(device)

    spread = torch.rand(n, generator=generator).to(device).exp()
    x = random(TOKENS, n) * spread
    weight = (0.02 * random(n, n)).to(torch.bfloat16)
    ready = weight.to(compute)
    sums = Statistics({"w": weight}, {"w": ready}, torch.zeros(n, n, device=device))
    sums.aim()
    inputs, wanted = x.to(compute), (x + 0.1 * random(TOKENS, n)).to(compute)
    cubed = float(n) ** 3
    found = {
        "linear": seconds(lambda: apply_linear(x[None], ready)) / (TOKENS * n * n),
        # Half of a square for the Hessian, and a square for what all crosses are made of.
        "sums": seconds(lambda: sums.add(inputs, wanted)) / (1.5 * TOKENS * n * n),
    }
    for _ in range(4 * n // TOKENS):  # enough for a Hessian of full rank
        some = random(TOKENS, n) * spread
        sums.add(some.to(compute), (some + 0.1 * random(TOKENS, n)).to(compute))
    sums.finish_sums()
    hessian, cross = sums.hessian, sums.cross.pop("w")
    factor = ridge_factor(hessian, RIDGE)
    found["factor"] = seconds(lambda: ridge_factor(hessian, RIDGE)) / cubed
    found["aim"] = seconds(lambda: step_toward(weight, hessian, cross.clone(), factor)) / cubed
    assert factor is not None

    spec = WeightSpec("w", "BF16", n, n)
    method, params = METHODS["gptq", 4], Gptq(group_size=128)  # a part of the time is by group
    assert method.solve is not None
    assert method.pack is not None
    solve, pack = method.solve, method.pack

    def gptq() -> None:
        seen = Statistics({"w": weight}, {"w": ready}, hessian, tokens=n)
        for _, solved in solve(seen, params, {}, None):
            value = restored(solved.coded, device)
            pack(solved.coded, spec, params)
            compare(weight, value)

    trial = METHOD.mixing.trial(Exl2(), OPTIONS[len(OPTIONS) // 2]) if METHOD.mixing else None
    assert trial is not None

    def mixed() -> None:
        solved = trial.solve("w", weight.float(), hessian, target=None, keep=None, factor=factor)
        compare(weight, restored(solved.coded, device))

    found["gptq"] = seconds(gptq) / cubed - found["factor"]
    found["exl2"] = seconds(mixed) / cubed
    found["sparsegpt"] = seconds(lambda: prune_columns(weight.float(), factor, 0.5)) / cubed
    found["mask"] = seconds(lambda: compare(weight, weight * wanda(weight, hessian.diagonal(), 0.5))) / cubed
    return found


def _hidden(work: Path, device: torch.device) -> float:
    """Seconds of a number that is written to a file of hidden states, and read."""
    import torch

    from quantkit.calibration.hidden import HiddenStates
    from quantkit.torch_setup import fast_dtype

    width, rows = 1024, 16
    states = HiddenStates(work / "hidden", rows, TOKENS, width, fast_dtype(device))
    x = torch.randn(1, TOKENS, width, device=device)

    def there_and_back() -> None:
        for row in range(rows):
            states.write(row, x)
        for row in range(rows):
            states.read(row, device)

    try:
        return seconds(there_and_back) / (rows * TOKENS * width)
    finally:
        states.remove()


def _layer(device: torch.device) -> tuple[float, float]:
    """Seconds of what a decoder layer does beside its linears: of a token and number, and of a pair of tokens and
    number."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    width = 1024
    config = LlamaConfig(
        hidden_size=width, intermediate_size=3 * width, num_attention_heads=width // HEAD, num_hidden_layers=1,
        attn_implementation="sdpa",
    )  # fmt: skip
    layer, angles = LlamaDecoderLayer(config, 0).to(device), LlamaRotaryEmbedding(config).to(device)

    def nothing(outputs: int) -> Callable[[torch.Tensor], torch.Tensor]:
        gives = {n: torch.zeros(1, n, outputs, device=device) for n in LENGTHS}
        return lambda x: gives[x.shape[1]]

    for module in layer.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = nothing(module.out_features)  # type: ignore[assignment]
    found = {}
    for length in LENGTHS:
        hidden = torch.randn(1, length, width, device=device)
        places = torch.arange(length, device=device)[None]
        mask = torch.full((length, length), float("-inf"), device=device).triu(1)[None, None]
        run = partial(
            layer, hidden, attention_mask=mask, position_ids=places, position_embeddings=angles(hidden, places)
        )
        found[length] = seconds(run) / (length * width)
    short, long = LENGTHS
    attention = max(found[long] - found[short], 0.0) / (long - short)
    return max(found[short] - attention * short, 0.0), attention
