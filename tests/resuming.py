"""What tests of killed and resumed runs share: a source of 130 MB, moments for a signal, and looks at what is left."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import warm

from quantkit.checkpoint.header import TensorSpec, build_header
from quantkit.errors import Interrupted
from quantkit.layer_runner import Written
from quantkit.layouts.hf import index_text

HIDDEN, FEED_FORWARD, KEY_VALUE, VOCABULARY, LAYERS = 1024, 3584, 256, 4000, 4
UNITS = 9 * LAYERS + 3
OPTIONS = ("--threads", "1", "--shard-size", "12MB", "--quiet")
Moment = Callable[[Path], bool]

# Runs quantkit and sends it a signal right after its n-th rename: every commit of a file is one.
SIGNAL_AFTER_RENAME = """
import os, sys
left, what, rename = int(sys.argv.pop(1)), int(sys.argv.pop(1)), os.replace
def replace(source, target):
    global left
    rename(source, target)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), what)
os.replace = replace
from quantkit.cli import main
main()
"""


def make_source(folder: Path) -> Path:
    """130 MB in Mistral's shape, four shards and what usually lies beside them."""
    folder.mkdir()
    linears = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEY_VALUE, HIDDEN),
               "self_attn.v_proj": (KEY_VALUE, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
               "mlp.gate_proj": (FEED_FORWARD, HIDDEN), "mlp.up_proj": (FEED_FORWARD, HIDDEN),
               "mlp.down_proj": (HIDDEN, FEED_FORWARD), "input_layernorm": (HIDDEN,),
               "post_attention_layernorm": (HIDDEN,)}  # fmt: skip
    shards: list[dict[str, tuple[int, ...]]] = [
        {f"model.layers.{i}.{name}.weight": shape for name, shape in linears.items()} for i in range(LAYERS)
    ]
    shards[0] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), **shards[0]}
    shards[-1] |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    values = np.random.default_rng(0).standard_normal(VOCABULARY * HIDDEN + UNITS, np.float32) * np.float32(0.02)
    pool = (values.view(np.uint32) >> 16).astype(np.uint16)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        specs = [TensorSpec(tensor, "BF16", shape) for tensor, shape in shapes.items()]
        with (folder / name).open("wb") as f:
            f.write(build_header(specs)[0])
            for spec in specs:
                start = len(weight_map)  # no two tensors alike
                f.write(pool[start : start + spec.numel])
                weight_map[spec.name] = name
                total += spec.nbytes
    (folder / "model.safetensors.index.json").write_bytes(index_text(weight_map, total))
    config = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": HIDDEN,
        "intermediate_size": FEED_FORWARD, "num_hidden_layers": LAYERS, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 128, "vocab_size": VOCABULARY, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"model": {}}\n')
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}\n')
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Parent\n")
    return folder


def at(process: warm.Process, out: Path, moment: Moment, what: signal.Signals) -> None:
    """Sends the signal as soon as the moment has come; nothing if the process ends before."""
    deadline = time.monotonic() + 60
    while process.poll() is None and not moment(out):
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    if process.poll() is None:
        process.send_signal(what)


def interrupted(run: Callable[[], object], noted: int) -> None:
    """Runs something with a text, and interrupts it where it would note that another layer than so many is finished."""
    note, left = Written.note, [noted]

    def stop(self: Written, entry: Mapping[str, Any]) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        note(self, entry)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Written, "note", stop)
        with pytest.raises(Interrupted):
            run()


def flip(path: Path, offset: int) -> None:
    """Alters a bit of the byte there."""
    with path.open("r+b") as f:
        f.seek(offset)
        (byte,) = f.read(1)
        f.seek(offset)
        f.write(bytes([byte ^ 1]))


def journal_lines(out: Path) -> int:
    try:
        return (out / ".quantkit" / "journal").read_bytes().count(b"\n")
    except OSError:
        return 0


def lines(n: int) -> Moment:
    return lambda out: journal_lines(out) >= n


def delay(seconds: float) -> Moment:
    end: list[float] = []

    def moment(_: Path) -> bool:
        end.append(time.monotonic() + seconds)
        return time.monotonic() >= end[0]

    return moment


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 by relative path, of every file at any depth."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def assert_three_lines(stderr: str, *words: str) -> None:
    found = stderr.rstrip().split("\n")
    assert len(found) == 3, stderr
    assert found[0].startswith("error: ")
    assert found[1].startswith("  in: ")
    assert found[2].startswith("  hint: ")
    for word in words:
        assert word in stderr


def truncate(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size // 2)


def modify(shard: Path) -> None:
    with shard.open("r+b") as f:
        f.seek(-4, os.SEEK_END)
        f.write(b"\0\0\0\0")


def replace(shard: Path) -> None:
    other = shard.with_name("download.tmp")
    shutil.copyfile(shard, other)
    os.replace(other, shard)
