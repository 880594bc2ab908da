"""4-bit GPTQ of the real 135M model: quantkit's three efforts beside gptqmodel and AutoRound, in one run.

`gptq.py --calib valid.txt --text test.txt [--gptqmodel PYTHON] [--autoround PYTHON]` prints a table. The texts are
WikiText-2's, tokenized form: 32 · 1,024 tokens of the first are calibrated on, perplexity is that of the first
12 · 1,024 tokens of the second; --model, --bits, --group, --samples, --length and --windows change it. Peers need
environments of their own: `make interop` builds gptqmodel's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GPTQMODEL = """
import sys
from gptqmodel import GPTQModel, QuantizeConfig
from transformers import AutoTokenizer
source, out, text = sys.argv[1:4]
bits, group, samples, length = map(int, sys.argv[4:])
ids = AutoTokenizer.from_pretrained(source)(open(text).read(), return_tensors="pt").input_ids[0]
rows = [dict(input_ids=ids[i * length:(i + 1) * length].tolist(), attention_mask=[1] * length) for i in range(samples)]
model = GPTQModel.load(source, QuantizeConfig(bits=bits, group_size=group, desc_act=False, sym=True), device="cpu")
model.quantize(rows, batch_size=1)
model.save(out)
"""
AUTOROUND = """
import sys
from auto_round import AutoRound
from transformers import AutoTokenizer
source, out, text = sys.argv[1:4]
bits, group, samples, length = map(int, sys.argv[4:])
tokenizer = AutoTokenizer.from_pretrained(source)
ids = tokenizer(open(text).read(), return_tensors="pt").input_ids[0]
rows = [ids[i * length:(i + 1) * length][None] for i in range(samples)]
AutoRound(source, tokenizer=tokenizer, bits=bits, group_size=group, sym=True, iters=200, nsamples=samples,
          seqlen=length, batch_size=2, dataset=rows, device_map="cpu",
          low_gpu_mem_usage=False).quantize_and_save(out, format="auto_gptq")
"""


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds and peak RSS in GB of a whole process."""
    started = time.monotonic()
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=variables)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command[:6])}")
    return time.monotonic() - started, usage.ru_maxrss / 1e6


def perplexity(folder: Path, text: Path, windows: int, length: int) -> float:
    return float(evaluation(folder, text, windows, length)["perplexity"])


def evaluation(folder: Path, text: Path, windows: int, length: int, against: Path | None = None) -> dict[str, Any]:
    """In a process of its own: a child's peak RSS begins with what its parent holds."""
    words = ["eval", str(folder), "--text", str(text), "--windows", str(windows), "--length", str(length), "--json"]
    words += ["--against", str(against)] if against else []
    done = subprocess.run([sys.executable, "-m", "quantkit", *words], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".demo/SmolLM2-135M-Instruct"))
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--gptqmodel", help="Python of an environment with gptqmodel")
    parser.add_argument("--autoround", help="Python of an environment with auto-round")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--efforts", default="low,default,high")
    a = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="gptq-135m-"))
    text = work / "text.txt"  # as language models know the spelling
    text.write_text(a.text.read_text().replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", "."))
    jobs: dict[str, list[str]] = {}
    for effort in a.efforts.split(","):
        jobs[f"quantkit --effort {effort}"] = [
            sys.executable, "-m", "quantkit", "quantize", str(a.model), "-o", str(work / effort), "--method", "gptq",
            "--bits", str(a.bits), "--group-size", str(a.group), "--calib", str(a.calib), "--calib-samples",
            str(a.samples), "--calib-length", str(a.length),
            "--effort", effort, "--quiet",
        ]  # fmt: skip
    for name, python, code in (("gptqmodel", a.gptqmodel, GPTQMODEL), ("AutoRound", a.autoround, AUTOROUND)):
        if python:
            arguments = [str(a.model), str(work / name), str(a.calib)]
            arguments += map(str, (a.bits, a.group, a.samples, a.length))
            jobs[name] = [python, "-c", code, *arguments]
    print("| | seconds | peak RSS | perplexity |\n|---|--:|--:|--:|", flush=True)
    for name, command in jobs.items():
        seconds, rss = timed(command)
        out = Path(command[command.index("-o") + 1]) if "-o" in command else work / name
        out = next((path.parent for path in out.rglob("config.json")), out)  # AutoRound makes a folder in it
        try:
            found = perplexity(out, text, a.windows, a.length)
        except Exception as e:  # a peer's folder that we cannot read is no reason to lose the timing
            print(f"{name}: {e}", file=sys.stderr)
            found = math.nan
        print(f"| {name} | {seconds:.0f} | {rss:.2f} GB | {found:.3f} |", flush=True)
    print(f"| unquantized | | | {perplexity(a.model, text, a.windows, a.length):.3f} |")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
