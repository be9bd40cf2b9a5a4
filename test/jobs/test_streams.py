"""The training half's commands when their streams are closed, full, or read by nobody."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.datasets import write_msd


def run(shell, *words):
    """The exit status of a command, and what it wrote to both streams, as a shell redirects it."""
    line = [sys.executable, "-m", "training", *map(str, words)]
    done = subprocess.run(
        ["bash", "-c", shell, "bash", *line], cwd=Path(__file__).parents[2], capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("redirected", "expected", "last"),
    [
        ('"$@" | true; exit ${PIPESTATUS[0]}', 141, ""),
        ('"$@" > /dev/full', 1, "error: standard output: No space left on device"),
    ],
)
def test_a_line_that_nobody_gets_is_no_traceback(tmp_path, redirected, expected, last):
    dataset = write_msd(tmp_path / "Task01_Tiny", ("a", "b"))
    status, told = run(redirected, "convert", dataset, "--workspace", tmp_path / "ws")
    assert status == expected
    assert "Traceback" not in told
    assert "Exception" not in told
    assert not last or told.splitlines()[-1] == last


@pytest.mark.parametrize(
    ("closed", "told"),
    [(">&-", "dataset.json: no such file"), ("2>&-", ""), (">&- 2>&-", "")],
)
def test_closed_streams_do_no_harm(tmp_path, closed, told):
    status, found = run(f'"$@" {closed}', "verify", "--workspace", tmp_path)
    assert status == 1
    assert told in found
    assert found.count("\n") == bool(told)
