"""`quantkit compare`: several folders of one parent, side by side."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import warm
from eval_models import build, quiet_transformers, text_of
from tokenizers import Tokenizer, models

import quantkit
from quantkit import api
from quantkit.comparer import Compared, Comparisons, comparison_markdown, side_by_side
from quantkit.errors import OutputError, SourceError, UsageError

TABLES = {
    "int8": {"bits": 8}, "nf4": {"bits": 4}, "rtn2": {"method": "rtn", "bits": 2, "group_size": 32},
    "rtn4": {"method": "rtn", "bits": 4, "group_size": 32},
}  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    with quiet_transformers():
        source = build(folder / "source")
    for name, table in TABLES.items():
        quantkit.quantize(source, folder / name, {"quantize": table})
    (folder / "text.txt").write_text(text_of(600))
    return folder


def compare(work: Path, *names: str, out: Path | None = None) -> Comparisons:
    with quiet_transformers():
        return api.compare(
            [work / name for name in names], str(work / "text.txt"), against=str(work / "source"), windows=4, length=32,
            out=out,
        )  # fmt: skip


def test_rows_are_those_of_eval_by_size(work: Path) -> None:
    found = compare(work, *TABLES)
    sizes = [row.weight_bytes for row in found.rows]
    assert sizes == sorted(sizes)
    for row in found.rows:
        assert row.weight_bytes == sum(path.stat().st_size for path in (work / row.name).glob("*.safetensors"))
        with quiet_transformers():
            alone = quantkit.evaluate(
                work / row.name, str(work / "text.txt"), against=str(work / "source"), windows=4, length=32
            )
        assert row.evaluation == alone
        manifest = json.loads((work / row.name / "quantkit.json").read_text())
        assert row.bits == manifest["result"]["model_bits_per_weight"]
        assert row.method == manifest["method"]["title"]


def test_what_is_larger_and_worse_is_named(work: Path) -> None:
    found = compare(work, "int8", "rtn2", "source")
    kl = {row.name: row.evaluation.against.kl for row in found.rows if row.evaluation.against}
    assert kl["source"] == 0
    assert kl["int8"] < kl["rtn2"]
    assert found.dominated == ()
    rows = {row.name: row for row in found.rows}
    assert rows["source"].method == ""
    assert rows["source"].bits is None
    copy = shutil.copytree(work / "rtn2", work / "copies" / "rtn2")
    again = compare(work, "int8", "rtn2", "copies/rtn2")
    assert again.dominated == (), "the same twice: neither is worse"
    assert {row.name for row in again.rows} == {"int8", str(work / "rtn2"), str(copy)}


def test_dominated(work: Path) -> None:
    """Another is as small and nearer, smaller and as near, or both."""
    (row,) = compare(work, "int8").rows
    assert row.evaluation.against is not None

    def made(name: str, nbytes: int, kl: float) -> Compared:
        against = dataclasses.replace(row.evaluation.against, kl=kl)  # type: ignore[type-var]
        return Compared(name, "", None, nbytes, dataclasses.replace(row.evaluation, against=against))

    rows = [made("small", 10, 0.5), made("large", 20, 0.1), made("worse", 20, 0.2), made("fat", 11, 0.5)]
    assert side_by_side(rows).dominated == ("fat", "worse")


def test_what_cannot_be_compared(work: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="named twice"):
        compare(work, "int8", "./int8")
    with quiet_transformers():
        other = build(tmp_path / "other", vocab_size=300)
        tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[], unk_token="a"))
        tokenizer.save(str(other / "tokenizer.json"))
        with pytest.raises(UsageError, match="other tokens of this text"):
            api.compare([work / "int8", other], str(work / "text.txt"), windows=2, length=16)


def test_all_folders_are_looked_at_before_one_is_evaluated(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "evaluate", lambda *_, **__: pytest.fail("hours, for nothing"))
    with pytest.raises(SourceError, match=r"no folder .*nf5"):
        compare(work, "int8", "nf5")


def test_files(work: Path, tmp_path: Path) -> None:
    found = compare(work, "int8", "nf4", out=tmp_path / "table")
    assert {p.name for p in (tmp_path / "table").iterdir()} == {"comparison.json", "comparison.md", "comparison.png"}
    said = json.loads((tmp_path / "table" / "comparison.json").read_text())
    assert said == json.loads(json.dumps(found.to_json()))
    text = (tmp_path / "table" / "comparison.md").read_text()
    assert text.startswith(comparison_markdown(found))
    assert f"{found.rows[0].evaluation.perplexity:.4f}" in text
    compare(work, "int8", out=tmp_path / "table")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(OutputError, match="other files"):
        compare(work, "int8", out=tmp_path / "other")
    with pytest.raises(OutputError, match="is a file"):
        compare(work, "int8", out=tmp_path / "other" / "thesis.txt")


def test_command(work: Path) -> None:
    words = ["compare", "nf4", "int8", "--text", "text.txt", "--windows", "2", "--length", "16", "--quiet"]
    done = warm.run(words, cwd=work, torch=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["folder", "nf4", "int8"]
    assert any("2 windows of 16 tokens" in line for line in lines)
    done = warm.run(["compare", "nowhere", "--text", "text.txt"], cwd=work, torch=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
