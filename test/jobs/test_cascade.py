"""A run of a cascade: what follows where a label is corrected, or a first stage trained anew."""

import logging
import shutil

import numpy as np
import pytest
from helpers.tiny_runs import ALL_FOLDS, arguments, run_here, stages, write_tiny_task

from ichseg.errors import TrainingError
from ichseg.scan import volume
from training.__main__ import main as command
from training.bundle import rounding
from training.crossval import selection

pytestmark = pytest.mark.usefixtures("one_core")

SETTINGS = [*ALL_FOLDS, "--recipe", "nnunetv2", "--patch", "4,8,8"]
SECOND = "3d_cascade_fullres"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_tiny_task(tmp_path_factory.mktemp("data") / "Task01_Tiny")


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """A workspace after one run of a cascade."""
    workspace = tmp_path_factory.mktemp("whole")
    what_is_done(dataset, workspace)
    return workspace


def what_is_done(dataset, workspace):
    """The lines of the jobs that a run does."""
    done = []

    def execute(words):
        done.append(words)
        return command(words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "MAX_DICE_CHANGE", 1)  # networks of two batches are all ties
        chosen = arguments(dataset, workspace, "--configurations", SECOND, settings=SETTINGS)
        assert run_here(chosen, execute)
    return done


def test_a_corrected_label_leads_on(whole, dataset, tmp_path, caplog):
    """It stopped at the fold of the first stage that makes the case's labels for the second."""
    workspace = shutil.copytree(whole, tmp_path / "copy")
    path = workspace / "raw" / "labels" / "case_2.nii.gz"
    label = volume.read(path)
    volume.write(label.with_voxels(np.roll(label.voxels, 1, axis=1)), path)
    with caplog.at_level(logging.INFO):
        done = what_is_done(dataset, workspace)
    assert stages(done) == [
        "verify", "preprocess", "preprocess", "train", "cross-validate", "select", "export",
        "report",
    ]  # fmt: skip
    assert done[3][1] == "3d_lowres"
    fold = done[3][done[3].index("--fold") + 1]
    said = f"3d_lowres/fold_{fold}/checkpoint_latest.pt: was trained with 1 case whose image or"
    assert said in caplog.text
    selection.require_current(workspace, selection.load(workspace))
    assert what_is_done(dataset, workspace) == []


def test_a_first_stage_trained_anew_is_noticed_before_the_export(whole, dataset, tmp_path, capsys):
    workspace = shutil.copytree(whole, tmp_path / "copy")
    settings = ALL_FOLDS[ALL_FOLDS.index("--epochs") :]
    line = ["train", "3d_lowres", "--workspace", str(workspace), "--fold", "1", *settings]
    assert command([*line, "--recipe", "nnunetv2", "--restart", "--seed", "9"]) == 0
    with pytest.raises(TrainingError, match=f"5 of 16 jobs failed: train {SECOND} 0: .* 4 jobs"):
        what_is_done(dataset, workspace)
    said = capsys.readouterr().err
    assert "was trained on labels of 3d_lowres of which 1 of 5, such as that of case_" in said
    assert f"begin {SECOND} anew with --restart" in said
