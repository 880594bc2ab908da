"""Wanda on a whole model, slow and obvious: the paper's mask of each linear, in the order of a layer, from what
transformers' own forward pass gives it behind those before it. Imports nothing of quantkit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from oracle import pruning

ORDER = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def wanda(model: Any, layers: Any, rows: torch.Tensor, sparsity: float) -> None:
    """Prunes every linear of a Llama's decoder layers in place. rows: token ids [rows, length]."""
    for layer in layers:
        for kinds in ORDER:
            linears = [m for n, m in layer.named_modules() if n.rpartition(".")[2] in kinds]
            assert len(linears) == len(kinds)
            inputs: list[np.ndarray[Any, Any]] = []
            note = linears[0].register_forward_pre_hook(
                lambda _, args, into=inputs: into.append(args[0].detach().flatten(0, -2).double().numpy())
            )
            with torch.no_grad():
                for row in rows:
                    model(row[None])
            note.remove()
            for module in linears:
                keep = pruning.wanda(module.weight.detach().double().numpy(), np.concatenate(inputs), sparsity)
                module.weight.data[~torch.from_numpy(keep)] = 0
