"""Ids without torch against transformers' own, and the beginning of a text against the whole of it."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pytest
from tokenization.samples import FIXED, SHARED, hf_folder, real_file
from tokenizers.pre_tokenizers import ByteLevel

from quantkit.calibration import data_encode
from quantkit.calibration.data_encode import MARGIN, FastTokenizer, SlowTokenizer, TextTokenizer
from quantkit.calibration.data_tokenizer import read_tokenizer
from quantkit.errors import InputError, SourceError

SMOL = Path(__file__).resolve().parents[2] / ".demo" / "SmolLM2-135M-Instruct"
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
TEXTS = [*FIXED[1:], "The <s> quick</s> 12345 brown\n\nfox <pad> jumps<mark>over <extra> it's it\u2019s", " leading"]


def token(place: int, text: str, **flags: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": place, "content": text, **plain, **flags}


def byte_level(*, bos: bool = False, eos: bool = False, **changes: Any) -> dict[str, Any]:
    """A tokenizer.json of bytes with a few merges: 256 bytes, the words, then <s>, </s>, <pad>."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ġ", "a"), ("Ġ", "Ġ"), ("1", "2"), ("e", "r")]
    words = [*alphabet, *(a + b for a, b in merges)]
    special = {name: len(words) + i for i, name in enumerate(("<s>", "</s>", "<pad>"))}
    around = [{"SpecialToken": {"id": "<s>", "type_id": 0}}] if bos else []
    behind = [{"SpecialToken": {"id": "</s>", "type_id": 0}}] if eos else []
    template = {
        "type": "TemplateProcessing",
        "single": [*around, {"Sequence": {"id": "A", "type_id": 0}}, *behind],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {n: {"id": n, "ids": [special[n]], "tokens": [n]} for n in ("<s>", "</s>")},
    }
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [token(place, name) for name, place in special.items()],
        "normalizer": None, "pre_tokenizer": split, "post_processor": template, "decoder": split,
        "model": {"type": "BPE", "vocab": {w: i for i, w in enumerate(words)}, "merges": [list(m) for m in merges],
                  "unk_token": None, "byte_fallback": False, "ignore_merges": False},
        **changes,
    }  # fmt: skip


