"""A model of transformers' own modules without its weights: they come one decoder layer at a time, and go again.

Nothing of a model is written here: embeddings, masks, rotary tables, attention, norms and the head are the modules that
transformers builds from config.json, on the `meta` device until a layer's turn comes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from quantkit.derived_architecture import plain_config
from quantkit.errors import RunError, SourceError
from quantkit.modules import Names, in_64s, split_experts


class Weights(Protocol):
    """Where the tensors of a model come from, by their names on disk."""

    @property
    def names(self) -> Iterable[str]: ...

    def read(self, name: str) -> torch.Tensor:
        """The tensor as it is stored: its dtype, its shape in the Hugging Face layout."""
        ...

    def read_rows(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Some rows of a matrix: [len(rows), columns]."""
        ...


@dataclass(frozen=True)
class Place:
    """A tensor on disk, and the parameter it becomes."""

    name: str
    module: str
    leaf: str


@dataclass(frozen=True)
class Call:
    """What the model hands to a decoder layer beside the hidden states; the same for all rows of one length."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Skeleton:
    """The model of a config.json with its parameters on `meta`, and where the tensors `names` of a checkpoint belong.

    Raises SourceError if transformers cannot build it, or where a tensor has no place in it.
    """

    def __init__(self, config: Mapping[str, Any], names: Iterable[str], folder: Path, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.folder = folder
        self.model = _build(config, folder)
        self.base: Any = getattr(self.model, self.model.base_model_prefix)
        self.path, self.layers = _decoder_layers(self.model)
        on_disk, ignored = list(names), _ignored(self.model)
        known = Names(self.model)
        split_experts(self.model, folder, known, on_disk, _Expert)
        for module in self.model.modules():
            if hasattr(module, "every"):
                module.every = True
        self.outside: list[Place] = []
        self.inside: list[list[Place]] = [[] for _ in self.layers]
        for name in on_disk:
            target = known.tensor(name)
            if target not in known.known and ignored.search(name):
                continue
            if target not in known.known:
                raise SourceError(
                    f"tensor {name!r} has no place in a {type(self.model).__name__}", where=str(folder),
                    hint="config.json and the weights are of different models",
                )  # fmt: skip
            module, _, leaf = target.rpartition(".")
            inner = re.match(re.escape(self.path) + r"\.(\d+)\.", target)
            (self.inside[int(inner[1])] if inner else self.outside).append(Place(name, module, leaf))
        missing = {t for t in known.known if t not in {f"{p.module}.{p.leaf}" for p in self._places()}}
        missing -= {n for n, _ in self.model.named_buffers()} | set(
            getattr(self.model, "_tied_weights_keys", None) or {}
        )
        if missing:
            raise SourceError(
                f"the checkpoint has no tensor for {min(missing)!r}", where=str(folder),
                hint="config.json and the weights are of different models",
            )  # fmt: skip
        self.tuples = False  # whether layers return tuples

    def _places(self) -> Iterator[Place]:
        yield from self.outside
        for layer in self.inside:
            yield from layer

    def fill(self, places: Iterable[Place], weights: Weights) -> None:
        """Gives parameters their values, in float32."""
        for place in places:
            value = weights.read(place.name).to(self.device, torch.float32)
            self.put(place, value)

    def put(self, place: Place, value: torch.Tensor) -> None:
        module = self.model.get_submodule(place.module)
        empty = getattr(module, place.leaf)
        if empty.shape != value.shape:
            raise SourceError(
                f"tensor {place.name!r} is {list(value.shape)}, config.json makes it {list(empty.shape)}",
                where=str(self.folder), hint="config.json and the weights are of different models",
            )  # fmt: skip
        if place.leaf in module._parameters:
            module._parameters[place.leaf] = nn.Parameter(value, requires_grad=False)
        else:
            setattr(module, place.leaf, value)

    def clear(self, places: Iterable[Place]) -> None:
        """Lets go of what `fill` or `put` gave."""
        for place in places:
            module = self.model.get_submodule(place.module)
            if place.leaf in module._parameters and (old := module._parameters[place.leaf]) is not None:
                module._parameters[place.leaf] = nn.Parameter(torch.empty_like(old, device="meta"), requires_grad=False)

    @contextmanager
    def embedded(self, weights: Weights, ids: torch.Tensor) -> Iterator[tuple[Iterator[torch.Tensor], list[Call]]]:
        """For token ids [rows, length], inside: the hidden states that enter the first layer, row by row as float32
        [1, length, hidden], and how each layer is to be called. Only those rows of the embedding are read that occur.
        SourceError, where its turn comes, for a row that layers are to be called otherwise for.
        """
        embedding = self.model.get_input_embeddings()
        matrix = next(p for p in self.outside if self.model.get_submodule(p.module) is embedding)
        used, local = torch.unique(ids.long(), return_inverse=True)
        head = self.model.get_output_embeddings()
        rest = [p for p in self.outside if p is not matrix and self.model.get_submodule(p.module) is not head]
        try:
            self.fill(rest, weights)
            rows = weights.read_rows(matrix.name, used).to(self.device, torch.float32)
            embedding._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
            embedding.padding_idx = None
            local = local.to(self.device)
            with self._watched_ids(embedding, len(used)):
                calls = self._catch(local[:1])[1]
            yield self._enter(local, calls), calls
        finally:
            empty = torch.empty(len(used), embedding.weight.shape[1], device="meta")
            embedding._parameters["weight"] = nn.Parameter(empty, requires_grad=False)
            self.clear(rest)

    @torch.inference_mode()
    def _enter(self, local: torch.Tensor, calls: Sequence[Call]) -> Iterator[torch.Tensor]:
        for row in local:
            hidden, own = self._catch(row[None])
            if not _alike(own, calls):
                raise self._told_more()
            yield hidden

    @contextmanager
    def _watched_ids(self, embedding: nn.Module, used: int) -> Iterator[None]:
        """SourceError where tokens are looked up in a second matrix, too: they are numbered anew for the first."""
        vocabulary = self.model.config.get_text_config().vocab_size
        others = [m for m in self.model.modules() if isinstance(m, nn.Embedding) and m is not embedding]
        others = [m for m in others if m.num_embeddings >= vocabulary]

        def refuse(*_: object) -> None:
            raise self._told_more()

        hooks = [m.register_forward_pre_hook(refuse) for m in others]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _told_more(self) -> SourceError:
        return SourceError(
            f"the layers of a {type(self.model).__name__} are told more of a text than hidden states",
            where=str(self.folder),
            hint="such a model cannot be followed layer by layer; use --method rtn or bnb",
        )

    def _is_head(self, place: Place) -> bool:
        head = self.model.get_output_embeddings()
        return head is not None and self.model.get_submodule(place.module) is head and place.leaf == "weight"

    @torch.inference_mode()
    def _catch(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
        """Runs the model with catchers in place of its layers."""
        for last in (self.tuples, True):
            caught: list[tuple[torch.Tensor, Call]] = []
            real = list(self.layers)
            for i, layer in enumerate(real):
                self.layers[i] = _Catcher(layer, caught, self.tuples)
            try:
                self.base(input_ids=ids, use_cache=False)
            except (RuntimeError, TypeError, ValueError, IndexError):  # of a model that takes a tensor for a tuple
                if last:
                    raise
                self.tuples = True
                continue
            finally:
                for i, layer in enumerate(real):
                    self.layers[i] = layer
            hidden = caught[0][0]
            # Some models take the first of what a layer returns: of a tensor, that would be its first row.
            if all(h.shape == hidden.shape for h, _ in caught) and len(caught) == len(real):
                return hidden, [call for _, call in caught]
            self.tuples = True
        raise RunError(f"a {type(self.model).__name__} does not call its layers one after the other")

    def run(self, layer: int, hidden: torch.Tensor, call: Call) -> torch.Tensor:
        """One decoder layer: [1, length, hidden] → the same."""
        result = self.layers[layer](hidden, *call.args, **call.kwargs)
        out: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return out

    def logits(self, weights: Weights, *, gradients: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function from what leaves the last layer [1, tokens, hidden] to logits float32 [tokens, vocabulary]: the
        model itself with its layers taken out. The head's matrix is in memory, as it is stored. gradients: whether
        autograd can go back through it."""
        place = next((p for p in self.outside if self._is_head(p)), None)
        tied = next(p for p in self.outside if self._is_embedding(p))
        matrix = weights.read((place or tied).name).to(self.device)
        return self._behind_layers(weights, lambda x, bias: _by_parts(x, matrix, bias), gradients=gradients)

    def head_inputs(self, weights: Weights) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function from what leaves the last layer [1, tokens, hidden] to what the head gets, of the same shape."""
        caught: list[torch.Tensor] = []

        def forward(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            caught.append(x)
            return x

        run = self._behind_layers(weights, forward)

        def inputs(hidden: torch.Tensor) -> torch.Tensor:
            run(hidden)
            return caught.pop()

        return inputs

    def _is_embedding(self, place: Place) -> bool:
        return self.model.get_submodule(place.module) is self.model.get_input_embeddings()

    def _behind_layers(
        self,
        weights: Weights,
        forward: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
        *,
        gradients: bool = False,
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The model with its layers taken out, and `forward`, of its inputs and its bias, in place of the head."""
        head: Any = self.model.get_output_embeddings()
        embedding = self.model.get_input_embeddings()
        self.fill([p for p in self.outside if not self._is_embedding(p) and not self._is_head(p)], weights)
        head.forward = lambda x: forward(x, head.bias)
        embedding._parameters["weight"] = nn.Parameter(
            torch.zeros(1, embedding.weight.shape[1], device=self.device), requires_grad=False
        )
        embedding.padding_idx = None

        @torch.inference_mode(not gradients)
        def logits(hidden: torch.Tensor) -> torch.Tensor:
            real = list(self.layers)
            for i, layer in enumerate(real):
                self.layers[i] = _Catcher(layer, [], self.tuples, hidden)
            try:
                ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
                found: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits[0].float()
                return found
            finally:
                for i, layer in enumerate(real):
                    self.layers[i] = layer

        return logits


