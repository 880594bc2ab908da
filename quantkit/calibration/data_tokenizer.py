"""A model's tokenizer without torch: tokenizer.json as it stands, and of tokenizer_config.json what changes the ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.pre_tokenizers import Metaspace

from quantkit.calibration.data_encode import FastTokenizer, SlowTokenizer, TextTokenizer, explained
from quantkit.checkpoint.header import quote
from quantkit.checkpoint.reader import read_json, safe_path
from quantkit.errors import SourceError

FILE, CONFIG, MAP, MODEL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"
MAX_FILE = 256 * 2**20  # the largest published have 35 MB
OTHERS = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
          "tekken.json")  # fmt: skip
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("extra_special_tokens", "additional_special_tokens")
HINT = "fetch the model again"


def read_tokenizer(source: Path | bytes) -> TextTokenizer:
    """The tokenizer of a model's folder, or of the content of a tokenizer.json. Truncation and padding are off.

    The folder's tokenizer.json is taken as it stands, with the special tokens added to it that tokenizer_config.json
    names: what is installed beside makes no difference. A folder that has vocabulary files only is for transformers
    to read (and that imports torch). Raises SourceError.
    """
    if isinstance(source, bytes):
        return FastTokenizer("the tokenizer.json that quantkit writes", _parse(source, "the native tokenizer"))
    path = safe_path(source, FILE)
    if not path.exists():
        return _by_transformers(source)
    try:
        if path.stat().st_size > MAX_FILE:
            raise SourceError(f"{FILE} is larger than {MAX_FILE >> 20} MiB", where=str(path), hint=HINT)
        tokenizer = _parse(path.read_bytes(), str(path))
    except OSError as e:
        raise SourceError(
            f"{FILE} cannot be read: {e.strerror}", where=str(path), hint="check its permissions"
        ) from None
    config = _optional(source, CONFIG)
    try:
        _follow_llama(tokenizer, config, _optional(source, MODEL))
        _add_tokens(tokenizer, config, {} if "added_tokens_decoder" in config else _optional(source, MAP))
    except (TypeError, ValueError, AttributeError, KeyError) as e:
        raise SourceError(
            f"{CONFIG} names its tokens in a way that nothing reads: {_first(e)}", where=str(source), hint=HINT
        ) from None
    return FastTokenizer(str(path), tokenizer)


def _parse(raw: bytes, where: str) -> Tokenizer:
    if raw.startswith(b"version https://git-lfs"):
        raise SourceError(
            "this is a Git LFS pointer, a line of text in place of the tokenizer",
            where=where, hint="run `git lfs pull` in the clone, or fetch the model with `hf download`",
        )  # fmt: skip
    with explained(f"{FILE} is damaged", where):
        tokenizer = Tokenizer.from_buffer(raw)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):  # merges left out at random, a thing of training
        tokenizer.model.dropout = None
    return tokenizer


def _follow_llama(tokenizer: Tokenizer, config: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """transformers 5 has its own idea of the first blank in a text of Llama 1 and 2, whatever the file says."""
    named = config.get("tokenizer_class") or model.get("tokenizer_class")
    if model.get("model_type") != "llama" or str(named).removesuffix("Fast") != "LlamaTokenizer":
        return
    if "ByteLevel" in f"{tokenizer.pre_tokenizer}{tokenizer.decoder}":  # Llama 3 under a wrong name
        return
    prefix = config.get("add_prefix_space")
    scheme = "never" if prefix is False else "always" if config.get("legacy") else "first"
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = Metaspace(replacement="▁", prepend_scheme=scheme, split=False)


def _add_tokens(tokenizer: Tokenizer, config: Mapping[str, Any], legacy: Mapping[str, Any]) -> None:
    """Makes special tokens of what the configuration calls so: they are then cut out of a text before it is split."""
    there = tokenizer.get_added_tokens_decoder().values()
    same = {repr(token) for token in there}
    listed = sorted((config.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0]))
    tokens = [token for _, fields in listed if repr(token := AddedToken(**fields)) not in same]
    known = {token.content for token in (*there, *tokens)}
    for token in map(_special, _names({**config, **legacy})):
        if token.content not in known:
            known.add(token.content)
            tokens.append(token)
    tokenizer.add_tokens(tokens)
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))


def _names(config: Mapping[str, Any]) -> Iterator[Any]:
    yield from (config[key] for key in NAMED if config.get(key) is not None)
    own = (key for key in config if key.endswith("_token") and key not in NAMED)
    yield from (config[key] for key in own if isinstance(config[key], str))
    extra = next((config[key] for key in EXTRA if config.get(key)), ())
    yield from extra.values() if isinstance(extra, dict) else extra


def _special(value: Any) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True)
    flags = {key: bool(value[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in value}
    return AddedToken(value["content"], special=True, **flags)


def _optional(folder: Path, name: str) -> dict[str, Any]:
    return read_json(safe_path(folder, name)) if safe_path(folder, name).exists() else {}


def _by_transformers(folder: Path) -> TextTokenizer:
    if not any((folder / name).exists() for name in OTHERS):
        raise SourceError(
            "the model folder has no tokenizer, and a text is to be read",
            where=str(folder), hint=f"add {FILE} and {CONFIG}, as the model's publisher has them",
        )  # fmt: skip
    tokenizer = load_with_transformers(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        backend.no_truncation()
        backend.no_padding()
        return FastTokenizer(str(folder), backend)
    return SlowTokenizer(str(folder), tokenizer)


def load_with_transformers(folder: Path) -> Any:
    """transformers' tokenizer of a folder, which runs none of its code. Imports torch. Raises SourceError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as e:  # whatever a stranger's files make it stumble over
        raise SourceError(
            f"transformers cannot read the tokenizer: {_first(e)}", where=str(folder), hint=HINT
        ) from None


def _first(e: Exception) -> str:
    return quote((str(e).strip() or type(e).__name__).splitlines()[0][:200])
