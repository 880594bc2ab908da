"""Runs a card's code as it is written, with exllamav2's kernels on the CPU: exllamav2_snippet.py SNIPPET OUT.

OUT.npy gets what the model that the code has loaded predicts for tokens 3 to 34, float32 [32, vocabulary]. It runs
where quantkit is not installed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import exllamav2_cpu
import numpy as np
import torch


def main() -> None:
    exllamav2_cpu.install()
    space: dict[str, Any] = {}
    exec(compile(Path(sys.argv[1]).read_text(), sys.argv[1], "exec"), space)
    space["cache"].current_seq_len = 0
    logits = space["model"].forward(torch.arange(3, 35)[None], space["cache"])
    np.save(f"{sys.argv[2]}.npy", logits[0].float().numpy())


if __name__ == "__main__":
    main()
