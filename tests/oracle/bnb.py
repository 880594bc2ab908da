"""bitsandbytes' weight formats, slow and obvious: one loop per block or row, float32 scalars, no shared code.

Written from the description of the formats, not from `quantkit.kernels`, and imports nothing of quantkit. Every float
operation below rounds to float32 once, in the order that the format fixes.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
one, tiny = np.float32(1), np.float32(1e-38)

# fmt: off
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
# fmt: on
FP4_TWELFTHS = [0, 0.0625, 8, 12, 4, 6, 2, 3]  # by the low three bits; bit 3 is the sign, but both zeros are +0
TABLE = {
    "nf4": np.array(NF4, np.float32),
    "fp4": np.array([sign * t / 12 for sign in (1, -1) for t in FP4_TWELFTHS], np.float32),
}
ZERO = {"nf4": 7, "fp4": 0}


def widen(bits: npt.NDArray[np.unsignedinteger], dtype: str) -> F32:
    """Stored bit patterns → float32, exactly."""
    if dtype == "BF16":
        return np.array([int(b) << 16 for b in bits.flat], np.uint32).view(np.float32).reshape(bits.shape)
    return bits.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32)


@cache
def ladder(quant_type: str) -> tuple[list[int], list[np.float32]]:
    """Codes by rising value, and the 15 middles between them. Both zeros of fp4 are neighbours, code 0 the lower."""
    table = TABLE[quant_type]
    codes = sorted(range(16), key=lambda c: (table[c], c))
    return codes, [(table[low] + table[high]) / np.float32(2) for low, high in pairwise(codes)]


def code_of(s: np.float32, quant_type: str) -> int:
    """The code for one scaled weight: of two neighbours the lower up to and including the middle between them."""
    codes, middles = ladder(quant_type)
    return codes[sum(bool(s > middle) for middle in middles)]


def encode_4bit(weights: F32, quant_type: str) -> tuple[U8, F32]:
    """float32 of any shape → packed bytes [ceil(n/2)] and the maxima of the blocks of 64 [ceil(n/64)]."""
    flat = weights.reshape(-1)
    codes, absmax = [], []
    for start in range(0, flat.size, 64):
        block = flat[start : start + 64]
        top = np.abs(block).max()
        if block.size == 64:
            inverse = one / max(top, tiny)
            scaled = [w * inverse for w in block]
        else:  # the last, partial block: a division, and the clamped maximum is the one stored
            top = max(top, tiny)
            scaled = [w / top for w in block]
        absmax.append(top)
        codes += [code_of(s, quant_type) for s in scaled]
    if len(codes) % 2:
        codes.append(ZERO[quant_type])
    pairs = zip(codes[::2], codes[1::2], strict=True)
    return np.array([16 * high + low for high, low in pairs], np.uint8), np.array(absmax, np.float32)


def decode_4bit(packed: U8, absmax: F32, quant_type: str, n: int) -> F32:
    codes = [nibble for byte in packed.reshape(-1).tolist() for nibble in (byte >> 4, byte & 15)][:n]
    return np.array([TABLE[quant_type][code] * absmax[i // 64] for i, code in enumerate(codes)], np.float32)


@cache
def dynamic_map() -> F32:
    """256 values: for e = 0..6, the middles of 2^e + 1 even points from 0.1 to 1, times 10^(e-6), with both signs, and
    0 and 1. The points are torch's, for how they round is torch's own business."""
    import torch

    values = [np.float32(0), one]
    for e in range(7):
        points = torch.linspace(0.1, 1, 2**e + 1).numpy()
        for low, high in pairwise(points):
            v = np.float32(10.0 ** (e - 6)) * ((low + high) / np.float32(2))
            values += [v, -v]
    return np.array(sorted(values), np.float32)


def encode_absmax(absmax: F32, offset: np.float32) -> tuple[U8, F32]:
    """Double quantization, given the mean: codes [B] and the maxima of the blocks of 256 [ceil(B/256)]."""
    table = dynamic_map()
    middles = [(low + high) * np.float32(0.5) for low, high in pairwise(table)]
    codes, nested = [], []
    for start in range(0, absmax.size, 256):
        block = [a - offset for a in absmax[start : start + 256]]
        top = max(abs(r) for r in block)
        nested.append(top)
        for r in block:
            if top == 0:
                codes.append(0)
                continue
            with np.errstate(over="ignore", invalid="ignore"):  # a subnormal maximum: infinity, and its product with 0
                v = r * (one / top)
            v = -one if np.isnan(v) else min(max(v, -one), one)
            # Not the nearest entry to v, but to the middle of the one of 65,536 bins in which v lies.
            place = int((v + one) * np.float32(0.5) * np.float32(65535) + np.float32(0.5))
            centre = np.float32(-1) + np.float32(2) * np.float32(place) / np.float32(65535)
            codes.append(sum(bool(m < centre) for m in middles))
    return np.array(codes, np.uint8), np.array(nested, np.float32)


def decode_absmax(codes: U8, nested: F32, offset: np.float32) -> F32:
    table = dynamic_map()
    return np.array([table[code] * nested[i // 256] + offset for i, code in enumerate(codes)], np.float32)


def encode_int8(weights: F32) -> tuple[npt.NDArray[np.int8], F32]:
    """float32 [R, C] → codes [R, C] and SCB [R]. Through float16, whatever the weight was stored in."""
    codes, scale = np.zeros(weights.shape, np.int8), np.zeros(len(weights), np.float32)
    for r, row in enumerate(weights.astype(np.float16).astype(np.float32)):
        scale[r] = np.abs(row).max()
        if scale[r] > 0:
            factor = (one / scale[r]) * np.float32(127)
            codes[r] = [round(float(w * factor)) for w in row]  # Python rounds half to even
    return codes, scale


def decode_int8(codes: npt.NDArray[np.int8], scale: F32) -> F32:
    return np.array(
        [[np.float32(c) * s / np.float32(127) for c in row] for row, s in zip(codes, scale, strict=True)], np.float32
    ).reshape(codes.shape)


def round_to(values: F32, dtype: str) -> F32:
    """float32 → the nearest value of `dtype`, ties to even, as float32."""
    if dtype == "BF16":
        import torch

        return torch.from_numpy(values.copy()).bfloat16().float().numpy()
    return values.astype(np.float16 if dtype == "F16" else np.float32).astype(np.float32)


def squared_error(original: F32, restored: F32) -> tuple[float, float]:
    """(Σ(w − ŵ)², Σw²) in float64 over everything."""
    w, r = original.astype(np.float64).reshape(-1), restored.astype(np.float64).reshape(-1)
    return float(((w - r) ** 2).sum()), float((w**2).sum())
