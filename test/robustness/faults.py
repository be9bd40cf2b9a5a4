"""Provokes faults of the machine under real runs of process.py, and counts how each ended.

    PYTHONPATH=.:test .venv/bin/python test/robustness/faults.py --each 25 --seed 1

Each run segments six tiny scans. Bad is a mask that is not, to the byte, that of an undisturbed
run; a results.json that is no strict JSON or does not fit the masks beside it; a temporary file
left by a run that could have removed it; a traceback, or no line that says why; over a minute; an
exit status of 0 though a mask is missing. Anything bad makes the exit status 1.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import torch
from robustness.fault_runs import (
    SUFFIXES,
    Ended,
    Scene,
    Trial,
    any_moment,
    faults_of,
    finished,
    identity,
    make_scene,
    of,
    resumed,
    run,
    run_here,
    start,
    trial,
)

from ichseg.engine import torch_engine
from ichseg.files import suffix_of

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
    ended = running.end()
    bad = faults_of(output, ended, of(scene.masks))
    last = f"[{len(SUFFIXES)}/{len(SUFFIXES)}]"
    lines = [line for line in running.lines if line.startswith(last) and " -> " in line]
    if any(not Path(line.split(" -> ")[1].strip()).exists() for line in lines):
        # it went with the folder: all was done, and perhaps looked at for the last time
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
        if suffix_of(path) == suffix_of(victim) and path != victim
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
        f"{name} was done again" for name, was in before.items() if identity(output / name) != was
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


if __name__ == "__main__":
    sys.exit(main())
