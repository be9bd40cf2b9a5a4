"""What is measured on a GPU: what matters comes first, and what is cut off keeps its figures."""

import argparse
import subprocess
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_cases, gpu_plain, gpu_training, rows
from benchmarks.gpu import PARTS, Part
from benchmarks.rows import informs

ROOT = Path(__file__).parents[1]


def test_what_has_to_be_known_comes_first_and_fits_into_the_time():
    first = ["card", "samples", "tests", "infer", "infer-plain", "train", "train-plain"]
    assert list(PARTS)[: len(first)] == first
    assert sum(PARTS[name].most_s for name in first) <= 535


class Batches:
    """Batches without an end, which are there at once."""

    waited_s = 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __next__(self):
        return None


def place(tmp_path):
    return gpu_cases.Place(tmp_path, "cpu", tiny=True)


def cut_off():
    raise KeyboardInterrupt


def train(_):
    with gpu_training.loop.open_batches() as stream:
        for _ in iter(stream.__next__, 0):
            pass


def test_a_training_that_is_cut_off_has_told_the_blocks_before(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_training.loop, "train_fold", train)
    monkeypatch.setattr(gpu_training.loop, "open_batches", None)  # and as it was, afterwards
    monkeypatch.setattr(gpu_training, "open_batches", Batches)
    monkeypatch.setattr(gpu_training, "_lengths", lambda _: (3, 3, 2))
    told = []

    def tell(row):
        told.append(row)
        if [row.row for row in told].count(told[0].row) == 2:
            cut_off()

    given = {"layout": "contiguous", "precision": "fp32", "compiled": False}
    with pytest.raises(KeyboardInterrupt):
        gpu_training.measure_ours(place(tmp_path), None, tell, **given)
    name = "training, ours, contiguous fp32"
    assert [row.row for row in told] == [
        f"{name}, one iteration",
        f"{name}, data wait",
        f"{name}, until the first timed iteration",
        f"{name}, one iteration",
    ]


def test_all_blocks_are_timed_after_iterations_that_are_not():
    begun = []

    class Counted(Batches):
        def __next__(self):
            begun.append(len(timed.seconds))

    timed = gpu_training.TimedStream(Counted(), (3, 2, 4), lambda: None)
    with pytest.raises(gpu_training._MeasuredError):
        list(iter(timed.__next__, 0))
    assert begun == [0] * 7 + [1] * 7
    assert len(timed.seconds) == len(timed.waits) == 2


def test_plain_training_that_is_cut_off_has_told_the_blocks_before(tmp_path, monkeypatch):
    class Trainer:
        def __init__(self, *_, **__):
            self.steps = 0

        def step(self):
            self.steps += 1
            if self.steps > 2:  # one to warm up, and a block of one
                cut_off()

    monkeypatch.setattr(gpu_plain, "Trainer", Trainer)
    measured = gpu_training.measure_plain(place(tmp_path), None, compiled=False)
    told = [next(measured).row]
    with pytest.raises(KeyboardInterrupt):
        next(measured)
    assert told == ["training, plain torch, fp16, one iteration"]


def test_a_part_that_is_cut_off_has_kept_its_figures_and_the_last_of_a_name_counts(
    tmp_path, monkeypatch
):
    def measure(work):
        work.tell(informs("told", 1, "s"))
        yield informs("given", 2, "s")
        work.tell(informs("told", 3, "s"))
        cut_off()

    monkeypatch.setitem(PARTS, "card", Part(10, measure))
    args = argparse.Namespace(
        out=tmp_path, work=tmp_path, device="cpu", tiny=True, seconds=9.0, part="card"
    )
    with pytest.raises(KeyboardInterrupt):
        gpu.run_part(args)
    kept = tmp_path / "rows.jsonl"
    assert [(row.row, row.ours) for row in rows.load(kept)] == [
        ("told", 1), ("given", 2), ("told", 3),
    ]  # fmt: skip
    assert [(row.row, row.ours) for row in gpu.results(kept, tiny=True)] == [
        ("told", 3), ("given", 2),
    ]  # fmt: skip


def test_a_driver_that_does_not_answer_ends_nothing(tmp_path):
    """``nvidia-smi`` fails where the driver and its library are of two versions."""
    for name, lines in {"nvidia-smi": "exit 9", "python": "echo measured"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh", "--out", tmp_path],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": "python"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "measured" in done.stdout
