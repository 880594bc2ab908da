"""Quality against size: EXL2 and mixed GPTQ beside uniform GPTQ and NF4, as a table.

`mixed_bits.py --calib valid.txt --text test.txt` quantizes the real SmolLM2-135M in every way named, and prints bits
per weight of its linears as they lie on disk, seconds, peak RSS, perplexity, and the KL divergence from the model as it
was, in nats a token. What linears lose is measured once for
each method that mixes bits, in a row of its own. --model, --samples, --length, --seed, --windows and --effort change
what is run; --exl2, --mixed, --uniform and --nf4 what of it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gptq import evaluation, perplexity, timed

QUANTKIT = [sys.executable, "-m", "quantkit"]


def measurement(a: argparse.Namespace, method: str, calibration: list[str], work: Path) -> Path:
    path = (a.keep or work) / f"{method}.json"
    if not path.exists():
        command = ["measure", str(a.model), "-o", str(path), "--method", method, *calibration, "--quiet"]
        seconds, rss = timed([*QUANTKIT, *command])
        print(f"| {method} | measuring | | {seconds:.0f} | {rss:.2f} GB | | |", flush=True)
    return path


def jobs(a: argparse.Namespace, work: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(method, what is asked of it, options)"""
    calibration = ["--calib", str(a.calib), "--calib-samples", str(a.samples), "--calib-length", str(a.length)]
    calibration += ["--calib-seed", str(a.seed)] if a.seed is not None else []
    solved = [*calibration, "--effort", a.effort]
    for method, wanted in (("exl2", a.exl2), ("gptq", a.mixed)):
        if wanted:
            measured = ["--measurement", str(measurement(a, method, calibration, work))]
        for bits in filter(None, wanted.split(",")):
            named = "exl2" if method == "exl2" else "gptq, mixed"
            yield named, bits, ["--method", method, "--bits", bits, *measured, *solved]
    for form in filter(None, a.uniform.split(",")):
        bits, _, group = form.partition("_")
        yield "gptq", form, ["--method", "gptq", "--bits", bits, "--group-size", group, *solved]
    if a.nf4:
        yield "bnb", "nf4", ["--method", "bnb", "--bits", "4"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".demo/SmolLM2-135M-Instruct"))
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--keep", type=Path, help="a folder where measurements are kept, and found again")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seed", type=int, help="draw the rows; otherwise they are taken from the beginning")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--effort", default="default")
    parser.add_argument("--exl2", default="2.5,3,3.5,4,5,6", help="bits per weight")
    parser.add_argument("--mixed", default="2.5,3,3.5,4,5,6", help="bits per weight of mixed GPTQ")
    parser.add_argument("--uniform", default="2_64,3_64,4_64,8_64", help="bits and group size of uniform GPTQ")
    parser.add_argument("--nf4", action="store_true")
    a = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="mixed-"))
    text = work / "text.txt"  # as language models know the spelling
    text.write_text(a.text.read_text().replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", "."))
    print(
        "| | asked for | bits per weight | seconds | peak RSS | perplexity | KL |\n|---|---|--:|--:|--:|--:|--:|",
        flush=True,
    )
    for method, asked, options in jobs(a, work):
        out = work / "out"
        seconds, rss = timed([*QUANTKIT, "quantize", str(a.model), "-o", str(out), *options, "--quiet"])
        bits = json.loads((out / "quantkit.json").read_text())["result"]["bits_per_weight"]
        found = evaluation(out, text, a.windows, a.length, a.model)
        quality = f"{found['perplexity']:.3f} | {found['against']['kl']:.4f}"
        print(f"| {method} | {asked} | {bits:.3f} | {seconds:.0f} | {rss:.2f} GB | {quality} |", flush=True)
        shutil.rmtree(out)
        Path(f"{out}.measurement.json").unlink(missing_ok=True)
    print(f"| unquantized | | 16 | | | {perplexity(a.model, text, a.windows, a.length):.3f} | 0 |")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
