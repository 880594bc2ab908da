"""Which tokenizer file goes from a Hugging Face folder into a native one, and under which name; and what is written
and noted on the way back."""

from __future__ import annotations

import base64
import json

import pytest
from tokenization.protobuf import spm
from tokenization.samples import real_file

from quantkit.errors import SourceError
from quantkit.tokenization import hf_tokenizer_files, native_tokenizer

PLAIN = spm([("a", -1.0, 1)])  # 260 pieces
INST = spm([("[INST]", 0.0, 3), ("a", -1.0, 1)])  # 261
SYSTEM = spm([("[INST]", 0.0, 3), ("[SYSTEM_PROMPT]", 0.0, 3), ("a", -1.0, 1)])  # 262
INST_AS_TEXT = spm([("[INST]", 0.0, 4), ("a", -1.0, 1)])
TEKKEN = json.dumps(
    {
        "config": {"pattern": ".", "default_vocab_size": 300, "default_num_special_tokens": 44, "version": "v3"},
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode()} for i in range(256)],
    }
).encode()


def pick(files: dict[str, bytes], vocab_size: int) -> tuple[str, str] | None:
    found = native_tokenizer(files, files.__getitem__, vocab_size=vocab_size, where="/m")
    assert found is None or 0 < found.size <= vocab_size
    return None if found is None else (found.source, found.name)


@pytest.mark.parametrize(
    ("files", "vocab_size", "expected"),
    [
        ({"tokenizer.model": PLAIN}, 260, ("tokenizer.model", "tokenizer.model")),
        ({"tokenizer.model": INST}, 261, ("tokenizer.model", "tokenizer.model.v3")),
        ({"tokenizer.model": SYSTEM}, 262, ("tokenizer.model", "tokenizer.model.v7")),
        ({"tokenizer.model": INST_AS_TEXT}, 261, ("tokenizer.model", "tokenizer.model")),
        ({"tokenizer.model.v2": INST}, 261, ("tokenizer.model.v2", "tokenizer.model.v2")),
        ({"tokenizer.model.v7m1": SYSTEM}, 262, ("tokenizer.model.v7m1", "tokenizer.model.v7m1")),
        ({"tekken.json": TEKKEN}, 300, ("tekken.json", "tekken.json")),
        # fewer tokens than rows: padded embeddings
        ({"tokenizer.model": PLAIN}, 320, ("tokenizer.model", "tokenizer.model")),
        # the same file twice, as in Mistral-7B-v0.3
        ({"tokenizer.model": INST, "tokenizer.model.v3": INST}, 261, ("tokenizer.model.v3", "tokenizer.model.v3")),
        # the one that fits exactly, else the one that fits at all
        ({"tokenizer.model": PLAIN, "tekken.json": TEKKEN}, 300, ("tekken.json", "tekken.json")),
        ({"tokenizer.model": PLAIN, "tekken.json": TEKKEN}, 260, ("tokenizer.model", "tokenizer.model")),
        ({"tokenizer.model": PLAIN, "tekken.json": TEKKEN}, 270, ("tokenizer.model", "tokenizer.model")),
        # what lies about besides does not matter
        ({"tokenizer.json": b"?", "tokenizer_config.json": b"?", "tokenizer.model": PLAIN}, 260,
         ("tokenizer.model", "tokenizer.model")),
        ({}, 260, None),
        ({"config.json": b"", "special_tokens_map.json": b"", "model.safetensors": b""}, 260, None),
    ],
)  # fmt: skip
def test_which_file_and_which_name(files: dict[str, bytes], vocab_size: int, expected: tuple[str, str] | None) -> None:
    assert pick(files, vocab_size) == expected


