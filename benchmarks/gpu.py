"""Everything that is measured on a GPU, part by part in order of worth; ``gpu.sh`` calls it.

    PYTHONPATH=. python benchmarks/gpu.py --out FOLDER [--seconds 540] [--only PART ...]
    PYTHONPATH=. python benchmarks/gpu.py --out FOLDER --tiny --device cpu

Each part runs in a process of its own within a time of its own. Each of its figures is a line of
``FOLDER/rows.jsonl`` as soon as there is one, after each block of a training anew, of which the
last one counts. ``FOLDER/table.txt`` is written anew after each part. So nothing is lost where a
part or the whole is cut off. ``--tiny --device cpu`` runs through all
of it within minutes, and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import rows
from benchmarks.rows import Row, informs

ROOT = Path(__file__).resolve().parent.parent
RATE = "matrix product in bf16"
LEAST_S = 15.0  # with less time left no part is begun
LEFT_OUT_STATUS = 3
LIMIT_BYTES = 7 * 2**30  # of data, as the platform limits a process that may take 8 GiB


@dataclass(frozen=True, slots=True)
class Work:
    """What a part is told.

    Attributes:
        work: The folder for what is made.
        device: ``cuda`` or ``cpu``.
        tiny: Whether all is small.
        rate_tflops: The card's rate of bf16 matrix products, once it is measured.
        seconds: How long the part may take.
        tell: Keeps a figure at once, for who cannot give it to whoever asks for figures.
    """

    work: Path
    device: str
    tiny: bool
    rate_tflops: float | None
    seconds: float
    tell: Callable[[Row], None]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the measurement.

    Attributes:
        most_s: How long it may take; it is ended then.
        measure: Gives its figures, one by one.
    """

    most_s: float
    measure: Callable[[Work], Iterable[Row]]


