"""Cases through several processes: masks and results as from one, whatever dies."""

import contextlib
import json
import multiprocessing
import os
import signal

import pytest
from conftest import make_bundle
from helpers.cluster_runs import make_scans, masks

from ichseg.app import console, pipeline
from ichseg.app import main as program
from ichseg.app.cases import find_cases
from ichseg.app.crew import processes, spread
from ichseg.app.crew.desk import Desk
from ichseg.app.crew.worker import Setting
from ichseg.app.one_case import Options
from ichseg.app.results import FILE, JOURNAL
from ichseg.errors import DeviceError, WeightsError

MADE_FROM = {"version": "0", "model_sha256": "0", "preset": "fast", "time_budget_s": None}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Six scans, one of which is damaged."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # sums in the same order everywhere
    make_scans(tmp_path, 5, (6, 24, 24))
    return tmp_path


def by_crew(place, output, *, weights="weights", resume=False):
    """The results of a run by two processes on the CPU, by name."""
    job = find_cases(place / "in", place / output, input_slug="a", output_slug="b")
    options = Options(place / output, "fast", resume=resume, made_from=MADE_FROM)
    setting = Setting(place / weights, "torch-cpu", "float32", options)
    with processes.begun(setting, [{}, {}]) as begun:
        pipeline.run(job, spread.means(setting, *begun), options)
    return {
        entry["inputs"][0]["filename"]: entry
        for entry in json.loads((place / output / FILE).read_text())
    }


def without_times(entries, output):
    """Results without seconds, and what they were made from."""
    kept = []
    for entry in entries:
        report = {k: v for k, v in entry["report"].items() if k not in ("seconds", "made_from")}
        errors = [text.replace(f"/{output}/", "/") for text in entry["error_messages"]]
        kept.append({**entry, "report": report, "error_messages": errors})
    return kept


def test_several_processes_make_what_one_makes(place, capsys):
    line = ["--input", str(place / "in"), "--output", str(place / "alone"), "--weights",
            str(place / "weights"), "--preset", "fast", "--device", "torch-cpu"]  # fmt: skip
    assert program.main(line) == 1  # one is damaged
    expected = json.loads((place / "alone" / FILE).read_text())
    capsys.readouterr()
    found = by_crew(place, "crew")
    said = capsys.readouterr().err
    assert masks(place / "crew") == masks(place / "alone")
    assert len(masks(place / "crew")) == 5
    assert without_times(found.values(), "crew") == without_times(expected, "alone")
    assert list(found) == sorted(found)  # in the order of the cases
    assert not (place / "crew" / JOURNAL).exists()
    assert not list((place / "crew").glob(".writing-*"))
    assert said.count("bad.mha: failed: ") == 1
    assert said.count(" -> ") == 5  # what each case's worker said of it


def test_killed_processes_cost_no_case_and_others_take_their_places(place, capsys, monkeypatch):
    take, killed = Desk.take, []

    def take_and_die(desk, worker):
        """The first case is handed out, and nobody lives to do it."""
        task = take(desk, worker)
        if task is not None and not killed:
            killed.extend(multiprocessing.active_children())
            for process in killed:
                os.kill(process.pid, signal.SIGKILL)
        return task

    monkeypatch.setattr(Desk, "take", take_and_die)
    found = by_crew(place, "crew")
    assert len(killed) == 2
    assert len(found) == 6
    assert sorted(name for name, entry in found.items() if entry["error_messages"]) == ["bad.mha"]
    assert len(masks(place / "crew")) == 5
    assert " died (its process ended with status -9)" in capsys.readouterr().err


def test_it_goes_on_with_an_earlier_run(place, capsys):
    by_crew(place, "crew")
    before = {path: path.stat().st_mtime_ns for path in (place / "crew").glob("*.mha")}
    (place / "crew" / "002.mha").unlink()
    found = by_crew(place, "crew", resume=True)
    after = {path: path.stat().st_mtime_ns for path in (place / "crew").glob("*.mha")}
    assert [path.name for path in after if before[path] != after[path]] == ["002.mha"]
    assert len(found) == 6
    assert "4 of 6 cases are finished already" in capsys.readouterr().err


def test_a_bundle_that_cannot_be_run_ends_the_run(place):
    broken = place / "broken"
    make_bundle(broken)
    next(broken.glob("*.safetensors")).write_bytes(b"damaged")
    with pytest.raises(WeightsError):
        by_crew(place, "crew", weights="broken")


def test_a_gpu_that_is_not_there_ends_the_run(place):
    options = Options(place / "crew", "fast", made_from=MADE_FROM)
    setting = Setting(place / "weights", "cuda", "auto", options)
    with pytest.raises(DeviceError), contextlib.ExitStack() as stack:  # noqa: PT012
        environment = {"CUDA_VISIBLE_DEVICES": ""}
        spread.means(setting, *stack.enter_context(processes.begun(setting, [environment])))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "0", "--device", "cpu"], "--gpus and --device cpu exclude each other"),
        (["--gpus", "0", "--api", "invoke"], "--gpus and --api invoke exclude each other"),
        (["--gpus", "0", "--time-budget", "5m"], "--gpus and --time-budget exclude each other"),
        (["--ray-cpus", "4"], "--ray-cpus is of no use without --ray"),
    ],
)
def test_flags_that_make_no_sense_are_refused(capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        program.main(flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def last_line(place, capsys, *more):
    line = ["--input", str(place / "in"), "--output", str(place / "out"), "--weights",
            str(place / "weights"), *more]  # fmt: skip
    assert program.main(line) == 1
    return capsys.readouterr().err.splitlines()[-1]


def test_gpus_that_are_not_there_are_refused_in_a_line(place, monkeypatch, capsys):
    monkeypatch.setattr("ichseg.engine.gpus.count", lambda: 1)
    last = last_line(place, capsys, "--gpus", "0,1")
    assert last == "error: --gpus 0,1: no GPU 1; this machine has 1, counted from 0"


def test_lines_can_be_given_to_somebody_else(capsys):
    lines = []
    console.divert(lines.append)
    console.say("a\nb")
    console.divert(None)
    console.say("c")
    assert lines == ["a\\nb"]
    assert capsys.readouterr().err.endswith("c\n")
    assert "a" not in capsys.readouterr().err
