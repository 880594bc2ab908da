"""From what a user names to a folder: a local path, or a Hub id and revision through huggingface_hub's cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from quantkit.errors import SourceError
from quantkit.layouts import Prefer
from quantkit.plans import Origin

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", re.ASCII)
_SNAPSHOT = re.compile(r".*/models--(?P<id>[^/]+)/snapshots/(?P<sha>[0-9a-f]{40})")


def resolve(
    source: str,
    revision: str | None = None,
    *,
    weights: bool = True,
    quiet: bool = True,
    prefer: Prefer = "hf",
) -> tuple[Path, Origin]:
    """The folder of `source` and where it comes from. A folder wins over a Hub id of the same spelling.

    Of a Hub model, one set of weights is fetched and what travels with them, nothing else. With weights=False the
    weights stay where they are: the folder then holds their headers in files of the right size, unless the cache has
    them already, and it lasts as long as the process. `quiet` shows no download bars. `prefer` says which set is
    fetched of a model that is there in two layouts.

    Raises SourceError if it is neither, or cannot be fetched. HF_HUB_OFFLINE, HF_HOME, HF_ENDPOINT, tokens and proxies
    are huggingface_hub's to obey.
    """
    if is_local(source):
        if revision is not None:
            raise SourceError("--revision is for Hub ids, and this is a folder", where=source, hint="leave it out")
        return expand(source), _origin_of(expand(source))
    if not _HUB_ID.fullmatch(source):
        raise SourceError(
            f"there is no folder {source!r}",
            where=str(expand(source).absolute().parent),
            hint="name a folder, or a Hub id such as org/model",
        )
    from quantkit.hub_repository import obtain  # huggingface_hub is slow to import, and a folder needs none of it

    folder, commit = obtain(source, revision, weights=weights, quiet=quiet, prefer=prefer)
    return folder, Origin(source, source, commit)


def is_local(source: str) -> bool:
    """Whether anything of that name is on this machine, be it a dangling link."""
    return os.path.lexists(expand(source))


def expand(path: str) -> Path:
    """The path with ~ for a home folder. One that is nobody's stays as it is, and is then not found."""
    return Path(os.path.expanduser(path))


def _origin_of(folder: Path) -> Origin:
    """A folder inside a Hub cache knows its id and commit; any other only its name."""
    path = os.fsencode(os.path.realpath(folder)).decode("utf-8", "replace")  # the manifest is UTF-8
    if match := _SNAPSHOT.fullmatch(path):
        name = match["id"].replace("--", "/", 1)
        return Origin(name, name, match["sha"])
    return Origin(path.rpartition("/")[2], None, None)
