import argparse
import dataclasses
import json
import logging
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIGURATION, PLANS
from helpers.datasets import write_msd

from ichseg.errors import DatasetError, PlansError, TrainingError
from ichseg.model import bundle
from ichseg.predict.ensemble import Ensemble
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from training.__main__ import main as command
from training.bundle import rounding
from training.crossval import merge, selection
from training.data.workspace import LATEST_CHECKPOINT, VERIFIED_FILE
from training.fit.configuration import settings_from
from training.jobs import run, train
from training.jobs.choices import Choices, choices_from
from training.jobs.stages import STAGES
from training.planning import planner
from training.planning.overrides import overrides_from
from training.scoring import summary

TINY = shlex.split(
    "--spacing 5,1,1 --patch 4,16,16 --batch 2 --features 4,8 --no-deep-supervision --epochs 1 "
    "--batches-per-epoch 2 --validation-batches 1 --threads 1 --workers 0 --no-validation-mirrors "
    "--folds 0,1 --device cpu"
)
NAMES = tuple(f"case_{number}" for number in range(5))


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    """No worker processes: they would take longer to begin than the work takes."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A task with a bright box in every case."""
    folder = write_msd(tmp_path_factory.mktemp("data") / "Task01_Tiny", NAMES)
    rng = np.random.default_rng(3)
    for number, name in enumerate(NAMES):
        reference = np.zeros((6, 24, 24), np.uint8)
        reference[1:4, 4 + number : 14, 6:16] = 1
        voxels = (rng.normal(35, 3, reference.shape) + 35 * reference).astype(np.int16)
        image = Volume(voxels, (5.0, 1.0, 1.0))
        volume.write(image, folder / "imagesTr" / f"{name}.nii.gz")
        volume.write(image.with_voxels(reference), folder / "labelsTr" / f"{name}.nii.gz")
    return folder


def arguments(dataset, workspace, *more):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    run.add_arguments(parser)
    line = [str(dataset), "--workspace", str(workspace), *TINY, *more]
    return choices_from(parser.parse_args(line))


def stages(lines):
    return [words[0] for words in lines]


@pytest.fixture(scope="module")
def step_by_step(dataset, tmp_path_factory):
    """A workspace where each run did one step and was stopped before the next; what they did."""
    workspace = tmp_path_factory.mktemp("run")
    done = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: {0})
        for _ in range(20):
            left = 1

            def execute(words):
                nonlocal left
                if not left:
                    return 7
                left -= 1
                done.append(words)
                return command(words)

            status = run.run(arguments(dataset, workspace), execute)
            if status == 0:
                break
            assert status == 7
    return workspace, done


def test_stopped_anywhere_it_goes_on_and_does_nothing_twice(step_by_step):
    workspace, done = step_by_step
    assert stages(done) == ["convert", "verify", "plan", "preprocess", "train", "export"]
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
        assert run.run(arguments(dataset, workspace), lambda words: pytest.fail(str(words))) == 0
    assert caplog.messages == [
        f"== 1 of 9, convert: done, {workspace}/dataset.json is there",
        "== 2 of 9, verify: done, no errors in 5 cases, which have not changed since",
        f"== 3 of 9, plan: done, {workspace}/plans.json is there",
        f"== 4 of 9, preprocess: done, {workspace}/preprocessed/3d_fullres holds all cases",
        "== 5 of 9, train: done, folds 0, 1 of 3d_fullres",
        f"== 8 of 9, export: done, {workspace}/bundles/3d_fullres holds these folds",
        f"the weights of 3d_fullres are in {workspace}/bundles/3d_fullres",
    ]


@pytest.fixture
def copy(step_by_step, tmp_path):
    """The finished workspace, to be damaged."""
    return shutil.copytree(step_by_step[0], tmp_path / "copy", dirs_exist_ok=True)


