"""The Triton kernels give the codes and errors of the Numba kernels, bit for bit.

On a machine with a GPU as they are compiled; without one in Triton's interpreter, which must be asked for before the
kernels are imported, so that the same tests run once more in a process of their own. What a GPU would get is compiled
and looked at in either case. Triton is no dependency: where it is missing, all but the last test are skipped.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantkit.kernels import columns, columns_triton, descent

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
Arrays = dict[str, Any]

# The interpreter computes in numpy, which warns of what is infinite or no number, as is meant here; and an older one
# counts by arrays of one number.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

runs = pytest.mark.skipif(
    columns_triton.triton is None or (DEVICE == "cpu" and not INTERPRETED), reason="neither a GPU nor the interpreter"
)
triton = pytest.mark.skipif(columns_triton.triton is None, reason="no Triton")
# Rows, width, first column. Blocks narrower than a whole one, one column, rows that fill no tile, or some exactly.
SHAPES = [(21, 37, 0), (8, 128, 128), (13, 128, 5), (1, 1, 3), (17, 1, 0), (3, 2, 40), (9, 127, 1)]
AFTER = 6  # columns behind the block


def grid(rows: int, n: int, random: np.random.Generator) -> Arrays:
    """Columns in groups that are no runs, bits of their own, scales of both signs; zeros within every top."""
    return {
        "group": random.integers(0, 5, n).astype(np.int32),
        "top": random.choice([3, 7, 15, 255], n).astype(np.float32),
        "scales": (random.uniform(0.05, 0.5, (rows, 5)) * random.choice([1, 1, 1, -1], (rows, 5))).astype(np.float32),
        "zeros": random.integers(0, 4, (rows, 5)).astype(np.float32),
        "keep": random.random((rows, n)) < 0.7,
        "codes": np.full((rows, n), 99, np.uint8),
    }


def sprinkle(values: np.ndarray[Any, Any], random: np.random.Generator) -> None:
    """Numbers that are none, or hardly fit."""
    for odd in (np.nan, np.inf, -np.inf, 1e30, -1e30, -0.0, 1e-42):
        values[random.random(values.shape) < 0.01] = odd


def rounding(rows: int, width: int, first: int, seed: int = 0) -> Arrays:
    random = np.random.default_rng(seed)
    n = first + width + AFTER
    case = grid(rows, n, random)
    case["column"] = random.permutation(n)
    case["shifted"] = random.normal(0, 2, (rows, n)).astype(np.float32)
    ties = random.random((rows, n)) < 0.2
    halves = (random.integers(-8, 8, (rows, n)) + np.float32(0.5)) * case["scales"][:, case["group"]]
    case["shifted"][ties] = halves[ties]
    sprinkle(case["shifted"], random)
    case["target"] = random.normal(0, 2, (rows, width)).astype(np.float32)
    # What the factor has on and above its diagonal is not to be read.
    lower = np.tril(random.normal(0, 0.3, (width, width)), -1) + np.triu(np.full((width, width), np.nan))
    case["lower"] = lower.astype(np.float32)
    case["errors"] = np.full((rows, width), 7, np.float32)
    return case


def descending(rows: int, width: int, first: int, seed: int = 0, beside: float = 0.2) -> Arrays:
    random = np.random.default_rng(seed)
    n = first + width + AFTER
    case = grid(rows, n, random)
    case["codes"] = random.integers(0, case["top"].astype(np.int64) + 1, (rows, n)).astype(np.uint8)
    case["errors"] = random.normal(0, 0.3, (rows, n)).astype(np.float32)
    half = random.normal(0, beside, (width, width))
    curvature = (half + half.T).astype(np.float32)
    bend = random.uniform(0.5, 2, width).astype(np.float32)
    bend[random.random(width) < 0.1] = 0
    bend[random.random(width) < 0.1] *= -1
    np.fill_diagonal(curvature, bend)
    case["curvature"] = curvature
    # Steps of a few codes and, if nothing is beside, many that win just enough or not quite.
    steps = random.normal(0, 2, (rows, width))
    near = random.random((rows, width)) < 0.3
    steps[near] = (random.choice([-0.5, 0.5], (rows, width)) * random.uniform(0.999, 1.002, (rows, width)))[near]
    scales = case["scales"][:, case["group"][first : first + width]]
    case["gradient"] = (steps * scales * np.abs(bend)).astype(np.float32)
    sprinkle(case["gradient"], random)
    return case


def numba_round(case: Arrays, first: int, masked: bool) -> Arrays:
    case = {name: value.copy() for name, value in case.items()}
    by_position = case["group"][case["column"]], case["top"][case["column"]]
    read = (case["shifted"], case["target"], case["lower"], first, case["column"], *by_position)
    columns.round_block(*read, case["scales"], case["zeros"], masked, case["keep"], case["codes"], case["errors"])
    return case


def numba_descend(case: Arrays, first: int, masked: bool) -> Arrays:
    case = {name: value.copy() for name, value in case.items()}
    read = (case["gradient"], case["curvature"], first, case["group"], case["top"], case["scales"], case["zeros"])
    descent.descend_block(*read, masked, case["keep"], case["codes"], case["errors"])
    return case


def tensors(case: Arrays, apart: int) -> Arrays:
    """On the device; of matrices the rows `apart` numbers further apart than they are long."""
    found = {}
    for name, value in case.items():
        wide = np.zeros((*value.shape[:-1], value.shape[-1] + apart), value.dtype)
        wide[..., : value.shape[-1]] = value
        found[name] = torch.from_numpy(wide).to(DEVICE)[..., : value.shape[-1]]
    return found


def triton_round(case: Arrays, first: int, masked: bool, apart: int = 0) -> Arrays:
    t = tensors(case, apart)
    read = (t["shifted"], t["target"], t["lower"], first, t["column"], t["group"][t["column"]], t["top"][t["column"]])
    keep = t["keep"] if masked else None
    columns_triton.round_block(*read, t["scales"], t["zeros"], keep, t["codes"], t["errors"])
    return {name: value.cpu().numpy() for name, value in t.items()}


def triton_descend(case: Arrays, first: int, masked: bool, apart: int = 0) -> Arrays:
    t = tensors(case, apart)
    read = (t["gradient"], t["curvature"], first, t["group"], t["top"], t["scales"], t["zeros"])
    columns_triton.descend_block(*read, t["keep"] if masked else None, t["codes"], t["errors"])
    return {name: value.cpu().numpy() for name, value in t.items()}


def assert_same(found: Arrays, expected: Arrays) -> None:
    np.testing.assert_array_equal(found["codes"], expected["codes"])
    np.testing.assert_array_equal(found["errors"], expected["errors"])


@runs
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "width", "first"), SHAPES)
def test_round_block_is_the_twin(rows: int, width: int, first: int, masked: bool) -> None:
    case = rounding(rows, width, first)
    expected = numba_round(case, first, masked)
    assert len(np.unique(expected["codes"])) > 2 or width == 1
    assert_same(triton_round(case, first, masked), expected)


@runs
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "width", "first"), SHAPES)
def test_descend_block_is_the_twin(rows: int, width: int, first: int, masked: bool) -> None:
    case = descending(rows, width, first)
    expected = numba_descend(case, first, masked)
    assert width == 1 or (expected["codes"] != case["codes"]).any()
    assert_same(triton_descend(case, first, masked), expected)


@runs
@pytest.mark.parametrize("seed", range(3))
def test_a_step_that_hardly_wins_as_the_twin(seed: int) -> None:
    case = descending(40, 60, 4, seed, beside=0)
    assert_same(triton_descend(case, 4, masked=False), numba_descend(case, 4, masked=False))


@runs
def test_rows_that_lie_apart_as_the_twin() -> None:
    case = rounding(11, 33, 7)
    assert_same(triton_round(case, 7, True, apart=9), numba_round(case, 7, True))
    case = descending(11, 33, 7)
    assert_same(triton_descend(case, 7, True, apart=9), numba_descend(case, 7, True))


@triton
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="they run here")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "twin"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted" in done.stdout:
        pytest.skip("Triton's interpreter is too old for this numpy")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout), done.stdout
    assert "skipped" not in done.stdout, done.stdout


def test_columns_of_rows_that_are_not_side_by_side_are_refused() -> None:
    case = tensors(rounding(4, 4, 0), 0)
    case["codes"] = case["codes"].t()
    grid = (case[name] for name in ("column", "group", "top", "scales", "zeros", "keep", "codes", "errors"))
    with pytest.raises(AssertionError, match="side by side"):
        columns_triton.round_block(case["shifted"], case["target"], case["lower"], 0, *grid)


POINTERS = {"column": "*i64", "group": "*i32", "keep": "*i1", "codes": "*u8"}  # the others are float32


@triton
@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["_round_tile", "_descend_tile"])
def test_compiles_for_a_hopper_gpu(name: str, masked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No register is spilled, as many programs fit as are counted on, and nothing is fused or flushed to zero."""
    knobs = pytest.importorskip("triton.knobs", reason="a Triton that does not tell where its tools are")
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    try:
        subprocess.run([knobs.nvidia.ptxas.path, "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("Triton's assembler does not run here")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(columns_triton, name)
    fixed = {"tile": columns_triton.TILE, "block": columns_triton.BLOCK, "win": columns_triton.WIN}
    fixed = {name: value for name, value in fixed.items() if name in kernel.arg_names}
    fixed |= {} if masked else {"keep": None}
    signature = {n: "i32" if n in columns_triton.NUMBERS else POINTERS.get(n, "*fp32") for n in kernel.arg_names}
    source = ASTSource(kernel, signature | dict.fromkeys(fixed, "constexpr"), fixed)
    made = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options=columns_triton.OPTIONS)
    assert "div.rn.f32" in made.asm["ptx"]
    assert not re.search(r"\bfma\.|\.ftz", made.asm["ptx"])
    (tmp_path / "kernel.cubin").write_bytes(made.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", tmp_path / "kernel.cubin"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    assert used["STACK"] == used["LOCAL"] == 0, said
    assert used["REG"] <= 128, said


def test_nothing_is_usable_in_ram() -> None:
    assert not columns_triton.usable(torch.ones(2, 2))


@triton
@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="Triton works here")
def test_what_triton_cannot_use_is_said_once_and_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that looks as if it had a GPU, and Triton finds that it has not."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    works = columns_triton._works.__wrapped__
    with pytest.warns(UserWarning, match="Triton cannot be used, solving will be slow"):
        assert not works(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not works(torch.device("cpu"))


@triton
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_usable_on_a_gpu() -> None:
    assert columns_triton.usable(torch.ones(2, 2, device=DEVICE))
