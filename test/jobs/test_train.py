"""The `train` command: folds one after another, and what ends them."""

import argparse
import dataclasses
import errno
import logging
import os
import signal

import pytest
import torch
from conftest import PLANS
from helpers.workspaces import QUICK, make_workspace

from ichseg.errors import TrainingError
from training.__main__ import main as command
from training.data import dataset
from training.jobs import train
from training.jobs.job_log import logged_to
from training.jobs.train import parse_folds, run_fold, train_in_sequence


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_memory_that_runs_out_in_a_validation_stops_no_other_fold(
    fresh, monkeypatch, capsys, error
):
    validated = []

    def validate(workspace, run, **_):
        validated.append(run.fold)
        if run.fold == "0":
            raise error
        return True

    monkeypatch.setattr(train, "validate", validate)
    line = f"""
        train 3d_fullres --workspace {fresh} --folds 0,1 --device cpu --epochs 1 --workers 0
        --batches-per-epoch 1 --validation-batches 1 --threads 1
    """
    assert command(line.split()) == 1
    assert validated == ["0", "1"]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: 1 of 2 folds failed: fold 0: ")
    assert "out of memory on cpu while segmenting the validation cases; the training has" in last


@pytest.mark.parametrize(
    ("labels", "held", "absent"),
    [
        (("hemorrhage",), (), ""),
        (("hemorrhage", "core"), (), "core"),
        (("bleed", "core"), ((1, 2), (2,)), "core"),
    ],
)
def test_a_label_that_no_case_has_which_trains_a_fold_is_said(
    tmp_path, monkeypatch, caplog, labels, held, absent
):
    """A rare label may be in the validation cases alone, or in none."""
    monkeypatch.setattr(train, "train_fold", lambda *_, **__: True)
    regions = (1, 2) if held else ()
    plans = dataclasses.replace(
        PLANS, labels=("background", *labels), regions=regions, region_labels=held
    )
    workspace = make_workspace(tmp_path, plans=plans)
    if held:
        listed = dataset.load_dataset(workspace)
        named = dataclasses.replace(listed, regions=regions, region_labels=held)
        dataset.save_dataset(named, workspace)
    assert run_fold(workspace, "3d_fullres", "0", QUICK)
    said = [r.getMessage() for r in caplog.records if "does not learn" in r.getMessage()]
    expected = f"fold_0: none of the 4 cases that train it has {absent}, which its network does not"
    assert len(said) == bool(absent)
    assert all(expected in line for line in said)


@pytest.mark.parametrize(
    ("more", "said"), [([], "same command goes on"), (["--restart"], "without --restart goes on")]
)
@pytest.mark.parametrize("part", ["train_fold", "validate"])
def test_what_was_stopped_goes_on_without_a_restart(fresh, monkeypatch, caplog, more, said, part):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(train, "train_fold", lambda *_, **__: True)

    def stopped(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        return False

    monkeypatch.setattr(train, part, stopped)
    line = ["train", "3d_fullres", "--workspace", str(fresh), "--fold", "0", "--device", "cpu"]
    assert command([*line, *more]) == 75
    assert f"{said} from here" in caplog.text.splitlines()[-1]


def test_a_log_that_cannot_be_written_is_said_once(tmp_path, monkeypatch, caplog, capsys):
    caplog.set_level(logging.INFO)
    path = tmp_path / "train.log"
    log = logging.getLogger("training")
    with logged_to(path):
        (handler,) = (
            h for h in logging.getLogger().handlers if getattr(h, "baseFilename", "") == str(path)
        )
        monkeypatch.setattr(handler.stream, "write", full, raising=False)
        log.info("one")
        log.info("two")
    assert caplog.text.count("train.log: cannot write ([Errno 28] No space left on device)") == 1
    assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(TrainingError), logged_to(path):
        raise TrainingError("later")


def full(_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_in_sequence_a_fold_that_fails_stops_no_other(caplog):
    trained = []

    def train_fold(fold):
        trained.append(fold)
        if fold == "1":
            raise TrainingError("the loss is nan")
        return ""

    with pytest.raises(TrainingError, match="1 of 3 folds failed: fold 1: the loss is nan"):
        train_in_sequence(["0", "1", "2"], train_fold)
    assert trained == ["0", "1", "2"]
    assert "fold 1 failed: the loss is nan" in caplog.text
    with pytest.raises(TrainingError, match=r"^the loss is nan"):  # alone: as it is
        train_in_sequence(["1"], train_fold)


def test_in_sequence_a_signal_ends_all():
    trained = []

    def train_fold(fold):
        trained.append(fold)
        return "SIGTERM" if fold == "1" else ""

    assert train_in_sequence(["0", "1", "2"], train_fold) == "SIGTERM"
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
