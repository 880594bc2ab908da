"""What can be wrong with a Hugging Face folder to convert, with the tokenizer, the command, the recipe, or the folder
to write.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from bad_inputs import LFS_POINTER, Spoil, contents, write
from conftest import make_tiny
from convert_inputs import (
    DIM,
    ESCAPES,
    FP8,
    GONE,
    SPM,
    Program,
    added,
    both,
    cast,
    config,
    elsewhere,
    lost,
    parse,
    remove,
    renamed,
    shaped,
    written,
)
from oracle.native_models import make_native
from safetensors.torch import load_file
from tokenization.protobuf import spm

TOKENIZERS: dict[str, Spoil] = {
    "none": remove("tokenizer.model"),
    "two": write("tokenizer.model.v3", spm([("a", -1.0, 1)])),
    "damaged": write("tokenizer.model", SPM[:1000]),
    "tekken is no JSON": both(remove("tokenizer.model"), write("tekken.json", "{")),
    "tekken beside": write("tekken.json", "{"),
}


@pytest.mark.parametrize("spoil", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("to", ["hf", "mistral"])
@pytest.mark.parametrize("layout", ["native", "hf"])
def test_no_tokenizer_helps(
    layout: str, to: str, spoil: Spoil, request: pytest.FixtureRequest, out: Path, program: Program
) -> None:
    source = request.getfixturevalue(layout)
    spoil(source)
    program.converts(source, out, "--to", to, "--no-tokenizer")
    assert not [p.name for p in out.iterdir() if "token" in p.name or "tekken" in p.name]


BAD_HF_TOKENIZERS: dict[str, tuple[Spoil, str]] = {
    "none": (remove("tokenizer.model"), "the folder has no tokenizer"),
    "tokenizer.json alone": (both(remove("tokenizer.model"), write("tokenizer.json", "{}")),
                             "tokenizer.json is there, but neither tokenizer.model nor tekken.json"),
    "two": (write("tokenizer.model.v3", spm([("a", -1.0, 1)])), "both fit the model"),
    "damaged": (write("tokenizer.model", SPM[:1000]), ""),
    "tekken is no JSON": (both(remove("tokenizer.model"), write("tekken.json", "{")), "not valid JSON"),
    "too large": (write("tokenizer.model", spm([(f"a{i}", -1.0, 1) for i in range(99)])), "358 tokens, more than"),
    "pointer": (write("tokenizer.model", LFS_POINTER), "Git LFS pointer"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "what"), BAD_HF_TOKENIZERS.values(), ids=BAD_HF_TOKENIZERS)
def test_a_tokenizer_that_cannot_be_native(spoil: Spoil, what: str, hf: Path, out: Path, program: Program) -> None:
    spoil(hf)
    refusal = program.refuses(hf, out, "--to", "mistral")
    assert what in refusal.what
    assert str(hf) in refusal.where


@pytest.mark.parametrize("model_type", ["gpt2", "qwen2", "falcon", "bloom"])
def test_another_architecture(
    model_type: str, tiny: Callable[[str], Path], tmp_path: Path, out: Path, program: Program
) -> None:
    refusal = program.refuses(tiny(model_type), out, "--to", "mistral", "--no-tokenizer")
    assert f"model_type is {model_type!r}" in refusal.what
    assert "mistral, mixtral" in refusal.hint


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"mlp_bias": True}])
def test_a_llama_with_biases(changes: dict[str, bool], tmp_path: Path, out: Path, program: Program) -> None:
    folder = make_tiny("llama", tmp_path / "llama", **changes)
    refusal = program.refuses(folder, out, "--to", "mistral", "--no-tokenizer")
    assert f"{next(iter(changes))} is True" in refusal.what


LINEAR = "model.layers.0.self_attn.q_proj.weight"


def indexed(place: str) -> Spoil:
    """An index beside model.safetensors that says that one tensor lies elsewhere."""

    def spoil(folder: Path) -> None:
        where = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {**where, LINEAR: place}}))

    return spoil


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64, "rope_theta": 1e6}  # fmt: skip

BAD_HF: dict[str, tuple[Spoil, str, str]] = {
    "no config": (remove("config.json"), "no config.json", ""),
    "config is a list": (write("config.json", "[]"), "config.json holds list", "config.json"),
    "llama with scaled rope": (config(model_type="llama", rope_theta=GONE, rope_parameters=LLAMA3), "", "config.json"),
    "linear rope": (config(rope_scaling={"type": "linear", "factor": 2.0}), "'linear'", "config.json"),
    "another activation": (config(hidden_act="gelu"), "hidden_act is 'gelu'", "config.json"),
    "activation that escapes": (config(hidden_act=ESCAPES), "hidden_act is '\\x1b[2J", "config.json"),
    "type that escapes": (config(model_type=ESCAPES), "model_type is '\\x1b[2J", "config.json"),
    "half of each head": (config(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5", "config.json"),
    "odd head_dim": (config(head_dim=15), "head_dim is 15, an odd number", "config.json"),
    "heads do not fit": (config(num_attention_heads=8), f"tensor '{LINEAR}' is [64, 64], config.json makes it", ""),
    "kv heads do not fit": (config(num_key_value_heads=4), "k_proj.weight' is [32, 64], config.json makes it", ""),
    "size in quotes": (config(hidden_size="64"), "hidden_size is '64'", "config.json"),
    "sizes missing": (config(num_hidden_layers=GONE), "num_hidden_layers is missing", "config.json"),
    "layers without end": (config(num_hidden_layers=2**31 - 1), "no model has so many layers", "config.json"),
    "NaN": (config(rms_norm_eps=float("nan")), "rms_norm_eps is nan", "config.json"),
    "tensor missing": (lost(LINEAR), f"tensor '{LINEAR}' is missing", ""),
    "head missing": (lost("lm_head.weight"), "tensor 'lm_head.weight' is missing", ""),
    "tensor too many": (
        added("model.layers.0.self_attn.q_norm.weight", 16),
        "has no place in the mistral-src layout",
        "model.safetensors",
    ),
    "layer too many": (added("model.layers.2.mlp.up_proj.weight", 96, DIM), "model.layers.2.", ""),
    "bias": (
        added("model.layers.0.self_attn.q_proj.bias"),
        "has no place in the mistral-src layout",
        "model.safetensors",
    ),
    "native name": (
        added("layers.0.attention.wq.weight", DIM, DIM),
        "has no place in the mistral-src layout",
        "model.safetensors",
    ),
    "wrong shape": (shaped(LINEAR, 48, DIM), f"tensor '{LINEAR}' is [48, 64], config.json makes it [64, 64]", ""),
    "quantized by config": (config(quantization_config={"quant_method": "gptq"}), "(gptq)", ""),
    "quantized by a method that escapes": (config(quantization_config={"quant_method": ESCAPES}), "\\x1b[2J", ""),
    "quantized by names": (renamed(LINEAR, LINEAR.replace(".weight", ".qweight")), ".qweight", ""),
    "FP8 by names": (added(LINEAR + "_scale_inv", 1, 1), "weight_scale_inv", ""),
    "FP8": (cast(LINEAR, FP8), "F8_E4M3", ""),
    "integers": (cast(LINEAR, torch.int8), "I8", ""),
    "index names an absent file": (indexed("x.safetensors"), "the index names x.safetensors, which is not there", ""),
    "index climbs": (indexed("../x.safetensors"), "'../x.safetensors' is not a plain file name", ""),
    "config lies elsewhere": (
        elsewhere("config.json"),
        "config.json is a symbolic link that leaves the folder",
        "config.json",
    ),
}


@pytest.mark.parametrize("options", [(), ("--weights-format", "pth")], ids=["safetensors", "pth"])
@pytest.mark.parametrize(("spoil", "what", "place"), BAD_HF.values(), ids=BAD_HF)
def test_a_bad_hugging_face_folder_is_refused(
    spoil: Spoil, what: str, place: str, options: tuple[str, ...], hf: Path, out: Path, program: Program
) -> None:
    spoil(hf)
    refusal = program.refuses(hf, out, "--to", "mistral", *options)
    assert what in refusal.what
    assert refusal.where.endswith(place)


def test_our_own_output_is_no_source(hf: Path, tmp_path: Path, out: Path, program: Program) -> None:
    code, _, stderr = program.run("quantize", hf, "-o", tmp_path / "bnb", "--quiet")
    assert code == 0, stderr
    for to in ("mistral", "hf"):
        refusal = program.refuses(tmp_path / "bnb", out, "--to", to)
        assert "(bitsandbytes)" in refusal.what
        assert "parent" in refusal.hint
    # Nor with its mark taken out: the names speak.
    config(quantization_config=GONE)(tmp_path / "bnb")
    assert ".weight.absmax" in program.refuses(tmp_path / "bnb", out, "--to", "mistral").what


OLD = {"rope_theta": 10000.0, "sliding_window": 64}

BAD_2023: dict[str, tuple[Spoil, list[str], str]] = {
    "theta": (config(rope_theta=1e6), [], "rope_theta 1e+06"),
    "safetensors": (lambda f: None, ["--weights-format", "safetensors"], "reads no safetensors"),
    "tekken": (both(remove("tokenizer.model"), write("tekken.json", "{")), [], ""),
    "tied": (both(config(tie_word_embeddings=True), lost("lm_head.weight")), [], "a head that is the embedding"),
    "two files": (lambda f: None, ["--max-shard-size", "50KB"], "is one file of"),
    "windows that differ": (
        config(model_type="ministral", layer_types=["full_attention", "sliding_attention"]),
        [],
        "windows that differ",
    ),
    "no window and no context": (
        config(sliding_window=None, max_position_embeddings=GONE),
        [],
        "whose context is not known",
    ),
    "context is negative": (config(sliding_window=None, max_position_embeddings=-5), [], "max_position_embeddings"),
    "context is huge": (config(sliding_window=None, max_position_embeddings=2**40), [], "max_position_embeddings"),
}


@pytest.mark.parametrize(("spoil", "options", "what"), BAD_2023.values(), ids=BAD_2023)
def test_what_the_reference_of_2023_cannot_run(
    spoil: Spoil, options: list[str], what: str, hf: Path, out: Path, program: Program
) -> None:
    config(**OLD)(hf)
    spoil(hf)
    assert what in program.refuses(hf, out, "--to", "mistral", "--profile", "one-file-ref-2023", *options).what


def test_mixtures_and_2023(tmp_path: Path, out: Path, program: Program) -> None:
    folder = make_native(tmp_path / "moe", experts=4, params_extra=OLD)
    options = ("--to", "mistral", "--profile", "one-file-ref-2023", "--no-tokenizer")
    assert "a mixture of experts" in program.refuses(folder, out, *options).what


def test_what_the_reference_of_2023_can_run(hf: Path, out: Path, program: Program) -> None:
    config(**OLD)(hf)
    program.converts(hf, out, "--to", "mistral", "--profile", "one-file-ref-2023")
    assert len(written(out, "params.json")) == 9
    assert (out / "consolidated.00.pth").exists()


TO_HF, TO_MISTRAL = ["--to", "hf"], ["--to", "mistral"]

BAD_OPTIONS: list[tuple[str, list[str], str, str]] = [
    ("hf", [], "which layout is to be written", "--to hf or --to mistral"),
    ("hf", ["--to", "gguf"], "'gguf' is not one of 'hf', 'mistral'", "quantkit convert --help"),
    ("hf", ["--to", ESCAPES], "is not one of 'hf', 'mistral'", ""),
    ("hf", ["--too", "hf"], "No such option '--too'", "quantkit convert --help"),
    ("hf", [*TO_MISTRAL, "--profile", "2023"], "'2023' is not one of 'current'", "--help"),
    ("hf", [*TO_MISTRAL, "--weights-format", "bin"], "'bin' is not one of 'safetensors'", "--help"),
    ("native", [*TO_HF, "--weights-format", "pth"], "weights_format pth is for a folder in the mistral layout", ""),
    ("native", [*TO_HF, "--profile", "one-file-ref-2023"], "profile is for a folder in the mistral layout", ""),
    ("hf", [*TO_MISTRAL, "--weights-format", "pth", "--max-shard-size", "50KB"], "is one file of", "--shard-size"),
    ("hf", [*TO_MISTRAL, "--max-shard-size", "0"], "shard_size: input should be greater than 0", "'0'"),
    ("hf", [*TO_MISTRAL, "--rope-theta", "10000"], "--rope-theta", "leave"),
    ("hf", [*TO_MISTRAL, "--context", "4096"], "are for folders with params.json", "leave"),
    ("hf", [*TO_MISTRAL, "--text-only"], "", "leave"),
    ("native", [*TO_HF, "--rope-theta", "0"], "native.rope_theta: input should be greater than 0", "0"),
    ("native", [*TO_HF, "--rope-theta", "nan"], "native.rope_theta", ""),
    ("native", [*TO_HF, "--rope-theta", "inf"], "native.rope_theta", ""),
    ("native", [*TO_HF, "--rope-theta", "x"], "'x' is not a valid float", "quantkit convert --help"),
    ("native", [*TO_HF, "--context", "0"], "native.context: input should be greater than or equal to 1", "0"),
    ("native", [*TO_HF, "--context", str(2**31)], "native.context", ""),
    ("native", [*TO_HF, "--max-memory", "1MB"], "--max-memory 1 MiB is too little", "allow "),
    ("native", [*TO_HF, "--threads", "0"], "resources.threads", "0"),
    ("native", [*TO_HF, "--bits", "4"], "No such option '--bits'", "quantkit convert --help"),
    ("native", [*TO_HF, "--set", "convert.tokeniser=no"], "unknown key 'convert.tokeniser'", "'tokenizer'"),
    ("native", [*TO_HF, "--set", "convert=hf"], "convert is not a block", "keys below"),
    ("native", [*TO_HF, "--revision", "main"], "--revision is for Hub ids", "leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "options", "what", "hint"),
    BAD_OPTIONS,
    ids=[" ".join(["convert", *o])[:50] for _, o, _, _ in BAD_OPTIONS],
)
def test_a_bad_option_is_refused(
    layout: str, options: list[str], what: str, hint: str, models: Path, out: Path, program: Program
) -> None:
    """Two lines where there is no place to name: the command line is all."""
    before = contents(models)
    code, stdout, stderr = program.run("convert", models / layout, "-o", out, *options, "--quiet")
    assert (code, stdout) == (2, "")
    assert "Traceback" not in stderr
    lines = stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert what in lines[0]
    assert lines[-1].startswith("  hint: ")
    assert hint in lines[-1]
    assert len(lines) <= 3
    assert all(line.isprintable() for line in lines)
    assert not out.exists()
    assert contents(models) == before


def test_no_output_is_named(native: Path, program: Program) -> None:
    code, _, stderr = program.run("convert", native, "--to", "hf")
    assert code == 2
    assert "no output folder is named" in stderr


BAD_RECIPES = {
    "unknown key": ("convert:\n  to: hf\n  tokeniser: false\n", "unknown key 'convert.tokeniser'", 3, "tokenizer"),
    "unknown native key": ("convert:\n  to: hf\nnative:\n  theta: 5\n", "unknown key 'native.theta'", 4, "rope_theta"),
    "no layout": ("convert:\n  profile: current\n", "convert.to is missing", None, ""),
    "text for a block": ("convert: hf\n", "convert is not a block of keys", 1, "indent"),
    "null for a block": ("convert:\n", "convert is not a block of keys", 1, "indent"),
    "wrong type": ("convert:\n  to: hf\n  check: 3\n", "convert.check: input should be a valid boolean", 3, "3"),
    "quantized mistral": ("quantize:\n  bits: 4\nconvert:\n  to: mistral\n", "no form in the mistral layout", 4, ""),
    "pth for hf": ("convert:\n  to: hf\n  weights_format: pth\n", "is for a folder in the mistral layout", 1, ""),
}  # fmt: skip


@pytest.mark.parametrize(("text", "what", "line", "hint"), BAD_RECIPES.values(), ids=BAD_RECIPES)
@pytest.mark.parametrize("verb", ["run", "convert"])
def test_a_bad_recipe_is_refused(
    verb: str, text: str, what: str, line: int | None, hint: str, native: Path, out: Path, program: Program
) -> None:
    path = out.with_name("recipe.yaml")
    path.write_text(yaml.safe_dump({"source": str(native)}).strip() + "\n" + text)
    arguments = ("run", path) if verb == "run" else ("convert", "--recipe", path)
    code, stdout, stderr = program.run(*arguments, "-o", out)
    _, refusal = parse(stderr)
    assert (code, stdout) == (2, "")
    assert what in refusal.what
    assert refusal.where == (f"{path}, line {line + 1}" if line else str(path))
    assert hint in refusal.hint
    assert not out.exists()


def test_quantizing_into_mistrals_layout(native: Path, out: Path, program: Program) -> None:
    code, _, stderr = program.run("quantize", native, "-o", out, "--set", "convert.to=mistral", "--quiet")
    assert code == 2
    assert "no form in the mistral layout" in stderr
    assert not out.exists()


@pytest.mark.parametrize("relation", ["same", "inside", "around", "same by link", "inside by link"])
@pytest.mark.parametrize(("layout", "to"), [("native", "hf"), ("hf", "mistral")])
def test_output_and_source_lie_apart(
    layout: str, to: str, relation: str, request: pytest.FixtureRequest, tmp_path: Path, program: Program
) -> None:
    source = request.getfixturevalue(layout)
    link = tmp_path / "link"
    link.symlink_to(source, target_is_directory=True)
    target = {"same": source, "inside": source / "out", "around": tmp_path, "same by link": link,
              "inside by link": link / "out"}[relation]  # fmt: skip
    before = contents(tmp_path)
    for force in ([], ["--force"]):
        assert "contain each other" in program.refuses(source, target, "--to", to, *force).what
    assert contents(tmp_path) == before


def test_a_folder_of_other_things_is_left_alone(native: Path, out: Path, program: Program) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refusal = program.refuses(native, out, "--to", "hf")
    assert refusal.what == "the output folder is not empty (notes.txt)"
    assert "--force" in refusal.hint
    program.converts(native, out, "--to", "hf", "--force")
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["consolidated.safetensors", "consolidated.00.pth", "consolidated.00.pt",
                                  "model.safetensors", "consolidated-00001-of-00002.safetensors"])  # fmt: skip
@pytest.mark.parametrize(("layout", "to"), [("native", "hf"), ("hf", "mistral")])
def test_force_deletes_nobody_elses_weights(
    layout: str, to: str, name: str, request: pytest.FixtureRequest, out: Path, program: Program
) -> None:
    source = request.getfixturevalue(layout)
    out.mkdir()
    for file in ("params.json", "config.json", name):
        (out / file).write_text("mine")
    refusal = program.refuses(source, out, "--to", to, "--force")
    assert refusal.what == f"{name} is a weight file that quantkit did not write; --force does not delete it"
    assert "is not empty" in program.refuses(source, out, "--to", to).what


def test_the_other_layout_takes_over_with_force_only(
    native: Path, hf: Path, out: Path, tmp_path: Path, program: Program
) -> None:
    program.converts(native, out, "--to", "hf")
    before = contents(out)
    for source in (native, hf):
        refusal = program.refuses(source, out, "--to", "mistral")
        assert refusal.what == "the output folder holds the result of another plan"
    assert contents(out) == before
    code, stdout, _ = program.run("convert", native, "-o", out, "--to", "hf", "--quiet")
    assert (code, "is finished already" in stdout) == (0, True)
    program.converts(hf, out, "--to", "mistral", "--force")
    program.converts(hf, tmp_path / "fresh", "--to", "mistral")
    assert contents(out) == contents(tmp_path / "fresh"), "nothing of the earlier result is left"
    # And back.
    program.converts(native, out, "--to", "hf", "--force")
    assert contents(out) == before


def test_weights_of_the_other_format_do_not_stay(hf: Path, out: Path, program: Program) -> None:
    """Both files in one folder is what Mistral's own programs refuse."""
    program.converts(hf, out, "--to", "mistral", "--weights-format", "pth")
    program.converts(hf, out, "--to", "mistral", "--force")
    assert [p.name for p in out.glob("consolidated*")] == ["consolidated.safetensors"]
