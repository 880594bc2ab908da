"""A model repository on the Hub: which of its files a job needs, and how they come here.

Files go through huggingface_hub into its cache, one call each. `snapshot_download` would list the repository twice
more, by requests without a timeout: a server that takes the connection and says nothing would hold us for ever.
"""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but its __init__ does not say so
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
    tqdm,
)

from quantkit.checkpoint.header import MAX_HEADER, quote
from quantkit.checkpoint.reader import read_json, safe_path
from quantkit.errors import SourceError
from quantkit.hub_errors import HTTPError, explained
from quantkit.layouts import Prefer
from quantkit.layouts.base import MANIFEST
from quantkit.layouts.hf import CONFIG, MAX_SIDE_FILE, SAFETENSORS_INDEX, SIDE_FILES, WEIGHT_SETS
from quantkit.layouts.mistral import INDEX as NATIVE_INDEX
from quantkit.layouts.mistral import WEIGHTS as NATIVE_WEIGHTS
from quantkit.layouts.mistral_params import PARAMS

CARD = "README.md"
# A header of most shards is shorter than this: one request fetches it.
FIRST_RANGE = 32 * 1024
HEADERS_AT_ONCE = 8
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PLAIN = re.compile(r"[A-Za-z0-9][\w.\-]*")


def obtain(source: str, revision: str | None, *, weights: bool, quiet: bool, prefer: Prefer) -> tuple[Path, str]:
    """Folder and commit of a Hub model; see `quantkit.hub.resolve`. Raises SourceError."""
    with explained(source, revision):
        if revision is not None and (not revision or revision[0] in "/." or ".." in revision):
            # huggingface_hub makes a file of that name in its cache.
            raise SourceError(f"{revision!r} is no revision", where=source, hint="name a branch, a tag or a commit")
        try:
            repository = Repository.ask(source, revision, prefer)
        except (HTTPError, OfflineModeIsEnabled) as e:
            if isinstance(e, HfHubHTTPError) and e.response.status_code < 500:
                raise
            folder = _cached(source, revision, prefer)
            if folder is None:
                raise
            return folder, folder.name
        folder = repository.fetch_small(revision, quiet=quiet or not weights)
        names = repository.weight_files(folder)
        if weights or all(repository.in_cache(n) for n in names):
            for name in names:
                repository.fetch(name, quiet=quiet)
            return folder, repository.commit
        return repository.headers_only(folder, names), repository.commit


