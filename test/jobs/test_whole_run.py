"""A run of all folds of two configurations, to a bundle of what was selected."""

import argparse
import dataclasses
import json
import logging
import os
import shutil

import numpy as np
import pytest
from helpers.tiny_runs import ALL_FOLDS, NAMES, arguments, run_here, stages, write_tiny_task

from ichseg.errors import TrainingError
from ichseg.model import bundle, strict_json
from ichseg.model.rules import ComponentRule
from ichseg.predict.ensemble import Ensemble
from ichseg.scan import volume
from training.__main__ import main as command
from training.bundle import rounding
from training.crossval import merge, selection
from training.scoring import summary

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_tiny_task(tmp_path_factory.mktemp("data") / "Task01_Tiny")


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """A workspace after one run of all folds of two configurations; what it did."""
    workspace = tmp_path_factory.mktemp("whole")
    done = []

    def execute(words):
        done.append(words)
        return command(words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "MAX_DICE_CHANGE", 1)  # networks of two batches are all ties
        assert run_here(whole_arguments(dataset, workspace), execute)
    return workspace, done


def whole_arguments(dataset, workspace):
    return arguments(dataset, workspace, "--configurations", "3d_fullres,2d", settings=ALL_FOLDS)


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


def test_a_bundle_of_other_rules_than_were_selected_is_made_anew(whole, dataset, tmp_path):
    workspace = shutil.copytree(whole[0], tmp_path / "copy")
    folder = workspace / "bundles" / "selected"
    model = bundle.load_model(folder)
    more = (*model.rules, ComponentRule(label=1, drop_below_ml=0.123))
    bundle.save_model(folder, dataclasses.replace(model, rules=more))
    done = []
    run_here(whole_arguments(dataset, workspace), lambda words: done.append(words) or 0)
    assert stages(done) == ["export"]


def test_what_was_selected_is_not_selected_again_until_a_fold_changes(whole, dataset, caplog):
    workspace, _ = whole
    choices = whole_arguments(dataset, workspace)
    with caplog.at_level(logging.INFO):
        assert run_here(choices, lambda words: pytest.fail(str(words)))
    assert any("== select: done" in message for message in caplog.messages)
    record = workspace / "runs" / "2d" / "fold_3" / "validation.json"
    os.utime(record)
    done = []
    run_here(choices, lambda words: done.append(words) or 0)
    assert stages(done)[:2] == ["cross-validate", "select"]
    os.utime(workspace / "selection.json")
    done.clear()
    run_here(choices, lambda words: done.append(words) or 0)
    assert stages(done)[-1] == "report"


def test_it_is_selected_anew_where_what_was_not_chosen_has_other_weights(whole, dataset, tmp_path):
    """The times of files do not say so in a copy of a workspace."""
    workspace = shutil.copytree(whole[0], tmp_path / "copy")
    found = selection.load(workspace)
    (other, *_) = {"2d", "3d_fullres"} - {found.configurations[0]}
    before = dataclasses.replace(found, made_from={**found.made_from, other: "former"})
    (workspace / "selection.json").write_text(strict_json.dumps(before))
    for path in workspace.rglob("*"):
        os.utime(path, (1e9, 1e9))
    done = []
    run_here(whole_arguments(dataset, workspace), lambda words: done.append(words) or 0)
    assert stages(done)[0] == "select"


def test_an_incomplete_cross_validation_is_refused_with_the_command(whole, tmp_path):
    workspace = shutil.copytree(whole[0], tmp_path / "copy")
    folder = workspace / "runs" / "2d" / "fold_1"
    (mask,) = (folder / "validation").iterdir()
    mask.unlink()
    with pytest.raises(TrainingError, match=r"1 of 1 validation cases .* `train 2d --fold 1`"):
        merge.cross_validate(workspace, "2d", workers=1)
    shutil.rmtree(folder)
    with pytest.raises(TrainingError, match="run `train 2d --fold 1` first, or leave 2d out by --"):
        merge.cross_validate(workspace, "2d", workers=1)


def test_scores_of_a_label_that_was_corrected_since_are_not_taken(whole, tmp_path, caplog):
    workspace = shutil.copytree(whole[0], tmp_path / "copy")
    before = summary.load(workspace / "evaluation" / "2d")
    (path,) = (workspace / "raw" / "labels").glob("case_2.*")
    label = volume.read(path)
    voxels = label.voxels.copy()
    voxels[:1] = 1 - voxels[:1]
    volume.write(label.with_voxels(voxels), path)
    with pytest.raises(TrainingError, match="from other weights, images or labels than the folds"):
        selection.require_current(workspace, selection.load(workspace))
    assert command(["report", str(workspace)]) == 1
    after = merge.cross_validate(workspace, "2d", workers=1)
    assert after.made_from != before.made_from
    changed = [
        case.name for case, was in zip(after.cases, before.cases, strict=True)
        if case.labels[0].reference_ml != was.labels[0].reference_ml
    ]  # fmt: skip
    assert changed == ["case_2"]
    (said,) = [r.getMessage() for r in caplog.records if "have been corrected" in r.getMessage()]
    assert said.startswith("2d: images or labels of 1 cases have been corrected")
    assert "such as case_2" in said


def test_after_a_correction_all_that_is_cheap_is_made_again(whole, dataset, tmp_path, caplog):
    """Networks stay, with a word; scores, selection, bundle and report do not."""
    workspace = shutil.copytree(whole[0], tmp_path / "copy")
    path = workspace / "raw" / "labels" / "case_2.nii.gz"
    label = volume.read(path)
    volume.write(label.with_voxels(np.roll(label.voxels, 1, axis=1)), path)
    done = []

    def execute(words):
        done.append(words)
        return command(words)

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(rounding, "MAX_DICE_CHANGE", 1)
        assert run_here(whole_arguments(dataset, workspace), execute)
    assert stages(done) == [
        "verify", "preprocess", "preprocess", "cross-validate", "select", "export", "report",
    ]  # fmt: skip
    said = [message for message in caplog.messages if "corrected since, such as case_2" in message]
    assert any("`train 2d --fold 0 --restart`" in message for message in said)
    selection.require_current(workspace, selection.load(workspace))


@pytest.mark.parametrize("change", [{"mirrored": True}, {"padding": "nearest"}])
def test_scores_of_a_validation_in_another_way_are_not_taken(whole, tmp_path, change):
    workspace = shutil.copytree(whole[0], tmp_path / "copy")
    path = workspace / "runs" / "2d" / "fold_1" / "validation.json"
    found = json.loads(path.read_text())
    assert found | change != found
    path.write_text(json.dumps(found | change))
    chosen = selection.load(workspace)
    with pytest.raises(TrainingError, match="run `cross-validate` and `select` again"):
        selection.require_current(workspace, dataclasses.replace(chosen, configurations=("2d",)))


def test_masks_of_plans_with_another_padding_are_not_scored(whole, tmp_path):
    workspace = shutil.copytree(whole[0], tmp_path / "copy")
    plans = json.loads((workspace / "plans.json").read_text())
    (workspace / "plans.json").write_text(json.dumps(plans | {"padding": "nearest"}))
    with pytest.raises(TrainingError, match="have not been segmented with its latest weights"):
        merge.cross_validate(workspace, "2d", workers=1)


def test_names_are_different():
    assert merge.parse_names("2d, 3d_fullres") == ("2d", "3d_fullres")
    for text in ("2d,", "2d,2d"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected different names"):
            merge.parse_names(text)
