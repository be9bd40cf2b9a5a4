import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURE, CONFIGURATION, PLANS
from helpers.workspaces import QUICK, make_workspace

from ichseg.errors import DatasetError, TrainingError
from ichseg.model import plans as plans_module
from ichseg.model import strict_json
from ichseg.predict import prepare
from ichseg.predict.prepare import Placement, place
from ichseg.predict.restore import one_hot, regrid
from ichseg.scan import volume
from ichseg.scan.orientation import AxisOrder
from training.__main__ import main as command
from training.batches.augment_cascade import dilate
from training.batches.augmentation import NO_AUGMENTATION
from training.batches.reading import make_patches
from training.batches.sampling import BatchKey
from training.bundle.export import export
from training.crossval import cascade_labels, merge
from training.crossval.validate import (
    is_validated,
    load_network,
    predict_case,
    prepare_case,
    validate,
)
from training.data import dataset, splits
from training.data.sources import digest_cases
from training.data.workspace import LATEST_CHECKPOINT, preprocessed_folder
from training.fit.checkpoint import read_checkpoint, weights_digest
from training.fit.fold_run import open_run
from training.jobs.train import run_fold
from training.store import chunks
from training.store.preprocess import preprocess_dataset

LOWRES = dataclasses.replace(
    CONFIGURATION, name="3d_lowres", spacing_mm=(5.0, 2.0, 2.0), patch=(4, 8, 8)
)
SECOND = dataclasses.replace(
    CONFIGURATION, name="3d_cascade_fullres", previous_stage="3d_lowres", batch_dice=True
)
CASCADE = dataclasses.replace(PLANS, configurations=(SECOND, LOWRES))
SHORT = dataclasses.replace(QUICK, epochs=1, validation=True, validation_mirrors=False)


def at(spacing_mm, shape):
    """A case that fills its volume, in a grid of this spacing."""
    box = tuple((0, size) for size in (4, 4, 4))
    return Placement(
        AxisOrder((0, 1, 2), (False,) * 3), (4, 4, 4), box, (1.0, 1.0, 1.0), shape, spacing_mm
    )


def leads(values):
    """Scores of two labels, of which the second leads by these values."""
    values = torch.tensor(values, dtype=torch.float32)
    return torch.stack((torch.zeros_like(values), values))


def test_scores_are_interpolated_before_they_are_compared():
    # half-pixel positions -0.25, 0.25, 0.75, 1.25: -3, -2, 0 and 1, the border extended
    found = regrid(
        leads([[[-3.0, 1.0]]]),
        at((1.0, 1.0, 1.0), (1, 1, 2)),
        at((1.0, 1.0, 0.5), (1, 1, 4)),
        PLANS,
    )
    assert found.dtype == np.int8
    np.testing.assert_array_equal(found, [[[0, 0, 0, 1]]])  # the lower label on a tie


def test_a_coarse_axis_takes_whole_slices():
    scores = leads([[[-3.0]], [[1.0]]])
    # 5 mm against 1 mm in-plane is treated apart, 2 mm is not
    apart = regrid(scores, at((5.0, 1.0, 1.0), (2, 1, 1)), at((2.5, 1.0, 1.0), (4, 1, 1)), PLANS)
    np.testing.assert_array_equal(apart.ravel(), [0, 0, 1, 1])
    alike = regrid(scores, at((2.0, 1.0, 1.0), (2, 1, 1)), at((1.0, 1.0, 1.0), (4, 1, 1)), PLANS)
    np.testing.assert_array_equal(alike.ravel(), [0, 0, 0, 1])


def test_regions_hand_on_the_labels_that_they_write():
    """The bleed is found in the middle two voxels, its core in the last two and decides there."""
    plans = dataclasses.replace(
        PLANS, labels=("background", "bleed", "core"), regions=(1, 2), region_labels=((1, 2), (2,))
    )
    scores = torch.tensor([[-3.0, 1.0, 2.0, -1.0], [-3.0, -1.0, 2.0, 2.0]]).reshape(2, 1, 1, 4)
    grid = at((1.0, 1.0, 1.0), (1, 1, 4))
    np.testing.assert_array_equal(regrid(scores, grid, grid, plans), [[[0, 1, 2, 2]]])


