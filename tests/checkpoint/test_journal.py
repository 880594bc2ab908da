"""What a journal gives back after it was altered, torn, or written to."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.checkpoint.journal import Journal

HEAD = {"plan": "0f3a"}
ENTRIES = [{"unit": "a", "report": [0.0312, 0.5]}, {"source": "model.safetensors", "sha256": "9e14"}, {"layer": 7}]


@pytest.fixture
def written(tmp_path: Path) -> bytes:
    journal = Journal(tmp_path)
    journal.start(HEAD)
    journal.append(ENTRIES[:2])
    journal.append(ENTRIES[2:])
    journal.close()
    return journal.path.read_bytes()


def reopened(out: Path, raw: bytes) -> Journal:
    (out / ".quantkit" / "journal").write_bytes(raw)
    return Journal(out)


def test_it_comes_back_as_it_was(written: bytes, tmp_path: Path) -> None:
    journal = reopened(tmp_path, written)
    assert (journal.head, journal.entries, journal.damage) == (HEAD, ENTRIES, "")


def test_whatever_byte_was_altered(written: bytes, tmp_path: Path) -> None:
    """What comes before that line counts, and nothing else; an end that is no line may be a crash's, and no fault."""
    for place in range(len(written)):
        for bit in (1, 16):
            raw = bytearray(written)
            raw[place] ^= bit
            journal = reopened(tmp_path, bytes(raw))
            whole = written.count(b"\n", 0, place)
            assert [journal.head, *journal.entries] == ([HEAD, *ENTRIES][:whole] or [None])
            assert bool(journal.damage) == (place < len(written) - 1)
            journal.close()


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_line_that_is_gone(gone: int, written: bytes, tmp_path: Path) -> None:
    """What comes behind speaks as if nothing were missing."""
    lines = written.splitlines(keepends=True)
    journal = reopened(tmp_path, b"".join(lines[:gone] + lines[gone + 1 :]))
    assert [journal.head, *journal.entries] == ([HEAD, *ENTRIES][:gone] or [None])
    assert journal.damage


def test_lines_that_changed_places(written: bytes, tmp_path: Path) -> None:
    first, second, third, fourth = written.splitlines(keepends=True)
    journal = reopened(tmp_path, first + third + second + fourth)
    assert (journal.head, journal.entries) == (HEAD, [])
    assert journal.damage


def test_wherever_it_was_torn(written: bytes, tmp_path: Path) -> None:
    for size in range(len(written)):
        journal = reopened(tmp_path, written[:size])
        whole = written.count(b"\n", 0, size)
        assert [journal.head, *journal.entries] == ([HEAD, *ENTRIES][:whole] or [None])
        assert journal.damage == ""
        journal.close()


def test_it_goes_on_behind_what_counts(written: bytes, tmp_path: Path) -> None:
    journal = reopened(tmp_path, written.replace(b"9e14", b"9e15"))
    assert str(journal.path) in journal.damage
    journal.append([{"layer": 8}])
    journal.close()
    journal = Journal(tmp_path)
    assert (journal.entries, journal.damage) == ([ENTRIES[0], {"layer": 8}], "")
