"""The Hugging Face layout: config.json, one or many safetensors or pytorch_model*.bin files, an index, side files."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from quantkit.checkpoint.header import TensorInfo, quote
from quantkit.checkpoint.reader import read_json, read_weight_files, safe_path
from quantkit.checkpoint.views import plain
from quantkit.errors import SourceError
from quantkit.layouts.base import CODE_KEYS, Checkpoint, CopiedFile, Target, strip

CONFIG = "config.json"
SAFETENSORS_INDEX = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"
# In the order in which they are looked for: the first that is there is read.
WEIGHT_SETS = (SAFETENSORS_INDEX, "model.safetensors", TORCH_INDEX, "pytorch_model.bin")

# What travels with a derived model, byte for byte. README.md is the parent's card: quoted in ours, not copied.
SIDE_FILES = re.compile(
    # Data only: code and pickles do not travel, whatever they are called.
    r"(?!.*\.(?:pyc?|so|pth?|pkl|pickle|bin|exe|sh)$)"
    r"(?:generation_config\.json|tokenizer.*|tekken\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)"
    r"|merges\.txt|spiece\.model|sentencepiece.*\.model|chat_template.*|(processor|preprocessor)_config\.json"
    r"|(LICEN[SC]E|NOTICE|COPYING|USE_POLICY)(?:[.\-_].*)?)",
    re.IGNORECASE,
)
TOKENIZER_FILES = re.compile(
    r"tokenizer.*|tekken\.json|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|.*\.model|chat_template.*",
    re.IGNORECASE,
)
LICENCE_FILES = re.compile(rf"(?={SIDE_FILES.pattern})(?:LICEN[SC]E|NOTICE|COPYING|USE_POLICY).*", re.IGNORECASE)
MAX_SIDE_FILE = 256 * 1024 * 1024


def code_keys(config: Mapping[str, Any]) -> list[str]:
    """The keys at any depth of a config.json that name code to run or to fetch."""
    removed: list[str] = []
    strip(config, removed)
    return sorted(set(removed) & set(CODE_KEYS))


def open_hf(folder: Path, *, data_present: bool = True) -> Checkpoint:
    """Reads config, index and headers. Raises SourceError, naming the file at fault."""
    if not (folder / CONFIG).exists():
        raise SourceError(
            "the folder has no config.json", where=str(folder), hint="name the folder that `hf download` or "
            "`save_pretrained` filled, or one with params.json and consolidated weights",
        )  # fmt: skip
    config = read_json(safe_path(folder, CONFIG))
    names, index, index_total = _weight_files(folder)
    missing = [n for n in names if not safe_path(folder, n).exists()] if index is not None else []
    if missing and data_present:
        raise SourceError(
            f"the index names {missing[0]}, which is not there ({len(missing)} of {len(names)} files are missing)",
            where=str(folder), hint="the download is incomplete: fetch it again",
        )  # fmt: skip
    gone = set(missing)
    names = [n for n in names if n not in gone]
    tensors, files = read_weight_files(folder, names, data_present=data_present)
    absent = match_index(folder, index, tensors, gone) if index is not None else {}
    by_name = {t.name: plain(t) for t in tensors}
    return Checkpoint(folder, "hf", config, by_name, tuple(files), absent, index_total, side_files(folder))


def hf_target(checkpoint: Checkpoint) -> Target:
    """A Hugging Face folder of the checkpoint: names as they are, and all that travels with a model. What a folder of
    another layout lacks of it (`generated`) is for that layout to add."""
    config, stripped = checkpoint.output_config()
    copies = tuple(CopiedFile(name, name, size) for name, size in checkpoint.side_files)
    names = {name: name for name in (*checkpoint.tensors, *checkpoint.absent)}
    return Target("hf", CONFIG, config, names, copies=copies, stripped=tuple(stripped))


def _weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None, int | None]:
    """Names of the weight files, the index's weight_map if there is one, and its total_size."""
    for single, index_name in (("model.safetensors", SAFETENSORS_INDEX), ("pytorch_model.bin", TORCH_INDEX)):
        alone = (folder / single).exists() or (folder / single).is_symlink()
        if (folder / index_name).exists():
            weight_map, total = read_index(folder, index_name)
            if alone and single not in weight_map.values():  # transformers would load the one, others the other
                raise SourceError(
                    f"{single} lies beside an index of other files: which are the weights?",
                    where=str(folder), hint="keep one set of weights in the folder",
                )  # fmt: skip
            return sorted(set(weight_map.values())), weight_map, total
        if alone:
            return [single], None, None
    found = sorted(p.name for p in folder.iterdir() if p.name.endswith((".safetensors", ".bin", ".pth", ".gguf")))
    raise SourceError(
        "no model.safetensors or pytorch_model.bin, and no index of their shards",
        where=str(folder),
        hint=f"found {', '.join(found[:4])}" if found else "the folder holds no weights",
    )


def read_index(folder: Path, name: str) -> tuple[dict[str, str], int | None]:
    path = safe_path(folder, name)
    table = read_json(path)
    weight_map = table.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise SourceError(
            "weight_map is not a table of tensor names to file names", where=str(path), hint="fetch the file again"
        )
    suffix = ".bin" if name == TORCH_INDEX else ".safetensors"
    for tensor, file in weight_map.items():
        safe_path(folder, file)
        if not file.endswith(suffix):
            raise SourceError(
                f"tensor {quote(tensor)} is placed in {quote(file)}, not a {suffix} file",
                where=str(path), hint="fetch the file again",
            )  # fmt: skip
    metadata = table.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return weight_map, int(total) if isinstance(total, (int, float)) and 0 <= total < 2**63 else None


def match_index(
    folder: Path, index: Mapping[str, str], tensors: Iterable[TensorInfo], gone: Collection[str] = ()
) -> dict[str, str]:
    """The tensors that the index places in files that are not there. SourceError where it and the files disagree."""
    by_name = {t.name: t for t in tensors}
    absent: dict[str, str] = {}
    for name, file in index.items():
        if file in gone:
            absent[name] = file
        elif name not in by_name or by_name[name].file != file:
            raise SourceError(
                f"the index places tensor {quote(name)} in {file}, which does not hold it",
                where=str(folder), hint="index and weights are of different downloads: fetch them again",
            )  # fmt: skip
    stray = [t for t in by_name if t not in index]
    if stray:
        raise SourceError(
            f"tensor {quote(stray[0])} is in {by_name[stray[0]].file} but not in the index",
            where=str(folder), hint="index and weights are of different downloads: fetch them again",
        )  # fmt: skip
    return absent


def side_files(folder: Path) -> tuple[tuple[str, int], ...]:
    found = []
    for path in sorted(folder.iterdir()):
        if SIDE_FILES.fullmatch(path.name) and not path.is_dir():
            size = safe_path(folder, path.name).stat().st_size
            if size > MAX_SIDE_FILE:
                raise SourceError(
                    f"{path.name} has {size:,} bytes: that is no tokenizer or licence",
                    where=str(path), hint="take it out of the folder",
                )  # fmt: skip
            found.append((path.name, size))
    return tuple(found)


def index_text(weight_map: dict[str, str], total_size: int) -> bytes:
    """model.safetensors.index.json as huggingface_hub writes it: sorted keys, two spaces, a newline at the end."""
    table = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    return (json.dumps(table, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
