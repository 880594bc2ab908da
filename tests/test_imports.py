"""Imports point down: verbs → what plans and runs a job → methods, layouts, architectures → kernels, files → errors.

A module may import from its own layer and from those below. Imports for type checkers count: they are arrows too.
"""

from __future__ import annotations

import ast
from pathlib import Path

import quantkit

PACKAGE = Path(quantkit.__file__).parent

# Top first. A name stands for a module or for a whole folder.
LAYERS = (
    {"__init__", "__main__", "cli", "cli_options", "cli_publish", "cli_recipe", "cli_text"},
    {"api", "measuring", "doctor", "forecast", "preview", "push", "rates"},
    {"folder_card", "comparer", "seal", "verifier", "parts", "part_folder", "part_hashes", "teamwork"},
    {"evaluation_record"},
    {
        "runner",
        "evaluator",
        "harness",
        "evaluation_model",
        "evaluation_text",
        "inspector",
        "output",
        "hub",
        "hub_repository",
        "loading",
        "measurer",
    },
    {"sparsity", "equality", "outcome"},
    {"layer_runner", "restored", "foreign", "packed"},
    {"encoding"},
    {"committer", "planner"},
    {"witness", "kept"},
    {"job_memory", "publication"},
    {"plans", "selection", "card_command", "manifest_rows"},
    {"recipe"},
    {"devices"},
    {"card", "parent_card", "card_facts", "front_matter", "bnb_folder", "memory", "console", "calibration"},
    {"layer_memory", "measurement"},
    {"pruners"},
    {"methods", "layouts", "derived_architecture", "modules", "pruning"},
    {"architectures", "patterns", "sharing", "evaluation", "gates", "plots", "tokenization", "solvers"},
    {"checkpoint"},
    {"kernels"},
    {"hub_errors"},
    {"errors", "version", "torch_setup"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(code: str) -> set[str]:
    """First part below `quantkit` of everything that the code imports from it, at any depth of the code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("quantkit.")}


def level(module: str) -> int:
    assert module in LEVEL, f"{module} has no place in LAYERS: give it one"
    return LEVEL[module]


def upward(module: str, code: str) -> list[str]:
    return [f"{module} → {name}" for name in sorted(imports(code)) if level(name) < level(module)]


def test_imports_point_down() -> None:
    arrows = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        arrows += upward(module, path.read_text())
    assert not arrows


def test_an_upward_arrow_is_seen() -> None:
    assert upward("methods", "def f():\n    from quantkit.runner import execute") == ["methods → runner"]
    assert upward("errors", "import quantkit.checkpoint.header") == ["errors → checkpoint"]
    assert upward("plans", "from quantkit import planner, recipe") == ["plans → planner"]
    assert upward("planner", "from quantkit.plans import Plan\nimport numpy") == []


def test_methods_open_no_file_and_kernels_know_no_layout() -> None:
    """Methods take arrays and give arrays: of the checkpoint they know the descriptions alone."""
    for path in (PACKAGE / "methods").glob("*.py"):
        assert "checkpoint.reader" not in path.read_text(), path.name
        assert "checkpoint.writer" not in path.read_text(), path.name
    for path in (PACKAGE / "kernels").glob("*.py"):
        assert imports(path.read_text()) <= {"kernels"}, path.name
