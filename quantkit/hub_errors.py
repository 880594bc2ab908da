"""What huggingface_hub raises, in our words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # that of its HTTP client, which is httpx or httpx2 by its version
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from quantkit.errors import QuantkitError, RunError, SourceError, UsageError

__all__ = ["HTTPError", "explain_push", "explained"]

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN, as somebody who has access"


@contextmanager
def explained(source: str, revision: str | None) -> Iterator[None]:
    """Turns whatever huggingface_hub raises into a SourceError. All of it: at what a stranger's server answers, it
    stumbles with KeyError and AssertionError as well."""
    try:
        yield
    except QuantkitError:
        raise
    except Exception as e:
        raise _explain(e, source, revision) from None


def _explain(e: Exception, source: str, revision: str | None) -> SourceError:
    if isinstance(e, LocalEntryNotFoundError) and isinstance(e.__cause__, Exception):
        e = e.__cause__  # why the cache was asked at all
    first = str(e).strip().split("\n")[0] or type(e).__name__
    where = f"{source}, revision {revision}" if revision else source
    status = e.response.status_code if isinstance(e, HfHubHTTPError) else None
    if isinstance(e, HFValidationError):
        what, where, hint = "is no folder here, and no Hub id", first, "name a folder, or an id such as org/model"
    elif isinstance(e, GatedRepoError):
        what, hint = "is a gated Hub model", f"ask for access on its page, then {_LOG_IN}"
    elif isinstance(e, RepositoryNotFoundError):
        what = "is no folder here, and no Hub model that you may read"
        hint = f"check the spelling; for a private or gated model {_LOG_IN}"
    elif isinstance(e, RevisionNotFoundError):
        what, hint = f"has no revision {revision!r} on the Hub", "name a branch, a tag or a commit"
    elif status in (401, 403):
        what, hint = f"is not given to you by the Hub (HTTP {status})", _LOG_IN
    elif isinstance(e, OfflineModeIsEnabled):
        what = "is no folder here, and the Hub's cache does not hold all of it"
        hint = "unset HF_HUB_OFFLINE once, to fetch it"
    elif isinstance(e, HTTPError) and status is None:
        what = "cannot be fetched: the connection to the Hub failed, and its cache does not hold all of it"
        where, hint = f"{_endpoint()}: {first}", "check the network, the proxy and HF_ENDPOINT"
    else:
        what, where, hint = "could not be fetched from the Hub", f"{where}: {first}", "type the same command again"
    return SourceError(f"{source!r} {what}", where=where, hint=hint)


_QUOTA = re.compile(r"quota|storage|payment|billing|plan\b|too large", re.IGNORECASE)


def explain_push(e: Exception, repo_id: str, state: str) -> QuantkitError:
    """What went wrong while a folder was uploaded to `repo_id`; state: what has become of it by then, in words."""
    while isinstance(e, RuntimeError) and isinstance(e.__cause__, Exception):
        e = e.__cause__  # of one of the threads that upload
    status = e.response.status_code if isinstance(e, HfHubHTTPError) else None
    said, again = _said(e), "the same command sends only what is missing"
    if status == 401:
        return UsageError("the Hub does not accept the token", where=repo_id, hint=_LOG_IN)
    refused = status in (400, 403, 413, 422) or isinstance(e, ValueError)  # which an LFS batch raises
    if status == 402 or (refused and _QUOTA.search(said)):
        return RunError(
            f"the Hub has no room for it; nothing was committed: {said}", where=repo_id,
            hint="make room, or a larger plan; then the same command sends only what is missing",
        )  # fmt: skip
    if status == 403 or isinstance(e, RepositoryNotFoundError):
        return UsageError(
            f"the token may not write to {repo_id!r}", where=said,
            hint="name a repository of yours, or use a token with write access to it",
        )  # fmt: skip
    if status in (409, 412):
        return RunError("the repository changed meanwhile; nothing was committed", where=repo_id, hint=again)
    if isinstance(e, HTTPError) and status is None:
        return RunError(f"the connection to the Hub failed; {state}: {said}", where=_endpoint(), hint=again)
    return RunError(f"the Hub failed; {state}: {said}", where=repo_id, hint=again)


def _endpoint() -> str:
    """The Hub's address, without a name or password that may be in it."""
    parts = urlsplit(constants.ENDPOINT)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _said(e: Exception) -> str:
    """The server's own words, or the exception's first line; without what looks like a token."""
    words = getattr(e, "server_message", None) or ""
    lines = [line.strip() for line in str(words or e).split("\n") if line.strip()]
    return re.sub(r"hf_[A-Za-z0-9]{6,}", "hf_…", " ".join(lines)[:300] or type(e).__name__)
