"""Prunes a model with llm-compressor, and notes what it went by: llmcompressor_prune.py SOURCE IDS OUT METHOD=AMOUNT...

IDS is an .npy of token ids [rows, length]. For each METHOD=AMOUNT (wanda or sparsegpt; a sparsity or N:M) the file
OUT/METHOD=AMOUNT.safetensors gets, of every pruned linear, NAME.weight as it became and NAME.inputs [tokens, in], those
that it was pruned by. It runs where quantkit is not installed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

SEEN: dict[torch.nn.Module, list[torch.Tensor]] = {}


def recording(kind: Any) -> Any:
    """The modifier, with its hook noting what it is given: its layers are also run where it does not look."""
    own = kind.calibrate_module

    def calibrate_module(self: Any, module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
        SEEN.setdefault(module, []).append(args[0].reshape(-1, args[0].shape[-1]).clone())
        own(self, module, args, output)

    kind.calibrate_module = calibrate_module
    return kind


def main() -> None:
    source, out = sys.argv[1], Path(sys.argv[3])
    kinds = {"wanda": recording(WandaPruningModifier), "sparsegpt": recording(SparseGPTModifier)}
    ids = torch.from_numpy(np.load(sys.argv[2]))
    rows: Any = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    for case in sys.argv[4:]:
        method, amount = case.split("=")
        if ":" in amount:
            pruned, of = map(int, amount.split(":"))
            options: dict[str, Any] = {"sparsity": pruned / of, "mask_structure": amount}
        else:
            options = {"sparsity": float(amount)}
        SEEN.clear()
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        recipe = kinds[method](targets=["Linear"], ignore=["re:.*lm_head"], **options)
        # Already tokenized rows, one a batch: no data set is read, and none is shuffled.
        data = DataLoader(rows, batch_size=None)
        oneshot(model=model, dataset=data, recipe=recipe, pipeline="sequential", num_calibration_samples=len(rows))
        names = {module: name for name, module in model.named_modules()}
        found = {}
        for module, inputs in SEEN.items():
            found[f"{names[module]}.weight"] = module.weight.detach().contiguous()
            found[f"{names[module]}.inputs"] = torch.cat(inputs)
        save_file(found, out / f"{case}.safetensors")


if __name__ == "__main__":
    main()
