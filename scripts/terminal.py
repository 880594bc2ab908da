"""Draws docs/terminal.svg: what a few commands print on the demo's model, as it is.

`terminal.py TEXT` runs them in a folder of its own, after `demo.py --model-only`; TEXT is what `eval` predicts. It
needs rich, which huggingface_hub brings along.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
MODEL = "SmolLM2-135M-Instruct"
COMMANDS = (
    f"quantkit plan {MODEL} --bits 8 | tail -8",
    f"quantkit quantize {MODEL} -o OUT --bits 8 --quiet",
    f"quantkit verify OUT --source {MODEL} --quiet",
    f"quantkit eval OUT --text text.txt --against {MODEL} --windows 4 --max-kl 0.05 --quiet",
)


def main() -> None:
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / MODEL).symlink_to(ROOT / ".demo" / MODEL)
        (work / "text.txt").write_bytes(Path(sys.argv[1]).read_bytes())
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        for command in COMMANDS:
            done = subprocess.run(
                ["sh", "-c", command], cwd=work, env={"PATH": path}, capture_output=True, text=True, check=True
            )
            console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
            console.print(Text(re.sub(r"(?m)\s+$", "", done.stdout)), soft_wrap=False)
            console.print()
    picture = console.export_svg(title="quantkit")
    picture = re.sub(r"@font-face \{.*?\}\n?", "", picture, flags=re.DOTALL)  # nothing is fetched to show it
    (ROOT / "docs" / "terminal.svg").write_text("\n".join(line.rstrip() for line in picture.splitlines()) + "\n")


if __name__ == "__main__":
    main()
