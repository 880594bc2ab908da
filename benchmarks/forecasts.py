"""What `plan --profile` says a job takes, beside what it takes: `forecasts.py --calib valid.txt [--big FOLDER]`.

Measures the machine's rates, then runs NF4 (of --big, which `make_7b.py` makes), and GPTQ and Wanda on a small
real model. Each is run --runs times; the median is shown.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUANTKIT = [sys.executable, "-m", "quantkit"]


def run(*words: str) -> str:
    return subprocess.run([*QUANTKIT, *words], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".demo/SmolLM2-135M-Instruct"))
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--big", type=Path)
    parser.add_argument("--runs", type=int, default=1)
    a = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="forecasts-", dir=Path.cwd()))
    profile, out = work / "rates.json", work / "out"
    run("doctor", "--calibrate", str(profile), "--quiet")
    text = {"text": str(a.calib), "samples": a.samples, "length": 1024}
    jobs = {
        "GPTQ": {"source": str(a.model), "quantize": {"method": "gptq", "bits": 4}, "calibration": text},
        "Wanda": {"source": str(a.model), "prune": {"method": "wanda", "sparsity": 0.5}, "calibration": text},
    }
    if a.big is not None:
        jobs = {"NF4": {"source": str(a.big), "quantize": {"method": "bnb", "bits": 4}}, **jobs}
    print("| | forecast, seconds | took | |\n|---|--:|--:|--:|", flush=True)
    for name, table in jobs.items():
        recipe = work / "recipe.yaml"
        recipe.write_text(json.dumps({**table, "output": str(out)}))
        said = json.loads(run("plan", "--recipe", str(recipe), "--profile", str(profile), "--json"))
        expected = said["forecast"]["total_seconds"]
        times = []
        for _ in range(a.runs):
            shutil.rmtree(out, ignore_errors=True)
            begun = time.monotonic()
            run("run", str(recipe), "--quiet")
            times.append(time.monotonic() - begun)
        took = statistics.median(times)
        print(f"| {name} | {expected:.1f} | {took:.1f} | {expected / took - 1:+.0%} |", flush=True)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
