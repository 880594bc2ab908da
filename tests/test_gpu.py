"""`--device cuda` on a GPU that is not there (pretend_gpu): every tensor where it belongs, what is planned kept to, and
the same losses as without."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_models import build, quiet_transformers
from pretend_gpu import Held, pretend_gpu
from resuming import digests, interrupted

import quantkit
from quantkit import api, evaluation_model
from quantkit.api import run_recipe
from quantkit.cli import main
from quantkit.console import Console, human_bytes
from quantkit.devices import FULL, FULL_RAM
from quantkit.errors import UsageError
from quantkit.evaluation_model import FolderModel
from quantkit.evaluator import peak_memory
from quantkit.layer_memory import BASE
from quantkit.layouts import open_checkpoint
from quantkit.memory import MARGIN
from quantkit.recipe import build_recipe
from quantkit.solvers.coded import Coded
from quantkit.solvers.exl2_coded import Exl2Coded, Groups
from quantkit.solvers.exl2_scales import search_alike, search_group
from quantkit.solvers.restoring import restored
from quantkit.torch_setup import free_memory

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
    pytest.mark.usefixtures("guards"),
]
FREE = 4 << 30
CALIBRATION = {"samples": 6, "length": 64}
GPTQ = {"quantize": {"method": "gptq", "bits": 4, "group_size": 32}}
SLOW = {
    "desc_act": ("llama", {"quantize": {"method": "gptq", "bits": 3, "group_size": 32, "act_order": "group"}}),
    "symmetric, one aim": ("llama", {"quantize": {"method": "gptq", "bits": 4, "sym": True, "effort": "low"}}),
    "experts": ("mixtral", GPTQ),
    "pruned and quantized": ("llama", {"prune": {"method": "sparsegpt", "pattern": "2:4"}, **GPTQ}),
    "sparsegpt": ("mixtral", {"prune": {"method": "sparsegpt", "sparsity": 0.5}}),
    "owl": ("llama", {"prune": {"method": "wanda", "sparsity": 0.5, "owl": True}}),
    "transposed": ("gpt2", GPTQ),
    "mixed gptq": ("llama", {"quantize": {"method": "gptq", "bits": 3.5}}),
    "exl2": ("llama", {"quantize": {"method": "exl2", "bits": 4}}),
    "exl2 of experts": ("mixtral", {"quantize": {"method": "exl2", "bits": 4}}),
    "mixed bnb": ("llama", {"quantize": {"method": "bnb", "bits": 7}}),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    with quiet_transformers():
        for kind in ("llama", "mixtral", "gpt2"):
            build(folder / kind, kind, **({"num_hidden_layers": 1} if kind == "llama" else {}))
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,;:!?", k=4000)
    (folder / "text.txt").write_text("".join(letters))
    return folder


@pytest.fixture
def gpu(work: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    with pretend_gpu(monkeypatch, FREE) as held:
        yield held
    assert held.left() == 0


def job(work: Path, model: str, what: dict[str, Any], out: Path, device: str) -> dict[str, Any]:
    found = {"source": str(work / model), "output": str(out), "resources": {"device": device, "threads": 1}, **what}
    if "quantize" not in what or what["quantize"].get("method") in ("gptq", "exl2") or "." in str(what):
        found["calibration"] = {"text": str(work / "text.txt"), **CALIBRATION}
    return found


def losses(folder: Path) -> dict[tuple[str, str], float]:
    """By kind of linear, or by linear and mix where these were measured: linears alike may then change places."""
    if (measured := folder.with_name(f"{folder.name}.measurement.json")).is_file():
        found = json.loads(measured.read_text())["linears"]
        return {(name, mix): loss for name, own in found.items() for mix, loss in own["losses"].items()}
    errors = json.loads((folder / "quantkit.json").read_text())["errors"]
    return {(e["kind"], key): e[key] for e in errors for key in ("mean", "output") if e.get(key) is not None}


def same_as_without(work: Path, tmp_path: Path, gpu: Held, model: str, what: dict[str, Any], rel: float = 0.01) -> None:
    """rel: how far losses may be apart: where sums run in another order, one code that is another has others follow."""
    recipe = build_recipe(job(work, model, what, tmp_path / "there", "cuda"))
    gpu.start()
    run_recipe(recipe)
    assert gpu.peak > 0
    quantkit.verify(tmp_path / "there", source=str(work / model))
    run_recipe(build_recipe(job(work, model, what, tmp_path / "here", "cpu")))
    there, here = losses(tmp_path / "there"), losses(tmp_path / "here")
    assert there == {key: pytest.approx(value, rel=rel) for key, value in here.items()}
    assert here


def test_nf4(work: Path, tmp_path: Path, gpu: Held) -> None:
    same_as_without(work, tmp_path, gpu, "llama", {"quantize": {"bits": 4}})


def test_gptq(work: Path, tmp_path: Path, gpu: Held) -> None:
    same_as_without(work, tmp_path, gpu, "llama", GPTQ)


def test_gptq_in_bfloat16(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which GPUs multiply in, and this processor may not."""
    with pretend_gpu(monkeypatch, FREE, bf16=True) as held:
        same_as_without(work, tmp_path, held, "llama", GPTQ, 0.1)
    assert held.left() == 0
    with (tmp_path / "there" / "quantkit.json").open() as f:
        assert json.load(f)["calibration"]["compute"] == "bfloat16"


