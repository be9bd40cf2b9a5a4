"""Reads mutants in processes of limited memory, and counts how each ended.

    PYTHONPATH=.:test .venv/bin/python test/robustness/fuzz.py --each 200 --seed 1

Each mutant must give a volume, a bundle or a list of cases, or one clear error. A death by signal,
another exception, more than a minute, or a file opened outside of its folder is a finding, and
makes the exit status 1.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import resource
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from robustness import fuzz_corpus as corpus
from robustness import fuzz_datasets, fuzz_scans
from robustness.fuzz_corpus import Mutant

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
MEMORY = 3 << 30  # address space; the libraries alone map more than one
SLOWEST_S = 60.0
_CODE = (
    f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(TESTS)!r}]; "
    "from robustness import fuzz; fuzz.work()"
)


@dataclass(frozen=True, slots=True)
class Ending:
    """How reading a mutant ended: ``read``, ``refused``, or what must not be."""

    mutant: str
    kind: str
    how: str
    words: str = ""

    @property
    def bad(self) -> bool:
        """Whether it is a finding."""
        return self.how not in ("read", "refused")


def run(mutants: Sequence[Mutant]) -> list[Ending]:
    """Read all mutants; a process that dies is replaced, and the rest goes on."""
    endings: list[Ending] = []
    left = list(mutants)
    while left:
        last = None
        for ending in _one_process(left):
            endings.append(ending)
            last = ending
        done = {ending.mutant for ending in endings}
        rest = [mutant for mutant in left if mutant.name not in done]
        if len(rest) == len(left):
            raise RuntimeError(f"no process reads anything; the last ending was {last}")
        left = rest
    return endings


def _one_process(mutants: Sequence[Mutant]) -> Iterator[Ending]:
    """What one process reads until it ends, by itself or not."""
    process = subprocess.Popen(
        [sys.executable, "-c", _CODE], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    ready = selectors.DefaultSelector()
    ready.register(process.stdout, selectors.EVENT_READ)
    with process:
        for mutant in mutants:
            try:
                process.stdin.write(json.dumps(asdict(mutant), default=str) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                break
            if not ready.select(SLOWEST_S):
                process.kill()
                yield Ending(mutant.name, mutant.kind, "slow")
                return
            line = process.stdout.readline()
            if not line:
                process.wait()
                yield Ending(mutant.name, mutant.kind, f"died ({process.returncode})")
                return
            yield Ending(mutant.name, mutant.kind, **json.loads(line))
        process.stdin.close()
        process.wait()


def work() -> None:
    """The process that reads: a mutant a line in, an ending a line out."""
    from ichseg.app import cases
    from ichseg.errors import IchsegError
    from ichseg.model import bundle
    from ichseg.scan import reader

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    tempfile.tempdir = own = tempfile.mkdtemp()
    allowed: list[str] = []
    foreign: list[str] = []

    def watch(event: str, args: tuple[object, ...]) -> None:
        if event == "open" and allowed and isinstance(args[0], (str, bytes, os.PathLike)):
            # not resolved: links are not to be followed
            path = os.path.abspath(os.fsdecode(args[0]))  # noqa: PTH100
            if not path.startswith(
                (*allowed, sys.prefix, sys.base_prefix, str(ROOT), "/proc/self", os.devnull)
            ):
                foreign.append(path)

    sys.addaudithook(watch)
    for line in sys.stdin:
        given = json.loads(line)
        path = Path(given["path"])
        home = path if path.is_dir() else path.parent
        allowed[:] = [str(home), own]
        foreign.clear()
        wrong = ""
        try:
            if given["kind"] in ("model.json", "safetensors"):
                model = bundle.load_model(path)
                for member in model.members:
                    bundle.load_state(path, member)
            elif given["kind"] == "inputs.json":
                job = cases.find_cases(path, home / "out", input_slug="head-ct", output_slug="m")
                for case in job.cases:
                    if not case.refusal and not case.image.resolve().is_relative_to(home):
                        foreign.append(str(case.image))
            elif given["kind"] == "export-nnunet":
                _export(path, Path(own) / "exported")
            elif given["kind"] in fuzz_datasets.KINDS:
                wrong = fuzz_datasets.read(given["kind"], path, Path(own))
            elif given["kind"] == "nnunet":
                _import(path, Path(own) / "bundle")
            elif given["kind"] in ("hu", "nifti-frames", "dicom-mixture"):
                wrong = _read_scans(path, home)
            else:
                reader.read_scan(path)
            ending = {"how": "wrong in silence" if wrong else "read", "words": wrong}
        except IchsegError as error:
            words = str(error)
            named = str(home) in words or own in words  # a workspace is made there
            clear = "\n" not in words and len(words) < 1000 and named
            ending = {"how": "refused" if clear else "unclear", "words": words[:400]}
        except BaseException as error:
            ending = {"how": f"raised {type(error).__name__}", "words": str(error)[:400]}
        if foreign:
            ending = {"how": "opened another file", "words": foreign[0]}
        sys.stdout.write(json.dumps(ending) + "\n")
        sys.stdout.flush()
    allowed.clear()
    shutil.rmtree(own)


def _import(path: Path, out: Path) -> None:
    """Import a trained nnU-Net, and read the bundle that it becomes."""
    from ichseg.model import bundle
    from training.bundle.import_nnunet import import_folders

    try:
        for member in import_folders([path], out).members:
            bundle.load_state(out, member)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _export(path: Path, out: Path) -> None:
    """Export a bundle to nnU-Net."""
    from training.bundle.export_nnunet import export_folders

    try:
        export_folders(path, out)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _read_scans(path: Path, home: Path) -> str:
    """Read a scan, or every case of a folder, as a run does.

    Returns:
        What is wrong about one that raised nothing; empty if nothing is.
    """
    from ichseg.app import cases
    from ichseg.errors import InputError
    from ichseg.scan import reader

    wrong, refusal = "", None
    found = [(path, "")]
    if path.is_dir():
        job = cases.find_cases(path, home / "out", input_slug="head-ct", output_slug="m")
        found = [(case.image, case.study) for case in job.cases if not case.refusal]
    for image, study in found:
        try:
            scan = reader.read_scan(image, study=study)
            if not path.is_dir():
                scan = reader.in_hu(scan, image)
        except InputError as error:
            refusal = error
        else:
            wrong = wrong or fuzz_scans.is_wrong(path, scan)
    if refusal is not None and not wrong:
        raise refusal
    return wrong


def main() -> int:
    """Make, read, count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--each", type=int, default=200, help="mutants of a kind [%(default)s]")
    parser.add_argument(
        "--kinds", nargs="+", choices=corpus.KINDS, default=corpus.KINDS, metavar="KIND",
        help="which of them [all]",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=1, help="[%(default)s]")
    parser.add_argument("--bundle", type=Path, default=ROOT / "weights", help="a sound bundle")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        mutants = [
            corpus.make(Path(folder), kind, number, args.seed, args.bundle)
            for kind in args.kinds
            for number in range(max(1, args.each // corpus.FEWER.get(kind, 1)))
        ]
        endings = run(mutants)
    sys.stdout.write(table(endings))
    sys.stdout.write(f"{len(endings)} mutants in {time.monotonic() - began:.0f} s\n")
    for ending in endings:
        if ending.bad:
            sys.stdout.write(f"{ending.mutant}: {ending.how}: {ending.words}\n")
    return int(any(ending.bad for ending in endings))


def table(endings: Sequence[Ending]) -> str:
    """Kinds by how they ended."""
    hows = ["read", "refused", *sorted({e.how for e in endings if e.bad})]
    counts = collections.Counter((e.kind, e.how) for e in endings)
    lines = ["| kind | " + " | ".join(hows) + " |", "|---" * (len(hows) + 1) + "|"]
    for kind in dict.fromkeys(e.kind for e in endings):
        lines.append(f"| {kind} | " + " | ".join(str(counts[kind, how]) for how in hows) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
