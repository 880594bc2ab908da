"""Runs a card's code as far as a machine without a GPU can: exllamav2_snippet.py SNIPPET.

Configuration, model, cache and tokenizer are made by exllamav2 from the folder. What puts weights on a GPU, and what
comes after it, is not run: its names and arguments must be those of exllamav2. It runs where quantkit is not installed.
"""

from __future__ import annotations

import ast
import inspect
import sys
import types
from pathlib import Path
from typing import Any

import torch

GPU = ("load_autosplit", "ExLlamaV2DynamicGenerator", "generate")


def calls(statement: ast.stmt) -> list[ast.Call]:
    return [node for node in ast.walk(statement) if isinstance(node, ast.Call)]


def called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else ast.unparse(call.func)


def main() -> None:
    extension: Any = types.ModuleType("exllamav2.ext")
    extension.none_tensor = torch.empty((1, 1), device="meta")
    extension.exllamav2_ext = types.SimpleNamespace()
    sys.modules["exllamav2.ext"] = extension
    space: dict[str, Any] = {}
    ran, bound = 0, []
    for statement in ast.parse(Path(sys.argv[1]).read_text()).body:
        needing = [call for call in calls(statement) if called(call) in GPU]
        if not needing:
            exec(compile(ast.Module([statement], []), "snippet", "exec"), space)
            ran += 1
            continue
        for call in needing:
            owner = space["ExLlamaV2" if called(call) == "load_autosplit" else "ExLlamaV2DynamicGenerator"]
            function = getattr(owner, called(call) if hasattr(owner, called(call)) else "__init__")
            inner = {k.arg: k.value for k in call.keywords}
            inspect.signature(function).bind(None, *call.args, **inner)
            bound.append(called(call))
            for value in [*call.args, *inner.values()]:
                if not (isinstance(value, ast.Call) and called(value) in GPU):
                    eval(compile(ast.Expression(value), "snippet", "eval"), space)
        if isinstance(statement, ast.Assign):
            space[ast.unparse(statement.targets[0])] = None
    assert ran >= 6, ran
    assert sorted(bound) == sorted(GPU), bound
    assert len(space["model"].modules) > 4
    assert space["cache"] is not None


if __name__ == "__main__":
    main()
