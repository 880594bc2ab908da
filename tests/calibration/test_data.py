"""Calibration rows: every kind of text, every way to be wrong, and the same bytes for everybody."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibration.test_data_tokenizer import SMOL, TEMPLATE, byte_level, folder_of
from pydantic import ValidationError
from tokenization.samples import SHARED

from quantkit.calibration import data, data_text
from quantkit.calibration.data import Calibration, Tokens, cut, hash_of, load_tokens
from quantkit.calibration.data_tokenizer import read_tokenizer
from quantkit.errors import InputError, QuantkitError, RecipeError, SourceError

BOS = 264
PLAIN = json.dumps(byte_level()).encode()
WITH_BOS = json.dumps(byte_level(bos=True)).encode()
STORY = "The lady's in the inn, 12 in the end.\r\nÉté\u2003à Besançon <s> " * 40
CHAT = [{"role": "user", "content": "in the inn?"}, {"role": "assistant", "content": "12."}]
SHAREGPT = [{"from": "human", "value": "in the inn?"}, {"from": "gpt", "value": "12."}]
RENDERED = "<s>user: in the inn?</s>\n<s>assistant: 12.</s>\n"


def ids_of(tokenizer: bytes, text: str, *, special: bool = True) -> list[int]:
    return read_tokenizer(tokenizer).encode([text], special=special)[0].tolist()  # type: ignore[no-any-return]


def in_rows(ids: list[int], length: int) -> list[list[int]]:
    """Token by token: a row begins with BOS, the text's own where it has one there."""
    rows: list[list[int]] = [[]]
    for i in ids:
        if len(rows[-1]) == length:
            rows.append([])
        rows[-1] += [BOS, i] if not rows[-1] and i != BOS else [i]
    return rows if len(rows[-1]) == length else rows[:-1]


def load(text: Path | str | None, tokenizer: Path | bytes = WITH_BOS, **fields: Any) -> Tokens:
    options = {key: fields.pop(key) for key in ("vocab_size", "context") if key in fields}
    calibration = Calibration(text=None if text is None else str(text), **{"samples": 3, "length": 16, **fields})
    return load_tokens(calibration, tokenizer, **{"vocab_size": 300, "context": 64, **options})


@pytest.fixture
def story(tmp_path: Path) -> Path:
    path = tmp_path / "story.txt"
    path.write_bytes(STORY.encode())
    return path


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "chat", byte_level(bos=True), {"chat_template": TEMPLATE})


