"""Literal bytes of other programs' packers, which were given the same codes, scales and zero points.

GPTQ: `QuantLinear.pack` of auto-gptq 0.7.1. compressed-tensors: `pack_to_int32` of 0.19. Nothing here is computed by
them or by an oracle.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from quantkit.methods import METHODS
from quantkit.methods.base import WeightSpec
from quantkit.methods.gptq import Rtn
from quantkit.solvers.coded import Coded

ROWS, COLUMNS, GROUP = 32, 64, 32
SPEC = WeightSpec("m.0", "F16", ROWS, COLUMNS)
SCALES, G_IDX, TURNED_SCALES = "b87ef712c3ca510b", "fe5ef84623360b7b", "d1aa1de496d64e5d"


def coded(bits: int, sym: bool) -> Coded:
    r, j, g = np.arange(ROWS)[:, None], np.arange(COLUMNS)[None], np.arange(COLUMNS // GROUP)[None]
    zeros = np.full((ROWS, COLUMNS // GROUP), 2 ** (bits - 1)) if sym else 1 + (r + g) % (2**bits - 1)
    codes = ((5 * r + 3 * j + r * j) % 2**bits).astype(np.uint8)
    scales = ((r + 1) * 2.0**-10 * (-1.0) ** g).astype(np.float16)
    return Coded(bits, codes, scales, zeros.astype(np.uint8), (np.arange(COLUMNS) // GROUP).astype(np.int32))


def packed(bits: int, **options: Any) -> dict[str, Any]:
    pack, params = METHODS["rtn", bits].pack, Rtn(group_size=GROUP, **options)
    assert pack is not None
    return {name.removeprefix("m.0."): array for name, array in pack(coded(bits, params.sym), SPEC, params).items()}


def digest(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(("bits", "qweight", "middle", "qzeros", "weight_packed", "weight_zero_point"), [
    (2, "313cbf39f5161d30", "b1bfaa407f70c80c", "8ef18033d7ae56aa", "5cf8135abf969e99", "ca3cd2160dab7993"),
    (3, "e6aa82308a8e7500", "482227252e0bdebc", "7a99026da95c1dc0", "8d688d8ceda28131", "b5029f3a9a21c190"),
    (4, "705d9df65b1aa4ed", "e29442e61ad354e5", "c066eb40af897f18", "c985f76994b0d182", "391716336cff2544"),
    (8, "1982a2fd6674d797", "e0205519f6bcde42", "0bc5e47a9635138c", "1decde50d37caef9", "13e625438952aeb8"),
])  # fmt: skip
def test_bytes_of_other_packers(
    bits: int, qweight: str, middle: str, qzeros: str, weight_packed: str, weight_zero_point: str
) -> None:
    found = {name: digest(array) for name, array in packed(bits).items()}
    assert found == {"qweight": qweight, "qzeros": middle, "scales": SCALES, "g_idx": G_IDX}
    found = {name: digest(array) for name, array in packed(bits, sym=False).items()}
    assert found == {"qweight": qweight, "qzeros": qzeros, "scales": SCALES, "g_idx": G_IDX}
    found = {name: digest(array) for name, array in packed(bits, sym=False, format="compressed-tensors").items()}
    shape = found.pop("weight_shape")
    assert found == {
        "weight_packed": weight_packed,
        "weight_scale": TURNED_SCALES,
        "weight_zero_point": weight_zero_point,
    }
    assert shape == digest(np.array([ROWS, COLUMNS], np.int64))


def test_words_of_4_bits() -> None:
    """The second output's codes are 5, 9, 13, 1, over and over; zero points 1, 2, 3 …, stored less one."""
    tensors = packed(4, sym=False)
    assert {hex(word) for word in tensors["qweight"].view(np.uint32)[:, 1].tolist()} == {"0x1d951d95"}
    first = [hex(word) for word in tensors["qzeros"].view(np.uint32)[1].tolist()]
    assert first == ["0x87654321", "0x10edcba9", "0x98765432", "0x210edcba"]


def test_words_of_3_bits() -> None:
    tensors = packed(3)
    words = [hex(word) for word in tensors["qweight"].view(np.uint32)[:3, 1].tolist()]
    assert words == ["0x4d34d34d", "0xd34d34d3", "0x34d34d34"]
    for version, zeros in (("gptq", [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D]),
                           ("gptq_v2", [0x24924924, 0x49249249, 0x92492492])):  # fmt: skip
        stored = packed(3, checkpoint_format=version)["qzeros"]
        assert stored.view(np.uint32).tolist() == [zeros] * 2
