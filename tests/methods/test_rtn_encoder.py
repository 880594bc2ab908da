"""The encoder that rounds to nearest: the solver's result, packed, whatever the number of rows at a time."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch

from quantkit.methods import METHODS, gptq
from quantkit.methods.base import WeightSpec, apply
from quantkit.methods.gptq import Rtn
from quantkit.solvers.grids import Grid, rtn

ROWS, COLUMNS = 96, 128
STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def weight(dtype: str, rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).mul_(0.05).to(STORED[dtype])


def bits_of(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.view(torch.uint32 if tensor.dtype == torch.float32 else torch.uint16).numpy()


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize(("bits", "options"), [
    (2, {}), (3, {"sym": False}), (4, {}), (8, {"group_size": -1}), (3, {"format": "compressed-tensors"}),
    (4, {"format": "compressed-tensors", "sym": False}),
])  # fmt: skip
def test_is_the_solvers_result(monkeypatch: pytest.MonkeyPatch, dtype: str, bits: int, options: dict[str, Any]) -> None:
    method, params = METHODS["rtn", bits], Rtn(**{"group_size": 32, **options})
    spec, w = WeightSpec("m.0", dtype, ROWS, COLUMNS), weight(dtype)
    coded = rtn(w.float(), Grid(bits, params.group_size or 0, params.sym))
    assert method.pack is not None
    wanted = method.pack(coded, spec, params)
    for chunk in (1 << 20, 1):  # all rows at once, and 32 at a time
        monkeypatch.setattr(gptq, "CHUNK", chunk)
        found, report = apply(method, bits_of(w), spec, params)
        assert {s.name: s.shape for s in method.outputs(spec, params)} == {n: x.shape for n, x in found.items()}
        for name, array in wanted.items():
            assert np.array_equal(found[name], array), name
        error, norm = (float((x.double() ** 2).sum()) for x in (w - torch.from_numpy(coded.restore()), w))
        assert report.squared_error == pytest.approx(error, rel=1e-5)
        assert report.squared_norm == pytest.approx(norm, rel=1e-5)


def test_zeros_stay_zeros() -> None:
    method, params, spec = METHODS["rtn", 4], Rtn(group_size=32), WeightSpec("m.0", "F16", 32, 64)
    found, report = apply(method, np.zeros((32, 64), np.uint16), spec, params)
    assert (found["m.0.qweight"].view(np.uint32) == 0x88888888).all()
    assert report.squared_error == report.squared_norm == 0


def test_memory_is_that_of_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the weight and what is made of it, some rows: what the plan of a run reckons with. (numpy's memory, which
    holds all that is as large as the weight.)"""
    monkeypatch.setattr(gptq, "CHUNK", 1 << 15)
    method, params, spec = METHODS["rtn", 4], Rtn(group_size=128), WeightSpec("m.0", "BF16", 1024, 1024)
    x = bits_of(weight("BF16", 1024, 1024))
    made = sum(s.nbytes for s in method.outputs(spec, params))
    apply(method, bits_of(weight("BF16", 32, 128)), WeightSpec("m.0", "BF16", 32, 128), params)  # compiles
    tracemalloc.start()
    try:
        apply(method, x, spec, params)
        assert tracemalloc.get_traced_memory()[1] < made + (1 << 20)
    finally:
        tracemalloc.stop()
