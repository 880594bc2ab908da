"""What a solver gives and a format packs: integer codes on a grid of groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CHUNK = 1 << 20  # weights whose zero points and scales are spread out at a time


@dataclass(frozen=True)
class Coded:
    """A weight [rows = out_features, columns = in_features] as codes; ŵ = scale · (code − zero) of the column's group.

    codes: uint8 [rows, columns], 0 … 2**bits − 1, columns in their natural order.
    scales: float16 [rows, groups]; may be negative. zeros: uint8 [rows, groups].
    g_idx: int32 [columns], the group of each column; j // group_size unless groups follow the activation order.
    """

    bits: int
    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float16]
    zeros: npt.NDArray[np.uint8]
    g_idx: npt.NDArray[np.int32]

    def restore(self) -> npt.NDArray[np.float32]:
        """float32 [rows, columns]: exact, since a 16-bit scale times a code of 8 bits fits into 24."""
        restored = self.codes.astype(np.float32)
        zeros, scales = self.zeros.astype(np.float32), self.scales.astype(np.float32)
        step = max(1, CHUNK // restored.shape[1])
        for start in range(0, restored.shape[0], step):
            rows = slice(start, start + step)
            restored[rows] -= zeros[rows, self.g_idx]
            restored[rows] *= scales[rows, self.g_idx]
        return restored
