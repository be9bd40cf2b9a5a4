"""The rival: finds or makes its Python environment, apart from the project's own, and calls it.

    PYTHONPATH=. .venv/bin/python benchmarks/rivals.py [--rival-env FOLDER]

The environment is made once (2 GB, or 7 GB where pip picks torch's CUDA build), then found again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DEFAULT_ENV = HERE / ".rival-env"
# One call, so that pip picks builds that fit each other.
NNUNET = ("torch==2.13.0", "torchvision==0.28.0", "nnunetv2==2.8.1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument that every benchmark with a rival has."""
    parser.add_argument(
        "--rival-env",
        type=Path,
        default=DEFAULT_ENV,
        metavar="FOLDER",
        help="environment of nnunetv2, made if it is not there [%(default)s]",
    )


def python_of(folder: Path, packages: tuple[str, ...] = NNUNET) -> Path:
    """The Python of the rival's environment, which is made if need be.

    Args:
        folder: Where the environment is or is to be; one that is not whole is completed.
        packages: The packages that it holds, with exact pins.

    Raises:
        SystemExit: It cannot be made, or holds other versions.
    """
    # Not resolved: a venv's python is a link, and behind it lies the Python without the packages.
    python = folder.absolute() / "bin" / "python"
    missing = _missing(python, packages)
    if missing:
        print(f"rival: {folder} lacks {', '.join(missing)}: installing (takes minutes)", flush=True)
        if not python.exists():
            venv.create(folder, with_pip=True)
        install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages]
        if subprocess.run(install, check=False).returncode != 0:
            raise SystemExit(f"error: {folder}: pip could not install {', '.join(packages)}")
        missing = _missing(python, packages)
    if missing:
        raise SystemExit(f"error: {folder}: still lacks {', '.join(missing)} after the install")
    print(f"rival: {', '.join(packages)} in {folder}", flush=True)
    return python


class Steps:
    """A process in the rival's environment that times single functions, see nnunetv2_steps.py.

    Args:
        python: The Python of the rival's environment.
        environment: The variables of the process.
    """

    def __init__(self, python: Path, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [python, HERE / "nnunetv2_steps.py"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=environment, text=True,
        )  # fmt: skip

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closes its input, which ends it

    def seconds(self, step: str, output: Path | None = None, **request: Any) -> float:
        """Do one step; its result goes to ``output``, a ``.npy`` file.

        Raises:
            SystemExit: The process died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        message = {"step": step, "output": output and str(output), **request}
        self._process.stdin.write(json.dumps(message, default=str) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"error: the rival's process died in step {step}")
        return float(json.loads(answer)["seconds"])


def _missing(python: Path, packages: tuple[str, ...]) -> list[str]:
    """The pins that the environment does not hold; all when there is no environment."""
    if not python.exists():
        return list(packages)
    code = (
        "import sys\n"
        "from importlib.metadata import PackageNotFoundError, version\n"
        "for pin in sys.argv[1:]:\n"
        "    name, wanted = pin.split('==')\n"
        "    try:\n"
        "        held = version(name).split('+')[0]\n"  # torch's build tag, such as +cpu
        "    except PackageNotFoundError:\n"
        "        held = None\n"
        "    if held != wanted:\n"
        "        print(pin)\n"
    )
    found = subprocess.run(
        [python, "-c", code, *packages], check=False, capture_output=True, text=True
    )
    return found.stdout.split() if found.returncode == 0 else list(packages)


def main() -> int:
    """Make the environment and nothing else."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    python_of(parser.parse_args().rival_env)
    return 0


if __name__ == "__main__":
    sys.exit(main())
