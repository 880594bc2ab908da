"""Models with matrices of real width, few layers and any numbers; and a program's peak RAM, as the kernel counts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from quantkit.checkpoint.header import TensorSpec, build_header

Shapes = dict[str, tuple[int, ...]]

# Starts the program from a small process of its own: ru_maxrss begins with what the parent had at the fork.
MEASURE = """
import os, sys
pid = os.fork()
if pid == 0:
    os.execv(sys.executable, [sys.executable, "-m", "quantkit", *sys.argv[1:]])
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss * 1024)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def mistral(hidden: int, feed_forward: int, key_value: int, vocabulary: int) -> tuple[dict[str, Any], Shapes]:
    """config.json and shapes of one layer with embedding and head."""
    config = {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_size": hidden,
        "intermediate_size": feed_forward, "num_hidden_layers": 1, "num_attention_heads": hidden // 128,
        "num_key_value_heads": key_value // 128, "head_dim": 128, "vocab_size": vocabulary,
    }  # fmt: skip
    p = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        p + "self_attn.q_proj.weight": (hidden, hidden), p + "self_attn.k_proj.weight": (key_value, hidden),
        p + "self_attn.v_proj.weight": (key_value, hidden), p + "self_attn.o_proj.weight": (hidden, hidden),
        p + "mlp.gate_proj.weight": (feed_forward, hidden), p + "mlp.up_proj.weight": (feed_forward, hidden),
        p + "mlp.down_proj.weight": (hidden, feed_forward), p + "input_layernorm.weight": (hidden,),
        p + "post_attention_layernorm.weight": (hidden,), "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }  # fmt: skip
    return config, shapes


def write(folder: Path, config: dict[str, Any], shapes: Shapes, dtype: str) -> Path:
    """Normal numbers, repeated from a pool: fast to make, and no sparse file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    values = np.random.default_rng(0).standard_normal(4_000_003, np.float32) * np.float32(0.02)
    pool = (values.view(np.uint32) >> 16).astype(np.uint16) if dtype == "BF16" else values
    specs = [TensorSpec(name, dtype, shape) for name, shape in shapes.items()]
    with (folder / "model.safetensors").open("wb") as f:
        f.write(build_header(specs)[0])
        for spec in specs:
            for left in range(spec.numel, 0, -pool.size):
                f.write(pool[: min(left, pool.size)])
    return folder
