"""From what a user names to a folder: a local path, or a Hub id and revision through huggingface_hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

from quantkit.errors import SourceError
from quantkit.plan import Origin

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")
_SNAPSHOT = re.compile(r"models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<sha>[0-9a-f]{40})/?$")
# Small files first: with these a plan can be made. Python files are never fetched.
PATTERNS = [
    "*.json",
    "*.safetensors",
    "*.bin",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.md",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
]


def resolve(source: str, revision: str | None = None) -> tuple[Path, Origin]:
    """The folder of `source` and where it comes from. A folder wins over a Hub id of the same spelling.

    Raises SourceError if it is neither, or cannot be fetched. HF_HUB_OFFLINE and HF_HOME are huggingface_hub's to obey.
    """
    folder = Path(source).expanduser()
    if folder.exists():
        if revision is not None:
            raise SourceError("--revision is for Hub ids, and this is a folder", where=source, hint="leave it out")
        return folder, _origin_of(folder)
    if not _HUB_ID.fullmatch(source):
        raise SourceError(
            f"there is no folder {source!r}",
            where=str(folder.absolute().parent),
            hint="name a folder, or a Hub id such as org/model",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=PATTERNS))
    except RepositoryNotFoundError:
        raise SourceError(
            f"the Hub has no model {source!r} that you may read", where=f"Hub id {source}",
            hint="check the spelling; for a gated or private model log in with `hf auth login`",
        ) from None  # fmt: skip
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as e:
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise SourceError(
            f"{source!r} is no folder here and could not be fetched from the Hub", where=first,
            hint="check the spelling, the network and HF_HUB_OFFLINE; what the cache holds is used without a network",
        ) from None  # fmt: skip
    return folder, Origin(source, source, folder.name)


def _origin_of(folder: Path) -> Origin:
    """A folder inside a Hub cache knows its id and commit; any other only its name."""
    match = _SNAPSHOT.search(folder.absolute().as_posix())
    if match:
        name = f"{match['org']}/{match['name']}"
        return Origin(name, name, match["sha"])
    return Origin(folder.resolve().name, None, None)
