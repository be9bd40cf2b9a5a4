import argparse
import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from ichseg.errors import TrainingError
from training.jobs.queue import claimed, find_gpus, parse_folds, train_in_sequence, train_on_gpus


def python(code, *arguments):
    """A command factory: runs code that has the fold's name and then these as its arguments."""
    return lambda fold: [sys.executable, "-c", code, fold, *map(str, arguments)]


def events(folder):
    """What the processes below noted, in order of time."""
    noted = [path.read_text().split() for path in folder.glob("*.event")]
    return [words for _, *words in sorted((float(when), *words) for when, *words in noted)]


NOTE = """
import os, sys, time
fold, folder = sys.argv[1:3]
def note(what):
    gpu = os.environ["CUDA_VISIBLE_DEVICES"]
    with open(f"{folder}/{fold}.{what}", "w") as stream:
        stream.write(f"{time.monotonic()} {what} {fold} {gpu}")
    os.rename(stream.name, stream.name + ".event")
"""


def test_each_gpu_takes_the_next_fold_when_it_is_free(tmp_path):
    # fold 0 ends when all others have begun: the other GPU has to take them one after another
    code = NOTE + (
        "note('begin')\n"
        "while fold == '0' and not os.path.exists(f'{folder}/3.end.event'): time.sleep(0.01)\n"
        "note('end')\n"
    )
    assert train_on_gpus(list("0123"), ["7", "5"], python(code, tmp_path), io.StringIO())
    found = events(tmp_path)
    assert ["begin", "0", "7"] in found
    assert [e for e in found if e[1] != "0"] == [
        [what, fold, "5"] for fold in "123" for what in ("begin", "end")
    ]
    assert found[-1] == ["end", "0", "7"]


def test_lines_are_whole_and_say_whose_they_are():
    # written in pieces, of both streams, without an end of line at the end
    code = (
        "import sys, time\n"
        "for part in ('first ', 'line\\nsec', 'ond'):\n"
        "    sys.stderr.write(part); sys.stderr.flush(); time.sleep(0.05)\n"
    )
    heard = io.StringIO()
    assert train_on_gpus(["3", "4"], ["0", "1"], python(code), heard)
    lines = heard.getvalue().splitlines()
    assert sorted(lines) == [
        f"fold {fold}: {text}" for fold in "34" for text in ("first line", "second")
    ]


def test_a_fold_that_fails_stops_no_other_and_is_named(tmp_path):
    code = NOTE + (
        "note('begin')\n"
        "if fold == '1': sys.exit('error: the loss is nan')\n"
        "if fold == '2': os.kill(os.getpid(), 9)\n"
        "if fold == '3': sys.exit(130)\n"
        "if fold == '4': sys.exit(3)\n"
    )
    with pytest.raises(TrainingError) as caught:
        train_on_gpus(list("012345"), ["0"], python(code, tmp_path), io.StringIO())
    assert str(caught.value) == (
        "4 of 6 folds failed: fold 1: the loss is nan; "
        "fold 2: was killed by SIGKILL, perhaps for want of memory; "
        "fold 3: was interrupted; fold 4: ended with status 3"
    )
    assert [words[1] for words in events(tmp_path)] == list("012345")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_every_process_once_and_none_begins_after(tmp_path, number):
    code = NOTE + (
        "import signal\n"
        "told = []\n"
        "for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):\n"
        "    signal.signal(number, lambda number, _: told.append(number))\n"
        "note(f'begin-{os.getsid(0) == os.getpid()}')\n"
        "while not told: time.sleep(0.01)\n"
        "time.sleep(0.2)\n"
        "note('told-' + '-'.join(str(int(number)) for number in told))\n"
        "sys.exit(130)\n"
    )

    def interrupt():
        until = time.monotonic() + 60
        while len(events(tmp_path)) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=interrupt)
    thread.start()
    assert not train_on_gpus(["0", "1", "2"], ["0", "1"], python(code, tmp_path), io.StringIO())
    thread.join()
    assert signal.getsignal(number) is before
    # a session of its own: what a terminal sends to this one does not reach it besides
    assert sorted(words[:2] for words in events(tmp_path)) == [
        ["begin-True", "0"],
        ["begin-True", "1"],
        ["told-15", "0"],
        ["told-15", "1"],
    ]


def test_processes_end_when_something_goes_wrong_here(tmp_path):
    class Closed(io.StringIO):
        def write(self, _):
            raise BrokenPipeError("closed")

    code = NOTE + "note(os.getpid()); print('begun', flush=True); time.sleep(60)"
    with pytest.raises(BrokenPipeError):
        train_on_gpus(["0"], ["0"], python(code, tmp_path), Closed())
    ((pid, _, _),) = events(tmp_path)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_a_signal_that_comes_while_a_process_begins_reaches_it(monkeypatch):
    real, begun = subprocess.Popen, []

    def begin(*args, **options):
        begun.append(real(*args, **options))
        if len(begun) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return begun[-1]

    monkeypatch.setattr(subprocess, "Popen", begin)
    began = time.monotonic()
    code = "import time; time.sleep(60)"
    assert not train_on_gpus(["0", "1"], ["0", "1"], python(code), io.StringIO())
    assert time.monotonic() - began < 30


def test_in_sequence_a_fold_that_fails_stops_no_other(caplog):
    trained = []

    def train(fold):
        trained.append(fold)
        if fold == "1":
            raise TrainingError("the loss is nan")
        return True

    with pytest.raises(TrainingError, match="1 of 3 folds failed: fold 1: the loss is nan"):
        train_in_sequence(["0", "1", "2"], train)
    assert trained == ["0", "1", "2"]
    assert "fold 1 failed: the loss is nan" in caplog.text
    with pytest.raises(TrainingError, match=r"^the loss is nan"):  # alone: as it is
        train_in_sequence(["1"], train)


def test_in_sequence_a_signal_ends_all():
    trained = []

    def train(fold):
        trained.append(fold)
        return fold != "1"

    assert not train_in_sequence(["0", "1", "2"], train)
    assert trained == ["0", "1"]


def test_folds_are_numbers():
    assert parse_folds("0, 3,1") == ("0", "3", "1")
    for text, message in (
        ("0,all", "--fold all trains one network on every case"),
        ("0,,1", "expected numbers separated by commas"),
        ("-1", "expected numbers separated by commas"),
        ("1,2,01", "names a fold twice"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            parse_folds(text)


def test_gpus_are_those_that_are_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert find_gpus("1,0") == ("1", "0")
    for text, message in (
        ("0,2", "no GPU 2; this machine has 2, counted from 0"),
        ("0,0", "names a GPU twice"),
        ("0;1", "expected numbers separated by commas"),
        ("", "expected numbers separated by commas"),
    ):
        with pytest.raises(TrainingError, match=message):
            find_gpus(text)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6, 4")
    assert find_gpus("1") == ("4",)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(TrainingError, match="no GPU 0; no GPU works here"):
        find_gpus("0")


def test_two_processes_cannot_train_one_fold(tmp_path):
    code = (
        "import fcntl, sys\n"
        "stream = open(sys.argv[1] + '/.lock', 'w')\n"
        "fcntl.flock(stream, fcntl.LOCK_SH)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with claimed(tmp_path):
        pass
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout.readline() == b"locked\n"
    with pytest.raises(TrainingError, match="another process is training"), claimed(tmp_path):
        pass
    other.communicate()
    with claimed(tmp_path):
        pass
