"""One folder on its way through a text: one decoder layer in memory, hidden states on disk, logits by the chunk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from quantkit.calibration.hidden import HiddenStates
from quantkit.calibration.room import Room
from quantkit.calibration.skeleton import Call, Skeleton
from quantkit.console import Progress, human_bytes
from quantkit.errors import RunError, SourceError
from quantkit.layouts import Checkpoint
from quantkit.planner import CONTEXTS
from quantkit.restored import RestoredWeights, open_files
from quantkit.torch_setup import give_back

CHUNK = 2**24  # logits of a model held at once: 64 MiB, whatever the vocabulary; the head is gone through once for each
FLOAT = 4


class FolderModel:
    """The model of a folder. `vocabulary`: how many logits; `context`: its longest text in tokens, None if not known.

    A context manager: its files are open inside. Raises SourceError for a folder that is no causal language model.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, device: str) -> None:
        self.name, self.folder = name, checkpoint.folder
        self.files = open_files(checkpoint)
        self.hidden: HiddenStates | None = None
        self.calls: list[Call] = []
        self.windows_apart = 0, 1  # of the text, which windows these are: the first, and how far they are apart
        with self.files:
            self.weights = RestoredWeights(checkpoint, self.files)
        self.skeleton = Skeleton(checkpoint.config, self.weights.names, self.folder, device)
        config = self.skeleton.model.config.get_text_config()
        head = self.skeleton.model.get_output_embeddings()
        if head is None:
            raise SourceError(
                f"a {type(self.skeleton.model).__name__} predicts no tokens", where=str(self.folder),
                hint="name a causal language model",
            )  # fmt: skip
        self.vocabulary = int(config.vocab_size)
        self.context = next((n for key in CONTEXTS if type(n := getattr(config, key, None)) is int), None)
        layers = self.skeleton.layers
        self.layer_bytes: list[int] = [FLOAT * sum(p.numel() for p in layer.parameters()) for layer in layers]
        self._largest = max(p.numel() for layer in layers for p in layer.parameters())
        self._widest = max(max(p.shape) for layer in layers for p in layer.parameters())
        self._scores = int(getattr(config, "num_attention_heads", 0) or getattr(config, "n_head", 0))
        self.head_bytes: int = FLOAT * head.weight.numel()

    def __enter__(self) -> FolderModel:
        self.files.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.files.__exit__()
        if self.hidden is not None:
            self.hidden.close()

    @property
    def work(self) -> int:
        """Bytes of weights, in float32, that the text goes through."""
        return sum(self.layer_bytes) + self.head_bytes

    def memory_of_layer(self, length: int) -> int:
        """Bytes at the most while one layer is loaded and a window of `length` tokens goes through it."""
        width: int = self.skeleton.model.config.get_text_config().hidden_size
        way = length * (6 * width + 4 * self._widest)  # residual, norms, what attention and the feed-forward part hold
        # Scores of attention, with their mask and their softmax, for those models that have them whole.
        scores = 3 * self._scores * length**2
        return max(self.layer_bytes) + FLOAT * (2 * self._largest + way + scores)

    def embed(self, ids: torch.Tensor, scratch: Path, room: Room | None = None) -> None:
        """Token ids [windows, length] → hidden states in a file without a name: it is gone with the process; on a GPU
        as far as there is room."""
        with self.skeleton.embedded(self.weights, ids) as (rows, self.calls):
            first = next(rows)
            if self.hidden is not None:
                self.hidden.close()
            self.hidden = HiddenStates(scratch / "hidden", len(ids), ids.shape[1], first.shape[-1], room=room)
            self.hidden.path.unlink()
            if (free := shutil.disk_usage(scratch).free) < self.hidden.nbytes:
                raise RunError(
                    f"hidden states take {human_bytes(self.hidden.nbytes)} on disk, and {human_bytes(free)} are free",
                    where=str(scratch.parent), hint="set TMPDIR to a folder with more room, or use fewer --windows",
                )  # fmt: skip
            self.hidden.write(0, first)
            for i, row in enumerate(rows, 1):
                self.hidden.write(i, row)
        give_back()

    @property
    def layers(self) -> int:
        return len(self.layer_bytes)

    def number(self, window: int) -> int:
        """Which window of the text it is."""
        first, apart = self.windows_apart
        return first + window * apart

    @property
    def windows(self) -> int:
        assert self.hidden is not None
        return self.hidden.shape[0]

    @property
    def width(self) -> int:
        """Of the hidden states."""
        assert self.hidden is not None
        return self.hidden.shape[2]

    @torch.inference_mode()
    def run(self, index: int, progress: Progress) -> None:
        """The hidden states through one layer, in place. SourceError where one is not finite."""
        assert self.hidden is not None
        windows = self.windows
        places = self.skeleton.inside[index]
        self.skeleton.fill(places, self.weights)
        for window in range(windows):
            before = self.hidden.read(window, self.skeleton.device)
            after = self.skeleton.run(index, before, self.calls[index])
            if not bool(torch.isfinite(after).all()):
                raise not_finite(f"layer {index} of the model gives", self.number(window), self.folder)
            self.hidden.write(window, after)
            progress.advance(share(self.layer_bytes[index], window, windows))
        self.skeleton.clear(places)
        give_back()
        progress.unit(f"{self.name}, layer {index}", self.layer_bytes[index])

    def states(self, window: int) -> torch.Tensor:
        """[1, length, width] of what leaves the layer that was run last."""
        assert self.hidden is not None
        return self.hidden.read(window, self.skeleton.device)

    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Hidden states [1, tokens, width] → log probabilities float32 [tokens, vocabulary]. Its matrix is loaded."""
        logits = self.skeleton.logits(self.weights)

        def log_probabilities(states: torch.Tensor) -> torch.Tensor:
            found = logits(states)
            # Within 1e-7 of float64, where log_softmax is off by 8e-6 nats a token (49,152 tokens, on the CPU).
            return found.sub_(found.logsumexp(dim=1, keepdim=True))

        return log_probabilities


def share(total: int, i: int, of: int) -> int:
    """The i-th of `of` parts of `total`: whole numbers that sum up to it."""
    return total * (i + 1) // of - total * i // of


def not_finite(what: str, window: int, folder: Path) -> SourceError:
    return SourceError(
        f"{what} numbers that are not finite, in window {window} of the text", where=str(folder),
        hint="its weights hold a NaN or an infinity, or it overflows on this text",
    )  # fmt: skip
