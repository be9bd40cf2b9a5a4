"""``training run``: jobs in their order, what is done again, and what is refused."""

import argparse
import contextlib
import logging
import os
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.datasets import write_instance, write_msd
from helpers.tiny_runs import NAMES, TINY, arguments, run_here, stages, write_tiny_task

from ichseg.errors import DatasetError, PlansError, TrainingError
from ichseg.model import bundle
from ichseg.scan import volume
from training.__main__ import main as command
from training.data import convert
from training.data.workspace import LATEST_CHECKPOINT, VERIFIED_FILE
from training.fit.configuration import settings_from
from training.jobs import train
from training.jobs.claim import claimed
from training.planning import planner
from training.planning.overrides import overrides_from

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_tiny_task(tmp_path_factory.mktemp("data") / "Task01_Tiny")


@pytest.fixture(scope="module")
def step_by_step(dataset, tmp_path_factory):
    """A workspace where each run did one step and was stopped before the next; what they did."""
    workspace = tmp_path_factory.mktemp("run")
    done = []
    for _ in range(20):
        left = 1

        def execute(words):
            nonlocal left
            if not left:
                return 7
            left -= 1
            done.append(words)
            return command(words)

        with contextlib.suppress(TrainingError):  # of the job that was stopped
            assert run_here(arguments(dataset, workspace), execute)
            break
    return workspace, done


def test_stopped_anywhere_it_goes_on_and_does_nothing_twice(step_by_step):
    workspace, done = step_by_step
    assert stages(done) == ["convert", "verify", "plan", "preprocess", "train", "train", "export"]
    model = bundle.load_model(workspace / "bundles" / "3d_fullres")
    assert [(m.configuration, m.fold) for m in model.members] == [
        ("3d_fullres", "0"),
        ("3d_fullres", "1"),
    ]
    assert model.name == "Tiny-3d_fullres"
    assert "synthetic" not in model.description
    assert model.plans.configuration("3d_fullres").patch == (4, 16, 16)


def test_a_finished_run_says_so_and_does_nothing(step_by_step, dataset, caplog):
    workspace, _ = step_by_step
    with caplog.at_level(logging.INFO):
        assert run_here(arguments(dataset, workspace), lambda words: pytest.fail(str(words)))
    fullres = f"{workspace}/runs/3d_fullres"
    assert caplog.messages == [
        f"== convert: done, {workspace}/dataset.json is there",
        "== verify: done, no errors in 5 cases, which have not changed since",
        f"== plan: done, {workspace}/plans.json is there",
        f"== preprocess 3d_fullres: done, {workspace}/preprocessed/3d_fullres holds all cases",
        f"== train 3d_fullres 0: done, {fullres}/fold_0 is finished",
        f"== train 3d_fullres 1: done, {fullres}/fold_1 is finished",
        f"== export 3d_fullres: done, {workspace}/bundles/3d_fullres holds these folds",
        f"the weights of 3d_fullres are in {workspace}/bundles/3d_fullres",
    ]


def test_a_finished_fold_says_which_settings_it_was_not_trained_with(step_by_step, dataset, caplog):
    workspace, _ = step_by_step
    asked = arguments(dataset, workspace, "--learning-rate", "0.25")
    with caplog.at_level(logging.INFO):
        assert run_here(asked, lambda words: pytest.fail(str(words)))
    said = [line for line in caplog.messages if line.startswith("== train 3d_fullres 1: done")]
    assert len(said) == 1
    assert "fold_1 is finished, not with learning_rate 0.25 but 0.0003" in said[0]


@pytest.fixture
def copy(step_by_step, tmp_path):
    """The finished workspace, to be damaged."""
    return shutil.copytree(step_by_step[0], tmp_path / "copy", dirs_exist_ok=True)


def what_is_left(dataset, workspace, *more):
    """The commands of the jobs that would be run, but for those that wait for them."""
    found = []

    def execute(words):
        found.append(words[0])
        return 1

    try:
        assert run_here(arguments(dataset, workspace, *more), execute)
    except TrainingError:
        assert found
    return found


@pytest.mark.parametrize(
    ("lost", "stage"),
    [
        (VERIFIED_FILE, "verify"),
        ("plans.json", "plan"),
        ("preprocessed/3d_fullres/case_3.json", "preprocess"),
        ("preprocessed/3d_fullres/.preprocessing.json", "preprocess"),
        ("runs/3d_fullres/fold_1/checkpoint_latest.pt", "train"),
        ("runs/3d_fullres/fold_1/validation.json", "train"),
        ("bundles/3d_fullres/model.json", "export"),
    ],
)
def test_what_is_lost_is_done_again(copy, dataset, lost, stage):
    assert what_is_left(dataset, copy) == []
    (copy / lost).unlink()
    assert what_is_left(dataset, copy) == [stage]


