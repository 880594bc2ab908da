"""Reads an EXL2 folder with exllamav2's own Python code, as far as that needs no GPU: exllamav2_check.py FOLDER OUT.

Its configuration, its search for the tensors that an architecture must have, its modules and its way of loading a
linear's tensors are exllamav2's; its extension is exllamav2_cpu's.
OUT.json gets what the configuration was read as, OUT.safetensors every linear [out, in]. It runs where quantkit is not
installed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import exllamav2_cpu
import torch
from safetensors.torch import save_file


def q_matrix(w: dict[str, torch.Tensor], inputs: int) -> torch.Tensor:
    """float16 [in, out] of a linear's tensors as they lie in the file."""
    assert "bias" not in w or (w["bias"].dtype == torch.float16 and w["bias"].shape[0] == w["q_weight"].shape[1])
    unit = w["q_scale_max"] * (1 / 256)
    matrix = exllamav2_cpu.q_matrix(w["q_weight"], w["q_perm"].short(), w["q_scale"], unit, w["q_groups"])
    assert len(matrix) == inputs, "incompatible shapes"
    return matrix


def main() -> None:
    folder, out = sys.argv[1], sys.argv[2]
    exllamav2_cpu.install()
    from exllamav2 import ExLlamaV2, ExLlamaV2Config
    from exllamav2.linear import ExLlamaV2Linear

    config = ExLlamaV2Config(folder)
    model = ExLlamaV2(config)
    found: dict[str, torch.Tensor] = {}
    quantized = []
    for key, module in model.modules_dict.items():
        if not isinstance(module, ExLlamaV2Linear):
            continue
        w = module.load_weight(cpu=True)
        if isinstance(w, dict):
            assert ("bias" in w) == module.has_bias, key
            matrix = q_matrix(w, module.in_features)
            assert matrix.shape == (module.in_features, module.out_features + module.padding)
            found[f"{key}.weight"] = matrix.T.contiguous()
            quantized.append(key)
        else:
            dense = w[0] if isinstance(w, tuple) else w
            assert dense.dtype == torch.float16
    save_file(found, f"{out}.safetensors")
    read = {
        "rope": config.rotary_embedding_base, "scaling": config.alt_rope_method, "heads": config.num_attention_heads,
        "context": config.max_seq_len, "quantized": quantized,
    }  # fmt: skip
    Path(f"{out}.json").write_text(json.dumps(read))


if __name__ == "__main__":
    main()
