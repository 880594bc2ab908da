"""`quantkit eval` beside transformers' own model on the same tokens: perplexity, KL divergence, agreement."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from eval_models import KINDS, build, measured, quiet_transformers, text_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit.cli import main
from quantkit.evaluation import Evaluation
from quantkit.layouts import open_checkpoint
from quantkit.restored import RestoredWeights, open_files

pytestmark = pytest.mark.usefixtures("quiet")
WINDOWS, LENGTH = 5, 32


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text_of(600))
    return str(path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with quiet_transformers():
        return build(tmp_path_factory.mktemp("llama") / "llama")


def log_probabilities(model: Any, folder: Path, text: str, windows: int = WINDOWS, length: int = LENGTH) -> Any:
    """float64 [windows, length - 1, vocabulary] by transformers alone, and the targets [windows, length - 1]."""
    ids = AutoTokenizer.from_pretrained(folder)(Path(text).read_text(), return_tensors="pt").input_ids[0]
    rows = ids[: windows * length].reshape(windows, length)
    with torch.no_grad():
        logits = torch.cat([model(row[None]).logits for row in rows])
    return torch.log_softmax(logits[:, :-1].double(), dim=-1), rows[:, 1:]


def dense(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def restored(source: Path, folder: Path) -> Any:
    """transformers' model of the source with the weights that `folder` holds, restored."""
    checkpoint = open_checkpoint(folder)
    with open_files(checkpoint) as files:
        weights = RestoredWeights(checkpoint, files)
        tensors = {name: weights.read(name) for name in weights.names}
    assert weights.packed
    for name, tensor in load_file(source / "model.safetensors").items():
        assert tensors[name].shape == tensor.shape
    copy = folder.parent / f"{folder.name}-restored"
    copy.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (copy / path.name).write_bytes(path.read_bytes())
    save_file({n: t.contiguous() for n, t in tensors.items()}, copy / "model.safetensors", {"format": "pt"})
    return dense(copy)


def evaluate(folder: Path, text: str, **options: Any) -> Evaluation:
    return quantkit.evaluate(folder, text, **{"windows": WINDOWS, "length": LENGTH, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_as_transformers(tmp_path: Path, text: str, kind: str) -> None:
    folder = build(tmp_path / kind, kind)
    found = evaluate(folder, text)
    logs, targets = log_probabilities(dense(folder), folder, text)
    losses = -logs.gather(2, targets[..., None])[..., 0].numpy()
    assert found.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    error = losses.mean(axis=1).std(ddof=1) / math.sqrt(WINDOWS)
    assert found.loss_error == pytest.approx(error, rel=1e-3)
    assert found.perplexity_error == pytest.approx(error * found.perplexity, rel=1e-3)
    assert (found.windows, found.length, found.tokens) == (WINDOWS, LENGTH, WINDOWS * (LENGTH - 1))
    assert found.against is None


@pytest.mark.parametrize(("kind", "options"), [
    ("llama", {"method": "bnb", "bits": 4}),
    ("mixtral", {"method": "bnb", "bits": 4, "quant_type": "fp4", "double_quant": False}),
    ("gpt2", {"method": "bnb", "bits": 8}),
    ("gpt2", {"method": "rtn", "bits": 4, "group_size": 32}),
    ("llama", {"method": "rtn", "bits": 3, "sym": False, "group_size": 32, "checkpoint_format": "gptq_v2"}),
    ("mixtral", {"method": "rtn", "bits": 4, "sym": False, "group_size": 32, "format": "compressed-tensors"}),
], ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values())))  # fmt: skip
def test_quantized_beside_its_source(tmp_path: Path, text: str, kind: str, options: dict[str, Any]) -> None:
    """Against a dense model with the restored weights, and both models' distributions compared by hand."""
    source, out = build(tmp_path / "source", kind), tmp_path / "out"
    quantkit.quantize(str(source), out, {"quantize": options})
    found = evaluate(out, text, against=str(source))
    ours, targets = log_probabilities(restored(source, out), source, text)
    theirs, _ = log_probabilities(dense(source), source, text)
    losses = [-logs.gather(2, targets[..., None])[..., 0].numpy() for logs in (ours, theirs)]
    assert found.loss == pytest.approx(losses[0].mean(), rel=1e-5)
    other = found.against
    assert other is not None
    assert other.name == "source"
    assert other.perplexity == pytest.approx(math.exp(losses[1].mean()), rel=1e-5)
    change = losses[0].mean(axis=1) - losses[1].mean(axis=1)
    ratio = math.exp(change.mean())
    assert other.increase == pytest.approx(ratio - 1, abs=1e-5)
    assert other.increase_error == pytest.approx(ratio * change.std(ddof=1) / math.sqrt(WINDOWS), rel=1e-2, abs=1e-6)
    kl = (theirs.exp() * (theirs - ours)).sum(-1).numpy().reshape(-1)
    assert other.kl == pytest.approx(kl.mean(), rel=1e-3, abs=2e-7)
    assert other.kl_99 == pytest.approx(np.percentile(kl, 99), rel=1e-3, abs=2e-7)
    assert other.kl > 0
    same = (ours.argmax(-1) == theirs.argmax(-1)).double().mean().item()
    assert other.agreement == pytest.approx(same, abs=2 / found.tokens)  # a tie may fall to either side


