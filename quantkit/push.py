"""A finished folder as a repository on the Hub: proved and judged, then uploaded, committed at once, and compared.

Large files go up one after the other; what the Hub has already is not sent again, so the same command goes on where a
push broke off. A repository shows nothing of them before the one commit at the end.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.reader import read_json
from quantkit.console import Console
from quantkit.errors import GateError, Interrupted, OutputError, QuantkitError, RunError, UsageError, VerifyError
from quantkit.evaluation_record import Record, read_record
from quantkit.folder_card import README, is_written_by_hand, read_card
from quantkit.front_matter import validate_front_matter
from quantkit.output import EVALUATION
from quantkit.parent_card import read_parent_card
from quantkit.plots import ALLOCATION, LAYERS
from quantkit.verifier import sha256_of, verify_folder

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ATTRIBUTES = ".gitattributes"
# Files of these names are large by their nature; the Hub keeps whatever else is beyond 10 MB so, too.
LARGE = ("*.safetensors", "*.bin", "*.pth", "*.model", "*.png")
LARGEST_IN_GIT = 10_000_000

# What git takes in no name of a branch.
NO_BRANCH = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^[-/.]|[/.]$|\.lock$|^@$|/\.")


@dataclass(frozen=True)
class Pushed:
    """url: of the commit. files, nbytes: of what is in it; changed: bytes of those that were not in the one before.
    commit is empty for a dry run."""

    repo_id: str
    url: str
    commit: str
    files: tuple[str, ...]
    nbytes: int
    changed: int
    deleted: tuple[str, ...]


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    replace: bool = False,
    ungated: bool = False,
    dry_run: bool = False,
    console: Console,
) -> Pushed:
    """Uploads a folder that quantkit wrote, and nothing that lies beside its files.

    replace: a repository that holds another model becomes this one: its other files are deleted in the same commit.
    ungated: whether no limits have to have been set and kept by `quantkit eval`.

    Raises VerifyError for a folder that is not sound, GateError for one that was not judged, or judged bad; UsageError
    for an id, a token or a right that is missing; OutputError for a repository that holds something else; RunError if
    the Hub or the way there fails: then the same command goes on.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UsageError(f"{repo_id!r} is no id of a repository", hint="name it org/model") from None
    if revision is not None and (NO_BRANCH.search(revision) or not revision):
        raise UsageError(
            f"{revision!r} is no name for a branch", where=repo_id, hint="letters, digits, - and . will do"
        )
    api = None if dry_run else _api()  # a token that is missing is not found out after every byte was read
    files, proved = _proved(folder, ungated=ungated, console=console)
    attributes = _attributes(files)
    names = (*sorted(files), ATTRIBUTES)
    total = sum(path.stat().st_size for path in files.values()) + len(attributes)
    if api is None:
        return Pushed(repo_id, "", "", names, total, 0, ())
    with _no_other_bars():
        return _upload(api, files, proved, attributes, repo_id, private, revision, replace, console)


def _proved(folder: Path, *, ungated: bool, console: Console) -> tuple[dict[str, Path], dict[str, str]]:
    """The files to publish by name, once the folder is found sound and good enough; and the SHA-256 of those that the
    manifest lists."""
    found = verify_folder(folder, None, quick=False, console=console)
    if found.problems:
        raise VerifyError(
            f"the folder is not sound: {found.problems[0]}", where=str(folder), hint="see `quantkit verify`"
        )
    record = read_record(folder)
    if not ungated:
        _check_judged(folder, record)
    if is_written_by_hand(folder, record):
        console.warn(f"{README} is not the card that quantkit.json and {EVALUATION} make; it goes up as it is")
    text = read_card(folder)
    if "\ufffd" in text:
        raise VerifyError(
            f"{README} is not in UTF-8", where=str(folder / README), hint="`quantkit card` writes it anew"
        )
    card = read_parent_card(text)  # it may have been written to by hand
    problems = [*card.problems] or validate_front_matter(card.metadata)
    if problems:
        raise VerifyError(
            f"the card's front matter would be refused: {problems[0]}", where=str(folder / README),
            hint="mend it, or write the card anew with `quantkit card`",
        )  # fmt: skip
    listed = {str(row["name"]): str(row["sha256"]) for row in read_json(folder / "quantkit.json")["files"]}
    names = [*listed, "quantkit.json", README, *([EVALUATION] if (folder / EVALUATION).is_file() else [])]
    names += [LAYERS] if record.plot else []
    if linked := [name for name in names if (folder / name).is_symlink()]:
        raise VerifyError(
            f"{linked[0]} is a symbolic link, and what is behind it would go up", where=str(folder),
            hint="put a copy in its place",
        )  # fmt: skip
    return {name: folder / name for name in names}, listed


