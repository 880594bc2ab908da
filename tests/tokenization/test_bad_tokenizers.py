"""Tokenizer files that are damaged or made to hurt: an error of ours, in three lines, and soon."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenization.protobuf import BYTE_PIECES, HEAD, TRAINER, field, message, piece, spm, varint

from quantkit.errors import SourceError
from quantkit.tokenization import hf_tokenizer_files
from quantkit.tokenization.sentencepiece_model import read_sentencepiece
from quantkit.tokenization.tekken import read_tekken

SOUND = spm([("a", -2.0, 1), ("b", -3.0, 1), ("ab", -1.0, 1)])
LITTLE = settings(max_examples=300, deadline=2000)


def refused(name: str, raw: bytes) -> str:
    """What the error says, after a look at its form."""
    with pytest.raises(SourceError) as error:
        hf_tokenizer_files(name, raw, where="/m/file", vocab_size=None, context=None)
    assert error.value.where == "/m/file"
    assert error.value.hint
    assert len(str(error.value).splitlines()) == 3
    assert len(error.value.what) < 400
    return error.value.what


def test_the_sound_one_is_sound() -> None:
    assert sentencepiece.SentencePieceProcessor(model_proto=SOUND).piece_size() == 262
    files, _ = hf_tokenizer_files("tokenizer.model", SOUND, where="", vocab_size=262, context=None)
    assert json.loads(files["tokenizer.json"])["model"]["merges"] == [["a", "b"]]


RUN = [("▁", -9.0, 1), ("▁▁", -9.0, 1), ("▁▁▁", -9.0, 1)]
AB = [("a", -2.0, 1), ("b", -3.0, 1)]
WRONG_SPM = {
    "nothing": (b"", "it has no piece for what is unknown, or several"),
    "of Llama 3": (b"IQ== 0\nIg== 1\n", "this is a tiktoken vocabulary, as Llama 3 has, and no SentencePiece model"),
    "text": (b"IQ== 0 Ig== 1\n", "it has no piece for what is unknown, or several"),
    "a group": (b"\x0b", "byte 1 of a message starts no field"),
    "field 0": (b"\x02\x00", "byte 1 of a message starts no field"),
    "an endless number": (b"\xff" * 30, "a number at byte 10 of a message does not end"),
    "a number of 70 bits": (b"\x08" + b"\xff" * 9 + b"\x7f", "a number at byte 11 of a message does not end"),
    "a length of 2^63": (b"\x0a" + varint(2**63), "a field of 9,223,372,036,854,775,808 bytes runs past the end"),
    "truncated": (SOUND[:-3], "a field of"),
    "truncated in a piece": (field(1, b"\x0a\x05ab"), "a field of 5 bytes runs past the end of its message"),
    "a piece that is a number": (b"\x08\x01", "field 1 of a message has another form than SentencePiece gives it"),
    "a score that is a number": (field(1, field(1, b"a") + field(2, 1)), "field 2 of a message has another form"),
    "half a float": (field(1, field(1, b"a") + b"\x15\x00\x00"), "a field of 4 bytes runs past the end"),
    "no text": (field(1, field(2, 0.0)), "piece 0 has 0 characters; 1 to 128 are allowed"),
    "a long text": (spm([("x" * 129, 0.0, 1)]), "piece 259 has 129 characters"),
    "no UTF-8": (field(1, field(1, b"\xff")), "piece 0 is not UTF-8"),
    "NaN": (spm([("a", float("nan"), 1)]), "piece 259 has the score nan"),
    "infinity": (spm([("a", float("-inf"), 1)]), "piece 259 has the score -inf"),
    "type 7": (spm([("a", 0.0, 7)]), "piece 259 has the unknown type 7"),
    "type 0": (spm([("a", 0.0, 0)]), "piece 259 has the unknown type 0"),
    "twice": (spm([("a", 0.0, 1), ("a", 0.0, 1)]), "the piece 'a' stands twice, as 259 and 260"),
    "two unknown": (spm([("?", 0.0, 2)]), "it has no piece for what is unknown, or several"),
    "no unknown": (spm(head=[*HEAD[1:], *BYTE_PIECES]), "it has no piece for what is unknown, or several"),
    "a byte missing": (spm(head=[*HEAD, *BYTE_PIECES[1:]]), "it falls back to bytes, but its byte pieces are not"),
    "a byte too many": (spm([("<0x100>", 0.0, 6)]), "it falls back to bytes, but its byte pieces are not"),
    "model type 5": (spm(trainer={3: 5}), "it is of the unknown model type 5"),
    "two trainers": (SOUND + field(2, b""), "its field 2 stands twice"),
    "unigram": (spm(trainer={3: 1}), "this is a unigram tokenizer"),
    "no model type": (b"".join(piece(*p) for p in HEAD), "this is a unigram tokenizer"),
    "unused": (spm([("a", 0.0, 5)]), "the tokenizer joins through pieces that it never gives, like 'a'"),
    "a table": (spm(normalizer={1: b"own", 2: b"\x01"}), "the tokenizer rewrites characters (normalizer 'own')"),
    "a table for the way back": (SOUND + field(5, field(2, b"\x01")), "the tokenizer rewrites characters"),
    "no marks": (spm(normalizer={5: 0}), "the tokenizer keeps spaces at the end of words, or does not mark them"),
    "a character short": (spm([("a", -1.0, 1), ("ab", -2.0, 1)]), "the piece 'ab' holds 'b', which is no piece itself"),
    "equal scores": (spm([*AB, ("ab", -1.0, 1), ("ba", -1.0, 1)]), "the pieces 'ab' and 'ba' have the same score"),
    "dropped spaces": (spm(RUN, normalizer={4: 1}), "the tokenizer drops spaces, but has the piece '▁▁'"),
    "out of reach": (spm([*AB, ("aab", -4.0, 1), ("[X]", 0.0, 4)]), "no joins lead to the piece 'aab'"),
}


@pytest.mark.parametrize("case", WRONG_SPM)
def test_wrong_sentencepiece_models(case: str) -> None:
    raw, expected = WRONG_SPM[case]
    assert refused("tokenizer.model", raw).startswith(expected)


def test_a_piece_out_of_reach_is_no_matter_without_user_defined_ones() -> None:
    """It has an id, and no text becomes it: as in sentencepiece."""
    raw = spm([*AB, ("aab", -4.0, 1)])
    files, _ = hf_tokenizer_files("tokenizer.model", raw, where="", vocab_size=None, context=None)
    assert json.loads(files["tokenizer.json"])["model"]["merges"] == []
    assert "aab" not in sentencepiece.SentencePieceProcessor(model_proto=raw).encode("aab", out_type=str)


def test_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.tokenization.sentencepiece_model.MAX_PIECES", 261)
    assert refused("tokenizer.model", SOUND) == "it has more than 261 pieces"
    monkeypatch.setattr("quantkit.tokenization.sentencepiece_model.MAX_FILE", 1000)
    assert refused("tokenizer.model", SOUND) == f"the tokenizer has {len(SOUND):,} bytes; the limit is 1,000"
    monkeypatch.setattr("quantkit.tokenization.tekken.MAX_FILE", 1000)
    assert refused("tekken.json", b" " * 1001) == "the tokenizer has 1,001 bytes; the limit is 1,000"


def test_what_others_add_is_skipped() -> None:
    """Fields beyond those we know, of any form, as protobuf has it."""
    more = field(9, 5) + varint(10 << 3 | 1) + b"12345678" + field(11, b"x") + varint(200 << 3 | 5) + b"1234"
    assert read_sentencepiece(SOUND + more, where="") == read_sentencepiece(SOUND, where="")
    assert read_sentencepiece(more + SOUND, where="") == read_sentencepiece(SOUND, where="")
    nested = b"".join(piece(*p) for p in (*HEAD, *BYTE_PIECES)) + field(2, message(TRAINER) + more) + field(3, more)
    assert len(read_sentencepiece(nested, where="").pieces) == 259


@LITTLE
@given(st.binary(max_size=300))
@example(b"\x0a\x00")
def test_any_bytes_give_an_error_of_ours(raw: bytes) -> None:
    for name in ("tokenizer.model", "tekken.json"):
        with pytest.raises(SourceError):
            hf_tokenizer_files(name, raw, where="x", vocab_size=None, context=None)


@LITTLE
@given(st.data())
def test_a_damaged_model_is_read_or_refused(data: st.DataObject) -> None:
    """Some bytes of a sound file replaced, left out or put in."""
    raw = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(len(raw) - 120, len(raw)) | st.integers(0, len(raw)))
        raw[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        files, _ = hf_tokenizer_files("tokenizer.model", bytes(raw), where="x", vocab_size=None, context=None)
    except SourceError:
        return
    json.loads(files["tokenizer.json"])


@LITTLE
@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=4), st.floats(width=32), st.integers(1, 6)), max_size=12),
    st.fixed_dictionaries({3: st.integers(1, 4), 24: st.integers(0, 1), 35: st.integers(0, 1)}),
    st.fixed_dictionaries({3: st.integers(0, 1), 4: st.integers(0, 1), 5: st.integers(0, 1)}),
)
def test_any_model_is_written_or_refused(
    pieces: list[tuple[str, float, int]], trainer: dict[int, int | bytes], normalizer: dict[int, int | bytes]
) -> None:
    try:
        files, _ = hf_tokenizer_files(
            "tokenizer.model", spm(pieces, trainer, normalizer), where="x", vocab_size=None, context=None
        )
    except SourceError:
        return
    assert len(json.loads(files["tokenizer.json"])["model"]["vocab"]) == 259 + len(pieces)


def tekken(**changes: Any) -> bytes:
    """A sound tekken.json of the bytes and "ab", or a changed one. `config` adds to the sound config."""
    config = {"pattern": ".", "default_vocab_size": 267, "default_num_special_tokens": 10, "version": "v11"}
    table = {
        "special_tokens": [{"rank": i, "token_str": t} for i, t in enumerate(["<unk>", "<s>", "</s>"])],
        "vocab": [entry(i, bytes([i])) for i in range(256)] + [entry(256, b"ab")],
        **changes,
        "config": {**config, **changes.get("config", {})} if isinstance(changes.get("config", {}), dict) else [],
    }
    return json.dumps(table).encode()


def entry(rank: int, token: bytes) -> dict[str, Any]:
    return {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}


def vocab(place: int, value: Any) -> dict[str, Any]:
    entries: list[Any] = [entry(i, bytes([i])) for i in range(256)] + [entry(256, b"ab")]
    entries[place] = value
    return {"vocab": entries}


def special(*texts: Any) -> dict[str, Any]:
    return {"special_tokens": [{"rank": i, "token_str": t} for i, t in enumerate(texts)]}


WRONG_TEKKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no vocab": ({"vocab": None}, "it has no config or no vocab, as a tekken.json has"),
    "no config": ({"config": None}, "it has no config or no vocab, as a tekken.json has"),
    "no sizes": ({"config": {"default_vocab_size": None}}, "its config has None tokens, 10 of them special"),
    "a size that is none": ({"config": {"default_vocab_size": True}}, "its config has True tokens"),
    "a huge size": ({"config": {"default_vocab_size": 10**30}}, "its config has 1000000000000000000000000000000"),
    "no special": ({"config": {"default_num_special_tokens": 0}}, "its config has 267 tokens, 0 of them special"),
    "too few": ({"config": {"default_vocab_size": 268}}, "its config promises 258 tokens besides the special"),
    "not the bytes": ({"config": {"default_vocab_size": 265}}, "its config promises 255 tokens besides"),
    "no pattern": ({"config": {"pattern": None}}, "its config has no pattern, or an endless one"),
    "a long pattern": ({"config": {"pattern": "x" * 10_001}}, "its config has no pattern, or an endless one"),
    "no list": ({"special_tokens": {}}, "its special_tokens are not a list of tables"),
    "a list of none": ({"special_tokens": [1]}, "its special_tokens are not a list of tables"),
    "v11 without": ({"special_tokens": None}, "it is of version 'v11' and has no special_tokens"),
    "no version": ({"special_tokens": None, "config": {"version": 3}}, "it is of version 3 and has no special_tokens"),
    "twenty in ten": ({"special_tokens": None, "config": {"version": "v3"}}, "it has 20 special tokens; its config"),
    "special order": ({"special_tokens": [{"rank": 1, "token_str": "<s>"}]}, "special token 0 has the rank 1"),
    "special text": (special("<unk>", 5), "special token 1 has no text, or an endless one"),
    "special twice": (special("<unk>", "<s>", "</s>", "<s>"), "the special token '<s>' stands twice"),
    "special as filler": (special("<unk>", "<s>", "</s>", "<SPECIAL_9>"), "the special token '<SPECIAL_9>' stands"),
    "no BOS": (special("<unk>", "</s>"), "it has no special token <s>"),
    "no rank": (vocab(5, {"token_bytes": "BQ=="}), "entry 5 of its vocab has no rank or no token_bytes"),
    "no table": (vocab(5, "BQ=="), "entry 5 of its vocab has no rank or no token_bytes"),
    "another rank": (vocab(256, entry(255, b"ab")), "entry 256 of its vocab has the rank 255"),
    "base64": (vocab(256, {"rank": 256, "token_bytes": "?"}), "entry 256 of its vocab is not base64"),
    "base64, loosely": (vocab(256, {"rank": 256, "token_bytes": "Y WI="}), "entry 256 of its vocab is not base64"),
    "no base64 at all": (vocab(256, {"rank": 256, "token_bytes": "é"}), "entry 256 of its vocab is not base64"),
    "empty": (vocab(256, entry(256, b"")), "entry 256 of its vocab has 0 bytes; 1 to 128 are allowed"),
    "long": (vocab(256, entry(256, b"x" * 129)), "entry 256 of its vocab has 129 bytes"),
    "another byte": (vocab(7, entry(7, b"x")), "entry 7 of its vocab is not the byte 7: the first 256 are the bytes"),
    "twice": (vocab(256, entry(256, b"a")), "the token b'a' stands twice"),
    "two alike": (vocab(256, entry(256, b"<s>")), "'<s>' is a special token and another one"),
}  # fmt: skip


def test_the_sound_tekken_is_sound() -> None:
    files, _ = hf_tokenizer_files("tekken.json", tekken(), where="", vocab_size=267, context=None)
    assert json.loads(files["tokenizer.json"])["model"]["merges"] == [["a", "b"]]


@pytest.mark.parametrize("case", WRONG_TEKKEN)
def test_wrong_tekken_files(case: str) -> None:
    changes, expected = WRONG_TEKKEN[case]
    assert refused("tekken.json", tekken(**changes)).startswith(expected)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", "it is not valid JSON"),
        (b"[" * 100_000, "it is not valid JSON: it is nested too deeply"),
        (b'{"config": 1, "config": 2}', "it is not valid JSON: the key 'config' stands twice"),
        (b"\xff", "it is not valid JSON"),
        (b"[]", "it has no config or no vocab"),
        (tekken()[:-1], "it is not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "this is a Git LFS pointer"),
    ],
)
def test_no_tekken_at_all(raw: bytes, expected: str) -> None:
    assert refused("tekken.json", raw).startswith(expected)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@LITTLE
@given(
    st.sampled_from(["config", "vocab", "special_tokens", "pattern", "version", "default_vocab_size", "entry"]), JSON
)
def test_any_value_in_any_place_is_read_or_refused(place: str, value: Any) -> None:
    changes = vocab(256, value) if place == "entry" else {place: value}
    if place in ("pattern", "version", "default_vocab_size"):
        changes = {"config": {place: value}}
    try:
        read_tekken(tekken(**changes), where="x")
    except SourceError:
        return


def test_a_terminal_is_not_written_to(tmp_path: Path) -> None:
    raw = spm([("\x1b[31mred", 0.0, 1), ("\x1b[31mred", 0.0, 1)])
    assert "\x1b" not in refused("tokenizer.model", raw)
