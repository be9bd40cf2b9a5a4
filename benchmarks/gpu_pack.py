"""Makes the folder that ``gpu.sh`` takes along to a GPU machine without network.

    PYTHONPATH=. python benchmarks/gpu_pack.py             what is missing beside torch and SciPy
    PYTHONPATH=. python benchmarks/gpu_pack.py --bare                    beside torch and numpy
    PYTHONPATH=. python benchmarks/gpu_pack.py --add openvino            for its part
    PYTHONPATH=. python benchmarks/gpu_pack.py --hippocampus TASK04      for its part

It fills ``benchmarks/.gpu-pack``, which git ignores, with wheels for CPython 3.12 on Linux,
compressed once more and without their tests, and with the Hippocampus as it is preprocessed. What
is there already is kept. Folder and clone together must stay below ``--most-mib``. Needs pip, a
package index, and what training needs.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.fold_pair import CONFIGURATION

ROOT = Path(__file__).resolve().parent.parent
PACK = ROOT / "benchmarks" / ".gpu-pack"
HIPPOCAMPUS = PACK / "hippocampus"
MIB = 2**20

# What training, its tests and weights import. Versions as in the requirements that name them.
CARRIED = ("blosc2", "batchgenerators", "safetensors", "zlib-ng")
BARE = ("scipy", "matplotlib", "pytest")
# What these need and comes with torch, or nothing here imports: parts of batchgenerators do that
# augment nothing.
THERE = {
    "numpy", "torch", "filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy",
    "typing-extensions", "setuptools", "openvino-telemetry", "future", "pandas", "scikit-image",
    "scikit-learn", "unittest2",
}  # fmt: skip
# What a machine for learning has beside torch, as others need it there, too.
USUAL = {
    "scipy", "matplotlib", "pytest", "safetensors", "msgpack", "threadpoolctl", "rich", "pygments",
    "markdown-it-py", "mdurl", "httpx", "httpcore", "h11", "anyio", "certifi", "idna", "pillow",
}  # fmt: skip
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)] + ["manylinux2014_x86_64"]
# Tests; and plugins and frontends of OpenVINO that no network here goes through.
LEFT_OUT = re.compile(
    r"(^|/)tests?/|/libopenvino_(intel_[gn]pu_plugin|\w+_frontend)|/openvino/libs/cache\.json"
    r"|^openvino/(tools|torch|frontend)/"
)
KEPT_OF_THOSE = re.compile(r"libopenvino_ir_frontend|^openvino/(tools|frontend)/__init__")


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the folder and weigh it; 1 if it is too heavy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bare", action="store_true", help="only torch and numpy are there")
    parser.add_argument("--add", nargs="+", default=[], metavar="PACKAGE", help="more packages")
    parser.add_argument("--hippocampus", type=Path, metavar="TASK04", help="the Decathlon's task")
    parser.add_argument(
        "--most-mib", type=float, default=30.0, help="of folder and clone together [%(default)g]"
    )
    args = parser.parse_args(arguments)
    shutil.rmtree(PACK, ignore_errors=True)  # else what is no longer asked for travels, too
    PACK.mkdir()
    for name in (*CARRIED, *(BARE if args.bare else ()), *args.add):
        add_package(name, THERE if args.bare else THERE | USUAL)
    if args.hippocampus:
        add_hippocampus(args.hippocampus.absolute())
    return weigh(args.most_mib)


def add_package(name: str, there: set[str]) -> None:
    """Put a package and all that it needs into the folder, but for what is there or in it."""
    if name.lower() in there:
        return
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "-q"]
        wanted = _pinned(name)
        if name == "batchgenerators":  # plain Python, and not every index has its wheel
            command = [*pip, "wheel", "--no-deps", "-w", folder, wanted]
        else:
            command = [*pip, "download", "--only-binary=:all:", "-d", folder, wanted]
            command += ["--python-version", "3.12", "--implementation", "cp"]
            for platform in PLATFORMS:
                command += ["--platform", platform]
        subprocess.run(command, check=True)
        for wheel in sorted(Path(folder).glob("*.whl")):
            name = _name_of(wheel)
            if name not in there and name not in {_name_of(path) for path in PACK.glob("*.whl")}:
                repack(wheel, PACK / wheel.name)


def repack(wheel: Path, small: Path) -> None:
    """Write a wheel again, compressed by LZMA and without what is not used.

    Raises:
        SystemExit: It has files that an installer would lay elsewhere, and ``gpu.sh`` does not.
    """
    with zipfile.ZipFile(wheel) as source:
        files = [entry for entry in source.infolist() if not entry.is_dir()]
        astray = [e.filename for e in files if ".data/" in e.filename and "lib/" in e.filename]
        if astray:
            raise SystemExit(f"error: {wheel.name} has {astray[0]}, expected packages at its top")
        unfinished = small.with_suffix(".tmp")
        with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_LZMA) as target:
            for entry in files:
                name = entry.filename
                if LEFT_OUT.search(name) and not KEPT_OF_THOSE.search(name):
                    continue
                target.writestr(name, source.read(entry))
    unfinished.rename(small)
    print(f"{small.name}: {small.stat().st_size / MIB:.1f} MiB")


def add_hippocampus(source: Path) -> None:
    """Plan and preprocess the Hippocampus, and keep what its training reads."""
    with tempfile.TemporaryDirectory() as folder:
        workspace = ["--workspace", folder]
        for step in (
            ["convert", source, *workspace],
            ["plan", *workspace, "--recipe", "nnunetv2"],
            ["preprocess", CONFIGURATION, *workspace],
        ):
            command = [sys.executable, "-m", "training", *map(str, step)]
            subprocess.run(command, cwd=ROOT, check=True)
        stored = Path("preprocessed") / CONFIGURATION
        shutil.copytree(Path(folder) / stored, HIPPOCAMPUS / stored)
        for name in ("dataset.json", "plans.json"):
            shutil.copy(Path(folder) / name, HIPPOCAMPUS)


def weigh(most_mib: float) -> int:
    """Say what folder and clone weigh; 1 if that is too much."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip
    files = [ROOT / name.decode() for name in listed.stdout.split(b"\0") if name]
    clone = sum(path.stat().st_size for path in files if path.is_file()) / MIB
    pack = sum(path.stat().st_size for path in PACK.rglob("*") if path.is_file()) / MIB
    print(f"clone {clone:.1f} MiB, {PACK.relative_to(ROOT)} {pack:.1f} MiB")
    if clone + pack > most_mib:
        print(f"error: together {clone + pack:.1f} MiB, expected at most {most_mib:g}")
        return 1
    return 0


def _pinned(name: str) -> str:
    """A package with its version, if the requirements say one."""
    for path in (ROOT / "requirements.txt", ROOT / "training" / "requirements.txt"):
        found = re.search(rf"^{re.escape(name)}==\S+$", path.read_text(), re.MULTILINE | re.I)
        if found:
            return found[0]
    return name


def _name_of(wheel: Path) -> str:
    return wheel.name.split("-")[0].replace("_", "-").lower()


if __name__ == "__main__":
    sys.exit(main())
