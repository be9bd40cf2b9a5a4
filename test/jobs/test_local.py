"""Jobs as processes of this machine; the package ``training`` that they run is made up."""

import io
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ichseg.errors import TrainingError
from training import __main__ as program
from training.data.workspace import job_log
from training.jobs import board, command, queue
from training.jobs.board import Board
from training.jobs.job import Job
from training.jobs.places import local
from training.jobs.places.local import ThisMachine
from training.jobs.signals import Signals

NOTE = """
import os, signal, sys, time
fold, folder = sys.argv[sys.argv.index("--fold") + 1], sys.argv[2]
def note(what):
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    with open(f"{folder}/{fold}.{what}", "w") as stream:
        stream.write(f"{time.monotonic()} {what} {fold} {gpu}")
    os.rename(stream.name, stream.name + ".event")
"""


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Gives a function that decides what the command does."""
    root = tmp_path / "root"
    (root / "training").mkdir(parents=True)
    (root / "training" / "__init__.py").write_text("")
    monkeypatch.setattr(local, "ROOT", str(root))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return lambda code: (root / "training" / "__main__.py").write_text(code)


def trainings(folder, folds):
    return [Job("train", (str(folder), "--fold", fold), "3d", fold) for fold in folds]


def work(workspace, jobs, gpus=(), watcher=None):
    """Whether all were done."""
    watcher = Board() if watcher is None else watcher
    with (
        ThisMachine(workspace, gpus, watcher.begins, watcher.hear) as place,
        Signals(lambda _: place.stop(), local.SIGNALS) as signals,
    ):
        return queue.work(jobs, lambda _: "", place, watcher, stopped=signals.came)


def events(folder):
    """What the processes noted, in order of time."""
    noted = [path.read_text().split() for path in folder.glob("*.event")]
    return [words for _, *words in sorted((float(when), *words) for when, *words in noted)]


def test_each_gpu_takes_the_next_fold_when_it_is_free(tmp_path, made_up):
    # fold 0 ends when all others have begun: the other GPU has to take them one after another
    made_up(
        NOTE + "note('begin')\n"
        "while fold == '0' and not os.path.exists(f'{folder}/3.end.event'): time.sleep(0.01)\n"
        "note('end')\n"
    )
    assert work(tmp_path, trainings(tmp_path, "0123"), ["7", "5"])
    found = events(tmp_path)
    of_first = {e[2] for e in found if e[1] == "0"}
    assert len(of_first) == 1
    other = {"7": "5", "5": "7"}[of_first.pop()]
    assert [e for e in found if e[1] != "0"] == [
        [what, fold, other] for fold in "123" for what in ("begin", "end")
    ]
    assert found[-1][:2] == ["end", "0"]


def test_without_gpus_to_share_jobs_run_one_at_a_time(tmp_path, made_up):
    made_up(NOTE + "note('begin'); time.sleep(0.05); note('end')")
    assert work(tmp_path, trainings(tmp_path, "012"))
    assert [e[:2] for e in events(tmp_path)] == [
        [what, fold] for fold in "012" for what in ("begin", "end")
    ]


def test_what_needs_no_gpu_runs_beside_trainings_and_sees_all_gpus(tmp_path, made_up):
    # each waits for the other to have begun
    made_up(
        NOTE + "note('begin')\n"
        "other = {'0': '1', '1': '0'}[fold]\n"
        "while not os.path.exists(f'{folder}/{other}.begin.event'): time.sleep(0.01)\n"
    )
    page = Job("report", (str(tmp_path), "--fold", "1"))
    assert work(tmp_path, [*trainings(tmp_path, "0"), page], ["3"])
    assert sorted(events(tmp_path), key=len) == [["begin", "1"], ["begin", "0", "3"]]


def test_lines_are_whole_say_whose_they_are_and_are_kept(tmp_path, made_up, caplog):
    # written in pieces, of both streams, without an end of line at the end
    made_up(
        "import sys, time\n"
        "for part in ('first ', 'line\\nsec', 'ond'):\n"
        "    sys.stderr.write(part); sys.stderr.flush(); time.sleep(0.05)\n"
        "print(' \\u00e9', end='')\n"
    )
    with caplog.at_level(logging.INFO):
        assert work(tmp_path, trainings(tmp_path, "34"), ["0", "1"])
    said = [message for message in caplog.messages if re.match(r"train 3d \d: (?!begins)", message)]
    assert sorted(said) == [
        f"train 3d {fold}: {text}" for fold in "34" for text in ("first line", "second \u00e9")
    ]
    for fold in "34":
        lines = job_log(tmp_path, f"train 3d {fold}").read_text().splitlines()
        assert [line[20:] for line in lines] == ["first line", "second \u00e9"]
        assert time.strptime(lines[0][:19], "%Y-%m-%d %H:%M:%S")


def test_how_a_job_failed_is_said(tmp_path, made_up):
    made_up(
        NOTE + "note('begin')\n"
        "if fold == '1': sys.exit('error: the loss is nan')\n"
        "if fold == '2': os.kill(os.getpid(), 9)\n"
        "if fold == '3': sys.exit(75)\n"
        "if fold == '4': sys.exit(3)\n"
    )
    with pytest.raises(TrainingError) as caught:
        work(tmp_path, trainings(tmp_path, "012345"), ["0"])
    assert str(caught.value) == (
        "4 of 6 jobs failed: train 3d 1: the loss is nan; "
        "train 3d 2: was killed by SIGKILL, perhaps for want of memory; "
        "train 3d 3: was interrupted; train 3d 4: ended with status 3"
    )
    assert [words[1] for words in events(tmp_path)] == list("012345")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_reaches_every_process_once_and_none_begins_after(tmp_path, made_up, number):
    made_up(
        NOTE + "told = []\n"
        "for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):\n"
        "    signal.signal(number, lambda number, _: told.append(number))\n"
        "note(f'begin-{os.getsid(0) == os.getpid()}')\n"
        "while not told: time.sleep(0.01)\n"
        "time.sleep(0.2)\n"
        "note('told-' + '-'.join(str(int(number)) for number in told))\n"
        "sys.exit(75)\n"
    )

    def interrupt():
        until = time.monotonic() + 60
        while len(events(tmp_path)) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert not work(tmp_path, trainings(tmp_path, "012"), ["0", "1"])
    thread.join()
    assert signal.getsignal(number) is before
    # a session of its own: what a terminal sends to this one does not reach it besides
    assert sorted(words[:2] for words in events(tmp_path)) == [
        ["begin-True", "0"],
        ["begin-True", "1"],
        ["told-15", "0"],
        ["told-15", "1"],
    ]


def test_a_signal_that_comes_while_a_process_begins_reaches_it(tmp_path, made_up, monkeypatch):
    made_up("import time; time.sleep(60)")
    real, begun = subprocess.Popen, []

    def begin(*args, **options):
        begun.append(real(*args, **options))
        if len(begun) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return begun[-1]

    monkeypatch.setattr(subprocess, "Popen", begin)
    began = time.monotonic()
    assert not work(tmp_path, trainings(tmp_path, "01"), ["0", "1"])
    assert time.monotonic() - began < 30


def test_a_process_ends_when_its_lines_cannot_be_kept(tmp_path, made_up):
    made_up(NOTE + "note(os.getpid()); print('begun', flush=True); time.sleep(60)")
    (tmp_path / "jobs").write_text("a file where the folder of logs should be")
    with pytest.raises(TrainingError, match=r"train 3d 0: .*output\.log: cannot write"):
        work(tmp_path, trainings(tmp_path, "0"))
    for pid, _ in events(tmp_path):  # unless it was ended before it noted anything
        assert is_gone(int(pid))


def test_jobs_end_with_the_process_that_began_them_even_if_it_is_killed(tmp_path, made_up):
    """A driver that is killed leaves no job behind that another would meet."""
    made_up(
        "import importlib.util, pathlib, sys, time\n"
        f"spec = importlib.util.spec_from_file_location('own', {command.__file__!r})\n"
        "own = sys.modules['own'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(own)\n"
        "own.end_with_parent()\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "time.sleep(600)\n"
    )
    code = (
        "import sys, time\n"
        "from training.jobs import command\n"
        "process = command.begin(sys.argv[2:], sys.argv[1], {})\n"
        "print(process.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    words = [local.ROOT, str(tmp_path / "begun")]
    driver = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    pid = int(driver.stdout.readline())
    while not (tmp_path / "begun").exists():
        assert not is_gone(pid)
        time.sleep(0.05)
    driver.kill()
    driver.communicate()
    until = time.monotonic() + 60
    while not is_gone(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert is_gone(pid)


def test_each_command_asks_whether_it_is_a_job(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(command, "end_with_parent", lambda: asked.append(1))
    assert program.main(["verify", "--workspace", str(tmp_path)]) == 1
    assert asked == [1]


def is_gone(pid):
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (
            "epoch 3/1000  train +0.1  validation +0.2  dice 0.5  lr 1e-2  9.0 s (data wait 0.1 s)"
            "  ETA 2:29:33",
            "epoch 3/1000  ETA 2:29:33",
        ),
        ("validation 2/7  case_2  Dice bleed 0.800  1.2 s  ETA 0:00:06",
         "validation 2/7  ETA 0:00:06"),
        ("preprocess 3d_fullres: 3 of 9 cases, about 20 s left", "3 of 9 cases  about 20 s left"),
        ("verify: 9 of 9 cases", "9 of 9 cases"),
        ("3 of 9 cases are finished already", ""),
        ("training has ended: all 1 epochs done", ""),
    ],
)  # fmt: skip
def test_how_far_a_job_is_stands_in_what_it_says(line, found):
    assert board.how_far(line) == found


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_at_a_terminal_a_table_says_what_runs_where(monkeypatch):
    from rich.console import Console

    monkeypatch.setenv("TERM", "xterm")
    jobs = trainings("x", "012")
    with board.shown(_Terminal()) as watcher:
        watcher.waits(jobs)
        watcher.begins(jobs[0], "GPU 1")
        watcher.begins(jobs[1], "GPU 0")
        watcher.hear(jobs[0], "epoch 3/9  train +0.1  ETA 0:00:09")
        watcher.ended(jobs[1], queue.Ending(1, "the loss is nan"))
        console = Console(file=io.StringIO(), width=100)
        console.print(watcher.table())
        lines = console.file.getvalue().splitlines()
    assert lines[1].split()[:5] == ["train", "3d", "0", "GPU", "1"]
    assert lines[1].rstrip().endswith("epoch 3/9  ETA 0:00:09")
    assert lines[2].split() == ["train", "3d", "1", "failed", "the", "loss", "is", "nan"]
    assert lines[3].strip() == "0 jobs done, 1 waiting: train 3d 2"


def test_elsewhere_there_are_plain_lines(capsys):
    stream = io.StringIO()
    with board.shown(stream) as watcher:
        watcher.waits(trainings("x", "0"))
    assert stream.getvalue() == ""
    assert capsys.readouterr().out == ""
