"""FP8 (E4M3, the finite variant) to bfloat16, by table: 256 codes, and a scale for a tensor or for each row."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def _values() -> npt.NDArray[np.float32]:
    """What the 256 codes mean: sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities, 0x7F is NaN."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6))
    magnitude[code & 127 == 127] = np.nan
    return np.where(code < 128, magnitude, -magnitude).astype(np.float32)


def bf16_table(scales: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """[scales, 256] bfloat16 bit patterns of value · scale: the product in fp32, rounded half to even."""
    with np.errstate(invalid="ignore", over="ignore"):
        bits = (_values()[None] * scales.reshape(-1, 1).astype(np.float32)).view(np.uint32)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)


def to_bf16(codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32], first_row: int, columns: int) -> Array:
    """codes: whole rows from `first_row` on, flat. `scales` is one number, or one for every row of the tensor."""
    if scales.size == 1:
        found: Array = bf16_table(scales)[0][codes]
        return found
    rows = codes.reshape(-1, columns)
    out = np.empty(rows.shape, np.uint16)
    table = bf16_table(scales.reshape(-1)[first_row : first_row + len(rows)])
    for line, row, values in zip(table, rows, out, strict=True):  # all at once would widen every code to 8 bytes
        values[:] = line[row]
    return out.reshape(-1)
