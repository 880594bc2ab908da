"""Recipes that prune small models, and runs whose folder is checked against its plan: what test_prune*.py share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import quantkit
from quantkit.layouts import open_checkpoint
from quantkit.restored import RestoredWeights, open_files


def recipe(source: Path, *, samples: int = 8, length: int = 64, quantize: Any = None, **prune: Any) -> dict[str, Any]:
    table: dict[str, Any] = {"prune": prune, "resources": {"threads": 1}}
    if quantize is not None:
        table["quantize"] = quantize
    if prune.get("method") != "magnitude" or (quantize or {}).get("method") == "gptq":
        table["calibration"] = {"text": str(source / "calib.txt"), "samples": samples, "length": length}
    return table


def run(source: Path, out: Path, table: dict[str, Any]) -> dict[str, Any]:
    """The manifest of what was written. Every file has the planned size, and verify finds no fault."""
    table = dict(table)
    plan = quantkit.plan(str(source), table)
    quantkit.prune(str(source), out, table)
    zeros, total = plan.to_prune
    sizes = {f.name: f.nbytes for f in plan.files}
    assert {p.name: p.stat().st_size for p in out.iterdir()} == sizes
    found = quantkit.verify(out, source=str(source))
    assert not found.problems
    assert found.pruned is not None
    assert found.pruned.tensors == len(plan.pruned)
    assert quantkit.verify(out).pruned == found.pruned
    loaded: dict[str, Any] = json.loads((out / "quantkit.json").read_text())
    assert sum(row["weights"] for row in loaded["sparsity"]) == total
    if zeros is not None:
        assert sum(row["pruned"] for row in loaded["sparsity"]) == zeros
    return loaded


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors as a loader sees them."""
    checkpoint = open_checkpoint(folder)
    with open_files(checkpoint) as files:
        restored = RestoredWeights(checkpoint, files)
        return {name: restored.read(name).clone() for name in restored.names}


def pruned_names(manifest: dict[str, Any]) -> list[str]:
    return [row["name"] for row in manifest["tensors"] if row.get("pruned")]
