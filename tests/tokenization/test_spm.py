"""SentencePiece models as tokenizer.json against sentencepiece itself, loaded as users load them: real files, and small
trained ones for the settings that no published Mistral tokenizer has."""

from __future__ import annotations

import io
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import transformers
from tokenization.samples import hf_folder, real_file, texts

from quantkit.errors import SourceError
from quantkit.tokenization import hf_tokenizer_files
from quantkit.tokenization.sentencepiece_model import BYTES, NORMAL, USER_DEFINED, read_sentencepiece

REAL = ["v1", "v2", "v3", "v7", "15m", "260k"]
# The spaces are those of the templates that Mistral publishes.
TURNS = "<s>{% for m in messages %}{% if m.role == 'user' %}USER{% elif m.role == 'system' %}SYSTEM{% else %} TEXT</s>"
TURNS += "{% endif %}{% endfor %}"
TURNS_V1 = TURNS.replace("USER", " [INST] TEXT [/INST]").replace("TEXT", "{{ m.content }}")
TURNS_V3 = TURNS.replace("USER", "[INST] TEXT[/INST]").replace("SYSTEM", "[SYSTEM_PROMPT] TEXT[/SYSTEM_PROMPT]")
TURNS_V3 = TURNS_V3.replace("TEXT", "{{ m.content }}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def folder(key: str) -> Path:
        name, path = real_file(key)
        return hf_folder(tmp_path_factory.mktemp(key) / "m", name, path.read_bytes())

    return folder


def both(key: str, folder: Path, **options: Any) -> tuple[sentencepiece.SentencePieceProcessor, Any]:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(real_file(key)[1]))
    return processor, transformers.AutoTokenizer.from_pretrained(folder, **options)


def samples(raw: bytes, count: int, seed: int = 0) -> list[str]:
    model = read_sentencepiece(raw, where="")
    plain = [t.replace("▁", " ") for t in model.texts(NORMAL)]
    special = [p.text for p in model.pieces if p.kind != NORMAL]
    return texts(seed, count, plain, [*special[:20], *model.texts(USER_DEFINED)])


@pytest.mark.parametrize("key", REAL)
def test_the_ids_and_the_text_are_sentencepieces(key: str, folders: Any) -> None:
    """BOS in front; spellings of control pieces are text, as in sentencepiece, for those who ask for it."""
    theirs, ours = both(key, folders(key), split_special_tokens=True)
    strings = samples(real_file(key)[1].read_bytes(), 1200)
    expected = theirs.encode(strings)
    found = ours(strings).input_ids
    differing = [s for s, a, b in zip(strings, expected, found, strict=True) if [theirs.bos_id(), *a] != b]
    assert not differing
    decoded = ours.batch_decode(found, skip_special_tokens=True)
    assert [s for s, a, b in zip(strings, theirs.decode(expected), decoded, strict=True) if a != b] == []


@pytest.mark.parametrize("key", REAL)
def test_runs_of_spaces(key: str, folders: Any) -> None:
    """Their pieces share one score; a list of merges ordered by id splits 17 spaces otherwise."""
    theirs, ours = both(key, folders(key))
    strings = [a + c * n + b for n in range(1, 130) for c in " ▁" for a in ("", "x", "\n") for b in ("", "x", "\n")]
    assert ours(strings, add_special_tokens=False).input_ids == theirs.encode(strings)


@pytest.mark.parametrize("key", REAL)
def test_every_id_decodes_alike(key: str, folders: Any) -> None:
    theirs, ours = both(key, folders(key))
    model = read_sentencepiece(real_file(key)[1].read_bytes(), where="")
    # Theirs has a text for the unknown piece, ours skips it; a text never becomes the byte of a space.
    ids = [i for i, piece in enumerate(model.pieces) if i != model.unk_id and piece.text != "<0x20>"]
    assert len(ours) == len(model.pieces)
    assert ours.convert_ids_to_tokens(ids) == [model.pieces[i].text for i in ids]
    found = ours.batch_decode([[i] for i in ids], skip_special_tokens=True)
    assert [i for i, text in zip(ids, found, strict=True) if text != theirs.decode([i])] == []