@dataclass(frozen=True)
class Repository:
    """One commit of a repository. `sizes`: its files by name, those in subfolders left out; None where not known.
    `native`: of its files those in Mistral's own layout are the model."""

    id: str
    commit: str
    sizes: Mapping[str, int | None]
    native: bool

    @classmethod
    def ask(cls, source: str, revision: str | None, prefer: Prefer) -> Repository:
        info = HfApi().model_info(source, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        commit = info.sha
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise ValueError(f"the server gives {quote(commit)} for a commit")
        sizes: dict[str, int | None] = {}
        for file in info.siblings or ():
            _refuse_strange(source, file.rfilename)
            if _PLAIN.fullmatch(file.rfilename):
                sizes[file.rfilename] = file.size if isinstance(file.size, int) else None
        if _is_native(sizes, prefer):
            return cls(source, commit, sizes, native=True)
        if CONFIG not in sizes:
            raise SourceError(
                f"the Hub model has no {CONFIG}, and no {PARAMS} with consolidated weights", where=source,
                hint="name a model in the Hugging Face layout, or in Mistral's own",
            )  # fmt: skip
        if not any(name in sizes for name in WEIGHT_SETS):
            found = sorted(n for n in sizes if n.endswith((".safetensors", ".bin", ".pth", ".gguf")))
            raise SourceError(
                "the Hub model has no model.safetensors or pytorch_model.bin, and no index of their shards",
                where=source,
                hint=f"it has {', '.join(found[:4])}" if found else "it has no weights in its top folder",
            )
        return cls(source, commit, sizes, native=False)

    @property
    def config(self) -> str:
        return PARAMS if self.native else CONFIG

    def fetch(self, name: str, *, revision: str | None = None, quiet: bool) -> Path:
        """The file's path in the cache, fetched if it is not there."""
        # A commit that is asked for by its hash costs no request once the file is here.
        bars = _NoBar if quiet else None
        return Path(hf_hub_download(self.id, name, revision=revision or self.commit, tqdm_class=bars))

    def fetch_small(self, revision: str | None, *, quiet: bool) -> Path:
        """Fetches config, index, card and what travels with the weights. Returns the snapshot's folder."""
        names = [n for n in self.sizes if n in (CARD, MANIFEST) or SIDE_FILES.fullmatch(n)]
        if self.native:
            names += [NATIVE_INDEX] if NATIVE_INDEX in self.sizes else []
        elif (chosen := next(n for n in WEIGHT_SETS if n in self.sizes)).endswith(".json"):
            names.append(chosen)
        for name in (self.config, *names):
            if (self.sizes[name] or 0) > MAX_SIDE_FILE:
                raise SourceError(
                    f"{name} has {self.sizes[name]:,} bytes: that is no tokenizer, card or licence",
                    where=self.id, hint="fetch the model with `hf download` and take the file out",
                )  # fmt: skip
        # By the name that the user gave, so that the cache learns which commit it means and it works offline later.
        folder = self.fetch(self.config, revision=revision or constants.DEFAULT_REVISION, quiet=quiet).parent
        if folder.name != self.commit:
            raise SourceError(
                f"the Hub model moved from {self.commit} to {folder.name} while it was being read",
                where=self.id, hint="type the same command again",
            )  # fmt: skip
        for name in names:
            self.fetch(name, quiet=quiet)
        return folder

    def weight_files(self, folder: Path) -> list[str]:
        """The one set of weight files that will be read, all of them in the repository."""
        names = _weight_set(folder, self.sizes, native=self.native)
        missing = [n for n in names if n not in self.sizes]
        if missing:
            raise SourceError(
                f"the index names {quote(missing[0])}, which the Hub model does not have",
                where=self.id, hint="name another revision, or tell the model's owner",
            )  # fmt: skip
        return names

    def in_cache(self, name: str) -> bool:
        return isinstance(try_to_load_from_cache(self.id, name, revision=self.commit), str)

    def headers_only(self, snapshot: Path, names: Iterable[str]) -> Path:
        """A temporary folder that looks like the snapshot with its weights, as far as a plan looks: small files copied
        (a link would lead out of the folder), and headers in sparse files of the true size."""
        if not all(n.endswith(".safetensors") for n in names):
            raise SourceError(
                f"the Hub model has {'.pth' if self.native else 'pytorch_model.bin'} files only: what is in them is "
                "known from the whole files alone",
                where=self.id, hint=f"fetch them first: hf download {self.id} --revision {self.commit}",
            )  # fmt: skip
        top = Path(tempfile.mkdtemp(prefix="quantkit-"))
        atexit.register(shutil.rmtree, top, ignore_errors=True)
        folder = top / self.id  # errors name files by path: this one says the model
        folder.mkdir(parents=True)
        # From the snapshot, not from our list: what else somebody put there, the run will see as well.
        for path in snapshot.iterdir():
            if path.name in (self.config, CARD, MANIFEST, SAFETENSORS_INDEX, NATIVE_INDEX) or SIDE_FILES.fullmatch(
                path.name
            ):
                shutil.copyfile(safe_path(snapshot, path.name), folder / path.name)
        with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
            list(pool.map(lambda name: self._header_file(folder / name), names))
        return folder

    def _header_file(self, path: Path) -> None:
        url = hf_hub_url(self.id, path.name, revision=self.commit)
        start, size = _read_range(url, 0, FIRST_RANGE)
        end = 8 + int.from_bytes(start[:8], "little")
        # What is no header, or none that we would read, is left for read_header to say.
        if len(start) >= 8 and len(start) < end <= min(size, 8 + MAX_HEADER):
            rest, size_now = _read_range(url, len(start), end - len(start))
            if size_now != size:
                raise ValueError(f"{path.name} had {size:,} bytes, then {size_now:,}")
            start += rest
        with path.open("wb") as f:
            f.write(start[:end])
            f.truncate(size)


def _read_range(url: str, start: int, count: int) -> tuple[bytes, int]:
    """`count` bytes of a file on the Hub from `start`, fewer at its end, and its size."""
    headers = {
        **build_hf_headers(),
        "Range": f"bytes={start}-{start + count - 1}",
        "Accept-Encoding": "identity",  # ranges and sizes are those of the file
    }
    with http_stream_backoff(
        "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_exceptions=(), retry_on_status_codes=(408, 429),
    ) as response:  # fmt: skip
        hf_raise_for_status(response)
        begin, size = _span(response)
        if begin > start:
            raise ValueError("the server sent another range than it was asked for")
        # A server that knows no ranges sends all: we hang up when we have enough.
        skip, data = start - begin, bytearray()
        wanted = min(count, size - start)
        for chunk in response.iter_raw(FIRST_RANGE):
            data += chunk
            if len(data) >= skip + wanted:
                break
    if len(data) < skip + wanted:
        raise ValueError(f"the server sent {len(data) - skip:,} of {wanted:,} bytes")
    return bytes(data[skip : skip + wanted]), size


def _span(response: Any) -> tuple[int, int]:
    """Where a response starts in its file, and the file's size."""
    if response.status_code != 206:
        return 0, int(response.headers["Content-Length"])
    match = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})", response.headers.get("Content-Range", ""))
    if match is None:
        raise ValueError(f"the server sent the Content-Range {quote(response.headers.get('Content-Range'))}")
    return int(match[1]), int(match[2])


