"""What is measured on a GPU: what matters comes first, and what is cut off keeps its figures."""

import argparse
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import gpu, gpu_cases, gpu_inference, gpu_plain, gpu_training, rows
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


def tell_all(measured, told):
    for row in measured:
        told.append(row.row)


def test_plain_torch_is_measured_before_it_is_compiled(tmp_path, monkeypatch):
    """Compiling may fail, or take until the part is ended."""
    for kind in (gpu_plain.Trainer, gpu_plain.Predictor):
        monkeypatch.setattr(kind, "compile", lambda _: cut_off())
    monkeypatch.setattr(gpu_plain.Trainer, "step", lambda _: 0.0)
    monkeypatch.setattr(gpu_plain.Predictor, "segment", lambda *_: (np.zeros(1), 7))
    monkeypatch.setattr(gpu_inference, "forward_passes", lambda *_: 7)
    for measure, name in (
        (gpu_training.measure_plain, "training, plain torch, fp16, one iteration"),
        (gpu_inference.measure_plain, "inference, plain torch, one case"),
    ):
        told = []
        with pytest.raises(KeyboardInterrupt):
            tell_all(measure(place(tmp_path), None, compiled=True), told)
        assert name in told


def test_all_tiles_of_plain_torch_have_the_same_strides(tmp_path):
    """Others are compiled for anew."""
    plan = gpu_cases.as_json(gpu_cases.planned(place(tmp_path)))
    predictor, given = gpu_plain.Predictor(plan, torch.device("cpu")), []

    def network(tile):
        given.append(tile.stride())
        return [torch.zeros(1, 2, *tile.shape[2:])]

    predictor.network = network
    _, passes = predictor._logits(torch.zeros(1, *gpu_cases.TINY_SHAPE))
    assert len(given) == passes > 8
    assert len(set(given)) == 1


def test_tests_that_do_not_end_are_told_before_anybody_waits_for_them(tmp_path, monkeypatch):
    class Endless:
        def wait(self, timeout=None):
            if timeout is None:
                cut_off()
            raise subprocess.TimeoutExpired("pytest", timeout)

        def send_signal(self, _):
            pass

    monkeypatch.setattr(gpu.subprocess, "Popen", lambda *_, **__: Endless())
    work = gpu.Work(tmp_path, "cuda", tiny=True, rate_tflops=None, seconds=20, tell=print)
    measured = gpu.run_tests(work)
    row = next(measured)
    assert (row.row, row.ok) == ("tests, STOPPED before their end", False)
    with pytest.raises(KeyboardInterrupt):
        next(measured)


def test_the_bar_of_inference_is_held_against_the_networks_alone():
    case = "inference, ours, one case"
    told = {
        case: 20,
        f"{case}, share of the bf16 rate": 20,
        f"{case}, networks alone, share of the bf16 rate": 50,
        "inference, plain torch, one case": 60,
        "inference, plain torch compiled, one case": 50,
    }
    found = gpu.verdicts([informs(name, value, "") for name, value in told.items()], tiny=False)
    assert [(row.row, row.ours, row.rival, row.ok) for row in found] == [
        (f"{case} / plain torch", 20, 50, True),
        (f"{case}, networks alone, share of the bf16 rate", 50, None, True),
    ]


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
