"""`quantkit verify` finds what is wrong with a folder, names it, and never falls over it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, make_tiny
from wide_models import MEASURE, mistral, write

import quantkit as package
from quantkit.checkpoint.header import build_header, read_header
from quantkit.memory import MIB

Tiny = Callable[[str], Path]
Harm = Callable[[Path], object]

WEIGHT = "model.layers.1.mlp.up_proj.weight"
COPIED = "model.layers.1.input_layernorm.weight"
STATE = WEIGHT + ".quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def source(tiny: Tiny) -> Path:
    return tiny("llama")


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("verify") / "out"
    package.quantize(str(source), out)
    return out


@pytest.fixture
def out(written: Path, tmp_path: Path) -> Path:
    """A sound folder to do harm to."""
    return Path(shutil.copytree(written, tmp_path / "out"))


def problems(quantkit: Run, out: Path, *options: object, code: int = 3) -> str:
    """All problems as text, from a run that ends with this exit code and without a traceback."""
    done = quantkit("verify", out, *options, "--json", "--quiet")
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads(done.stdout.splitlines()[0])
    assert found["sound"] is (code == 0)
    return "\n".join(found["problems"])


def edit(out: Path, tensor: str, change: Callable[[bytes], bytes]) -> None:
    """Replaces a tensor's bytes by others of the same length."""
    path = out / "model.safetensors"
    info = next(t for t in read_header(path)[0] if t.name == tensor)
    with path.open("r+b") as f:
        f.seek(info.offset)
        old = f.read(info.nbytes)
        new = change(old)
        assert len(new) == len(old)
        assert new != old
        f.seek(info.offset)
        f.write(new)


