"""What a model of Mistral's kind is, in one record that params.json and config.json are two spellings of.

Nothing is written twice: a fact that is one key in each file is one row below, and both directions read the row. What
the two files spell differently in kind (windows, yarn) is in mistral_params.py and mistral_config.py.

Sources: mistral_inference 1.6.0 (`args.py`, `cache.py`, `transformer.py`) and its commits of September and December
2023; transformers 5.23 (`models/{mistral,mixtral,ministral,ministral3,llama}`, `modeling_rope_utils.py`); vLLM's reader
of params.json for yarn and fp8.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from quantkit.checkpoint.header import quote
from quantkit.errors import SourceError

MAX_SIZE = 2**31 - 1
MAX_LAYERS = 1 << 16  # layer_types has an entry for each: a number in a stranger's file must not fill the memory

Windows = tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Yarn:
    """Stretched rotary positions, and the scaling of queries that came with them (Ministral 3).

    factor: how much longer than original_context (tokens) a sequence may be, above 1. beta, alpha: rotations within
    original_context above which a frequency is kept, and below which it is divided by factor. apply_scale: whether
    queries and keys are each multiplied by 1 + 0.1·ln(factor). query_beta: queries at position p are multiplied by
    1 + query_beta·ln(1 + ⌊p / original_context⌋); None for not at all.
    """

    factor: float
    original_context: int
    beta: float
    alpha: float
    apply_scale: bool
    query_beta: float | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """All that the computation depends on. Sizes count elements; windows count tokens, the current one included.

    windows: () for none, one element for every layer's, else the pattern that repeats from the first layer on, as
    short as it can be, None in it for a layer that sees everything. experts is 0 for a dense model. tied: the head is
    the embedding. Facts that come from a file are checked; see `check`.
    """

    dim: int
    n_layers: int
    head_dim: int
    hidden_dim: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    vocab_size: int
    rope_theta: float
    windows: Windows = ()
    experts: int = 0
    experts_per_token: int = 0
    tied: bool = False
    yarn: Yarn | None = None

    @property
    def mixed_windows(self) -> bool:
        return len(self.windows) > 1

    @property
    def layer_windows(self) -> Windows:
        """One entry a layer."""
        return (self.windows or (None,)) * (self.n_layers // max(1, len(self.windows)))


# --- the two-way table ------------------------------------------------------------------------------------------------

Kind = Literal["size", "number", "flag"]


class Row(NamedTuple):
    """One fact: an attribute of Facts or Yarn, its key in params.json, its key in config.json."""

    fact: str
    native: str
    hf: str
    kind: Kind


# In the order of the params.json of 2023, as are the files that are written.
COMMON = (
    Row("dim", "dim", "hidden_size", "size"),
    Row("n_layers", "n_layers", "num_hidden_layers", "size"),
    Row("head_dim", "head_dim", "head_dim", "size"),
    Row("hidden_dim", "hidden_dim", "intermediate_size", "size"),
    Row("n_heads", "n_heads", "num_attention_heads", "size"),
    Row("n_kv_heads", "n_kv_heads", "num_key_value_heads", "size"),
    Row("norm_eps", "norm_eps", "rms_norm_eps", "number"),
    Row("vocab_size", "vocab_size", "vocab_size", "size"),
)
THETA = Row("rope_theta", "rope_theta", "rope_theta", "number")
TIED = Row("tied", "tied_embeddings", "tie_word_embeddings", "flag")
# Below `moe` in params.json, at the top of config.json.
MOE = (
    Row("experts", "num_experts", "num_local_experts", "size"),
    Row("experts_per_token", "num_experts_per_tok", "num_experts_per_tok", "size"),
)
# Below `yarn` in params.json, below `rope_parameters` in config.json.
YARN = (
    Row("factor", "factor", "factor", "number"),
    Row("original_context", "original_max_position_embeddings", "original_max_position_embeddings", "size"),
    Row("beta", "beta", "beta_fast", "number"),
    Row("alpha", "alpha", "beta_slow", "number"),
)
# Below `llama_4_scaling`; it has an original_max_position_embeddings of its own, which config.json cannot keep apart.
QUERY_BETA = Row("query_beta", "beta", "llama_4_scaling_beta", "number")


def native_of(rows: Iterable[Row], record: Facts | Yarn) -> dict[str, Any]:
    return {row.native: getattr(record, row.fact) for row in rows}


def hf_of(rows: Iterable[Row], record: Facts | Yarn) -> dict[str, Any]:
    return {row.hf: getattr(record, row.fact) for row in rows}


# --- reading a stranger's table ---------------------------------------------------------------------------------------


class Fields:
    """The values of a JSON object by type. Absent and null are both None; anything of another type, and any number
    that cannot be what it says, is a SourceError that names the key. `file` is what messages call the whole."""

    def __init__(self, table: Mapping[str, Any], where: str, file: str, path: str = "") -> None:
        self.table, self.where, self.file, self.path = table, where, file, path

    def fail(self, key: str, problem: str, hint: str) -> SourceError:
        return SourceError(f"{self.path}{key} {problem}", where=self.where, hint=hint)

    def missing(self, key: str, hint: str = "fetch the original file, or add the key") -> SourceError:
        return self.fail(key, f"is missing from {self.file}", hint)

    def _wrong(self, key: str, noun: str, wanted: str) -> SourceError:
        value = self.table[key]
        if isinstance(value, str) and wanted.startswith("a "):
            wanted += ", without quotes"
        return self.fail(key, f"is {quote(value)}, which is no {noun}", f"it must be {wanted}")

    def size(self, key: str) -> int | None:
        value = self.table.get(key)
        if value is None:
            return None
        if type(value) is not int or not 0 < value <= MAX_SIZE:
            raise self._wrong(key, "size", f"a whole number from 1 to {MAX_SIZE}")
        return value

    def number(self, key: str, *, zero: bool = False) -> float | None:
        """A positive finite number; with `zero`, also 0."""
        value = self.table.get(key)
        if value is None:
            return None
        good = type(value) in (int, float) and (0 < value < math.inf or (zero and value == 0))  # NaN is neither
        try:
            if good:
                return float(value)
        except OverflowError:
            pass
        raise self._wrong(key, "positive number", "a finite number above 0")

    def flag(self, key: str) -> bool | None:
        value = self.table.get(key)
        if value is None or isinstance(value, bool):
            return value
        raise self._wrong(key, "truth value", "true or false")

    def text(self, key: str) -> str | None:
        value = self.table.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self._wrong(key, "text", "a text in quotes")

    def list(self, key: str) -> list[Any] | None:
        value = self.table.get(key)
        if value is None or (isinstance(value, list) and value):
            return value
        raise self._wrong(key, "list of values", "a list with something in it")

    def below(self, key: str) -> Fields | None:
        value = self.table.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self._wrong(key, "table", "a table of keys and values")
        return Fields(value, self.where, self.file, f"{self.path}{key}.")

    def value(self, key: str, kind: Kind) -> Any:
        match kind:
            case "size":
                return self.size(key)
            case "number":
                return self.number(key)
            case "flag":
                return self.flag(key)

    def said(self, key: str, kind: Kind, by_user: float | None, option: str) -> Any:
        """The file's value, or what the user says where it has none; a contradiction is an error."""
        value = self.value(key, kind)
        if by_user is not None:  # it meets the same test as the file's
            by_user = Fields({key: by_user}, self.where, self.file).value(key, kind)
        if value is not None and by_user not in (None, value):
            raise self.fail(key, f"is {value:g} in {self.file}, not {by_user:g}", f"leave {option} out")
        return by_user if value is None else value

    def need(self, key: str, kind: Kind) -> Any:
        value = self.value(key, kind)
        if value is None:
            raise self.missing(key)
        return value

    def unknown(self, key: str, known: Sequence[str], aliases: Mapping[str, str] | None = None) -> SourceError:
        """For a key that is none of `known`; an alias is another spelling of a known one."""
        candidates = [*known, *(aliases or {})]
        near = difflib.get_close_matches(key, candidates, 1)
        meant = [(aliases or {}).get(near[0], near[0])] if near else []
        hint = f"did you mean {meant[0]!r}?" if meant else "take it out, if the model is the same without it"
        return SourceError(f"unknown key {quote(self.path + key)} in {self.file}", where=self.where, hint=hint)


