"""A training that is killed at any moment ends as one that was not."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CONFIGURATION
from helpers.workspaces import same_run

from training.__main__ import main as command
from training.data.workspace import LATEST_CHECKPOINT
from training.fit.checkpoint import read_checkpoint

ROOT = Path(__file__).parents[2]


def train_line(workspace, recipe, workers):
    """A training with batchgenerators' augmentation in nearly every sample."""
    line = f"""
        train 3d_fullres --workspace {workspace} --fold 0 --recipe {recipe} --epochs 12
        --batches-per-epoch 4 --validation-batches 1 --learning-rate 0.001 --threads 1
        --workers {workers} --device cpu --no-validation --elastic-probability 0.3
        --elastic-alpha-2d 0 50 --rotation-probability 0.7 --scaling-probability 0.7
        --gamma-probability 0.7 --noise-probability 0.5 --blur-probability 0.5
    """
    return line.split()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["msd2018", "nnunetv2"])
def test_a_killed_run_ends_as_an_unbroken_one(shared_workspace, tmp_path, recipe, caplog):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    for folder in (unbroken, killed):
        folder.mkdir()
        for entry in shared_workspace.iterdir():
            if entry.name != "runs":
                (folder / entry.name).symlink_to(entry)
    latest = "runs/3d_fullres/fold_0/" + LATEST_CHECKPOINT
    with subprocess.Popen(
        [sys.executable, "-m", "training", *train_line(killed, recipe, 2)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while not (killed / latest).exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        time.sleep(random.Random(recipe).uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert read_checkpoint(killed / latest, CONFIGURATION)["finished"] is None
    with caplog.at_level("INFO"):
        assert command(train_line(killed, recipe, 1)) == 0
    assert "going on after epoch" in caplog.text
    assert command(train_line(unbroken, recipe, 0)) == 0  # who makes the batches changes nothing
    ends = [read_checkpoint(folder / latest, CONFIGURATION) for folder in (killed, unbroken)]
    assert [end["finished"] for end in ends] == ["all 12 epochs done"] * 2
    same_run(*ends)
    assert not list((killed / latest).parent.glob(".writing-*"))
