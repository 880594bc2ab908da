"""Perplexity of a folder as a reader of another environment predicts: perplexity.py READER FOLDER IDS.npy

IDS: windows of token ids [windows, length]; of each all but the first are predicted. It runs where quantkit is not
installed; the reader is one of read.py's.
"""

from __future__ import annotations

import math
import sys

import numpy as np
import read
import torch

READERS = {"gptqmodel": read.gptqmodel, "transformers": read.transformers, "autogptq": read.autogptq}


def main() -> None:
    model = READERS[sys.argv[1]](sys.argv[2])
    losses = []
    with torch.no_grad():
        for row in np.load(sys.argv[3]):
            ids = torch.from_numpy(row.astype(np.int64))
            logits = model(ids[None]).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, ids[1:]).item())
    print(math.exp(math.fsum(losses) / len(losses)))


if __name__ == "__main__":
    main()
