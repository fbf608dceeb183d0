"""What pyproject.toml promises, constraints.txt pins and README says of versions is the same."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    if not line.startswith("#")
]
VERSIONS = {canonicalize_name(pin.name): re.sub("^==", "", str(pin.specifier)) for pin in PINS}
REQUIRED = [
    Requirement(line)
    for line in [
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"]["plot"],
        *PYPROJECT["dependency-groups"]["dev"],
    ]
]
PYTHONS = [
    found[1]
    for each in PROJECT["classifiers"]
    if (found := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", each))
]


def lowest(name: str) -> str:
    """The lower bound of a dependency."""
    (required,) = (each for each in REQUIRED if each.name == name)
    (bound,) = (each.version for each in required.specifier if each.operator == ">=")
    return bound


def test_what_make_venv_installs_is_pinned_within_what_is_required() -> None:
    assert len(VERSIONS) == len(PINS)
    for each in REQUIRED:
        pin = VERSIONS[canonicalize_name(each.name)]
        assert each.specifier.contains(pin), f"{each} excludes the pin {pin}"


def test_the_support_matrix_has_the_bounds_and_the_tested_releases() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    (row,) = re.findall(r"^\| Python, torch, transformers \| (.*) \|$", readme, re.MULTILINE)
    oldest = Version(lowest("transformers"))
    assert row == (
        f">= {PYTHONS[0]}, >= {lowest('torch')}, {oldest.major}.{oldest.minor} to "
        f"{oldest.major}.x (tested: torch {VERSIONS['torch']} with transformers {oldest} and "
        f"{VERSIONS['transformers']}; all pins in `constraints.txt`)"
    )


def test_classifiers_are_the_pythons_that_are_required_and_checked() -> None:
    minors = [Version(each).minor for each in PYTHONS]
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == PYTHONS[0]
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{PYTHONS[0].replace('.', '')}"


def test_pins_exist_for_every_python_of_the_classifiers_or_say_for_which() -> None:
    """Of what is installed here as it is pinned."""
    checked = set()
    for pin in PINS:
        try:
            about = metadata(pin.name)
        except PackageNotFoundError:
            continue  # for another Python or another platform
        if about["Version"] != VERSIONS[canonicalize_name(pin.name)]:
            continue
        checked.add(pin.name)
        runs_on = SpecifierSet(about["Requires-Python"] or "")
        for python in PYTHONS:
            if pin.marker is None or pin.marker.evaluate({"python_version": python}):
                assert runs_on.contains(f"{python}.99"), f"{pin} needs Python {runs_on}"
    assert {"pytest", "numpy", "packaging"} <= checked