def _cached(source: str, revision: str | None, prefer: Prefer) -> Path | None:
    """The snapshot's folder if the cache has it with all its weights. What is not there cannot be planned either."""
    found = (try_to_load_from_cache(source, name, revision=revision) for name in (CONFIG, PARAMS))
    folder = next((Path(path).parent for path in found if isinstance(path, str)), None)
    if folder is None:
        return None
    there = [p.name for p in folder.iterdir()]
    names = _weight_set(folder, there, native=_is_native(there, prefer))
    return folder if names and all(safe_path(folder, n).exists() for n in names) else None


def _is_native(names: Collection[str], prefer: Prefer) -> bool:
    """Whether, of these files, `open_checkpoint` would read those in Mistral's own layout."""
    native = PARAMS in names and any(NATIVE_WEIGHTS.fullmatch(n) for n in names)
    hugging = CONFIG in names and any(n in names for n in WEIGHT_SETS)
    return native and (prefer == "mistral" or not hugging)


def _weight_set(folder: Path, names: Iterable[str], *, native: bool) -> list[str]:
    """Names of the weight files that `open_checkpoint` will read, given the names that there are; an index is read
    from `folder`. What is wrong with an index is for `open_checkpoint` to say."""
    if native:
        found = sorted(n for n in names if NATIVE_WEIGHTS.fullmatch(n))
        return [n for n in found if n.endswith(".safetensors")] or found
    chosen = next((n for n in WEIGHT_SETS if n in set(names)), None)
    if chosen is None:
        return []
    if not chosen.endswith(".json"):
        return [chosen]
    suffix = ".safetensors" if chosen == SAFETENSORS_INDEX else ".bin"
    table = read_json(safe_path(folder, chosen)).get("weight_map")
    files = table.values() if isinstance(table, dict) else ()
    return sorted({f for f in files if isinstance(f, str) and f.endswith(suffix)})


def _refuse_strange(source: str, name: object) -> None:
    if not isinstance(name, str) or any(p in ("", ".", "..") for p in name.split("/")) or not name.isprintable():
        raise SourceError(
            f"the file list names {quote(name)}: no repository can hold that",
            where=source, hint="check HF_ENDPOINT; do not use what this server sends",
        )  # fmt: skip


class _NoBar(tqdm):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]