def check(facts: Facts, fields: Fields, name: Mapping[str, str]) -> Facts:
    """What must fit together, whichever file it comes from; `name` says what a fact is called there."""
    if facts.n_layers > MAX_LAYERS:
        raise fields.fail(name["n_layers"], f"is {facts.n_layers}: no model has so many layers", "mend the number")
    if facts.head_dim % 2:
        raise fields.fail(
            name["head_dim"], f"is {facts.head_dim}, an odd number", "rotary positions turn pairs: it must be even"
        )
    if facts.n_heads % facts.n_kv_heads:
        raise fields.fail(
            name["n_kv_heads"],
            f"is {facts.n_kv_heads}, which does not divide the {facts.n_heads} heads of {name['n_heads']}",
            "each key/value head serves an equal number of heads; compare with the original file",
        )
    if facts.experts_per_token > facts.experts:
        raise fields.fail(
            name["experts_per_token"],
            f"is {facts.experts_per_token}, more than the {facts.experts} experts there are",
            "compare with the original file",
        )
    if facts.yarn and facts.yarn.factor <= 1:
        raise fields.fail(
            name["factor"], f"is {facts.yarn.factor}, which stretches nothing", "it must be above 1, or yarn left out"
        )
    return facts


def shortest_pattern(windows: Sequence[int | None]) -> Windows:
    """The windows of consecutive layers as Facts has them; two spellings of one pattern become equal."""
    n = len(windows)
    period = next(d for d in range(1, n + 1) if n % d == 0 and list(windows[:d]) * (n // d) == list(windows))
    pattern = tuple(windows[:period])
    return () if pattern == (None,) else pattern


# --- families ---------------------------------------------------------------------------------------------------------


def generation(facts: Facts) -> str:
    """A short name for the family that the facts look like: "7B v0.1", "7B v0.2", "v0.3 family", "Mixtral",
    "Nemo / Small 3", "Ministral 8B", "Ministral 3", else "other"."""
    if facts.experts:
        return "Mixtral"
    if facts.yarn:
        return "Ministral 3"
    if facts.mixed_windows:
        return "Ministral 8B"
    if facts.vocab_size == 131072 and not facts.windows and facts.n_layers == 40 and facts.dim == 5120:
        return "Nemo / Small 3"
    if facts.vocab_size == 32768 and not facts.windows and facts.rope_theta == 1e6 and facts.head_dim == 128:
        return "v0.3 family"  # 7B v0.3, Codestral 22B, Large 2: one tokenizer, three sizes
    if (facts.dim, facts.n_layers, facts.vocab_size) == (4096, 32, 32000):
        match facts.windows, facts.rope_theta:
            case (4096,), 1e4:
                return "7B v0.1"
            case (), 1e6:
                return "7B v0.2"
    return "other"


def default_context(facts: Facts) -> tuple[int, bool]:
    """Longest sequence in tokens, for where no file and no user says it; and whether that is an assumption.

    yarn implies it. Otherwise it is what the model cards of the family say, 32,768 where none is known.
    """
    if facts.yarn:
        return int(min(facts.yarn.original_context * facts.yarn.factor, MAX_SIZE)), False
    match generation(facts):
        case "Mixtral" if facts.dim == 6144:  # 8x22B
            return 65536, True
        case "Nemo / Small 3" if facts.rope_theta != 1e8:  # that is the first Small 3; 3.1 has 1e9, Nemo 1e6
            return 131072, True
        case "Ministral 8B":
            return 131072, True
        case "v0.3 family" if (facts.dim, facts.n_layers) == (12288, 88):  # Large 2
            return 131072, True
    return 32768, True
