"""Files that several processes, also of several machines, open at the same time."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.checkpoint import shared
from quantkit.errors import SourceError

WRITER = """
import sys
from pathlib import Path
from quantkit.checkpoint.shared import write_once
folder, own = Path(sys.argv[1]), sys.argv[2]
sys.stdin.readline()
print([write_once(folder / f"{i}.json", {"by": own}) ["by"] for i in range(50)])
"""


def test_of_many_who_write_one_has_written(tmp_path: Path) -> None:
    def start(own: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(own)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    writers = [start(own) for own in range(3)]
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write("\n")
        writer.stdin.flush()
    said = [writer.communicate()[0] for writer in writers]
    assert said[0] == said[1] == said[2]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{i}.json" for i in range(50))
    assert str([json.loads((tmp_path / f"{i}.json").read_text())["by"] for i in range(50)]) == said[0].strip()


def test_a_filesystem_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    assert shared.write_once(tmp_path / "a.json", {"by": 1}) == {"by": 1}
    assert shared.read_if_there(tmp_path / "a.json") == {"by": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_filesystem_that_finds_it_created_by_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What GlusterFS does: O_CREAT without O_EXCL ends in EEXIST."""
    (tmp_path / "a").write_bytes(b"theirs")
    real = os.open

    def opened(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", opened)
    fd = shared.open_or_create(tmp_path / "a", 0o600)
    assert os.pread(fd, 10, 0) == b"theirs"
    os.close(fd)


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    with pytest.raises(OSError, match="symbolic link"):
        shared.open_or_create(tmp_path / "a", 0o600)
    assert not (tmp_path / "b").exists()


def test_what_is_there_and_what_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "PAUSE", 0)
    assert shared.read_if_there(tmp_path / "none" / "a.json") is None
    assert shared.read_if_there(tmp_path / "a.json") is None
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(SourceError, match="not valid JSON"):
        shared.read_if_there(tmp_path / "a.json")
    with pytest.raises(SourceError, match="not valid JSON"):
        shared.write_once(tmp_path / "a.json", {})
