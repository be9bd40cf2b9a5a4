"""The `train` command: folds as jobs."""

import errno
import fcntl
import logging

import pytest
import torch

from ichseg.errors import TrainingError
from training.__main__ import main as command
from training.jobs import train
from training.jobs.job_log import logged_to
from training.jobs.queue import claimed


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


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claimed(tmp_path):
        pass
    assert f"{tmp_path} cannot be locked (No locks available); see to it that no" in caplog.text


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
