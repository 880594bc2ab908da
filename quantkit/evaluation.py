"""What an evaluation found, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """measure: perplexity_increase, relative, or kl, the mean in nats a token. limit: the largest that passes."""

    measure: str
    limit: float
    value: float

    @property
    def passed(self) -> bool:
        return self.value <= self.limit

    @property
    def text(self) -> str:
        shown = "{:.4%}" if self.measure == "perplexity_increase" else "{:.6g} nats a token"
        kept = "within" if self.passed else "above"
        return f"{self.words} {shown.format(self.value)}, {kept} the limit of {shown.format(self.limit)}"

    @property
    def words(self) -> str:
        return {"perplexity_increase": "increase of perplexity", "kl": "KL divergence"}[self.measure]


@dataclass(frozen=True)
class Comparison:
    """The folder beside another, over the same tokens.

    perplexity: of the other. increase: of the folder's perplexity over it, relative; increase_error: its standard error
    from the windows' differences, which is far smaller than that of either perplexity. None for a single window.
    kl, kl_99: KL divergence of the folder's distribution from the other's, Σ p_other · log(p_other / p_folder), in nats
    a token: the mean and the 99th percentile. agreement: how often both find the same token most likely, 0 … 1.
    is_source: whether it is what the folder was made from, by the SHA-256 of its files; None where that is not known.
    layer_errors: of what leaves each layer, ‖ours - theirs‖₂ / ‖theirs‖₂, the mean over tokens; empty if the two have
    not the same number of layers, of the same width.
    """

    name: str
    perplexity: float
    increase: float
    increase_error: float | None
    kl: float
    kl_99: float
    agreement: float
    layer_errors: tuple[float, ...]
    is_source: bool | None = None


@dataclass(frozen=True)
class Evaluation:
    """text: the file's name, or the Hub dataset. text_sha256: of the file; tokens_sha256: of the ids, as
    `calibration.data.Tokens` has it. tokens: how many were predicted, windows · (length - 1).

    loss: their mean, in nats; loss_error: its standard error, from the spread of the windows' means. perplexity: exp of
    the loss; perplexity_error: what loss_error means for it, to first order. Both errors are None for a single window.
    gates: the limits that were set, and whether they were kept.
    """

    folder: str
    text: str
    text_sha256: str
    tokens_sha256: str
    windows: int
    length: int
    tokens: int
    loss: float
    loss_error: float | None
    perplexity: float
    perplexity_error: float | None
    against: Comparison | None
    gates: tuple[Verdict, ...] = ()


@dataclass(frozen=True)
class TaskScore:
    """What lm-evaluation-harness found. metric: as the harness calls it, with its filter if that does anything. error:
    its standard error; samples: how many texts; shots: examples ahead of each; harness: its version."""

    task: str
    metric: str
    value: float
    error: float | None
    samples: int | None
    shots: int | None
    harness: str