def what_is_left(dataset, workspace, *more):
    """The first step that would be run."""
    found = []

    def execute(words):
        found.append(words[0])
        return 1

    assert run.run(arguments(dataset, workspace, *more), execute) == (1 if found else 0)
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
    assert what_is_left(dataset, copy, "--epochs", "2") == ["train"]
    assert what_is_left(dataset, copy, "--folds", "0,1,2") == ["train"]
    assert what_is_left(dataset, copy, "--out", str(copy / "other")) == ["export"]
    checkpoint = copy / "runs" / "3d_fullres" / "fold_0" / LATEST_CHECKPOINT
    later = (copy / "bundles" / "3d_fullres" / "model.json").stat().st_mtime + 10
    os.utime(checkpoint, (later, later))
    assert what_is_left(dataset, copy) == ["export"]


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


def test_a_fold_that_fails_stops_the_run_and_the_others_are_kept(
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
    line = ["run", str(dataset), "--workspace", str(copy), *TINY]
    assert command(line) == 1
    assert trained == ["0", "1"]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: 1 of 2 folds failed: fold 0: a case is damaged"
    log = copy / "runs" / "3d_fullres" / "fold_0" / "train.log"
    assert log.read_text().endswith("error: a case is damaged\n")
    assert command(line) == 0
    assert trained == ["0", "1", "0"]
    assert len(bundle.load_model(copy / "bundles" / "3d_fullres").members) == 2


def test_folds_on_gpus_are_trained_by_the_single_command(copy, monkeypatch, capfd):
    """Two processes that each see a GPU of their own; here none is there, so the CPU trains."""
    shutil.rmtree(copy / "runs" / "3d_fullres" / "fold_1")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.chdir(Path(__file__).parents[2])
    flags = TINY[TINY.index("--epochs") :]
    line = ["train", "3d_fullres", "--workspace", str(copy), *flags, "--folds", "0,1,2"]
    assert command([*line, "--gpus", "1,0"]) == 0
    err = capfd.readouterr().err
    assert "fold 1: training has ended: all 1 epochs done" in err
    assert "fold 2: training has ended: all 1 epochs done" in err
    assert "fold 0: training" not in err  # finished before
    for fold in ("1", "2"):
        log = (copy / "runs" / "3d_fullres" / f"fold_{fold}" / "train.log").read_text()
        assert "epoch 1/1  train" in log
        assert (copy / "runs" / "3d_fullres" / f"fold_{fold}" / "validation.json").exists()
    with pytest.raises(SystemExit):
        command([*line, "--fold", "0"])
    assert "not allowed with argument --folds" in capfd.readouterr().err


def test_an_unknown_fold_is_refused_before_any_is_trained(copy, dataset, capsys):
    shutil.rmtree(copy / "runs")
    line = ["train", "3d_fullres", "--workspace", str(copy), "--folds", "0,7", "--device", "cpu"]
    assert command(line) == 1
    assert "fold '7', expected 0 to 4" in capsys.readouterr().err
    assert not (copy / "runs").exists()


def test_a_dataset_with_errors_stops_the_run_at_verify(copy, dataset, capsys):
    (copy / "raw" / "labels" / "case_1.nii.gz").write_bytes(b"damaged")
    assert command(["run", str(dataset), "--workspace", str(copy), *TINY]) == 1
    out, err = capsys.readouterr()
    assert "Tiny: 5 cases" in out
    assert "1 errors" in out
    assert "== 3 of 6" not in err
    assert not (copy / VERIFIED_FILE).exists()


def test_an_interrupted_training_ends_the_run(copy, dataset, monkeypatch):
    shutil.rmtree(copy / "runs")
    monkeypatch.setattr(train, "run_fold", lambda *_, **__: False)
    assert command(["run", str(dataset), "--workspace", str(copy), *TINY]) == 130


def test_the_lines_it_says_can_be_pasted(dataset, tmp_path, caplog):
    said = []

    def execute(words):
        said.append(caplog.messages[-1].splitlines()[-1])
        return command(words) if words[0] == "convert" else 1

    workspace = tmp_path / "with space"
    with caplog.at_level(logging.INFO):
        assert run.run(arguments(dataset, workspace), execute) == 1
    assert shlex.split(said[1])[1:] == [
        "-m", "training", "verify", "--workspace", str(workspace), "--note",
    ]  # fmt: skip
    root = Path(__file__).parents[2]
    done = subprocess.run(said[1], shell=True, cwd=root, capture_output=True, check=True)
    assert b"5 cases" in done.stdout
    assert (workspace / VERIFIED_FILE).exists()


def test_every_command_takes_its_flags(step_by_step, monkeypatch):
    _, done = step_by_step
    lines = {words[0]: list(words) for words in done}
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
    assert parsed["train"].folds == ("0", "1")


def lines_of(command, choices, monkeypatch, planned=PLANS):
    """The lines of a stage, given these plans."""
    monkeypatch.setattr(Choices, "plans", lambda _: planned)
    (stage,) = (stage for stage in STAGES if stage.command == command)
    targets = stage.targets(choices)
    return [[stage.command, *stage.words(choices, target)] for target in targets]


def test_recipes_go_to_whom_they_are_for(dataset, tmp_path, monkeypatch):
    args = arguments(dataset, tmp_path, "--recipe", "compact", "--gamma", "0.8", "1.2")
    (planning,) = lines_of("plan", args, monkeypatch)
    assert "--recipe" not in planning
    (training,) = lines_of("train", args, monkeypatch)
    assert training[training.index("--recipe") + 1] == "compact"
    assert training[training.index("--gamma") :][:3] == ["--gamma", "0.8", "1.2"]
    args = arguments(
        dataset, tmp_path, "--recipe", "nnunetv2", "--architecture", "resenc_m", "--ct-clip=-20,90"
    )
    (planning,) = lines_of("plan", args, monkeypatch)
    assert planning[3:7] == ["--recipe", "nnunetv2", "--architecture", "resenc_m"]
    assert "--ct-clip=-20,90" in planning


def test_the_first_stage_of_a_cascade_comes_first(dataset, tmp_path, monkeypatch):
    low = dataclasses.replace(CONFIGURATION, name="3d_lowres")
    second = dataclasses.replace(
        CONFIGURATION, name="3d_cascade_fullres", previous_stage="3d_lowres"
    )
    planned = dataclasses.replace(PLANS, configurations=(CONFIGURATION, low, second))
    args = arguments(dataset, tmp_path, "--configurations", "3d_cascade_fullres,3d_fullres")
    trained = [words[1] for words in lines_of("train", args, monkeypatch, planned)]
    assert trained == ["3d_lowres", "3d_cascade_fullres", "3d_fullres"]
    args = arguments(dataset, tmp_path, "--configurations", "3d_cascade_fullres,3d_lowres")
    trained = [words[1] for words in lines_of("train", args, monkeypatch, planned)]
    assert trained == ["3d_lowres", "3d_cascade_fullres"]
    args = arguments(dataset, tmp_path, "--configurations", "2d")
    with pytest.raises(PlansError, match="2d"):
        lines_of("train", args, monkeypatch, planned)


def test_refuses_a_workspace_of_another_dataset(copy, dataset, tmp_path):
    other = write_msd(tmp_path / "Task02", NAMES[:4], name="Tiny")
    with pytest.raises(DatasetError, match=r"holds Tiny with 5 cases, but .* is Tiny with 4"):
        what_is_left(other, copy)
    assert what_is_left(tmp_path / "gone", copy) == []  # its files are all in the workspace


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


def test_names_are_different():
    assert merge.parse_names("2d, 3d_fullres") == ("2d", "3d_fullres")
    for text in ("2d,", "2d,2d"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected different names"):
            merge.parse_names(text)


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """A workspace after one run of all folds of two configurations; what it did."""
    workspace = tmp_path_factory.mktemp("whole")
    done = []

    def execute(words):
        done.append(words)
        return command(words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: {0})
        patch.setattr(rounding, "MAX_DICE_CHANGE", 1)  # networks of two batches are all ties
        assert run.run(whole_arguments(dataset, workspace), execute) == 0
    return workspace, done


def whole_arguments(dataset, workspace):
    words = [word for word in TINY if word not in ("--folds", "0,1")]
    parser = argparse.ArgumentParser(allow_abbrev=False)
    run.add_arguments(parser)
    more = ["--configurations", "3d_fullres,2d"]
    line = [str(dataset), "--workspace", str(workspace), *words, *more]
    return choices_from(parser.parse_args(line))


def test_all_folds_are_cross_validated_selected_from_and_exported(whole):
    workspace, done = whole
    assert stages(done)[-4:] == ["cross-validate", "select", "export", "report"]
    page = (workspace / "report" / "index.html").read_text()
    assert all(f'data-name="{name}"' in page for name in NAMES)
    for name in ("2d", "3d_fullres"):
        table = summary.load(workspace / "evaluation" / name)
        assert [case.name for case in table.cases] == list(NAMES)  # each once
        metrics = json.loads((workspace / "evaluation" / name / "metrics.json").read_text())
        assert set(metrics["case"]["DiceCoefficient"]) == {"0", "1", "2", "3", "4"}
    found = selection.load(workspace)
    assert [c.configurations for c in found.candidates] == [
        ("2d",), ("3d_fullres",), ("2d", "3d_fullres"),
    ]  # fmt: skip
    for candidate, name in zip(found.candidates, ("2d", "3d_fullres"), strict=False):
        (label,) = summary.load(workspace / "evaluation" / name).summaries
        assert candidate.mean_dice == pytest.approx(label.measures[0].mean)
    model = bundle.load_model(workspace / "bundles" / "selected")
    assert model.averaged == found.configurations
    assert model.rules == found.rules
    folds = [(m.configuration, m.fold) for m in model.members]
    assert folds == [(name, fold) for name in found.configurations for fold in "01234"]
    card = (workspace / "bundles" / "selected" / "MODEL_CARD.md").read_text()
    assert "Mean foreground Dice of 5 cross-validated cases" in card
    assert f"**{found.mean_dice:.3f}**" in card
    assert list(workspace.glob("runs/*/*/probabilities"))


def test_the_selected_bundle_segments(whole, dataset, tmp_path):
    workspace, _ = whole
    image = volume.read(dataset / "imagesTr" / "case_0.nii.gz")
    ensemble = Ensemble.load(workspace / "bundles" / "selected", "cpu")
    found = ensemble.segment(image, "fast")
    assert set(np.unique(found.mask.voxels)) <= {0, 1}
    assert len(found.ran["networks"]) == len(ensemble.model.averaged)


def test_what_was_selected_is_not_selected_again_until_a_fold_changes(whole, dataset, caplog):
    workspace, _ = whole
    arguments = whole_arguments(dataset, workspace)
    with caplog.at_level(logging.INFO):
        assert run.run(arguments, lambda words: pytest.fail(str(words))) == 0
    assert any("== 7 of 9, select: done" in message for message in caplog.messages)
    record = workspace / "runs" / "2d" / "fold_3" / "validation.json"
    os.utime(record)
    done = []
    run.run(arguments, lambda words: done.append(words) or 0)
    assert stages(done)[:2] == ["cross-validate", "select"]
    os.utime(workspace / "selection.json")
    done.clear()
    run.run(arguments, lambda words: done.append(words) or 0)
    assert stages(done)[-1] == "report"


def test_an_incomplete_cross_validation_is_refused_with_the_command(whole, tmp_path):
    workspace = shutil.copytree(whole[0], tmp_path / "copy")
    folder = workspace / "runs" / "2d" / "fold_1"
    (mask,) = (folder / "validation").iterdir()
    mask.unlink()
    with pytest.raises(TrainingError, match=r"1 of 1 validation cases .* `train 2d --fold 1`"):
        merge.cross_validate(workspace, "2d", workers=1)
    shutil.rmtree(folder)
    with pytest.raises(TrainingError, match="run `train` first"):
        merge.cross_validate(workspace, "2d", workers=1)
