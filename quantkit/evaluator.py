"""How well a folder predicts a text, and how far it is from another: one decoder layer in memory at a time.

Any folder that quantkit reads or writes can be evaluated; its weights are restored layer by layer. With a second folder
both models go through the text side by side, and their distributions are compared token by token.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.calibration.data import Calibration, Tokens, load_tokens
from quantkit.checkpoint.reader import SourceFiles
from quantkit.checkpoint.system import cores
from quantkit.console import Console, Progress
from quantkit.errors import RunError, SourceError, UsageError
from quantkit.layouts import Checkpoint
from quantkit.planner import CONTEXTS
from quantkit.restored import RestoredWeights

if TYPE_CHECKING:
    import torch

WINDOWS = 12
CHUNK = 128  # tokens whose logits are held at once


@dataclass(frozen=True)
class Comparison:
    """The folder beside another, over the same tokens.

    perplexity: of the other. kl, kl_99: KL divergence from the other's distribution to the folder's, in nats a token,
    the mean and the 99th percentile. agreement: how often both find the same token most likely.
    """

    name: str
    perplexity: float
    kl: float
    kl_99: float
    agreement: float


@dataclass(frozen=True)
class Evaluation:
    """perplexity: exp of the mean loss of every token but the first of each window. error: its standard error, from the
    spread of the windows' mean losses; None for a single window."""

    folder: str
    text: str
    text_sha256: str
    tokens_sha256: str
    windows: int
    length: int
    perplexity: float
    error: float | None
    against: Comparison | None


def evaluate_folder(
    checkpoint: Checkpoint,
    text: str,
    *,
    against: Checkpoint | None = None,
    windows: int = WINDOWS,
    length: int | None = None,
    threads: int | None = None,
    device: str = "cpu",
    console: Console,
) -> Evaluation:
    """Perplexity of a folder on the first `windows` windows of a text, tokenized as a whole and cut every `length`
    tokens (1,024, or the model's context where that is shorter).

    Raises InputError, RecipeError or SourceError for a text or a folder that cannot be used, RunError if a model gives
    numbers that are not finite.
    """
    import torch

    from quantkit.torch_setup import prepare_torch

    prepare_torch(threads or cores())
    if windows < 1:
        raise UsageError(f"--windows {windows} is no number of windows", hint="1 or more")
    tokens = _tokens(checkpoint, text, windows, length, console)
    if against is not None and against.config.get("vocab_size") != checkpoint.config.get("vocab_size"):
        raise UsageError(
            "the two models have vocabularies of different size", where=str(against.folder),
            hint="compare a folder with what it was made from",
        )  # fmt: skip
    ids = torch.from_numpy(tokens.ids.copy())
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quantkit-")))
        models = [
            _Model(c, stack.enter_context(SourceFiles(c.folder, c.files)), ids, scratch / str(i), device)
            for i, c in enumerate((checkpoint, *([against] if against is not None else [])))
        ]
        for model in models:
            stack.callback(model.close)
        total = sum(len(m.skeleton.layers) for m in models) * len(ids)
        with console.progress(total) as progress:
            for model in models:
                model.run(progress)
        losses, divergences, agreed = _compare(models, ids)
    means = losses.mean(axis=2)
    ours = math.exp(means[0].mean())
    error = ours * float(means[0].std(ddof=1)) / math.sqrt(len(ids)) if len(ids) > 1 else None
    comparison = None
    if against is not None:
        comparison = Comparison(
            against.folder.name, math.exp(means[1].mean()), float(divergences.mean()),
            float(np.percentile(divergences, 99)), float(agreed.mean()),
        )  # fmt: skip
    return Evaluation(
        checkpoint.folder.name, tokens.name, tokens.text_sha256, tokens.sha256, len(ids), ids.shape[1], ours, error,
        comparison,
    )  # fmt: skip


