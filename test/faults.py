"""Provokes faults of the machine under real runs of process.py, and counts how each ended.

    PYTHONPATH=. .venv/bin/python test/faults.py --each 25 --seed 1

Each run segments six tiny scans. Bad is a mask that is not, to the byte, that of an undisturbed
run; a results.json that is no strict JSON or does not fit the masks beside it; a temporary file
left by a run that could have removed it; a traceback, or no line that says why; over a minute; an
exit status of 0 though a mask is missing. Anything bad makes the exit status 1.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from conftest import make_bundle

import process
from ichseg import torch_engine, volume
from ichseg.volume import Volume

PROCESS = Path(process.__file__)
SLOWEST_S = 60.0
SUFFIXES = (".mha", ".nii.gz", ".nii", ".mha", ".nii.gz", ".mha")  # of the scans, in their order
FULL = "No space left on device"
TOO_LARGE = "File too large"  # what RLIMIT_FSIZE gives
CLOCK = """\
import random, time
_true, _random = time.time, random.Random({seed})
time.time = lambda: _true() + _random.choice((-86400, 0, 86400)) * _random.random()
time.time_ns = lambda: int(time.time() * 1e9)
"""
GPU_ERRORS = (
    "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA`",
    "CUDA error: device-side assert triggered\nFor debugging consider CUDA_LAUNCH_BLOCKING=1",
    "CUDA driver error: device lost",
    "CUDA error: unknown error\nGPU has fallen off the bus",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
)


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
        voxels = noise.integers(-1000, 1000, (16 - 2 * number, 48, 64)).astype(np.int16)
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
        status = process.main(given)
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
                elif _sha256(mask) != entry["report"]["mask_sha256"]:
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
        if not (output / name).exists() or _identity(output / name) != was
    ]
    return [f"after --resume: {words}" for words in bad]


def finished(output: Path) -> dict[str, tuple[int, int]]:
    """Which masks are done by results.json, each with what a new file would not have."""
    try:
        entries = json.loads((output / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    names = [named["filename"] for entry in entries for named in entry["outputs"]]
    return {name: _identity(output / name) for name in names if (output / name).is_file()}


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


def sigkill(scene: Scene, place: Path, rng: random.Random) -> Trial:
    """SIGKILL at any moment, then ``--resume``."""
    scans, output = scene.folder / "input", place / "output"
    running = start(scene.folder, scans, output)
    running.wait_for(any_moment(scene, rng))
    running.process.kill()
    ended = running.end()
    statuses = (0, -signal.SIGKILL)
    bad = faults_of(output, ended, of(scene.masks), cut_off=True, statuses=statuses)
    account = trial("SIGKILL, then `--resume`", ended, output, bad, scene)
    return _more(account, resumed(scene, scans, output))


def sigkill_over_earlier(scene: Scene, place: Path, rng: random.Random) -> Trial:
    """SIGKILL as a mask of another preset has been replaced, then ``--resume``."""
    scans, output = scene.folder / "input", place / "output"
    earlier = run(scene.folder, scans, output, "--preset", "full")
    if earlier.status:
        raise RuntimeError(f"an undisturbed run fails: {earlier.lines[-1]}")
    masks = {n: (mask, (output / n).read_bytes()) for n, mask in scene.masks.items()}
    running = start(scene.folder, scans, output, *rng.choice([[], ["--resume"]]))
    after = rng.randint(1, len(SUFFIXES) - 1)
    while sum(" -> " in line for line in list(running.lines)) < after:
        if running.process.poll() is not None:
            break
        time.sleep(0.0002)
    running.process.kill()
    ended = running.end()
    bad = faults_of(output, ended, masks, cut_off=True, statuses=(0, -signal.SIGKILL))
    account = trial("SIGKILL over another preset's results", ended, output, bad, scene)
    return _more(account, resumed(scene, scans, output))


def sigterm(scene: Scene, place: Path, rng: random.Random) -> Trial:
    """SIGTERM at any moment, then ``--resume``.

    Before process.py has set its handler, and when it has taken it back, the signal's own default
    ends the process: that is the same status for a shell.
    """
    scans, output = scene.folder / "input", place / "output"
    running = start(scene.folder, scans, output)
    running.wait_for(any_moment(scene, rng))
    sent = time.monotonic()
    running.process.terminate()
    ended = running.end()
    statuses = (0, 128 + signal.SIGTERM, -signal.SIGTERM)
    bad = faults_of(output, ended, of(scene.masks), statuses=statuses)
    if time.monotonic() - sent > 5:  # when the platform kills
        bad.append(f"SIGTERM ended it after {time.monotonic() - sent:.1f} s")
    if ended.status == -signal.SIGTERM and ended.lines and len(finished(output)) < len(SUFFIXES):
        bad.append("SIGTERM found no handler in the middle of the run")
    account = trial("SIGTERM, then `--resume`", ended, output, bad, scene)
    return _more(account, resumed(scene, scans, output))


def disk_full(scene: Scene, place: Path, rng: random.Random) -> Trial:
    """The output on a tmpfs of a few pages; when it has been made larger, ``--resume``."""
    fault = "disk full (tmpfs)"
    scans, output = scene.folder / "input", place / "output"
    output.mkdir()
    pages = rng.randint(1, 32)
    if not _mounted(output, pages * 4096):
        return Trial(fault, "skipped", (), 0, "mounting a tmpfs is refused here")
    try:
        flags = ["--report"] if rng.random() < 0.3 else []
        ended = run(scene.folder, scans, output, *flags)
        bad = faults_of(output, ended, of(scene.masks))
        bad += _reason(ended, output, FULL)
        account = trial(fault, ended, output, bad, scene)
        subprocess.run(["mount", "-o", "remount,size=16m", str(output)], check=True)
        return _more(account, resumed(scene, scans, output))
    finally:
        subprocess.run(["umount", str(output)], check=True)


def file_limit(scene: Scene, place: Path, rng: random.Random) -> Trial:
    """Writes that fail from some byte of a file on, by RLIMIT_FSIZE; then ``--resume``."""
    scans, output = scene.folder / "input", place / "output"
    limit = int(10 ** rng.uniform(1.5, 4.5))  # masks are of 10^2 to 10^4.5 bytes

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    flags = ["--report"] if rng.random() < 0.3 else []
    ended = start(scene.folder, scans, output, *flags, before=limited).end()
    bad = faults_of(output, ended, of(scene.masks))
    bad += _reason(ended, output, TOO_LARGE)
    account = trial("writes fail (RLIMIT_FSIZE)", ended, output, bad, scene)
    return _more(account, resumed(scene, scans, output))


def log_full(scene: Scene, place: Path, _: random.Random) -> Trial:
    """Stderr on a disk that is full: the masks matter more."""
    output = place / "output"
    with Path("/dev/full").open("w") as full:
        running = start(scene.folder, scene.folder / "input", output, stderr=full.fileno())
    ended = running.end()
    bad = faults_of(output, ended, of(scene.masks), statuses=(0,), listened=False)
    return trial("log on a full disk (/dev/full)", ended, output, bad, scene)


def output_removed(scene: Scene, place: Path, rng: random.Random) -> Trial:
    """``rm -rf`` of the output folder at any moment, then ``--resume``."""
    scans, output = scene.folder / "input", place / "output"
    running = start(scene.folder, scans, output)
    running.wait_for(any_moment(scene, rng))
    shutil.rmtree(output, ignore_errors=True)
    last = f"[{len(SUFFIXES)}/{len(SUFFIXES)}]"
    late = any(line.startswith(last) and " -> " in line for line in list(running.lines))
    ended = running.end()
    bad = faults_of(output, ended, of(scene.masks))
    if late:  # all was done, and perhaps looked at for the last time
        bad = [words for words in bad if not words.startswith("exit status 0, but")]
    account = trial("output folder removed, then `--resume`", ended, output, bad, scene)
    return _more(account, resumed(scene, scans, output))


def output_is_a_file(scene: Scene, place: Path, rng: random.Random) -> Trial:
    """A file in place of the output folder at any moment; when it is away again, ``--resume``."""
    scans, output = scene.folder / "input", place / "output"
    running = start(scene.folder, scans, output)
    running.wait_for(any_moment(scene, rng))
    aside = place / "aside"
    while not output.is_file():
        with contextlib.suppress(OSError):
            output.rename(aside)
        with contextlib.suppress(OSError):
            output.write_text("in the way")
    late = running.process.poll() is not None
    ended = running.end()
    output.unlink()
    if aside.exists():
        aside.rename(output)
    bad = faults_of(output, ended, of(scene.masks), cut_off=True)  # it was out of the run's reach
    if ended.status == 0 and not late and len(finished(output)) < len(SUFFIXES):
        bad.append("exit status 0 though masks are missing")
    account = trial("a file in the output folder's place", ended, output, bad, scene)
    return _more(account, resumed(scene, scans, output))


def input_changes(scene: Scene, place: Path, rng: random.Random) -> Trial:
    """A scan is removed, cut, or replaced at any moment of the run."""
    scans, output = place / "input", place / "output"
    shutil.copytree(scene.folder / "input", scans)
    victim = rng.choice(sorted(scans.iterdir())[2:])
    whole = victim.read_bytes()
    way = rng.choice(["removed", "cut", "garbage", "empty", "folder", "other"])
    others = [
        path.name
        for path in scans.iterdir()
        if volume.suffix_of(path) == volume.suffix_of(victim) and path != victim
    ]
    other = rng.choice(sorted(others)) if others else victim.name
    running = start(scene.folder, scans, output)
    running.wait_for((rng.randrange(scene.lines // 2), rng.uniform(0, 0.1)))
    if way == "cut":  # the same file, which may just be being read
        os.truncate(victim, rng.randrange(len(whole)))
    elif way == "removed":
        victim.unlink()
    elif way == "folder":
        victim.unlink()
        victim.mkdir()
    else:
        content = {"garbage": rng.randbytes(5000), "empty": b""}.get(way)
        beside = scans / ".new"
        beside.write_bytes((scans / other).read_bytes() if content is None else content)
        beside.replace(victim)
    ended = running.end()
    masks = of(scene.masks)
    if way == "other":
        masks[victim.name] = (scene.masks[victim.name], scene.masks[other])
    bad = faults_of(output, ended, masks)
    bad += [
        f"{name} was not segmented"
        for name in masks
        if name != victim.name and not (output / name).is_file()
    ]
    if ended.status and str(victim) not in ended.lines[-1]:
        bad.append(f"{victim.name} was {way}, but the last line does not name it")
    if ended.status and (output / victim.name).exists():
        bad.append(f"{victim.name} failed and has a mask")
    return trial("a scan removed, cut or replaced", ended, output, bad, scene)


def clock_jumps(scene: Scene, place: Path, rng: random.Random) -> Trial:
    """``time.time`` jumps by up to a day, back and forth, at each call."""
    output, shim = place / "output", place / "shim"
    shim.mkdir()
    (shim / "sitecustomize.py").write_text(CLOCK.format(seed=rng.randrange(1000)))
    flags = ["--time-budget", "600"] if rng.random() < 0.5 else []
    ended = start(scene.folder, scene.folder / "input", output, *flags, path=str(shim)).end()
    bad = faults_of(output, ended, of(scene.masks), statuses=(0,))
    if flags:
        for entry in json.loads((output / "results.json").read_text(encoding="utf-8")):
            given = entry["report"]["ran"]["time_budget_s"]
            if not 0 < given < 600:
                bad.append(f"a time budget of {given} s, expected a share of 600 s")
    return trial("clock set back and forth by up to a day", ended, output, bad, scene)


def gpu_lost(scene: Scene, place: Path, rng: random.Random) -> Trial:
    """A CUDA error from some forward pass on, then ``--resume`` on a sound device.

    There is no GPU: torch on the CPU raises what torch raises there.
    """
    output = place / "output"
    with losing_the_gpu(rng.choice(GPU_ERRORS), after=rng.randrange(len(SUFFIXES))):
        status, lines = run_here(scene.folder, output)
    ended = Ended(status, lines)
    bad = faults_of(output, ended, of(scene.gpu_masks), statuses=(1,))
    if "the GPU was lost" not in lines[-1]:
        bad.append(f"the last line does not say that the GPU was lost: {lines[-1]}")
    account = trial("GPU lost (simulated), then `--resume`", ended, output, bad, scene)
    before = finished(output)
    status, lines = run_here(scene.folder, output, "--resume")
    bad = faults_of(output, Ended(status, lines), of(scene.gpu_masks), statuses=(0,))
    bad += [
        f"{name} was done again" for name, was in before.items() if _identity(output / name) != was
    ]
    return _more(account, [f"after --resume: {words}" for words in bad])


@contextlib.contextmanager
def losing_the_gpu(words: str, *, after: int) -> Iterator[None]:
    """Every call of a network raises from the given one on, as a broken CUDA context does."""
    forward, calls = torch_engine.forward, [0]

    def broken(*args: object) -> torch.Tensor:
        calls[0] += 1
        if calls[0] > after:
            raise torch.AcceleratorError(words) if "CUDA error" in words else RuntimeError(words)
        found: torch.Tensor = forward(*args)
        return found

    with mock.patch.object(torch_engine, "forward", broken):
        yield


FAULTS: tuple[Callable[[Scene, Path, random.Random], Trial], ...] = (
    sigkill, sigkill_over_earlier, sigterm, disk_full, file_limit, log_full, output_removed,
    output_is_a_file, input_changes, clock_jumps, gpu_lost,
)  # fmt: skip


def provoke(
    scene: Scene,
    folder: Path,
    fault: Callable[[Scene, Path, random.Random], Trial],
    number: int,
    seed: int,
) -> Trial:
    """One fault once, in a folder of its own that is removed."""
    place = folder / f"{fault.__name__}{number}"
    place.mkdir()
    try:
        return fault(scene, place, dice(seed, fault, number))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def dice(seed: int, fault: Callable[..., Trial], number: int) -> random.Random:
    """What decides about one trial."""
    return random.Random(f"{seed} {fault.__name__} {number}")


def table(trials: Sequence[Trial]) -> str:
    """Faults by how they ended; and how many masks there were then."""
    hows = ("finished", "error line", "stopped", "killed", "skipped")
    counts = collections.Counter((t.fault, t.how) for t in trials)
    lines = [
        "| fault | tried | " + " | ".join(hows) + " | masks by then | bad |",
        "|---" * (len(hows) + 4) + "|",
    ]
    for fault in dict.fromkeys(t.fault for t in trials):
        mine = [t for t in trials if t.fault == fault]
        masks = sorted(t.masks for t in mine)
        cells = [
            fault,
            sum(t.how != "skipped" for t in mine),
            *(counts[fault, how] for how in hows),
            f"{masks[0]} to {masks[-1]}",
            sum(bool(t.bad) for t in mine),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Provoke, count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--each", type=int, default=25, help="times for each fault [%(default)s]")
    parser.add_argument("--seed", type=int, default=1, help="[%(default)s]")
    parser.add_argument("--only", help="one fault, by its function's name")
    parser.add_argument("--verbose", action="store_true", help="say how each run ended")
    args = parser.parse_args()
    began = time.monotonic()
    trials = []
    with tempfile.TemporaryDirectory() as folder:
        scene = make_scene(Path(folder) / "scene")
        for fault in FAULTS:
            if args.only in (None, fault.__name__):
                for number in range(args.each):
                    trials.append(provoke(scene, Path(folder), fault, number, args.seed))
                    t = trials[-1]
                    if args.verbose or t.bad:
                        sys.stdout.write(f"{fault.__name__} {number}: {t.how}, {t.masks} masks: ")
                        sys.stdout.write(f"{t.why[:600]}\n")
                        sys.stdout.writelines(f"  BAD: {words}\n" for words in t.bad)
                        sys.stdout.flush()
    sys.stdout.write(table(trials))
    sys.stdout.write(f"{len(trials)} runs disturbed in {time.monotonic() - began:.0f} s\n")
    return int(any(t.bad for t in trials))


def _more(account: Trial, bad: Sequence[str]) -> Trial:
    return Trial(account.fault, account.how, (*account.bad, *bad), account.masks, account.why)


def _reason(ended: Ended, output: Path, reason: str) -> list[str]:
    """That a failure to write names a path of the output, and why."""
    if ended.status == 0 or (reason in ended.lines[-1] and str(output) in ended.lines[-1]):
        return []
    return [f"the last line does not say {reason!r} and a path of the output: {ended.lines[-1]}"]


def _mounted(folder: Path, size: int) -> bool:
    """Whether a tmpfs of so many bytes could be mounted there."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        return subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


if __name__ == "__main__":
    sys.exit(main())
