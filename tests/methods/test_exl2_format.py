"""The bytes of EXL2: golden vectors of the format's description, a slow decoder of its own, and every width."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import exl2 as oracle

from quantkit.kernels.bitstream import pack_columns, pack_rows, unpack_rows
from quantkit.methods import exl2_format
from quantkit.methods.base import WeightSpec
from quantkit.methods.exl2 import OPTIONS
from quantkit.methods.exl2_format import Mix
from quantkit.solvers import exl2
from quantkit.solvers.exl2_coded import Exl2Coded, Groups, real_scales

# One column of 32 rows with code[r] = (7r + 3) mod 2^b.
GOLDEN = {
    2: "1b1b1b1b 1b1b1b1b",
    3: "53977053 70539770 97705397",
    4: "4d6f81a3 c5e7092b 4d6f81a3 c5e7092b",
    5: "4dfc4543 78245ba3 0753617d 4b276cf4 e55c7066",
    6: "9f611283 90bbd2d9 b2579740 8f201eb3 9cab91d5 71538703",
    8: "18110a03 342d261f 5049423b 6c655e57 88817a73 a49d968f c0b9b2ab dcd5cec7",
}


@pytest.mark.parametrize("bits", GOLDEN)
def test_codes_lie_as_the_format_says(bits: int) -> None:
    codes = ((7 * np.arange(32) + 3) % 2**bits).astype(np.uint8)[:, None]
    words = pack_rows(codes, bits)
    assert " ".join(f"{w & 0xFFFFFFFF:08x}" for w in words[:, 0].tolist()) == GOLDEN[bits]
    assert np.array_equal(unpack_rows(words, bits), codes)


def test_scales_lie_as_the_format_says() -> None:
    packed = pack_columns(np.array([[0, 15, 1, 14, 2, 13, 3, 12]], np.uint8), 4)
    assert packed.view(np.uint32).tolist() == [[0xC3D2E1F0]]


def test_scales_are_rounded_as_kernels_round_them() -> None:
    maximum = np.array([0.0133], np.float16)
    assert float(real_scales(np.array([[15]], np.uint8), maximum)[0, 0]) == pytest.approx(0.013305664, rel=1e-7)
    for nibble, code, expected in ((15, 15, 0.093139648), (15, 0, -0.106445313), (7, 9, 0.003326416)):
        groups = Groups((4,), (32,))
        coded = Exl2Coded(
            groups, np.full((1, 32), code, np.uint8), np.array([[nibble]], np.uint8), maximum,
            np.arange(32, dtype=np.int32),
        )  # fmt: skip
        assert coded.restore()[0, 0] == pytest.approx(expected, rel=1e-6)


def test_groups_are_counted_as_the_format_counts_them() -> None:
    groups = Mix.parse("0.05:8_32/0.1:4_128/0.85:3_128").groups(11008)
    assert [groups.bits.count(b) for b in (8, 4, 3)] == [18, 9, 73]
    assert groups.rows[-1] == 64
    assert groups.words[-1] == 1158
    assert sum(groups.rows) == 11008


# Bits per weight of exllamav2's own tables, for the shapes they are given for.
@pytest.mark.parametrize(("mix", "shape", "bits"), [
    ("0.3:4_32/0.7:2_32", (32000, 4096), 2.735), ("0.15:4_32/0.85:3_32", (32000, 4096), 3.282),
    ("0.15:8_128/0.85:6_128", (32000, 4096), 6.345), ("8_128", (32000, 4096), 8.032), ("8_128", (4096, 4096), 8.039),
])  # fmt: skip
def test_costs_are_those_of_the_tables(mix: str, shape: tuple[int, int], bits: float) -> None:
    spec = WeightSpec("a", "F16", *shape)
    assert Mix.parse(mix).cost(spec) / spec.numel == pytest.approx(bits, abs=6e-4)


def coded(mix: Mix, rows: int, columns: int, seed: int) -> Exl2Coded:
    rng = np.random.default_rng(seed)
    groups = mix.groups(columns)
    position = rng.permutation(columns).astype(np.int32)
    whole = Exl2Coded(
        groups, np.zeros((rows, columns), np.uint8), rng.integers(0, 16, (rows, len(groups.bits)), np.uint8),
        rng.uniform(1e-4, 0.2, len(groups.bits)).astype(np.float16), position,
    )  # fmt: skip
    most = np.array([2**b for b in groups.bits])[whole.group]
    codes = rng.integers(0, most, (rows, columns)).astype(np.uint8)
    return Exl2Coded(groups, codes, whole.scales, whole.maxima, position)


mixes = st.sampled_from([*OPTIONS, "2_32", "3_32", "5_32", "6_64", "0.2:8_32/0.3:6_32/0.2:4_32/0.3:3_32"])


@given(mixes, st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_every_mix_comes_back(text: str, rows: int, columns: int, seed: int) -> None:
    mix, spec = Mix.parse(text), WeightSpec("a", "F16", 32 * rows, 32 * columns)
    before = coded(mix, spec.rows, spec.columns, seed)
    tensors = exl2_format.pack(before, spec, mix)
    for planned in exl2_format.outputs(spec, mix):
        assert tensors[planned.name].shape == planned.shape
        assert tensors[planned.name].nbytes == planned.nbytes
    after = exl2_format.unpack(tensors, spec, mix)
    for key in ("codes", "scales", "maxima", "position"):
        assert np.array_equal(getattr(before, key), getattr(after, key))


@pytest.mark.parametrize("text", ["0.1:4_32/0.9:3_32", "0.25:6_32/0.25:4_32/0.5:2_32", "5_64", "8_128"])
def test_restoring_is_what_the_slow_decoder_finds(text: str) -> None:
    mix, spec = Mix.parse(text), WeightSpec("a", "F16", 32, 128)
    made = coded(mix, spec.rows, spec.columns, 7)
    tensors = {name.removeprefix("a."): x for name, x in exl2_format.pack(made, spec, mix).items()}
    assert np.array_equal(oracle.decode(tensors), made.restore())


def changed(tensors: dict[str, Any], name: str, place: Any, value: Any) -> dict[str, Any]:
    other = {**tensors, name: tensors[name].copy()}
    other[name][place] = value
    return other


def test_what_a_loader_would_take_for_another_weight_is_refused() -> None:
    mix, spec = Mix.parse("0.25:4_32/0.75:3_32"), WeightSpec("a", "F16", 32, 128)
    tensors = exl2_format.pack(coded(mix, 32, 128, 1), spec, mix)
    for name, place, value, words in (
        ("a.q_invperm", 0, tensors["a.q_invperm"][1], "no permutation"),
        ("a.q_invperm", 0, 500, "no permutation"),
        ("a.q_scale_max", 1, np.nan, "not positive, or not finite"),
        ("a.q_scale_max", 0, 0, "not positive, or not finite"),
        ("a.q_groups", 0, 3, "q_groups"),
        ("a.q_groups", 3, 5, "q_groups"),
    ):
        with pytest.raises(ValueError, match=words):
            exl2_format.unpack(changed(tensors, name, place, value), spec, mix)
    with pytest.raises(ValueError, match="the weight makes it"):
        exl2_format.unpack({**tensors, "a.q_weight": tensors["a.q_weight"][:-1]}, spec, mix)


@pytest.mark.parametrize("text", ["", "7_64", "4_16", "0.5:4_64", "0.5:3_64/0.5:4_64", "0.5:4_64/0.5:4_32", "4_64/x"])
def test_what_is_no_mix_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="mix of bits"):
        Mix.parse(text)


def layer(rows: int, columns: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    x = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x *= torch.rand(columns, generator=generator) + 0.1
    return weight, x.T @ x


def loss(weight: torch.Tensor, restored: npt.NDArray[np.float32], hessian: torch.Tensor) -> float:
    error = weight - torch.from_numpy(restored)
    return float(((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum())


@pytest.mark.parametrize("text", ["0.1:3_64/0.9:2_64", "0.1:4_128/0.9:3_128", "4_32", "0.1:6_32/0.9:5_32", "8_128"])
def test_solving_beats_rounding_and_says_what_it_loses(text: str) -> None:
    weight, hessian = layer(96, 256, 3)
    groups = Mix.parse(text).groups(256)
    solver = exl2.Exl2Solver(lambda *_: groups, exl2.Work(), 0.03)
    solved = solver.solve("a", weight, hessian, target=None, keep=None, factor=solver.factor(hessian))
    found = loss(weight, solved.coded.restore(), hessian)
    nearest = loss(weight, solver.nearest("a", weight, hessian).restore(), hessian)
    assert solved.report.loss == pytest.approx(found, rel=0.02)
    assert found < 0.8 * nearest
    plain = exl2.solve(weight, hessian, groups, solver.factor(hessian), work=exl2.Work(0, 0))
    assert solved.report.loss is not None
    assert plain.report.loss is not None
    assert solved.report.loss <= plain.report.loss
    # The most active inputs are in the widest groups.
    active = hessian.diagonal().numpy()
    widths = np.array(groups.bits)[solved.coded.group]
    assert all(active[widths == b].min() >= active[widths < b].max(initial=0) for b in set(groups.bits))


# As round-to-nearest of Gaussian groups has it, by width: ‖W − Ŵ‖ / ‖W‖.
@pytest.mark.parametrize(("bits", "error"), [(2, 0.416), (3, 0.213), (4, 0.108), (5, 0.055), (6, 0.027), (8, 0.007)])
def test_rounding_is_as_good_as_it_can_be_expected_to_be(bits: int, error: float) -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(bits)) * 0.05
    made = exl2.nearest(weight, Mix.parse(f"{bits}_128").groups(512), torch.arange(512)).restore()
    assert float(np.linalg.norm(weight.numpy() - made) / weight.norm()) < 1.05 * error


def test_a_mask_is_kept() -> None:
    weight, hessian = layer(64, 128, 5)
    keep = torch.rand(64, 128, generator=torch.Generator().manual_seed(1)) > 0.5
    solver = exl2.Exl2Solver(lambda *_: Mix.parse("0.25:4_32/0.75:3_32").groups(128), exl2.Work(), 0.03)
    for factor in (solver.factor(hessian), None):
        solved = solver.solve("a", weight, hessian, target=None, keep=keep, factor=factor)
        assert (solved.coded.restore()[~keep.numpy()] == 0).all()


def test_rows_of_zeros_and_tiny_weights_do_no_harm() -> None:
    weight, hessian = layer(64, 128, 6)
    weight[3], weight[5], weight[:, 7] = 0, 1e-9, 0
    hessian[9], hessian[:, 9] = 0, 0
    solver = exl2.Exl2Solver(lambda *_: Mix.parse("4_32").groups(128), exl2.Work(), 0.03)
    restored = solver.solve("a", weight, hessian, target=None, keep=None, factor=solver.factor(hessian)).coded.restore()
    assert np.isfinite(restored).all()
    assert (restored[3] == 0).all()
    whole = solver.nearest("a", torch.zeros(64, 128), hessian).restore()
    assert (whole == 0).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_threads_makes_the_same(threads: int) -> None:
    before = torch.get_num_threads()
    weight, hessian = layer(160, 192, 8)
    solver = exl2.Exl2Solver(lambda *_: Mix.parse("0.25:4_32/0.75:3_32").groups(192), exl2.Work(), 0.03)
    found = []
    try:
        for count in (threads, 3):
            torch.set_num_threads(count)
            made = solver.solve("a", weight, hessian, target=None, keep=None, factor=solver.factor(hessian)).coded
            found.append((made.codes, made.scales, made.maxima))
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
