"""How checkpoints lie on disk: one file per layout. `open_checkpoint` finds out which one a folder has."""

from __future__ import annotations

from pathlib import Path

from quantkit.errors import SourceError
from quantkit.layouts.hf import Checkpoint, open_hf

__all__ = ["Checkpoint", "open_checkpoint"]


def open_checkpoint(folder: Path, *, data_present: bool = True) -> Checkpoint:
    """The checkpoint in `folder`. `data_present=False` is enough for inspecting and planning: the weight files may be
    cut off after their headers, or absent beside an index. Raises SourceError."""
    if not folder.exists():
        raise SourceError(f"there is no folder {folder.name!r}", where=str(folder), hint="check the path for a typo")
    if not folder.is_dir():
        raise SourceError(
            f"{folder.name!r} is a file",
            where=str(folder),
            hint="name the folder that holds config.json and the weights",
        )
    try:
        return open_hf(folder, data_present=data_present)
    except OSError as e:
        raise SourceError(
            f"{folder.name!r} cannot be read: {e.strerror}", where=str(e.filename), hint="check its permissions"
        ) from None