def test_experts_pruned(work: Path, tmp_path: Path, gpu: Held) -> None:
    same_as_without(work, tmp_path, gpu, "mixtral", {"prune": {"method": "wanda", "sparsity": 0.5}})


def test_exl2_of_known_mixes(work: Path, tmp_path: Path, gpu: Held) -> None:
    mixes = {"*": "0.5:5_64/0.5:4_64"}
    same_as_without(work, tmp_path, gpu, "llama", {"quantize": {"method": "exl2", "bits": 5.5, "mixes": mixes}})


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more(work: Path, tmp_path: Path, gpu: Held, name: str) -> None:
    measured = "exl2" in name or "mixed" in name
    same_as_without(work, tmp_path, gpu, *SLOW[name], 0.35 if measured else 0.01)


def test_states_on_the_gpu_change_nothing(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With room for all of them, for some, and for none."""
    made = {}
    pruned = {"prune": {"sparsity": 0.5}}
    planned = quantkit.plan(work / "mixtral", job(work, "mixtral", pruned, tmp_path, "cuda")).memory.layers
    assert planned is not None
    row = 4 * CALIBRATION["length"] * 64
    for name, rows in (("all", 10_000), ("some", 4), ("none", 0)):
        with pretend_gpu(monkeypatch, planned.at_work + MARGIN + rows * row) as held:
            held.start()
            run_recipe(build_recipe(job(work, "mixtral", pruned, tmp_path / name, "cuda")))
            made[name] = held.peak
        assert held.left() == 0
    with pretend_gpu(monkeypatch, planned.at_work + MARGIN + 4 * row):
        again = build_recipe(job(work, "mixtral", pruned, tmp_path / "again", "cuda"))
        interrupted(lambda: run_recipe(again), 1)
        capsys.readouterr()
        run_recipe(again)  # it knows them again that lay on the GPU, and those that did not
    assert "solved again" not in capsys.readouterr().err
    assert made["all"] > made["some"] > made["none"]
    assert digests(tmp_path / "all") == digests(tmp_path / "some") == digests(tmp_path / "none")
    assert digests(tmp_path / "again") == digests(tmp_path / "none")


RANK = """
import sys
import pytest
from pathlib import Path
from pretend_gpu import load_guards, pretend_gpu
load_guards(Path(sys.argv[1]))
from quantkit.cli import main
with pretend_gpu(pytest.MonkeyPatch(), 4 << 30):
    main(sys.argv[2:])
"""


def ranks(guards: Path, size: int, *words: str) -> list[str]:
    """The command by so many processes, each with a GPU of its own; what each says."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": str(size)}
    begun = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(guards), *words], stderr=subprocess.PIPE, text=True,
            cwd=Path(__file__).parent, env={**os.environ, **place, "RANK": str(rank)},
        )
        for rank in range(size)
    ]  # fmt: skip
    said = [process.communicate(timeout=300)[1] for process in begun]
    assert [process.returncode for process in begun] == [0] * size, said
    return said


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("mixtral", ["prune", "--sparsity", "0.5"]),
        pytest.param("llama", ["quantize", "--method", "gptq", "--group-size", "32"], marks=pytest.mark.slow),
        pytest.param("mixtral", ["quantize", "--method", "gptq", "--group-size", "32"], marks=pytest.mark.slow),
        pytest.param("llama", ["prune", "--sparsity", "0.5", "--owl"], marks=pytest.mark.slow),
        pytest.param("llama", ["quantize"], marks=pytest.mark.slow),
    ],
)
def test_a_team_of_gpus(
    work: Path, tmp_path: Path, gpu: Held, request: pytest.FixtureRequest, model: str, options: list[str]
) -> None:
    assert request.config.cache is not None
    guards = request.config.cache.mkdir("guards")
    command = [options[0], str(work / model), "-o", str(tmp_path / "two"), *options[1:], "--device", "cuda", "--quiet"]
    if len(options) > 1:
        command += ["--calib", str(work / "text.txt"), "--calib-samples", "6", "--calib-length", "64"]
    ranks(guards, 2, *command)
    command[3] = str(tmp_path / "one")
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 0
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_evaluated_there(work: Path, gpu: Held) -> None:
    text, windows = str(work / "text.txt"), {"windows": 3, "length": 32}
    here = quantkit.evaluate(work / "llama", text, against=str(work / "llama"), **windows)
    gpu.start()
    there = quantkit.evaluate(work / "llama", text, against=str(work / "llama"), device="cuda", **windows)
    assert gpu.peak > 0
    assert there.perplexity == pytest.approx(here.perplexity, rel=1e-6)
    assert there.against is not None
    assert there.against.kl == 0