@pytest.mark.parametrize(
    ("files", "vocab_size", "message"),
    [
        ({"tokenizer.json": b"", "tokenizer_config.json": b""}, 260,
         "tokenizer.json is there, but neither tokenizer.model nor tekken.json, and they cannot be made from it"),
        ({"vocab.json": b"", "merges.txt": b""}, 260, "merges.txt is there, but neither"),
        ({"spiece.model": b""}, 260, "spiece.model is there, but neither"),
        ({"tokenizer.model": PLAIN}, 259, "tokenizer.model has 260 tokens, more than the 259 of the model"),
        ({"tokenizer.model": PLAIN, "tekken.json": TEKKEN}, 200, "tokenizer.model has 260 tokens, more than the 200"),
        ({"tokenizer.model": PLAIN, "tekken.json": TEKKEN}, 400, "tekken.json and tokenizer.model both fit the model"),
        ({"tokenizer.model.v3": INST, "tokenizer.model.v7": INST}, 261, "tokenizer.model.v3 and tokenizer.model.v7"),
        ({"tokenizer.model": PLAIN[:-9]}, 260, "a field of"),
        ({"tekken.json": b"{}"}, 260, "it has no config or no vocab"),
        ({"tokenizer.model": b"version https://git-lfs.github.com/spec/v1\n"}, 260, "this is a Git LFS pointer"),
    ],
)  # fmt: skip
def test_no_file_or_more_than_one(files: dict[str, bytes], vocab_size: int, message: str) -> None:
    with pytest.raises(SourceError) as error:
        pick(files, vocab_size)
    assert error.value.what.startswith(message)
    assert error.value.where.startswith("/m")
    assert error.value.hint
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("key", "vocab_size", "name"),
    [("v1", 32000, "tokenizer.model"), ("v2", 32768, "tokenizer.model.v3"), ("v3", 32768, "tokenizer.model.v3"),
     ("v7", 32768, "tokenizer.model.v7"), ("260k", 512, "tokenizer.model")],
)  # fmt: skip
def test_real_files_named_tokenizer_model(key: str, vocab_size: int, name: str) -> None:
    raw = real_file(key)[1].read_bytes()
    assert pick({"tokenizer.model": raw}, vocab_size) == ("tokenizer.model", name)


def test_a_real_folder_with_both_kinds() -> None:
    files = {
        "tokenizer.model": real_file("v1")[1].read_bytes(),
        "tekken.json": real_file("tekken-2407")[1].read_bytes(),
    }
    assert pick(files, 131072) == ("tekken.json", "tekken.json")
    assert pick(files, 32000) == ("tokenizer.model", "tokenizer.model")


def test_the_config_and_the_notes_on_the_way_back() -> None:
    files, notes = hf_tokenizer_files("tokenizer.model", PLAIN, where="/m", vocab_size=260, context=None)
    assert files["tokenizer_config.json"].decode() == (
        '{\n  "bos_token": "<s>",\n  "clean_up_tokenization_spaces": false,\n  "eos_token": "</s>",\n'
        '  "tokenizer_class": "PreTrainedTokenizerFast",\n  "unk_token": "<unk>"\n}\n'
    )
    assert sorted(files) == ["tokenizer.json", "tokenizer_config.json"]
    assert notes == [
        "this layout has no chat template: a chat model needs one as chat_template.jinja beside tokenizer.json"
    ]
    files, notes = hf_tokenizer_files("tokenizer.model", PLAIN, where="/m", vocab_size=1000, context=2048)
    assert b'"model_max_length": 2048,' in files["tokenizer_config.json"]
    assert notes[0] == "tokenizer.model has 260 tokens, the model 1,000: ids from 260 on stand for no text"
    notes = hf_tokenizer_files("tekken.json", TEKKEN, where="/m", vocab_size=300, context=None)[1]
    assert notes[0].startswith("with mistral-common 1.11.7 or newer installed, AutoTokenizer reads tekken.json")
    assert len(notes) == 2


@pytest.mark.parametrize(("name", "raw"), [("tokenizer.model", PLAIN), ("tekken.json", TEKKEN)])
def test_more_tokens_than_the_model_has_is_an_error(name: str, raw: bytes) -> None:
    with pytest.raises(SourceError, match="more than the 259 of the model") as error:
        hf_tokenizer_files(name, raw, where="/m/x", vocab_size=259, context=None)
    assert (error.value.where, error.value.exit_code) == ("/m/x", 2)