def folder_of(
    folder: Path, tokenizer: dict[str, Any] | None, config: dict[str, Any] | None = None, **model: Any
) -> Path:
    """A model's folder as far as its tokenizer goes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | (config or {})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **model}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def ids_of(tokenizer: TextTokenizer, text: str) -> list[int]:
    return tokenizer.encode([text], special=True)[0].tolist()  # type: ignore[no-any-return]


def assert_as_transformers(folder: Path, texts: list[str] = TEXTS) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(folder))
    ours = read_tokenizer(folder)
    for text in texts:
        assert ids_of(ours, text) == theirs(text).input_ids, repr(text)


def test_smollm2_as_transformers() -> None:
    if not SMOL.exists():
        pytest.skip("run `make demo` first")
    long = (SHARED / "text" / "tinystories.txt").read_text() if SHARED.exists() else "Once upon a time. " * 999
    assert_as_transformers(SMOL, [*TEXTS, long])


@pytest.mark.parametrize("key", ["15m", "260k", "v1", "v3", "v7", "tekken-2409"])
def test_what_quantkit_makes_of_native_tokenizers(key: str, tmp_path: Path) -> None:
    name, path = real_file(key)
    folder = hf_folder(tmp_path / "m", name, path.read_bytes())
    (folder / name).unlink()  # or transformers might read that one
    assert_as_transformers(folder, TEXTS)
    raw = (folder / "tokenizer.json").read_bytes()
    bytes_only, whole = read_tokenizer(raw), read_tokenizer(folder)
    for text in TEXTS:
        assert ids_of(bytes_only, text) == ids_of(whole, text)
    assert ids_of(bytes_only, "a")[0] == 1  # the BOS of all of them


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "more named tokens": {"unk_token": "the", "pad_token": "<pad>", "mask_token": "<new>"},
    "extra tokens": {"additional_special_tokens": ["<extra>", "<pad>"]},
    "extra tokens of version 5": {"extra_special_tokens": ["<extra>"]},
    "extra tokens by name": {"extra_special_tokens": {"image_token": "<extra>"}, "audio_token": "<mark>"},
    "tokens of the decoder table": {
        "added_tokens_decoder": {
            "264": {k: v for k, v in token(264, "changed").items() if k != "id"},
            "266": {k: v for k, v in token(266, "<pad>", rstrip=True, lstrip=True).items() if k != "id"},
            "300": {k: v for k, v in token(300, "<mark>", lstrip=True, special=False).items() if k != "id"},
        }
    },
    "objects": {"pad_token": {"__type": "AddedToken", "content": "<extra>", "lstrip": True, "rstrip": True,
                              "normalized": False, "single_word": False}},
    "special tokens split": {"split_special_tokens": True},
    "wishes that a tokenizer.json overrules": {"add_bos_token": True, "add_eos_token": True},
    "GPT-2": {"tokenizer_class": "GPT2Tokenizer", "unk_token": "<pad>"},
    "Llama 3 under a wrong name": {"tokenizer_class": "LlamaTokenizer"},
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("bos", [False, True])
def test_special_tokens_as_transformers_adds_them(config: dict[str, Any], bos: bool, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", byte_level(bos=bos, eos=bos), config)
    assert_as_transformers(folder)
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(folder))("x").input_ids
    assert read_tokenizer(folder).head().tolist() == (theirs[:1] if bos else [])


def test_truncation_and_padding_are_off_and_a_legacy_map_counts(tmp_path: Path) -> None:
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 266,
           "pad_type_id": 0, "pad_token": "<pad>"}  # fmt: skip
    folder = folder_of(tmp_path / "m", byte_level(bos=True, truncation=cut, padding=pad))
    (folder / "special_tokens_map.json").write_text('{"mask_token": {"content": "<mark>"}, "cls_token": "<extra>"}')
    assert_as_transformers(folder)
    assert len(ids_of(read_tokenizer(folder), "x" * 50)) == 51


@pytest.mark.parametrize("config", [{}, {"legacy": False}, {"legacy": True}, {"add_prefix_space": False}])
def test_llama_2_as_transformers_5_reads_it(config: dict[str, Any], tmp_path: Path) -> None:
    name, path = real_file("15m")
    folder = hf_folder(tmp_path / "m", name, path.read_bytes(), model_type="llama")
    (folder / name).unlink()
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    table = {"tokenizer_class": "LlamaTokenizer", **named, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(table))
    assert_as_transformers(folder)


def test_dropout_is_a_thing_of_training(tmp_path: Path) -> None:
    table = byte_level()
    table["model"]["dropout"] = 0.5
    tokenizer = read_tokenizer(json.dumps(table).encode())
    assert len({tuple(ids_of(tokenizer, "the in the in the in the")) for _ in range(20)}) == 1


def test_vocabulary_files_are_for_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    table = byte_level()["model"]
    config = {"tokenizer_class": "GPT2Tokenizer", "unk_token": "</s>"}
    folder = folder_of(tmp_path / "m", None, config, model_type="gpt2")
    (folder / "vocab.json").write_text(json.dumps(table["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in table["merges"]))
    theirs = AutoTokenizer.from_pretrained(str(folder))
    ours = read_tokenizer(folder)
    for text in TEXTS:
        assert ids_of(ours, text) == theirs(text).input_ids


def text_stream(text: str) -> Callable[[], TextIO]:
    return lambda: io.StringIO(text, newline="")


def test_a_tokenizer_in_python_has_its_margin_in_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        """Bytes, an id each; the last one of a text is 0."""

        def __call__(self, text: str, **_: Any) -> Any:
            return type("Encoding", (), {"input_ids": [*text.encode(), 0]})

    monkeypatch.setattr(data_encode, "MARGIN", 50)
    tokenizer = SlowTokenizer("here", Slow())
    text = "é🙂 a b " * 400
    whole = [*text.encode(), 0]
    for wanted in (1, 1000, 4000, len(whole), 9000):
        assert tokenizer.leading(text_stream(text), wanted, special=True).tolist() == whole[:wanted]


def hard_text(seed: int) -> str:
    """Long runs of everything a pattern or a merge may run along."""
    dice = random.Random(seed)
    makers: list[Callable[[], str]] = [
        lambda: " " * dice.randint(1, 3000), lambda: "a" * dice.randint(1, 3000), lambda: "ab" * dice.randint(1, 900),
        lambda: "\n" * dice.randint(1, 900), lambda: str(dice.getrandbits(3000)), lambda: "<s>", lambda: "</s> ",
        lambda: "e\u0301" * 20, lambda: "日本語" * dice.randint(1, 300), lambda: "👍🏽" * dice.randint(1, 40),
        lambda: "Hello, world. ", lambda: "\u00a0\u3000", lambda: "l'été où ", lambda: "\r\n",
        lambda: "".join(chr(dice.randint(32, 0x2FFF)) for _ in range(500)),
    ]  # fmt: skip
    return "".join(dice.choice(makers)() for _ in range(250))


@pytest.mark.parametrize("key", ["bytes", "words", "15m", "260k", "v3", "tekken-2409"])
def test_pieces_make_the_ids_of_the_whole_text(key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With pieces and margins far below those in use: what is not settled ends long before their margin."""
    if key in ("bytes", "words"):
        table = byte_level(bos=True, eos=True)
        if key == "words":
            table |= {"pre_tokenizer": {"type": "Whitespace"}}
            table["model"] = {"type": "WordLevel", "vocab": table["model"]["vocab"], "unk_token": "a"}
        tokenizer = read_tokenizer(json.dumps(table).encode())
    else:
        name, path = real_file(key)
        folder = hf_folder(tmp_path / "m", name, path.read_bytes())
        tokenizer = read_tokenizer((folder / "tokenizer.json").read_bytes())
    texts = [hard_text(1)]
    if SHARED.exists():
        texts.append((SHARED / "text" / "french" / "moliere-avare.txt").read_text())
    refused = []
    attempt = FastTokenizer.attempt

    def counted(self: FastTokenizer, *arguments: Any, **options: Any) -> Any:
        found = attempt(self, *arguments, **options)
        refused.append(found is None)
        return found

    monkeypatch.setattr(FastTokenizer, "attempt", counted)
    dice = random.Random(3)
    for text in texts:
        whole = tokenizer.encode([text], special=True)[0]
        for piece, margin in ((3000, 500), (20_000, 2000), (2**17, MARGIN)):
            monkeypatch.setattr(data_encode, "PIECE", piece)
            monkeypatch.setattr(data_encode, "MARGIN", margin)
            for wanted in (dice.randint(1, len(whole)), len(whole) + 9):
                found = tokenizer.leading(text_stream(text), wanted, special=True)
                assert np.array_equal(found, whole[:wanted]), (piece, wanted)
    assert refused.count(False) == len(texts) * 6
    assert any(refused)  # the runs are longer than the margins


