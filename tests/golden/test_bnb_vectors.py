"""Literal bytes and numbers of bitsandbytes 0.50.2 on a CPU. Nothing here is computed by bitsandbytes or an oracle."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from quantkit.kernels import bnb4, bnb4_tables
from quantkit.methods import METHODS
from quantkit.methods.base import WeightSpec, apply

NF4_TABLE = [
    "-1.0", "-0.6961928009986877", "-0.5250730514526367", "-0.39491748809814453", "-0.28444138169288635",
    "-0.18477343022823334", "-0.09105003625154495", "0.0", "0.07958029955625534", "0.16093020141124725",
    "0.24611230194568634", "0.33791524171829224", "0.44070982933044434", "0.5626170039176941", "0.7229568362236023",
    "1.0",
]  # fmt: skip
# Hard-wired in the CUDA kernels.
NF4_THRESHOLDS = [
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
    -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
    0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
]  # fmt: skip
# Magnitude above which each code is chosen; between 0 and the first, code 0.
FP4_THRESHOLDS = [(0.00260417, 1), (0.0859375, 6), (0.20833333, 7), (0.29166667, 4), (0.4166667, 5), (0.583333, 2),
                  (0.8333333, 3)]  # fmt: skip


def encode(values: np.ndarray, quant_type: str) -> tuple[bytes, list[float]]:
    packed, absmax = np.empty(values.size // 2, np.uint8), np.empty(values.size // 64, np.float32)
    sums = np.empty((-(-absmax.size // 16), 3))
    bnb4.encode_blocks(values.astype(np.float32).view(np.uint32), "F32", quant_type, packed, absmax, sums)
    return packed.tobytes(), absmax.tolist()


def test_nf4_table() -> None:
    assert [str(float(v)) for v in bnb4_tables.TABLES["nf4"]] == NF4_TABLE


def test_nf4_thresholds() -> None:
    assert bnb4_tables.thresholds("nf4").tolist() == [float(np.float32(t)) for t in NF4_THRESHOLDS]


def test_fp4_table() -> None:
    positive = [0, 0.0052083335, 0.6666667, 1, 0.33333334, 0.5, 0.16666667, 0.25]
    expected = np.array([*positive, *(-v for v in positive)], np.float32)
    assert bnb4_tables.TABLES["fp4"].tobytes() == expected.tobytes()  # codes 0 and 8 are both +0.0
    assert bnb4_tables.ORDERS["fp4"].tolist() == [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3]


@pytest.mark.parametrize("sign", [1, -1])
def test_fp4_thresholds(sign: int) -> None:
    for i, (threshold, code) in enumerate(FP4_THRESHOLDS):
        below = FP4_THRESHOLDS[i - 1][1] if i else (8 if sign > 0 else 0)  # of the zeros, 8 lies above 0: so sorted
        block = np.zeros(64)
        block[:4] = [1, sign * threshold * 0.9999, sign * threshold * 1.0001, 0]
        packed, _ = encode(block, "fp4")
        signed = [c | 8 if sign < 0 and c else c for c in (below, code)]
        assert [packed[0] & 15, packed[1] >> 4] == signed, threshold


def test_dynamic_map() -> None:
    table = bnb4_tables.dynamic_map()
    assert hashlib.sha256(table.tobytes()).hexdigest().startswith("e732639a65f497b4")
    assert (table.dtype, table.shape, table[0], table[-1]) == (np.float32, (256,), np.float32(-0.992968738), 1)
    assert np.count_nonzero(table == 0) == 1
    assert np.abs(table[table != 0]).min() == np.float32(5.5000004e-07)


@pytest.mark.parametrize(
    ("quant_type", "expected"),
    [
        ("nf4", "000001111111122222333344455566677788999aaabbbccccddddeeeeeeeffff"),
        ("fp4", "bbbbbbaaaaaaaadddddccccfffeeee9901166667774444555552222222233333"),
    ],
)
def test_one_block(quant_type: str, expected: str) -> None:
    packed, absmax = encode((np.arange(64) - 32) / 64, quant_type)
    assert packed.hex() == expected
    assert absmax == [0.5]


@pytest.mark.parametrize(("quant_type", "byte"), [("nf4", 0x77), ("fp4", 0x00)])
def test_block_of_zeros(quant_type: str, byte: int) -> None:
    """With double quantization its maximum is not restored as 0, so the codes must be those of 0."""
    assert encode(np.zeros(64), quant_type) == (bytes([byte] * 32), [0.0])


def test_double_quantization() -> None:
    weight = np.zeros((300, 64), np.float32)
    weight[:, 0] = [(k % 97 + 1) / 128 for k in range(300)]
    spec, method = WeightSpec("m", "F32", 300, 64), METHODS["bnb", 4]
    params = method.params(quant_type="nf4", double_quant=True)
    tensors, _ = apply(method, weight.view(np.uint32), spec, params)
    assert bytes(tensors["m.weight"].reshape(-1)[:4]).hex() == "f7777777"
    codes = tensors["m.weight.absmax"]
    assert codes[:16].tolist() == [3, 5, 6, 8, 9, 11, 12, 13, 15, 16, 18, 19, 21, 22, 23, 25]
    assert codes[256:264].tolist() == [205, 207, 208, 210, 211, 213, 214, 216]
    assert hashlib.sha256(codes.tobytes()).hexdigest().startswith("5b20453658f6f3fb")
    assert tensors["m.weight.nested_absmax"].tolist() == [0.3853124976158142, 0.3853124976158142]
    assert bytes(tensors["m.weight.quant_state.bitsandbytes__nf4"]).rstrip(b" ") == (
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [300, 64], "nested_blocksize": 256, '
        b'"nested_dtype": "float32", "nested_offset": 0.3725000023841858}'
    )
    assert bnb4.mean(np.abs(weight).max(axis=1)) == np.float32(0.3725000023841858)


def test_quant_state_without_double_quantization() -> None:
    spec, method = WeightSpec("m", "BF16", 64, 128), METHODS["bnb", 4]
    params = method.params(quant_type="fp4", double_quant=False)
    tensors, _ = apply(method, np.zeros((64, 128), np.uint16), spec, params)
    blob = bytes(tensors["m.weight.quant_state.bitsandbytes__fp4"])
    assert blob == b'{"quant_type": "fp4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 128]}'
    assert json.loads(blob)


def test_int8() -> None:
    weight = ((np.arange(32).reshape(2, 16) - 16) / 10).astype(np.float16)
    method = METHODS["bnb", 8]
    tensors, _ = apply(method, weight.view(np.uint16), WeightSpec("m", "F16", 2, 16), method.params())
    assert tensors["m.SCB"].tolist() == [1.599609375, 1.5]
    assert tensors["m.weight"].tolist() == [
        [-127, -119, -111, -103, -95, -87, -79, -71, -64, -56, -48, -40, -32, -24, -16, -8],
        [0, 8, 17, 25, 34, 42, 51, 59, 68, 76, 85, 93, 102, 110, 119, 127],
    ]
    assert (tensors["m.weight_format"].dtype, tensors["m.weight_format"].shape) == (np.uint8, ())
    assert tensors["m.weight_format"] == 0
