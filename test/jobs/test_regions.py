"""Regions through the whole chain: from an nnU-Net v2 folder to masks, and back to nnU-Net."""

import json
import os
import shlex

import numpy as np
import pytest
from helpers.datasets import write_v2

from ichseg.model import bundle, plans
from ichseg.predict.ensemble import Ensemble
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from training.__main__ import main as command
from training.batches.sampling import BatchKey
from training.batches.stream import open_batches
from training.bundle.export_nnunet import export_folders
from training.bundle.import_nnunet import import_folders
from training.crossval import selection
from training.data.workspace import mask_file, run_folder
from training.fit.configuration import TRAINING_RECIPES
from training.fit.fold_run import open_run
from training.scoring import summary

NAMES = tuple(f"case_{number}" for number in range(4))
TINY = "--spacing 5,1,1 --patch 4,16,16 --batch 2 --features 4,8 --crop nonzero"
SHORT = (
    "--epochs 3 --batches-per-epoch 60 --validation-batches 4 --threads 1 --workers 0 "
    "--no-validation-mirrors --device cpu --learning-rate 1e-2 --lesion-fraction 0.5"
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Two folds, trained and selected: bright bleeds with a brighter core, an ignored slice."""
    folder = tmp_path_factory.mktemp("regions")
    source = write_v2(
        folder / "Dataset001_Cores",
        NAMES,
        channels=("CT",),
        labels={"background": 0, "bleed": [1, 2], "core": 2, "ignore": 3},
        regions_class_order=[1, 2],
    )
    rng = np.random.default_rng(3)
    for number, name in enumerate(NAMES):
        reference = np.zeros((8, 24, 24), np.uint8)
        reference[1:6, 3 + number : 17, 4:20] = 1
        reference[2:5, 7 + number : 14, 8:16] = 2
        voxels = (rng.normal(35, 2, reference.shape) + 20 * reference).astype(np.int16)
        reference[7] = 3
        image = Volume(voxels, (5.0, 1.0, 1.0))
        volume.write(image, source / "imagesTr" / f"{name}_0000.nii.gz")
        volume.write(image.with_voxels(reference), source / "labelsTr" / f"{name}.nii.gz")
    ws = folder / "ws"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: {0})
        assert command(["convert", str(source), "--workspace", str(ws)]) == 0
        folds = [
            {"train": NAMES[:2], "validation": NAMES[2:]},
            {"train": NAMES[2:], "validation": NAMES[:2]},
        ]
        (ws / "splits.json").write_text(json.dumps({"schema_version": 1, "folds": folds}))
        for line in (
            "verify",
            f"plan {TINY}",
            "preprocess",
            f"train 3d_fullres --folds 0,1 {SHORT}",
            "cross-validate --workers 1",
            "select --workers 1",
            f"export --folds 0,1 --out {ws / 'bundle'}",
        ):
            assert command([*shlex.split(line), "--workspace", str(ws)]) == 0, line
    return ws


def test_the_plans_know_the_regions(workspace):
    planned = plans.load(workspace / "plans.json")
    assert planned.labels == ("background", "bleed", "core")
    assert (planned.regions, planned.region_labels) == ((1, 2), ((1, 2), (2,)))
    assert planned.scores == 2


def test_both_regions_are_learnt_and_scored_by_what_they_hold(workspace):
    """The bleed counts with its core: by label 1 alone its Dice could not be that of the mask."""
    found = summary.load(workspace / "evaluation" / "3d_fullres")
    assert found.labels == ("bleed", "core")
    assert found.ignore_label == 3
    dice = {s.label: s.measures[0].mean for s in found.summaries}
    assert dice["bleed"] > 0.9
    assert dice["core"] > 0.9
    case = found.cases[0]
    mask = volume.read(mask_file(run_folder(workspace, "3d_fullres", "1"), case.name)).voxels
    reference = volume.read(workspace / "raw" / "labels" / f"{case.name}.nii.gz").voxels
    told = reference != 3
    ours, theirs = (mask > 0) & told, (reference > 0) & told
    expected = 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())
    assert case.labels[0].scores.dice == pytest.approx(expected, abs=1e-6)
    assert case.labels[0].reference_ml > case.labels[1].reference_ml > 0
    assert case.whole.reference_ml == case.labels[0].reference_ml


def test_no_component_rule_is_tried(workspace):
    found = selection.load(workspace)
    assert found.trials == found.rules == ()
    assert found.labels == ("bleed", "core")
    assert "rules, none, which regions do not have" in selection.describe(found)


def test_the_bundle_segments_as_validation_did(workspace):
    model = bundle.load_model(workspace / "bundle")
    assert model.average == "logits"
    card = (workspace / "bundle" / "MODEL_CARD.md").read_text()
    assert "\n| regions | bleed of 1 and 2, core of 2 |\n" in card
    for name in NAMES:
        image = volume.read(workspace / "raw" / "images" / f"{name}_0000.nii.gz")
        reference = volume.read(workspace / "raw" / "labels" / f"{name}.nii.gz").voxels
        mask = Ensemble.load(workspace / "bundle").segment(image).mask.voxels
        assert set(np.unique(mask)) == {0, 1, 2}
        assert (mask == reference)[reference != 3].mean() > 0.97


def test_nnunet_gets_the_regions_back(workspace, tmp_path):
    (folder,) = export_folders(workspace / "bundle", tmp_path / "theirs")
    dataset = json.loads((folder / "dataset.json").read_text())
    assert dataset["labels"] == {"background": 0, "bleed": [1, 2], "core": [2]}
    assert dataset["regions_class_order"] == [1, 2]
    again = import_folders([folder], tmp_path / "ours").plans
    planned = bundle.load_model(workspace / "bundle").plans
    assert (again.regions, again.region_labels) == (planned.regions, planned.region_labels)
    assert again.foreground == planned.foreground


def test_patches_are_centred_on_either_region(workspace):
    """A core is a sixth of its bleed, but half of the oversampled patches have it in the middle."""
    run = open_run(workspace, "3d_fullres", "0", TRAINING_RECIPES["msd2018"])
    keys = iter([BatchKey(0, number, validation=True) for number in range(60)])
    with open_batches(run.spec, keys, run.config.stream, run.device) as stream:
        middle = [int(batch.target[1, 2, 8, 8]) for batch in stream]
    assert set(middle) <= {1, 2}
    assert 0.35 < np.mean([label == 2 for label in middle]) < 0.8
