"""What a cross-validation is put together from."""

import dataclasses

import pytest
from helpers.workspaces import make_workspace

from ichseg.errors import TrainingError
from training.crossval import merge
from training.data.dataset import load_dataset, save_dataset


def test_a_fold_that_was_never_trained_is_named_with_both_ways_out(tmp_path):
    workspace = make_workspace(tmp_path)
    with pytest.raises(
        TrainingError,
        match=r"fold_0/checkpoint_latest\.pt: no such file; run `train 3d_fullres --fold 0` first, "
        "or leave 3d_fullres out by --configurations$",
    ):
        merge.validated_masks(workspace, "3d_fullres")


def test_a_case_named_like_the_probabilities_of_another_is_scored(tmp_path, monkeypatch):
    """``x_probability.nii.gz`` beside ``x.nii.gz`` is no mask in a folder of the program."""
    workspace = make_workspace(tmp_path)
    found = load_dataset(workspace)
    names = ("x", "x_probability", "y")
    cases = tuple(
        dataclasses.replace(case, name=name) for case, name in zip(found.cases, names, strict=False)
    )
    save_dataset(dataclasses.replace(found, cases=cases), workspace)
    masks = {case.name: case.reference for case in cases}
    monkeypatch.setattr(merge, "validated_masks", lambda *_: masks)
    monkeypatch.setattr(merge, "digest_of_folds", lambda *_: "")
    evaluation = merge.cross_validate(workspace, "3d_fullres", workers=1)
    assert tuple(case.name for case in evaluation.cases) == names