def jsonl(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_a_text_is_one_document_cut_into_rows(story: Path) -> None:
    tokens = load(story)
    whole = ids_of(WITH_BOS, STORY)
    assert whole.count(BOS) == 41  # in front of the text, and 40 in it
    assert tokens.ids.tolist() == in_rows(whole, 16)[:3]
    bare = load(story, PLAIN)
    assert bare.ids.tolist() == [ids_of(PLAIN, STORY)[i * 16 : i * 16 + 16] for i in range(3)]
    assert (tokens.ids.dtype, tokens.ids.shape, tokens.ids.flags.writeable) == (np.dtype("int32"), (3, 16), False)
    assert tokens.name == "story.txt"
    assert tokens.text_sha256 == hashlib.sha256(STORY.encode()).hexdigest()
    assert (tokens.seed, tokens.available) == (None, None)
    raw = struct.pack("<qq", 3, 16) + b"".join(struct.pack("<i", i) for row in tokens.ids.tolist() for i in row)
    assert tokens.sha256 == hashlib.sha256(raw).hexdigest() == hash_of(tokens.ids)
    assert tokens.sha256 == "527aec2729906d8e7bfe11f3dada9afe88aca4328880af232b323059e68dab78"
    assert load(story).sha256 == tokens.sha256
    assert tokens.to_json() == {
        "text": "story.txt", "text_sha256": tokens.text_sha256, "samples": 3, "length": 16, "seed": None,
        "rows_available": None, "tokens_sha256": tokens.sha256,
    }  # fmt: skip


def test_the_hash_tells_shapes_apart() -> None:
    ids = np.arange(12, dtype=np.int32)
    assert len({hash_of(ids.reshape(shape)) for shape in ((3, 4), (4, 3), (2, 6))}) == 3


@pytest.mark.parametrize("head", [[], [1], [1, 2], [1, 2, 3, 4]])
def test_rows_begin_as_texts_do(head: list[int]) -> None:
    text = [9, 8, 7, 1, 6, 1, 2, 5, 4, 1, 1, 9, 3]
    rows = cut(np.array(text, np.int32), 4, np.array(head, np.int32)).tolist()
    assert all(row[: len(head[:3])] == head[:3] for row in rows)
    kept = [i for row in rows for i in row[len(head[:3]) :]]
    bare = [i for i in text if i not in head]
    assert [i for i in kept if i not in head] == bare[: len([i for i in kept if i not in head])]
    assert len(rows) >= len(text) // 4
    assert cut(np.array([], np.int32), 4, np.array(head, np.int32)).shape == (0, 4)


def test_a_seed_draws_rows_that_anybody_can_find_again(story: Path) -> None:
    whole = ids_of(WITH_BOS, STORY)
    grid = in_rows(whole, 16)
    rows = len(grid)
    drawn = load(story, seed=7)
    order = sorted(range(rows), key=lambda i: hashlib.sha256(f"7:{i}".encode()).digest())[:3]
    assert order == [126, 77, 4]
    assert drawn.ids.tolist() == [grid[i] for i in order]
    assert (drawn.seed, drawn.available) == (7, rows)
    assert drawn.sha256 == "cf6c3926cc0fff262221a5d349465937101651cb21a2274e2babd71364d063f2"
    assert load(story, seed=8).sha256 != drawn.sha256
    everything = load(story, seed=7, samples=rows)
    assert sorted(everything.ids.tolist()) == sorted(grid)
    with pytest.raises(RecipeError, match=f"makes {rows} rows of 16 tokens, and {rows + 1} are asked for"):
        load(story, seed=7, samples=rows + 1)


def test_a_seed_draws_from_the_beginning_of_a_long_text(story: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "POOL", 200)
    drawn = load(story, seed=7)
    whole = ids_of(WITH_BOS, STORY)
    assert drawn.available == len(in_rows(whole[:200], 16))
    assert load(story, seed=7, samples=5).available == len(in_rows(whole[: 5 * 4 * 16], 16))
    monkeypatch.setattr(data_text, "LONG", 10)
    assert load(story, seed=7).sha256 == drawn.sha256


def test_length_is_1024_or_the_context(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text(STORY * 10)
    assert load(path, length=None, context=100).ids.shape == (3, 100)
    assert load(path, length=None, context=4096).ids.shape == (3, 1024)
    assert load(path, length=None, context=None).ids.shape == (3, 1024)
    assert load(path, length=2000, context=None).ids.shape == (3, 2000)
    assert load(path, length=64).ids.shape == (3, 64)


def test_the_embedded_text_needs_no_file() -> None:
    tokens = load_tokens(Calibration(samples=4), WITH_BOS, vocab_size=267, context=512)
    assert tokens.ids.shape == (4, 512)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert tokens.name == f"Python {version}'s own language documentation (pydoc_data.topics)"
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name].strip() for name in sorted(topics))
    assert tokens.text_sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert tokens.ids.tolist() == in_rows(ids_of(WITH_BOS, text[:20_000]), 512)[:4]
    assert load_tokens(Calibration(), PLAIN, vocab_size=267, context=1024).ids.shape == (64, 1024)


