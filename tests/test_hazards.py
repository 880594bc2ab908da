"""Ways in which a folder could lie: a journal without its data, links that somebody planted, configs that name code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit import api, output, runner
from quantkit.errors import Interrupted, OutputError, SourceError, UsageError
from quantkit.layouts.hf import SIDE_FILES

Tiny = Callable[[str], Path]


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def begun(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped with all weights written and nothing published."""
    with monkeypatch.context() as patch:
        patch.setattr(runner, "publish", stop)
        with pytest.raises(Interrupted):
            api.quantize(str(tiny("llama")), tmp_path / "out")
    return tmp_path / "out"


def test_a_journal_does_not_vouch_for_a_file_that_is_gone(tiny: Tiny, begun: Path, tmp_path: Path) -> None:
    (begun / "model.safetensors").unlink()
    assert api.quantize(str(tiny("llama")), begun).reused == 0
    api.quantize(str(tiny("llama")), tmp_path / "whole")
    assert (begun / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_a_journal_does_not_outlive_what_force_deletes(
    tiny: Tiny, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(output, "_clear", stop)
        with pytest.raises(KeyboardInterrupt):
            api.quantize(str(tiny("llama")), begun, force=True)
    with pytest.raises(OutputError):
        api.quantize(str(tiny("llama")), begun)
    assert api.quantize(str(tiny("llama")), begun, force=True).reused == 0


@pytest.mark.parametrize("name", ["README.md.partial", "quantkit.json.partial"])
def test_a_planted_link_is_not_followed(tiny: Tiny, tmp_path: Path, begun: Path, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (begun / name).symlink_to(victim)
    api.quantize(str(tiny("llama")), begun)
    assert victim.read_text() == "mine"
    assert api.verify(begun).problems == ()


def test_a_config_that_names_code_is_not_loaded(tiny: Tiny, tmp_path: Path) -> None:
    source = shutil.copytree(tiny("llama"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    named = {"auto_map": {"AutoModel": "x.Y"}, "attn_implementation": "org/kernels", "experts_implementation": "org/x"}
    (source / "config.json").write_text(json.dumps({**config, **named}))
    api.quantize(str(source), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not named.keys() & written.keys()
    (tmp_path / "out" / "config.json").write_text(json.dumps({**written, "attn_implementation": "org/kernels"}))
    from quantkit.loading import load

    with pytest.raises(SourceError, match="attn_implementation"):
        load(tmp_path / "out")


def test_a_method_refuses_a_device_that_it_would_ignore(tiny: Tiny) -> None:
    job = {"quantize": {"bits": 8}, "resources": {"device": "cuda"}}
    with pytest.raises(UsageError, match="does not encode on 'cuda'"):
        api.plan(str(tiny("llama")), job)
    assert api.plan(str(tiny("llama")), {**job, "quantize": {"bits": 4}}).memory.peak > 2e9


@pytest.mark.parametrize(
    "name", ["tokenizer.pth", "tokenizer.pkl", "chat_template.so", "tokenization.py", "LICENSE.sh"]
)
def test_code_and_pickles_do_not_travel(name: str) -> None:
    assert not SIDE_FILES.fullmatch(name)


def test_finished_is_said_of_whole_folders_only(tiny: Tiny, tmp_path: Path) -> None:
    api.quantize(str(tiny("llama")), tmp_path / "out")
    (tmp_path / "out" / "tokenizer.json").unlink()
    with pytest.raises(OutputError, match=r"tokenizer\.json is missing"):
        api.quantize(str(tiny("llama")), tmp_path / "out")
    api.quantize(str(tiny("llama")), tmp_path / "out", force=True)
    assert api.quantize(str(tiny("llama")), tmp_path / "out").already_done


def test_weights_that_do_not_fit_the_config_are_named(tiny: Tiny, tmp_path: Path) -> None:
    assert api.plan(str(tiny("llama"))).warnings == ()
    source = shutil.copytree(tiny("llama"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 99}))
    assert "99 layers, the weights hold 2" in api.plan(str(source)).warnings[0]
    (source / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    assert "config.json makes it [64, 128]" in api.plan(str(source)).warnings[0]
