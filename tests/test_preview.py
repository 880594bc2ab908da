"""`quantkit card --preview`: the card as a page that shows all of it and runs nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from eval_models import build, quiet_transformers, text_of

import quantkit
from quantkit import preview
from quantkit.errors import OutputError, UsageError


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.images: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.images += [value or "" for key, value in attrs if (tag, key) == ("img", "src")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("preview")
    with quiet_transformers():
        source = build(work / "source")
        (source / "README.md").write_text("# Parent\n\n<script>alert(1)</script> and <img src=x onerror=alert(2)>\n")
        (work / "text.txt").write_text(text_of(600))
        quantkit.quantize(source, work / "out", {"quantize": {"bits": 4}, "card": {"license": "mit"}})
        quantkit.evaluate(work / "out", str(work / "text.txt"), against=str(source), record=True, windows=4, length=32)
    return work / "out"


def test_all_of_the_card_and_nothing_that_acts(folder: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "quantkit", "card", str(folder), "--preview", str(tmp_path / "card.html")]
    before = (folder / "README.md").read_bytes()
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "README.md").read_bytes() == before
    text = (tmp_path / "card.html").read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert "Content-Security-Policy" in text
    assert "<script>alert(1)</script>" in page.text, "quoted, and shown as it was"
    assert [image[:22] for image in page.images] == ["data:image/png;base64,"]
    assert len(page.images[0]) > 1000
    assert page.tags.count("table") >= 4
    card = before.decode()
    for heading in re.findall(r"^## (.*)$", card, re.MULTILINE):
        assert heading in page.text
    assert "license: mit" in page.text


def test_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="no name of an HTML file"):
        preview.write_preview(folder, tmp_path / "README.md")
    with pytest.raises(UsageError, match="no README"):
        preview.write_preview(tmp_path, tmp_path / "card.html")
    monkeypatch.setattr(preview, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match="markdown-it-py"):
        preview.write_preview(folder, tmp_path / "card.html")
    assert list(tmp_path.iterdir()) == []
