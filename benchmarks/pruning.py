"""Pruning of the real 135M model: quantkit's methods beside llm-compressor's, in one run.

`pruning.py --calib valid.txt --text test.txt [--llmcompressor PYTHON] [--joint]` prints a table. The texts are
WikiText-2's, tokenized form: 32 · 1,024 tokens of the first are calibrated on, perplexity is that of the first
12 · 1,024 tokens of the second; --model, --samples, --length and --windows change it. Both sides see the same rows of
token ids. llm-compressor needs an environment of its own (`make interop` builds it); as for its users it computes in
the checkpoint's dtype, unless --peer-dtype names another. quantkit's linears multiply in bfloat16 where the processor
does so, and in float32 elsewhere: masks are not the same to the bit where the two differ in this.

--joint prints a second table, of 50 % and 2:4 with 4-bit GPTQ: weights pruned and rounded in one solve, and a folder
that is pruned, then quantized. Its last column says in how many groups of a pattern too few weights are still zero.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from gptq import perplexity, timed

from quantkit.calibration.data import Calibration, load_tokens
from quantkit.layouts import open_checkpoint
from quantkit.restored import RestoredWeights, open_files

LLMCOMPRESSOR = """
import sys
import numpy as np
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
source, out, rows, method, amount, dtype = sys.argv[1:7]
tokenizer = AutoTokenizer.from_pretrained(source)
rows = [torch.from_numpy(row)[None].long() for row in np.load(rows)]
samples = len(rows)
rows = [dict(input_ids=row, attention_mask=torch.ones_like(row)) for row in rows]
kind = dict(wanda=WandaPruningModifier, sparsegpt=SparseGPTModifier)[method]
if ":" in amount:
    pruned, of = map(int, amount.split(":"))
    recipe = kind(sparsity=pruned / of, mask_structure=amount, targets=["Linear"], ignore=["re:.*lm_head"])
else:
    recipe = kind(sparsity=float(amount), targets=["Linear"], ignore=["re:.*lm_head"])
model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
# Rows that are token ids already, one a batch: nothing is read, shuffled or padded.
oneshot(model=model, tokenizer=tokenizer, dataset=DataLoader(rows, batch_size=None), recipe=recipe,
        pipeline="sequential", num_calibration_samples=samples, output_dir=out)