def test_what_has_changed_is_done_again(copy, dataset):
    assert what_is_left(dataset, copy, "--epochs", "2") == ["train", "train"]
    assert what_is_left(dataset, copy, "--folds", "0,1,2") == ["train"]
    assert what_is_left(dataset, copy, "--out", str(copy / "other")) == ["export"]
    checkpoint = copy / "runs" / "3d_fullres" / "fold_0" / LATEST_CHECKPOINT
    later = (copy / "bundles" / "3d_fullres" / "model.json").stat().st_mtime + 10
    os.utime(checkpoint, (later, later))
    assert what_is_left(dataset, copy) == ["export"]


def test_a_bundle_of_former_weights_is_made_anew_whatever_the_times_of_files_say(copy, dataset):
    """A copy of a workspace may have lost them, and a checkpoint that was put back has older."""
    again = ["train", "3d_fullres", "--workspace", str(copy), "--fold", "0", "--restart"]
    settings = TINY[TINY.index("--epochs") : TINY.index("--folds")]
    assert command([*again, *settings, "--seed", "9"]) == 0
    for path in copy.rglob("*"):
        os.utime(path, (1e9, 1e9))
    assert "export" in what_is_left(dataset, copy)


def test_a_bundle_of_more_folds_than_asked_for_is_made_anew(copy, dataset):
    assert "export" in what_is_left(dataset, copy, "--folds", "0")


def test_a_corrected_label_goes_all_the_way(copy, dataset, capsys):
    path = copy / "raw" / "labels" / "case_2.nii.gz"
    os.utime(path, (1, 1))  # the content decides
    assert what_is_left(dataset, copy) == []
    label = volume.read(path)
    volume.write(label.with_voxels(np.roll(label.voxels, 1, axis=1)), path)
    assert what_is_left(dataset, copy) == ["verify"]
    workspace = ["--workspace", str(copy)]
    assert command(["verify", *workspace]) == 0  # a question, which leaves nothing behind
    assert what_is_left(dataset, copy) == ["verify"]
    assert command(["verify", *workspace, "--note"]) == 0
    assert what_is_left(dataset, copy) == ["preprocess"]
    train_again = ["train", "3d_fullres", *workspace, "--fold", "0", "--epochs", "2"]
    assert command(train_again) == 1
    assert "case_2, which has changed since it was stored; run `preprocess" in (
        capsys.readouterr().err
    )
    assert command(["preprocess", *workspace]) == 0
    assert "1 cases preprocessed" in capsys.readouterr().out
    assert command(train_again) == 1
    said = capsys.readouterr().err
    assert (
        "trained with 1 case whose image or label has been corrected since, such as case_2" in said
    )
    quickly = shlex.split(
        "--batches-per-epoch 2 --validation-batches 1 --threads 1 --workers 0 --device cpu"
    )
    assert command([*train_again, *quickly, "--restart"]) == 0
    assert command([*train_again, *quickly]) == 0


def test_a_fold_that_fails_stops_what_waits_for_it_and_the_others_are_kept(
    copy, dataset, monkeypatch, capsys
):
    shutil.rmtree(copy / "runs")
    shutil.rmtree(copy / "bundles")
    trained = []
    real = train.run_fold

    def fail(workspace, configuration, fold, config, **options):
        trained.append(fold)
        if trained == ["0"]:
            raise DatasetError("a case is damaged")
        return real(workspace, configuration, fold, config, **options)

    monkeypatch.setattr(train, "run_fold", fail)
    with pytest.raises(TrainingError) as caught:
        run_here(arguments(dataset, copy), command)
    assert trained == ["0", "1"]
    assert str(caught.value) == ("1 of 4 jobs failed: train 3d_fullres 0: failed; 1 job not begun")
    log = copy / "runs" / "3d_fullres" / "fold_0" / "train.log"
    assert log.read_text().endswith("error: a case is damaged\n")
    assert run_here(arguments(dataset, copy), command)
    assert trained == ["0", "1", "0"]
    assert len(bundle.load_model(copy / "bundles" / "3d_fullres").members) == 2


