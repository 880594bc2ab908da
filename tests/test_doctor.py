"""`quantkit doctor`: this environment as it is, and others as they might be."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from quantkit.doctor import EXTRAS, PAIRS, Diagnosis, diagnose, diagnosis_text

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def doctor(**changes: str | None) -> Diagnosis:
    """Of this environment with other versions: a package's name with _ for -; None: it is not installed."""
    changed = {name.replace("_", "-"): found for name, found in changes.items()}

    def installed(name: str) -> str | None:
        if name in changed:
            return changed[name]
        try:
            return version(name)
        except ModuleNotFoundError:
            return None

    return diagnose(installed)


def test_this_environment_is_sound() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quantkit", "doctor", "--json"], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["sound"] is True
    versions = {p["name"]: p["version"] for p in found["packages"]}
    assert versions["torch"] == version("torch")
    assert len(versions) == len(PROJECT["dependencies"])
    assert found["machine"]["memory"] > 2**30
    assert found["machine"]["disk"] > 0


def test_every_extra_for_users_is_known() -> None:
    assert set(EXTRAS) | {"dev"} == set(PROJECT["optional-dependencies"])


def test_what_an_extra_lacks_is_named() -> None:
    found = {extra.name: extra for extra in doctor(matplotlib=None).extras}
    assert found["plot"].missing == ("matplotlib",)
    text = diagnosis_text(doctor(matplotlib=None))
    assert "`pip install 'quantkit[plot]'`" in text
    assert "sound" in text


def test_a_package_that_is_missing_or_too_old_is_a_problem() -> None:
    found = doctor(tqdm=None, jinja2="2.0")
    assert [p.split()[0] for p in found.problems] == ["jinja2", "tqdm"]
    assert "problems: 2" in diagnosis_text(found)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(name for name, _ in pair.versions))
def test_each_pair_is_said_where_all_of_it_is_there_only(pair: object) -> None:
    """With versions at the edge of what the table names, and without the last of them."""
    bad = {
        "torch": "2.5.1", "transformers": "5.2.0", "kernels": "0.9", "auto-gptq": "0.7.1", "optimum": "2.3.0",
        "gptqmodel": "6.9", "llmcompressor": "0.14.0", "bitsandbytes": "0.50.2",
    }  # fmt: skip
    assert any(pair is other for other in PAIRS)
    versions = dict(pair.versions)  # type: ignore[attr-defined]
    if "llmcompressor" in versions:
        bad["transformers"] = "5.23.0"

    def said(installed: dict[str, str]) -> bool:
        found = diagnose(lambda name: installed.get(name))
        return pair.words in (*found.problems, *found.notes)  # type: ignore[attr-defined]

    whole = {name: bad[name] for name in versions}
    assert said(whole)
    whole.pop(list(versions)[-1])
    assert not said(whole)


def test_gptqmodel_without_optimum_is_noted() -> None:
    assert any("optimum is missing" in note for note in doctor(gptqmodel="7.7.0", optimum=None).notes)