def test_golden_ids(folders: Any) -> None:
    ours = both("v1", folders("v1"))[1]
    assert ours("a  b").input_ids == [1, 264, 28705, 287]
    assert ours(" a").input_ids == [1, 28705, 264]
    assert ours("").input_ids == [1]
    assert ours("a", "b").input_ids == [1, 264, 1, 287]
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id, ours.pad_token) == (1, 2, 0, None)
    assert ours.model_max_length == 4096


@pytest.mark.parametrize("key", ["v2", "v3", "v7"])
def test_control_tokens_match_in_text_by_default(key: str, folders: Any) -> None:
    theirs, ours = both(key, folders(key))
    text = "<s>[INST] Hi  you[/INST] Yes</s>"
    ids = ours(text, add_special_tokens=False).input_ids
    assert ids == [1, 3, *theirs.encode("Hi  you"), 4, *theirs.encode("Yes"), 2]
    assert ours.decode(ids) == text
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids) == "Hi  you Yes"
    assert ours(text, split_special_tokens=True).input_ids == [1, *theirs.encode(text)]


@pytest.mark.parametrize("key", ["v1", "v2", "v3", "v7"])
def test_a_chat_template_gives_mistral_commons_ids(key: str, folders: Any) -> None:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    chat = [
        {"role": "user", "content": "Hello, how are you?"},
        {"role": "assistant", "content": "Fine.  Ça va ?"},
        {"role": "user", "content": "2+2=\n  4 [REF]x"},
    ]
    if key == "v7":
        chat.insert(0, {"role": "system", "content": "Be kind."})
    folder = folders(key)
    native = MistralTokenizer.from_file(str(folder / real_file(key)[0]))
    expected = native.encode_chat_completion(ChatCompletionRequest(messages=chat)).tokens
    ours = transformers.AutoTokenizer.from_pretrained(folder)
    template = TURNS_V1 if key == "v1" else TURNS_V3
    assert ours.apply_chat_template(chat, chat_template=template, return_dict=False) == expected


def train(**settings: Any) -> bytes:
    """A model of some hundred pieces on lines that are there to give double spaces, digits and accents a piece."""
    lines = [
        f"the cat  sat on   the mat {i} été l'eau [A] thethe <x> {'ab' * (i % 7)} aaaa{'a' * (i % 5)}"
        for i in range(300)
    ]
    out = io.BytesIO()
    settings = {
        "model_type": "bpe", "vocab_size": 380, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "character_coverage": 1.0, "minloglevel": 2, **settings,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, **settings)
    return out.getvalue()


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no dummy prefix": {"add_dummy_prefix": False},
    "spaces dropped": {"remove_extra_whitespaces": True},
    "spaces dropped, no dummy prefix": {"remove_extra_whitespaces": True, "add_dummy_prefix": False},
    "pieces across spaces": {"split_by_whitespace": False, "allow_whitespace_only_pieces": True},
    "user-defined": {
        "user_defined_symbols": ["[A]", "[A]the", "[AB]", "<x>", "é", "\n\n", "cat"],
        "control_symbols": ["[C]"],
    },
    "user-defined, no dummy prefix": {"user_defined_symbols": ["[A]", "the"], "add_dummy_prefix": False},
    "other names": {"unk_piece": "[UNK]", "bos_piece": "[BOS]", "eos_piece": "[EOS]", "pad_id": 3, "pad_piece": "[P]"},
    "no BOS": {"bos_id": -1},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_that_can_be_expressed(setting: str, tmp_path: Path) -> None:
    raw = train(**SETTINGS[setting])
    theirs = sentencepiece.SentencePieceProcessor(model_proto=raw)
    folder = hf_folder(tmp_path / "m", "tokenizer.model", raw, model_type="llama")
    ours = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    marks = [
        "[A]",
        "[A]the",
        "[AB]",
        "[C]",
        "<x>",
        "[A][C]",
        "[A]<0x41>",
        "<s>",
        "[UNK]",
        "[BOS]",
        "\n\n",
        "the",
        "  ",
        " ",
    ]
    strings = [*samples(raw, 1500), *samples(raw, 300, 1), *(a + b + c for a in marks for b in marks for c in marks)]
    expected = theirs.encode(strings)
    start = [theirs.bos_id()] if theirs.bos_id() >= 0 else []
    found = ours(strings).input_ids
    assert [s for s, a, b in zip(strings, expected, found, strict=True) if start + a != b] == []
    decoded = ours.batch_decode(found, skip_special_tokens=True)
    assert [s for s, a, b in zip(strings, theirs.decode(expected), decoded, strict=True) if a != b] == []
    names = [t and t.content if hasattr(t, "content") else t for t in (ours.bos_token, ours.eos_token, ours.unk_token)]
    ids = (theirs.bos_id(), theirs.eos_id(), theirs.unk_id())
    assert names == [theirs.id_to_piece(i) if i >= 0 else None for i in ids]
    assert ours.pad_token == (theirs.id_to_piece(theirs.pad_id()) if theirs.pad_id() >= 0 else None)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unigram": ({"model_type": "unigram", "vocab_size": 300}, "this is a unigram tokenizer; only BPE can be converted"),
    "char": ({"model_type": "char"}, "this is a character tokenizer; only BPE can be converted exactly"),
    "no byte fallback": ({"byte_fallback": False, "vocab_size": 60}, "the tokenizer does not fall back to bytes"),
    "nmt_nfkc": ({"normalization_rule_name": "nmt_nfkc"}, "the tokenizer rewrites characters (normalizer 'nmt_nfkc')"),
    "suffix": ({"treat_whitespace_as_suffix": True}, "the tokenizer keeps spaces at the end of words"),
    "user-defined spaces": ({"user_defined_symbols": ["▁▁"]}, "the user-defined piece '▁▁' takes part in the handling"),
    "user-defined and dropped": (
        {"user_defined_symbols": ["[A]"], "remove_extra_whitespaces": True}, "the user-defined piece '[A]' takes part",
    ),
}  # fmt: skip


