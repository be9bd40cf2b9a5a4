"""What a run loads, touches and costs before it works; each in a fresh interpreter."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_bundle

from ichseg.scan import volume

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "openvino"}
# What training needs and inference has to do without.
STRANGERS = {"training", "phantom", "batchgenerators", "evalutils", "pandas", "ray"}
# Runs process.py and says what it imported, which sockets it opened and which files it wrote.
WATCHED = """
import json, os, sys
before = set(sys.modules)
sockets, written = [], []

def watch(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.")):
        sockets.append(event)
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        sockets.append(event)
    if event == "open" and isinstance(arguments[0], str):
        if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.append(os.path.abspath(arguments[0]))
    if event == "os.mkdir":
        written.append(os.path.abspath(arguments[0]))

sys.addaudithook(watch)
sys.argv[0] = "process.py"
import process
try:
    status = process.main(sys.argv[1:])
except SystemExit as end:
    status = end.code
for name in os.listdir("/proc/self/fd"):  # opened by native code, which no hook sees
    try:
        link = os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        continue
    if link.startswith("socket:"):
        sockets.append(link)
print(json.dumps({
    "status": status, "sockets": sockets, "written": written,
    "modules": sorted(set(sys.modules) - before),
}))
"""


@pytest.fixture
def place(tmp_path, scan):
    make_bundle(tmp_path / "weights")
    volume.write(scan, tmp_path / "input" / "scan.mha")
    return tmp_path


def run(place, *flags):
    """The watched run; and its modules' first names."""
    home = place / "home"
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-B", "-c", WATCHED, "--input", str(place / "input"), "--output",
         str(place / "output"), "--weights", str(place / "weights"), *flags],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "HOME": str(home), "CI": ""},
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert not list(home.iterdir())
    return found, {name.split(".")[0] for name in found["modules"]}, done.stderr


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_loads_no_engine_and_no_itk(place, flag):
    found, names, _ = run(place, flag)
    assert found["status"] == 0
    assert not names & (HEAVY | STRANGERS | {"SimpleITK", "numpy", "scipy"})


def test_the_library_loads_what_is_used_when_it_is_used():
    code = (
        "import sys, ichseg; dir(ichseg); "
        "print(sorted({'torch', 'openvino', 'numpy', 'SimpleITK'} & set(sys.modules))); "
        "from ichseg import Volume, read, write; print('torch' in sys.modules); "
        "from ichseg import Ensemble, Segmentation; print(Ensemble.__name__); "
        "print(all(hasattr(ichseg, name) for name in ichseg.__all__), hasattr(ichseg, 'other'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n") == ["[]", "False", "Ensemble", "True False", ""]


def test_ndimage_is_imported_when_it_is_first_used():
    code = (
        "import sys; from ichseg import ndimage; "
        "print(ndimage.bytes_to_come() > 0, 'scipy.ndimage' in sys.modules); "
        "print(ndimage.label([1, 0, 1])[1], ndimage.bytes_to_come())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False", "2", "0"]


def test_refusals_of_input_load_neither(place):
    (place / "input" / "scan.mha").unlink()
    found, names, said = run(place)
    assert found["status"] == 1
    assert "found no scan" in said.splitlines()[-1]
    assert not HEAVY & names


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="auto takes the GPU")
def test_a_whole_run_on_the_cpu_does_without_torch_telemetry_sockets_and_caches(place):
    found, names, said = run(place, "--preset", "balanced", "--report")
    assert found["status"] == 0, said
    assert said.count("OpenVINO") == 1  # the choice is said once
    assert "openvino" in names
    assert not names & STRANGERS
    assert not names & {"torch", "matplotlib", "skimage", "openvino_telemetry", "requests"}
    assert "scipy.ndimage" in found["modules"]
    assert not found["sockets"]
    allowed = (str(place / "output"), "/dev/null")
    assert [path for path in found["written"] if not path.startswith(allowed)] == []


def test_the_reference_engine_loads_torch(place):
    found, names, said = run(place, "--preset", "fast", "--device", "torch-cpu")
    assert found["status"] == 0, said
    assert "torch" in names
    assert not names & (STRANGERS | {"openvino"})
    assert said.count("torch 2") == 1  # the choice is said once


def test_importing_is_no_dearer_than_torch_and_simpleitk():
    """At most 1.2 times as long, in pairs."""

    def seconds(code):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
        return time.perf_counter() - began

    ratios = [seconds("import process") / seconds("import torch, SimpleITK") for _ in range(3)]
    assert statistics.median(ratios) <= 1.2


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="torch loads jinja2")
def test_a_run_without_pictures_loads_nothing_for_them(place):
    found, names, said = run(place, "--preset", "fast")
    assert found["status"] == 0, said
    assert not names & {"jinja2", "markupsafe", "PIL"}
