"""What every layout gives: a Checkpoint, read by canonical names, and a Target, what a folder in it is made of.

Canonical names are those of the Hugging Face layout, and so are the row order of rotary weights and config.json: the
rest of the program knows no other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from quantkit.checkpoint.reader import WeightFile, read_json, safe_path
from quantkit.checkpoint.views import SourceTensor
from quantkit.errors import SourceError

MANIFEST = "quantkit.json"
# Keys of config.json that name code: Python files, or kernels that transformers would fetch from the Hub.
CODE_KEYS = ("auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
             "_attn_implementation_autoset", "experts_implementation", "_experts_implementation")  # fmt: skip
# They do not travel, and neither do places on somebody's machine.
STRIPPED = (*CODE_KEYS, "_name_or_path", "_commit_hash")

Prefer = Literal["hf", "mistral"]  # which of two layouts in one folder is read
Container = Literal["safetensors", "pth"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as its headers describe it.

    tensors: canonical name → how to read it, in the order of the files and of the bytes in them. `absent` maps the
    names that an index promises in files that are not there (only with data_present=False) to those files.
    params: params.json, where the layout has one; `config` is then made from it.
    dropped: tensors that are in the files and not in the model as it is read.
    notes: what was assumed or left out, for the user to know; config_notes: of that, what `config` alone is about.
    """

    folder: Path
    layout: str
    config: dict[str, Any]
    tensors: dict[str, SourceTensor]
    files: tuple[WeightFile, ...]
    absent: dict[str, str]
    index_total: int | None
    side_files: tuple[tuple[str, int], ...]
    params: dict[str, Any] | None = None
    generation: str = ""
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    config_notes: tuple[str, ...] = ()

    @property
    def parent_card(self) -> str | None:
        try:
            with safe_path(self.folder, "README.md").open("rb") as f:
                return f.read(1 << 20).decode("utf-8", "replace")
        except OSError:
            return None

    def output_config(self) -> tuple[dict[str, Any], list[str]]:
        """config.json as it travels, and the keys that were taken out of it at any depth."""
        removed: list[str] = []
        return strip(self.config, removed), sorted(set(removed))


@dataclass(frozen=True)
class CopiedFile:
    """A file that travels byte for byte, perhaps under another name."""

    source: str
    name: str
    nbytes: int


@dataclass(frozen=True)
class Target:
    """What a folder holds beside its weights, and how these are called and ordered.

    config_file: the file without which no loader takes the folder for a model; it is written last.
    names: canonical → written. head_dims: canonical → D of the rotary weights whose rows are written in pairs.
    recorded: what `config_file` of the source's layout said and this one's cannot, kept in the manifest.
    """

    layout: str
    config_file: str
    config: dict[str, Any]
    names: Mapping[str, str]
    head_dims: Mapping[str, int] = field(default_factory=dict)
    copies: tuple[CopiedFile, ...] = ()
    generated: Mapping[str, bytes] = field(default_factory=dict)
    container: Container = "safetensors"
    single: str = "model.safetensors"
    numbered: str = "model-{:05d}-of-{:05d}.safetensors"
    index_file: str = "model.safetensors.index.json"
    stripped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    recorded: Mapping[str, Any] = field(default_factory=dict)


def strip(value: Any, removed: list[str]) -> Any:
    """The value without the keys of STRIPPED at any depth; appends those that were there to `removed`."""
    if isinstance(value, dict):
        removed += [k for k in value if k in STRIPPED]
        return {k: strip(v, removed) for k, v in value.items() if k not in STRIPPED}
    if isinstance(value, list):
        return [strip(v, removed) for v in value]
    return value


def recorded_configuration(folder: Path, file: str) -> dict[str, Any] | None:
    """What the manifest in `folder` keeps of the configuration `file` of the layout it was made from. It comes from
    anybody: who uses it checks that it says what the folder says."""
    try:
        kept = read_json(safe_path(folder, MANIFEST)).get("recorded")
    except SourceError:
        return None
    found = kept.get(file) if isinstance(kept, dict) else None
    return strip(found, []) if isinstance(found, dict) else None


def record(file: str, content: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the manifest keeps of a configuration file: nothing, if it is not there, or not what JSON can say."""
    try:
        json.dumps(content, allow_nan=False)
    except ValueError:
        return {}
    return {} if content is None else {file: content}


@dataclass(frozen=True)
class NativeOptions:
    """What the user says of a source beside its name.

    rope_theta, context: where a params.json does not name them. text_only: leave the vision part out.
    """

    rope_theta: float | None = None
    context: int | None = None
    text_only: bool = False