def test_one_hot_by_hand():
    labels = np.array([[[0, 1, 2, -1, 2]]], np.int8)
    np.testing.assert_array_equal(
        one_hot(labels, 3), [[[[0, 1, 0, 0, 0]]], [[[0, 0, 1, 0, 1]]], [[[0, 0, 0, 0, 0]]]]
    )


def test_input_channels():
    four = dataclasses.replace(CASCADE, labels=("background", "a", "b", "c"))
    assert [four.input_channels(c) for c in four.configurations] == [4, 1]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Both stages preprocessed; stage 1's folds 0 to 3 trained and validated, in one session."""
    folder = make_workspace(tmp_path_factory.mktemp("cascade"), plans=CASCADE)
    preprocess_dataset(dataset.load_dataset(folder), CASCADE, "3d_lowres", folder, 1)
    for fold in "0123":
        assert run_fold(folder, "3d_lowres", fold, SHORT)
    return folder


def split_of(workspace, fold):
    names = [case.name for case in dataset.load_dataset(workspace).labelled]
    return splits.load_or_make_splits(workspace, names)[fold]


def test_the_two_stages_end_to_end(shared, caplog, capsys):
    """The last fold is missing, and said to be; then every case is segmented by a stranger."""
    line = f"--workspace {shared} --fold 0 --device cpu --workers 0 --threads 1"
    assert command(["train", "3d_cascade_fullres", *line.split()]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: 3d_cascade_fullres: 1 of 6 cases lack the labels of 3d_lowres")
    assert "folds 4 have yet to make; run `train 3d_lowres --fold K`" in error
    assert run_fold(shared, "3d_lowres", "4", SHORT)

    cases = {case.name: case for case in dataset.load_dataset(shared).labelled}
    wrong = 0
    for fold in range(5):
        run = open_run(shared, "3d_lowres", str(fold), SHORT)
        end = read_checkpoint(run.folder / LATEST_CHECKPOINT, LOWRES)
        network = load_network(run, end["network"])
        for name in split_of(shared, fold).validation:
            assert name not in run.spec.train
            channels = [volume.read(path) for path in cases[name].images]
            given = prepare_case(cases[name], run)
            scores, placement = predict_case(given, run, network), given.placement
            wanted = place(channels, CASCADE, SECOND)
            stored = chunks.open_case(preprocessed_folder(shared, SECOND.name), name).previous
            assert scores.shape[1:] == (6, 12, 12)
            np.testing.assert_array_equal(stored[:], regrid(scores, placement, wanted, CASCADE))
            wrong += int((stored[:] > 0).sum())
    assert wrong > 0  # some network found something, so there is something to compare

    assert run_fold(shared, "3d_cascade_fullres", "0", SHORT)
    run = open_run(shared, "3d_cascade_fullres", "0", SHORT)
    end = read_checkpoint(run.folder / LATEST_CHECKPOINT, SECOND)
    assert end["network"]["encoder.0.0.weight"].shape[1] == 2
    found = json.loads((run.folder / "validation.json").read_text())
    assert found["complete"] is True
    assert sorted(found["dice"]) == sorted(run.spec.validation)


def test_labels_of_replaced_weights_are_refused_until_they_are_made_again(shared, tmp_path):
    """Trained anew without a validation, the first stage has left labels of what it was before."""
    shutil.copytree(shared, tmp_path, dirs_exist_ok=True)
    for fold in range(5):
        assert run_fold(tmp_path, "3d_lowres", str(fold), SHORT)
    assert run_fold(tmp_path, SECOND.name, "0", SHORT)
    with pytest.raises(TrainingError, match=r"fold_1/.*no such file"):  # fold 0 is let through
        merge.validated_masks(tmp_path, SECOND.name)
    unseen = split_of(tmp_path, 1).validation
    anew = dataclasses.replace(SHORT, seed=9, validation=False)
    assert run_fold(tmp_path, "3d_lowres", "1", anew, restart=True)

    stale = (
        f"{len(unseen)} of 6 cases, such as {min(unseen)}, have labels of other weights than "
        "3d_lowres has now in its folds 1; run `train 3d_lowres --fold K`"
    )
    for restart in (False, True):
        with pytest.raises(TrainingError, match=stale):
            run_fold(tmp_path, SECOND.name, "0", SHORT, restart=restart)
    replaced = f"fold_0/.* was trained on labels of 3d_lowres of which {len(unseen)} of 6"
    with pytest.raises(TrainingError, match=replaced):
        merge.validated_masks(tmp_path, SECOND.name)
    with pytest.raises(TrainingError, match=replaced):
        export(tmp_path, [SECOND.name], ["0"], tmp_path / "out", check_cases=0)

    first = open_run(tmp_path, "3d_lowres", "1", SHORT)
    weights = read_checkpoint(first.folder / LATEST_CHECKPOINT, LOWRES)["network"]
    assert not is_validated(tmp_path, first, weights)
    assert run_fold(tmp_path, "3d_lowres", "1", SHORT)
    with pytest.raises(TrainingError, match="begin 3d_cascade_fullres anew with --restart"):
        run_fold(tmp_path, SECOND.name, "0", SHORT)
    assert run_fold(tmp_path, SECOND.name, "0", SHORT, restart=True)
    export(tmp_path, [SECOND.name], ["0"], tmp_path / "out", check_cases=0)


def test_labels_that_do_not_say_whose_they_are_are_made_again(shared, tmp_path):
    """As an older version stored them."""
    shutil.copytree(shared, tmp_path, dirs_exist_ok=True)
    run = open_run(tmp_path, "3d_lowres", "0", SHORT)
    weights = read_checkpoint(run.folder / LATEST_CHECKPOINT, LOWRES)["network"]
    folder = preprocessed_folder(tmp_path, SECOND.name)
    assert validate(tmp_path, run)
    assert is_validated(tmp_path, run, weights)
    name = run.spec.validation[0]
    chunks.write_previous(folder, name, np.zeros((6, 24, 24), np.int8), "")
    assert not is_validated(tmp_path, run, weights)
    with pytest.raises(TrainingError, match=f"1 of 1 cases, such as {name}, have labels of other"):
        cascade_labels.require_labels(tmp_path, CASCADE, SECOND, [name])
    assert validate(tmp_path, run)
    assert chunks.open_case(folder, name).previous_weights == weights_digest(weights)
    cascade_labels.require_labels(tmp_path, CASCADE, SECOND, [name])


def test_what_is_missing_is_said(tmp_path):
    make_workspace(tmp_path, plans=CASCADE)
    folds = [
        {"train": ["case_2"], "validation": ["case_0", "case_1"]},
        {"train": ["case_0"], "validation": ["case_2"]},
    ]
    (tmp_path / "splits.json").write_text(strict_json.dumps({"schema_version": 1, "folds": folds}))
    names = ["case_0", "case_1", "case_2"]
    labels = np.zeros((6, 24, 24), np.int8)
    folder = preprocessed_folder(tmp_path, SECOND.name)

    def require(needed=names):
        cascade_labels.require_labels(tmp_path, CASCADE, SECOND, needed)

    with pytest.raises(TrainingError, match=r"3 of 3 cases lack the labels .* folds 0, 1 have yet"):
        require()
    chunks.write_previous(folder, "case_0", labels, "")
    chunks.write_previous(folder, "case_1", labels, "")
    with pytest.raises(TrainingError, match=r"1 of 3 cases lack the labels .* folds 1 have yet"):
        require()
    with pytest.raises(TrainingError, match="no fold validates case case_3, so 3d_lowres cannot"):
        require(["case_0", "case_3"])
    chunks.write_previous(folder, "case_2", labels, "")
    require()
    (folder / "case_1.json").unlink()
    with pytest.raises(
        TrainingError, match=r"1 of 3 cases are not there, such as case_1; run `preprocess 3d_casc"
    ):
        require()


def test_validation_leaves_labels_where_the_second_stage_has_been_preprocessed(
    shared, tmp_path, caplog
):
    """Before that it says so; after it only what lacks labels is segmented again."""
    for entry in shared.iterdir():
        if entry.name not in ("preprocessed", "plans.json"):
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "preprocessed").mkdir()
    (tmp_path / "preprocessed" / "3d_lowres").symlink_to(preprocessed_folder(shared, "3d_lowres"))
    (tmp_path / "plans.json").write_text(strict_json.dumps(CASCADE))
    run = open_run(tmp_path, "3d_lowres", "0", SHORT)
    weights = read_checkpoint(run.folder / LATEST_CHECKPOINT, LOWRES)["network"]
    assert validate(tmp_path, run)
    text = "2 of 2 cases have not been preprocessed for it; run `preprocess 3d_cascade_fullres`"
    assert text in caplog.text
    assert is_validated(tmp_path, run, weights)
    preprocess_dataset(dataset.load_dataset(tmp_path), CASCADE, SECOND.name, tmp_path, 1)
    assert not is_validated(tmp_path, run, weights)
    caplog.clear()
    assert validate(tmp_path, run)
    assert "have not been preprocessed" not in caplog.text
    assert is_validated(tmp_path, run, weights)
    for name in run.spec.validation:
        ours, theirs = (
            chunks.open_case(preprocessed_folder(folder, SECOND.name), name).previous[:]
            for folder in (tmp_path, shared)
        )
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(DatasetError, match="expected int8"):
        chunks.write_previous(
            preprocessed_folder(tmp_path, SECOND.name), "case_0", np.zeros((6, 24), np.int8), ""
        )


