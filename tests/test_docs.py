"""What the documents show is run as it stands: command lines in a folder where MODEL is a model, and README's Python.

A line with a choice in it ([options], a|b, …) is a pattern, and cannot be run; lines of shell after a $ are shown with
what they print, which on the page of commands is compared.
"""

from __future__ import annotations

import re
import shlex
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from eval_models import quiet_transformers, text_of
from oracle.native_models import make_native
from tokenization.protobuf import spm
from transcripts import BLOCK, DATA, PAGE, replayed

import quantkit
from quantkit.cli import cli

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Who is elsewhere in the tests: the Hub (test_push), recipes of models that are not here (test_recipes), rates of a
# machine (test_forecast).
ELSEWHERE = re.compile(r"quantkit (push|run +recipes/|doctor --calibrate|plan .*--profile)")
HERE = re.compile(r"^\$ quantkit doctor\n.*?^```", re.MULTILINE | re.DOTALL)  # says what this machine is
PATTERN = re.compile(r"[\[\]|…]|\.\.\.|SRC|RECIPE|DIR|PART")


def blocks(path: Path, language: str) -> list[str]:
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)
    return found


def commands(path: Path) -> Iterator[str]:
    for block in blocks(path, ""):
        for line in block.splitlines():
            command = re.sub(r"\s+#.*|\s{3,}(?=[a-z]).*", "", line)  # what is said of it
            if command.startswith("quantkit ") and not PATTERN.search(command) and not ELSEWHERE.match(line):
                yield command


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with MODEL, which both layouts can hold, and texts."""
    native = make_native(tmp_path / "native", dim=256, hidden_dim=512, head_dim=64, vocab_size=320)
    (native / "tokenizer.model").write_bytes(spm())
    quantkit.convert(native, tmp_path / "MODEL", "hf", {"native": {"context": 64}})
    shutil.rmtree(native)
    for name in ("TEXT.txt", "text.txt", "other.txt", "FILE"):
        (tmp_path / name).write_text(text_of(9000) * 10)
    (tmp_path / "FILE").rename(tmp_path / "FILE.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str) -> int:
    with warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")
        try:
            cli.main([*shlex.split(command)[1:], "--quiet"], prog_name="quantkit", standalone_mode=False)
        except SystemExit as ended:
            return int(str(ended.code or 0))
    return 0


def test_patterns_name_commands_that_exist() -> None:
    for path in DOCUMENTS:
        for word in re.findall(r"^\$? ?quantkit +(\w+)", "\n".join(blocks(path, "")), re.MULTILINE):
            assert word in cli.commands, f"{path.name}: quantkit {word}"


LONG = {"mixed-bits"}  # it measures
RUN = [
    pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in LONG else [])
    for p in DOCUMENTS if list(commands(p))
]  # fmt: skip


@pytest.mark.parametrize("path", RUN)
def test_commands(path: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In their order. OUT is a new folder wherever it is written, and the last one that was written elsewhere."""
    count, last = 0, "OUT"
    for command in commands(path):
        line = command.replace("FILE", "FILE.txt") if "--text FILE" in command else command
        if re.search(r"-o OUT\b", line) and not re.search(r"--part [2-9]", line):
            count, last = count + 1, f"OUT-{count + 1}"
        line = re.sub(r"\bOUT\b", last, line).replace("FOLDER", last)
        for number in re.findall(r"\bOUT(\d)\b", line):
            if not (work / f"OUT{number}").exists():
                assert run(f"quantkit quantize MODEL -o OUT{number} --bits 4") == 0
        limits = "--max-" in line  # a random model may be beyond them
        if limits and not (work / last).exists():
            assert run(f"quantkit quantize MODEL -o {last} --bits 4") == 0
        code = run(line)
        assert code in ((0, 3) if limits else (0,)), f"{path.name}: {command}\n{capsys.readouterr().err}"
    assert count or path.stem == "publishing"


def test_options_in_the_tables_exist() -> None:
    known = {name for command in cli.commands.values() for p in command.params for name in (*p.opts, *p.secondary_opts)}
    for path in DOCUMENTS:
        for name in re.findall(r"^\| `(--[\w-]+)", path.read_text(), re.MULTILINE):
            assert name in known, f"{path.name}: {name}"


def test_python_of_the_readme(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    with warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")  # of other people's programs
        names: dict[str, object] = {}
        exec(code, names)
    assert (work / "SPARSE" / "quantkit.json").exists()
    assert (work / "NATIVE" / "params.json").exists()
    assert hasattr(names["model"], "generate")
    planned, divergence = capsys.readouterr().out.splitlines()
    assert len(planned.split()) == 3
    assert float(divergence) >= 0


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    hidden = [name for name, command in cli.commands.items() if command.hidden]
    assert all(f"quantkit {name}" in text for name in cli.commands if name not in hidden)
    assert isinstance(cli, click.Group)


def masked(page: str) -> list[str]:
    """Its lines without numbers, hashes and spaces, which differ from one machine, or one version, to another."""
    page = re.sub(r"\b[0-9a-f]{40,64}\b|[-+−]?\d[\d,.]*", "0", HERE.sub("", page))
    return [" ".join(line.split()) for line in page.splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the model is not part of the repository")
def test_the_page_is_what_commands_print() -> None:
    page = PAGE.read_text()
    assert masked(replayed(page)) == masked(page)


def test_it_has_every_command() -> None:
    shown = "".join(BLOCK.findall(PAGE.read_text()))
    visible = {name for name, command in cli.commands.items() if not command.hidden}
    assert visible == set(re.findall(r"^\$ quantkit (\w+)", shown, re.MULTILINE))
