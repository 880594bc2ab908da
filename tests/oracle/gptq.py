"""GPTQ, slow and obvious, in float64: round a column, let the others make up for it, forget the column.

Written from the papers (Optimal Brain Surgeon; Frantar et al. 2022): the update of the weights not yet rounded is
−error / [H⁻¹]_kk · H⁻¹_k,: and the inverse of H without row and column k is H⁻¹ less the outer product of its column k,
by Gaussian elimination. Imports nothing of quantkit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]


def nearest_code(w: float, scale: float, zero: int, top: int) -> int:
    """Python's round is to the even neighbour."""
    return min(max(round(w / scale + zero), 0), top)


def damped(hessian: F64, damp: float) -> tuple[F64, npt.NDArray[np.bool_]]:
    """The Hessian that is inverted, and which columns have no input: those become strangers to all others."""
    diagonal = np.diag(hessian)
    dead = diagonal == 0
    live = diagonal[diagonal > 0]
    mean = live.mean() if live.size else 1.0
    h = hessian / mean
    h[dead] = 0
    h[:, dead] = 0
    h[dead, dead] = 1
    return h + damp * np.eye(len(h)), dead


def solve(
    weight: F64,
    hessian: F64,
    order: list[int],
    damp: float,
    scales: F64,
    zeros: Codes,
    g_idx: Codes,
    bits: list[int],
    keep: npt.NDArray[np.bool_] | None = None,
) -> Codes:
    """Codes [rows, columns]; scales, zeros [rows, groups]; bits of every column; keep false: the code is the zero."""
    h, _ = damped(hessian, damp)
    w = weight.copy()
    codes = np.zeros(w.shape, np.int64)
    inverse = np.linalg.inv(h)
    for k in order:
        for r in range(len(w)):
            scale, zero = scales[r, g_idx[k]], int(zeros[r, g_idx[k]])
            kept = keep is None or keep[r, k]
            codes[r, k] = nearest_code(w[r, k], scale, zero, 2 ** bits[k] - 1) if kept else zero
            error = w[r, k] - scale * (codes[r, k] - zero)
            w[r] -= error / inverse[k, k] * inverse[k]
        column = inverse[:, k].copy()
        inverse -= np.outer(column, column) / column[k]
        inverse[k] = inverse[:, k] = 0
        w[:, k] = 0  # it is rounded: nothing may move it any more
    return codes


def loss(weight: F64, restored: F64, hessian: F64) -> float:
    """tr(E H Eᵀ) / tr(W H Wᵀ)."""
    e = weight - restored
    return float(np.trace(e @ hessian @ e.T) / np.trace(weight @ hessian @ weight.T))
