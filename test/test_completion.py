"""What the TAB key of a shell is answered, as argcomplete's own shell functions ask."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def completed(tmp_path, line, program, first):
    """What is offered at the end of a command line, of which the shell knows where it begins."""
    answer = tmp_path / "answer"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "_ARGCOMPLETE": str(first),
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    command = [sys.executable, *program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
    return answer.read_text().split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python process.py --prec", {"--precision"}),
        ("python process.py --input scans --preset b", {"balanced"}),
        ("python process.py comp", {"compare-scans"}),
        ("python process.py compare-scans --m", {"--masks"}),
        ("python process.py compare-scans a b --device torch", {"torch-cpu"}),
    ],
)
def test_the_program(tmp_path, line, expected):
    assert set(completed(tmp_path, line, ["process.py"], 2)) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python -m training ex", {"export", "export-nnunet"}),
        ("python -m training train --top", {"--top-k-fraction"}),
        ("python -m training evaluate --empty ", {"instance", "diagonal", "null"}),
    ],
)
def test_training(tmp_path, line, expected):
    assert set(completed(tmp_path, line, ["-m", "training"], 3)) == expected


def test_without_a_shell_that_asks_nothing_happens(monkeypatch):
    from ichseg import completion

    def fail(words):
        raise AssertionError("asked")

    monkeypatch.delenv("_ARGCOMPLETE", raising=False)
    completion.answer(fail)
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    monkeypatch.delenv("COMP_LINE", raising=False)
    completion.answer(fail)
