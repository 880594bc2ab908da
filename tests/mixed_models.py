"""Set-up of the tests of mixed bits and of pruning: small models with a text beside them, and folders made of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_models import build as build_model
from eval_models import quiet_transformers
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.architectures import find
from quantkit.architectures import linears as linears_of
from quantkit.calibration.layers import Linear
from quantkit.calibration.skeleton import Skeleton
from quantkit.calibration.weights import CheckpointWeights
from quantkit.checkpoint.reader import SourceFiles
from quantkit.layouts import open_checkpoint
from quantkit.plans import Plan

TEXT = " ".join(f"{a} {b} of the {c}." for a in ("red", "old", "far") for b in "abcdefgh" for c in range(60))


def build(folder: Path, kind: str = "llama", *, halves: bool = False, **changes: Any) -> Path:
    """With calib.txt beside it; halves: in bfloat16."""
    build_model(folder, kind, **changes)
    (folder / "calib.txt").write_text(TEXT)
    if halves:
        tensors = {name: x.bfloat16() for name, x in load_file(folder / "model.safetensors").items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def recipe(source: Path, method: str, bits: float, **quantize: Any) -> dict[str, Any]:
    return {
        "quantize": {"method": method, "bits": bits, **quantize},
        "calibration": {"text": str(source / "calib.txt"), "samples": 8, "length": 64},
        "resources": {"threads": 1},
    }


def exl2_recipe(source: Path, bits: float = 4.5, **quantize: Any) -> dict[str, Any]:
    return recipe(source, "exl2", bits, **quantize)


def make(work: Path, method: str, bits: float, **model: Any) -> tuple[Path, Path]:
    """A model, and a folder made of it; beside that, what was measured."""
    with quiet_transformers():
        source = build(work / "source", **model)
        quantkit.quantize(source, work / "out", recipe(source, method, bits))
    return source, work / "out"


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "quantkit.json").read_text())
    return found


@dataclass(frozen=True)
class Streamed:
    """What a stream through a model's layers is made of."""

    skeleton: Skeleton
    weights: CheckpointWeights
    layers: list[dict[str, Linear]]

    @property
    def parts(self) -> tuple[Skeleton, CheckpointWeights]:
        return self.skeleton, self.weights


def linears_to_solve(plan: Plan, skeleton: Skeleton) -> list[dict[str, Linear]]:
    """Of each layer, by name."""
    places = {p.name: p for layer in skeleton.inside for p in layer}
    layers: list[dict[str, Linear]] = [{} for _ in skeleton.layers]
    for unit in plan.units:
        if unit.calibrated and (linear := unit.linear) is not None:
            layers[linear.layer][linear.module] = Linear(places[unit.name], linear.transposed, linear.expert)
    return layers


@contextmanager
def streamed(source: Path) -> Iterator[Streamed]:
    checkpoint = open_checkpoint(source)
    architecture = find(checkpoint.config)
    assert architecture is not None
    with quiet_transformers(), SourceFiles(checkpoint.folder, checkpoint.files) as files:
        skeleton = Skeleton(checkpoint.config, checkpoint.tensors, checkpoint.folder)
        places = {p.name: p for layer in skeleton.inside for p in layer}
        layers: list[dict[str, Linear]] = [{} for _ in skeleton.layers]
        for x in linears_of(architecture, checkpoint.config, checkpoint.tensors):
            if x.layer >= 0:
                layers[x.layer][x.module] = Linear(places[f"{x.module}.weight"], x.transposed, x.expert)
        yield Streamed(skeleton, CheckpointWeights(checkpoint, files), layers)