def test_batches_carry_the_first_stage_spoiled_in_training_only(tmp_path):
    make_workspace(tmp_path, cases=5, plans=CASCADE)
    folder = preprocessed_folder(tmp_path, SECOND.name)
    for index in range(5):
        target = chunks.open_case(folder, f"case_{index}").target[:]
        chunks.write_previous(
            folder, f"case_{index}", np.where(target > 0, 1, 0).astype(np.int8), ""
        )
    shrunk = dataclasses.replace(
        NO_AUGMENTATION,
        morphology_probability=1,
        morphology_label_probability=1,
        removal_probability=1,
        removal_label_probability=1,
        removal_share=1,
    )
    run = open_run(tmp_path, SECOND.name, "0", dataclasses.replace(QUICK, augmentation=shrunk))
    assert run.spec.previous_labels == 1

    def differ(validation):
        made = [make_patches(run.spec, BatchKey(0, i, validation)).labels for i in range(4)]
        return [bool((pair[:, 0] != pair[:, 1]).any()) for pair in made]

    assert not any(differ(validation=True))
    assert all(differ(validation=False))


@pytest.mark.slow
def test_a_tiny_network_overfits_one_case_by_what_the_first_stage_found(tmp_path):
    """The image is noise: only the first stage's labels tell where the foreground is."""
    architecture = dataclasses.replace(
        ARCHITECTURE, features=(8, 16), encoder_convs=(2, 2), decoder_convs=(2,)
    )
    second = dataclasses.replace(SECOND, patch=(16, 32, 32), batch=1, architecture=architecture)
    both = dataclasses.replace(CASCADE, configurations=(second, LOWRES))
    make_workspace(tmp_path, cases=1, shape=(16, 32, 32), plans=both)
    assert plans_module.load(tmp_path / "plans.json") == both
    image = tmp_path / "raw" / "case_0.nii.gz"
    scan = volume.read(image)
    noise = np.random.default_rng(1).normal(50, 20, scan.voxels.shape).astype(np.float32)
    volume.write(scan.with_voxels(noise), image)
    folder = preprocessed_folder(tmp_path, SECOND.name)
    target = chunks.open_case(folder, "case_0").target[:]
    data = prepare.prepare([volume.read(image)], both, second).data
    source = digest_cases(tmp_path, dataset.load_dataset(tmp_path).cases)["case_0"]
    chunks.write_case(folder, "case_0", data, target, both.normalisations, source=source)
    grown = dilate(target > 0, 1.0)  # the first stage found too much
    chunks.write_previous(folder, "case_0", grown.astype(np.int8), "")
    config = dataclasses.replace(
        QUICK,
        epochs=2,
        batches_per_epoch=60,
        learning_rate=1e-2,
        lr_schedule="poly",
        augmentation=NO_AUGMENTATION,
    )
    assert run_fold(tmp_path, SECOND.name, "all", config)
    run = open_run(tmp_path, SECOND.name, "all", config)
    assert validate(tmp_path, run)
    scores = json.loads((run.folder / "validation.json").read_text())["dice"]
    assert scores["case_0"]["hemorrhage"] > 0.95
