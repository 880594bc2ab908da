"""Real tokenizer files, and texts that tell two tokenizers apart."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from quantkit.tokenization import hf_tokenizer_files

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"

# What a test calls a file: the name it has in a native folder, and where it is.
MISTRAL = {
    "v1": ("tokenizer.model", "tokenizer.model.v1"),
    "v2": ("tokenizer.model.v2", "mistral_instruct_tokenizer_240216.model.v2"),
    "v3": ("tokenizer.model.v3", "mistral_instruct_tokenizer_240323.model.v3"),
    "v7": ("tokenizer.model.v7", "mistral_instruct_tokenizer_241114.model.v7"),
    "v7m1": ("tokenizer.model.v7m1", "mistral_instruct_tokenizer_241114.model.v7m1"),
    "tekken-2407": ("tekken.json", "tekken_240718.json"),
    "tekken-2409": ("tekken.json", "tekken_240911.json"),
}
STORIES = {"15m": "stories15m-mistral-src", "260k": "stories260k-mistral-src"}


def real_file(key: str) -> tuple[str, Path]:
    """(name in a native folder, path) of a published tokenizer; skips the test where it is not at hand."""
    if key in STORIES:
        path = SHARED / STORIES[key] / "tokenizer.model"
        if not path.exists():
            pytest.skip(f"{path} is not there")
        return "tokenizer.model", path
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or spec.origin is None:
        pytest.skip("mistral-common, which carries the real tokenizer files, is not installed")
    name, file = MISTRAL[key]
    return name, Path(spec.origin).parent / "data" / file


def hf_folder(folder: Path, name: str, raw: bytes, *, model_type: str = "mistral") -> Path:
    """The tokenizer part of a converted model, as users get it."""
    files, _ = hf_tokenizer_files(name, raw, where=str(folder / name), vocab_size=None, context=4096)
    folder.mkdir(exist_ok=True)
    for file, content in {**files, name: raw}.items():
        (folder / file).write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 32000}))
    return folder


FIXED = [
    "", " ", "  ", "a", " a", "  a", "a ", "a  b", " a  b ", "\n", "\n\n a", "a\n b\t c\r\n", "\t\tx",
    "\u00a0a\u3000b\u2009", "l'été, ça gêne où Noël œuvre à Besançon", "le cœur, « déjà » : 3,50 €",
    "e\u0301te\u0301", "日本語の文章です。東京都に行きます。", "カタカナ ﾊﾝｶｸ 漢字",
    "Привет, мир", "שלום עולם", "한국어", "ไทย", "👍", "👍🏽",
    "👩‍👩‍👧‍👦", "🏳️‍🌈 🇫🇷🇯🇵", "a👨‍💻b", "\x00", "\x01\x02\x7f", "\ufeffx", "\ufffd", "\U0010fffd", "𝔘𝔫𝔦", "▁", "▁▁x",
    "x▁ ▁y", "a▁b", "<unk>", "<s>", "</s>", "<s>a</s>", "[INST] hi [/INST]", "[INST]hi[/INST]", "<0x41>", "<0x0A>",
    "[REF]", "[REF] a", "a[REF]", "[REF]<0x41>", "[REF]<s>[/REF]", "[REFERENCE_DOC_3] b [REFERENCE_DOC_11]</s>",
    "<pad>", "[SYSTEM_PROMPT]", "<SPECIAL_20>", "[control_17]", "[TOOL_CALLS] [{}]", "0", "007", "3.14159",
    "1234567890" * 9, "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft", "x" * 999,
    "ab" * 300, "a b" * 200, "def f(x):\n    return x  # ok\n\n\nclass A:\n\tpass\n",
    "for (int i = 0; i < n; i++) { a[i] += b[i]; }\n" * 4, "#version 330\n", "https://example.org/a?b=c&d=%20#e",
    '{"a": [1, 2, {"b": null}]}', "-----=====*****", "....", "!?!?", "It's I'm we'll DON'T l’eau",
    "ALL CAPS camelCase snake_case SHOUTingWords", "ǅungla ß ﬁ İi",
]  # fmt: skip


def texts(seed: int, count: int, tokens: Sequence[str], marks: Sequence[str]) -> list[str]:
    """FIXED and `count` more: `tokens` of the vocabulary side by side and repeated, `marks` (control tokens as text),
    runs of spaces and of single characters, digits, any code point."""
    r = random.Random(seed)

    def fragment() -> str:
        kind = r.randrange(11)
        if kind == 0:
            return " " * r.randint(1, 40)
        if kind == 1:
            return r.choice(["\n", "\t", "\r\n", "\n\n\n", "\u3000", "\u00a0", "\u200d", "▁", "▁▁▁"])
        if kind == 2:
            return r.choice("abcxyz01. -=\n*é語") * r.randint(1, 50)
        if kind == 3:
            return "".join(r.choice("ab ") for _ in range(r.randint(1, 30)))
        if kind == 4:
            return chr(r.choice([r.randrange(32, 127), r.randrange(0x80, 0xD800), r.randrange(0xE000, 0x110000)]))
        if kind == 5:
            return r.choice(marks)
        if kind == 6:
            return "".join(r.choice(tokens) for _ in range(r.randint(1, 6)))
        if kind == 7:
            return r.choice(tokens) * r.randint(1, 9)
        if kind == 8:
            return (r.choice(tokens) + r.choice(tokens)) * r.randint(1, 6)
        if kind == 9:
            return str(r.randrange(10 ** r.randint(1, 30)))
        return r.choice(FIXED[:90])

    return FIXED + ["".join(fragment() for _ in range(r.randint(1, 8))) for _ in range(count)]