def test_bnb_folder_as_it_loads(tmp_path: Path, llama: Path, text: str) -> None:
    """bitsandbytes itself restores the weights. In eval mode it may multiply in bfloat16."""
    quantkit.quantize(str(llama), tmp_path / "out", {"quantize": {"bits": 4}})
    model = quantkit.load(tmp_path / "out").train()
    logs, targets = log_probabilities(model, llama, text)
    loss = -logs.gather(2, targets[..., None]).mean().item()
    assert evaluate(tmp_path / "out", text).loss == pytest.approx(loss, rel=1e-5)


def test_a_folder_against_itself(llama: Path, text: str) -> None:
    found = evaluate(llama, text, against=str(llama))
    other = found.against
    assert other is not None
    assert (other.kl, other.kl_99, other.agreement) == (0.0, 0.0, 1.0)
    assert (other.perplexity, other.increase, other.increase_error) == (found.perplexity, 0.0, 0.0)
    assert math.copysign(1, other.kl_99) == 1  # no -0.0 to be printed


def test_the_chunks_of_the_vocabulary_do_not_matter(llama: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(llama, text)
    monkeypatch.setattr("quantkit.evaluation_model.CHUNK", 1)
    assert evaluate(llama, text).loss == pytest.approx(whole.loss, rel=1e-7)


def test_windows_and_length(llama: Path, text: str) -> None:
    ids = AutoTokenizer.from_pretrained(llama)(Path(text).read_text()).input_ids
    every = evaluate(llama, text, windows="all")
    assert every.windows == len(ids) // LENGTH
    alone = evaluate(llama, text, windows=1)
    assert (alone.loss_error, alone.perplexity_error) == (None, None)
    assert quantkit.evaluate(llama, text, windows=1).length == 128, "the model's context, which is below 1,024"


def test_jsonl_is_joined(tmp_path: Path, llama: Path, text: str) -> None:
    words = Path(text).read_text()
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": words[i : i + 100]}) + "\n" for i in (0, 100)))
    (tmp_path / "text.txt").write_text(words[:200])
    first, second = (evaluate(llama, str(tmp_path / f"text.{end}"), windows="all") for end in ("jsonl", "txt"))
    assert first.tokens_sha256 == second.tokens_sha256
    assert first.text_sha256 != second.text_sha256


def test_what_torch_was_set_to_comes_back(llama: Path, text: str) -> None:
    before = torch.get_num_threads(), torch.backends.mkldnn.matmul.fp32_precision
    evaluate(llama, text, windows=1, threads=1)
    assert before == (torch.get_num_threads(), torch.backends.mkldnn.matmul.fp32_precision)


def test_table(llama: Path, text: str) -> None:
    line = ["eval", str(llama), "--text", text, "--against", str(llama), "--windows", "3", "--length", "16"]
    done = warm.run(line, torch=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "text", "predicted", "loss", "perplexity", "against", "increase", "KL divergence", "same top token",
        "furthest apart",
    ]  # fmt: skip
    assert "text.txt, 3 windows of 16 tokens" in lines[0]
    assert "100.0 %  predictions" in done.stderr
    assert "Traceback" not in done.stderr


def test_json(llama: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(llama), "--text", text, "--windows", "all", "--against", str(llama), "--json", "--quiet"])
    said = capsys.readouterr()
    assert (ended.value.code, said.err) == (0, "")
    found = json.loads(said.out)
    again = asdict(quantkit.evaluate(llama, text, windows="all", against=str(llama)))
    assert found == {**json.loads(json.dumps(again)), "passed": True}
    assert found["folder"] == found["against"]["name"] == "llama"
    assert found["windows"] * (found["length"] - 1) == found["tokens"]
    assert len(found["text_sha256"]) == len(found["tokens_sha256"]) == 64


def test_nothing_is_left_behind(tmp_path: Path, llama: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After success, after an error, and after Ctrl-C."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    evaluate(llama, text)
    assert list(scratch.iterdir()) == []
    monkeypatch.setattr("quantkit.evaluation_model.FolderModel.head", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(llama, text)
    assert list(scratch.iterdir()) == []
    environment = {**os.environ, "TMPDIR": str(scratch)}
    line = [sys.executable, "-m", "quantkit", "eval", str(llama), "--text", text, "--windows", "all", "--length", "4"]
    process = subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not list(scratch.iterdir()) and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert list(scratch.iterdir()) == []


@pytest.mark.slow
def test_real_model_by_the_protocol_of_its_peers(tmp_path: Path) -> None:
    """shared/peers/ppl.py, which asks transformers for whole logits in float32: 21.129 on WikiText-2. Under 1 GB."""
    root = Path(__file__).parents[1]
    model = root / ".demo" / "SmolLM2-135M-Instruct"
    wiki = root.parent / "shared" / "data" / "text" / "wikitext2-tokens" / "test.txt"
    if not (model.exists() and wiki.exists()):
        pytest.skip("needs the demo's model and WikiText-2")
    words = wiki.read_text().replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".")
    (tmp_path / "test.txt").write_text(words)
    [(perplexity, memory)] = measured([model], str(tmp_path / "test.txt"))
    assert memory < 10**9
    ids = AutoTokenizer.from_pretrained(model)(words, return_tensors="pt").input_ids[0]
    whole, loss = dense(model), 0.0
    with torch.no_grad():
        for i in range(12):
            row = ids[i * 1024 : (i + 1) * 1024][None]
            # In float64: torch's float32 cross_entropy loses 8e-6 nats in summing up a vocabulary of this size.
            logits = whole(row).logits[0, :-1].double()
            loss += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
    assert perplexity == pytest.approx(math.exp(loss / (12 * 1023)), rel=1e-6)
    assert perplexity == pytest.approx(21.129, rel=1e-4)
