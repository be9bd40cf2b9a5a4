"""What a cross-validation is put together from."""

import pytest
from helpers.workspaces import make_workspace

from ichseg.errors import TrainingError
from training.crossval import merge


def test_a_fold_that_was_never_trained_is_named_with_both_ways_out(tmp_path):
    workspace = make_workspace(tmp_path)
    with pytest.raises(
        TrainingError,
        match=r"fold_0/checkpoint_latest\.pt: no such file; run `train 3d_fullres --fold 0` first, "
        "or leave 3d_fullres out by --configurations$",
    ):
        merge.validated_masks(workspace, "3d_fullres")
