"""What a line of the log may hold, and where it goes."""

import itertools
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ichseg.app import console

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nerror: forged.mha", r"a\nerror: forged.mha"),
        ("a\r\x1b[2Kb", r"a\r\x1b[2Kb"),
        ("caf\udce9.mha", r"caf\udce9.mha"),
        ("\u202egpj.mha", r"\u202egpj.mha"),
        ("Käse 5 µm, 头.mha", "Käse 5 µm, 头.mha"),
    ],
)
def test_a_line_stays_one_line(capsys, text, line):
    console.say(text)
    assert capsys.readouterr().err == line + "\n"
    assert console.fail(text) == 1
    assert capsys.readouterr().err == f"error: {line}\n"


def test_no_thread_says_anything_after_the_reason_of_the_end():
    """The platform shows the last line."""
    code = (
        "import os, threading, time; from ichseg.app import console; end = os._exit;"
        "os._exit = lambda status: (time.sleep(0.1), end(status));"  # as on a busy machine
        "talk = lambda: [console.say('a line') for _ in iter(int, 1)];"
        "[threading.Thread(target=talk, daemon=True).start() for _ in range(4)];"
        "time.sleep(0.1); console.end_with('stopped', 7)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 7
    assert done.stderr.endswith("a line\nerror: stopped\n")


def test_a_traceback_can_forge_no_last_line(capsys):
    try:
        raise ValueError("a\nerror: forged")
    except ValueError:
        console.say_traceback()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "  | Traceback (most recent call last):"
    assert all(line.startswith("  | ") for line in lines)


@pytest.mark.parametrize("closed", ["2>&-", "1>&- 2>&-", "0<&- 1>&- 2>&-"])
def test_streams_that_were_closed_are_none_that_a_file_gets(tmp_path, closed):
    code = (
        "import os, sys; from ichseg.app import console, start; start.ensure_streams(); "
        f"opened = os.open({str(tmp_path / 'mask')!r}, os.O_WRONLY | os.O_CREAT); "
        "os.write(2, b'a library says so'); console.say('a line'); "
        "sys.exit(opened)"
    )
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code], cwd=ROOT, check=False
    )
    assert done.returncode == 3
    assert (tmp_path / "mask").read_bytes() == b""


def test_no_file_gets_the_number_of_a_stderr_that_was_closed_in_between(tmp_path):
    code = (
        "import os, sys; from ichseg.app import console; os.close(2); console.say('a line'); "
        f"sys.exit(os.open({str(tmp_path / 'mask')!r}, os.O_WRONLY | os.O_CREAT))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert done.returncode == 3


def told(monkeypatch, capsys, steps):
    """What is said of these passes, each of them seconds after the one before."""
    clock = itertools.accumulate([0.0, *(seconds for seconds, _ in steps)])
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    progress = console.Progress()
    for _, done in steps:
        progress(done, 16)
    return capsys.readouterr().err.splitlines()


def test_progress_that_begins_anew_on_another_device_goes_on(monkeypatch, capsys):
    """A GPU whose memory is full gives the case to the CPU, which begins with the first pass."""
    steps = [(0.0, 4), (2.0, 8), (2.0, 12), (1.0, 4), (4.0, 8), (4.0, 16)]
    assert told(monkeypatch, capsys, steps) == [
        "  16 forward passes, about 4.0 s", "  16 forward passes, about 8.0 s"
    ]  # fmt: skip


def test_a_time_is_told_by_a_second_of_passes_not_by_the_first_of_them(monkeypatch, capsys):
    """The first is not even counted, and one more may be quick by chance."""
    steps = [(3.0, 1), (0.1, 2), (0.4, 3), (0.6, 4), (0.4, 5), (0.4, 16)]
    assert told(monkeypatch, capsys, steps) == ["  16 forward passes, about 4.4 s"]


def test_of_passes_that_take_less_than_a_second_nothing_is_said(monkeypatch, capsys):
    assert told(monkeypatch, capsys, [(3.0, 1), (0.4, 8), (0.5, 16)]) == []
