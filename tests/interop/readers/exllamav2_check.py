"""Reads an EXL2 folder with exllamav2's own Python code, as far as that needs no GPU: exllamav2_check.py FOLDER OUT.

Its configuration, its search for the tensors that an architecture must have, its modules and its way of loading a
linear's tensors are exllamav2's. Replaced is its extension: reading a tensor's bytes, and `make_q_matrix`, whose checks
(ext_qmatrix.cpp) are made here, and whose result is the matrix that the kernels compute, in fp16 and in their order.
OUT.json gets what the configuration was read as, OUT.safetensors every linear [out, in]. It runs where quantkit is not
installed.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file


def stloader_read(file: str, offset: int, size: int, tensor: torch.Tensor) -> None:
    with Path(file).open("rb") as f:
        f.seek(offset)
        raw = np.frombuffer(f.read(size), np.uint8).copy()
    tensor.reshape(-1).view(torch.uint8)[:] = torch.from_numpy(raw)


def q_matrix(w: dict[str, torch.Tensor], inputs: int) -> torch.Tensor:
    """Checks of `make_q_matrix` and its constructor, then float16 [in, out]."""
    words, scales, maxima, table = w["q_weight"], w["q_scale"], w["q_scale_max"], w["q_groups"]
    assert words.dtype == torch.int32
    assert scales.dtype == torch.int32
    assert maxima.dtype == torch.float16
    assert table.dtype == torch.int16
    assert words.shape[1] == 8 * scales.shape[1]
    assert maxima.shape[0] == scales.shape[0]
    assert "bias" not in w or (w["bias"].dtype == torch.float16 and w["bias"].shape[0] == words.shape[1])
    unit = maxima * (1 / 256)
    perm = w["q_perm"].short()
    rows = []
    groups = table.tolist()
    for g in range(len(maxima)):
        bits, first = groups[2 * g], groups[2 * g + 1]
        last = groups[2 * g + 3] if g + 1 < len(maxima) else len(words)
        part = words[first:last].numpy().view(np.uint32).astype(np.uint64)
        nibbles = np.stack([(scales[g].numpy().view(np.uint32) >> np.uint32(4 * i)) & 15 for i in range(8)], 1)
        squares = torch.from_numpy(((nibbles.reshape(-1).astype(np.int64) + 1) ** 2).astype(np.float16))
        scale = squares * unit[g]
        for r in range((last - first) * 32 // bits):
            word, shift = divmod(r * bits, 32)
            pair = part[word] | ((part[word + 1] if word + 1 < len(part) else np.uint64(0)) << np.uint64(32))
            code = (pair >> np.uint64(shift)) & np.uint64(2**bits - 1)
            level = torch.from_numpy((code.astype(np.int64) - 2 ** (bits - 1)).astype(np.float16))
            rows.append(level * scale)
    assert len(rows) == inputs == len(perm), "incompatible shapes"
    found = torch.empty(len(rows), words.shape[1], dtype=torch.float16)
    found[perm.long() & 0xFFFF] = torch.stack(rows)
    return found


def main() -> None:
    folder, out = sys.argv[1], sys.argv[2]
    extension: Any = types.ModuleType("exllamav2.ext")
    extension.none_tensor = torch.empty((1, 1), device="meta")
    extension.exllamav2_ext = types.SimpleNamespace(stloader_read=stloader_read)
    extension.make_q_matrix = None
    sys.modules["exllamav2.ext"] = extension
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
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
