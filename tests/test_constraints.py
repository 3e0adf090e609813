"""constraints.txt: what it pins can be installed with every Python that pyproject.toml promises."""

import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PYTHONS = re.findall(r"Python :: (3\.\d+)\"", PROJECT)
LINES = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINS = [Requirement(line) for line in LINES if line and not line.startswith("#")]


def test_the_promised_pythons_begin_where_the_project_does():
    assert PYTHONS[0] == re.search(r'requires-python = ">=([\d.]+)"', PROJECT)[1]


@pytest.mark.parametrize("pin", PINS, ids=str)
def test_a_pin_is_left_out_where_its_python_is_missing(pin):
    try:
        installed = metadata.metadata(pin.name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{pin.name} is not installed")
    if installed["Version"].split("+")[0] not in pin.specifier:
        pytest.skip(f"{pin.name} is installed as {installed['Version']}")
    needed = SpecifierSet(installed["Requires-Python"] or "")
    for python in PYTHONS:
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            # With the last patch: some leave out the first ones of a minor version.
            assert f"{python}.99" in needed, f"{pin} cannot be installed with Python {python}, which needs a marker"