"""
LINEAR = re.compile(r"\b(layers|h)\.\d+\..*\.weight$")


def zeros(folder: Path, pattern: str | None = None) -> tuple[float, int, int]:
    """Of the decoder layers' linears, decoded: the part that is zero; groups of the pattern in which fewer weights are
    zero than it asks for, and all groups."""
    pruned, of = map(int, pattern.split(":")) if pattern else (0, 1)
    zero = weights = short = groups = 0
    checkpoint = open_checkpoint(folder)
    with open_files(checkpoint) as files:
        restored = RestoredWeights(checkpoint, files)
        for name in restored.names:
            if not LINEAR.search(name) or (weight := restored.read(name)).ndim != 2:
                continue
            gone = weight == 0
            zero, weights = zero + int(gone.sum()), weights + gone.numel()
            here = gone.reshape(-1, of).sum(1)
            short, groups = short + int((here < pruned).sum()), groups + len(here)
    return zero / weights, short, groups


def row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


class Runs:
    """Every run of one table: what it takes, and what its folder is worth."""

    def __init__(self, a: argparse.Namespace, work: Path) -> None:
        self.a, self.work = a, work
        self.text = work / "text.txt"  # as language models know the spelling
        spelling = a.text.read_text().replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".")
        self.text.write_text(spelling)
        self.rows = work / "rows.npy"
        counts = Calibration(text=str(a.calib), samples=a.samples, length=a.length)
        np.save(self.rows, load_tokens(counts, a.model, vocab_size=2**31, context=None).ids)

    def perplexity(self, folder: Path) -> str:
        return f"{perplexity(folder, self.text, self.a.windows, self.a.length):.3f}"

    def calibration(self, method: str) -> list[str]:
        """magnitude looks at no text."""
        if method == "magnitude":
            return []
        counts = ["--calib-samples", str(self.a.samples), "--calib-length", str(self.a.length)]
        return ["--calib", str(self.a.calib), *counts]

    def prune(self, method: str, amount: str, out: Path) -> tuple[float, float]:
        """Seconds and peak RSS in GB."""
        much = ["--pattern" if ":" in amount else "--sparsity", amount]
        options = ["-o", str(out), "--method", method, *much, *self.calibration(method), "--quiet"]
        return timed([sys.executable, "-m", "quantkit", "prune", str(self.a.model), *options])

    def peer(self, method: str, amount: str, out: Path) -> tuple[float, float]:
        arguments = [str(self.a.model), str(out), str(self.rows), method, amount, self.a.peer_dtype]
        return timed([self.a.llmcompressor, "-W", "ignore", "-c", LLMCOMPRESSOR, *arguments])

    def pruned(self) -> None:
        side = "seconds | peak RSS | perplexity | sparsity"
        peer = side.replace("seconds", "llm-compressor: seconds")
        print(f"| | | quantkit: {side} | {peer} |\n|---|---|{'--:|' * 8}", flush=True)
        for method in self.a.methods.split(","):
            for amount in self.a.amounts.split(","):
                cells = [method, amount_name(amount)]
                for run in (self.prune, self.peer):
                    if run == self.peer and (method == "magnitude" or not self.a.llmcompressor):
                        cells += [""] * 4
                        continue
                    out = self.work / "out"
                    seconds, rss = run(method, amount, out)
                    cells += [f"{seconds:.0f}", f"{rss:.2f} GB", self.perplexity(out), f"{100 * zeros(out)[0]:.3f} %"]
                    shutil.rmtree(out)
                row(*cells)
        dense = self.perplexity(self.a.model)
        row("dense", "", "", "", dense, f"{100 * zeros(self.a.model)[0]:.3f} %", "", "", "", "")

    def joint(self) -> None:
        print("\n| | 4-bit GPTQ and | | seconds | peak RSS | perplexity | sparsity | groups with too few zeros |")
        print(f"|---|---|---|{'--:|' * 5}", flush=True)
        for method in ("wanda", "sparsegpt"):
            for amount in ("0.5", "2:4"):
                for how, run in (("one solve", self.one_solve), ("stacked", self.stacked)):
                    out = self.work / "joint"
                    seconds, rss = run(method, amount, out)
                    part, short, groups = zeros(out, amount if ":" in amount else None)
                    cells = [method, amount_name(amount), how, f"{seconds:.0f}", f"{rss:.2f} GB", self.perplexity(out)]
                    row(*cells, f"{100 * part:.3f} %", f"{short:,} of {groups:,}" if ":" in amount else "")
                    shutil.rmtree(out)

    def one_solve(self, method: str, amount: str, out: Path) -> tuple[float, float]:
        much = {"pattern": amount} if ":" in amount else {"sparsity": float(amount)}
        table = {
            "source": str(self.a.model),
            "prune": {"method": method, **much},
            "quantize": {"method": "gptq", "bits": 4, "group_size": 64},
            "calibration": {"text": str(self.a.calib), "samples": self.a.samples, "length": self.a.length},
        }
        recipe = self.work / "recipe.yaml"
        recipe.write_text(json.dumps(table))  # JSON is YAML, too
        return timed([sys.executable, "-m", "quantkit", "run", str(recipe), "-o", str(out), "--quiet"])

    def stacked(self, method: str, amount: str, out: Path) -> tuple[float, float]:
        """The seconds of both runs, and the larger peak."""
        between = self.work / "pruned"
        first = self.prune(method, amount, between)
        options = ["-o", str(out), "--method", "gptq", "--bits", "4", "--group-size", "64", *self.calibration("gptq")]
        second = timed([sys.executable, "-m", "quantkit", "quantize", str(between), *options, "--quiet"])
        shutil.rmtree(between)
        return first[0] + second[0], max(first[1], second[1])


def amount_name(amount: str) -> str:
    return amount if ":" in amount else f"{100 * float(amount):g} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".demo/SmolLM2-135M-Instruct"))
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--llmcompressor", help="Python of an environment with llm-compressor")
    parser.add_argument("--peer-dtype", default="auto", help="auto is the checkpoint's; or float32, bfloat16")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--methods", default="magnitude,wanda,sparsegpt", help="empty for the table of --joint alone")
    parser.add_argument("--amounts", default="0.02,0.1,0.3,0.5,2:4,4:8")
    parser.add_argument("--joint", action="store_true")
    a = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="pruning-135m-"))
    runs = Runs(a, work)
    if a.methods:
        runs.pruned()
    if a.joint:
        runs.joint()
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
