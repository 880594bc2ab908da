"""The RAM that `eval` announces is what it keeps to: one layer of two models, never a model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from eval_models import quiet_transformers, text_of
from tokenizers import Tokenizer, models, pre_tokenizers
from wide_models import MEASURE, write

import quantkit
from quantkit.memory import MIB

LAYERS = 20


def llama(folder: Path) -> Path:
    """LAYERS layers of 50 MB in float32, a head of 64 MB."""
    hidden, feed_forward, vocabulary = 1024, 2752, 16_000
    config: dict[str, Any] = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
        "intermediate_size": feed_forward, "num_hidden_layers": LAYERS, "num_attention_heads": 8,
        "num_key_value_heads": 8, "vocab_size": vocabulary, "max_position_embeddings": 2048,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }  # fmt: skip
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        shapes |= {f"{p}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{p}mlp.{name}_proj.weight": (feed_forward, hidden) for name in ("gate", "up")}
        shapes |= {f"{p}mlp.down_proj.weight": (hidden, feed_forward)}
        shapes |= {f"{p}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    write(folder, config, shapes, "BF16")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(set(text_of(4000).split()))}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("length", [64, 1024])
def test_peak(length: int, tmp_path: Path) -> None:
    source, text = llama(tmp_path / "source"), tmp_path / "text.txt"
    text.write_text(f"{text_of(4000)} {text_of(4000)}")
    with quiet_transformers():
        quantkit.quantize(source, tmp_path / "out", {"quantize": {"bits": 4}})
    words = ["eval", str(tmp_path / "out"), "--text", str(text), "--against", str(source), "--no-record"]
    words += ["--windows", "2", "--length", str(length)]
    done = subprocess.run([sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = re.search(r"RAM at most ([\d.]+) (MB|GB)", done.stderr)
    assert said is not None
    planned = float(said[1]) * {"MB": 1e6, "GB": 1e9}[said[2]] + 5e6  # which it is rounded by
    peak, model = int(done.stdout.splitlines()[-1]), LAYERS * 50e6
    print(f"measured {peak / MIB:.0f} MiB, planned {planned / MIB:.0f} MiB")
    assert peak <= planned
    assert planned < peak + model, "it would hold a whole model"
