"""tekken.json as tokenizer.json against mistral-common and tiktoken."""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenization.samples import hf_folder, real_file, texts

from quantkit.tokenization import hf_tokenizer_files
from quantkit.tokenization.tekken import PATTERN, read_tekken

REAL = ["tekken-2407", "tekken-2409"]
TURNS = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}</s>"
    "{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def load(key: str) -> tuple[Any, Path]:
        """mistral-common's tokenizer, and our folder."""
        name, path = real_file(key)
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        folder = tmp_path_factory.mktemp(key) / "m"
        return Tekkenizer.from_file(path), hf_folder(folder, name, path.read_bytes())

    return load


def fast(folder: Path, **options: Any) -> Any:
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder, **options)


def decode(theirs: Any, ids: list[int]) -> str:
    from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

    text: str = theirs.decode(ids, SpecialTokenPolicy.IGNORE)
    return text


@pytest.mark.parametrize("key", REAL)
def test_the_ids_and_the_text_are_mistral_commons(key: str, loaded: Any) -> None:
    theirs, folder = loaded(key)
    ours = fast(folder, split_special_tokens=True)
    words = [w for w in theirs.vocab()[1000:] if "\ufffd" not in w]
    strings = texts(0, 1500, words, theirs.vocab()[:22])
    expected = [theirs.encode(s, bos=True, eos=False) for s in strings]
    found = ours(strings).input_ids
    assert [s for s, a, b in zip(strings, expected, found, strict=True) if a != b] == []
    decoded = ours.batch_decode(found, skip_special_tokens=True)
    assert [s for s, ids, b in zip(strings, expected, decoded, strict=True) if decode(theirs, ids) != b] == []


def test_characters_of_every_kind(loaded: Any) -> None:
    """The pattern asks for Unicode classes; tiktoken and tokenizers have their own tables."""
    theirs, folder = loaded("tekken-2407")
    points = [c for c in [*range(0x3000), *range(0x3000, 0x110000, 389)] if not 0xD800 <= c < 0xE000]
    strings = [f"a{chr(c)}{chr(c)}B {chr(c)}" for c in points]
    found = fast(folder)(strings).input_ids
    assert [s for s, b in zip(strings, found, strict=True) if theirs.encode(s, bos=True, eos=False) != b] == []


def test_every_id_decodes_alike(loaded: Any) -> None:
    theirs, folder = loaded("tekken-2407")
    ours = fast(folder)
    assert len(ours) == theirs.n_words == 131072
    assert ours.convert_ids_to_tokens(range(1000)) == theirs.vocab()[:1000]
    found = ours.batch_decode([[i] for i in range(131072)])
    assert [i for i, (a, b) in enumerate(zip(theirs.vocab(), found, strict=True)) if a != b] == []


def test_golden_ids(loaded: Any) -> None:
    ours = fast(loaded("tekken-2407")[1])
    assert ours("  a b").input_ids == [1, 1032, 1261, 1289]
    assert ours("").input_ids == [1]
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id, ours.pad_token_id) == (1, 2, 0, 11)


def test_control_tokens_match_in_text_by_default_and_templates_work(loaded: Any) -> None:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    theirs, folder = loaded("tekken-2407")
    ours = fast(folder)
    ids = ours("[INST]a[/INST]</s>", add_special_tokens=False).input_ids
    assert ids == [3, 1097, 4, 2]
    assert ours.decode(ids) == "[INST]a[/INST]</s>"
    assert ours.decode(ids, skip_special_tokens=True) == "a"
    assert ours("[INST]a", split_special_tokens=True).input_ids == theirs.encode("[INST]a", bos=True, eos=False)
    chat = [
        {"role": "user", "content": "Hello,  you?"},
        {"role": "assistant", "content": "Ça va ?"},
        {"role": "user", "content": "2+2=\n  4"},
    ]
    native = MistralTokenizer.from_file(str(folder / "tekken.json"))
    expected = native.encode_chat_completion(ChatCompletionRequest(messages=chat)).tokens
    assert ours.apply_chat_template(chat, chat_template=TURNS, return_dict=False) == expected


