"""Tokenizer files from one layout to the other. Standard library only, so that a plan can know their bytes.

A native folder (mistral-src) has one file, tokenizer.model or tekken.json; transformers reads tokenizer.json. `spm` and
`tekken` make that one, with the same ids for every text. There is no way back (a tokenizer.json has no scores), so a
Hugging Face folder has to hold the native file already.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from quantkit.errors import SourceError
from quantkit.tokenization import spm, tekken
from quantkit.tokenization.sentencepiece_model import CONTROL, SentencePieceModel, read_sentencepiece
from quantkit.tokenization.tekken import Tekken, read_tekken

NATIVE = re.compile(r"tokenizer\.model(\.v\d+(?:m\d+)?)?|tekken\.json")
PLAIN = "tokenizer.model"
# What holds a vocabulary, beside the native files; config files alone are no tokenizer.
_OTHER = re.compile(r"tokenizer\.json|vocab\.(?:json|txt)|merges\.txt|.*\.(?:model|tiktoken)|.*tokenizer\.model\..*")


def hf_tokenizer_files(
    name: str, raw: bytes, *, where: str, vocab_size: int | None, context: int | None
) -> tuple[dict[str, bytes], list[str]]:
    """What to write beside the native tokenizer file `name` in a Hugging Face folder, by name, and notes for people.

    `raw` is the file's content and `where` its path, for errors; `vocab_size` the rows of the model's embedding,
    `context` the longest text in tokens, if known. The bytes depend on these alone. SourceError if the file is damaged,
    cannot be expressed exactly, or has more tokens than `vocab_size`.
    """
    tokenizer = _read(name, raw, where)
    size = _size(tokenizer)
    if vocab_size is not None and size > vocab_size:
        raise _too_large(name, size, vocab_size, where)
    notes = []
    if vocab_size is not None and size < vocab_size:
        notes.append(f"{name} has {size:,} tokens, the model {vocab_size:,}: ids from {size:,} on stand for no text")
    # LlamaTokenizer would put its own normalizer in the place of ours, which changes the ids of leading spaces.
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if context is not None:
        config["model_max_length"] = context
    if isinstance(tokenizer, Tekken):
        content = tekken.tokenizer_json(tokenizer, where=where)
        config |= {f"{key}_token": text for key, text in _TEKKEN_NAMES.items() if text in tokenizer.special}
        if tokenizer.pattern == tekken.PATTERN:
            # transformers takes any large vocabulary of a Mistral for one of those published with a wrong pattern, and
            # warns. This says to put the right one in, which is the one that is there.
            config["fix_mistral_regex"] = True
        notes.append(
            f"with mistral-common 1.11.7 or newer installed, AutoTokenizer reads {name} in place of tokenizer.json"
        )
    else:
        content = spm.tokenizer_json(tokenizer, where=where)
        ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id, "pad": tokenizer.pad_id}
        config |= {f"{key}_token": tokenizer.pieces[i].text for key, i in ids.items() if i is not None}
    notes.append(
        "this layout has no chat template: a chat model needs one as chat_template.jinja beside tokenizer.json"
    )
    files = {
        "tokenizer.json": json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n",
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True).encode() + b"\n",
    }
    return files, notes


_TEKKEN_NAMES = {"bos": tekken.BOS, "eos": tekken.EOS, "unk": tekken.UNK, "pad": tekken.PAD}


@dataclass(frozen=True)
class NativeTokenizer:
    """Which file of a folder a native one needs, what it is called there, and how many tokens it has."""

    source: str
    name: str
    size: int


def native_tokenizer(
    names: Iterable[str], read: Callable[[str], bytes], *, vocab_size: int, where: str
) -> NativeTokenizer | None:
    """The tokenizer of a Hugging Face folder for a native one; None if no tokenizer is there.

    `names` are the files of the folder `where`, `read` gives the content of one. Native loaders want exactly one
    tokenizer file and choose the prompt's form by its name: `.v3` and so on are kept, and a tokenizer.model that has
    the control pieces of a later form gets the suffix. It fits if it has `vocab_size` tokens, or else fewer.
    SourceError if there is none of use, none that fits, or more than one.
    """
    there = sorted(names)
    natives = [name for name in there if NATIVE.fullmatch(name)]
    if not natives:
        others = [name for name in there if _OTHER.fullmatch(name)]
        if not others:
            return None
        raise SourceError(
            f"{others[0]} is there, but neither tokenizer.model nor tekken.json, and they cannot be made from it",
            where=where,
            hint="add the one that the model was trained with, or leave the tokenizer out with --no-tokenizer",
        )
    found: dict[bytes, list[str]] = {}
    for name in natives:
        found.setdefault(read(name), []).append(name)
    sizes = {}
    targets = {}
    for raw, same in found.items():
        tokenizer = _read(same[0], raw, f"{where}/{same[0]}")
        # Of one content under two names, the name that tells the prompt's form, as Mistral-7B-v0.3 has it.
        for name in [n for n in same if n != PLAIN] or same:
            sizes[name] = _size(tokenizer)
            targets[name] = _named(name, tokenizer)
    fitting = [name for name, size in sizes.items() if size == vocab_size]
    fitting = fitting or [name for name, size in sizes.items() if size < vocab_size]
    if not fitting:
        name = min(sizes, key=lambda n: sizes[n])
        raise _too_large(name, sizes[name], vocab_size, where)
    if len(fitting) > 1:
        raise SourceError(
            f"{' and '.join(fitting)} both fit the model, and a native folder holds one tokenizer",
            where=where,
            hint="take the one away that the model was not trained with",
        )
    return NativeTokenizer(fitting[0], targets[fitting[0]], sizes[fitting[0]])


def _named(name: str, tokenizer: SentencePieceModel | Tekken) -> str:
    if name != PLAIN or isinstance(tokenizer, Tekken):
        return name
    control = set(tokenizer.texts(CONTROL))
    return name + (".v7" if "[SYSTEM_PROMPT]" in control else ".v3" if "[INST]" in control else "")


def _read(name: str, raw: bytes, where: str) -> SentencePieceModel | Tekken:
    if raw.startswith(b"version https://git-lfs"):
        raise SourceError(
            "this is a Git LFS pointer, a line of text in place of the tokenizer",
            where=where,
            hint="run `git lfs pull` in the clone, or fetch the model with `hf download`",
        )
    return read_tekken(raw, where=where) if name.endswith(".json") else read_sentencepiece(raw, where=where)


def _size(tokenizer: SentencePieceModel | Tekken) -> int:
    return tokenizer.size if isinstance(tokenizer, Tekken) else len(tokenizer.pieces)


def _too_large(name: str, size: int, vocab_size: int, where: str) -> SourceError:
    return SourceError(
        f"{name} has {size:,} tokens, more than the {vocab_size:,} of the model",
        where=where,
        hint="the tokenizer belongs to another model: fetch the one of this model",
    )