@pytest.mark.parametrize(
    "lines",
    [
        [{"text": "in the inn"}, {"id": 3, "text": "the end"}, {"text": "é"}],
        ["", '"in the inn"', "  ", '"the end"', '"é"', ""],
        [{"text": None, "messages": None, "text ": 1} | {"text": "in the inn"}, '"the end"', {"text": ""}, '"\\u00e9"'],
    ],
)
def test_jsonl_documents_are_joined_each_with_its_bos(lines: list[Any], tmp_path: Path) -> None:
    path = jsonl(tmp_path / "docs.JSONL", *lines)
    wanted = [i for text in ("in the inn", "the end", "é") for i in ids_of(WITH_BOS, text)]
    rows = in_rows(wanted, 4)
    assert load(path, samples=len(rows), length=4).ids.tolist() == rows
    assert wanted.count(BOS) == 3


def test_a_byte_order_mark_is_no_text(tmp_path: Path, story: Path) -> None:
    marked = tmp_path / "marked.txt"
    marked.write_bytes(b"\xef\xbb\xbf" + STORY.encode())
    assert load(marked).sha256 == load(story).sha256
    lines = tmp_path / "marked.jsonl"
    lines.write_bytes(b"\xef\xbb\xbf" + json.dumps(STORY).encode())
    assert load(lines).sha256 == load(story).sha256


def test_chats_are_rendered_by_the_models_template(chat_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(chat_model)).apply_chat_template(CHAT, tokenize=True).input_ids
    text = ids_of(WITH_BOS, "the end")
    path = jsonl(tmp_path / "c.jsonl", {"messages": CHAT}, {"conversations": SHAREGPT}, CHAT, {"text": "the end"})
    wanted = theirs * 3 + text
    assert theirs == ids_of(WITH_BOS, RENDERED, special=False)
    rows = in_rows(wanted, 4)
    assert load(path, chat_model, samples=len(rows), length=4).ids.tolist() == rows


def test_long_documents_and_batches_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "d.jsonl", *({"text": f"{i} in the inn " * (i % 7)} for i in range(300)))
    plain = load(path, samples=200)
    for name, value in (("BATCH_TEXTS", 3), ("BATCH_CHARS", 50)):
        monkeypatch.setattr(data, name, value)
        assert load(path, samples=200).sha256 == plain.sha256
    monkeypatch.setattr(data, "BATCH_CHARS", 2**20)
    monkeypatch.setattr(data_text, "LONG", 20)
    assert load(path, samples=200).sha256 == plain.sha256


