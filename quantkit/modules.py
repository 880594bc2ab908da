"""Between the names of a checkpoint and the modules that transformers builds: renamings, merged experts.

transformers 5 renames on loading (Mixtral's `block_sparse_moe` is `mlp` in memory) and merges the experts of a layer
into 3-D parameters. Here its own conversion table is asked for the names, and merged experts become single linears
again, so that a linear on disk is a linear in memory, whatever is to be done with it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.errors import SourceError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel


class Names:
    """Names on disk → names in memory, by transformers' own conversion table."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        transforms = get_model_conversion_mapping(model)
        self.renamings = [t for t in transforms if not isinstance(t, WeightConverter)]
        self.mergers = [t for t in transforms if isinstance(t, WeightConverter)]
        self.prefix = f"{model.base_model_prefix}."
        self.known = set(model.state_dict())

    def tensor(self, name: str) -> str:
        """Renamed as in memory; the base model's prefix is added or dropped if that gives a name the model has."""
        for renaming in self.renamings:
            name, _ = renaming.rename_source_key(name)
        if name not in self.known:
            for other in (self.prefix + name, name.removeprefix(self.prefix)):
                if other in self.known or (self.merged(other) or ("",))[0] in self.known:
                    return other
        return name

    def linear(self, name: str) -> str:
        return self.tensor(f"{name}.weight").removesuffix(".weight")

    def merged(self, name: str) -> tuple[str, int] | None:
        """For a tensor that transformers merges with others into one: that one's name, and the place in it."""
        for merger in self.mergers:
            target, pattern = merger.rename_source_key(name)
            if pattern is not None:
                return target, merger.source_patterns.index(pattern)
        return None


def in_64s(x: torch.Tensor) -> torch.Tensor:
    """x [..., tokens, columns] with rows of zeros behind it, up to a multiple of 64. oneDNN compiles, and keeps, a
    product for each number of tokens, and experts get ever others: a gigabyte after some layers."""
    from torch.nn.functional import pad

    missing = -x.shape[-2] % 64
    return pad(x, (0, 0, 0, missing)) if missing else x


@functools.cache  # a function, because torch must not be imported with this module
def experts_class() -> type[nn.Module]:
    import torch
    from torch import nn

    class SingleExperts(nn.Module):
        """The experts of one MoE layer as single linears, `<expert>.<linear>`, in place of merged 3-D parameters.

        `rule` is the module replaced, without its parameters: it knows how gate and up are combined. With `every` set,
        experts without a token are called too, with no rows: then all inputs call the same linears in the same order.
        """

        every = False

        def __init__(self, rule: nn.Module, into: list[str], out_of: str, linear: type[nn.Linear]) -> None:
            super().__init__()
            self.rule, self.into, self.out_of = rule, into, out_of
            down = rule.get_parameter("down_proj")
            self.count, hidden, inner = down.shape
            del rule.gate_up_proj, rule.down_proj
            shapes = dict.fromkeys(into, (hidden, inner)) | {out_of: (inner, hidden)}
            for expert in range(self.count):
                layers = {n: linear(*s, bias=False, device="meta", dtype=down.dtype) for n, s in shapes.items()}
                self.add_module(str(expert), nn.ModuleDict(layers))

        def forward(
            self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
        ) -> torch.Tensor:
            """[tokens, hidden], [tokens, k] int and [tokens, k] float → [tokens, hidden]: transformers' contract."""
            total = torch.zeros_like(hidden_states)
            for expert in range(self.count) if self.every else torch.unique(top_k_index).tolist():
                token, place = torch.where(top_k_index == expert)
                result = self.one(expert, hidden_states[token]) * top_k_weights[token, place, None]
                total.index_add_(0, token, result.to(total.dtype))
            return total

        def one(self, expert: int, x: torch.Tensor) -> torch.Tensor:
            """What an expert gives of the tokens sent to it: [tokens, hidden] → the same."""
            layers: Any = self.get_submodule(str(expert))
            joined = torch.cat([layers[name](x) for name in self.into], dim=-1)
            result: torch.Tensor = layers[self.out_of](self.rule._apply_gate(joined))  # type: ignore[operator]
            return result

    return SingleExperts


def split_experts(
    model: PreTrainedModel,
    folder: Path,
    names: Names,
    on_disk: list[str],
    single: type[nn.Linear] | None = None,
) -> None:
    """Replaces each merged experts module that lies on disk expert by expert, and tells `names`. single: the class of
    the single linears, torch's own by default."""
    from torch import nn

    single = single or nn.Linear
    found: dict[str, dict[str, dict[int, str]]] = {}
    for name in on_disk:
        inner = names.tensor(name)
        if inner not in names.known and (merged := names.merged(inner)) and merged[0] in names.known:
            path, _, parameter = merged[0].rpartition(".")
            linear = inner.removesuffix(".weight").rpartition(".")[2]
            found.setdefault(path, {}).setdefault(parameter, {})[merged[1]] = linear
    for path, parameters in found.items():
        rule = model.get_submodule(path)
        # Another way to compute the experts must be refused, not guessed at.
        plain = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False}
        plain["has_post_expert_norm"] = False
        into, out_of = parameters.get("gate_up_proj", {}), parameters.get("down_proj", {})
        odd = (len(parameters), set(into), set(out_of)) != (2, {0, 1}, {0})
        if odd or any(getattr(rule, key, False) is not value for key, value in plain.items()):
            fault = f"the experts {path!r} are incomplete or of a kind that cannot be loaded ({type(rule).__name__})"
            raise SourceError(fault, where=str(folder), hint="quantize this model without its experts")
        model.set_submodule(path, experts_class()(rule, [into[0], into[1]], out_of[0], single))
    names.known = set(model.state_dict())
