"""Small models and texts for tests/test_eval*.py and test_gptq.py, one a kind of architecture."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

SIZES: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": None, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
KINDS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "gpt2": {"vocab_size": 260, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "bloom": {"vocab_size": 260, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "falcon": {"vocab_size": 260, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mistral": {**SIZES, "head_dim": 16, "sliding_window": None},
    "mixtral": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": SIZES,
    "qwen3": {**SIZES, "head_dim": 32},
    "qwen2_moe": {**SIZES, **MOE, "shared_expert_intermediate_size": 128},
    "qwen3_moe": {**SIZES, **MOE, "head_dim": 32},
    "deepseek_v3": {
        **SIZES,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
    },
    "gemma3_text": {**SIZES, "head_dim": 32, "sliding_window": 8, "final_logit_softcapping": 5.0},
}

MORE: dict[str, dict[str, Any]] = {
    "gptj": {"vocab_size": 260, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 16},
}


def build(folder: Path, kind: str = "llama", *, seed: int = 0, **changes: Any) -> Path:
    """A random float32 model with a tokenizer of one token a letter, whose weights are large enough to tell."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**(KINDS | MORE).get(kind, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim > 1 else 0.02))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(vocab={chr(i): i for i in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def text_of(letters: int) -> str:
    """Words that do not repeat too soon."""
    words = (f"{a} {b} of the {c}." for c in range(40) for a in ("red", "old", "far") for b in "abcdefgh")
    return " ".join(words)[:letters]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


# The peak is the kernel's own figure of this program alone: ru_maxrss would begin with what its parent had.
_MEASURE = """
import json, sys
import quantkit
text, options = sys.argv[1], json.loads(sys.argv[2])
for folder in sys.argv[3:]:
    found = quantkit.evaluate(folder, text, **options)
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(json.dumps([found.perplexity, int(peak.split()[1]) * 1024]))
"""


def measured(folders: list[Path], text: str, **options: Any) -> list[list[float]]:
    """Perplexity and peak RSS so far in bytes, of evaluations one after the other in a process of their own."""
    line = [sys.executable, "-c", _MEASURE, text, json.dumps(options), *map(str, folders)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
