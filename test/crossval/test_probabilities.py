"""Stored probabilities: small, and as exact as a byte allows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ichseg.errors import TrainingError
from training.crossval import probabilities


def test_what_is_read_is_off_by_half_a_step_at_most(tmp_path):
    scores = torch.softmax(torch.randn(3, 6, 20, 22, generator=torch.Generator().manual_seed(1)), 0)
    scores[:, :, :7] = torch.tensor([1.0, 0, 0])[:, None, None, None]
    probabilities.save(tmp_path / "case.npz", scores, regions=False)
    found = probabilities.load(tmp_path / "case.npz", regions=False)
    assert found.shape == (3, 6, 20, 22)
    assert np.abs(found[1:] - scores[1:].numpy()).max() <= 0.5 / 255 + 1e-6
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-6)
    assert (found[0, :, :7] == 1).all()


def test_only_the_box_with_anything_in_it_is_stored(tmp_path):
    scores = torch.zeros(2, 40, 100, 100)
    scores[0] = 1
    scores[1, 3:6, 50:60, 20:40] = torch.rand(3, 10, 20, generator=torch.Generator().manual_seed(2))
    probabilities.save(tmp_path / "case.npz", scores, regions=False)
    with np.load(tmp_path / "case.npz") as stored:
        assert stored["steps"].shape[1:] <= (3, 10, 20)
        assert stored["steps"].dtype == np.uint8
    assert (
        np.abs(
            probabilities.load(tmp_path / "case.npz", regions=False)[1] - scores[1].numpy()
        ).max()
        < 0.002
    )


def test_nothing_found_is_kept_too(tmp_path):
    scores = torch.zeros(2, 4, 5, 6)
    scores[0] = 1
    probabilities.save(tmp_path / "case.npz", scores, regions=False)
    np.testing.assert_array_equal(
        probabilities.load(tmp_path / "case.npz", regions=False), scores.numpy()
    )


def test_damage_is_said(tmp_path):
    path = tmp_path / "case.npz"
    with pytest.raises(TrainingError, match=r"case\.npz: no such file"):
        probabilities.load(path, regions=False)
    path.write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(TrainingError, match=r"case\.npz: damaged"):
        probabilities.load(path, regions=False)


def test_each_region_has_its_own(tmp_path):
    """Logits go in and come out, within half a step of 1/8, from -16 to 16."""
    scores = torch.tensor([[-20.0, 0.1, 3.03, 20.0], [-20.0, -0.1, -3, 20.0]]).reshape(2, 1, 1, 4)
    probabilities.save(tmp_path / "case.npz", scores, regions=True)
    found = probabilities.load(tmp_path / "case.npz", regions=True)
    assert np.abs(found - scores.numpy().clip(-16, 15.875)).max() <= 1 / 16 + 1e-6
    assert found[0, 0, 0].tolist() == [-16, 0.125, 3, 15.875]
    np.testing.assert_array_equal(found > 0, scores.numpy() > 0)


def test_regions_are_stored_where_they_may_be_and_told_from_those_of_earlier_versions(tmp_path):
    """A lesion of four voxels in a background of -9: all beyond its surroundings is -16."""
    scores = torch.full((1, 4, 20, 20), -9.0)
    scores[0, 1:3, 8:10, 8:10] = 3
    path = tmp_path / "case.npz"
    probabilities.save(path, scores, regions=True)
    found = probabilities.load(path, regions=True)
    assert (found[0, :, 6:12, 6:12] == scores[0, :, 6:12, 6:12].numpy()).all()
    assert (found[0, :, :5] == -16).all()
    with np.load(path) as stored:
        assert stored["logits"].shape == (1, 4, 6, 6)
    assert probabilities.are_stored(path, regions=True)
    assert not probabilities.are_stored(path, regions=False)  # as earlier ones of regions were
    assert not probabilities.are_stored(tmp_path / "none.npz", regions=True)