def test_folds_on_gpus_are_jobs_of_the_single_command(copy, monkeypatch, caplog, capsys):
    """Two processes that each see a GPU of their own; here none is there, so the CPU trains."""
    shutil.rmtree(copy / "runs" / "3d_fullres" / "fold_1")
    monkeypatch.setattr("ichseg.engine.gpus.count", lambda: 2)
    flags = TINY[TINY.index("--epochs") :]
    line = ["train", "3d_fullres", "--workspace", str(copy), *flags, "--folds", "0,1,2"]
    with caplog.at_level(logging.INFO):
        assert command([*line, "--gpus", "1,0"]) == 0
    assert "train 3d_fullres 1: training has ended: all 1 epochs done" in caplog.messages
    assert "train 3d_fullres 2: training has ended: all 1 epochs done" in caplog.messages
    assert "3d_fullres, fold 0: finished already" in caplog.messages
    for fold in ("1", "2"):
        log = (copy / "runs" / "3d_fullres" / f"fold_{fold}" / "train.log").read_text()
        assert "epoch 1/1  train" in log
        assert (copy / "runs" / "3d_fullres" / f"fold_{fold}" / "validation.json").exists()
        assert "epoch 1/1" in (copy / "jobs" / f"train_3d_fullres_{fold}/output.log").read_text()
    with caplog.at_level(logging.INFO):
        assert command([*line, "--learning-rate", "0.5"]) == 0
    asked = "not with learning_rate 0.5 but 0.0003; --restart trains anew"
    assert caplog.messages.count(asked) == 3
    with pytest.raises(SystemExit):
        command([*line, "--fold", "0"])
    assert "not allowed with argument --folds" in capsys.readouterr().err


def test_the_command_runs_its_jobs_as_processes(copy, dataset, caplog, capsys):
    """The process of ``verify`` says what is wrong with a case, and nothing follows."""
    line = ["run", str(dataset), "--workspace", str(copy), *TINY]
    (copy / "bundles" / "3d_fullres" / "model.json").unlink()
    with caplog.at_level(logging.INFO):
        assert command(line) == 0
    assert any(message.startswith("export 3d_fullres: ") for message in caplog.messages)
    assert len(bundle.load_model(copy / "bundles" / "3d_fullres").members) == 2
    (copy / "raw" / "labels" / "case_1.nii.gz").write_bytes(b"damaged")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert command(line) == 1
    assert "verify: Tiny: 5 cases" in "\n".join(caplog.messages)
    assert not any(message.startswith("== plan") for message in caplog.messages)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: 1 of 3 jobs failed: verify: ")
    assert "1 job not begun" in last
    assert not (copy / VERIFIED_FILE).exists()


def test_an_unknown_fold_is_refused_before_any_is_trained(copy, dataset, capsys):
    shutil.rmtree(copy / "runs")
    line = ["train", "3d_fullres", "--workspace", str(copy), "--folds", "0,7", "--device", "cpu"]
    assert command(line) == 1
    assert "fold '7', expected 0 to 4" in capsys.readouterr().err
    assert not (copy / "runs").exists()


def test_two_runs_of_one_workspace_do_not_meet(copy, dataset, capsys):
    with claimed(copy, "at work"):
        line = ["run", str(dataset), "--workspace", str(copy), *TINY]
        assert command(line) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    where = f"process {os.getpid()} on {socket.gethostname()}"
    assert last == f"error: {copy}: another process is at work on this workspace: {where}"


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 75), ("SIGUSR1", 75)])
def test_an_interrupted_training_asks_for_another_go(copy, monkeypatch, name, status):
    shutil.rmtree(copy / "runs")
    trained = []

    def interrupted(*_, signals, **__):
        trained.append(1)
        signals.name = name
        return False

    monkeypatch.setattr(train, "run_fold", interrupted)
    line = ["train", "3d_fullres", "--workspace", str(copy), "--folds", "0,1", "--device", "cpu"]
    assert command(line) == status
    assert trained == [1]  # no other begins


def test_the_lines_it_says_can_be_pasted(dataset, tmp_path, caplog):
    said = []

    def execute(words):
        said.append(caplog.messages[-1].splitlines()[-1])
        return command(words) if words[0] == "convert" else 1

    workspace = tmp_path / "with space"
    with caplog.at_level(logging.INFO), pytest.raises(TrainingError):
        run_here(arguments(dataset, workspace), execute)
    assert shlex.split(said[1])[1:] == [
        "-m", "training", "verify", "--workspace", str(workspace), "--note",
    ]  # fmt: skip
    root = Path(__file__).parents[2]
    done = subprocess.run(said[1], shell=True, cwd=root, capture_output=True, check=True)
    assert b"5 cases" in done.stdout
    assert (workspace / VERIFIED_FILE).exists()


