"""A tekken.json as the content of tokenizer.json, with the same ids for every text.

tekken.json holds byte strings in the order of their ranks, 150,000 of them, of which the first `default_vocab_size`
less `default_num_special_tokens` count; their ids are rank + number of special tokens, whose ids come first. Files
without a list of special tokens have the twenty of 2024, and the rest of their places are fillers.

tiktoken reads it so: the pattern cuts the text; a cut that is a token as a whole is that token; the others are joined
by rank, up from bytes. So does tokenizer.json: Split, bytes written as characters (ByteLevel), `ignore_merges`, BPE.

Special tokens match in text, as those of a SentencePiece model do (see `spm`); `split_special_tokens=True` reads their
spelling as any other text, as mistral-common does.
"""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quantkit.checkpoint.header import quote, strict_json
from quantkit.errors import SourceError
from quantkit.tokenization.merges import last_pair
from quantkit.tokenization.parts import added_token, bos_template, isolate

MAX_FILE = 32 * 1024 * 1024  # published ones have 15 to 20 MB
MAX_TOKENS = 1_000_000
MAX_TOKEN = 128  # bytes; the longest published has 78
MAX_PATTERN = 10_000
LEGACY = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
          "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
          "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")  # fmt: skip
LAST_LEGACY_VERSION = 7
BOS, EOS, UNK, PAD = "<s>", "</s>", "<unk>", "<pad>"
HINT = "the file is damaged or no tekken.json: fetch it again"

# The one pattern of all published files.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_Fail = Callable[[str], SourceError]

_SHOWN = (*range(33, 127), *range(161, 173), *range(174, 256))
_HIDDEN = [byte for byte in range(256) if byte not in _SHOWN]
_BYTE_LEVEL = {
    byte: chr(256 + i) for i, byte in enumerate(_HIDDEN)
}  # GPT-2's way to write bytes: no blanks, no controls


@dataclass(frozen=True)
class Tekken:
    """A tokenizer: `special` are the ids from 0 on, `tokens` those after them, in the order of their ranks."""

    pattern: str
    special: tuple[str, ...]
    tokens: tuple[bytes, ...]

    @property
    def size(self) -> int:
        return len(self.special) + len(self.tokens)


def read_tekken(raw: bytes, *, where: str) -> Tekken:
    """The tokenizer in the bytes of a file. SourceError, with `where` as its second line, if they are not one."""

    def fail(what: str) -> SourceError:
        return SourceError(what, where=where, hint=HINT)

    if len(raw) > MAX_FILE:
        raise fail(f"the tokenizer has {len(raw):,} bytes; the limit is {MAX_FILE:,}")
    try:
        table = strict_json(raw)
    except ValueError as e:
        raise fail(f"it is not valid JSON: {e}") from None
    config, vocab = (table.get("config"), table.get("vocab")) if isinstance(table, dict) else (None, None)
    if not isinstance(config, dict) or not isinstance(vocab, list):
        raise fail("it has no config or no vocab, as a tekken.json has")
    size, reserved = config.get("default_vocab_size"), config.get("default_num_special_tokens")
    if type(size) is not int or type(reserved) is not int or not 0 < reserved < size <= MAX_TOKENS:
        raise fail(f"its config has {quote(size)} tokens, {quote(reserved)} of them special")
    if not 256 <= size - reserved <= len(vocab):
        raise fail(f"its config promises {size - reserved:,} tokens besides the special ones; {len(vocab):,} are there")
    pattern = config.get("pattern")
    if not isinstance(pattern, str) or not 0 < len(pattern) <= MAX_PATTERN:
        raise fail("its config has no pattern, or an endless one")
    special = _special(table.get("special_tokens"), config.get("version"), reserved, fail)
    tokens = tuple(_token(rank, entry, fail) for rank, entry in enumerate(vocab[: size - reserved]))
    if len(set(tokens)) < len(tokens):
        twice = next(t for t, n in Counter(tokens).items() if n > 1)
        raise fail(f"the token {quote(twice)} stands twice")
    return Tekken(pattern, special, tokens)


def _special(entries: Any, version: Any, reserved: int, fail: _Fail) -> tuple[str, ...]:
    """The special tokens by id, fillers included."""
    if entries is None:
        number = re.fullmatch(r"v(\d{1,4})", version) if isinstance(version, str) else None
        if number is None or int(number[1]) > LAST_LEGACY_VERSION:
            raise fail(f"it is of version {quote(version)} and has no special_tokens")
        texts = list(LEGACY)
    else:
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise fail("its special_tokens are not a list of tables")
        for place, entry in enumerate(entries):
            if type(entry.get("rank")) is not int or entry["rank"] != place:
                raise fail(f"special token {place} has the rank {quote(entry.get('rank'))}")
            if not isinstance(entry.get("token_str"), str) or not 0 < len(entry["token_str"]) <= MAX_TOKEN:
                raise fail(f"special token {place} has no text, or an endless one")
        texts = [entry["token_str"] for entry in entries]
    if len(texts) > reserved:
        raise fail(f"it has {len(texts):,} special tokens; its config has room for {reserved:,}")
    texts = [*texts, *(f"<SPECIAL_{i}>" for i in range(len(texts), reserved))]
    if len(set(texts)) < len(texts):
        twice = next(t for t, n in Counter(texts).items() if n > 1)
        raise fail(f"the special token {quote(twice)} stands twice")
    if missing := {BOS, EOS, UNK} - set(texts):
        raise fail(f"it has no special token {min(missing)}")
    return tuple(texts)


def _token(rank: int, entry: Any, fail: _Fail) -> bytes:
    if (
        not isinstance(entry, dict)
        or type(entry.get("rank")) is not int
        or not isinstance(entry.get("token_bytes"), str)
    ):
        raise fail(f"entry {rank} of its vocab has no rank or no token_bytes")
    if entry["rank"] != rank:
        raise fail(f"entry {rank} of its vocab has the rank {quote(entry['rank'])}")
    try:
        token = base64.b64decode(entry["token_bytes"], validate=True)
    except ValueError:
        raise fail(f"entry {rank} of its vocab is not base64") from None
    if not 0 < len(token) <= MAX_TOKEN:
        raise fail(f"entry {rank} of its vocab has {len(token):,} bytes; 1 to {MAX_TOKEN} are allowed")
    if rank < 256 and token != bytes([rank]):
        raise fail(f"entry {rank} of its vocab is not the byte {rank}: the first 256 are the bytes, in order")
    return token


def tokenizer_json(tekken: Tekken, *, where: str) -> dict[str, Any]:
    """The content of tokenizer.json. SourceError if a special token and another would be written the same."""
    order: dict[bytes, float] = {token: rank for rank, token in enumerate(tekken.tokens)}
    merges = []
    for token in tekken.tokens[256:]:
        if pair := last_pair(token, order):  # None: met as a whole cut of the text alone
            merges.append([_shown(pair[0]), _shown(pair[1])])
    vocab = {text: i for i, text in enumerate((*tekken.special, *map(_shown, tekken.tokens)))}
    if len(vocab) < tekken.size:
        both = next(t for t in map(_shown, tekken.tokens) if t in set(tekken.special))
        raise SourceError(f"{quote(both)} is a special token and another one", where=where, hint=HINT)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(i, text) for i, text in enumerate(tekken.special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [isolate(tekken.pattern), _byte_level()]},
        "post_processor": bos_template(BOS, tekken.special.index(BOS)),
        "decoder": _byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _shown(token: bytes) -> str:
    return token.decode("latin-1").translate(_BYTE_LEVEL)


def _byte_level() -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
