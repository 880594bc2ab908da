"""A 7B-shaped checkpoint to Mistral's own layout and back: quantkit, its check included, beside `cp` of the same bytes
and beside a script that does what those in circulation do. `convert_7b.py [--data DIR] [--runs N] [--layers N]` prints
the table that README.md keeps.

Every run starts with its source out of the page cache and ends with its output on disk (sync).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from measuring import DATA, make_checkpoint, measure

# Native to Hugging Face with the whole state dict in RAM. No released program does the other direction.
WHOLE = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
source, out = Path(sys.argv[1]), Path(sys.argv[2])
params = json.loads((source / "params.json").read_text())
weights = load_file(source / "consolidated.safetensors")
def turned(w, heads):
    return w.view(heads, params["head_dim"] // 2, 2, -1).transpose(1, 2).reshape(w.shape)
for name in list(weights):
    if ".wq." in name: weights[name] = turned(weights[name], params["n_heads"])
    if ".wk." in name: weights[name] = turned(weights[name], params["n_kv_heads"])
out.mkdir()
save_file({f"model.{name}": w.contiguous() for name, w in weights.items()}, out / "model.safetensors")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="where the files go: four times the checkpoint")
    parser.add_argument("--runs", type=int, default=3, help="runs of each; the median counts")
    parser.add_argument("--layers", type=int, default=32, help="8 make a checkpoint of 4 GB")
    arguments = parser.parse_args()
    source = make_checkpoint(arguments.data, arguments.layers)
    native, pth, back, copy = (arguments.data / name for name in ("native", "native-pth", "back", "copy"))
    run = [sys.executable, "-m", "quantkit", "convert"]
    rest = ["--no-tokenizer", "--quiet", "-o"]
    cases = {
        "`cp`": (["cp", "-r", str(source), str(copy)], source, copy),
        "**HF → mistral, safetensors**": ([*run, str(source), "--to", "mistral", *rest, str(native)], source, native),
        "**mistral → HF**": ([*run, str(native), "--to", "hf", *rest, str(back)], native, back),
        "**HF → mistral, .pth**": (
            [*run, str(source), "--to", "mistral", "--weights-format", "pth", *rest, str(pth)], source, pth,
        ),
        "**mistral .pth → HF**": ([*run, str(pth), "--to", "hf", *rest, str(back)], pth, back),
        "whole state dict in RAM, mistral → HF": ([sys.executable, "-c", WHOLE, str(native), str(back)], native, back),
    }  # fmt: skip
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for number in range(arguments.runs):
        for name, (command, origin, out) in cases.items():
            if name.startswith("whole") and number:
                continue
            found[name].append(measure(command, origin, out))
            if out in (copy, back):  # room for the next
                shutil.rmtree(out)
    plan = [*run, str(source), "--to", "mistral", "--no-tokenizer", "--dry-run", "--json"]
    planned = json.loads(subprocess.run(plan, check=True, stdout=subprocess.PIPE).stdout)
    ours = [rss for name, results in found.items() if name.startswith("**") for _, rss in results]
    if max(ours) > planned["memory"]["peak"] / 1e9:
        sys.exit(f"the plan was broken: {max(ours):.2f} GB of RAM, {planned['memory']['peak'] / 1e9:.2f} GB planned")
    floor = statistics.median(seconds for seconds, _ in found["`cp`"])
    print("| | seconds | times `cp` | peak RSS |")
    print("|---|--:|--:|--:|")
    for name, results in found.items():
        seconds, rss = (statistics.median(x) for x in zip(*results, strict=True))
        spread = f" ({min(s for s, _ in results):.1f}–{max(s for s, _ in results):.1f})" if len(results) > 1 else ""
        print(f"| {name} | {seconds:.1f}{spread} | {seconds / floor:.2f} | {rss:.2f} GB |")
    read = sum(p.stat().st_size for p in source.iterdir())
    print(f"\n{read / 1e9:.2f} GB on {os.cpu_count()} cores; planned peak {planned['memory']['peak'] / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
