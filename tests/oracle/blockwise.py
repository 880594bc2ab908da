"""Wanda on a whole model, slow and obvious, from the paper: transformers' own forward pass, one block after another.
Imports nothing of quantkit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from oracle import pruning


def wanda(model: Any, layers: Any, rows: torch.Tensor, sparsity: float) -> None:
    """Prunes every linear of the decoder layers in place. rows: token ids [rows, length]."""
    for layer in layers:
        linears = {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
        inputs: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in linears}

        def note(into: list[np.ndarray[Any, Any]]) -> Any:
            return lambda _, args: into.append(args[0].detach().flatten(0, -2).double().numpy())

        hooks = [module.register_forward_pre_hook(note(inputs[name])) for name, module in linears.items()]
        with torch.no_grad():
            for row in rows:
                model(row[None])
        for hook in hooks:
            hook.remove()
        for name, module in linears.items():  # all from the block as it was
            weight = module.weight.detach().double().numpy()
            keep = pruning.wanda(weight, np.concatenate(inputs[name]), sparsity)
            module.weight.data[~torch.from_numpy(keep)] = 0
