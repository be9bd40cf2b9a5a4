"""What is declared for `pip install`, held against what is pinned and what is imported."""

import ast
import dataclasses
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ichseg.model import bundle
from ichseg.model.bundle import load_model

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
        ("requirements-cluster.txt", declared("cluster", plain=False)),
    ],
)
def test_what_is_pinned_is_what_is_declared(file, ranges):
    pins = pinned(file)
    assert set(ranges) == set(pins)
    outside = {name: pin for name, pin in pins.items() if pin not in ranges[name].specifier}
    assert outside == {}


def test_ranges_are_open_and_pins_are_not():
    ranges = declared("server", "dicom", "cluster").values()
    assert all("==" not in str(found.specifier) for found in ranges)
    assert all(">=" in str(found.specifier) for found in ranges)


def test_what_errors_say_to_install_is_on_an_index_and_in_no_file_of_the_clone():
    asking = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "ichseg").rglob("*.py")
        if re.search(r"pip install .*(ichseg\[|requirements)", path.read_text(encoding="utf-8"))
    ]
    assert asking == []


def test_everything_that_is_imported_is_declared():
    packages = importlib.metadata.packages_distributions()
    needed = {
        canonicalize_name(distribution)
        for module in imported(ROOT / "ichseg")
        # Ray need not be installed where tests run
        for distribution in (packages[module] if module != "ray" else ["ray"])
    }
    assert needed <= set(declared("server", "dicom", "completion", "cluster"))


def test_the_licences_of_code_and_weights_are_told_everywhere():
    """The wheel and the image hold both, so both are under both."""
    both = "Apache-2.0 AND CC-BY-NC-SA-4.0"
    assert PROJECT["license"] == both
    files = [path for glob in PROJECT["license-files"] for path in ROOT.glob(glob)]
    assert {ROOT / "LICENSE", ROOT / "weights" / "LICENSE"} <= set(files)
    assert f'image.licenses="{both}"' in (ROOT / "Dockerfile").read_text()
    first = (ROOT / "weights" / "LICENSE").read_text().splitlines()[0]
    assert first == "SPDX-License-Identifier: CC-BY-NC-SA-4.0"
    assert load_model(ROOT / "weights").licence in ("", "CC-BY-NC-SA-4.0")


@pytest.mark.parametrize(
    ("said", "file", "expected"),
    [
        ("MIT", "SPDX-License-Identifier: CC0-1.0", "Apache-2.0 AND MIT"),
        (None, "SPDX-License-Identifier: CC0-1.0", "Apache-2.0 AND CC0-1.0"),
        (None, None, "Apache-2.0"),
    ],
)
def test_the_image_is_labelled_with_the_licence_of_its_weights(tmp_path, said, file, expected):
    """build.sh with an engine that only writes down what it is asked to build."""
    for name in ("build.sh", "Dockerfile", "ichseg/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    weights = tmp_path / "weights"
    weights.mkdir()
    shutil.copy(ROOT / "weights" / "3d_fullres_fold_0.safetensors", weights)
    model = load_model(ROOT / "weights")
    model = dataclasses.replace(model, members=model.members[:1], licence=said or "")
    bundle.save_model(weights, model)
    if file:
        (weights / "LICENSE").write_text(f"{file}\n\nThe weights\n")
    engine = tmp_path / "engine"
    engine.write_text('#!/bin/sh\n[ "$1" != build ] || printf "%s\\n" "$@" >built\necho 1\n')
    engine.chmod(0o755)
    environment = {**os.environ, "CONTAINER_ENGINE": str(engine)}
    subprocess.run([tmp_path / "build.sh"], check=True, env=environment, stdout=subprocess.DEVNULL)
    labels = (tmp_path / "built").read_text().splitlines()
    assert f"org.opencontainers.image.licenses={expected}" in labels


def test_the_sbom_has_what_the_image_says(tmp_path):
    """export.sh with an engine whose image has two packages; what it is run with is looked at."""
    for name in ("export.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    engine = tmp_path / "engine"
    engine.write_text(
        '#!/bin/sh\n[ "$1" != run ] || { printf "%s\\n" "$@" >ran; echo torch==2.13.0+cu126; '
        "echo numpy==2.4.6; }\n"
    )
    engine.chmod(0o755)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "CONTAINER_ENGINE": str(engine), "PATH": path, "IMAGE": "a:b"}
    command = [tmp_path / "export.sh", "--sbom"]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    found = json.loads((tmp_path / "export" / "ichseg.cdx.json").read_text())
    assert found["bomFormat"] == "CycloneDX"
    assert found["metadata"]["component"]["name"] == "ichseg"
    assert [each["purl"] for each in found["components"]] == [
        "pkg:pypi/numpy@2.4.6",
        "pkg:pypi/torch@2.13.0%2Bcu126",
    ]
    ran = (tmp_path / "ran").read_text()
    assert ran.startswith("run\n--rm\n--network\nnone\n--entrypoint\npython\na:b\n-c\n")
    code = ran.partition("-c\n")[2]
    listed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert f"numpy=={importlib.metadata.version('numpy')}" in listed.stdout.splitlines()


@pytest.mark.parametrize("script", ["build.sh", "export.sh", "test.sh --no-build"])
def test_an_engine_that_is_missing_or_does_not_run_is_not_taken_for_a_missing_image(
    tmp_path, script
):
    engine = tmp_path / "engine"
    for said in (f"no {engine} here", f"{engine} does not answer"):
        environment = {**os.environ, "CONTAINER_ENGINE": str(engine)}
        done = subprocess.run(
            ["bash", *script.split()], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert said in done.stderr.splitlines()[-1]
        engine.write_text("#!/bin/sh\nexit 1\n")
        engine.chmod(0o755)


def test_an_import_is_seen(tmp_path):
    (tmp_path / "a.py").write_text("import json\ndef f():\n    from torch.nn import Module\n")
    assert imported(tmp_path) == {"torch"}
