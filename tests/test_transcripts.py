"""docs/commands.md shows every command, and what it prints."""

from __future__ import annotations

import re

import pytest
from transcripts import BLOCK, DATA, PAGE, replayed

from quantkit.cli import cli

HERE = re.compile(r"^\$ quantkit doctor\n.*?^```", re.MULTILINE | re.DOTALL)  # says what this machine is


def masked(page: str) -> list[str]:
    """Its lines without numbers, hashes and spaces, which differ from one machine, or one version, to another."""
    page = re.sub(r"\b[0-9a-f]{40,64}\b|[-+−]?\d[\d,.]*", "0", HERE.sub("", page))
    return [" ".join(line.split()) for line in page.splitlines()]


@pytest.mark.skipif(not DATA.is_dir(), reason="the model is not part of the repository")
def test_the_page_is_what_commands_print() -> None:
    page = PAGE.read_text()
    assert masked(replayed(page)) == masked(page)


def test_it_has_every_command() -> None:
    shown = "".join(BLOCK.findall(PAGE.read_text()))
    visible = {name for name, command in cli.commands.items() if not command.hidden}
    assert visible == set(re.findall(r"^\$ quantkit (\w+)", shown, re.MULTILINE))
