"""Runs of process.py that can be disturbed, and what is bad about how one ended."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from conftest import make_bundle

from ichseg.app.main import main
from ichseg.files import sha256
from ichseg.scan import volume
from ichseg.scan.volume import Volume

PROCESS = Path(__file__).parents[2] / "process.py"
SLOWEST_S = 60.0
SUFFIXES = (".mha", ".nii.gz", ".nii", ".mha", ".nii.gz", ".mha")  # of the scans, in their order


@dataclass(frozen=True, slots=True)
class Scene:
    """What all runs share.

    Attributes:
        folder: With ``weights`` and ``input``; never written.
        masks: Of an undisturbed run, by name.
        gpu_masks: The same by torch, which stands for a GPU.
        seconds: That it took.
        lines: That it said.
    """

    folder: Path
    masks: Mapping[str, bytes]
    gpu_masks: Mapping[str, bytes]
    seconds: float
    lines: int


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: its exit status as ``subprocess`` gives it, and its lines on stderr."""

    status: int
    lines: tuple[str, ...]
    hung: bool = False


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of one run.

    Attributes:
        fault: A key of ``FAULTS``.
        how: ``finished``, ``error line``, ``killed``, ``stopped`` or ``skipped``.
        bad: What must not be, in words; empty if all is well.
        masks: That were there when the disturbed run had ended.
        why: The last line of the disturbed run.
    """

    fault: str
    how: str
    bad: tuple[str, ...]
    masks: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class Running:
    """A run of process.py, and what it has said so far."""

    process: subprocess.Popen[str]
    lines: list[str]
    listener: threading.Thread
    began: float

    def end(self) -> Ended:
        """Wait for it; one that takes over a minute is killed."""
        hung = False
        try:
            self.process.wait(max(0.1, self.began + SLOWEST_S - time.monotonic()))
        except subprocess.TimeoutExpired:
            hung = True
            self.process.kill()
            self.process.wait()
        self.listener.join()
        if self.process.stderr is not None:
            self.process.stderr.close()
        return Ended(self.process.returncode, tuple(self.lines), hung)

    def wait_for(self, moment: tuple[int, float]) -> None:
        """Until it has said so many lines, and so many seconds more; or until it ends."""
        lines, then_s = moment
        while len(self.lines) < lines and self.process.poll() is None:
            time.sleep(0.002)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(then_s)


def make_scene(folder: Path) -> Scene:
    """A tiny bundle, six tiny scans of all formats, and what they give undisturbed."""
    for name in ("weights", "input"):
        (folder / name).mkdir(parents=True)
    make_bundle(folder / "weights", folds=1)
    noise = np.random.default_rng(0)
    for number, suffix in enumerate(SUFFIXES):
        voxels = noise.normal(30, 15, (16 - 2 * number, 48, 64)).astype(np.int16)  # as a brain's HU
        if number == 0:  # a mask of some hundred bytes: libraries buffer so much
            voxels[...], voxels[..., :8] = -1000, 40
        scan = Volume(voxels, (5.0, 1.0, 1.0), (-12.5, 3.25, 40.0))
        volume.write(scan, folder / "input" / f"scan{number}{suffix}")
    began = time.monotonic()
    ended = run(folder, folder / "input", folder / "output")
    seconds = time.monotonic() - began
    status, _ = run_here(folder, folder / "gpu")
    if ended.status or status:
        raise RuntimeError(f"an undisturbed run fails: {ended.lines[-1]}")
    names = [path.name for path in sorted((folder / "input").iterdir())]
    for name in names:
        volume.read(folder / "output" / name)
    masks, gpu_masks = (
        {name: (folder / of / name).read_bytes() for name in names} for of in ("output", "gpu")
    )
    return Scene(folder, masks, gpu_masks, seconds, len(ended.lines))


def command(bundle: Path, scans: Path, output: Path, *flags: str) -> list[str]:
    """The command line of a run."""
    return [
        sys.executable, str(PROCESS), "--input", str(scans), "--output", str(output),
        "--weights", str(bundle / "weights"), "--device", "cpu", "--preset", "fast", *flags,
    ]  # fmt: skip


def start(
    bundle: Path,
    scans: Path,
    output: Path,
    *flags: str,
    path: str = "",
    before: Callable[[], None] | None = None,
    stderr: int = subprocess.PIPE,
) -> Running:
    """Start a run.

    Args:
        bundle: Folder with ``weights``.
        scans: The input.
        output: Its output.
        flags: More of them.
        path: A ``PYTHONPATH``.
        before: Called in the new process.
        stderr: Where its lines go, if not to the listener.
    """
    began = time.monotonic()
    process = subprocess.Popen(
        command(bundle, scans, output, *flags), stdout=subprocess.DEVNULL, stderr=stderr,
        text=True, preexec_fn=before,
        # what a killed run leaves in the folder for temporary files goes with its place
        env=os.environ | {"PYTHONPATH": path, "TMPDIR": str(output.parent)},
    )  # fmt: skip
    lines: list[str] = []

    def listen() -> None:
        for line in process.stderr or ():
            lines.append(line.rstrip("\n"))

    listener = threading.Thread(target=listen)
    listener.start()
    return Running(process, lines, listener, began)


def run(bundle: Path, scans: Path, output: Path, *flags: str) -> Ended:
    """A run from its start to its end."""
    return start(bundle, scans, output, *flags).end()


def run_here(bundle: Path, output: Path, *flags: str) -> tuple[int, tuple[str, ...]]:
    """A run in this process by torch on the CPU; its exit status and its lines on stderr."""
    said = io.StringIO()
    given = command(bundle, bundle / "input", output, "--device", "torch-cpu", *flags)[2:]
    with contextlib.redirect_stderr(said):
        status = main(given)
    return status, tuple(said.getvalue().splitlines())


def any_moment(scene: Scene, rng: random.Random) -> tuple[int, float]:
    """A moment of a run: a line and seconds after it; of half the runs, seconds from the start."""
    if rng.random() < 0.5:
        return 0, rng.uniform(0, scene.seconds)
    return rng.randrange(scene.lines), rng.uniform(0, 0.05)


def faults_of(
    output: Path,
    ended: Ended,
    masks: Mapping[str, Sequence[bytes]],
    *,
    cut_off: bool = False,
    statuses: Sequence[int] = (0, 1),
    listened: bool = True,
) -> list[str]:
    """All that is bad about an output folder and the end of the run that wrote there.

    Args:
        output: Of the run.
        ended: How that ended.
        masks: What each mask may be.
        cut_off: By SIGKILL, after which a temporary file may be left and nothing has been said.
        statuses: That are in order.
        listened: Whether its lines were heard.
    """
    bad = []
    files = {path.name: path for path in output.iterdir()} if output.is_dir() else {}
    for name, path in files.items():
        if name in masks and path.read_bytes() not in masks[name]:
            bad.append(f"{name} is not the mask of an undisturbed run")
        if name.startswith(".writing-") and not cut_off:
            bad.append(f"{name} is left")
    if "results.json" in files:
        bad += unfit_results(files["results.json"])
    if ended.hung:
        bad.append(f"took more than {SLOWEST_S:.0f} s")
    elif ended.status not in statuses:
        bad.append(f"exit status {ended.status}, expected one of {tuple(statuses)}")
    missing = sorted(set(masks) - set(files))
    if ended.status == 0 and missing:
        bad.append(f"exit status 0, but {', '.join(missing)} missing")
    if any("Traceback" in line for line in ended.lines):
        bad.append(f"a traceback: {ended.lines[-1]}")
    said = ended.lines[-1] if ended.lines else ""
    if listened and ended.status > 0 and not said.startswith("error: "):
        bad.append(f"the last line is {said!r}")
    return bad


def unfit_results(path: Path) -> list[str]:
    """What in a results.json is no strict JSON, or does not fit the masks beside it."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    bad = []
    try:
        for entry in json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse):
            for output in entry["outputs"]:
                mask = path.parent / output["filename"]
                if not mask.is_file():
                    bad.append(f"results.json names {mask.name}, which is not there")
                elif sha256(mask) != entry["report"]["mask_sha256"]:
                    bad.append(f"results.json has another sha256 for {mask.name}")
            seconds = entry["report"].get("seconds", {})
            if any(value < 0 for value in seconds.values()):
                bad.append(f"results.json has negative seconds: {seconds}")
    except (ValueError, LookupError, TypeError) as error:
        bad.append(f"results.json is not what it should be: {error!r}")
    return bad


