"""What is declared for `pip install`, held against what is pinned and what is imported."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def declared(*extras, plain=True):
    """The ranges, by name."""
    lines = [*PROJECT["dependencies"]] if plain else []
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    return {canonicalize_name(found.name): found for found in map(Requirement, lines)}


def pinned(file):
    """The versions, by name."""
    lines = (ROOT / file).read_text().splitlines()
    pins = (re.fullmatch(r"([\w.-]+)==(\S+)", line) for line in lines)
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin}


def imported(folder):
    """The first names of all modules that the files in a folder import, wherever they do."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"ichseg"}


@pytest.mark.parametrize(
    ("file", "ranges"),
    [
        ("requirements.txt", declared("server")),
        ("requirements-dicom.txt", declared("dicom", plain=False)),
    ],
)
def test_what_is_pinned_is_what_is_declared(file, ranges):
    pins = pinned(file)
    assert set(ranges) == set(pins)
    outside = {name: pin for name, pin in pins.items() if pin not in ranges[name].specifier}
    assert outside == {}


def test_ranges_are_open_and_pins_are_not():
    assert all("==" not in str(found.specifier) for found in declared("server", "dicom").values())
    assert all(">=" in str(found.specifier) for found in declared("server", "dicom").values())


def test_everything_that_is_imported_is_declared():
    packages = importlib.metadata.packages_distributions()
    needed = {
        canonicalize_name(distribution)
        for module in imported(ROOT / "ichseg")
        for distribution in packages[module]
    }
    assert needed <= set(declared("server", "dicom"))


def test_an_import_is_seen(tmp_path):
    (tmp_path / "a.py").write_text("import json\ndef f():\n    from torch.nn import Module\n")
    assert imported(tmp_path) == {"torch"}
