"""NF4 with double quantization of a 7B-shaped checkpoint: quantkit beside transformers + bitsandbytes, same machine,
same run. `bnb_7b.py [--data DIR] [--runs N] [--layers N]` prints the table that README.md keeps.

Every run starts with the source out of the page cache and ends with its output on disk (fsync). The third row is the
floor: `dd` reading the source, then `dd` writing as many bytes as quantkit writes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from measuring import DATA, evict, make_checkpoint, measure

PEER = """
import sys, torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                            bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, device_map="cpu",
                                             quantization_config=config)
model.save_pretrained(sys.argv[2])
"""


def floor(source: Path, out: Path, nbytes: int) -> float:
    out.mkdir(exist_ok=True)
    evict(source)
    started = time.monotonic()
    for path in sorted(source.glob("*.safetensors")):
        subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=16M"], check=True, stderr=subprocess.DEVNULL)
    write = ["dd", "if=/dev/zero", f"of={out}/zeros", "bs=16M", f"count={nbytes >> 24}", "conv=fdatasync"]
    subprocess.run(write, check=True, stderr=subprocess.DEVNULL)
    return time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="where the files go")
    parser.add_argument("--runs", type=int, default=3, help="runs of quantkit and of dd; the median counts")
    parser.add_argument("--layers", type=int, default=32, help="8 make a checkpoint of 4 GB")
    parser.add_argument("--no-peer", action="store_true", help="quantkit and dd only")
    arguments = parser.parse_args()
    source = make_checkpoint(arguments.data, arguments.layers)
    ours, theirs = arguments.data / "ours", arguments.data / "theirs"
    run = [sys.executable, "-m", "quantkit", "quantize", str(source), "-o", str(ours), "--quiet"]
    measure(run, source, ours)  # compiles the kernels, once for this machine
    results = [measure(run, source, ours) for _ in range(arguments.runs)]
    nbytes = sum(p.stat().st_size for p in ours.iterdir())
    floors = [floor(source, arguments.data / "dd", nbytes) for _ in range(arguments.runs)]
    shutil.rmtree(arguments.data / "dd")
    seconds, rss = (statistics.median(x) for x in zip(*results, strict=True))
    bottom = statistics.median(floors)
    planned = subprocess.run([*run[:3], "plan", str(source), "--json"], check=True, stdout=subprocess.PIPE).stdout
    peak = json.loads(planned)["memory"]["peak"] / 1e9
    if max(r for _, r in results) > peak:
        sys.exit(f"the plan was broken: {max(r for _, r in results):.2f} GB of RAM, {peak:.2f} GB planned")
    print("| | seconds | peak RSS | ratio |")
    print("|---|--:|--:|--:|")
    if not arguments.no_peer:
        peer_seconds, peer_rss = measure([sys.executable, "-c", PEER, str(source), str(theirs)], source, theirs)
        shutil.rmtree(theirs)
        print(
            f"| transformers + bitsandbytes | {peer_seconds:.1f} | {peer_rss:.2f} GB | {peer_seconds / seconds:.1f} |"
        )
    spread = f"{min(s for s, _ in results):.1f}–{max(s for s, _ in results):.1f}"
    print(f"| **quantkit** (median of {arguments.runs}, {spread}) | {seconds:.1f} | {rss:.2f} GB | 1 |")
    print(f"| dd: read the source, write the output | {bottom:.1f} | | {bottom / seconds:.2f} |")
    read = sum(p.stat().st_size for p in source.iterdir())
    print(f"\n{read / 1e9:.2f} GB → {nbytes / 1e9:.2f} GB on {os.cpu_count()} cores; planned peak {peak:.2f} GB")


if __name__ == "__main__":
    main()