def test_every_command_takes_its_flags(step_by_step, monkeypatch):
    _, done = step_by_step
    lines = {words[0]: list(words) for words in reversed(done)}
    parsed = {}
    for name, module in (("plan", planner), ("train", train)):
        parser = argparse.ArgumentParser(allow_abbrev=False)
        module.add_arguments(parser)
        parsed[name] = parser.parse_args(lines[name][1:])
    overrides = overrides_from(parsed["plan"])
    assert (overrides.spacing_mm, overrides.patch) == ((5.0, 1.0, 1.0), (4, 16, 16))
    assert (overrides.batch, overrides.features) == (2, (4, 8))
    assert (overrides.deep_supervision, overrides.batch_dice) == (False, None)
    config = settings_from(parsed["train"]).over("msd2018")
    assert (config.epochs, config.batches_per_epoch, config.validation_mirrors) == (1, 2, False)
    assert parsed["train"].fold == "0"


def test_refuses_a_workspace_of_another_dataset(copy, dataset, tmp_path):
    other = write_msd(tmp_path / "Task02", NAMES[:4], name="Tiny")
    with pytest.raises(DatasetError, match=r"holds Tiny with 5 cases, but .* is Tiny with 4"):
        what_is_left(other, copy)
    assert what_is_left(tmp_path / "gone", copy) == []  # its files are all in the workspace


def test_refuses_a_workspace_whose_labels_have_other_names(tmp_path):
    source, workspace = write_instance(tmp_path / "pairs"), tmp_path / "ws"
    convert.convert(source, workspace, labels=("background", "blood"))
    with pytest.raises(
        DatasetError, match="its labels are background,blood, but --labels is background,ich;"
    ):
        what_is_left(source, workspace, "--labels", "background,ich")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": {"0": "background", "1": "oedema"}}, r"the labels are .*oedema.* has .*bleed"),
        ({"modality": {"0": "MR"}}, r"the channels are .*MR.* has .*CT"),
    ],
)
def test_refuses_a_workspace_whose_dataset_is_described_otherwise_now(tmp_path, change, message):
    """A name that was corrected was passed over, and results had the former one."""
    source, workspace = write_msd(tmp_path / "Task01"), tmp_path / "ws"
    convert.convert(source, workspace)
    assert "convert" not in what_is_left(source, workspace)
    write_msd(source, **change)
    with pytest.raises(DatasetError, match=message):
        what_is_left(source, workspace)


def test_refuses_groups_that_the_workspace_was_not_made_with(tmp_path):
    """They were passed over, and scans of a patient trained and validated one fold."""
    source, workspace = write_instance(tmp_path / "pairs"), tmp_path / "ws"
    table, kept = tmp_path / "patients.csv", workspace / "groups.csv"
    table.write_text("case,group\n001,p1\n002,p1\n")
    convert.convert(source, workspace)
    with pytest.raises(DatasetError, match=r"groups.csv: missing.*, but --groups is .*patients"):
        what_is_left(source, workspace, "--groups", str(table))
    kept.write_text("case,group\n001,p1\n002,p2\n")
    with pytest.raises(DatasetError, match=r"groups.csv: has other groups, but --groups is"):
        what_is_left(source, workspace, "--groups", str(table))
    kept.write_text("case,group\n002,p1\n001,p1\n")
    assert "convert" not in what_is_left(source, workspace, "--groups", str(table))
    table.unlink()
    assert "convert" not in what_is_left(source, workspace, "--groups", str(table))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--patch", "4,8,8"], "made with patch 4,16,16, but --patch is 4,8,8"),
        (["--ct-clip=0,90"], "made with ct-clip as the data say, but --ct-clip is 0,90"),
        (["--recipe", "nnunetv2"], "made with recipe msd2018, but --recipe is nnunetv2"),
    ],
)
def test_refuses_flags_that_the_plans_contradict(copy, dataset, flags, message):
    with pytest.raises(PlansError, match=message):
        what_is_left(dataset, copy, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "epochs is 0, expected at least 1"),
        (["--batch", "0"], "batch 0, expected at least 1"),
        (["--gpus", "0,0"], "names a GPU twice"),
    ],
)
def test_refuses_nonsense_before_anything_is_done(dataset, tmp_path, capsys, flags, message):
    line = ["run", str(dataset), "--workspace", str(tmp_path / "new"), *TINY, *flags]
    assert command(line) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
