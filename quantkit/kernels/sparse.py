"""The column loop of a pruner: one column after another inside a block, what is pruned made up for by what follows."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def prune_block(shifted, target, lower, pivots, first, column, pruned, of, keep, errors):  # type: ignore[no-untyped-def]
    """Prunes one block of columns, from its last position to its first.

    `first` is the block's first position in processing order; position p is column[p] of the weight. Where `of` > 0,
    the mask is chosen here: when the first of `of` positions is reached, those `pruned` of them go that cost least,
    (w · pivot)², the first to be reached where two cost the same. Read: `shifted` float32 [rows, n] by position, the
    target plus what columns already done ask of it, changed inside the block; `target` float32 [rows, block]; `lower`
    float32 [block, block], the factor's unit lower triangle; `pivots` float32 [block]. `keep` bool [rows, n] by column:
    read, or written where it is chosen. Written: `errors` float32 [rows, block], target − what the weight becomes.
    """
    width = target.shape[1]
    moved = np.empty(max(of, 1), np.float32)  # a group's weights, were none of them pruned
    for r in range(target.shape[0]):
        row = shifted[r, first : first + width]
        for k in range(width - 1, -1, -1):
            if of > 0 and (width - 1 - k) % of == 0:
                for j in range(of):
                    keep[r, column[first + k - j]] = True
                    moved[j] = row[k - j]
                    for i in range(j):
                        moved[j] += (target[r, k - i] - moved[i]) * lower[k - i, k - j]
                for _ in range(pruned):
                    best = -1
                    least = np.float32(0)
                    for j in range(of):
                        cost = (moved[j] * pivots[k - j]) ** 2
                        if keep[r, column[first + k - j]] and (best < 0 or cost < least):
                            best, least = j, cost
                    keep[r, column[first + k - best]] = False
            value = row[k] if keep[r, column[first + k]] else np.float32(0)
            error = target[r, k] - value
            errors[r, k] = error
            below = lower[k]
            for j in range(k):
                row[j] += error * below[j]
