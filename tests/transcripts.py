"""docs/commands.md: commands, and what they print. `python tests/transcripts.py` runs it and writes it again."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from upload_server import TOKEN, serving

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "commands.md"
DATA = ROOT.parent / "shared" / "data"
BLOCK = re.compile(r"^```\n(\$ .*?)^```$", re.MULTILINE | re.DOTALL)
PROGRESS = re.compile(r" *\d+\.\d %  ")
LONGEST, FIRST, LAST = 24, 8, 14  # lines: of a longer text, those at its ends


def prepare(work: Path, page: str) -> None:
    """What the page speaks of: a model, two texts, and the recipe that it shows."""
    shutil.copytree(DATA / "stories15m-mistral-src", work / "stories15M-native")
    stories = (DATA / "text" / "tinystories.txt").read_text()
    (work / "calib.txt").write_text(stories[:100_000])
    (work / "eval.txt").write_text(stories[100_000:200_000])
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (work / "recipe.yaml").write_text(recipe)


def shell(work: Path, variables: Mapping[str, str]) -> Callable[[str], str]:
    """A function that runs a command in a folder, and gives what it printed. `echo $?` is the last one's code."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, **variables, "PATH": path, "PYTHONUNBUFFERED": "1"}  # errors where they belong
    code = 0

    def run(command: str) -> str:
        nonlocal code
        if command == "echo $?":
            return f"{code}\n"
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=work,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        code = done.returncode
        return done.stdout

    return run


def replay(page: str, run: Callable[[str], str]) -> str:
    """The page with what its commands print now."""

    def again(block: re.Match[str]) -> str:
        commands = re.findall(r"^\$ (.*)\n", block[1], re.MULTILINE)
        return "```\n" + "".join(f"$ {command}\n{shortened(run(command))}" for command in commands) + "```"

    return BLOCK.sub(again, page)


def shortened(text: str) -> str:
    """Without lines of progress, and the middle of what is long."""
    lines = [line.rstrip() for line in text.splitlines() if not PROGRESS.match(line)]
    if len(lines) > LONGEST:
        lines[FIRST:-LAST] = ["…"]
    return "".join(f"{line}\n" for line in lines)


def replayed(page: str) -> str:
    """The same in a folder and with a Hub that are there for as long as it takes."""
    with tempfile.TemporaryDirectory() as folder, serving() as hub:
        work = Path(folder)
        prepare(work, page)
        hf = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(work / "hf")}
        hf |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return replay(page, shell(work, hf)).replace(hub.url, "http://127.0.0.1:8000")


if __name__ == "__main__":
    PAGE.write_text(replayed(PAGE.read_text()))
