"""Codes as the numbers that they stand for, where torch goes on with them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from quantkit.solvers.coded import Coded
from quantkit.solvers.exl2_coded import Exl2Coded, real_scales
from quantkit.solvers.gptq import Restorable
from quantkit.solvers.threads import in_threads, parts


def restored(coded: Restorable, device: torch.device) -> Tensor:
    """float32 [rows, columns] on a device, the numbers of `coded.restore()` to the bit: all that is rounded is rounded
    in the same way there."""
    if not isinstance(coded, (Coded, Exl2Coded)):
        return torch.from_numpy(coded.restore()).to(device)

    def there(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> Tensor:
        return torch.from_numpy(array).to(device)

    if isinstance(coded, Exl2Coded):
        middles = np.array([2 ** (bits - 1) for bits in coded.groups.bits], np.float32)
        zeros = there(middles).expand(len(coded.codes), -1)
        scales, group = there(real_scales(coded.scales, coded.maxima)), there(coded.group)
    else:
        zeros, scales, group = there(coded.zeros).float(), there(coded.scales).float(), there(coded.g_idx).long()
    found = torch.empty(coded.codes.shape, device=device)

    def some(rows: slice) -> None:
        part = there(coded.codes[rows]).float()
        part = part.sub_(zeros[rows].index_select(1, group)).mul_(scales[rows].index_select(1, group))
        found[rows] = part.half() if isinstance(coded, Exl2Coded) else part  # which EXL2's readers give

    in_threads(some, parts(len(found), device, found.shape[1]), device)
    return found
