"""docs/scale.md: its shell, and the files for schedulers, run as they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from resuming import digests, make_source

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TASKS = 3  # of the eight that the files ask for


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("scale") / "MODEL")


@pytest.fixture(scope="module")
def reference(source: Path) -> dict[str, str]:
    shell("quantkit quantize MODEL -o ONE --bits 4 --quiet", source.parent)
    return digests(source.parent / "ONE")


def shell(script: str, folder: Path, *words: str, **variables: str) -> None:
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**os.environ, **variables, "PATH": path}
    line = ["sh", "-ec", script, "sh", *words]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_without_a_scheduler(source: Path, reference: dict[str, str]) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```$", (DOCS / "scale.md").read_text(), re.MULTILINE | re.DOTALL)
    (script,) = (block for block in blocks if "xargs" in block)
    shell(script, source.parent)
    assert digests(source.parent / "OUT") == reference


def test_slurm(source: Path, reference: dict[str, str]) -> None:
    script = (DOCS / "scale" / "slurm.sh").read_text()
    (array,) = re.findall(r"^#SBATCH --array=1-(\d+)$", script, re.MULTILINE)
    assert int(array) > TASKS
    for task in range(1, TASKS + 1):  # as `sbatch --array=1-3` would have it
        slurm = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_TASK_COUNT": str(TASKS)}
        shell(script, source.parent, "MODEL", "SLURM", "--bits", "4", **slurm)
    (last,) = re.findall(r'--wrap "(.*?)"', script)
    shell(last.replace("OUT", "SLURM"), source.parent)
    assert digests(source.parent / "SLURM") == reference


def test_kubernetes(source: Path, reference: dict[str, str]) -> None:
    text = (DOCS / "scale" / "kubernetes.yaml").read_text()
    job: dict[str, Any] = yaml.safe_load(text)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["sh", "-c"]
    (script,) = container["args"]
    data = source.parent / "volume"
    data.mkdir()
    (data / "model").symlink_to(source)
    parts = f"/{job['spec']['completions']}"
    assert script.count(parts) == 1
    script = script.replace(parts, f"/{TASKS}").replace("/data", str(data))
    for index in range(TASKS):
        shell(script, source.parent, JOB_COMPLETION_INDEX=str(index))
    (last,) = re.findall(r"once: (quantkit .*)", text)
    shell(last.replace("/data", str(data)), source.parent)
    assert digests(data / "out") == reference