def test_no_more_is_read_than_is_needed(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", *[{"text": STORY}] * 300, "not JSON")
    assert load(path).ids.shape == (3, 16)
    text = tmp_path / "d.txt"
    text.write_bytes(STORY.encode() * 300 + b"\xff")
    assert text.stat().st_size > data_text.LONG
    assert load(text).ids.shape == (3, 16)
    shorter = tmp_path / "s.txt"
    shorter.write_bytes(STORY.encode() * 100 + b"\xff")
    assert data_text.LONG / 5 < shorter.stat().st_size < data_text.LONG
    assert load(shorter).ids.tolist() == load(text).ids.tolist()
    for late, message in ((path, "line 301"), (text, "not UTF-8"), (shorter, "not UTF-8")):
        with pytest.raises(InputError, match=message):
            load(late, seed=0)


class TestParquet:
    @pytest.fixture(autouse=True)
    def arrow(self) -> None:
        self.arrow = pytest.importorskip("pyarrow")
        self.parquet = pytest.importorskip("pyarrow.parquet")

    def write(self, path: Path, columns: dict[str, Any], **options: Any) -> Path:
        self.parquet.write_table(self.arrow.table(columns), path, **options)
        return path

    def test_texts(self, tmp_path: Path) -> None:
        texts = [f"{i} in the inn" for i in range(700)]
        path = self.write(tmp_path / "t.parquet", {"id": list(range(702)), "text": [*texts, None, ""]})
        wanted = [i for text in texts for i in ids_of(WITH_BOS, text)]
        rows = in_rows(wanted, 16)
        tokens = load(path, samples=len(rows))
        assert tokens.ids.tolist() == rows
        large = self.arrow.array(texts, self.arrow.large_string())
        again = self.write(tmp_path / "l.parquet", {"text": large}, row_group_size=11)
        assert load(again, samples=len(rows)).sha256 == tokens.sha256

    def test_chats(self, chat_model: Path, tmp_path: Path) -> None:
        wanted = ids_of(WITH_BOS, RENDERED, special=False)
        for name, chat in (("messages", CHAT), ("conversations", SHAREGPT)):
            path = self.write(tmp_path / f"{name}.parquet", {name: [chat, None, chat]})
            assert load(path, chat_model, samples=1, length=48).ids.tolist() == [(wanted * 2)[:48]]

    def test_errors(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "c.parquet", {"content": ["a"], "id": [1]})
        with pytest.raises(InputError, match="has none of the columns text, messages, conversations") as raised:
            load(path)
        assert raised.value.hint == "it has 'content', 'id'"
        with pytest.raises(InputError, match=r"row 2 of n\.parquet holds int under 'text'"):
            load(self.write(tmp_path / "n.parquet", {"text": self.arrow.array([None, 3])}))
        sound = self.write(tmp_path / "d.parquet", {"text": ["in the inn"] * 5000}, compression="none").read_bytes()
        for content in (b"", b"PAR1", sound[: len(sound) // 2], sound[:200] + b"\xff" * 3000 + sound[3200:]):
            (tmp_path / "d.parquet").write_bytes(content)
            with pytest.raises(InputError) as raised:
                load(tmp_path / "d.parquet")
            assert_three_lines(raised.value, "d.parquet is not a sound parquet file: ")

    def test_pyarrow_is_an_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = self.write(tmp_path / "t.parquet", {"text": ["a"]})
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(InputError, match="needs pyarrow") as raised:
            load(path)
        assert raised.value.hint == "pip install 'quantkit[calibration]'"


BAD_LINES: dict[str, tuple[str | bytes, str]] = {
    "broken JSON": ('{"text": "a"', "line 2 of b.jsonl is not JSON"),
    "Latin-1": ('{"text": "é"}'.encode("latin-1"), "line 2 of b.jsonl is not UTF-8"),
    "deep": ("[" * 100_000, "line 2 of b.jsonl is not JSON"),
    "no key": ('{"prompt": "a", "answer": "b"}', "line 2 of b.jsonl has none of the keys text, messages, conv"),
    "a number": ("17", "line 2 of b.jsonl holds int"),
    "null": ("null", "line 2 of b.jsonl holds NoneType"),
    "text is a list": ('{"text": ["a"]}', "line 2 of b.jsonl holds list under 'text'"),
    "messages is a text": ('{"messages": "a"}', "line 2 of b.jsonl holds str under 'messages'"),
    "an empty chat": ("[]", "line 2 of b.jsonl is no chat"),
    "a chat of texts": ('["a", "b"]', "line 2 of b.jsonl is no chat"),
    "nobody speaks": ('[{"content": "a"}]', "line 2 of b.jsonl is no chat"),
    "half a character": ('{"text": "\\ud800"}', "line 2 of b.jsonl holds half a surrogate"),
    "the template refuses": ('[{"role": "raise", "content": "a"}]', "line 2 of b.jsonl is a chat that the model's"),
    "half a character in a chat": ('[{"role": "a", "content": "\\ud800"}]', "line 2 of b.jsonl holds half a surr"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named(line: str | bytes, message: str, tmp_path: Path) -> None:
    refuse = "{% for m in messages %}{% if m.role == 'raise' %}{{ raise_exception('not \x1b[2J so') }}{% endif %}"
    folder = folder_of(tmp_path / "m", byte_level(), {"chat_template": refuse + "{{ m.content }}{% endfor %}"})
    path = tmp_path / "b.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + (line if isinstance(line, bytes) else line.encode()) + b'\n"b"\n')
    with pytest.raises(InputError) as raised:
        load(path, folder)
    assert_three_lines(raised.value, message)


def assert_three_lines(error: QuantkitError, message: str) -> None:
    assert message in error.what
    lines = str(error).splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["  in", "  hint"]
    assert all(line.isprintable() for line in lines if not line.startswith("  in: /"))  # a path is printed as it is
    assert error.exit_code == 2


Make = Callable[[Path], Path | str]


def written(name: str, content: bytes) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def piped(folder: Path) -> Path:
    os.mkfifo(folder / "p.txt")
    return folder / "p.txt"


def dangling(folder: Path) -> Path:
    (folder / "d.txt").symlink_to("nowhere")
    return folder / "d.txt"


BAD_FILES: dict[str, tuple[Make, str]] = {
    "missing": (lambda folder: folder / "none.txt", "there is no file"),
    "missing beside a Hub id": (lambda _: "data/none.jsonl", "there is no file 'data/none.jsonl'"),
    "no path and no id": (lambda _: "wiki text", "there is no file 'wiki text'"),
    "an id that leads out": (lambda _: "org/name:../../x.txt", "there is no file"),
    "a strange revision": (lambda _: "org/name@../x", "there is no file"),
    "a folder": (lambda folder: folder, "is a folder"),
    "a pipe": (piped, "p.txt is not a file"),
    "a strange name": (written("\x1b[2J.csv", b"a"), "\ufffd[2J.csv is no text to read"),
    "a dangling link": (dangling, "d.txt is not a file"),
    "another ending": (written("t.csv", b"a"), "t.csv is no text to read: nothing is known of files that end in"),
    "packed": (written("t.jsonl.gz", b"a"), "files that end in '.gz'"),
    "no UTF-8": (written("t.txt", "déjà vu".encode("latin-1") * 99), "t.txt is not UTF-8 text"),
    "cut UTF-8": (written("t.txt", "déjà".encode()[:-1]), "t.txt is not UTF-8 text"),
    "empty": (written("t.txt", b""), "t.txt is empty"),
    "a mark alone": (written("t.txt", b"\xef\xbb\xbf"), "t.txt is empty"),
    "no lines": (written("t.jsonl", b"\n \n"), "t.jsonl is empty"),
    "empty documents": (written("t.jsonl", b'""\n{"text": ""}\n'), "t.jsonl is empty"),
}


@pytest.mark.parametrize(("make", "message"), BAD_FILES.values(), ids=BAD_FILES)
@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS], ids=["plain", "bos"])
def test_bad_files(make: Make, message: str, tokenizer: bytes, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        load(make(tmp_path), tokenizer)
    assert_three_lines(raised.value, message)


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_text, "MAX_LINE", 2**20)
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'"' + b"x" * 2**20 + b'"\n')
    with pytest.raises(InputError, match=r"line 1 of t\.jsonl is longer than 1 MiB"):
        load(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(story: Path) -> None:
    story.chmod(0)
    with pytest.raises(InputError, match=r"story\.txt cannot be read: Permission denied"):
        load(story)


def test_numbers_that_do_not_go_together(story: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("in the inn 12 in the inn " * 2)
    count = len(ids_of(WITH_BOS, short.read_text()))
    with pytest.raises(RecipeError, match="the calibration text makes 1 row of 16 tokens, and 3 are") as raised:
        load(short)
    assert raised.value.where == f"{short}: {count} tokens"
    assert raised.value.hint == "name a longer text, or set calibration.samples to 1"
    with pytest.raises(RecipeError, match="makes 0 rows of 64 tokens") as raised:
        load(short, length=64)
    hint = raised.value.hint
    assert hint == f"name a longer text, or set calibration.samples to 1 and calibration.length to {count} or less"
    with pytest.raises(RecipeError, match="the calibration text makes"):
        load(None, samples=60_000)
    with pytest.raises(RecipeError, match=r"calibration\.length is 65, and the model's context ends at 64"):
        load(story, length=65)
    with pytest.raises(SourceError, match="the model's context is 1"):
        load(story, length=None, context=1)
    assert load(story, vocab_size=265).ids.max() == BOS
    with pytest.raises(SourceError, match="gives the id 264, and the model's vocabulary has 264"):
        load(story, vocab_size=264)


def test_chats_without_a_template(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "c.jsonl", {"messages": CHAT})
    for tokenizer in (PLAIN, folder_of(tmp_path / "m", byte_level())):
        with pytest.raises(SourceError, match="the model has no chat template") as raised:
            load(path, tokenizer)
        assert_three_lines(raised.value, "the text holds chats")


@pytest.mark.parametrize(
    "fields",
    [{"samples": 0}, {"samples": True}, {"samples": 70_000}, {"length": 1}, {"seed": -1}, {"seed": 1.0}, {"text": ""},
     {"text": 3}, {"rows": 3}],
)  # fmt: skip
def test_a_recipe_is_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Calibration.model_validate(fields)


def test_defaults() -> None:
    assert Calibration().model_dump() == {"text": None, "samples": 64, "length": None, "seed": None}
    with pytest.raises(ValidationError, match="frozen"):
        Calibration().samples = 3  # type: ignore[misc]


def test_a_home_folder_and_a_file_that_looks_like_a_hub_id(
    story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/story.txt").sha256 == load(story).sha256
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    story.rename(tmp_path / "org" / "name.txt")
    assert load("org/name.txt").name == "name.txt"


def test_smollm2_rows_are_those_of_the_whole_text() -> None:
    text = SHARED / "text" / "tinystories.txt"
    if not SMOL.exists() or not text.exists():
        pytest.skip("needs the demo's model and the shared texts")
    from transformers import AutoTokenizer

    tokens = load_tokens(Calibration(text=str(text), samples=8, length=512), SMOL, vocab_size=49152, context=8192)
    whole = AutoTokenizer.from_pretrained(str(SMOL))(text.read_text(), verbose=False).input_ids
    assert tokens.ids.tolist() == [whole[i * 512 : i * 512 + 512] for i in range(8)]


LEAN = """
import json, resource, sys
from pathlib import Path
from quantkit.calibration.data import Calibration, load_tokens
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tokenizer, texts = Path(sys.argv[1]), sys.argv[2:]
load_tokens(Calibration(samples=2), tokenizer, vocab_size=300, context=1024)
before = peak()
hashes = [load_tokens(Calibration(text=t, samples=8), tokenizer, vocab_size=300, context=1024).sha256 for t in texts]
heavy = [m for m in ("torch", "transformers", "huggingface_hub", "pyarrow") if m in sys.modules]
print(json.dumps([heavy, (peak() - before) / 1024, hashes]))
"""


def test_a_plan_imports_no_torch_and_reads_no_more_than_it_needs(tmp_path: Path) -> None:
    """A text of 400 MB, and a document of 60 MB on one line: some megabytes on top."""
    folder = folder_of(tmp_path / "m", byte_level(bos=True))
    big, line = tmp_path / "big.txt", tmp_path / "line.jsonl"
    block = STORY.encode() * 400
    with big.open("wb") as f:
        for _ in range(400_000_000 // len(block)):
            f.write(block)
    line.write_bytes(b'{"text": ' + json.dumps(STORY * 200, ensure_ascii=False).encode() + b"}\n")
    command = [sys.executable, "-c", LEAN, str(folder), str(big), str(line)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    heavy, grown, (of_text, of_line) = json.loads(result.stdout)
    assert heavy == []
    assert grown < 64
    assert of_text == of_line  # both begin with the story
