"""Loads folders with a reader of another environment, and notes what it makes of them: read.py READER OUT FOLDER...

For each folder OUT/NAME.npz gets the weight of every linear, as the layer itself applies it (identity in, weights out),
and the logits of a fixed input. It runs where quantkit is not installed.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch


def gptqmodel(folder: str) -> Any:
    from gptqmodel import BACKEND, GPTQModel

    return GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model


def transformers(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32)


def autogptq(folder: str) -> Any:
    from auto_gptq import AutoGPTQForCausalLM

    return AutoGPTQForCausalLM.from_quantized(
        folder, device="cpu", torch_dtype=torch.float32, use_safetensors=True, disable_exllama=True,
        disable_exllamav2=True,
    ).model  # fmt: skip


def main() -> None:
    reader, out = {"gptqmodel": gptqmodel, "transformers": transformers, "autogptq": autogptq}[sys.argv[1]], sys.argv[2]
    failed = 0
    for folder in sys.argv[3:]:
        try:
            model = reader(folder)
            found: dict[str, Any] = {}
            with torch.no_grad():
                # First: compressed-tensors unpacks its layers when the model is first run.
                found["logits"] = model(torch.arange(3, 35)[None]).logits.float().numpy()
                for name, module in model.named_modules():
                    width = getattr(module, "in_features", None) or getattr(module, "infeatures", None)
                    if width is None or "layers." not in name:
                        continue
                    kind = next((p.dtype for p in model.parameters()), torch.float32)
                    plain = module(torch.zeros(1, 1, width, dtype=kind))
                    found[name] = (module(torch.eye(width, dtype=kind)[None]) - plain)[0].T.float().numpy()
            np.savez(Path(out) / Path(folder).name, **found)
        except Exception:
            failed += 1
            print(folder, file=sys.stderr)
            traceback.print_exc()
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