def test_only_the_beginning_is_read() -> None:
    class Counted(io.StringIO):
        asked = 0

        def read(self, size: int | None = -1, /) -> str:
            assert size is not None
            Counted.asked += size
            return super().read(size)

    tokenizer = read_tokenizer(json.dumps(byte_level()).encode())
    tokenizer.leading(lambda: Counted("in the inn " * 10**6), 20_000, special=True)
    assert Counted.asked == 20_000 * 5 + 2 * MARGIN + 1


def test_a_run_without_end_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_encode, "MAX_PIECE", 2**20)
    tokenizer = read_tokenizer(json.dumps(byte_level()).encode())
    for text in ("x" * 2**21, " " * 2**21):
        with pytest.raises(InputError, match="1 million characters without words"):
            tokenizer.leading(text_stream(text), 10, special=True)


def spoilt(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "tokenizer.json is damaged"),
        ("tokenizer.json", b"\xff\xfe", "tokenizer.json is damaged"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json holds list"),
        ("tokenizer_config.json", b'{"bos_token": 3}', "names its tokens in a way"),
        ("tokenizer_config.json", b'{"bos_token": {"text": "x"}}', "names its tokens in a way"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}', "names its tokens in a way"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "names its tokens in a way"),
    ],
)
def test_damaged_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    folder = spoilt(folder_of(tmp_path / "m", byte_level()), name, content)
    with pytest.raises(SourceError, match=message) as raised:
        read_tokenizer(folder)
    assert raised.value.where
    assert raised.value.hint
    assert len(str(raised.value).splitlines()) == 3


def test_no_tokenizer_or_one_that_transformers_cannot_read(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", None)
    with pytest.raises(SourceError, match="has no tokenizer"):
        read_tokenizer(folder)
    with pytest.raises(SourceError, match="transformers cannot read the tokenizer"):
        read_tokenizer(spoilt(folder, "tokenizer.model", b"\x00junk"))
    with pytest.raises(SourceError, match=r"tokenizer\.json is damaged"):
        read_tokenizer(b"[]")


@pytest.mark.parametrize("length", [10, 10**6])
def test_a_vocabulary_that_lacks_its_unknown_token(length: int) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<gone>"}
    table = byte_level(model=model, pre_tokenizer={"type": "Whitespace"}, post_processor=None)
    tokenizer = read_tokenizer(json.dumps(table).encode())
    with pytest.raises(SourceError, match="the tokenizer cannot encode the text: "):
        tokenizer.encode(["b " * length], special=True)
    with pytest.raises(SourceError, match="the tokenizer cannot encode the text: "):
        tokenizer.leading(text_stream("b " * length), 3, special=True)
