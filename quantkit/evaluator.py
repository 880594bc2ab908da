"""How well a folder predicts a text, and how far it is from another: one decoder layer in memory at a time.

Any folder that quantkit reads or writes can be evaluated; its weights are restored layer by layer. With a second folder
both models go through the text, and their distributions are compared token by token.

The protocol: the text is tokenized as a whole by the folder's tokenizer and cut into windows without overlap, each of
which begins with the model's BOS if its tokenizer puts one before texts. Of the first `windows` of them every token but
the first of each is predicted from those before it in its window. Arithmetic is
float32, on the weights as they are stored.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from quantkit.checkpoint.system import cores
from quantkit.console import Console, Progress, human_bytes
from quantkit.devices import check_gpu_memory
from quantkit.errors import RunError, UsageError
from quantkit.evaluation import Comparison, Evaluation
from quantkit.evaluation_text import read_windows
from quantkit.gates import NO_LIMITS, Gates
from quantkit.layer_memory import BASE
from quantkit.layouts import Checkpoint

if TYPE_CHECKING:
    import torch

    from quantkit.calibration.data import Tokens
    from quantkit.evaluation_model import FolderModel
    from quantkit.solvers.team import Team

WINDOWS = 12  # what the published comparisons of this project were measured on: a minute or two for a small model
Windows = int | Literal["all"]
Losses = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Subject:
    """A folder to evaluate, and what it is called."""

    checkpoint: Checkpoint
    name: str


def evaluate_folder(
    subject: Subject,
    text: str,
    *,
    against: Subject | None = None,
    gates: Gates = NO_LIMITS,
    windows: Windows = WINDOWS,
    length: int | None = None,
    threads: int | None = None,
    device: str = "cpu",
    team: Team | None = None,
    console: Console,
) -> Evaluation:
    """Perplexity of a folder on the first `windows` windows of a text, `length` tokens each (1,024, or the context of
    the models where that is shorter); `against` adds the comparison. Of a team each takes some of the windows, and all
    get the same.

    Raises InputError or SourceError for a text or a folder that cannot be used, or a model that gives numbers that are
    not finite, UsageError for numbers that do not go with them, RunError if hidden states have no room on disk.
    """
    import torch

    from quantkit.calibration.room import Room
    from quantkit.evaluation_model import FolderModel
    from quantkit.solvers.team import ALONE
    from quantkit.torch_setup import torch_settings

    team = team or ALONE

    def begin() -> tuple[list[FolderModel], Tokens]:
        if threads is not None and threads < 1:
            raise UsageError(f"--threads {threads} is no number of threads", hint="1 or more, or leave it out")
        if gates.some and against is None:
            raise UsageError("a limit needs something to be compared with", hint="name the source: --against SRC")
        stack.enter_context(torch_settings(threads or max(1, cores() // team.here)))
        for note in (note for s in subjects for note in s.checkpoint.notes):
            console.warn(note)
        models = [stack.enter_context(FolderModel(s.checkpoint, s.name, device)) for s in subjects]
        _check_vocabularies(models)
        tokens = read_windows(
            subject.checkpoint, text, windows=None if windows == "all" else windows, length=length,
            vocabulary=models[0].vocabulary, context=min((m.context for m in models if m.context), default=None),
            quiet=console.quiet,
        )  # fmt: skip
        if len(tokens.ids) < team.size:
            raise UsageError(
                f"{len(tokens.ids)} windows are too few for {team.size} processes", where=text,
                hint="start fewer of them",
            )  # fmt: skip
        check_gpu_memory(device, peak_memory(models, tokens.ids.shape[1]) - BASE)
        return models, tokens

    def sign(made: tuple[list[FolderModel], Tokens]) -> dict[str, Any]:
        return {"text": made[1].sha256, "models": [(f.name, f.identity) for s in subjects for f in s.checkpoint.files]}

    subjects = [subject] if against is None else [subject, against]
    with ExitStack() as stack:
        models, tokens = team.begin(begin, sign)
        ids = torch.from_numpy(tokens.ids[team.rank :: team.size].copy())
        needed = peak_memory(models, ids.shape[1])
        if device == "cpu":
            console.note(f"RAM at most {human_bytes(needed)}, one layer at a time")
        else:
            console.note(f"GPU memory {human_bytes(needed - BASE)}, and what is free for hidden states")
        scratch = stack.enter_context(_scratch())
        with console.progress(sum(model.work for model in models)) as progress:
            rooms = [Room.beside(torch.device(device), needed - BASE, len(models)) for _ in models]
            for model, room in zip(models, rooms, strict=True):
                model.embed(ids, scratch, room)
                model.windows_apart = team.rank, team.size
            apart = _run(models, progress)
            losses, divergences, agreed = _predict(models, ids, progress)
    losses = [_together(team, part) for part in losses]
    divergences, agreed, apart = (_together(team, part) for part in (divergences, agreed, apart))
    layer_errors = tuple(map(float, apart.mean(axis=0))) if apart.size else ()
    ours, error = _mean(losses[0].mean(axis=1))
    comparison = None
    if against is not None:
        change, change_error = _mean(losses[0].mean(axis=1) - losses[1].mean(axis=1))
        growth = _exp(change, subject.name)
        theirs = _exp(_mean(losses[1].mean(axis=1))[0], against.name)
        comparison = Comparison(
            against.name, theirs, growth - 1, _times(change_error, growth),
            float(divergences.mean()), float(np.percentile(divergences, 99)), float(agreed.mean()),
            layer_errors,
        )  # fmt: skip
    perplexity = _exp(ours, subject.name)
    return Evaluation(
        subject.name, tokens.name, tokens.text_sha256, tokens.sha256, len(tokens.ids), ids.shape[1], losses[0].size,
        ours, error, perplexity, _times(error, perplexity), comparison,
        () if comparison is None else gates.judge(comparison),
    )  # fmt: skip


def _together(team: Team, mine: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """By window, what each of a team has found of its own."""
    parts = team.gather(mine)
    found = np.empty((sum(map(len, parts)), *mine.shape[1:]), mine.dtype)
    for rank, part in enumerate(parts):
        found[rank :: team.size] = part
    return found


def peak_memory(models: list[FolderModel], length: int) -> int:
    """Bytes of RAM that an evaluation on windows of `length` tokens takes at the most; on a GPU, all but BASE there."""
    from quantkit.evaluation_model import CHUNK, FLOAT

    # The layer that is loaded; or all heads, with logits of some tokens from each and what is computed from them.
    layer = max(model.memory_of_layer(length) for model in models)
    logits = FLOAT * max(CHUNK, 8 * models[0].vocabulary) * (2 * len(models) + 1)
    heads = sum(model.head_bytes for model in models)
    return BASE + max(layer, heads + max(model.head_bytes for model in models) + logits)


def _check_vocabularies(models: list[FolderModel]) -> None:
    sizes = [model.vocabulary for model in models]
    if len(set(sizes)) > 1:
        raise UsageError(
            f"the models have vocabularies of {sizes[0]:,} and {sizes[1]:,} tokens", where=str(models[1].folder),
            hint="--against is for the folder's source, or another folder made from it",
        )  # fmt: skip


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for hidden states, removed whatever happens."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="quantkit-eval-")
    except OSError as e:
        raise RunError(
            f"there is no place for hidden states: {e.strerror}", hint="set TMPDIR to a folder that can be written"
        ) from None
    with folder as name:
        yield Path(name)


def _run(models: list[FolderModel], progress: Progress) -> Losses:
    """All models through all of their layers; of two that are alike, [windows, layers], how far they are apart behind
    each."""
    alike = len(models) == 2 and len({(m.layers, m.width) for m in models}) == 1
    found: list[list[float]] = []
    for index in range(max(model.layers for model in models)):
        for model in models:
            if index < model.layers:
                model.run(index, progress)
        if alike:
            found.append(_apart(*models))
    return np.ascontiguousarray(np.array(found).T) if found else np.empty((models[0].windows, 0))


def _apart(ours: FolderModel, theirs: FolderModel) -> list[float]:
    """‖ours - theirs‖₂ / ‖theirs‖₂ of what left the last layer that was run, the mean over a window's tokens."""
    means = []
    for window in range(ours.windows):
        a, b = ours.states(window).float(), theirs.states(window).float()
        size = b.norm(dim=-1)
        far = (a - b).norm(dim=-1) / size.clamp_min(1e-30)
        means.append(float(far.double().mean()))
    return means