def main() -> int:
    """Run all parts, or the one that is named; 1 if a part failed or a bar is missed."""
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part:
        return run_part(args)
    log, table, kept = (args.out / name for name in ("log.txt", "table.txt", "rows.jsonl"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a part must not outlive this
    ends = time.monotonic() + args.seconds
    for name in args.only or PARTS:
        before = len(rows.load(kept))
        row = _in_its_time(name, args, log, ends - time.monotonic())
        rows.keep(row, kept)
        for found in rows.load(kept)[before:]:
            print(f"{found.row}: {found.ours:.5g} {found.unit}", flush=True)
        with table.open("w") as stream, contextlib.redirect_stdout(stream):
            rows.report("gpu", results(kept, tiny=args.tiny))
    return rows.report("gpu", results(kept, tiny=args.tiny))


def results(kept: Path, *, tiny: bool) -> list[Row]:
    """The last figure of each name, and what they come to; some are kept anew after each block."""
    found = list({row.row: row for row in rows.load(kept)}.values())
    return [*found, *verdicts(found, tiny=tiny)]


def run_part(args: argparse.Namespace) -> int:
    """Run one part in this process, and keep its figures as they come."""
    kept = args.out / "rows.jsonl"
    rate = [row.ours for row in rows.load(kept) if row.row == RATE]
    tell = functools.partial(rows.keep, path=kept)
    work = Work(args.work, args.device, args.tiny, rate[-1] if rate else None, args.seconds, tell)
    try:
        for row in PARTS[args.part].measure(work):
            tell(row)
    except rows.LeftOutError as error:
        print(f"left out: {error}", flush=True)
        return LEFT_OUT_STATUS
    return 0


def verdicts(found: Sequence[Row], *, tiny: bool) -> list[Row]:
    """What the figures come to, held against what is asked for; nothing of tiny ones."""
    named = {row.row: row.ours for row in found}
    verdict = []

    def least(start: str, end: str) -> tuple[str, float] | None:
        fitting = [
            (value, name)
            for name, value in named.items()
            if name.startswith(start) and name.endswith(end)
        ]
        return min(fitting)[::-1] if fitting else None

    ours = least("training, ours", ", one iteration")
    plain = least("training, plain torch", ", one iteration")
    if tiny:
        return []
    if ours is not None:
        variant = ours[0].removesuffix(", one iteration")
        if plain is not None:
            verdict.append(rows.faster(f"{variant} / plain torch", ours[1], plain[1], "ms", 1.5))
        share = named.get(f"{variant}, share of the bf16 rate")
        if share is not None:
            verdict.append(_at_least(f"{variant}, share of the bf16 rate", share, 35))
        wait = named.get(f"{variant}, data wait")
        if wait is not None:
            verdict.append(rows.at_most(f"{variant}, data wait", wait, "%", 5))
    case, plain = "inference, ours, one case", least("inference, plain torch", ", one case")
    if case in named and plain is not None:
        verdict.append(rows.faster(f"{case} / plain torch", named[case], plain[1], "s", 2))
    share = named.get(f"{case}, networks alone, share of the bf16 rate")
    if share is not None:
        verdict.append(_at_least(f"{case}, networks alone, share of the bf16 rate", share, 45))
    return verdict


def know_the_card(work: Work) -> Iterator[Row]:
    """What the card can do, and what CUDA takes of the host's memory."""
    before = _memory_gb()
    import torch

    imported = _memory_gb()
    device = torch.device(work.device)
    card = torch.cuda.get_device_name() if work.device == "cuda" else "CPU"
    print(f"{card}, torch {torch.__version__}, {os.cpu_count()} cores", flush=True)
    if work.device == "cuda":
        yield informs(card, torch.cuda.get_device_properties(0).total_memory / 1e9, "GB")
        # from 9.8 to 9.14 torch keeps contiguous half-precision convolutions in 3D from it
        yield informs("cuDNN, version", torch.backends.cudnn.version() or 0, "")
    size = 512 if work.tiny else 8192
    square = torch.randn(size, size, device=device).bfloat16()
    seconds = _median_s(functools.partial(torch.mm, square, square.T), 3 if work.tiny else 30)
    yield informs(RATE, 2 * size**3 / seconds / 1e12, "TFLOP/s")
    count = 2**20 if work.tiny else 2**30
    if work.device == "cuda":  # of four bytes each, and there is a copy
        count = min(count, torch.cuda.mem_get_info()[0] // 16)
    block = torch.randn(count, device=device)
    seconds = _median_s(
        functools.partial(torch.empty_like(block).copy_, block), 3 if work.tiny else 20
    )
    yield informs("copy in the card's memory", 2 * block.nbytes / seconds / 1e12, "TB/s")
    del square, block
    # a convolution brings cuDNN, which is the largest of the libraries
    layer = torch.nn.Conv3d(8, 8, 3, padding=1).to(device)
    layer(torch.randn(1, 8, 16, 32, 32, device=device)).sum().backward()
    for kind, start, after, end in zip(
        ("VmData", "VmSize", "VmRSS"), before, imported, _memory_gb(), strict=True
    ):
        yield informs(f"host memory, {kind}, of torch", after - start, "GB")
        yield informs(f"host memory, {kind}, of CUDA beside it", end - after, "GB")


def run_tests(work: Work) -> Iterator[Row]:
    """Run the tests that need a GPU, as many as there is time for; on the CPU, collect them."""
    marked = sorted(
        str(path) for path in (ROOT / "test").rglob("test_*.py") if "mark.gpu" in path.read_text()
    )
    report = work.work / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "--tb=short", "-rfE", "--durations=8"]
    if work.device == "cpu":
        command += ["--collect-only", "-q"]
    elif importlib.util.find_spec("xdist"):
        command += ["-n", "4"]  # compiling takes most of the time
    began = time.perf_counter()
    process = subprocess.Popen([*command, f"--junitxml={report}", *marked], cwd=ROOT)
    try:
        status = process.wait(max(work.seconds - 15, 1))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it still reports what it has run
        yield rows.at_most("tests, STOPPED before their end", 1, "", 0)  # it may not end now either
        status = process.wait()
    if work.device == "cpu":
        yield Row("tests that cannot be read", float(status != 0), None, "", None, 0, status == 0)
        return
    cases = [c for c in xml.etree.ElementTree.parse(report).iter("testcase") if c.get("name")]
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    yield informs("tests, passed", len(cases) - len(failed) - len(skipped), "")
    yield informs("tests, skipped", len(skipped), "")
    yield rows.at_most("tests, failed", len(failed), "", 0)
    for case in failed:
        yield informs(f"test failed: {case.get('classname')}.{case.get('name')}", 1, "")
    yield informs("tests, time", time.perf_counter() - began, "s")


def training(layout: str, precision: str, *, compiled: bool) -> Callable[[Work], Iterable[Row]]:
    """A part that times our training in one way."""

    def measure(work: Work) -> Iterable[Row]:
        from benchmarks import gpu_training

        gpu_training.measure_ours(
            _place(work),
            work.rate_tflops,
            work.tell,
            layout=layout,
            precision="fp32" if work.device == "cpu" else precision,
            compiled=compiled and work.device == "cuda",  # on a CPU that takes minutes
        )
        return ()

    return measure


def plain_training(work: Work) -> Iterator[Row]:
    """Time what nnunetv2 does."""
    from benchmarks import gpu_training

    compiled = work.device == "cuda"
    yield from gpu_training.measure_plain(_place(work), work.rate_tflops, compiled=compiled)


def inference(work: Work) -> Iterator[Row]:
    """Time our inference."""
    from benchmarks import gpu_inference

    yield from gpu_inference.measure_ours(_place(work), work.rate_tflops)


def plain_inference(work: Work) -> Iterator[Row]:
    """Time what nnunetv2 does."""
    from benchmarks import gpu_inference

    compiled = work.device == "cuda"
    yield from gpu_inference.measure_plain(_place(work), work.rate_tflops, compiled=compiled)


def samples(work: Work) -> Iterator[Row]:
    """Hold the masks of the default weights against the CPU's."""
    from benchmarks import gpu_inference

    yield from gpu_inference.segment_samples(_place(work))


def samples_within_limit(work: Work) -> Iterator[Row]:
    """The same where the platform's ``ulimit -d`` limits what a process may map."""
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
    for row in samples(work):
        yield informs(f"ulimit -d 7 GiB: {row.row}", row.ours, row.unit)


def openvino(work: Work) -> Iterator[Row]:
    """How OpenVINO uses this machine's cores."""
    from benchmarks import gpu_inference

    yield from gpu_inference.scale_openvino(_place(work))


def hippocampus(work: Work) -> Iterator[Row]:
    """Train on a real dataset."""
    from benchmarks import gpu_training

    yield from gpu_training.train_hippocampus(_place(work), work.seconds)


PARTS = {
    # what has to be known; all of it fits into 535 s, which a loan of a card holds
    "card": Part(75, know_the_card),
    "samples": Part(45, samples),
    "tests": Part(80, run_tests),
    "infer": Part(60, inference),
    "infer-plain": Part(85, plain_inference),
    "train": Part(100, training("channels_last", "bf16", compiled=False)),
    "train-plain": Part(90, plain_training),
    # and what else there is time for, as far as those before it do not take all of theirs
    "train-compiled": Part(120, training("channels_last", "bf16", compiled=True)),
    "samples-within-limit": Part(45, samples_within_limit),
    "train-contiguous": Part(45, training("contiguous", "bf16", compiled=False)),
    "train-contiguous-compiled": Part(100, training("contiguous", "bf16", compiled=True)),
    "train-fp16": Part(45, training("channels_last", "fp16", compiled=False)),
    "train-fp32": Part(45, training("channels_last", "fp32", compiled=False)),
    "openvino": Part(75, openvino),
    "hippocampus": Part(300, hippocampus),
}


def _in_its_time(name: str, args: argparse.Namespace, log: Path, left_s: float) -> Row:
    """Run a part in a process of its own, and end that when its time is up; what became of it."""
    may_s = left_s if args.tiny else min(PARTS[name].most_s, left_s)
    if left_s < LEAST_S:
        return Row(f"part {name}: NOT BEGUN, no time was left", 0.0, None, "s", None, None, None)
    command = [
        sys.executable, __file__, "--part", name, "--out", args.out, "--work", args.work,
        "--device", args.device, "--seconds", f"{may_s:.0f}", *(["--tiny"] if args.tiny else []),
    ]  # fmt: skip
    began = time.monotonic()
    with log.open("a") as stream:
        stream.write(f"\n== {name}, within {may_s:.0f} s\n")
        stream.flush()
        process = subprocess.Popen(
            list(map(str, command)), stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(may_s)
            became = {0: "ended", LEFT_OUT_STATUS: "left out"}.get(status, f"FAILED ({status})")
        except subprocess.TimeoutExpired:
            became = "STOPPED, its time was up"
        finally:
            with contextlib.suppress(ProcessLookupError):  # and what it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    took = time.monotonic() - began
    fine = None if became == "left out" else became == "ended"
    return Row(f"part {name}: {became}", took, None, "s", None, None, fine)


def _place(work: Work):
    from benchmarks.gpu_cases import Place

    return Place(work.work, work.device, work.tiny)


def _median_s(call: Callable[[], object], count: int) -> float:
    """The median of so many calls, after a third of them to warm up."""
    from benchmarks.gpu_clock import timed

    taken = [timed(call)[0] for _ in range(count + count // 3)]
    taken = sorted(taken[count // 3 :])
    return taken[len(taken) // 2]


def _memory_gb() -> tuple[float, float, float]:
    """VmData, VmSize and VmRSS of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = dict(line.split(":", 1) for line in lines)
    data, size, resident = (
        int(sizes[key].split()[0]) * 1024 / 1e9 for key in ("VmData", "VmSize", "VmRSS")
    )
    return data, size, resident


def _at_least(row: str, value: float, bar: float) -> Row:
    return Row(row, value, None, "%", None, bar, value >= bar)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument

    def folder(text: str) -> Path:
        return Path(text).absolute()

    add("--out", type=folder, required=True, metavar="FOLDER", help="for figures, table and log")
    add("--work", type=folder, metavar="FOLDER", help="for what is made [a temporary one]")
    add("--seconds", type=float, default=540, help="for all parts together [%(default)g]")
    add("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="[%(default)s]")
    add("--tiny", action="store_true", help="small scans and networks: does it run through?")
    add("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work is None:
        args.work = Path(tempfile.mkdtemp(prefix="gpu-"))
    return args


if __name__ == "__main__":
    sys.exit(main())
