"""A card as one HTML page, near to what the Hub shows. Needs markdown-it-py: `pip install 'quantkit[preview]'`."""

from __future__ import annotations

import base64
import html
import re
from importlib.util import find_spec
from pathlib import Path

from quantkit.checkpoint.writer import write_error, write_file
from quantkit.errors import OutputError, UsageError
from quantkit.folder_card import README, read_card

# Nothing that a card brings along runs or is fetched.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 16px/1.6 system-ui, sans-serif; color: #1f2937; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.25; border-bottom: 1px solid #e5e7eb; padding-bottom: .3rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { border: 1px solid #e5e7eb; padding: .3rem .7rem; }
pre { background: #f3f4f6; padding: .8rem; overflow-x: auto; border-radius: .4rem; }
code { font: .875em ui-monospace, monospace; }
img { max-width: 100%; }
.metadata { color: #4b5563; background: #f9fafb; border: 1px solid #e5e7eb; padding: .8rem; white-space: pre-wrap; }
"""


def write_preview(folder: Path, out: Path) -> Path:
    """The folder's README.md as an HTML file without scripts; its images inside. Returns the path.

    UsageError without markdown-it-py or a card, OutputError for a file that cannot be written.
    """
    if find_spec("markdown_it") is None:
        raise UsageError("a preview needs markdown-it-py", hint="pip install 'quantkit[preview]'")
    card = folder / README
    if not card.is_file():
        hint = "`quantkit card` writes it" if (folder / "quantkit.json").is_file() else "name a folder with a card"
        raise UsageError("the folder has no README.md", where=str(folder), hint=hint)
    if not out.parent.is_dir():
        raise OutputError(f"there is no folder {str(out.parent)!r}", where=str(out), hint="make it, or name another")
    if out.suffix not in (".html", ".htm"):
        raise OutputError(f"{out.name!r} is no name of an HTML file", where=str(out), hint="name a FILE.html")
    try:
        write_file(out, page(read_card(folder), folder).encode())
    except OSError as e:
        raise write_error(e, out) from None
    return out


def page(card: str, folder: Path) -> str:
    from markdown_it import MarkdownIt

    match = re.match(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL)
    metadata, body = match.groups() if match else ("", card)
    rendered = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    rendered = re.sub(r'src="([\w.-]+\.png)"', lambda m: f'src="{_inline(folder / m[1])}"', rendered)
    title = re.search(r"^# (.*)$", body, re.MULTILINE)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{html.escape(title[1] if title else README)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<div class="metadata">{html.escape(metadata)}</div>\n{rendered}</body>\n</html>\n'
    )


def _inline(path: Path) -> str:
    data = path.read_bytes() if path.is_file() and path.stat().st_size < 10_000_000 else b""
    return "data:image/png;base64," + base64.b64encode(data).decode()