@pytest.mark.parametrize("setting", REFUSED)
def test_settings_that_cannot_be_expressed_are_refused(setting: str) -> None:
    settings, message = REFUSED[setting]
    with pytest.raises(SourceError) as error:
        hf_tokenizer_files("tokenizer.model", train(**settings), where="here", vocab_size=None, context=None)
    assert error.value.what.startswith(message)
    assert error.value.where == "here"
    assert "sentencepiece" in error.value.hint


def test_the_reader_reads_what_sentencepiece_reads(folders: Any) -> None:
    for key in (*REAL, "v7m1"):
        _, path = real_file(key)
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
        model = read_sentencepiece(path.read_bytes(), where="")
        everything = range(theirs.piece_size())
        assert [p.text for p in model.pieces] == [theirs.id_to_piece(i) for i in everything]
        assert [p.score for p in model.pieces] == [theirs.get_score(i) for i in everything]
        kinds = [
            [0, theirs.is_unknown(i), theirs.is_control(i), 0, theirs.is_unused(i), theirs.is_byte(i)]
            for i in everything
        ]
        assert [k in (NORMAL, USER_DEFINED) for k in (p.kind for p in model.pieces)] == [not any(k) for k in kinds]
        assert model.texts(6) == BYTES
        assert (model.unk_id, model.bos_id, model.eos_id) == (theirs.unk_id(), theirs.bos_id(), theirs.eos_id())
        assert (model.pad_id, theirs.pad_id()) == (None, -1)
        assert model.remove_extra_whitespaces == (key == "260k")


def test_the_bytes_depend_on_the_file_alone() -> None:
    """Not on the seed of Python's hashes, for one."""
    name, path = real_file("v3")
    code = (
        "import hashlib, pathlib, sys; from quantkit.tokenization import hf_tokenizer_files;"
        f"raw = pathlib.Path({str(path)!r}).read_bytes();"
        f"files, _ = hf_tokenizer_files({name!r}, raw, where='', vocab_size=None, context=9);"
        "print(hashlib.sha256(b''.join(files[n] for n in sorted(files))).hexdigest());"
        "assert not {'torch', 'transformers', 'tokenizers', 'sentencepiece', 'mistral_common'} & set(sys.modules)"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in "12"
    ]
    assert runs[0] == runs[1] != ""


def test_tokenizers_writes_it_back_the_same(folders: Any) -> None:
    """Nothing in it is read otherwise than it was meant, or not at all."""
    import json

    for key in ("v1", "v3", "260k"):
        text = (folders(key) / "tokenizer.json").read_text()
        assert json.loads(tokenizers.Tokenizer.from_str(text).to_str()) == json.loads(text)
