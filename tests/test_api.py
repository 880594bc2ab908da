"""`import quantkit`: the verbs as functions, and nothing imported before it is used."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import quantkit


def test_verbs(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = str(tiny("llama"))
    assert quantkit.inspect(source).architecture == "llama"
    planned = quantkit.plan(source, {"quantize": {"bits": 8}})
    assert quantkit.quantize(source, tmp_path / "out", {"quantize": {"bits": 8}}).units == len(planned.units)
    assert sum(p.stat().st_size for p in (tmp_path / "out").iterdir()) == planned.disk
    assert quantkit.verify(tmp_path / "out", source=source).problems == ()
    assert quantkit.load(tmp_path / "out").get_memory_footprint() > 0
    # No verb has become the module of its name.
    assert all(callable(getattr(quantkit, name)) for name in quantkit.__all__ if name != "__version__")


def test_import_is_light() -> None:
    code = "import sys, quantkit; print(*(m for m in ('numpy', 'torch', 'click', 'numba') if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