def resumed(
    scene: Scene, scans: Path, output: Path, masks: Mapping[str, Sequence[bytes]] | None = None
) -> list[str]:
    """All that is bad after going on with ``--resume``: all masks are there, none done twice."""
    before = finished(output)
    ended = run(scene.folder, scans, output, "--resume")
    bad = faults_of(output, ended, masks or of(scene.masks), cut_off=True, statuses=(0,))
    bad += [
        f"{name} was done again"
        for name, was in before.items()
        if not (output / name).exists() or identity(output / name) != was
    ]
    return [f"after --resume: {words}" for words in bad]


def finished(output: Path) -> dict[str, tuple[int, int]]:
    """Which masks are done by results.json, each with what a new file would not have."""
    try:
        entries = json.loads((output / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    names = [named["filename"] for entry in entries for named in entry["outputs"]]
    return {name: identity(output / name) for name in names if (output / name).is_file()}


def of(masks: Mapping[str, bytes]) -> dict[str, Sequence[bytes]]:
    """Masks that may be one thing only."""
    return {name: (content,) for name, content in masks.items()}


def trial(fault: str, ended: Ended, output: Path, bad: Sequence[str], scene: Scene) -> Trial:
    """The account of a run."""
    how = "finished" if ended.status == 0 else "error line"
    if ended.status < 0:
        how = "killed"
    elif ended.status > 128:
        how = "stopped"
    masks = sum((output / name).is_file() for name in scene.masks)
    return Trial(fault, how, tuple(bad), masks, ended.lines[-1] if ended.lines else "")


def identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns
