"""Wanda on a whole model, slow and obvious: the paper's mask of each linear, from what transformers' own forward pass
gives it behind those before it: attention's one after the other, the feed-forward part's together. Imports nothing of
quantkit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from oracle import pruning

ORDER = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj", "down_proj"))


def wanda(model: Any, layers: Any, rows: torch.Tensor, sparsity: float) -> None:
    """Prunes every linear of a Llama's decoder layers in place. rows: token ids [rows, length]."""
    for layer in layers:
        for kinds in ORDER:
            linears = [m for n, m in layer.named_modules() if n.rpartition(".")[2] in kinds]
            assert len(linears) == len(kinds)
            inputs: list[list[np.ndarray[Any, Any]]] = [[] for _ in linears]
            notes = [
                module.register_forward_pre_hook(
                    lambda _, args, into=into: into.append(args[0].detach().flatten(0, -2).double().numpy())
                )
                for module, into in zip(linears, inputs, strict=True)
            ]
            with torch.no_grad():
                for row in rows:
                    model(row[None])
            for note in notes:
                note.remove()
            for module, got in zip(linears, inputs, strict=True):
                keep = pruning.wanda(module.weight.detach().double().numpy(), np.concatenate(got), sparsity)
                module.weight.data[~torch.from_numpy(keep)] = 0
