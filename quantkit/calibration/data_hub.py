"""One file of a Hub dataset: which, at which commit, and how it comes into the cache."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.checkpoint.header import quote
from quantkit.errors import SourceError

DATASET = "org/name"
_PART = r"[A-Za-z0-9][\w.\-]*"
_REFERENCE = re.compile(rf"(?P<id>{_PART}/{_PART})(?::(?P<file>[^@]+))?(?:@(?P<revision>[^@]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Texts about a dataset rather than of it.
_ABOUT = re.compile(r"(?:readme|licen[cs]e|notice|requirements|citation|changelog)\b.*", re.IGNORECASE)
_HELD_OUT = re.compile(r"(?:^|[^a-z])(?:test|valid|validation|val|dev|eval)(?:[^a-z]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Reference:
    """`org/name`, `org/name:path/in/repo`, each perhaps with `@revision`: a branch, a tag or a commit."""

    id: str
    file: str | None
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> Reference | None:
        """None if the text is no such reference."""
        match = _REFERENCE.fullmatch(text)
        if match is None or (match["file"] is not None and not _plain(match["file"])):
            return None
        revision = match["revision"]
        # huggingface_hub makes a file of that name in its cache.
        if revision is not None and (revision[0] in "/." or ".." in revision or not revision.isprintable()):
            return None
        return cls(match["id"], match["file"], revision)


def fetch(reference: Reference, endings: tuple[str, ...], *, quiet: bool) -> tuple[Path, str]:
    """The file in huggingface_hub's cache, fetched if need be, and its name for people: `org/name:file@commit`.

    Without a file in the reference it is the first by name that has one of the `endings`: of those with `train` in
    their path, or else of those that are not for testing, or else of all. Offline, the cache's files are those that
    there are. Raises SourceError.
    """
    # huggingface_hub is slow to import, and a file on this machine needs none of it.
    from quantkit.hub_errors import explained

    try:
        with explained(reference.id, reference.revision):
            return _fetch(reference, endings, quiet=quiet)
    except SourceError as e:
        raise SourceError(_of_data(e.what), where=_of_data(e.where), hint=_of_data(e.hint)) from None


def _fetch(reference: Reference, endings: tuple[str, ...], *, quiet: bool) -> tuple[Path, str]:
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    from quantkit.hub_errors import HTTPError

    revision = reference.revision or constants.DEFAULT_REVISION
    try:
        info = HfApi().dataset_info(reference.id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (HTTPError, OfflineModeIsEnabled) as e:
        if isinstance(e, HfHubHTTPError) and e.response.status_code < 500:
            raise
        snapshot = _snapshot(reference.id, revision)
        names = [] if snapshot is None else [str(p.relative_to(snapshot)) for p in snapshot.rglob("*") if p.is_file()]
        if snapshot is None or (chosen := _choose(names, reference.file, endings)) is None:
            raise
        return snapshot / chosen, f"{reference.id}:{chosen}@{snapshot.name}"
    commit = info.sha
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise ValueError(f"the server gives {quote(commit)} for a commit")
    names = [s.rfilename for s in info.siblings or () if isinstance(s.rfilename, str)]
    chosen = _choose(names, reference.file, endings)
    if chosen is None:
        raise _no_file(reference, names, endings)
    # By the name that the user gave, so that the cache learns which commit it means and it works offline later.
    path = Path(
        hf_hub_download(
            reference.id, chosen, repo_type="dataset", revision=revision, tqdm_class=_no_bar() if quiet else None
        )
    )
    if not path.as_posix().endswith(f"/snapshots/{commit}/{chosen}"):
        raise SourceError(
            f"the Hub dataset moved from {commit} to another commit while it was being read",
            where=reference.id, hint="type the same command again",
        )  # fmt: skip
    return path, f"{reference.id}:{chosen}@{commit}"


def _choose(names: Iterable[str], wanted: str | None, endings: tuple[str, ...]) -> str | None:
    if wanted is not None:
        return wanted if wanted in names else None
    fitting = sorted(
        n for n in names if _plain(n) and n.lower().endswith(endings) and not _ABOUT.fullmatch(n.rpartition("/")[2])
    )
    train = [n for n in fitting if "train" in n.lower()]
    rest = [n for n in fitting if not _HELD_OUT.search(n)]
    return next(iter(train or rest or fitting), None)


def _no_file(reference: Reference, names: list[str], endings: tuple[str, ...]) -> SourceError:
    if reference.file is not None:
        what = f"the Hub dataset has no file {quote(reference.file)}"
    else:
        what = f"the Hub dataset has no file that ends in {', '.join(endings)}"
    shown = [quote(n) for n in sorted(names) if n.lower().endswith(endings)] or [quote(n) for n in sorted(names)]
    has = f"it has {', '.join(shown[:4])}" if shown else "it has no files"
    return SourceError(what, where=reference.id, hint=has)


def _snapshot(name: str, revision: str) -> Path | None:
    """The folder that the cache has of that revision."""
    from huggingface_hub import constants

    top = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    try:
        commit = (top / "refs" / revision).read_text().strip()
    except OSError:
        commit = revision
    folder = top / "snapshots" / commit
    return folder if _COMMIT.fullmatch(commit) and folder.is_dir() else None


def _plain(name: str) -> bool:
    return name.isprintable() and not any(part in ("", ".", "..") for part in name.split("/"))


def _of_data(text: str) -> str:
    text = text.replace("no folder here", "no file here").replace("name a folder", "name a file")
    return (
        text.replace("Hub model", "Hub dataset").replace("gated model", "gated dataset").replace("org/model", DATASET)
    )


def _no_bar() -> Any:
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # public, but its __init__ does not say so

    class NoBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

    return NoBar
