"""The house: imports go one way, nothing runs in circles, and no room is too full."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the lowest room to the highest: a room imports itself and those before it.
ORDER = {
    "ichseg": ("scan", "model", "engine", "predict", "report", "app"),
    "training": (
        "data", "planning", "store", "batches", "fit", "scoring", "crossval", "bundle", "report",
        "jobs",
    ),
}  # fmt: skip
# Which of the three may import which others.
MAY_IMPORT = {"ichseg": (), "training": ("ichseg",), "phantom": ("ichseg",)}
MOST_FILES = 13  # beside __init__.py


def modules(root):
    """Every module below the three top packages: its dotted name and its path."""
    found = {}
    for top in MAY_IMPORT:
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root):
    """For each module the modules of ours that it imports, wherever in the file it does."""
    known = modules(root)
    found = {}
    for name, path in known.items():
        wanted = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                wanted.update(each if each in known else node.module for each in full)
            elif isinstance(node, ast.Import):
                wanted.update(alias.name for alias in node.names)
        found[name] = {each for each in wanted if each in known and each != name}
    return found


def is_allowed(module, other):
    """Whether ``module`` may import ``other``."""
    (top, *rooms), (other_top, *other_rooms) = module.split("."), other.split(".")
    if top != other_top:
        # `python -m training synthesize` is the one way from training to the phantoms.
        return other_top in MAY_IMPORT[top]
    if top not in ORDER or not rooms or not other_rooms or other_rooms[0] not in ORDER[top]:
        return True  # errors and files, which stand beside the rooms, and the packages themselves
    if rooms[0] not in ORDER[top]:
        return rooms[0] in ("__main__", "__init__")
    return ORDER[top].index(other_rooms[0]) <= ORDER[top].index(rooms[0])


def wrong_directions(root):
    return {
        f"{module} -> {other}"
        for module, others in imports(root).items()
        for other in others
        if not is_allowed(module, other)
    }


def circles(root):
    """The modules of one circle, if there is any."""
    try:
        TopologicalSorter(imports(root)).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_imports_go_one_way():
    assert wrong_directions(ROOT) == set()


def test_no_imports_in_circles():
    found = circles(ROOT)
    assert found == [], " -> ".join(found)


@pytest.mark.parametrize(
    ("module", "text", "other"),
    [
        ("ichseg.scan.volume", "from ichseg.predict import crop", "ichseg.predict.crop"),
        ("ichseg.errors", "import training", "training"),
        ("ichseg.errors", "def f():\n    from ichseg.scan import volume", "ichseg.scan.volume"),
        ("training.data.splits", "import training.jobs.run", "training.jobs.run"),
        ("training.fit.loop", "from phantom.head import Head", "phantom.head"),
        ("phantom.head", "from training.data import splits", "training.data.splits"),
    ],
)
def test_a_wrong_direction_is_seen(tmp_path, module, text, other):
    for name in (module, other):
        path = tmp_path / (name.replace(".", "/") + ".py")
        if "." not in name:
            path = tmp_path / name / "__init__.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if name == module else "")
    assert wrong_directions(tmp_path) == {f"{module} -> {other}"}


def test_a_circle_is_seen(tmp_path):
    (tmp_path / "ichseg" / "scan").mkdir(parents=True)
    (tmp_path / "ichseg" / "scan" / "a.py").write_text("from ichseg.scan import b")
    (tmp_path / "ichseg" / "scan" / "b.py").write_text("def f():\n    from ichseg.scan.a import x")
    assert set(circles(tmp_path)) == {"ichseg.scan.a", "ichseg.scan.b"}


def test_rooms_are_not_too_full_and_say_what_they_are():
    for top in MAY_IMPORT:
        for package in [ROOT / top, *(p.parent for p in (ROOT / top).rglob("*/__init__.py"))]:
            files = [path.name for path in package.glob("*.py") if path.name != "__init__.py"]
            assert len(files) <= MOST_FILES, f"{package}: {len(files)} files"
            assert ast.get_docstring(ast.parse((package / "__init__.py").read_text())), package


def test_the_standard_library_is_not_hidden():
    """A room named as a module of Python would be imported in its place."""
    assert set(ORDER["ichseg"] + ORDER["training"]).isdisjoint(sys.stdlib_module_names)
