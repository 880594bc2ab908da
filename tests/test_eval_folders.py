"""What `quantkit eval` takes for a model: folders that others quantized, a native layout; what it refuses, and how."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_models import build, measured, quiet_transformers, text_of
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.cli import main
from quantkit.errors import QuantkitError
from quantkit.layouts import open_checkpoint
from quantkit.restored import RestoredWeights, open_files

pytestmark = pytest.mark.usefixtures("quiet")
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text_of(600))
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """made(kind, **options) → a quantized folder, once a module; made(kind) → its source. Both read only."""
    root = tmp_path_factory.mktemp("made")

    def get(kind: str = "llama", **options: Any) -> Path:
        folder = root / "-".join([kind, *map(str, options.values())])
        if not folder.exists() and not options:
            with quiet_transformers():
                build(folder, kind)
        elif not folder.exists():
            quantkit.quantize(str(get(kind)), folder, {"quantize": options})
        return folder

    return get


RTN: dict[str, Any] = {"method": "rtn", "bits": 4, "group_size": 32}
BNB: dict[str, Any] = {"method": "bnb", "bits": 4}


def weights_of(folder: Path) -> Tensors:
    checkpoint = open_checkpoint(folder)
    with open_files(checkpoint) as files:
        weights = RestoredWeights(checkpoint, files)
        return {name: weights.read(name) for name in weights.names}


def changed(folder: Path, to: Path, config: dict[str, Any] | None = None, **block: Any) -> Path:
    """A copy whose config.json says other things."""
    shutil.copytree(folder, to)
    said = json.loads((to / "config.json").read_text()) | (config or {})
    if block:
        said["quantization_config"].update(block)
    (to / "config.json").write_text(json.dumps(said))
    return to


def strange(folder: Path, to: Path, **block: Any) -> Path:
    """A copy that does not say who wrote it."""
    changed(folder, to, **block)
    (to / "quantkit.json").unlink()
    return to


def edit(folder: Path, change: Callable[[Tensors], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def by_hand(tensors: Tensors, module: str, bits: int, zero_less: int) -> Any:
    """A GPTQ weight [in, out] of 4 or 8 bits from its nibbles or bytes, as the format's description has it."""
    words = 32 // bits
    shifts = np.arange(words) * bits
    qweight, qzeros = (tensors[f"{module}.{k}"].numpy().view(np.uint32) for k in ("qweight", "qzeros"))
    codes = (qweight[:, None, :] >> shifts[None, :, None]) & (2**bits - 1)
    zeros = ((qzeros[:, :, None] >> shifts) & (2**bits - 1)).reshape(len(qzeros), -1) + zero_less
    group = tensors[f"{module}.g_idx"].numpy()
    scales = tensors[f"{module}.scales"].float().numpy()
    return (codes.reshape(-1, qweight.shape[1]).astype(np.float32) - zeros[group]) * scales[group]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "options", [RTN, {**RTN, "bits": 8, "sym": False, "checkpoint_format": "gptq_v2"}], ids=["4-sym-v1", "8-asym-v2"]
)
def test_gptq_folder_of_somebody(
    tmp_path: Path, made: Callable[..., Path], kind: str, options: dict[str, Any], text: str
) -> None:
    ours = made(kind, **options)
    theirs = strange(ours, tmp_path / "theirs")
    expected, found = weights_of(ours), weights_of(theirs)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    stored = load_file(ours / "model.safetensors")
    less = 0 if "checkpoint_format" in options else 1
    for name in (n for n in stored if n.endswith(".qweight")):
        module = name.removesuffix(".qweight")
        weight = by_hand(stored, module, options["bits"], less)  # [in, out], as GPT-2 has it
        np.testing.assert_array_equal(found[f"{module}.weight"].numpy(), weight if kind == "gpt2" else weight.T)
    given = {"windows": 2, "length": 32}
    assert quantkit.evaluate(theirs, text, **given).loss == quantkit.evaluate(ours, text, **given).loss


