"""Work on many cases in parallel."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.work import die, triple_or_fail

from ichseg.engine import machine
from ichseg.errors import DatasetError
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from training.data import parallel
from training.data.dataset import Case, describe_failure
from training.data.parallel import each_case, with_progress, workers_for


@pytest.mark.parametrize("workers", [1, 2])
def test_each_case_goes_on_after_a_failure(workers):
    cases = [Case(name, (), None) for name in ("a", "bad", "ccc")]
    found = dict(each_case(triple_or_fail, cases, 1, workers=workers))
    assert found[cases[0]] == 4
    assert found[cases[2]] == 10
    failure = found[cases[1]]
    assert isinstance(failure, KeyError)
    assert describe_failure(cases[1], failure) == "case bad: KeyError: 'odd'"


@pytest.mark.parametrize("all_of_them", [True, False])
def test_nothing_of_the_workers_is_left_when_the_cases_are_done(all_of_them):
    """What still closes its pipes while Python ends makes that end in an error, now and then."""
    before = set(threading.enumerate())
    results = each_case(triple_or_fail, [Case(n, (), None) for n in "abcdef"], 1, workers=2)
    for _ in results:
        if not all_of_them:
            results.close()
    assert set(threading.enumerate()) == before


def test_each_case_says_when_a_worker_was_killed():
    with pytest.raises(DatasetError, match="worker process was killed"):
        list(each_case(die, [Case("a", (), None)], workers=2))


def test_each_case_refuses_no_workers():
    with pytest.raises(DatasetError, match="0 workers, expected at least 1"):
        list(each_case(triple_or_fail, [], workers=0))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["preprocess", "--workspace", "nowhere"], "training.store.preprocess, not loaded yet\n"),
        (["preprocess", "--help"], ""),
        (["plan", "--workspace", "nowhere"], ""),
    ],
)
def test_workers_load_the_command_while_it_is_loaded_here(arguments, told):
    code = (
        "import sys; from training import __main__ as program\n"
        "def tell(module):\n"
        "    here = 'loaded' if module in sys.modules else 'not loaded yet'\n"
        "    sys.stderr.write(f'{module}, {here}\\n')\n"
        "program.load_early = tell\n"
        "program.main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=Path(__file__).parents[2],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "".join(line for line in done.stderr.splitlines(True) if "loaded" in line) == told


@pytest.mark.parametrize("busy", [False, True])
def test_workers_end_when_their_parent_is_killed(tmp_path, busy):
    """One that waits for work, and one in the midst of it."""
    (tmp_path / "work.py").write_text(
        "import os, time\n"
        "def work(case, folder, seconds):\n"
        "    (folder / str(os.getpid())).touch()\n"
        "    time.sleep(seconds)\n"
    )
    (tmp_path / "parent.py").write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from training.data.parallel import each_case\n"
        "from work import work\n"
        "if __name__ == '__main__':\n"
        "    results = each_case(work, ['a'], Path(sys.argv[1]), int(sys.argv[2]), workers=2)\n"
        "    next(results)\n"
        "    print('idle', flush=True)\n"
        "    time.sleep(600)\n"
    )
    (tmp_path / "pids").mkdir()
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "parent.py", tmp_path / "pids", "600" if busy else "0"],
        env={**os.environ, "PYTHONPATH": f"{root}:{tmp_path}"},
        stdout=subprocess.PIPE,
    )
    if not busy:
        assert parent.stdout.readline() == b"idle\n"
    _wait_until(lambda: any((tmp_path / "pids").iterdir()), 60)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    (worker,) = [Path("/proc") / pid.name for pid in (tmp_path / "pids").iterdir()]
    try:
        _wait_until(lambda: _is_gone(worker), 10)
    finally:
        if not _is_gone(worker):
            os.kill(int(worker.name), signal.SIGKILL)


def _is_gone(process):
    try:
        return "zombie" in (process / "status").read_text()
    except OSError:
        return True


def _wait_until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("free", "beside", "expected"),
    [
        (None, 10, 3),  # an unknown amount of memory
        (180, 6, 3),  # 144 of 180 are given away; 42 voxels take 42
        (180, 7, 2),
        (100, 38, 1),
        (100, 500, 1),
    ],
)
def test_workers_are_as_many_as_cores_files_and_memory_allow(
    monkeypatch, tmp_path, free, beside, expected
):
    """The largest of three files decides; a fourth is no volume."""
    for name, shape in (("a", (2, 3, 4)), ("b", (2, 3, 7)), ("c", (1, 5, 5))):
        volume.write(Volume(np.zeros(shape, np.uint8), (1, 1, 1)), tmp_path / f"{name}.mha")
    files = sorted(tmp_path.iterdir())
    monkeypatch.setattr(machine, "cpus", lambda: 8)
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: free)
    assert workers_for(files, 1, beside) == expected
    assert workers_for([], 1, beside) == 1
    (tmp_path / "d.nii.gz").write_bytes(b"no volume")
    files = sorted(tmp_path.iterdir())
    assert workers_for(files, 1, 48 if free is None else free) == (4 if free is None else 1)
    monkeypatch.setattr(machine, "cpus", lambda: 2)
    assert workers_for(files, 1, beside) == min(2, expected)


class _Terminal(io.StringIO):
    def isatty(self):
        return True


class _Clock:
    """Each case takes four seconds."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    def cases(self, count):
        for number in range(count):
            self.now += 4.0
            yield number


def test_progress_at_a_terminal_is_one_line_out_of_the_way_of_others(monkeypatch):
    clock, screen = _Clock(), _Terminal()
    monkeypatch.setattr(parallel, "time", clock)
    for number in with_progress(clock.cases(3), 3, "verify", screen):
        screen.write(f"case {number}\n")
    shown = [line.rsplit("\r\x1b[K", 1)[-1] for line in screen.getvalue().split("\n")]
    assert shown == ["case 0", "case 1", "case 2", ""]  # what remains on the screen
    passing = screen.getvalue().replace("\n", "\r\x1b[K").split("\r\x1b[K")
    assert [line for line in passing if line.startswith("verify")] == [
        "verify: 0 of 3 cases",
        "verify: 1 of 3 cases, about 8.0 s left",
        "verify: 2 of 3 cases, about 4.0 s left",
        "verify: 3 of 3 cases",
    ]


def test_progress_elsewhere_is_a_line_every_ten_seconds(monkeypatch):
    clock, log = _Clock(), io.StringIO()
    monkeypatch.setattr(parallel, "time", clock)
    assert list(with_progress(clock.cases(7), 7, "verify", log)) == list(range(7))
    assert log.getvalue() == (
        "verify: 3 of 7 cases, about 16 s left\nverify: 6 of 7 cases, about 4.0 s left\n"
    )
