"""lm-evaluation-harness on any folder, one decoder layer in memory: `pip install 'quantkit[tasks]'`.

The harness asks for log-likelihoods of all of a task's texts at once; they go through the layers together, in buckets
of similar length. Texts become tokens as they do in the harness's own model of transformers, so that scores can be
compared. Tasks in which the model has to write are refused: that takes the whole model.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from quantkit.checkpoint.system import cores
from quantkit.console import Console
from quantkit.errors import QuantkitError, RunError, SourceError, UsageError
from quantkit.evaluation import TaskScore
from quantkit.evaluation_model import CHUNK, FolderModel
from quantkit.layouts import Checkpoint
from quantkit.torch_setup import torch_settings

Request = tuple[tuple[str, str], list[int], list[int]]  # texts, context and continuation in tokens
FEWEST = 64  # rows of a bucket: layers are read anew for each
WASTE = 1.5  # of a bucket's tokens to those of its texts
CONTEXT = 2048  # where a model does not say how long its texts may be


def evaluate_tasks(
    checkpoint: Checkpoint,
    name: str,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    include: str | Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    console: Console,
) -> tuple[TaskScore, ...]:
    """Scores of the harness's tasks, by name or pattern. limit: of each task so many of its texts. shots: examples
    ahead of each; None: as the task has it. include: a folder with tasks of one's own.

    UsageError without the harness, for a task that it does not know, or one in which the model writes; RunError for
    what fails in the harness, which fetches most data sets from the Hub.
    """
    if find_spec("lm_eval") is None:
        raise UsageError("--lm-eval needs lm-evaluation-harness", hint="pip install 'quantkit[tasks]'")
    if checkpoint.layout != "hf":
        raise UsageError(
            "tasks are for the Hugging Face layout, whose tokenizer the harness works with", where=name,
            hint="make such a folder of it with `quantkit convert --to hf`",
        )  # fmt: skip
    if include is not None and not Path(include).is_dir():
        raise UsageError("there is no such folder of tasks", where=str(include))
    import lm_eval
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if include is None else str(include))
    known = [task for pattern in tasks for task in manager.match_tasks([pattern])]
    if missing := [pattern for pattern in tasks if not manager.match_tasks([pattern])]:
        raise UsageError(f"the harness knows no task {missing[0]!r}", hint="`lm_eval ls tasks` lists them")
    with torch_settings(threads or cores()), FolderModel(checkpoint, name, device) as model:
        try:
            found = lm_eval.simple_evaluate(
                model=_streamed(model, console), tasks=known, num_fewshot=shots, limit=limit, task_manager=manager,
                log_samples=False,
            )  # fmt: skip
        except QuantkitError:
            raise
        except Exception as e:  # of the harness, of data sets, of the Hub
            first = str(e).strip().split("\n")[0] or type(e).__name__
            raise RunError(
                f"lm-evaluation-harness failed: {first}", where=", ".join(known),
                hint="most data sets come from the Hub: check the network, or fetch them beforehand",
            ) from None  # fmt: skip
    assert found is not None
    return tuple(_scores(found))


def _scores(found: Any) -> Iterator[TaskScore]:
    for task, row in found["results"].items():
        samples = found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in row.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                error = row.get(f"{metric}_stderr,{kind}")
                yield TaskScore(
                    task, metric if kind == "none" else f"{metric} ({kind})", float(value),
                    float(error) if isinstance(error, (int, float)) else None,
                    samples, found.get("n-shot", {}).get(task), f"lm-eval {version('lm_eval')}",
                )  # fmt: skip


def _streamed(model: FolderModel, console: Console) -> Any:
    """The harness's view of a model."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model.folder)

    if tokenizer.eos_token_id is None:
        raise SourceError("the tokenizer has no EOS token, which the harness asks for", where=str(model.folder))
    end = int(tokenizer.eos_token_id)

    class StreamedLM(TemplateLM):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer
            self.max_length = model.context or CONTEXT

        @property
        def eot_token_id(self) -> int:
            return end

        @property
        def prefix_token_id(self) -> int:
            return end if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)

        @property
        def tokenizer_name(self) -> str:
            return model.name

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            if add_special_tokens is None:  # what the tokenizer does, but no second BOS
                add_special_tokens = not string.startswith(tokenizer.decode([self.prefix_token_id]))
            return list(tokenizer.encode(string, add_special_tokens=add_special_tokens))

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return str(
                tokenizer.apply_chat_template(
                    chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )  # fmt: skip

        def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            return log_likelihoods(model, pairs, self.max_length, console)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            pairs: list[tuple[list[int], list[int]]] = []
            parts = []
            for (text,) in (request.args for request in requests):
                windows = get_rolling_token_windows(
                    self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
                )
                own = [make_disjoint_window(window) for window in windows]
                parts.append(len(own))
                pairs += own
            found = iter(log_likelihoods(model, pairs, self.max_length, console))
            return [math.fsum(next(found)[0] for _ in range(count)) for count in parts]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            raise UsageError(
                "a task has the model write, and that takes the whole model in memory",
                hint="use tasks of multiple choice or perplexity, or the harness's own models on the folder",
            )

    return StreamedLM()


def log_likelihoods(
    model: FolderModel, pairs: Sequence[tuple[list[int], list[int]]], context: int, console: Console
) -> list[tuple[float, bool]]:
    """Of each continuation behind its context: the sum of its tokens' log probabilities, and whether each of them is
    the most likely one. What is beyond the model's context is cut off at the left."""
    rows = [(before + after)[-(context + 1) :] for before, after in pairs]
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for bucket in buckets([len(row) for row in rows]):
        length = max(len(rows[i]) for i in bucket)
        ids = torch.zeros(
            len(bucket), max(length - 1, 1), dtype=torch.int32
        )  # what stands behind a text changes nothing
        for at, i in enumerate(bucket):
            ids[at, : len(rows[i]) - 1] = torch.tensor(rows[i][:-1], dtype=torch.int32)
        with tempfile.TemporaryDirectory(prefix="quantkit-eval-") as scratch, console.progress(model.work) as progress:
            model.embed(ids, Path(scratch))
            for index in range(model.layers):
                model.run(index, progress)
            head = model.head()
            for at, i in enumerate(bucket):
                found[i] = _likelihood(model, head, at, rows[i], min(len(pairs[i][1]), len(rows[i]) - 1))
    return found


@torch.inference_mode()
def _likelihood(model: FolderModel, head: Any, row: int, tokens: list[int], scored: int) -> tuple[float, bool]:
    total, greedy = 0.0, True
    states, last = model.states(row), len(tokens) - 1
    step = max(8, CHUNK // model.vocabulary)
    for start in range(last - scored, last, step):
        stop = min(start + step, last)
        logs = head(states[:, start:stop])
        targets = torch.tensor(tokens[start + 1 : stop + 1], device=logs.device)
        total += float(logs.gather(1, targets[:, None]).double().sum())
        greedy &= bool((logs.argmax(1) == targets).all())
    return total, greedy


def buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of texts, longest first, in buckets that are filled up to little more than their own tokens."""
    made: list[list[int]] = []
    held = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[made[-1][0]] if made else 0
        if not made or (len(made[-1]) >= FEWEST and longest * (len(made[-1]) + 1) > WASTE * (held + lengths[i])):
            made.append([])
            held = 0
        made[-1].append(i)
        held += lengths[i]
    return made
