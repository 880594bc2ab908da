"""llm-compressor's Wanda and SparseGPT, in an environment of their own (`make interop` builds it), prune what ours do:
from the inputs that they went by, the same weights go, and those that stay become the same."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_models import build, quiet_transformers
from safetensors.torch import load_file
from torch import Tensor

from quantkit.solvers.factor import factorize
from quantkit.solvers.masks import wanda
from quantkit.solvers.pattern import Amount, Pattern
from quantkit.solvers.sparsegpt import BLOCK, prune_columns

pytestmark = pytest.mark.interop

PYTHON = Path(__file__).parents[2] / ".interop" / "llmcompressor" / "bin" / "python"
AMOUNTS: dict[str, Amount] = {"0.02": 0.02, "0.5": 0.5, "2:4": Pattern(2, 4), "4:8": Pattern(4, 8)}
TIE = 1e-5  # costs so near to each other, relatively, float32 does not order
Found = dict[str, tuple[Tensor, Tensor, Tensor]]  # by linear: its weight, its inputs, its weight pruned by the peer


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """What became of a model, by METHOD=AMOUNT. All of it in one process: importing the peer takes longest."""
    if not PYTHON.exists():
        pytest.skip("no environment .interop/llmcompressor: `make interop` builds it")
    work = tmp_path_factory.mktemp("peer")
    with quiet_transformers():
        source = build(work / "source", hidden_size=128, intermediate_size=384)
    generator = torch.Generator().manual_seed(1)
    np.save(work / "ids.npy", torch.randint(0, 256, (16, 64), generator=generator).numpy())
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    variables.pop("PYTHONPATH", None)
    cases = [f"{method}={amount}" for method in ("wanda", "sparsegpt") for amount in AMOUNTS]
    script = Path(__file__).with_name("readers") / "llmcompressor_prune.py"
    arguments = [str(source), str(work / "ids.npy"), str(work), *cases]
    done = subprocess.run(
        [str(PYTHON), "-W", "ignore", str(script), *arguments], cwd=work, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    weights = load_file(source / "model.safetensors")
    found: dict[str, Found] = {}
    for case in cases:
        tensors = load_file(work / f"{case}.safetensors")
        names = [name for name in tensors if name.endswith(".weight")]
        assert len(names) == 2 * 7
        inputs = {name: tensors[f"{name.removesuffix('weight')}inputs"] for name in names}
        assert all(len(seen) == 16 * 64 for seen in inputs.values())
        found[case] = {name: (weights[name], inputs[name], tensors[name]) for name in names}
    return found


@pytest.mark.parametrize("amount", AMOUNTS)
def test_wanda_takes_the_same_weights(peer: dict[str, Found], amount: str) -> None:
    for name, (weight, inputs, theirs) in peer[f"wanda={amount}"].items():
        keep = wanda(weight, inputs.square().sum(0), AMOUNTS[amount])
        assert torch.equal(theirs, weight * keep), name  # the same mask, and what stays is as it was, bit for bit
        gone = (theirs == 0).sum(1)
        part = AMOUNTS[amount]
        expected = weight.shape[1] * part.sparsity if isinstance(part, Pattern) else int(weight.shape[1] * part)
        assert (gone == expected).all(), name


@pytest.mark.parametrize("amount", AMOUNTS)
def test_sparsegpt_takes_the_same_weights_and_makes_up_for_them(peer: dict[str, Found], amount: str) -> None:
    """Both factorize in float32, one H and one its inverse. Of the 4 · 393,216 weights here two part, in one row of
    2:4: in float64 the costs of the two are 5e-7 from each other."""
    parted = rows = 0
    for name, (weight, inputs, theirs) in peer[f"sparsegpt={amount}"].items():
        factor = factorize(inputs.T @ inputs, torch.arange(weight.shape[1]), 0.01)
        assert factor is not None
        ours, keep = prune_columns(weight, factor, AMOUNTS[amount])
        same = parts_only_at_ties(name, weight, inputs, theirs != 0, keep, AMOUNTS[amount])
        torch.testing.assert_close(ours[same], theirs[same], rtol=1e-5, atol=1e-5 * float(weight.abs().max()))
        parted, rows = parted + int((~same).sum()), rows + len(same)
    assert rows == 2 * (3 * 128 + 2 * 64 + 2 * 384)
    assert parted <= 2


def parts_only_at_ties(name: str, weight: Tensor, inputs: Tensor, theirs: Tensor, ours: Tensor, amount: Any) -> Tensor:
    """Rows in which both masks are the same. Where they part first, in others, stand weights with costs, in float64 and
    after what was pruned before, that are next to that of the first to stay; what follows there cannot be compared."""
    inputs = inputs.double()
    hessian = inputs.T @ inputs
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    moved, same = weight.double().clone(), torch.ones(len(weight), dtype=torch.bool)
    width = amount.of if isinstance(amount, Pattern) else BLOCK
    for start in range(0, weight.shape[1], width):
        part = slice(start, start + width)
        costs = (moved[:, part] / upper.diagonal()[part]).square()
        if isinstance(amount, Pattern):
            first = costs.sort(1).values[:, amount.pruned : amount.pruned + 1]
        else:
            first = costs.flatten().kthvalue(int(costs.numel() * amount) + 1).values
        differ = (theirs[:, part] != ours[:, part]) & same[:, None]
        assert ((costs / first - 1).abs()[differ] < TIE).all(), name
        same &= ~differ.any(1)
        for k in range(start, start + width):
            error = torch.where(theirs[:, k], 0, moved[:, k]) / upper[k, k]
            moved[:, k:] -= error[:, None] * upper[k, k:]
    return same