def _check_judged(folder: Path, record: Record) -> None:
    failed = [(text, verdict) for text, verdict in record.judgements if not verdict.passed]
    if failed:
        found, verdict = failed[0]
        again = f"--text {found.text} --windows {found.windows} --length {found.length}"
        raise GateError(
            f"on {found.text}: {verdict.text}", where=str(folder / EVALUATION),
            hint=f"evaluate it with {again} again and a limit that it keeps, or push it with --ungated",
        )  # fmt: skip
    if not record.judgements:
        raise GateError(
            "the folder was not judged by any limit against what it was made from", where=str(folder / EVALUATION),
            hint="run `quantkit eval OUT --text FILE --against SRC --max-kl X`, or push it with --ungated",
        )  # fmt: skip


def _attributes(files: Mapping[str, Path]) -> bytes:
    """.gitattributes: what git keeps as a pointer to large storage. By kind, and by name for what is large besides."""
    patterns = list(LARGE)
    for name, path in sorted(files.items()):
        if path.stat().st_size > LARGEST_IN_GIT and not any(Path(name).match(pattern) for pattern in LARGE):
            patterns.append(name)
    return "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in patterns).encode()


def _api() -> HfApi:
    from huggingface_hub import HfApi, get_token

    try:
        token = get_token()  # its own file, or HF_TOKEN; never printed
    except OSError as e:
        raise UsageError(
            f"the token for the Hub cannot be read: {e.strerror}", where=str(e.filename or ""),
            hint="log in with `hf auth login`, or set HF_TOKEN",
        ) from None  # fmt: skip
    if token is None:
        raise UsageError("there is no token for the Hub", hint="log in with `hf auth login`, or set HF_TOKEN")
    return HfApi(token=token)


def _upload(
    api: HfApi,
    files: Mapping[str, Path],
    proved: Mapping[str, str],
    attributes: bytes,
    repo_id: str,
    private: bool,
    revision: str | None,
    replace: bool,
    console: Console,
) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    with _explained(repo_id, "nothing was committed"):
        _check_card(files[README].parent)
        # None leaves it to what its owner, who may be an organization, has chosen for new ones.
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if private and not api.repo_info(repo_id).private:
            raise UsageError(
                "the repository is there already, and it is public", where=repo_id,
                hint="make it private in its settings, or push without --private",
            )  # fmt: skip
        if revision is not None:
            _branch(api, repo_id, revision)
        head = api.repo_info(repo_id, revision=revision).sha  # nobody else's commit after it is overwritten
        before = _remote(api, repo_id, head)
        earlier = () if replace else _earlier(api, repo_id, head, before, files["quantkit.json"])
        foreign = _foreign(before, files, repo_id, earlier, replace=replace)
        wanted = {name: _Content.of_file(path) for name, path in files.items()}
        if other := [name for name, digest in proved.items() if wanted[name].sha256 != digest]:
            raise RunError(f"{other[0]} changed while it was pushed; nothing was committed", where=repo_id)
        wanted[ATTRIBUTES] = _Content.of_bytes(attributes)
        changed = [name for name in wanted if name not in before or not wanted[name].is_at(before[name])]
        # The smallest first: what is refused is refused before the weights go.
        changed.sort(key=lambda name: wanted[name].nbytes)
        additions = [
            CommitOperationAdd(name, attributes if name == ATTRIBUTES else str(files[name])) for name in changed
        ]  # fmt: skip
        nbytes_changed = sum(wanted[name].nbytes for name in changed)
        with console.progress(nbytes_changed) as progress:
            for addition in additions:
                api.preupload_lfs_files(repo_id, [addition], revision=revision, free_memory=False)
                nbytes = wanted[addition.path_in_repo].nbytes
                progress.advance(nbytes)
                progress.unit(addition.path_in_repo, nbytes)
        operations: list[Any] = [*additions, *(CommitOperationDelete(name) for name in foreign)]
    commit, url = str(head), f"{api.endpoint}/{repo_id}/commit/{head}"
    if operations:
        with _explained(repo_id, "whether it was committed is not known"):
            made = api.create_commit(
                repo_id, operations, commit_message=f"quantkit push: {len(wanted)} files", revision=revision,
                parent_commit=head,
            )  # fmt: skip
        commit, url = str(made.oid), str(made.commit_url)
    with _explained(repo_id, "it was committed, and could not be compared"):
        _compare(_remote(api, repo_id, commit), wanted, repo_id)
    nbytes = sum(content.nbytes for content in wanted.values())
    return Pushed(repo_id, url, commit, tuple(sorted(wanted)), nbytes, nbytes_changed, tuple(foreign))


def _check_card(folder: Path) -> None:
    """VerifyError for a card that the Hub refuses; asked before anything is sent."""
    from huggingface_hub import ModelCard

    try:
        ModelCard(read_card(folder)).validate()
    except ValueError as e:
        raise VerifyError(
            f"the Hub refuses the card: {' '.join(str(e).split())[:300]}", where=str(folder / README),
            hint="mend its front matter, or write the card anew with `quantkit card`",
        ) from None  # fmt: skip


