"""The search for the scale and zero point of a group of weights: every candidate tried, the smallest error kept.

Everything is measured in units of the group's largest magnitude, so that neither the square of 1e30 nor that of 1e-30
leaves float32; and the scale tried is the float16 that will be stored, not the number it comes from.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from quantkit.kernels.columns import nearest

LARGEST = np.float32(65504)  # of float16
SMALLEST_NORMAL = np.float32(2.0**-14)


@njit(nogil=True, cache=True, inline="always")
def to_half(values, bits):  # type: ignore[no-untyped-def]
    """float32 → the nearest float16, as float32; never 0 and never beyond 65504. `bits` are those of `values`."""
    for c in range(values.size):
        v = values[c]
        if abs(v) < SMALLEST_NORMAL:
            # Floats around 0.5 are as far apart as subnormal halves.
            small = (abs(v) + np.float32(0.5)) - np.float32(0.5)
            if small == 0:
                small = SMALLEST_NORMAL
            values[c] = -small if v < 0 else small
        elif abs(v) > LARGEST:
            values[c] = -LARGEST if v < 0 else LARGEST
        else:
            u = bits[c]
            bits[c] = (u + np.uint32(0xFFF) + ((u >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)


@njit(nogil=True, cache=True, inline="always")
def _errors(w, h, scale, inverse, low, high, error):  # type: ignore[no-untyped-def]
    """error[c] = Σ h·(w − ŵ)² for every candidate c. The candidates are the vector's lanes: the sum of each runs in the
    order of the weights, whatever the machine's width."""
    error[:] = 0
    for i in range(w.size):
        wi, hi = w[i], h[i]
        for c in range(error.size):
            level = nearest(wi * inverse[c], low[c], high[c])
            e = wi - level * scale[c]
            error[c] += hi * e * e


@njit(nogil=True, cache=True)
def search(  # type: ignore[no-untyped-def]
    weight, importance, edges, symmetric, top, ratios, shifts, polish, scales, zeros
):
    """The best scale and zero point for every group of every row.

    weight: float32 [rows, n]; group g is its columns edges[g] … edges[g + 1] − 1. importance: float32 [n], not
    negative. top: float32, the largest code. ratios: float32 [k], the part of the group's range that the codes cover,
    largest first. shifts: float32 [m], added to the zero point if not `symmetric`. polish: rounds of least squares that
    follow, each the best scale for the codes of the one before. Written: `scales` float32 [rows, groups], every one a
    float16 other than 0; `zeros` float32 [rows, groups].
    """
    middle = (top + np.float32(1)) * np.float32(0.5)
    size = 2 * ratios.size if symmetric else ratios.size * shifts.size
    scale = np.empty(size, np.float32)
    scale_bits = scale.view(np.uint32)
    relative, inverse = np.empty(size, np.float32), np.empty(size, np.float32)
    zero, low, high = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    error = np.empty(size, np.float32)
    unit = np.empty(weight.shape[1], np.float32)
    one = np.empty(1, np.float32)
    one_bits = one.view(np.uint32)
    for r in range(weight.shape[0]):
        for g in range(edges.size - 1):
            w = unit[: edges[g + 1] - edges[g]]
            h = importance[edges[g] : edges[g + 1]]
            least, most = np.float32(0), np.float32(0)
            for i in range(w.size):
                least = min(least, weight[r, edges[g] + i])
                most = max(most, weight[r, edges[g] + i])
            span = max(most, -least)
            if span == 0:
                scales[r, g] = 1
                zeros[r, g] = middle
                continue
            for i in range(w.size):
                w[i] = weight[r, edges[g] + i] / span
            least, most = least / span, most / span
            if symmetric:
                # The side that has one code more first: there the largest magnitude may be code 0.
                sign = np.float32(1) if -least >= most else np.float32(-1)
                for c in range(ratios.size):
                    scale[c] = sign * (ratios[c] * span / middle)
                    scale[ratios.size + c] = -scale[c]
                zero[:] = middle
                to_half(scale, scale_bits)
            else:
                # Without a negative weight the zero point would be 0, which the format cannot say: count downwards.
                sign = np.float32(-1) if least == 0 else np.float32(1)
                below = most if least == 0 else -least
                for k in range(ratios.size):
                    for m in range(shifts.size):
                        scale[k * shifts.size + m] = sign * ((most - least) * (ratios[k] * span / top))
                to_half(scale, scale_bits)
                for k in range(ratios.size):
                    for m in range(shifts.size):
                        c = k * shifts.size + m
                        at = np.rint(below * ratios[k] * (span / abs(scale[c]))) + shifts[m]
                        zero[c] = min(max(at, np.float32(1)), top)
            for c in range(size):
                relative[c] = scale[c] / span
                inverse[c] = span / scale[c]
                low[c] = -zero[c]
                high[c] = top - zero[c]
            _errors(w, h, relative, inverse, low, high, error)
            best = 0
            for c in range(size):
                if error[c] < error[best]:
                    best = c
            chosen, at, least_error = scale[best], zero[best], error[best]
            for _ in range(polish):
                wd, dd = np.float32(0), np.float32(0)
                for i in range(w.size):
                    level = nearest(w[i] * (span / chosen), -at, top - at)
                    wd += h[i] * w[i] * level
                    dd += h[i] * level * level
                if dd == 0:
                    break
                one[0] = wd / dd * span
                to_half(one, one_bits)
                if one[0] == chosen or (one[0] < 0) != (chosen < 0):
                    break
                scale[0] = one[0] / span
                inverse[0] = span / one[0]
                low[0], high[0] = -at, top - at
                _errors(w, h, scale[:1], inverse[:1], low[:1], high[:1], error[:1])
                if not error[0] < least_error:
                    break
                chosen, least_error = one[0], error[0]
            scales[r, g] = chosen
            zeros[r, g] = at
