"""The smallest of many numbers: of a whole matrix, by counting; of each small group, by looking."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def drop_smallest(x, low, count, keep):  # type: ignore[no-untyped-def]
    """keep[i] = False for the `count` elements of x that are least without their sign, of equal ones the first. Without
    it, bit patterns are in the order of size.

    x: uint16 or uint32 [n], floats as bit patterns, finite. low: how many of the lower bits are counted in a second
    pass, 0 or 16. keep: bool [n], written.
    """
    largest = (1 << (15 + low)) - 1
    counts = np.zeros(1 << 15, np.int64)
    for i in range(x.size):
        counts[(np.int64(x[i]) & largest) >> low] += 1
    high = below = 0
    while high < counts.size - 1 and below + counts[high] <= count:
        below += counts[high]
        high += 1
    limit = high << low
    if low > 0:
        fine = np.zeros(1 << low, np.int64)
        for i in range(x.size):
            m = np.int64(x[i]) & largest
            if m >> low == high:
                fine[m & ((1 << low) - 1)] += 1
        part = 0
        while part < fine.size - 1 and below + fine[part] <= count:
            below += fine[part]
            part += 1
        limit += part
    ties = count - below
    for i in range(x.size):
        m = np.int64(x[i]) & largest
        gone = m < limit
        if m == limit and ties > 0:
            gone = True
            ties -= 1
        keep[i] = not gone


@njit(nogil=True, cache=True)
def drop_in_groups(scores, pruned, of, keep):  # type: ignore[no-untyped-def]
    """keep = False for the `pruned` least of every `of` scores in a row, of equal ones the first.

    scores: float32 [rows, columns]. keep: bool of that shape, written.
    """
    for r in range(scores.shape[0]):
        row, kept = scores[r], keep[r]
        for start in range(0, scores.shape[1], of):
            for k in range(start, start + of):
                kept[k] = True
            for _ in range(pruned):
                least = -1
                for k in range(start, start + of):
                    if kept[k] and (least < 0 or row[k] < row[least]):
                        least = k
                kept[least] = False