def _predict(models: list[FolderModel], ids: torch.Tensor, progress: Progress) -> tuple[list[Losses], Any, Any]:
    """Losses [windows, length - 1] of each model; with two, divergence and agreement of each token, flat."""
    import torch

    from quantkit.evaluation_model import CHUNK, not_finite, share

    windows, length = ids.shape
    losses: list[Losses] = [np.zeros((windows, length - 1)) for _ in models]
    divergences, agreed = np.zeros((windows, length - 1)), np.zeros((windows, length - 1), bool)
    step = max(8, CHUNK // models[0].vocabulary)
    work = sum(model.head_bytes for model in models)
    with torch.inference_mode():
        heads = [model.head() for model in models]
        for w in range(windows):
            states = [model.states(w) for model in models]
            for start in range(0, length - 1, step):
                here = slice(start, min(start + step, length - 1))
                targets = ids[w, here.start + 1 : here.stop + 1, None].long()
                logs = [head(x[:, here]) for head, x in zip(heads, states, strict=True)]
                for model, log, loss in zip(models, logs, losses, strict=True):
                    loss[w, here] = -log.gather(1, targets.to(log.device))[:, 0].double().cpu().numpy()
                    if not np.isfinite(loss[w, here]).all():
                        raise not_finite("the model's predictions are", model.number(w), model.folder)
                if len(logs) == 2:
                    agreed[w, here] = (logs[0].argmax(1) == logs[1].argmax(1)).cpu().numpy()
                    divergences[w, here] = _divergence(*logs).cpu().numpy()
                    if not np.isfinite(divergences[w, here]).all():
                        raise not_finite(
                            "one model rules out what the other expects, which makes",
                            models[0].number(w),
                            models[0].folder,
                        )
            progress.advance(share(work, w, windows))
        progress.unit("predictions", work)
    return losses, divergences, agreed


def _divergence(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Σ p_theirs · (log p_theirs - log p_ours) of log probabilities [tokens, vocabulary], float64 [tokens]. Overwrites
    both: nothing of their size is held beside them."""
    import torch

    difference = torch.sub(theirs, ours, out=ours)
    chances = theirs.exp_()
    difference.masked_fill_(chances == 0, 0)  # of what neither expects: -inf less -inf
    # It is never negative; rounding of the two normalizations makes it so for distributions that are nearly equal.
    return difference.mul_(chances).sum(1, dtype=torch.float64).clamp_min_(0)


def _mean(values: Losses) -> tuple[float, float | None]:
    """The mean and its standard error."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(values.mean()), error


def _times(error: float | None, factor: float) -> float | None:
    return None if error is None else error * factor


def _exp(loss: float, name: str) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        raise RunError(
            f"a mean loss of {loss:,.0f} nats is no perplexity that a number can say", where=name,
            hint="the weights are not those of a trained model: run `quantkit verify` on the folder",
        ) from None  # fmt: skip