def test_evaluated_again_and_again_in_what_it_needs(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no more than that: nothing of a model before is left, and rows are in files."""
    text, windows = str(work / "text.txt"), {"windows": 3, "length": 32}
    said: list[str] = []
    monkeypatch.setattr(evaluation_model, "CHUNK", 2**12)  # otherwise the logits would be the most of it

    class Listening(Console):
        def note(self, text: str) -> None:
            said.append(text)

    with pretend_gpu(monkeypatch, FREE):
        quantkit.evaluate(work / "llama", text, device="cuda", console=Listening(quiet=True), **windows)
    model = FolderModel(open_checkpoint(work / "llama"), "llama", "cpu")
    needed = peak_memory([model], 32) - BASE
    assert any(f"GPU memory {human_bytes(needed)}" in line for line in said)
    for free, ends in ((needed, nullcontext()), (needed - 1, pytest.raises(UsageError, match="GPU memory"))):
        with pretend_gpu(monkeypatch, free + MARGIN) as held, ends:
            for _ in range(3):
                held.start()
                quantkit.evaluate(work / "llama", text, device="cuda", **windows)
                assert needed / 4 < held.peak <= needed


@pytest.mark.parametrize(
    "what", [pytest.param(GPTQ, marks=pytest.mark.slow), {"prune": {"method": "sparsegpt", "sparsity": 0.5}}]
)
def test_memory_is_as_planned(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: dict[str, Any]
) -> None:
    """Where there is no more than what is planned."""
    with quiet_transformers():
        build(tmp_path / "model", hidden_size=256, intermediate_size=768, num_hidden_layers=1)
    recipe = job(work, "llama", what, tmp_path / "out", "cuda") | {"source": str(tmp_path / "model")}
    planned = quantkit.plan(tmp_path / "model", recipe).memory.layers
    assert planned is not None
    with pretend_gpu(monkeypatch, planned.at_work + MARGIN) as held:
        held.start()
        run_recipe(build_recipe(recipe))
    assert planned.at_work / 4 < held.peak < planned.at_work
    with (
        pretend_gpu(monkeypatch, planned.at_work + MARGIN - 1),
        pytest.raises(UsageError, match="of GPU memory"),
    ):
        run_recipe(build_recipe(recipe | {"output": str(tmp_path / "more")}))
    assert not (tmp_path / "more").exists()


def test_what_torch_keeps_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a job before this one in the same process held, and what it only read, counts as free; what is held not."""
    device = torch.device("cuda")
    with pretend_gpu(monkeypatch, 1 << 30):
        torch.zeros(1 << 20, device=device)
        assert torch.cuda.mem_get_info(device)[0] == (1 << 30) - (4 << 20)
        assert free_memory(device) == 1 << 30
        held = torch.zeros(1 << 19, device=device)
        assert free_memory(device) == (1 << 30) - held.nbytes
        del held


@pytest.mark.parametrize("command", ["measure", "quantize", "eval"])
def test_too_little_memory_is_said_beforehand(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    text = str(work / "text.txt")
    words = {
        "measure": ["measure", str(work / "llama"), "-o", str(tmp_path / "out"), "--calib", text],
        "quantize": ["quantize", str(work / "llama"), "-o", str(tmp_path / "out"), "--bits", "4", "--method", "exl2",
                     "--calib", text],
        "eval": ["eval", str(work / "llama"), "--text", text, "--length", "32"],
    }[command]  # fmt: skip
    length = [] if command == "eval" else ["--calib-samples", "6", "--calib-length", "64"]
    with pretend_gpu(monkeypatch, MARGIN + 1000), pytest.raises(SystemExit) as ended:
        main([*words, *length, "--device", "cuda", "--quiet"])
    assert ended.value.code == 2
    assert "of GPU memory, and" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried to allocate 20.00 GiB.", *FULL, FULL_RAM])
def test_full_memory_is_no_traceback(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], said: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise (torch.OutOfMemoryError if said.startswith("CUDA out") else RuntimeError)(f"{said} of what it does")

    monkeypatch.setattr(api, "run_recipe", full)
    with pytest.raises(SystemExit) as ended:
        main(["quantize", str(work / "llama"), "-o", str(tmp_path / "out"), "--quiet"])
    assert ended.value.code == 1
    assert "memory is full" in capsys.readouterr().err


def test_codes_are_the_same_numbers_there(gpu: Held) -> None:
    drawn = np.random.default_rng(0)
    codes = drawn.integers(0, 16, (70, 96), np.uint8)
    scales, zeros = drawn.normal(0, 0.1, (70, 3)).astype(np.float16), drawn.integers(0, 16, (70, 3), np.uint8)
    group = drawn.integers(0, 3, 96).astype(np.int32)
    position = drawn.permutation(96).astype(np.int32)
    maxima = np.array([0.5, 1e-4, 3e-6], np.float16)
    of_exl2 = drawn.integers(0, 16, (70, 3), np.uint8)
    for coded in (
        Coded(4, codes, scales, zeros, group),
        Exl2Coded(Groups((4, 3, 2), (32, 32, 32)), codes, of_exl2, maxima, position),
    ):
        there = restored(coded, torch.device("cuda"))
        assert np.array_equal(there.cpu().numpy(), coded.restore())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_scales_of_exl2_are_the_same_there(gpu: Held, bits: int) -> None:
    torch.manual_seed(bits)
    weight, importance = torch.randn(3, 90, 64) * 0.02, torch.rand(3, 64)
    weight[:, 3], weight[:, 5], weight[2] = 0, weight[:, 5] * 1e-6, weight[2] * 30
    here = [search_group(one, own, bits) for one, own in zip(weight, importance, strict=True)]
    maxima, codes = search_alike(weight.cuda(), importance.cuda(), bits)
    assert torch.equal(torch.cat([found[0] for found in here]), maxima.cpu())
    assert float((torch.stack([found[1] for found in here]) != codes.cpu()).float().mean()) < 0.05  # some lose the same
