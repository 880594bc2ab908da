"""The 4-bit kernels and method: equal, bit for bit, to the oracle and to bitsandbytes on a CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import bnb as oracle

from quantkit.errors import SourceError
from quantkit.kernels import bnb4, bnb4_torch
from quantkit.kernels.floats import BITS_DTYPE
from quantkit.methods import METHODS
from quantkit.methods.base import WeightSpec, apply
from quantkit.methods.bnb_4bit import round_to

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANT_TYPES = ("nf4", "fp4")
METHOD = METHODS["bnb", 4]
# Rows and columns: blocks that fit rows, blocks across rows, a partial last block, odd sizes, less than one block, a
# partial block of maxima.
SHAPES = [(1, 1), (1, 2), (3, 21), (1, 63), (1, 65), (5, 64), (7, 96), (33, 65), (17, 64), (13, 131), (48, 130),
          (300, 64)]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """torch adds up in another order on two threads; and an odd shape must not start a compiler."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.set_num_threads(before)


def bits_of(weight: torch.Tensor) -> np.ndarray[Any, Any]:
    """A copy of a tensor's bit patterns, of its shape."""
    return weight.view(torch.uint32 if weight.dtype == torch.float32 else torch.uint16).numpy().copy()


def spec_of(weight: torch.Tensor) -> WeightSpec:
    dtype = next(name for name, t in DTYPES.items() if t == weight.dtype)
    return WeightSpec("m", dtype, *weight.shape)


def params_of(quant_type: str, double: bool = False) -> Any:
    return METHOD.params(quant_type=quant_type, double_quant=double)