def test_gptq_exceptions_scales_and_the_old_place_of_its_configuration(
    tmp_path: Path, made: Callable[..., Path]
) -> None:
    """One linear has 8 bits and one scale a row; another's scales are bf16; config.json says nothing of all that."""
    first, second = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    eight = made(method="rtn", bits=8, group_size=-1)
    theirs = strange(made(**RTN), tmp_path / "theirs")
    other = load_file(eight / "model.safetensors")

    def change(tensors: Tensors) -> None:
        tensors |= {n: t for n, t in other.items() if n.startswith(f"{first}.")}
        tensors[f"{second}.scales"] = tensors[f"{second}.scales"].bfloat16()

    edit(theirs, change)
    config = json.loads((theirs / "config.json").read_text())
    (theirs / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (theirs / "config.json").write_text(json.dumps(config))
    found, whole = weights_of(theirs), weights_of(made(**RTN))
    assert torch.equal(found[f"{first}.weight"], weights_of(eight)[f"{first}.weight"])
    torch.testing.assert_close(found[f"{second}.weight"], whole[f"{second}.weight"], rtol=2**-7, atol=0)
    same = found.keys() - {f"{first}.weight", f"{second}.weight"}
    assert all(torch.equal(found[name], whole[name]) for name in same)


@pytest.mark.parametrize(
    "options", [BNB, {**BNB, "quant_type": "fp4", "double_quant": False}, {"method": "bnb", "bits": 8}],
    ids=["nf4", "fp4", "int8"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bnb_folder_of_somebody(tmp_path: Path, made: Callable[..., Path], kind: str, options: dict[str, Any]) -> None:
    ours = made(kind, **options)
    expected, found = weights_of(ours), weights_of(strange(ours, tmp_path / "theirs"))
    assert expected.keys() == found.keys() == load_file(made(kind) / "model.safetensors").keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_native_layout(tmp_path: Path, text: str) -> None:
    """The same model in Mistral's own layout, as either side; the text is tokenized by the folder's own tokenizer."""
    source = build(tmp_path / "source", "mistral")
    quantkit.convert(str(source), tmp_path / "native", "mistral", {"convert": {"tokenizer": False}})
    given: dict[str, Any] = {"windows": 2, "length": 32}
    with pytest.raises(QuantkitError, match="no tokenizer"):
        quantkit.evaluate(tmp_path / "native", text, **given)
    found = quantkit.evaluate(source, text, against=str(tmp_path / "native"), **given)
    assert found.against is not None
    assert found.against.kl == 0


def test_native_tokenizer(tmp_path: Path, native: Path, text: str) -> None:
    quantkit.convert(str(native), tmp_path / "hf", "hf")
    found, same = (quantkit.evaluate(folder, text, windows=2, length=16) for folder in (native, tmp_path / "hf"))
    assert (found.loss, found.tokens_sha256) == (same.loss, same.tokens_sha256)


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The first line of an error: three lines, exit code 2, no traceback."""
    capsys.readouterr()  # what was said until here
    with pytest.raises(SystemExit) as ended:
        main(["eval", *map(str, arguments), "--quiet", "--no-record"])
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2, lines
    assert 1 <= len(lines) <= 3, lines
    assert lines[0].startswith("error: ")
    assert lines[-1].startswith("  hint: ")
    return lines[0]


def test_numbers_that_do_not_go_together(made: Callable[..., Path], text: str, capsys: Any) -> None:
    def refused(*options: object) -> str:
        return fails(capsys, made(), "--text", text, *options)

    assert "--windows 0" in refused("--windows", 0)
    assert "--windows 'some'" in refused("--windows", "some")
    assert "--length 1 " in refused("--length", 1)
    assert "the model's context of 128 tokens" in refused("--length", 129)
    assert "--threads 0" in refused("--threads", 0)
    assert "the text has 600 tokens" in refused("--windows", 100)
    assert "the text has 600 tokens" in refused("--windows", 99, "--length", 7)
    assert "no cuda" in refused("--device", "cuda")


def test_texts_that_are_none(tmp_path: Path, made: Callable[..., Path], capsys: Any) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    (tmp_path / "short.txt").write_text("abc")
    for name, what in {"empty.txt": "is empty", "latin.txt": "not UTF-8", "nothing.txt": "there is no file",
                       "short.txt": "the text has 3 tokens"}.items():  # fmt: skip
        assert what in fails(capsys, made(), "--text", tmp_path / name)
    assert "--text" in fails(capsys, made())
    assert "the text has 3 tokens" in fails(capsys, made(), "--text", tmp_path / "short.txt", "--windows", "all")


def test_folders_that_are_no_models(tmp_path: Path, made: Callable[..., Path], text: str, capsys: Any) -> None:
    def refused(folder: Path, *options: object) -> str:
        return fails(capsys, folder, "--text", text, "--length", 32, *options)

    assert "there is no folder" in refused(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert refused(tmp_path / "empty")
    bare = changed(made(), tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    assert "tokenizer" in refused(bare)
    unknown = changed(made(), tmp_path / "unknown", {"model_type": "nobody"})
    assert "transformers cannot build" in refused(unknown)
    wide = changed(made(), tmp_path / "wide", {"hidden_size": 32, "head_dim": 16})
    assert "config.json makes it" in refused(wide)
    other = build(tmp_path / "larger", vocab_size=300)
    assert "vocabularies of 260 and 300 tokens" in refused(made(), "--against", other)
    small = build(tmp_path / "small", vocab_size=90)
    assert "the model's vocabulary has 90" in refused(small)


def test_quantized_folders_that_do_not_fit_together(
    tmp_path: Path, made: Callable[..., Path], text: str, capsys: Any
) -> None:
    def refused(folder: Path) -> str:
        return fails(capsys, folder, "--text", text, "--length", 32)

    def manifest(folder: Path, change: Callable[[Any], None]) -> Path:
        said = json.loads((folder / "quantkit.json").read_text())
        change(said)
        (folder / "quantkit.json").write_text(json.dumps(said))
        return folder

    def copy(name: str, **block: Any) -> Path:
        return changed(made(**RTN), tmp_path / name, **block)

    # A manifest that would make other numbers of the same bytes.
    lies: dict[str, Callable[[Any], None]] = {
        "checkpoint_format": lambda m: m["recipe"]["quantize"].update(checkpoint_format="gptq_v2"),
        "qweight is": lambda m: m["recipe"]["quantize"].update(bits=8),
        "qweight is missing": lambda m: m["tensors"][-1].update(quantized=True, shape=[64, 64]),
        "format is 99": lambda m: m.update(format=99),
        "'recipe'": lambda m: m.pop("recipe"),
        "TypeError": lambda m: m.update(tensors=3),
        "no float matrix": lambda m: next(r for r in m["tensors"] if r["quantized"]).update(shape=[0, 64]),
    }
    for i, (what, lie) in enumerate(lies.items()):
        said = refused(manifest(copy(f"lie{i}"), lie))
        assert "quantkit.json and the folder do not fit together" in said
        assert what in said, said
    assert "no quantization_config" in refused(changed(made(**RTN), tmp_path / "none", {"quantization_config": None}))
    # Others' folders.
    theirs = strange(made(**RTN), tmp_path / "awq", quant_method="awq")
    assert "quantized ('awq')" in refused(theirs)
    assert "'marlin'" in refused(strange(made(**RTN), tmp_path / "marlin", checkpoint_format="marlin"))
    assert "no g_idx" in refused(
        edit(strange(made(**RTN), tmp_path / "lost"), lambda t: t.pop("model.layers.0.mlp.up_proj.g_idx"))
    )
    flat = edit(
        strange(made(**RTN), tmp_path / "flat"),
        lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.zeros(8, dtype=torch.int32)}),
    )
    assert "do not fit together" in refused(flat)
    twice = edit(
        strange(made(**RTN), tmp_path / "twice"),
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(128, 64)}),
    )
    assert "both quantized and dense" in refused(twice)
    wild = edit(strange(made(**RTN), tmp_path / "wild"), lambda t: t["model.layers.0.mlp.up_proj.g_idx"].fill_(1000))
    assert "does not decode" in refused(wild)
    lost = edit(
        strange(made(**BNB), tmp_path / "bnb"),
        lambda t: t.pop("model.layers.0.mlp.up_proj.weight.absmax"),
    )
    assert "companions missing" in refused(lost)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_numbers_that_are_not_finite(tmp_path: Path, made: Callable[..., Path], text: str, name: str) -> None:
    broken = edit(changed(made(), tmp_path / "broken"), lambda t: t[name].fill_(float("nan")))
    with pytest.raises(QuantkitError, match="not finite") as error:
        quantkit.evaluate(broken, text, windows=2, length=32)
    assert error.value.exit_code == 2
    assert ("layer 1" in error.value.what) == ("layers.1" in name)
    assert ("predictions" in error.value.what) == ("lm_head" in name)


def test_no_room_for_hidden_states(made: Callable[..., Path], text: str, monkeypatch: Any) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(QuantkitError, match="hidden states take") as error:
        quantkit.evaluate(made(), text, windows=2, length=32)
    assert "TMPDIR" in error.value.hint
    monkeypatch.setattr("tempfile.tempdir", "/proc/nowhere")
    with pytest.raises(QuantkitError, match="no place for hidden states"):
        quantkit.evaluate(made(), text, windows=2, length=32)


def test_memory_is_that_of_one_layer(tmp_path: Path, text: str) -> None:
    """24 layers of 4 MB beside 2, in one process: whatever a model's depth, one layer is in memory."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024}
    folders = [build(tmp_path / f"{n}", num_hidden_layers=n, **sizes) for n in (2, 24)]
    (_, shallow), (_, deep) = measured(folders, text, windows=2, length=128, threads=1)
    print(f"{shallow / 1e6:.0f} MB, {deep / 1e6:.0f} MB")
    assert deep - shallow < 24e6, "a quarter of the deeper model's weights"
    assert deep < 600e6
