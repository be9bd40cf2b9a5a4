"""Preprocessing where plans cut scans to the head."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
from helpers.heads import BOX, SPACING_MM, head_in_air
from helpers.planning import plan

from ichseg.errors import DatasetError
from ichseg.predict import prepare as inference
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from training.data.dataset import Case, Dataset
from training.data.workspace import preprocessed_folder
from training.planning.fingerprint import compute_fingerprint
from training.planning.overrides import Overrides
from training.store import chunks
from training.store.preprocess import preprocess_dataset


@pytest.fixture
def heads(tmp_path):
    """A workspace of a head in air, planned with a cut to it; its labels begin at slice 2."""
    label = np.zeros((12, 100, 100), np.uint8)
    label[2:5, 30:40, 40:50] = 1
    image = Volume(head_in_air(), SPACING_MM)
    volume.write(image, tmp_path / "head.mha")
    volume.write(image.with_voxels(label), tmp_path / "head_label.mha")
    cases = (Case("head", (tmp_path / "head.mha",), tmp_path / "head_label.mha"),)
    dataset = Dataset("Heads", ("CT",), ("background", "bleed"), cases)
    chosen = Overrides(spacing_mm=(5.0, 2.0, 2.0), patch=(8, 16, 16), batch=2, crop="head")
    found = compute_fingerprint(dataset, 1)
    return dataset, plan(found, dataset, recipe="msd2018", overrides=chosen)


def test_stores_the_box_that_inference_sees(heads, tmp_path):
    dataset, plans = heads
    preprocess_dataset(dataset, plans, "3d_fullres", tmp_path, 1)
    case = chunks.open_case(preprocessed_folder(tmp_path, "3d_fullres"), "head")
    expected = inference.prepare(
        [volume.read(tmp_path / "head.mha")], plans, plans.configuration("3d_fullres")
    )
    assert expected.placement.box == BOX
    half_a_step = chunks.HU_STEP / 2 / plans.normalisations[0].deviation
    np.testing.assert_allclose(case.data[:], expected.data, rtol=0, atol=1.01 * half_a_step)
    # 10 x 10 voxels of 1 mm from row 30 - 11 and column 40 - 20 of the box, at 2 mm; nearest
    found = np.argwhere(case.target[:] == 1)
    assert found.min(0).tolist() == [2, 9, 10]
    assert len(found) == 3 * 5 * 5


def test_a_label_beyond_the_head_is_refused(heads, tmp_path):
    dataset, plans = heads
    path = tmp_path / "head_label.mha"
    label = volume.read(path)
    label.voxels[0, 3:5, 3] = 1
    volume.write(label, path)
    with pytest.raises(
        DatasetError, match="case head: 2 foreground voxels lie outside of the head"
    ):
        preprocess_dataset(dataset, plans, "3d_fullres", tmp_path, 1)
    whole = replace(plans, crop="nonzero")
    with pytest.raises(DatasetError, match=r"other plans \(spacing, intensities, crop or"):
        preprocess_dataset(dataset, whole, "3d_fullres", tmp_path, 1)
    shutil.rmtree(preprocessed_folder(tmp_path, "3d_fullres"))
    assert preprocess_dataset(dataset, whole, "3d_fullres", tmp_path, 1) == 1
