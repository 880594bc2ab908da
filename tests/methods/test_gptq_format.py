"""Coded weights in GPTQ's format and in compressed-tensors': packed as planned, restored exactly, refused if broken."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from quantkit.methods import METHODS
from quantkit.methods.base import Method, WeightSpec
from quantkit.methods.gptq import Gptq, Rtn
from quantkit.methods.gptq_format import Grouped
from quantkit.solvers.coded import Coded

BITS = (2, 3, 4, 8)
DTYPES = {"I32": np.int32, "F16": np.float16, "I64": np.int64}
MODULE = "model.layers.0.mlp.up_proj"


def method(bits: int) -> Method[Any]:
    return METHODS["gptq", bits]


def random_coded(bits: int, rows: int, columns: int, params: Grouped, seed: int = 0) -> Coded:
    """Any codes that a solver may give: scales of both signs, groups in any order if they follow the activations."""
    rng = np.random.default_rng(seed)
    size = columns if params.group_size == -1 else int(params.group_size or 0)
    groups = columns // size
    codes = rng.integers(0, 2**bits, (rows, columns), np.uint8)
    scales = rng.normal(0, 0.1, (rows, groups)).astype(np.float16)
    least = 0 if params.checkpoint_format == "gptq_v2" or params.format != "gptq" else 1
    zeros = rng.integers(least, 2**bits, (rows, groups), np.uint8)
    if params.sym:
        zeros[:] = 2 ** (bits - 1)
    g_idx = (np.arange(columns) // size).astype(np.int32)
    return Coded(bits, codes, scales, zeros, rng.permutation(g_idx) if params.acting else g_idx)


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, Gptq, WeightSpec, Coded]:
    bits = draw(st.sampled_from(BITS))
    table: dict[str, Any] = {"group_size": draw(st.sampled_from([-1, 32, 64, 128])), "sym": draw(st.booleans())}
    kind = draw(st.sampled_from(["v1", "v2", "acting", "compressed"]))
    table |= {
        "v1": {},
        "v2": {"checkpoint_format": "gptq_v2", "act_order": draw(st.sampled_from(["static", "group"]))},
        "acting": {"act_order": "group"},
        "compressed": {"format": "compressed-tensors"},
    }[kind]
    params = Gptq(**table)
    rows, columns = 32 * draw(st.integers(1, 3)), 128 * draw(st.integers(1, 2))
    spec = WeightSpec(MODULE, draw(st.sampled_from(["F16", "BF16", "F32"])), rows, columns)
    return bits, params, spec, random_coded(bits, rows, columns, params, draw(st.integers(0, 2**32)))


def stream(words: npt.NDArray[np.int32], bits: int) -> list[int]:
    """Slow and obvious: the words as one text of bits, cut into codes."""
    text = "".join(format(int(w) & 0xFFFFFFFF, "032b")[::-1] for w in words)
    return [int(text[i : i + bits][::-1], 2) for i in range(0, len(text), bits)]


def by_hand(bits: int, params: Grouped, tensors: dict[str, Any]) -> npt.NDArray[np.float32]:
    """What a reader makes of the tensors, by the rule of the format."""
    t = {name.rpartition(".")[2]: array for name, array in tensors.items()}
    if params.format == "gptq":
        codes = np.array([stream(column, bits) for column in t["qweight"].T])
        zeros = np.array([stream(row, bits) for row in t["qzeros"]]).T + (params.checkpoint_format == "gptq")
        scales, g_idx = t["scales"].T.astype(np.float32), t["g_idx"]
    else:  # signed numbers with 2^(b − 1) added
        codes = np.array([stream(row, bits) for row in t["weight_packed"]]) - 2 ** (bits - 1)
        scales = t["weight_scale"].astype(np.float32)
        zeros = np.zeros(scales.shape, np.int64)
        if not params.sym:
            zeros = np.array([stream(column, bits) for column in t["weight_zero_point"].T]).T - 2 ** (bits - 1)
        assert t["weight_shape"].tolist() == list(codes.shape)
        g_idx = np.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1])
    return ((codes - zeros[:, g_idx]) * scales[:, g_idx]).astype(np.float32)


@settings(deadline=None, max_examples=60)  # a first call compiles
@given(cases())
def test_packed_as_planned_and_restored(case: tuple[int, Gptq, WeightSpec, Coded]) -> None:
    bits, params, spec, coded = case
    planned = method(bits).outputs(spec, params)
    pack, unpack = method(bits).pack, method(bits).unpack
    assert pack is not None
    assert unpack is not None
    tensors = pack(coded, spec, params)
    assert list(tensors) == [s.name for s in planned]
    for s in planned:
        assert (tensors[s.name].dtype, tensors[s.name].shape) == (DTYPES[s.dtype], s.shape)
        assert tensors[s.name].flags.c_contiguous
        assert tensors[s.name].nbytes == s.nbytes
    back = unpack(tensors, spec, params)
    for name in ("codes", "scales", "zeros", "g_idx"):
        assert getattr(back, name).dtype == getattr(coded, name).dtype
        assert np.array_equal(getattr(back, name), getattr(coded, name)), name
    main, *companions = (s.name for s in planned)
    decoder = method(bits).decoder(spec, params, {name: tensors[name] for name in companions})
    restored = decoder.decode(tensors[main].reshape(-1).view(np.uint8), 0, spec.numel)
    assert restored.dtype == np.float32
    assert np.array_equal(restored, coded.restore().reshape(-1))
    assert np.array_equal(restored.reshape(spec.rows, spec.columns), by_hand(bits, params, tensors))


def test_compressed_tensors_are_the_same_codes_row_by_row() -> None:
    """Its words are those of qweight, turned: both are streams along the inputs."""
    spec = WeightSpec(MODULE, "F16", 32, 64)
    params = Rtn(group_size=32)
    coded = random_coded(3, 32, 64, params)
    gptq = METHODS["rtn", 3].pack(coded, spec, params)  # type: ignore[misc]
    other = METHODS["rtn", 3].pack(coded, spec, Rtn(group_size=32, format="compressed-tensors"))  # type: ignore[misc]
    assert np.array_equal(gptq[f"{MODULE}.qweight"].T, other[f"{MODULE}.weight_packed"])
    assert np.array_equal(gptq[f"{MODULE}.scales"].T, other[f"{MODULE}.weight_scale"])


# --- what is refused --------------------------------------------------------------------------------------------------


def test_version_1_has_no_zero_point_of_0() -> None:
    spec = WeightSpec(MODULE, "F16", 32, 64)
    v1, v2 = Rtn(group_size=32, sym=False), Rtn(group_size=32, sym=False, checkpoint_format="gptq_v2")
    for bits in BITS:
        pack, unpack = METHODS["rtn", bits].pack, METHODS["rtn", bits].unpack
        assert pack is not None
        assert unpack is not None
        coded = random_coded(bits, 32, 64, v1)
        coded.zeros[7, 1] = 0
        with pytest.raises(ValueError, match="cannot say a zero point of 0"):
            pack(coded, spec, v1)
        tensors = pack(coded, spec, v2)
        assert unpack(tensors, spec, v2).zeros[7, 1] == 0
        coded.zeros[7, 1] = 2**bits - 1  # stored as it is, and read as version 1: 2^b, which wraps to 0 in some readers
        with pytest.raises(ValueError, match="a zero point is 0"):
            unpack(pack(coded, spec, v2), spec, v1)


def unpacked_after(params: Grouped, change: Callable[[dict[str, Any]], None]) -> None:
    spec = WeightSpec("m.0", "BF16", 32, 128)
    chosen = method(4)
    assert chosen.pack is not None
    tensors = chosen.pack(random_coded(4, 32, 128, params), spec, params)
    change(tensors)
    main, *companions = (s.name for s in chosen.outputs(spec, params))
    raw = tensors[main].reshape(-1).view(np.uint8)
    chosen.decoder(spec, params, {name: tensors[name] for name in companions}).decode(raw, 0, spec.numel)


def put(name: str, index: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors[f"m.0.{name}"].__setitem__(index, value)


def become(name: str, make: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.__setitem__(f"m.0.{name}", make(tensors[f"m.0.{name}"]))


NATURAL, ACTING = Gptq(group_size=64), Gptq(group_size=64, act_order="group")
COMPRESSED = Gptq(group_size=64, sym=False, format="compressed-tensors")


@pytest.mark.parametrize(("params", "change", "words"), [
    (NATURAL, put("g_idx", 5, 2), "beyond the 2 there are"),
    (NATURAL, put("g_idx", 5, -1), "beyond the 2 there are"),
    (NATURAL, put("g_idx", [0, 127], [1, 0]), "not the natural order"),
    (ACTING, put("g_idx", slice(0, 65), 0), "not of 64 inputs"),
    (ACTING, put("g_idx", 0, 7), "beyond the 2 there are"),
    (NATURAL, put("scales", (1, 3), np.inf), "scale is not finite"),
    (NATURAL, put("scales", (1, 3), np.nan), "scale is not finite"),
    (NATURAL, put("qzeros", (0, 0), 0x77777778), "not the middle"),
    (NATURAL, become("scales", lambda x: x[:1]), r"scales is float16 \[1, 32\], the weight makes it F16 \[2, 32\]"),
    (NATURAL, become("scales", lambda x: x.astype(np.int16)), "scales is int16"),
    (NATURAL, become("qzeros", lambda x: x.T), "qzeros is"),
    (NATURAL, become("g_idx", lambda x: x[:-1]), "g_idx is"),
    (NATURAL, become("g_idx", lambda x: x.astype(np.int64)), "g_idx is int64"),
    (COMPRESSED, put("weight_shape", 0, 64), "weight_shape says"),
    (COMPRESSED, put("weight_shape", slice(None), [128, 32]), "weight_shape says"),
    (COMPRESSED, put("weight_scale", (0, 0), np.nan), "scale is not finite"),
    (COMPRESSED, become("weight_zero_point", lambda x: x[:-1]), "weight_zero_point is"),
])  # fmt: skip
def test_companions_that_contradict(params: Gptq, change: Callable[[dict[str, Any]], None], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        unpacked_after(params, change)


def test_wider_scales_are_read() -> None:
    """We write none; other programs do (in bf16 or fp32), and quantkit reads their folders."""
    unpacked_after(NATURAL, become("scales", lambda x: x.astype(np.float32)))


def test_what_does_not_fit_the_parameters_is_not_packed() -> None:
    """A solver that did something else than the parameters say would be believed by no reader."""
    spec, pack = WeightSpec(MODULE, "F16", 32, 128), method(4).pack
    assert pack is not None
    for format_ in ("gptq", "compressed-tensors"):
        natural = Gptq(group_size=64, format=format_)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="natural order"):
            pack(random_coded(4, 32, 128, ACTING), spec, natural)
        with pytest.raises(ValueError, match="not the middle"):
            pack(random_coded(4, 32, 128, Gptq(group_size=64, sym=False)), spec, natural)


# --- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "words"), [
    (lambda: Gptq(act_order="group", format="compressed-tensors"), "act_order group needs g_idx"),
    (lambda: Rtn(checkpoint_format="gptq_v2", format="compressed-tensors"), "has one version"),
    (lambda: Gptq(group_size=16), "group_size"),
    (lambda: Gptq(damp=0.0), "damp"),
    (lambda: Rtn(act_order="none"), "act_order"),
])  # fmt: skip
def test_combinations_that_are_none(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        make()


def test_one_group_a_row_has_no_order() -> None:
    """desc_act would change nothing there, and so is not said."""
    assert not Gptq(group_size=-1, act_order="group").acting
    assert Gptq(group_size=32, act_order="group").acting
    assert not Gptq(group_size=32).acting
    Gptq(group_size=-1, act_order="group", format="compressed-tensors")


@pytest.mark.parametrize(("widths", "chosen"), [
    ([128, 256], 128), ([128, 192], 64), ([96, 128], 32), ([576, 1536], 64), ([100, 256], 128), ([100], 128),
])  # fmt: skip
def test_the_group_size_is_the_largest_that_fits(widths: list[int], chosen: int) -> None:
    specs = [WeightSpec(f"h.0.{w}", "F16", 64, w) for w in widths]
    assert method(4).resolve(Gptq(), specs).group_size == chosen
    assert method(4).resolve(Gptq(group_size=-1), specs).group_size == -1


def test_what_stays_dense_has_no_say_in_the_group_size() -> None:
    specs = [WeightSpec("h.0.a", "F16", 64, 256), WeightSpec("h.0.gate", "F16", 1, 96)]
    assert method(4).resolve(Gptq(), specs).group_size == 128


@pytest.mark.parametrize(("spec", "params", "words"), [
    (WeightSpec("h.0.a", "F16", 64, 100), Rtn(), "has 100 inputs, which 32 does not divide"),
    (WeightSpec("h.0.a", "F16", 1, 128), Rtn(), "has 1 outputs, which 32 does not divide"),
    (WeightSpec("h.0.a", "F16", 64, 96), Rtn(group_size=64), "which the group size 64 does not divide"),
    (WeightSpec("model.decoder.project_in", "F16", 64, 128), Rtn(group_size=64), "outside the decoder layers"),
])  # fmt: skip
def test_weights_that_stay_dense(spec: WeightSpec, params: Rtn, words: str) -> None:
    assert words in str(METHODS["rtn", 4].refuses(spec, params))


def test_weights_that_are_packed() -> None:
    refuses = METHODS["rtn", 4].refuses
    assert refuses(WeightSpec("h.0.a", "F16", 64, 96), Rtn(group_size=-1)) is None
    assert refuses(WeightSpec("h.0.a", "F16", 64, 96), Rtn(group_size=32)) is None
    outside = Rtn(group_size=64, format="compressed-tensors")
    assert refuses(WeightSpec("model.decoder.project_in", "F16", 64, 128), outside) is None


def test_planning_imports_neither_torch_nor_numba() -> None:
    code = (
        "import sys\n"
        "from quantkit.measurement import allocated\n"
        "from quantkit.methods import METHODS\n"
        "from quantkit.methods.base import Selection, WeightSpec\n"
        "spec, selection = WeightSpec('h.0.a', 'F16', 256, 256), Selection(('h.0.a',), (), ())\n"
        "for method in METHODS.values():\n"
        "    params = method.resolve(method.params(), [spec])\n"
        "    mixing = method.mixing\n"
        "    params = params if mixing is None else allocated(mixing, params, [spec], None)[0]\n"
        "    method.outputs(spec, params), method.granule(spec), method.refuses(spec, params)\n"
        "    method.config(params, 'F16', selection), method.describe(params), method.reader_notes(selection, params)\n"
        "assert not {'torch', 'numba'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
