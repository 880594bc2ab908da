"""What huggingface_hub raises, in our words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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

from quantkit.errors import QuantkitError, SourceError

__all__ = ["HTTPError", "explained"]

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
        where, hint = f"{constants.ENDPOINT}: {first}", "check the network, the proxy and HF_ENDPOINT"
    else:
        what, where, hint = "could not be fetched from the Hub", f"{where}: {first}", "type the same command again"
    return SourceError(f"{source!r} {what}", where=where, hint=hint)
