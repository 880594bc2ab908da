"""quantkit: plan, stream, verify and publish quantized, pruned and converted language models.

    quantkit.inspect(source)            what a checkpoint is
    quantkit.plan(source, recipe)       every byte of the output, before a weight is read
    quantkit.quantize(source, out)      do it; resumes
    quantkit.prune(source, out, …)      set weights to zero; resumes
    quantkit.convert(source, out, to)   the same weights in another layout; resumes
    quantkit.verify(folder)             prove the result
    quantkit.evaluate(folder, text)     how well it predicts a text, and how far it is from its source
    quantkit.compare(folders, text)     several side by side
    quantkit.load(folder)               a working transformers model of any folder that quantkit wrote

Nothing is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantkit.version import __version__

if TYPE_CHECKING:
    from quantkit.api import compare, convert, evaluate, inspect, plan, prune, quantize, verify
    from quantkit.loading import load

__all__ = ["__version__", "compare", "convert", "evaluate", "inspect", "load", "plan", "prune", "quantize", "verify"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from quantkit.loading import load

        return load
    if name in __all__:
        from quantkit import api

        return getattr(api, name)
    raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
