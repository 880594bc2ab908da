"""The LLM.int8() kernels and method: equal, bit for bit, to the oracle and to bitsandbytes on a CPU."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import bnb as oracle

from quantkit.errors import SourceError
from quantkit.kernels.floats import BITS_DTYPE
from quantkit.methods import METHODS
from quantkit.methods.base import WeightSpec, apply

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
METHOD = METHODS["bnb", 8]
PARAMS = METHOD.params()


def bits_of(weight: torch.Tensor) -> np.ndarray[Any, Any]:
    return weight.view(torch.uint32 if weight.dtype == torch.float32 else torch.uint16).numpy().copy()


def spec_of(weight: torch.Tensor) -> WeightSpec:
    dtype = next(name for name, t in DTYPES.items() if t == weight.dtype)
    return WeightSpec("m", dtype, *weight.shape)


def weights(rows: int, columns: int, dtype: str, scale: float = 1.0) -> torch.Tensor:
    numbers = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows), dtype=torch.float64) * scale
    weight = numbers.clamp(-65000, 65000).to(DTYPES[dtype])
    weight.view(-1)[::7] = 0
    weight[rows // 2] = 0  # a row of nothing has no scale
    return weight


def assert_same_as_peers(weight: torch.Tensor) -> None:
    tensors, _ = apply(METHOD, bits_of(weight), spec_of(weight), PARAMS)
    theirs, scale, _ = bnb.int8_vectorwise_quant(weight.half())
    codes, slow_scale = oracle.encode_int8(oracle.widen(bits_of(weight), spec_of(weight).dtype))
    assert tensors["m.weight"].tobytes() == theirs.numpy().tobytes() == codes.tobytes()
    assert tensors["m.SCB"].tobytes() == scale.numpy().tobytes() == slow_scale.tobytes()
    raw = tensors["m.weight"].reshape(-1).view(np.uint8)
    restored = METHOD.decoder(spec_of(weight), PARAMS, tensors).decode(raw, 0, weight.numel()).reshape(weight.shape)
    assert restored.tobytes() == oracle.decode_int8(codes, slow_scale).tobytes()
    # bitsandbytes multiplies with 1/127 rounded up to seven digits instead of dividing by 127.
    np.testing.assert_allclose(restored, bnb.int8_vectorwise_dequant(theirs, scale).numpy(), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 64, 131])
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 33])
def test_shapes(rows: int, columns: int, dtype: str) -> None:
    assert_same_as_peers(weights(rows, columns, dtype, 0.05))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [6e4, 1e3, 1e-3, 6e-5, 1e-6, 6e-8, 2e-8, 1e-30, 1e-40])
def test_scales(dtype: str, scale: float) -> None:
    """From the largest float16 down to what it rounds to zero."""
    assert_same_as_peers(weights(20, 37, dtype, scale))


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_bits_within_float16(dtype: str, data: st.DataObject) -> None:
    most = {"F32": 0x477FEFFF, "BF16": 0x477F, "F16": 0x7BFF}[dtype]  # the last that round to no more than 65504
    sign = 1 << (31 if dtype == "F32" else 15)
    patterns = st.builds(lambda m, s: m | s, st.integers(0, most), st.sampled_from([0, sign]))
    some = data.draw(st.lists(patterns, min_size=1))
    rows = data.draw(st.integers(1, 5))
    bits = np.resize(np.array(some, BITS_DTYPE[dtype]), (rows, data.draw(st.integers(1, 40))))
    assert_same_as_peers(torch.from_numpy(bits.copy()).view(DTYPES[dtype]))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounding_to_float16(sign: float) -> None:
    """Every float16 boundary: the middles between neighbours and the float32 on either side, 64 to a row of their own
    magnitude, so that an error of one float16 step changes codes or scale."""
    values = np.arange(0x7BFF, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (values[:-1] + values[1:]) / 2
    near = [middles, np.nextafter(middles, np.float32(np.inf)), np.nextafter(middles, np.float32(0))]
    rows = np.sort(np.concatenate(near))[:, None] * np.float32(sign)  # one weight a row: its scale is the weight
    tensors, _ = apply(METHOD, rows.view(np.uint32), WeightSpec("m", "F32", *rows.shape), PARAMS)
    expected = np.abs(torch.from_numpy(rows).half().float().numpy()).reshape(-1)
    assert tensors["m.SCB"].tobytes() == expected.tobytes()
    np.testing.assert_array_equal(tensors["m.weight"].reshape(-1), np.where(expected > 0, sign * 127, 0))


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("value", [65520.0, 66000.0, -1e30, 3.38e38])
def test_beyond_float16(dtype: str, value: float) -> None:
    weight = torch.zeros(20, 8, dtype=DTYPES[dtype])
    weight[17, 3] = value
    with pytest.raises(SourceError, match="beyond the fp16") as caught:
        apply(METHOD, bits_of(weight), spec_of(weight), PARAMS)
    assert caught.value.where == "row 17"


def test_just_within_float16() -> None:
    weight = torch.zeros(2, 8)
    weight[1, 3] = float(np.nextafter(np.float32(65520), np.float32(0)))
    tensors, _ = apply(METHOD, bits_of(weight), spec_of(weight), PARAMS)
    assert tensors["m.SCB"].tolist() == [0, 65504]


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_error_sums_of_every_16th_row(rows: int) -> None:
    weight = weights(rows, 50, "F16")
    weight[rows // 2, :] = 1
    tensors, report = apply(METHOD, bits_of(weight), spec_of(weight), PARAMS)
    restored = oracle.decode_int8(tensors["m.weight"], tensors["m.SCB"])
    error, norm = oracle.squared_error(weight.float().numpy()[::16], restored[::16])
    assert (report.squared_error, report.squared_norm) == (
        pytest.approx(error, rel=1e-4),
        pytest.approx(norm, rel=1e-6),
    )


def test_sampled_error_estimates_the_whole() -> None:
    weight = torch.randn(1024, 256, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tensors, report = apply(METHOD, bits_of(weight), spec_of(weight), PARAMS)
    restored = tensors["m.weight"] * (tensors["m.SCB"][:, None] / 127)
    error, norm = oracle.squared_error(weight.float().numpy(), restored)
    assert report.relative_error == pytest.approx((error / norm) ** 0.5, rel=0.03)
    assert 0.003 < report.relative_error < 0.02


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_slabs_of_any_size_in_any_order(data: st.DataObject) -> None:
    rows, columns = data.draw(st.sampled_from([(64, 64), (129, 65), (37, 131), (16, 9), (15, 7), (49, 1)]))
    weight = weights(rows, columns, data.draw(st.sampled_from(list(DTYPES))))
    spec, bits = spec_of(weight), bits_of(weight).reshape(-1)
    whole, report = apply(METHOD, bits, spec, PARAMS)
    granule = METHOD.granule(spec)
    inner = range(granule, spec.numel, granule)
    cuts = sorted(data.draw(st.sets(st.sampled_from(inner)))) if inner else []
    slabs = data.draw(st.permutations(list(zip([0, *cuts], [*cuts, spec.numel], strict=True))))
    encoder = METHOD.encoder(spec, PARAMS, "cpu")
    main = np.zeros(spec.numel, np.int8)
    for start, end in slabs:
        run = encoder.encode(bits[start:end], start)
        offset = encoder.main_offset(start)
        main[offset : offset + run.size] = run
    companions, slab_report = encoder.finish()
    assert slab_report == report
    for name, tensor in {"m.weight": main, **companions}.items():
        assert tensor.tobytes() == whole[name].tobytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", ["isolated", "rows", "2:4"])
def test_pruned_weights_stay_zero(pattern: str, dtype: str) -> None:
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(3)).to(DTYPES[dtype])
    pruned = torch.zeros(weight.shape, dtype=torch.bool)
    match pattern:
        case "isolated":
            pruned.view(-1)[::13] = True
        case "rows":
            pruned[::3] = True
        case "2:4":
            pruned.view(-1, 4)[:, 1:3] = True
    weight[pruned] = 0
    tensors, _ = apply(METHOD, bits_of(weight), spec_of(weight), PARAMS)
    raw = tensors["m.weight"].reshape(-1).view(np.uint8)
    restored = METHOD.decoder(spec_of(weight), PARAMS, tensors).decode(raw, 0, weight.numel()).reshape(weight.shape)
    assert not restored[pruned.numpy()].any()
    assert restored.any()