def weights(shape: tuple[int, ...], dtype: str, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Normal numbers, every seventh 0, the second block of 64 all zeros where there is one."""
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    largest = torch.finfo(DTYPES[dtype]).max
    weight = numbers.clamp(-largest, largest).to(DTYPES[dtype])
    weight.view(-1)[::7] = 0
    weight.view(-1)[64:128] = 0
    return weight


def restore(tensors: dict[str, Any], spec: WeightSpec, params: Any) -> np.ndarray[Any, Any]:
    raw = tensors["m.weight"].reshape(-1)
    return METHOD.decoder(spec, params, tensors).decode(raw, 0, spec.numel).reshape(spec.rows, spec.columns)


def bnb_restored(packed: torch.Tensor, state: Any) -> np.ndarray[Any, Any]:
    """bitsandbytes' own, asked for one long row: for columns that 16 divides and 64 does not, its AVX-512 code takes
    the scales of the wrong blocks from the second row on (0.50.2)."""
    shape, state.shape = state.shape, (1, int(np.prod(state.shape)))
    values = bnb.dequantize_4bit(packed, state).float().numpy().reshape(shape)
    state.shape = shape
    return values


def assert_same_as_peers(weight: torch.Tensor, quant_type: str, double: bool) -> None:
    """Bytes, maxima, nested maxima, offset and decoded values: ours, the oracle's and bitsandbytes'."""
    spec, params = spec_of(weight), params_of(quant_type, double)
    tensors, _ = apply(METHOD, bits_of(weight), spec, params)
    theirs, state = bnb.quantize_4bit(weight, quant_type=quant_type, compress_statistics=double)
    packed, absmax = oracle.encode_4bit(oracle.widen(bits_of(weight), spec.dtype), quant_type)
    assert tensors["m.weight"].tobytes() == theirs.numpy().tobytes() == packed.tobytes()
    assert tensors["m.weight.absmax"].tobytes() == state.absmax.numpy().tobytes()
    if double:
        offset = state.offset.numpy()
        codes, nested = oracle.encode_absmax(absmax, offset)
        assert tensors["m.weight.absmax"].tobytes() == codes.tobytes()
        assert tensors["m.weight.nested_absmax"].tobytes() == state.state2.absmax.numpy().tobytes() == nested.tobytes()
        assert bnb4.mean(absmax) == offset
        absmax = oracle.decode_absmax(codes, nested, offset)
    else:
        assert tensors["m.weight.absmax"].tobytes() == absmax.tobytes()
    values = restore(tensors, spec, params)
    expected = oracle.round_to(oracle.decode_4bit(packed, absmax, quant_type, weight.numel()), spec.dtype)
    assert values.tobytes() == expected.tobytes()
    theirs_restored = bnb_restored(theirs, state)
    if spec.dtype == "BF16":  # the processor's own conversion to bfloat16 flushes subnormals
        flushed = (np.abs(values) < np.finfo(np.float32).tiny) & (theirs_restored == 0)
        values = np.where(flushed, 0, values)
    np.testing.assert_array_equal(values, theirs_restored)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, int], dtype: str, quant_type: str, double: bool) -> None:
    if double and shape == (300, 64) and quant_type == "fp4":
        shape = (257, 64)
    assert_same_as_peers(weights(shape, dtype, 0.05), quant_type, double)


# Sums of maxima near the largest float32 overflow: see test_too_large_for_double_quantization.
SCALES = [("F32", 1e36), ("F32", 1e-30), ("F32", 1e-37), ("F32", 1e-41), ("F32", 1e-45), ("BF16", 1e36),
          ("BF16", 1e-20), ("BF16", 3e-38), ("BF16", 1e-40), ("F16", 1e4), ("F16", 1e-4), ("F16", 1e-7)]  # fmt: skip


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_scales(dtype: str, scale: float, quant_type: str, double: bool) -> None:
    """Huge, tiny and subnormal; also a block of one magnitude, and maxima that are all the same."""
    weight = weights((13, 71), dtype, scale)
    weight.view(-1)[128:192] = weight.abs().max()
    assert_same_as_peers(weight, quant_type, double)
    assert_same_as_peers(torch.full((6, 64), scale, dtype=DTYPES[dtype]), quant_type, double)


FINITE = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_finite_bits(dtype: str, data: st.DataObject) -> None:
    """Any bit patterns, extreme and subnormal ones among them, in one row of any length."""
    sign = 1 << (31 if dtype == "F32" else 15)
    magnitudes = st.integers(0, FINITE[dtype] - 1)
    # A few patterns repeated: a list of hundreds of independent draws is slow and no better.
    some = data.draw(st.lists(st.builds(lambda m, s: m | s, magnitudes, st.sampled_from([0, sign])), min_size=1))
    bits = np.resize(np.array(some, BITS_DTYPE[dtype]), data.draw(st.integers(1, 200)))
    weight = torch.from_numpy(bits.copy()).view(DTYPES[dtype]).view(1, -1)
    assert_same_as_peers(weight, data.draw(st.sampled_from(QUANT_TYPES)), double=False)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_ties_go_to_the_lower_code(quant_type: str) -> None:
    """Weights on the thresholds, and the float32 next to them on either side."""
    middles = np.array(oracle.ladder(quant_type)[1])
    near = [middles, np.nextafter(middles, np.float32(1)), np.nextafter(middles, np.float32(-1))]
    block = np.zeros(64, np.float32)
    block[0], block[1:46] = 1, np.concatenate(near)
    assert_same_as_peers(torch.from_numpy(block).view(1, 64), quant_type, False)


@pytest.mark.parametrize("size", [64, 63])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_weights_that_scale_to_next_to_a_threshold(quant_type: str, size: int) -> None:
    """Where a product with the reciprocal (whole blocks) and a quotient (partial ones) give different codes."""
    middles = np.array(oracle.ladder(quant_type)[1])
    differ = 0
    for top in np.random.default_rng(0).uniform(0.01, 1, 40).astype(np.float32):
        near = middles * top
        block = np.zeros(size, np.float32)
        block[:46] = [top, *near, *np.nextafter(near, np.float32(1)), *np.nextafter(near, np.float32(-1))]
        assert_same_as_peers(torch.from_numpy(block).view(1, size), quant_type, False)
        scaled = block / top, block * (np.float32(1) / top)
        differ += any(
            oracle.code_of(a, quant_type) != oracle.code_of(b, quant_type) for a, b in zip(*scaled, strict=True)
        )
    assert differ > 10


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_every_bfloat16_against_one_maximum(quant_type: str) -> None:
    """All 65,280 finite bf16 patterns, 63 to a block, below the largest of them."""
    magnitudes = np.sort(np.arange(0x7F80, dtype=np.uint16))
    values = np.concatenate([magnitudes, magnitudes | 0x8000])
    values = np.resize(values, -(-values.size // 63) * 63).reshape(-1, 63)
    top = (values & 0x7FFF).max(axis=1, keepdims=True)
    for step in (0, 0x60):  # the block's own maximum, and one three quarters of an octave above it
        bits = np.concatenate([np.minimum(top + step, 0x7F7F).astype(np.uint16), values], axis=1)
        weight = torch.from_numpy(bits).view(torch.bfloat16)
        packed, state = bnb.quantize_4bit(weight, quant_type=quant_type)
        tensors, _ = apply(METHOD, bits, spec_of(weight), params_of(quant_type))
        assert tensors["m.weight"].tobytes() == packed.numpy().tobytes()
        assert tensors["m.weight.absmax"].tobytes() == state.absmax.numpy().tobytes()


def test_zero_blocks_stay_zero_under_double_quantization() -> None:
    weight = weights((20, 64), "BF16")
    weight[3:5] = 0
    tensors, _ = apply(METHOD, bits_of(weight), spec_of(weight), params_of("nf4", True))
    assert set(tensors["m.weight"].reshape(20, 32)[3:5].flat) == {0x77}
    hat = bnb4.decode_absmax(
        tensors["m.weight.absmax"], tensors["m.weight.nested_quant_map"], tensors["m.weight.nested_absmax"], 0.0
    )
    assert hat[3] != 0  # so only the codes can make it zero
    assert not restore(tensors, spec_of(weight), params_of("nf4", True))[3:5].any()


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_too_large_for_double_quantization(dtype: str) -> None:
    weight = torch.full((4, 64), 3e38, dtype=DTYPES[dtype])
    with pytest.raises(SourceError, match=r"m\.weight holds 3.*e\+38") as caught:
        apply(METHOD, bits_of(weight), spec_of(weight), params_of("nf4", True))
    assert "--no-double-quant" in caught.value.hint
    assert_same_as_peers(weight, "nf4", False)


# --- the mean, and the maxima in 8 bits -------------------------------------------------------------------------------

SIZES = [*range(1, 70), 127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096,
         4097, 5000, 8191, 8193, 16383, 16385, 32767, 32768, 32769, 65535, 65537, 100_001, 131_073, 262_145, 917_504,
         1_000_003]  # fmt: skip


def test_mean_is_torchs_on_one_thread() -> None:
    for size in SIZES:
        x = np.abs(np.random.default_rng(size).standard_normal(size)).astype(np.float32)
        assert bnb4.mean(x) == torch.from_numpy(x).mean().numpy(), size


def test_mean_of_a_giant() -> None:
    """From 2^24 maxima on, torch sums longer runs before it carries."""
    for top in (1, 2):
        x = np.linspace(0, top, 20_000_001, dtype=np.float32)
        assert bnb4.mean(x) == torch.from_numpy(x).mean().numpy()


@given(size=st.integers(1, 300_000), seed=st.integers(0, 9), exponent=st.integers(-40, 30))
@settings(max_examples=60, deadline=None)
def test_mean_of_any_size(size: int, seed: int, exponent: int) -> None:
    x = (np.random.default_rng(seed).random(size) * 10.0**exponent).astype(np.float32)
    mean = bnb4.mean(x)
    assert mean == torch.from_numpy(x).mean().numpy()
    assert float(mean) == pytest.approx(x.astype(np.float64).mean(), rel=1e-5, abs=2e-45)


@pytest.mark.parametrize("scale", [1e35, 1.0, 0.05, 1e-30, 1e-38, 1e-40, 5e-45])
@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 600])
def test_encode_absmax(size: int, scale: float) -> None:
    random = np.random.default_rng(size)
    cases = {
        "random": random.random(size) * scale,
        "constant": np.full(size, scale),
        "one of them": np.r_[scale, np.zeros(size - 1)],
        "skewed": scale * 10.0 ** -random.uniform(0, 8, size),
        "symmetric": scale * (np.arange(size) % 3),  # some equal to their mean
    }
    for name, numbers in cases.items():
        absmax = numbers.astype(np.float32)
        codes, nested, offset = bnb4.encode_absmax(absmax)
        mean = torch.from_numpy(absmax).mean()
        theirs, state = bnb.quantize_blockwise(torch.from_numpy(absmax) - mean, blocksize=256)
        assert offset == mean.numpy(), name
        assert codes.tobytes() == theirs.numpy().tobytes(), name
        assert nested.tobytes() == state.absmax.numpy().tobytes(), name
        restored = bnb4.decode_absmax(codes, oracle.dynamic_map(), nested, float(offset))
        assert restored.tobytes() == (bnb.dequantize_blockwise(theirs, state) + mean).numpy().tobytes(), name
        slow_codes, slow_nested = oracle.encode_absmax(absmax, offset)
        assert (codes.tobytes(), nested.tobytes()) == (slow_codes.tobytes(), slow_nested.tobytes()), name
        assert restored.tobytes() == oracle.decode_absmax(codes, nested, offset).tobytes(), name


def test_every_bin_of_the_dynamic_map() -> None:
    """All 65,536 bins, one residual each, next to a maximum of 1: their codes are bitsandbytes'."""
    values = np.linspace(-1, 1, 65536).astype(np.float32)
    values = np.concatenate([values, np.nextafter(values, np.float32(2)), np.nextafter(values, np.float32(-2))])
    padded = np.resize(values, -(-values.size // 254) * 254).reshape(-1, 254)
    ends = np.ones((len(padded), 1), np.float32)
    residual = np.clip(np.concatenate([ends, padded, -ends], axis=1).reshape(-1), -1, 1)
    # encode_absmax subtracts the mean: hand over numbers of which it is next to nothing.
    residual = np.concatenate([residual, -residual])
    codes, nested, offset = bnb4.encode_absmax(residual)
    theirs, state = bnb.quantize_blockwise(torch.from_numpy(residual) - float(offset), blocksize=256)
    assert abs(offset) < 1e-7
    assert codes.tobytes() == theirs.numpy().tobytes()
    assert nested.tobytes() == state.absmax.numpy().tobytes()
    assert len(set(codes.tolist())) == 249  # seven entries next to 0 lie closer together than the bins


# --- the reported error -----------------------------------------------------------------------------------------------


def exact_error(weight: torch.Tensor, tensors: dict[str, Any], params: Any) -> tuple[float, float]:
    """Over all weights, restored in float32: (Σ(w − ŵ)², Σw²)."""
    absmax = tensors["m.weight.absmax"]
    if params.double_quant:
        state = bytes(tensors[f"m.weight.quant_state.bitsandbytes__{params.quant_type}"])
        offset = np.float32(json.loads(state)["nested_offset"])
        absmax = oracle.decode_absmax(absmax, tensors["m.weight.nested_absmax"], offset)
    restored = oracle.decode_4bit(tensors["m.weight"], absmax, params.quant_type, weight.numel())
    return oracle.squared_error(weight.float().numpy(), restored)


@pytest.mark.parametrize("scale", [1e30, 1.0, 1e-25])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("size", [64, 41])
def test_error_of_one_block_is_exact(size: int, quant_type: str, double: bool, scale: float) -> None:
    """One block, whole or partial, is always sampled. No size of weights makes the figure overflow or vanish."""
    weight = weights((1, size), "BF16", scale)
    tensors, report = apply(METHOD, bits_of(weight), spec_of(weight), params_of(quant_type, double))
    error, norm = exact_error(weight, tensors, params_of(quant_type, double))
    assert report.squared_error == pytest.approx(error, rel=1e-4)
    assert report.squared_norm == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_error_sums_of_sampled_blocks(quant_type: str, double: bool) -> None:
    """Exactly the blocks 0, 16, 32, …, with the maxima as they are restored: the others may be anything."""
    weight = weights((33, 64), "F32")
    tensors, report = apply(METHOD, bits_of(weight), spec_of(weight), params_of(quant_type, double))
    restored = restore(tensors, spec_of(weight), params_of(quant_type, double))
    error, norm = oracle.squared_error(weight.numpy()[::16], restored[::16])
    assert (report.squared_error, report.squared_norm) == (
        pytest.approx(error, rel=1e-5),
        pytest.approx(norm, rel=1e-6),
    )
    weight[1:16] *= 1 if double else 100
    assert apply(METHOD, bits_of(weight), spec_of(weight), params_of(quant_type, double))[1] == report


@pytest.mark.parametrize(("blocks", "sampled"), [(5, [0]), (15, [0]), (16, [0, 16]), (17, [0, 16])])
def test_partial_block_is_sampled_in_its_turn(blocks: int, sampled: list[int]) -> None:
    """The partial block counts where it is a 16th one, and takes no other's place where it is not."""
    weight = torch.randn(1, blocks * 64 + 10, generator=torch.Generator().manual_seed(0))
    weight[0, -10:] *= 50
    tensors, report = apply(METHOD, bits_of(weight), spec_of(weight), params_of("nf4"))
    restored = restore(tensors, spec_of(weight), params_of("nf4"))
    chosen = np.isin(np.arange(weight.numel()) // 64, sampled)
    error, norm = oracle.squared_error(weight.numpy()[0, chosen], restored[0, chosen])
    assert report.squared_error == pytest.approx(error, rel=1e-5)
    assert report.squared_norm == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_to_the_output_dtype(dtype: str) -> None:
    """At every finite bfloat16 and the float32 around it: half way between two, and next to that."""
    upper = np.concatenate([np.arange(0x7F7F, dtype=np.uint32), np.arange(0x8000, 0xFF7F, dtype=np.uint32)]) << 16
    values = (upper[:, None] | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)).reshape(-1).view(np.float32)
    values = values[np.abs(values) < 65504] if dtype == "F16" else values
    assert round_to(values, dtype).tobytes() == torch.from_numpy(values).to(DTYPES[dtype]).float().numpy().tobytes()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_sampled_error_estimates_the_whole(quant_type: str, double: bool) -> None:
    """256 of 4,096 blocks of 64: the estimate of the relative error lies within three percent."""
    weight = weights((512, 512), "BF16", 0.02)
    weight[:, ::5] *= 3
    tensors, report = apply(METHOD, bits_of(weight), spec_of(weight), params_of(quant_type, double))
    error, norm = exact_error(weight, tensors, params_of(quant_type, double))
    assert report.relative_error == pytest.approx((error / norm) ** 0.5, rel=0.03)
    assert 0.05 < report.relative_error < 0.2


# --- slabs ------------------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_slabs_of_any_size_in_any_order(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(64, 64), (129, 65), (37, 131), (16, 65), (1, 1025)]))
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    params = params_of(data.draw(st.sampled_from(QUANT_TYPES)), data.draw(st.booleans()))
    weight = weights(shape, dtype)
    spec, bits = spec_of(weight), bits_of(weight).reshape(-1)
    granule = METHOD.granule(spec)
    whole, report = apply(METHOD, bits, spec, params)
    inner = range(granule, spec.numel, granule)
    cuts = sorted(data.draw(st.sets(st.sampled_from(inner)))) if inner else []
    slabs = data.draw(st.permutations(list(zip([0, *cuts], [*cuts, spec.numel], strict=True))))
    encoder = METHOD.encoder(spec, params, "cpu")
    main = np.zeros(whole["m.weight"].size, np.uint8)
    for start, end in slabs:
        run = encoder.encode(bits[start:end], start)
        offset = encoder.main_offset(start)
        main[offset : offset + run.size] = run
    companions, slab_report = encoder.finish()
    assert slab_report == report
    for name, tensor in {"m.weight": main, **companions}.items():
        assert tensor.tobytes() == whole[name].tobytes(), name
    decoder = METHOD.decoder(spec, params, companions)
    expected = restore(whole, spec, params).reshape(-1)
    for start, end in slabs:
        part = main[start // 2 : -(-end // 2)]
        assert decoder.decode(part, start, end - start).tobytes() == expected[start:end].tobytes()


# --- on a GPU, through bitsandbytes -----------------------------------------------------------------------------------


def encode_with(kernel: Any, weight: torch.Tensor, quant_type: str, **options: Any) -> tuple[Any, Any, Any]:
    blocks = weight.numel() // 64
    packed, absmax = np.empty(blocks * 32, np.uint8), np.empty(blocks, np.float32)
    sums = np.empty((-(-blocks // 16), 3))
    kernel(bits_of(weight).reshape(-1), spec_of(weight).dtype, quant_type, packed, absmax, sums, **options)
    return packed, absmax, sums


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 16, 17, 200])
def test_torch_twin_on_cpu(rows: int, dtype: str, quant_type: str) -> None:
    weight = weights((rows, 64), dtype, 0.05)
    packed, absmax, sums = encode_with(bnb4.encode_blocks, weight, quant_type)
    others = encode_with(bnb4_torch.encode_blocks, weight, quant_type, device="cpu")
    assert (packed.tobytes(), absmax.tobytes()) == (others[0].tobytes(), others[1].tobytes())
    np.testing.assert_allclose(others[2], sums, rtol=1e-5)


@pytest.mark.parametrize(("quant_type", "byte"), [("nf4", 0x77), ("fp4", 0x00)])
def test_torch_twin_mends_the_zero_blocks_of_cuda(monkeypatch: pytest.MonkeyPatch, quant_type: str, byte: int) -> None:
    """CUDA kernels divide 0 by 0 there and write code 0, which is -1 in nf4: played here, on a CPU."""

    def as_on_cuda(weights: torch.Tensor, **options: Any) -> tuple[torch.Tensor, Any]:
        codes, state = bnb.quantize_4bit(weights, **options)
        codes.view(-1, 32)[state.absmax == 0] = 0
        return codes, state

    monkeypatch.setattr(bnb4_torch, "quantize_4bit", as_on_cuda)
    packed, _, _ = encode_with(bnb4_torch.encode_blocks, weights((20, 64), "BF16"), quant_type, device="cpu")
    assert set(packed.reshape(-1, 32)[1]) == {byte}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_twin_on_cuda(dtype: str, quant_type: str) -> None:
    """Not the same bytes, but few nibbles apart and no worse; zero blocks as on a CPU."""
    weight = weights((8192, 128), dtype, 0.05)
    packed, absmax, sums = encode_with(bnb4.encode_blocks, weight, quant_type)
    others = encode_with(bnb4_torch.encode_blocks, weight, quant_type, device="cuda")
    assert others[1].tobytes() == absmax.tobytes()
    assert set(others[0].reshape(-1, 32)[1]) == {0x77 if quant_type == "nf4" else 0x00}
    values = [bnb4.decode_blocks(p, quant_type, absmax, weight.numel()) for p in (packed, others[0])]
    # As values: both zeros of fp4 are one. A nibble apart is a weight that lies on a threshold.
    assert np.count_nonzero(values[0] != values[1]) < 1e-4 * weight.numel()
    flat = weight.float().numpy().reshape(-1)
    errors = [oracle.squared_error(flat, v)[0] for v in values]
    assert errors[1] == pytest.approx(errors[0], rel=1e-4)
    np.testing.assert_allclose(others[2], sums, rtol=1e-3, atol=1e-3)


# --- pruned weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", ["isolated", "blocks", "2:4", "all of them", "all but one"])
def test_pruned_weights_stay_zero(pattern: str, dtype: str, quant_type: str, double: bool) -> None:
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(3)).to(DTYPES[dtype])
    pruned = torch.zeros(weight.shape, dtype=torch.bool)
    match pattern:
        case "isolated":
            pruned.view(-1)[::13] = True
        case "blocks":
            pruned.view(-1, 64)[::3] = True
        case "2:4":
            magnitude = weight.float().abs().view(-1, 4)
            pruned = torch.zeros_like(magnitude, dtype=torch.bool).scatter(1, magnitude.topk(2, largest=False)[1], True)
            pruned = pruned.view(weight.shape)
        case _:
            pruned[:] = True
            pruned[5, 7] = pattern == "all of them"
    weight[pruned] = 0
    tensors, _ = apply(METHOD, bits_of(weight), spec_of(weight), params_of(quant_type, double))
    restored = restore(tensors, spec_of(weight), params_of(quant_type, double))
    assert not restored[pruned.numpy()].any()
    assert restored.any() == (pattern != "all of them")
    state = bnb.QuantState.from_dict(
        {k.removeprefix("m.weight."): torch.from_numpy(v.copy()) for k, v in tensors.items() if k != "m.weight"}, "cpu"
    )
    assert not bnb_restored(torch.from_numpy(tensors["m.weight"]), state)[pruned.numpy()].any()
