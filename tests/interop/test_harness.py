"""lm-evaluation-harness in an environment of its own (`make interop` builds it), beside quantkit's: its tasks give a
folder the same scores through its own model of transformers, which holds it whole, and layer by layer."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from eval_models import build, quiet_transformers
from tokenizers import Tokenizer, processors

import quantkit

pytestmark = pytest.mark.interop
ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".interop" / "lmeval" / "bin" / "python"

CHOICE = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true},
              {metric: acc_norm, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
task: stories
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{story}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
WRITING = """
task: writing
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{story}}"
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not PYTHON.exists():
        pytest.skip("no environment .interop/lmeval: `make interop` builds it")
    folder = tmp_path_factory.mktemp("harness")
    with quiet_transformers():
        source = build(folder / "model", hidden_size=128, intermediate_size=256)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "\x01", "bos_token": "\x02"}
        (source / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
        begin = processors.TemplateProcessing("\x02 $A", "\x02 $A $B", [("\x02", 2)])
        tokenizer.post_processor = begin  # type: ignore[assignment]
        tokenizer.save(str(source / "tokenizer.json"))
        quantkit.quantize(source, folder / "packed", {"quantize": {"method": "rtn", "group_size": 32}})
    rows = [
        {"question": f"number {i} is red or old " * (1 + i % 7), "choices": ["red", f"old {i}", "far of the hill"],
         "answer": i % 3, "story": f"a red {i} of the old. " * (1 + i % 60)}
        for i in range(90)
    ]  # fmt: skip
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    for name, task in (("colours", CHOICE), ("stories", ROLLING), ("writing", WRITING)):
        (folder / "tasks" / f"{name}.yaml").write_text(task.replace("FILE", str(data)))
    return folder


def run(work: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    env |= {"PYTHONPATH": f"{ROOT}:{sysconfig.get_path('purelib')}", "HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf")}
    return subprocess.run([str(PYTHON), *words], env=env, cwd=work, capture_output=True, text=True)


def command(work: Path, folder: str, tasks: str, *options: str) -> subprocess.CompletedProcess[str]:
    words = ["eval", folder, "--lm-eval", tasks, "--include", "tasks", *options]
    return run(work, "-m", "quantkit", *words, "--quiet")


def test_the_same_scores_as_its_own_model(work: Path) -> None:
    script = Path(__file__).with_name("readers") / "harness.py"
    done = run(work, "-W", "ignore", str(script), "model", "tasks", "colours,stories")
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["ours"].keys() == found["theirs"].keys() == {"colours", "stories"}
    assert {"acc", "acc_norm", "word_perplexity"} <= {m for row in found["ours"].values() for m in row}
    for task, row in found["ours"].items():
        for metric, value in row.items():
            assert value == pytest.approx(found["theirs"][task][metric], rel=1e-4), (task, metric)


def test_a_packed_folder_and_its_card(work: Path) -> None:
    done = command(work, "packed", "colours", "--json", "--limit", "40")
    assert done.returncode == 0, done.stderr[-3000:]
    scores = {row["metric"]: row for row in json.loads(done.stdout)["tasks"]}
    assert scores["acc"]["samples"] == 40
    recorded = json.loads((work / "packed" / "evaluation.json").read_text())
    assert recorded["tasks"] == list(scores.values())
    card = (work / "packed" / "README.md").read_text()
    assert f"| `colours` | 0 | acc | {scores['acc']['value']:.4f} ± " in card
    assert "not evaluated" not in card
    assert not quantkit.verify(work / "packed").problems


@pytest.mark.parametrize(("tasks", "words"), [("no_such_task", "knows no task"), ("writing", "has the model write")])
def test_refused(work: Path, tasks: str, words: str) -> None:
    done = command(work, "model", tasks)
    assert done.returncode == 2, done.stderr[-3000:]
    assert words in done.stderr
    assert "Traceback" not in done.stderr