def _tokens(checkpoint: Checkpoint, text: str, windows: int, length: int | None, console: Console) -> Tokens:
    config = checkpoint.config
    context = next((n for k in CONTEXTS if type(n := config.get(k)) is int), None)
    vocabulary = config.get("vocab_size")
    if type(vocabulary) is not int:
        raise SourceError("config.json has no vocab_size", where=str(checkpoint.folder), hint="fetch it again")
    wanted = Calibration(text=text, samples=windows, length=length)
    return load_tokens(wanted, checkpoint.folder, vocab_size=vocabulary, context=context, quiet=console.quiet)


class _Model:
    """One folder on its way through the text."""

    def __init__(
        self, checkpoint: Checkpoint, files: SourceFiles, ids: torch.Tensor, scratch: Path, device: str
    ) -> None:
        from quantkit.calibration.hidden import HiddenStates
        from quantkit.calibration.skeleton import Skeleton

        scratch.mkdir()
        self.folder = checkpoint.folder
        self.weights = RestoredWeights(checkpoint, files)
        self.skeleton = Skeleton(checkpoint.config, self.weights.names, checkpoint.folder, device)
        rows, calls = self.skeleton.embed(self.weights, ids)
        self.calls, self.rows = calls, len(ids)
        with closing(rows):
            first = next(rows)
            self.hidden = HiddenStates(scratch / "hidden", len(ids), ids.shape[1], first.shape[-1])
            self.hidden.write(0, first)
            for i, row in enumerate(rows, 1):
                self.hidden.write(i, row)

    def run(self, progress: Progress) -> None:
        """Through all layers, in place."""
        import torch

        for index, places in enumerate(self.skeleton.inside):
            self.skeleton.fill(places, self.weights)
            with torch.inference_mode():
                for row in range(self.rows):
                    before = self.hidden.read(row, self.skeleton.device)
                    self.hidden.write(row, self.skeleton.run(index, before, self.calls[index]))
                    progress.advance(1)
            self.skeleton.clear(places)
            progress.unit(f"{self.folder.name}, layer {index}", self.rows)

    def close(self) -> None:
        self.hidden.close()


@contextmanager
def _heads(models: list[_Model]) -> Iterator[list[Any]]:
    yield [m.skeleton.logits(m.weights) for m in models]


def _compare(models: list[_Model], ids: torch.Tensor) -> tuple[Any, Any, Any]:
    """Losses [models, windows, length - 1]; with two models KL divergences and agreement [windows · (length - 1)]."""
    import torch

    windows, length = ids.shape
    losses = np.zeros((len(models), windows, length - 1))
    divergences, agreed = [], []
    with _heads(models) as heads, torch.inference_mode():
        for w in range(windows):
            hidden = [m.hidden.read(w, m.skeleton.device) for m in models]
            for start in range(0, length - 1, CHUNK):
                stop = min(start + CHUNK, length - 1)
                targets = ids[w, start + 1 : stop + 1].long()
                logs = []
                for i, (head, states) in enumerate(zip(heads, hidden, strict=True)):
                    log = torch.log_softmax(head(states[:, start:stop]).cpu(), dim=-1)
                    loss = -log.gather(1, targets[:, None])[:, 0].double()
                    if not bool(torch.isfinite(loss).all()):
                        raise RunError(
                            f"the model's predictions are not finite in window {w}", where=str(models[i].folder),
                            hint="run `quantkit verify` on the folder; the text may overflow the model, too",
                        )  # fmt: skip
                    losses[i, w, start:stop] = loss.numpy()
                    logs.append(log)
                if len(logs) == 2:
                    ours, theirs = logs
                    divergence = (theirs.exp() * (theirs - ours)).sum(1, dtype=torch.float64)
                    divergences.append(divergence.clamp_min(0).numpy())
                    agreed.append((ours.argmax(1) == theirs.argmax(1)).numpy())
    return losses, np.concatenate(divergences or [np.zeros(0)]), np.concatenate(agreed or [np.zeros(0)])
