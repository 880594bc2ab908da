"""evaluation.json, gates, and what a card says of them; against transformers where a number is new."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from eval_models import build, text_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import quantkit
from quantkit import api, folder_card
from quantkit.console import Console
from quantkit.errors import OutputError, RunError, UsageError, VerifyError
from quantkit.evaluation import Evaluation
from quantkit.evaluation_record import read_record
from quantkit.gates import Gates
from quantkit.seal import seal

pytestmark = pytest.mark.usefixtures("quiet")
OPTIONS: dict[str, Any] = {"windows": 4, "length": 32}


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path, str]:
    """A model, a folder made of it, a text."""
    source, out = build(tmp_path / "source"), tmp_path / "out"
    quantkit.quantize(source, out, {"quantize": {"bits": 4}})
    (tmp_path / "text.txt").write_text(text_of(600))
    return source, out, str(tmp_path / "text.txt")


def recorded(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "evaluation.json").read_text())["evaluations"]
    return found


def evaluate(made: tuple[Path, Path, str], **options: Any) -> Evaluation:
    source, out, text = made
    return quantkit.evaluate(out, text, **{"against": str(source), "record": True, **OPTIONS, **options})


def command(made: tuple[Path, Path, str], *options: str) -> subprocess.CompletedProcess[str]:
    source, out, text = made
    words = ["eval", str(out), "--text", text, "--against", str(source), "--windows", "4", "--length", "32", *options]
    return warm.run([*words, "--quiet"], torch=True)


def test_errors_behind_layers_are_those_of_transformers(tmp_path: Path) -> None:
    """Of a dense copy with other weights, which transformers runs as it is."""
    source = build(tmp_path / "source", num_hidden_layers=3)
    text = tmp_path / "text.txt"
    text.write_text(text_of(600))
    other = build(tmp_path / "other", num_hidden_layers=3)
    tensors = load_file(source / "model.safetensors")
    noise = torch.Generator().manual_seed(1)
    changed = {n: t + 0.05 * t.std() * torch.randn(t.shape, generator=noise) for n, t in tensors.items() if t.ndim > 1}
    save_file({**tensors, **changed}, other / "model.safetensors", {"format": "pt"})
    found = quantkit.evaluate(other, str(text), against=str(source), **OPTIONS).against
    assert found is not None
    ids = AutoTokenizer.from_pretrained(source)(text.read_text(), return_tensors="pt").input_ids[0]
    rows = ids[: 4 * 32].reshape(4, 32)
    states = []
    for folder in (other, source):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        behind: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda _, __, y, into=behind: into.append(y[0] if isinstance(y, tuple) else y))
        with torch.no_grad():
            model(rows)
        states.append(behind)
    wanted = [float(((a - b).norm(dim=-1) / b.norm(dim=-1)).mean()) for a, b in zip(*states, strict=True)]
    assert found.layer_errors == pytest.approx(wanted, rel=1e-3)


def test_layers_of_other_models_are_not_compared(tmp_path: Path) -> None:
    folders = [build(tmp_path / str(layers), num_hidden_layers=layers) for layers in (2, 3)]
    (tmp_path / "text.txt").write_text(text_of(600))
    found = quantkit.evaluate(folders[0], str(tmp_path / "text.txt"), against=str(folders[1]), **OPTIONS).against
    assert found is not None
    assert found.layer_errors == ()


def test_what_is_found_is_recorded_and_on_the_card(made: tuple[Path, Path, str]) -> None:
    _, out, text = made
    before = (out / "README.md").read_text()
    assert "Quality on a task or on text: not evaluated." in before
    found = evaluate(made, max_kl=10.0, max_ppl_increase="500%")
    (entry,) = recorded(out)
    assert found.against is not None
    assert entry["perplexity"] == found.perplexity
    assert entry["against"]["layer_errors"] == list(found.against.layer_errors)
    assert [gate["limit"] for gate in entry["gates"]] == [5.0, 10.0]
    card = (out / "README.md").read_text()
    for words in (
        f"{found.perplexity:.4f} ± ", f"{found.against.kl:.5f}", f"{found.against.agreement:.2%}", "text.txt",
        "within the limit of 10 nats a token", "within the limit of 500.0000%", "![Distance", "`source`",
    ):  # fmt: skip
        assert words in card
    assert "not evaluated" not in card
    assert (out / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert not quantkit.verify(out).problems
    assert str(out.parent) not in (out / "evaluation.json").read_text() + card
    again = (out / "evaluation.json").read_bytes()
    evaluate(made, max_kl=10.0, max_ppl_increase="500%")
    assert (out / "evaluation.json").read_bytes() == again, "the same protocol has one entry"
    quantkit.evaluate(out, text, record=True, **OPTIONS)
    assert [entry["against"] is None for entry in recorded(out)] == [False, True]
    assert quantkit.verify(out, source=str(made[0])).problems == ()


def test_nothing_is_recorded_where_that_is_not_asked_for_or_not_ours(made: tuple[Path, Path, str]) -> None:
    source, out, text = made
    evaluate(made, record=False)
    assert command(made, "--no-record").returncode == 0
    assert not (out / "evaluation.json").exists()
    before = sorted(path.name for path in source.iterdir())
    quantkit.evaluate(source, text, record=True, **OPTIONS)
    assert sorted(path.name for path in source.iterdir()) == before


def test_gates_end_in_3_and_are_recorded(made: tuple[Path, Path, str]) -> None:
    _, out, _ = made
    done = command(made, "--max-kl", "1e-9", "--max-ppl-increase", "300%", "--json")
    assert done.returncode == 3
    said = json.loads(done.stdout)
    assert said["passed"] is False
    assert [line.split(":")[0].strip() for line in done.stderr.splitlines()] == ["error", "in", "hint"]
    assert "KL divergence" in done.stderr
    assert "perplexity" not in done.stderr
    assert "**not kept**" in (out / "README.md").read_text()
    done = command(made, "--max-kl", "10", "--max-ppl-increase", "300%", "--json")
    assert (done.returncode, json.loads(done.stdout)["passed"]) == (0, True)
    assert "**not kept**" not in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("given", "limit"),
    [("3%", 0.03), ("0.03", 0.03), (0.5, 0.5), (" 12.5 % ", 0.125), ("1e-3", 1e-3), ("1", 1.0), ("300%", 3.0)],
)
def test_limits(given: str | float, limit: float) -> None:
    assert Gates.parse(given, None).max_ppl_increase == pytest.approx(limit)


@pytest.mark.parametrize("options", [
    {"max_ppl_increase": "three"}, {"max_ppl_increase": "3"}, {"max_ppl_increase": 5},
    {"max_ppl_increase": "-3%"}, {"max_kl": -1.0}, {"max_kl": float("nan")},
    {"max_kl": 1.0, "against": None},
])  # fmt: skip
def test_what_is_no_limit_is_refused_at_once(made: tuple[Path, Path, str], options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        evaluate(made, **options)
    assert not (made[1] / "evaluation.json").exists()


def test_a_record_of_other_weights_is_found_and_replaced(made: tuple[Path, Path, str]) -> None:
    source, out, _ = made
    evaluate(made)
    quantkit.quantize(source, out, {"quantize": {"bits": 8}}, force=True)
    assert not (out / "evaluation.json").exists(), "it went with what it was said of"
    evaluate(made)
    stale = (out / "evaluation.json").read_text()
    quantkit.quantize(source, out, {"quantize": {"bits": 4}}, force=True)
    (out / "evaluation.json").write_text(stale)
    assert any("belongs to another result" in problem for problem in quantkit.verify(out).problems)
    (out / "evaluation.json").write_text(stale.replace('"loss":', '"los":'))
    assert any("damaged" in problem for problem in quantkit.verify(out).problems)
    evaluate(made)
    assert len(recorded(out)) == 1
    assert not quantkit.verify(out).problems


def test_a_card_changed_by_hand_stays(made: tuple[Path, Path, str]) -> None:
    _, out, _ = made
    changed = (out / "README.md").read_text() + "\nMy own words.\n"
    (out / "README.md").write_text(changed)
    done = command(made)
    assert done.returncode == 0
    assert "is not as it was written and stays so" in done.stderr
    assert (out / "README.md").read_text() == changed
    told = "README.md is not the card that quantkit.json makes"
    for edited in (True, False):
        proof = warm.run(["verify", str(out)])
        assert (proof.returncode, told in proof.stderr) == (0, edited)
        api.rewrite_card(out)
    assert "Perplexity" in (out / "README.md").read_text()


@pytest.mark.parametrize("table", [
    {"prune": {"method": "magnitude", "sparsity": 0.5}}, {"quantize": {"method": "rtn", "group_size": 32}},
])  # fmt: skip
def test_other_folders_of_ours(tmp_path: Path, table: dict[str, Any]) -> None:
    source, out = build(tmp_path / "source"), tmp_path / "out"
    (quantkit.prune if "prune" in table else quantkit.quantize)(source, out, table)
    (tmp_path / "text.txt").write_text(text_of(600))
    evaluate((source, out, str(tmp_path / "text.txt")))
    assert "| Perplexity |" in (out / "README.md").read_text()
    assert not quantkit.verify(out).problems


def test_a_converted_folder_against_its_source_has_no_distance(tmp_path: Path) -> None:
    source = build(tmp_path / "source", "mistral")
    quantkit.convert(source, tmp_path / "native", "mistral", {"convert": {"tokenizer": False}})
    quantkit.convert(tmp_path / "native", tmp_path / "back", "hf", {"convert": {"tokenizer": False}})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).exists() and not (tmp_path / "back" / name).exists():
            (tmp_path / "back" / name).write_bytes((source / name).read_bytes())
    (tmp_path / "text.txt").write_text(text_of(600))
    found = evaluate((source, tmp_path / "back", str(tmp_path / "text.txt")), max_kl=0.0).against
    assert found is not None
    assert (found.kl, set(found.layer_errors)) == (0.0, {0.0})
    assert "Their predictions are the same." in (tmp_path / "back" / "README.md").read_text()


def test_what_it_was_made_from_is_told_from_another_of_its_shape(made: tuple[Path, Path, str]) -> None:
    source, out, text = made
    other = build(source.parent / "other", seed=1)
    done = command((other, out, text), "--max-kl", "100")
    assert done.returncode == 0
    assert "is not what out was made from" in done.stderr
    assert read_record(out).judgements == []
    assert "`other` is not what this copy was made from." in (out / "README.md").read_text()
    evaluate(made, max_kl=10.0)
    assert [verdict.limit for _, verdict in read_record(out).judgements] == [10.0]
    assert [entry["against"]["is_source"] for entry in recorded(out)] == [False, True]
    found = quantkit.evaluate(source, text, against=str(source), **OPTIONS).against
    assert found is not None
    assert found.is_source is None


@pytest.mark.parametrize(("key", "value", "words"), [
    (("perplexity",), 1.5, "not that of the loss"), (("against", "increase"), 0.0, "not that of the perplexities"),
    (("gates", 0, "value"), 0.0, "judged by another value"), (("against", "kl"), 0.0, "judged by another value"),
    (("tokens",), "many", "tokens: "), (("against",), None, "judged by another value"),
])  # fmt: skip
def test_numbers_that_contradict_each_other(
    made: tuple[Path, Path, str], key: tuple[Any, ...], value: Any, words: str
) -> None:
    _, out, _ = made
    evaluate(made, max_kl=10.0)
    table = json.loads((out / "evaluation.json").read_text())
    place = table["evaluations"][0]
    for part in key[:-1]:
        place = place[part]
    place[key[-1]] = value
    (out / "evaluation.json").write_text(json.dumps(table))
    (problem,) = quantkit.verify(out).problems
    assert words in problem
    done = warm.run(["verify", str(out)])
    assert done.returncode == 3
    assert "mend what lies beside the weights" in done.stderr
    assert "--force" not in done.stderr


def test_a_damaged_record_is_said_to_be_dropped(made: tuple[Path, Path, str]) -> None:
    _, out, _ = made
    evaluate(made)
    (out / "evaluation.json").write_text("{")
    done = command(made)
    assert done.returncode == 0
    assert "what was in it is dropped" in done.stderr
    assert len(recorded(out)) == 1


def test_what_is_not_what_the_manifest_says_is_not_recorded(made: tuple[Path, Path, str]) -> None:
    weights = made[1] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    size = int.from_bytes(data[:8], "little")
    start, _ = json.loads(data[8 : 8 + size])["model.embed_tokens.weight"]["data_offsets"]
    data[8 + size + start] ^= 1
    weights.write_bytes(data)
    with pytest.raises(VerifyError, match=r"model\.safetensors is not what quantkit\.json says"):
        evaluate(made)
    assert evaluate(made, record=False).tokens
    assert not (made[1] / "evaluation.json").exists()


def test_a_folder_written_again_meanwhile_gets_no_record(
    made: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = api.evaluate_folder

    def slow(*args: Any, **options: Any) -> Evaluation:
        found = real(*args, **options)
        quantkit.quantize(made[0], made[1], {"quantize": {"bits": 8}}, force=True)
        return found

    monkeypatch.setattr(api, "evaluate_folder", slow)
    with pytest.raises(RunError, match="changed while it was evaluated"):
        evaluate(made)
    assert not (made[1] / "evaluation.json").exists()


def test_a_source_with_another_configuration_is_not_the_source(made: tuple[Path, Path, str], tmp_path: Path) -> None:
    """The same weights compute something else with it, and limits against that say nothing."""
    source, _, _ = made
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    assert evaluate(made, against=str(copy)).against.is_source is True  # type: ignore[union-attr]
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    assert evaluate(made, against=str(copy)).against.is_source is False  # type: ignore[union-attr]


def test_limits_stay_until_others_are_set(made: tuple[Path, Path, str]) -> None:
    def kept() -> list[tuple[str, float]]:
        return [(gate["measure"], gate["limit"]) for gate in recorded(made[1])[0]["gates"]]

    evaluate(made, max_kl=1e-9, max_ppl_increase="500%")
    evaluate(made)
    assert sorted(kept()) == [("kl", 1e-9), ("perplexity_increase", 5.0)]
    evaluate(made, max_kl=5.0)
    assert sorted(kept()) == [("kl", 5.0), ("perplexity_increase", 5.0)]
    assert all(verdict.passed for _, verdict in read_record(made[1]).judgements)


def test_a_plot_of_other_numbers_is_not_on_the_card(
    made: tuple[Path, Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no new one can be drawn."""
    _, out, _ = made
    evaluate(made)
    assert "layers.png" in (out / "README.md").read_text()
    monkeypatch.setattr(folder_card, "can_plot", lambda: False)
    api.rewrite_card(out)
    assert "layers.png" in (out / "README.md").read_text(), "it is still of these numbers"
    evaluate(made, windows=2)
    assert "layers.png" not in (out / "README.md").read_text()
    assert not (out / "layers.png").exists()
    (out / "layers.png").write_bytes(b"something else")
    api.rewrite_card(out)
    assert "layers.png" not in (out / "README.md").read_text()
    assert quantkit.verify(out).problems == ()


