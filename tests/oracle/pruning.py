"""Wanda, magnitude and SparseGPT, slow and obvious, in float64, from the papers. Imports nothing of quantkit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from oracle.gptq import damped

F64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def wanda(weight: F64, inputs: F64, sparsity: float) -> Mask:
    """True where a weight stays. inputs: [tokens, columns]."""
    keep = np.ones(weight.shape, bool)
    for r, row in enumerate(weight):
        scores = [abs(w) * np.sqrt(np.sum(x**2)) for w, x in zip(row, inputs.T, strict=True)]
        for k in sorted(range(len(scores)), key=lambda k, scores=scores: scores[k])[: int(len(scores) * sparsity)]:
            keep[r, k] = False
    return keep


def wanda_pattern(weight: F64, inputs: F64, pruned: int, of: int) -> Mask:
    """N of every M columns go."""
    keep = np.ones(weight.shape, bool)
    for start in range(0, weight.shape[1], of):
        part = slice(start, start + of)
        keep[:, part] = wanda(weight[:, part], inputs[:, part], pruned / of + 1e-9)
    return keep


def magnitude(weight: F64, sparsity: float) -> Mask:
    """The smallest of the whole matrix."""
    flat = weight.ravel()
    keep = np.ones(flat.shape, bool)
    keep[sorted(range(flat.size), key=lambda i: abs(flat[i]))[: int(flat.size * sparsity)]] = False
    return keep.reshape(weight.shape)


def sparsegpt(
    weight: F64, hessian: F64, damp: float, sparsity: float, pattern: tuple[int, int] | None = None, block: int = 128
) -> tuple[F64, Mask]:
    """(pruned weight, true where it stays): columns from left to right, the inverse of what is left at each."""
    h, dead = damped(hessian, damp)
    w, keep = weight.copy(), np.ones(weight.shape, bool)
    columns = w.shape[1]
    rest = np.linalg.inv(h)  # of the columns not yet done
    left: list[F64] = []
    for k in range(columns):
        left.append(rest[k].copy())
        rest = rest - np.outer(rest[:, k], rest[k]) / rest[k, k]
    pivot = np.array([left[k][k] for k in range(columns)])
    for k in range(columns):
        if pattern is None and k % block == 0 and sparsity > 0:
            part = slice(k, min(k + block, columns))
            costs = np.where(dead[part], 0, w[:, part] ** 2 / pivot[part])
            keep[:, part] = costs > np.sort(costs.ravel())[int(costs.size * sparsity)]
        if pattern is not None and k % pattern[1] == 0:
            for r in range(len(w)):
                group = range(k, k + pattern[1])
                cost = {j: 0.0 if dead[j] else w[r, j] ** 2 / pivot[j] for j in group}
                for j in sorted(group, key=cost.__getitem__)[: pattern[0]]:
                    keep[r, j] = False
        error = np.where(keep[:, k], 0, w[:, k])
        w -= np.outer(error / pivot[k], left[k])
    return w * keep, keep
