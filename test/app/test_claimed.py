"""One run at a time writes the results of an output folder."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_bundle

from ichseg.app import results
from ichseg.app.main import main
from ichseg.errors import OutputError
from ichseg.scan import volume

ROOT = Path(__file__).parents[2]
HOLDS = """
import pathlib, sys, time
from ichseg.app import results

with results.claimed(pathlib.Path(sys.argv[1])):
    print("claimed", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def command(tmp_path, scan):
    make_bundle(tmp_path / "weights")
    volume.write(scan, tmp_path / "input" / "a.mha")
    return [
        *("--input", str(tmp_path / "input"), "--output", str(tmp_path / "output")),
        *("--weights", str(tmp_path / "weights"), "--device", "cpu", "--preset", "fast"),
    ]


def test_a_second_run_in_one_output_folder_is_refused(tmp_path, command, capsys):
    output = tmp_path / "output"
    output.mkdir()
    (output / results.JOURNAL).write_text("of the run that is under way")
    with results.claimed(output):
        assert main(command) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == (
            f"error: {output}: another run is writing its results there; wait for its end, or "
            "name another --output"
        )
        assert [path.name for path in output.iterdir()] == [results.JOURNAL]
    assert main(command) == 0
    assert [bool(entry["outputs"]) for entry in json.loads((output / results.FILE).read_text())]


def test_a_killed_run_keeps_nobody_out(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "out")],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    ) as run:  # fmt: skip
        assert run.stdout.readline() == "claimed\n"
        with pytest.raises(OutputError, match="another run"), results.claimed(tmp_path / "out"):
            pass
        run.send_signal(signal.SIGKILL)
    with results.claimed(tmp_path / "out"):
        pass


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(tmp_path, capsys, monkeypatch):
    def lock(handle):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(results, "lock", lock)
    with results.claimed(tmp_path / "out"):
        pass
    assert "out cannot be locked (No locks available): let no other" in capsys.readouterr().err