def test_auto_tokenizer_reads_the_folder_without_a_warning(loaded: Any, caplog: pytest.LogCaptureFixture) -> None:
    """mistral_format=False: with a recent mistral-common AutoTokenizer would read tekken.json itself."""
    theirs, folder = loaded("tekken-2407")
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    try:
        ours = transformers.AutoTokenizer.from_pretrained(folder, mistral_format=False)
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.text == ""  # "with an incorrect regex pattern", for one
    text = "  l'été [INST] 123"
    assert ours(text, split_special_tokens=True).input_ids == theirs.encode(text, bos=True, eos=False)


def tiny(path: Path, tokens: list[bytes], **changes: Any) -> bytes:
    """A tekken.json of the 256 bytes and `tokens`, with three special tokens of its own."""
    special = [{"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(["<unk>", "<s>", "</s>"])]
    vocab = [bytes([i]) for i in range(256)] + tokens
    table = {
        "config": {
            "pattern": PATTERN,
            "default_vocab_size": len(vocab) + 5,
            "default_num_special_tokens": 5,
            "version": "v11",
        },
        "special_tokens": special,
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for i, t in enumerate(vocab)
        ],
        **changes,
    }
    path.write_text(json.dumps(table))
    return path.read_bytes()


def test_a_file_that_lists_its_special_tokens(tmp_path: Path) -> None:
    """Fillers up to the number in its config; tokens no joins lead to ("xyz", "aabab") are met as whole words alone."""
    pytest.importorskip("mistral_common")
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    tokens = [b"ab", b"aba", b"bab", b"xyz", b" a", b"aab", b"aabab", "é".encode(), b"aa", b"aaa"]
    raw = tiny(tmp_path / "tekken.json", tokens)
    theirs = Tekkenizer.from_file(tmp_path / "tekken.json")
    assert read_tekken(raw, where="").special == ("<unk>", "<s>", "</s>", "<SPECIAL_3>", "<SPECIAL_4>")
    ours = fast(hf_folder(tmp_path / "m", "tekken.json", raw))
    strings = texts(3, 1500, ["ab", "aba", "xyz", "aabab", "aa", " a", "é", "b"], [" "])
    strings = [s for s in strings if "<" not in s] + ["xyz", "xyzx", "aabab", " aabab", "aaabab"]
    assert ours(strings).input_ids == [theirs.encode(s, bos=True, eos=False) for s in strings]
    assert ours.pad_token is None


def test_another_pattern_is_kept_as_it_is(tmp_path: Path) -> None:
    """And transformers is not told to put the usual one in."""
    files, _ = hf_tokenizer_files("tekken.json", tiny(tmp_path / "t", []), where="", vocab_size=None, context=None)
    assert json.loads(files["tokenizer_config.json"])["fix_mistral_regex"] is True
    config = {"pattern": r"\s+|\S+", "default_vocab_size": 261, "default_num_special_tokens": 5, "version": "v11"}
    raw = tiny(tmp_path / "t", [], config=config)
    files, _ = hf_tokenizer_files("tekken.json", raw, where="", vocab_size=None, context=None)
    assert "fix_mistral_regex" not in json.loads(files["tokenizer_config.json"])
    content = json.loads(files["tokenizer.json"])
    assert content["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": r"\s+|\S+"}


@pytest.mark.slow
def test_memory() -> None:
    """The table of 150,000 entries is the most there is; what is made of it replaces it."""
    import tracemalloc

    name, path = real_file("tekken-2409")
    raw = path.read_bytes()
    tracemalloc.start()
    try:
        files, notes = hf_tokenizer_files(name, raw, where="", vocab_size=131072, context=None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 150e6
    assert len(files["tokenizer.json"]) < 6e6
    assert [n for n in notes if "stand for no text" in n] == []