def test_several_at_once_lose_nothing(made: tuple[Path, Path, str]) -> None:
    found = [evaluate(made, windows=windows, record=False) for windows in (1, 2, 3, 4)]
    sealed, console = seal(made[1]), Console(quiet=True)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda one: folder_card.record_evaluation(made[1], sealed, one, "cpu", console), found))
    assert sorted(entry["windows"] for entry in recorded(made[1])) == [1, 2, 3, 4]
    assert quantkit.verify(made[1]).problems == ()


def test_a_perplexity_of_nothing(made: tuple[Path, Path, str]) -> None:
    evaluate(made)
    path = made[1] / "evaluation.json"
    table = json.loads(path.read_text())
    table["evaluations"][0]["against"]["perplexity"] = 0.0
    path.write_text(json.dumps(table))
    assert "evaluation.json is damaged" in quantkit.verify(made[1]).problems[0]


def test_the_plot_is_part_of_the_folder(made: tuple[Path, Path, str]) -> None:
    _, out, _ = made
    evaluate(made)
    (out / "layers.png").unlink()
    assert any("layers.png: missing" in problem for problem in quantkit.verify(out).problems)
    api.rewrite_card(out)
    assert (out / "layers.png").exists()
    assert not quantkit.verify(out).problems
    (out / "layers.png").write_bytes(b"another")
    assert any("layers.png" in problem for problem in quantkit.verify(out).problems)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to_is_refused_at_once(made: tuple[Path, Path, str]) -> None:
    made[1].chmod(0o500)
    with pytest.raises(OutputError, match="cannot be written to"):
        evaluate(made)