def edit_manifest(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((out / "quantkit.json").read_text())
    change(manifest)
    (out / "quantkit.json").write_text(json.dumps(manifest))


def cover_up(out: Path) -> None:
    """Adjusts sizes and checksums in the manifest, as one would who wants a change not to be seen."""

    def adjust(manifest: dict[str, Any]) -> None:
        for row in manifest["files"]:
            data = (out / row["name"]).read_bytes()
            row |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    edit_manifest(out, adjust)


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def swap_nibbles(data: bytes) -> bytes:
    return bytes(b >> 4 | (b & 15) << 4 for b in data)


def other_block_size(data: bytes) -> bytes:
    """blocksize 128 in the padded JSON of quant_state, one of its spaces less."""
    assert b'"blocksize": 64' in data
    assert data.endswith(b" ")
    return data.replace(b'"blocksize": 64', b'"blocksize": 128')[:-1]


def not_finite(data: bytes) -> bytes:
    return b"\x00\x00\xc0\x7f" + data[4:]


def edit_config(out: Path, **flags: object) -> None:
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= flags
    (out / "config.json").write_text(json.dumps(config))


def drop_tensor(out: Path, tensor: str) -> None:
    """Writes the file again without one tensor."""
    path = out / "model.safetensors"
    infos, _, _ = read_header(path)
    raw = path.read_bytes()
    kept = [t for t in infos if t.name != tensor]
    assert len(kept) == len(infos) - 1
    path.write_bytes(build_header(kept)[0] + b"".join(raw[t.offset : t.offset + t.nbytes] for t in kept))


# --- sound folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("model", ["llama", "gpt2", "bloom", "falcon", "mixtral"])
def test_sound(model: str, bits: int, tiny: Tiny, tmp_path: Path) -> None:
    package.quantize(str(tiny(model)), tmp_path / "out", {"quantize": {"bits": bits}, "shard_size": "60kB"})
    for found in (
        package.verify(tmp_path / "out", quick=True),
        package.verify(tmp_path / "out"),
        package.verify(tmp_path / "out", source=str(tiny(model))),
    ):
        assert found.problems == ()
    assert found.quantized == len(found.errors) > 0
    assert found.compared == len(json.loads((tmp_path / "out" / "quantkit.json").read_text())["tensors"])
    low, high = (0.05, 0.15) if bits == 4 else (0.001, 0.02)
    assert all(low < error < high for error in found.errors.values())


def test_sound_says_so(out: Path, source: Path, quantkit: Run) -> None:
    assert problems(quantkit, out, code=0) == ""
    assert problems(quantkit, out, "--quick", code=0) == ""
    assert problems(quantkit, out, "--source", source, code=0) == ""
    text = quantkit("verify", out).stdout.splitlines()
    assert text[-1].split() == ["result", "sound"]


def test_quick_and_source_exclude_each_other(out: Path, source: Path, quantkit: Run) -> None:
    assert quantkit("verify", out, "--quick", "--source", source).returncode == 2


# --- harm that the manifest shows -------------------------------------------------------------------------------------


HARMS: dict[str, tuple[Harm, str]] = {
    "a bit in a weight": (lambda out: edit(out, WEIGHT, flip), "model.safetensors: its SHA-256"),
    "a bit in absmax": (lambda out: edit(out, WEIGHT + ".absmax", flip), "model.safetensors: its SHA-256"),
    "the block size": (lambda out: edit(out, STATE, other_block_size), f"{WEIGHT}' does not decode: quant_state says"),
    "a shard cut off": (lambda out: os.truncate(out / "model.safetensors", 99_999), "model.safetensors: 99,999 bytes"),
    "a shard gone": (lambda out: (out / "model.safetensors").unlink(), "model.safetensors: missing"),
    "no tokenizer": (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "a quant flag": (
        lambda out: edit_config(out, bnb_4bit_use_double_quant=False), "quantization_config.bnb_4bit_use_double_quant"
    ),
    "another shard": (
        lambda out: shutil.copy(out / "model.safetensors", out / "model-00001-of-00002.safetensors"),
        "model-00001-of-00002.safetensors: a stray file",
    ),
    "an index": (lambda out: (out / "model.safetensors.index.json").write_text("{}"), "model.safetensors.index.json"),
    "old weights": (lambda out: (out / "pytorch_model.bin").write_bytes(b""), "pytorch_model.bin: a stray file"),
    "a tensor gone": (lambda out: drop_tensor(out, WEIGHT), f"{WEIGHT}' is missing"),
    "a companion gone": (lambda out: drop_tensor(out, STATE), f"{STATE}' is missing"),
    "no card": (lambda out: (out / "README.md").unlink(), "README.md: missing"),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_harm_is_named(harm: str, out: Path, quantkit: Run) -> None:
    do, named = HARMS[harm]
    do(out)
    assert named in problems(quantkit, out)


@pytest.mark.parametrize("harm", ["a shard cut off", "no tokenizer", "a quant flag", "another shard", "a tensor gone"])
def test_quick_is_enough_for(harm: str, out: Path, quantkit: Run) -> None:
    do, named = HARMS[harm]
    do(out)
    assert named in problems(quantkit, out, "--quick")


def test_problems_end_in_exit_code_3(out: Path, quantkit: Run) -> None:
    (out / "tokenizer.json").unlink()
    done = quantkit("verify", out)
    assert done.returncode == 3
    assert "tokenizer.json: missing" in done.stdout
    assert done.stderr.count("error: ") == 1


# --- harm with the checksums adjusted ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "change", "named"),
    [
        (STATE, other_block_size, "blocksize 128"),
        (WEIGHT + ".nested_absmax", not_finite, "block maximum is not finite"),
        (WEIGHT + ".quant_map", flip, "quant_map is not the nf4 table"),
        (WEIGHT + ".nested_quant_map", flip, "nested_quant_map is not"),
        (STATE, lambda data: b"[" * len(data), "does not decode"),
        (STATE, lambda data: b"[]".ljust(len(data)), "does not decode"),
        (STATE, lambda data: b"\xff" * len(data), "does not decode"),
        (STATE, lambda data: data.replace(b"nested_offset", b"nested_0ffset"), "does not decode"),
    ],
    ids=["blocksize", "nan", "table", "nested table", "no JSON", "no object", "no UTF-8", "no offset"],
)
def test_companions_are_looked_at(tensor: str, change: Callable[[bytes], bytes], named: str, out: Path) -> None:
    edit(out, tensor, change)
    cover_up(out)
    found = package.verify(out).problems
    assert len(found) == 1
    assert repr(WEIGHT) in found[0]
    assert named in found[0]


@pytest.mark.parametrize(
    ("tensor", "change", "named"),
    [(WEIGHT, swap_nibbles, "relative error"), (COPIED, flip, "not equal to the source")],
    ids=["nibbles", "copied"],
)
def test_only_the_source_shows_it(
    tensor: str, change: Callable[[bytes], bytes], named: str, out: Path, source: Path
) -> None:
    edit(out, tensor, change)
    cover_up(out)
    assert package.verify(out).problems == ()
    (problem,) = package.verify(out, source=str(source)).problems
    assert repr(tensor) in problem
    assert named in problem


def test_tensor_left_out_everywhere(out: Path, source: Path) -> None:
    drop_tensor(out, COPIED)
    edit_manifest(out, lambda m: m.update(tensors=[row for row in m["tensors"] if row["name"] != COPIED]))
    cover_up(out)
    assert package.verify(out).problems == ()
    (problem,) = package.verify(out, source=str(source)).problems
    assert problem == f"tensor {COPIED!r}: the source has it, the manifest does not"


@pytest.mark.parametrize("wrong", [{"seed": 1}, {"dtype": "float16"}, {"intermediate_size": 128}], ids=str)
def test_another_parent(wrong: dict[str, Any], out: Path, tmp_path: Path) -> None:
    other = make_tiny("llama", tmp_path / "other", **wrong)
    found = package.verify(out, source=str(other)).problems
    assert any(repr(WEIGHT) in problem for problem in found)


# --- the manifest itself ----------------------------------------------------------------------------------------------


def set_row(table: str, **values: object) -> Harm:
    """Changes the first row of that table, the first quantized one of the tensors."""

    def change(manifest: dict[str, Any]) -> None:
        next(row for row in manifest[table] if row.get("quantized", True)).update(values)

    return lambda out: edit_manifest(out, change)


DAMAGES: dict[str, Harm] = {
    "no JSON": lambda out: (out / "quantkit.json").write_text("{"),
    "no UTF-8": lambda out: (out / "quantkit.json").write_bytes(b"\xff\xfe\x00"),
    "no object": lambda out: (out / "quantkit.json").write_text("[]"),
    "deep": lambda out: (out / "quantkit.json").write_text("[" * 100_000),
    "empty": lambda out: (out / "quantkit.json").write_text("{}"),
    "another format": lambda out: edit_manifest(out, lambda m: m.update(format=99)),
    "no tensors": lambda out: edit_manifest(out, lambda m: m.pop("tensors")),
    "tensors null": lambda out: edit_manifest(out, lambda m: m.update(tensors=None)),
    "tensors as text": lambda out: edit_manifest(out, lambda m: m.update(tensors="abc")),
    "no files": lambda out: edit_manifest(out, lambda m: m.pop("files")),
    "recipe as list": lambda out: edit_manifest(out, lambda m: m.update(recipe=[])),
    "unknown method": lambda out: edit_manifest(out, lambda m: m["recipe"]["quantize"].update(method="magic")),
    "other bits": lambda out: edit_manifest(out, lambda m: m["recipe"]["quantize"].update(bits=8)),
    "negative file": set_row("files", bytes=-1),
    "infinite file": set_row("files", bytes=float("inf")),
    "file above": set_row("files", name="../out/config.json"),
    "file elsewhere": set_row("files", name="/etc/passwd"),
    "file is a folder": set_row("files", name=".."),
    "file with a NUL": set_row("files", name="a\0b"),
    "unknown dtype": set_row("tensors", dtype="I3"),
    "integers quantized": set_row("tensors", dtype="I64"),
    "negative shape": set_row("tensors", shape=[-1, 64]),
    "flat": set_row("tensors", shape=[64]),
    "huge": set_row("tensors", shape=[2**40, 2**40]),
    "empty tensor": set_row("tensors", shape=[0, 64]),
    "no name": set_row("tensors", name=None),
    "error as text": set_row("tensors", error="x"),
    "NaN error": set_row("tensors", error=float("nan")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_manifest_is_a_problem(damage: str, out: Path) -> None:
    DAMAGES[damage](out)
    assert package.verify(out, quick=True).problems
    assert package.verify(out).problems


@pytest.mark.parametrize("damage", ["no JSON", "empty", "negative file", "file above", "flat"])
def test_damaged_manifest_ends_in_exit_code_3(damage: str, out: Path, quantkit: Run) -> None:
    DAMAGES[damage](out)
    assert problems(quantkit, out)
    again = quantkit("card", out)
    assert again.returncode in (0, 2, 3)
    assert "Traceback" not in again.stderr


@pytest.mark.parametrize("what", ["no manifest", "unfinished"])
def test_not_ours_to_check(what: str, out: Path, quantkit: Run) -> None:
    (out / "quantkit.json").unlink()
    if what == "unfinished":
        (out / ".quantkit").mkdir()
        (out / ".quantkit" / "journal").touch()
    done = quantkit("verify", out)
    assert done.returncode == 2
    assert ("unfinished" in done.stderr) == (what == "unfinished")


# --- the card ---------------------------------------------------------------------------------------------------------


def test_publishers_edit_their_card(out: Path, quantkit: Run) -> None:
    with (out / "README.md").open("a") as f:
        f.write("\nThanks to everyone.\n")
    assert problems(quantkit, out, code=0) == ""


def test_card_comes_back(out: Path, quantkit: Run) -> None:
    card = (out / "README.md").read_bytes()
    (out / "README.md").unlink()
    assert "`quantkit card` writes it again" in problems(quantkit, out)
    assert quantkit("card", out).returncode == 0
    assert (out / "README.md").read_bytes() == card
    assert problems(quantkit, out, code=0) == ""


# --- memory -----------------------------------------------------------------------------------------------------------


def test_verify_with_source_is_bounded_in_memory(tmp_path: Path) -> None:
    """240 MB of source, 64 MB its largest tensor; the program alone takes some 170 MiB."""
    parent = write(tmp_path / "source", *mistral(2048, 8192, 512, 1000), "F32")
    package.quantize(str(parent), tmp_path / "out")
    line = [sys.executable, "-c", MEASURE, "verify", str(tmp_path / "out"), "--source", str(parent), "--quiet"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    peak = int(done.stdout.splitlines()[-1])
    print(f"measured {peak / MIB:.0f} MiB")
    assert peak < 280 * MIB