def _branch(api: HfApi, repo_id: str, revision: str) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    except HfHubHTTPError as e:
        if e.response.status_code in (400, 422):
            raise UsageError(
                f"the Hub does not take {revision!r} for a branch", where=repo_id,
                hint="name another; the repository is there, and nothing was committed",
            ) from None  # fmt: skip
        raise


def _earlier(api: HfApi, repo_id: str, head: str | None, before: Mapping[str, Any], manifest: Path) -> tuple[str, ...]:
    """Names of files that quantkit made in the repository from the same weights as these, in the same way. OutputError
    if it made them otherwise."""
    if "quantkit.json" not in before:
        return ()
    there = Path(api.hf_hub_download(repo_id, "quantkit.json", revision=head))
    try:
        one, other = read_json(there), read_json(manifest)
        sums = [{str(row["sha256"]) for row in table["source"]["files"]} for table in (one, other)]
        names = tuple(str(row["name"]) for row in one["files"])
    except (QuantkitError, KeyError, TypeError):
        sums, names = [set(), {""}], ()
    ways = [_way(table) for table in (one, other)]
    if sums[0] != sums[1] or ways[0] != ways[1]:
        held = "another model by quantkit" if sums[0] != sums[1] else f"this model as {ways[0]}, not {ways[1]}"
        raise OutputError(
            f"the repository holds {held}", where=repo_id,
            hint="name another repository, or make it this one with --replace",
        )  # fmt: skip
    return names


def _way(manifest: Mapping[str, Any]) -> str:
    """How a folder was quantized, as its name would say it: "gptq-4bit"."""
    method = manifest.get("method")
    return str(method.get("slug")) if isinstance(method, Mapping) else "another kind of copy"


def _foreign(
    before: Mapping[str, Any], files: Mapping[str, Path], repo_id: str, earlier: Sequence[str], *, replace: bool
) -> list[str]:
    """Names of files in the repository that are to be deleted; earlier: those that are ours. OutputError for those of
    somebody else."""
    foreign = sorted(before.keys() - files.keys() - {ATTRIBUTES})
    others = "quantkit.json" not in before and before.keys() - {ATTRIBUTES, README}
    # What an earlier push of ours may have left beside the model is nobody else's.
    if (set(foreign) - {EVALUATION, LAYERS, ALLOCATION, *earlier} or others) and not replace:
        raise OutputError(
            f"the repository holds other files ({', '.join((foreign or sorted(before))[:3])})", where=repo_id,
            hint="name another repository, or make it this model with --replace: they are deleted then",
        )  # fmt: skip
    return foreign


@dataclass(frozen=True)
class _Content:
    """A file by its size and its sums: SHA-256, which large storage goes by, and git's own of the bytes in it."""

    nbytes: int
    sha256: str
    blob: str

    @classmethod
    def of_file(cls, path: Path) -> _Content:
        size = path.stat().st_size
        if size > LARGEST_IN_GIT:
            return cls(size, sha256_of(path), "")
        return cls.of_bytes(path.read_bytes())

    @classmethod
    def of_bytes(cls, data: bytes) -> _Content:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        return cls(len(data), hashlib.sha256(data).hexdigest(), blob)

    def is_at(self, remote: Any) -> bool:
        """Whether a file of the Hub's listing is this one."""
        if remote.lfs is not None:
            return bool(remote.lfs.sha256 == self.sha256)
        return bool(remote.blob_id == self.blob)


def _remote(api: HfApi, repo_id: str, revision: str | None) -> dict[str, Any]:
    """Files of a repository by path, as the Hub lists them."""
    from huggingface_hub.hf_api import RepoFile

    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _compare(found: Mapping[str, Any], wanted: Mapping[str, _Content], repo_id: str) -> None:
    """RunError if what was committed is not what lies here."""
    wrong = [name for name, content in wanted.items() if name not in found or not content.is_at(found[name])]
    wrong += sorted(found.keys() - wanted.keys())
    if wrong:
        raise RunError(
            f"{wrong[0]} was committed, and is not on the Hub what it is here", where=repo_id,
            hint="somebody else wrote to it, or the upload was damaged: look at the repository, then push again",
        )  # fmt: skip


@contextmanager
def _no_other_bars() -> Iterator[None]:
    """huggingface_hub shows none of its own meanwhile, nor the addresses that it uploads to, which are signed."""
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    before, verbosity = are_progress_bars_disabled(), hub_logging.get_verbosity()
    disable_progress_bars()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)
        if not before:
            enable_progress_bars()


@contextmanager
def _explained(repo_id: str, state: str) -> Iterator[None]:
    """Says what went wrong in our words, and what has become of the repository by then."""
    from quantkit.hub_errors import explain_push

    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; {state}", where=repo_id, hint="the same command sends only what is missing"
        ) from None
    except QuantkitError:
        raise
    except Exception as e:
        raise explain_push(e, repo_id, state) from None
