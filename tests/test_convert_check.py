"""What is written wrongly is found out before it is called done: one bit, turned on its way to the disk, in whatever
way a tensor is put together."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convert_jobs import errors
from oracle.native_models import make_native
from resuming import assert_three_lines, digests
from safetensors.torch import load_file, save_file

from quantkit.checkpoint.writer import ShardWriter
from quantkit.cli import main
from quantkit.errors import RunError

THETA = {"rope_theta": 1e6}


def fp8(folder: Path) -> Path:
    make_native(folder, params_extra=THETA)
    path = folder / "consolidated.safetensors"
    table = load_file(path)
    for name in [n for n in table if n.endswith(("wq.weight", "w1.weight"))]:
        table[name] = table[name].float().to(torch.float8_e4m3fn)
        table[name.replace(".weight", ".qscale_weight")] = torch.tensor([0.25])
    save_file(table, path)
    return folder


def devices(folder: Path) -> Path:
    """Meta's layout, two shards."""
    make_native(folder, params_extra=THETA)
    weights = load_file(folder / "consolidated.safetensors")
    (folder / "consolidated.safetensors").unlink()
    side_by_side = ("wo.weight", "w2.weight", "tok_embeddings.weight")
    for i in range(2):
        shares = {n: x if x.dim() == 1 else x.chunk(2, int(n.endswith(side_by_side)))[i] for n, x in weights.items()}
        torch.save({n: x.clone() for n, x in shares.items()}, folder / f"consolidated.{i:02}.pth")
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-5,
              "vocab_size": -1}  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def converted(folder: Path) -> Path:
    """A Hugging Face folder."""
    native = make_native(folder.with_name("before"), params_extra=THETA)
    run("convert", native, "-o", folder, "--to", "hf", "--no-tokenizer", "--quiet")
    return folder


Make = Callable[[Path], Path]
native, TO_PTH = partial(make_native, params_extra=THETA), ("--to", "mistral", "--weights-format", "pth")
CHECKED: dict[str, tuple[Make, tuple[str, ...]]] = {
    "native to hf": (native, ("--to", "hf")),
    "native to hf in shards": (native, ("--to", "hf", "--max-shard-size", "50KB")),
    "native to pth": (native, TO_PTH),
    "pth to hf": (partial(native, files="pth"), ("--to", "hf")),
    "hf to mistral": (converted, ("--to", "mistral")),
    "hf to pth": (converted, TO_PTH),
    "stacked experts": (partial(native, experts=4, megablocks=True), ("--to", "hf")),
    "FP8": (fp8, ("--to", "hf")),
    "Meta's shards": (devices, ("--to", "hf")),
}


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.fixture
def slip(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], list[str]]:
    """slip(n, at): the n-th write of a slab has one bit turned at its byte `at`, on its way to the disk. The list that
    comes back is empty until that has happened."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the program's handlers are not for pytest
    write = ShardWriter.write

    def plan(n: int, byte: int) -> list[str]:
        seen, done = [0], list[str]()

        def wrong(self: ShardWriter, file: str, offset: int, data: Any, **more: Any) -> int:
            seen[0] += data.nbytes > 4  # a CRC-32 is no slab
            if seen[0] == n and not done:
                raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8).copy()
                raw[byte] ^= 1
                data = raw
                done.append(file)
            return write(self, file, offset, data, **more)

        monkeypatch.setattr(ShardWriter, "write", wrong)
        return done

    return plan


@pytest.mark.parametrize("byte", [0, -1], ids=["first byte", "last byte"])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize(("make", "options"), CHECKED.values(), ids=CHECKED)
def test_one_wrong_bit_is_found(
    make: Make, options: tuple[str, ...], n: int, byte: int, tmp_path: Path, slip: Any, capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In whatever way a tensor is put together. And the same command, on a disk that does not lie, does the rest."""
    source = make(tmp_path / "source")
    if source.with_name("before").exists():
        shutil.rmtree(source.with_name("before"))
    last = "config.json" if "hf" in options else "params.json"
    line = ("convert", source, *options, "--no-tokenizer", "--threads", "1", "--quiet")
    assert run(*line, "-o", tmp_path / "sound") == 0
    capsys.readouterr()
    done = slip(n, byte)
    assert run(*line, "-o", tmp_path / "out") == 1
    assert done
    stderr = errors(capsys.readouterr().err)
    assert_three_lines(stderr, "mapped back, is not what was read", str(tmp_path / "out" / done[0]), "the same command")
    assert not (tmp_path / "out" / last).exists()
    monkeypatch.undo()
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert run(*line, "-o", tmp_path / "out") == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "sound")


def test_a_wrong_bit_in_the_end_of_a_torch_file_is_found(tmp_path: Path, slip: Any, capsys: Any) -> None:
    """The table of members is written last, and is no slab: the look at the whole finds it, before it is a model."""
    source, out = make_native(tmp_path / "source", params_extra=THETA), tmp_path / "out"
    done = slip(22, 20)  # 21 tensors
    code = run("convert", source, *TO_PTH, "-o", out, "--no-tokenizer", "--threads", "1", "--quiet")
    assert done
    stderr = errors(capsys.readouterr().err)
    assert code == 1, stderr
    assert_three_lines(stderr, str(out))
    assert not (out / "params.json").exists()


def test_without_the_check_it_is_not_found(tmp_path: Path, slip: Any) -> None:
    """So it is the check that found it."""
    source = make_native(tmp_path / "source", params_extra=THETA)
    line = ("convert", source, "--to", "hf", "--no-tokenizer", "--threads", "1", "--quiet")
    assert run(*line, "-o", tmp_path / "sound") == 0
    assert slip(4, 0) == []
    assert run(*line, "-o", tmp_path / "out", "--no-check") == 0
    assert digests(tmp_path / "out")["model.safetensors"] != digests(tmp_path / "sound")["model.safetensors"]


def test_an_error_from_python_is_a_run_error(tmp_path: Path, slip: Any) -> None:
    from quantkit import api

    source = make_native(tmp_path / "source", params_extra=THETA)
    slip(3, 0)
    with pytest.raises(RunError, match="mapped back") as e:
        api.convert(str(source), tmp_path / "out", "hf", {"convert": {"tokenizer": False}})
    assert e.value.exit_code == 1
