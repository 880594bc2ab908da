"""A resumed conversion vouches for what the run before it wrote, and so looks at it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle.native_models import make_native

import quantkit as package
from quantkit.errors import Interrupted

OLD: dict[str, Any] = {"convert": {"tokenizer": False, "weights_format": "pth"}}
NEW: dict[str, Any] = {"convert": {"tokenizer": False}}


@pytest.mark.parametrize(("recipe", "name"), [(NEW, "consolidated.safetensors"), (OLD, "consolidated.00.pth")])
def test_damage_between_two_runs_is_mended(
    recipe: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_native(tmp_path / "source")
    package.convert(str(source), tmp_path / "good", "mistral", recipe)
    wanted = (tmp_path / "good" / name).read_bytes()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("quantkit.runner.publish", interrupt)
        with pytest.raises(Interrupted):
            package.convert(str(source), tmp_path / "out", "mistral", recipe)
    damaged = bytearray((tmp_path / "out" / name).read_bytes())
    damaged[len(damaged) // 2] ^= 4  # in the middle of some weight
    (tmp_path / "out" / name).write_bytes(damaged)
    outcome = package.convert(str(source), tmp_path / "out", "mistral", recipe)
    assert outcome.reused == outcome.units
    assert (tmp_path / "out" / name).read_bytes() == wanted
    assert not package.verify(tmp_path / "out", source=str(source)).problems
    if name.endswith(".pth"):
        assert torch.load(tmp_path / "out" / name, weights_only=True)


@pytest.mark.parametrize(("to", "key", "value"), [("mistral", "rope_theta", 5e4), ("hf", "rms_norm_eps", 1e-3)])
def test_verify_compares_the_configuration_with_the_source(to: Any, key: str, value: float, tmp_path: Path) -> None:
    """Somebody changes a number, and the sums in the manifest with it: only the source knows."""
    import hashlib

    source = make_native(tmp_path / "source", params_extra={"rope_theta": 1e4})
    package.convert(str(source), tmp_path / "out", to, NEW)
    assert not package.verify(tmp_path / "out", source=str(source)).problems
    path = tmp_path / "out" / ("params.json" if to == "mistral" else "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    manifest = json.loads((tmp_path / "out" / "quantkit.json").read_text())
    for row in manifest["files"]:
        if row["name"] == path.name:
            row |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (tmp_path / "out" / "quantkit.json").write_text(json.dumps(manifest))
    assert not package.verify(tmp_path / "out").problems
    (problem,) = package.verify(tmp_path / "out", source=str(source)).problems
    assert problem.startswith(f"{path.name}: {key} is {value}")