def _alike(one: Sequence[Call], other: Sequence[Call]) -> bool:
    """Whether all tensors are equal that layers are called with."""
    equal: set[tuple[int, int]] = set()  # most are the same objects for all layers

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, (tuple, list)):
            return len(a) == len(b) and all(map(same, a, b))
        if isinstance(a, torch.Tensor) and (id(a), id(b)) not in equal:
            if not torch.equal(a, b):
                return False
            equal.add((id(a), id(b)))
        return True

    return all(
        same((*a.args, *a.kwargs.values()), (*b.args, *b.kwargs.values())) for a, b in zip(one, other, strict=True)
    )


class _Expert(nn.Linear):
    """A linear that gets another number of tokens at each call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(in_64s(x))[..., : x.shape[-2], :]


class _Catcher(nn.Module):
    """Stands for a layer: notes what it is called with, and gives it back, or what it is told to."""

    def __init__(
        self,
        layer: nn.Module,
        caught: list[tuple[torch.Tensor, Call]],
        tuples: bool,
        result: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.caught, self.tuples, self.result = caught, tuples, result
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.caught.append((hidden_states, Call(args, kwargs)))
        result = hidden_states if self.result is None else self.result
        return (result,) if self.tuples else result


def _by_parts(x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None, rows: int = 8192) -> torch.Tensor:
    """x @ matrixᵀ + bias in float32, a stretch of the vocabulary at a time: the matrix is never there twice."""
    out = torch.empty((*x.shape[:-1], matrix.shape[0]), device=x.device)
    for a in range(0, matrix.shape[0], rows):
        part = matrix[a : a + rows].float()
        out[..., a : a + rows] = nn.functional.linear(x, part, None if bias is None else bias[a : a + rows])
    return out


def _build(config: Mapping[str, Any], folder: Path) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        ours = AutoConfig.for_model(config.get("model_type"), **plain_config(config))
        # Buffers stay real: those that are not saved (rotary frequencies) have no other source than the constructor.
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(ours, trust_remote_code=False, dtype=torch.float32)
        return model.eval()
    except Exception as e:  # whatever goes wrong here comes from values in config.json, and takes many types
        raise SourceError(
            f"transformers cannot build this model ({type(e).__name__}: {str(e).partition(chr(10))[0][:200]})",
            where=str(folder / "config.json"),
            hint="upgrade transformers; a model that needs trust_remote_code cannot be calibrated",
        ) from e


def _decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers: the longest ModuleList of modules of one class, outermost first."""
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise SourceError(f"a {type(model).__name__} has no list of decoder layers", hint="use --method rtn or bnb")
    best = max(len(m) for name, m in lists if name.count(".") == min(n.count(".") for n, _ in lists))
    return next((name, m) for name, m in lists if len(m) == best)


def _ignored(model: Any) -> re.Pattern[str]:
    """Buffers that old checkpoints carry, and layers that no model has: transformers leaves them unread too."""
    return re.compile(
        "|".join(
            [r"rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$", r"\.attention\.(masked_)?bias$",
             *(model._keys_to_ignore_on_load_unexpected or ())]
        )
    )  # fmt: skip
