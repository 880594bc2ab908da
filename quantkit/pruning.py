"""`prune:`, which weights of which linears become zero, as data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from quantkit.patterns import select
from quantkit.solvers.pattern import Amount, Pattern

ATTENTION, MLP = "attention", "mlp"  # targets that go by a linear's kind
NAMES = {"wanda": "Wanda", "sparsegpt": "SparseGPT", "magnitude": "Magnitude"}
LARGEST_GROUP = 1024


def read_pattern(value: object) -> object:
    """ "2:4" as it is; 124 as "2:4", which is what YAML 1.1 makes of it where it is not quoted (2 · 60 + 4)."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 60:
        return f"{value // 60}:{value % 60}"
    return value


class Prune(BaseModel):
    """What is pruned, and by which measure.

    sparsity: the part of the weights of each linear that become zero. pattern: "N:M", N of every M weights in a row.
    targets, skip: attention, mlp or patterns of module names; no targets: all linears of the decoder layers.
    variant: Wanda's, in which rows differ. per_row: magnitude compared within rows. damp: of SparseGPT, added to the
    Hessian in units of its mean diagonal. owl: layers with more outliers keep more (Yin et al. 2023); a weight is one
    whose score is owl_outlier times the mean of its layer, and layers differ by 2 · owl_range at the most.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    method: Literal["wanda", "sparsegpt", "magnitude"] = "wanda"
    sparsity: float | None = Field(None, ge=0, lt=1)
    pattern: Annotated[str | None, BeforeValidator(read_pattern)] = None
    targets: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    variant: bool = False
    per_row: bool = False
    damp: float | None = Field(None, gt=0, lt=1)
    owl: bool = False
    owl_outlier: float | None = Field(None, gt=1, le=1000)
    owl_range: float | None = Field(None, gt=0, lt=0.5)

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, table: object) -> object:
        """Lists of patterns as YAML has them, and a single one."""
        if not isinstance(table, dict):
            return table
        lists = {k: table[k] for k in ("targets", "skip") if isinstance(table.get(k), (str, list))}
        return {**table, **{k: (v,) if isinstance(v, str) else tuple(v) for k, v in lists.items()}}

    @model_validator(mode="after")
    def _consistent(self) -> Prune:
        if self.pattern is None and self.sparsity is None:
            raise ValueError("how much is not said\nname a sparsity between 0 and 1, or a pattern such as 2:4")
        if self.pattern is not None:
            found = _parse(self.pattern)
            if self.sparsity is not None and self.sparsity != found.sparsity:
                raise ValueError(
                    f"pattern {found} prunes a part of {found.sparsity:g} of the weights, sparsity says "
                    f"{self.sparsity:g}\nname one of the two"
                )
            for key in ("variant", "per_row", "owl"):
                if getattr(self, key):
                    raise ValueError(f"{key} does not go with a pattern, which leaves nothing to choose")
        for key, method in (("variant", "wanda"), ("per_row", "magnitude"), ("damp", "sparsegpt")):
            if getattr(self, key) and self.method != method:
                raise ValueError(f"{key} is for {method}, and the method is {self.method}")
        if self.owl and self.method == "magnitude":
            raise ValueError("owl measures layers on the calibration text, which magnitude does not look at")
        if self.owl and self.variant:
            raise ValueError("owl and variant both decide how much of a row goes: leave one of them out")
        if not self.owl and (self.owl_outlier is not None or self.owl_range is not None):
            raise ValueError("owl_outlier and owl_range are for owl: true")
        return self

    def canonical(self) -> dict[str, Any]:
        """Plain data, nothing in it that is not said."""
        table = {"method": self.method, **self.model_dump(exclude_defaults=True)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in table.items()}

    @property
    def amount(self) -> Amount:
        if self.pattern is not None:
            return _parse(self.pattern)
        assert self.sparsity is not None
        return self.sparsity

    @property
    def needs(self) -> Literal["nothing", "norms", "hessian"]:
        """What has to be known of a linear's inputs."""
        needs: dict[str, Literal["nothing", "norms", "hessian"]] = {
            "magnitude": "nothing", "wanda": "norms", "sparsegpt": "hessian",
        }  # fmt: skip
        return needs[self.method]

    @property
    def keeps_values(self) -> bool:
        """Whether weights that are not pruned stay as they are."""
        return self.method != "sparsegpt"

    @property
    def outlier(self) -> float:
        return 5.0 if self.owl_outlier is None else self.owl_outlier

    @property
    def range(self) -> float:
        return 0.08 if self.owl_range is None else self.owl_range

    def chosen(self, modules: Iterable[str]) -> set[str]:
        """Of the linears of decoder layers, by name, those that are pruned. UsageError for a pattern without any."""
        modules = list(modules)
        found = _named(modules, self.targets) if self.targets else set(modules)
        return found - _named(modules, self.skip)

    def count(self, rows: int, columns: int) -> int | None:
        """How many weights of a linear go, pruned ones of the source among them; None where the weights decide."""
        if isinstance(self.amount, Pattern):
            return rows * columns // self.amount.of * self.amount.pruned
        if self.owl or self.variant or self.method == "sparsegpt":
            return None
        if self.method == "magnitude" and not self.per_row:
            return int(rows * columns * self.amount)
        return rows * int(columns * self.amount)

    @property
    def requested(self) -> str:
        """In words: "2 %", "2:4"."""
        if isinstance(self.amount, Pattern):
            return f"{self.amount} ({self.amount.pruned} of every {self.amount.of} weights in a row)"
        return f"{100 * self.amount:g} %"

    @property
    def scope(self) -> str:
        words = ", ".join(self.targets) if self.targets else "all"
        skip = f", but {', '.join(self.skip)}" if self.skip else ""
        return f"linears of the decoder layers: {words}{skip}"

    @property
    def slug(self) -> str:
        """As it ends a model's name: wanda-2pct, sparsegpt-2of4."""
        amount = self.amount
        return f"{self.method}-" + (
            f"{amount.pruned}of{amount.of}" if isinstance(amount, Pattern) else f"{100 * amount:g}pct"
        )

    @property
    def compared(self) -> str:
        """In words, among which weights the least are looked for."""
        if isinstance(self.amount, Pattern):
            return f"within every {self.amount.of} weights of a row"
        if self.method == "magnitude":
            return "within every row" if self.per_row else "over the whole matrix"
        if self.method == "sparsegpt":
            return "over all rows of 128 columns"
        return "within every row, to the same part of its scores" if self.variant else "within every row"


def _named(modules: Sequence[str], names: Sequence[str]) -> set[str]:
    """Those that words for kinds, or patterns, name."""
    patterns = [name for name in names if name not in (ATTENTION, MLP)]
    found = select(modules, patterns, "linear of the decoder layers")
    if ATTENTION in names:
        found |= {m for m in modules if in_attention(m)}
    if MLP in names:
        found |= {m for m in modules if not in_attention(m)}
    return found


def in_attention(module: str) -> bool:
    """Whether a linear of a decoder layer belongs to its attention; all others are the feed-forward part's."""
    return any("attn" in part or "attention" in part for part in module.split("."))


def _parse(pattern: str) -> Pattern:
    match = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", pattern)
    if match is None:
        raise ValueError(f"{pattern!r} is no pattern N:M\nwrite 2:4, for example, to prune 2 of every 4 weights")
    n, m = int(match[1]), int(match[2])
    if n >= m:
        raise ValueError(f"in pattern {n}:{m} nothing is left\nN of M weights are pruned, so name an N below M")
    if m > LARGEST_GROUP:
        raise ValueError(f"in pattern {n}:{m} groups are beyond {LARGEST_GROUP} weights\nname a smaller M")
    return Pattern(n, m)
