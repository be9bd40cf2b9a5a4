"""Many scans through one ensemble: as one by one, with errors, progress and an end on demand."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import make_bundle

from ichseg.engine import machine
from ichseg.engine.machine import MemoryLimit
from ichseg.errors import InputError, WeightsError
from ichseg.predict.ensemble import Ensemble
from ichseg.predict.many import segment_many
from ichseg.scan import volume
from ichseg.scan.volume import Volume


@pytest.fixture
def ensemble(tmp_path):
    make_bundle(tmp_path / "weights")
    return Ensemble.load(str(tmp_path / "weights"), "cpu")


@pytest.fixture
def paths(tmp_path, scan):
    """Three scans that differ, the second of them no scan."""
    for name, shift in (("a", 0), ("c", 7)):
        volume.write(scan.with_voxels(np.roll(scan.voxels, shift, 2)), tmp_path / f"{name}.mha")
    (tmp_path / "b.mha").write_bytes(b"no scan")
    return [tmp_path / f"{name}.mha" for name in "abc"]


def test_each_is_what_it_is_alone_and_one_bad_scan_stops_no_other(ensemble, paths):
    outcomes = list(segment_many(ensemble, iter(map(str, paths)), "fast"))
    assert [outcome.image for outcome in outcomes] == list(map(str, paths))
    assert outcomes[1].found is None
    assert isinstance(outcomes[1].error, InputError)
    assert "b.mha" in str(outcomes[1].error)
    masks = []
    for path, outcome in zip(paths[::2], outcomes[::2], strict=True):
        alone = ensemble.segment(path, "fast")
        masks.append(outcome.found.mask.voxels)
        np.testing.assert_array_equal(masks[-1], alone.mask.voxels)
        assert outcome.found.lesions == alone.lesions != ()
        assert outcome.error is None
    assert (masks[0] != masks[1]).any()


def test_all_kinds_of_scans_go_together_and_each_mask_fits_what_was_given(ensemble, scan, tmp_path):
    scan = Volume(scan.voxels, scan.spacing_mm)  # an array has no direction
    volume.write(scan, tmp_path / "a.mha")
    volume.write(scan, tmp_path / "a.nii.gz")
    given = [
        tmp_path / "a.mha",
        str(tmp_path / "a.nii.gz"),
        scan,
        sitk.ReadImage(str(tmp_path / "a.mha")),
        nibabel.load(tmp_path / "a.nii.gz"),
        scan.voxels,
    ]
    outcomes = list(segment_many(ensemble, given, "fast", spacing_mm=(5, 0.8, 0.9)))
    assert [outcome.error for outcome in outcomes] == [None] * len(given)
    assert all(outcome.image is image for outcome, image in zip(outcomes, given, strict=True))
    expected = ensemble.segment(scan, "fast").mask.voxels
    assert 0.05 < expected.mean() < 0.95
    for outcome in outcomes:
        mask = outcome.found.mask.voxels
        if isinstance(outcome.image, nibabel.Nifti1Image):
            assert mask.shape == outcome.image.shape
            mask = mask.T
        np.testing.assert_array_equal(mask, expected)


def test_every_array_has_the_spacing_and_the_axes_that_are_said(ensemble, scan):
    arrays = [scan.voxels, np.roll(scan.voxels, 7, 2)]
    turned = [array.transpose(2, 1, 0) for array in arrays]
    outcomes = segment_many(ensemble, turned, "fast", spacing_mm=(0.9, 0.8, 5), axes="xyz")
    for array, outcome in zip(arrays, outcomes, strict=True):
        expected = ensemble.segment(array, "fast", spacing_mm=(5, 0.8, 0.9))
        np.testing.assert_array_equal(outcome.found.mask.voxels.T, expected.mask.voxels)
        assert outcome.found.volume_ml == pytest.approx(expected.volume_ml)


def test_of_those_in_memory_too_a_bad_one_stops_no_other(ensemble, paths, scan, tmp_path):
    volume.write(scan, tmp_path / "gone.nii.gz")
    gone = nibabel.load(tmp_path / "gone.nii.gz")  # which reads its voxels later
    (tmp_path / "gone.nii.gz").unlink()
    bad = [gone, scan.voxels, None, scan.with_voxels(scan.voxels + np.float32(np.nan))]
    *failed, last = segment_many(ensemble, [*bad, paths[0]], "fast")
    assert last.found is not None
    assert all(isinstance(outcome.error, InputError) for outcome in failed)
    said = ["gone.nii.gz: damaged or gone", "without spacing_mm", "a NoneType", "NaN"]
    assert all(words in str(outcome.error) for words, outcome in zip(said, failed, strict=True))


@pytest.mark.parametrize("kind", ["path", "text", "volume", "array", "SimpleITK", "nibabel"])
def test_a_single_scan_is_refused_not_taken_apart(ensemble, paths, scan, kind):
    image = {
        "path": paths[0],
        "text": str(paths[0]),
        "volume": scan,
        "array": scan.voxels,
        "SimpleITK": sitk.ReadImage(str(paths[0])),
        "nibabel": nibabel.Nifti1Image(scan.voxels, np.eye(4)),
    }[kind]
    with pytest.raises(InputError, match="expected several scans, such as a list"):
        next(segment_many(ensemble, image, "fast"))


def test_progress_is_of_each_scan_and_what_it_raises_ends_the_work(ensemble, paths):
    seen = []
    list(segment_many(ensemble, paths, "fast", lambda *given: seen.append(given)))
    assert {number for number, _, _ in seen} == {0, 2}
    assert seen[-1][1] == seen[-1][2]

    class EnoughError(Exception):
        pass

    def stop(number, done, total):
        if number == 2:
            raise EnoughError

    outcomes = segment_many(ensemble, paths, "fast", stop)
    assert next(outcomes).found is not None
    with pytest.raises(EnoughError):
        list(outcomes)


def test_saving_has_a_thread_of_its_own(ensemble, paths, tmp_path):
    threads = set()

    def save(image, found):
        threads.add(threading.current_thread().name)
        volume.write(found.mask, tmp_path / "out" / image.name)

    for outcome in segment_many(ensemble, paths, "fast", save=save):
        assert (tmp_path / "out" / outcome.image.name).exists() == (outcome.error is None)
    assert threads.isdisjoint({threading.main_thread().name})


def test_what_concerns_every_scan_is_raised(ensemble, paths, tmp_path):
    for weights in (tmp_path / "weights").rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(WeightsError):
        list(segment_many(ensemble, paths, "fast"))


def test_a_scan_beyond_the_memory_is_refused_and_others_go_on(ensemble, paths, monkeypatch):
    limit = MemoryLimit(machine.resident_bytes() + 1000, "a test")
    monkeypatch.setattr(machine, "memory_limit", lambda: limit)
    first, _, _ = segment_many(ensemble, paths, "fast")
    assert "a test allows" in str(first.error)
    assert first.found is None


def test_probabilities_and_threshold_reach_each(ensemble, paths):
    (outcome,) = segment_many(ensemble, paths[:1], "fast", probabilities=True, threshold=0.3)
    chance = outcome.found.probabilities[0].astype(np.float32)
    clear = abs(chance - 0.3) > 1e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal((chance > 0.3)[clear], outcome.found.mask.voxels[clear] == 1)


def test_scans_of_several_threads_go_through_the_networks_one_after_another(ensemble, scan):
    """What another thread computes meanwhile would be in the mask."""
    others = [scan, scan.with_voxels(np.roll(scan.voxels, 7, 2))]
    expected = [ensemble.segment(each, "balanced").mask.voxels for each in others]
    first, second = threading.Event(), threading.Event()

    def of_first(done, total):
        first.set()
        assert not second.wait(0.2)

    def of_second(done, total):
        second.set()

    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(ensemble.segment, others[0], "balanced", of_first)
        assert first.wait(20)
        other = threads.submit(ensemble.segment, others[1], "balanced", of_second)
    for found, mask in zip((one.result(), other.result()), expected, strict=True):
        np.testing.assert_array_equal(found.mask.voxels, mask)


@pytest.mark.parametrize("budget_s", ["60", float("nan"), float("inf"), [1]])
def test_what_is_no_time_budget_is_refused_before_anything_else(ensemble, budget_s):
    with pytest.raises(InputError, match=r"^budget_s .*expected a number of seconds"):
        ensemble.segment("no such file", "fast", budget_s=budget_s)


@pytest.mark.parametrize("threshold", [5, 0, True, float("nan"), "0.3"])
def test_what_is_no_threshold_is_refused_before_anything_else(ensemble, scan, threshold):
    for segment in (
        lambda: ensemble.segment("no such file", "fast", threshold=threshold),
        lambda: next(segment_many(ensemble, ["no such file"], "fast", threshold=threshold)),
    ):
        with pytest.raises(InputError, match=r"^threshold .*expected a number from 0.01 to 0.99"):
            segment()


def test_a_threshold_may_be_a_number_of_numpy(ensemble, scan):
    plain, of_numpy = (ensemble.segment(scan, "fast", threshold=t) for t in (0.3, np.float32(0.3)))
    assert of_numpy.ran["threshold"] == pytest.approx(0.3)
    json.dumps(of_numpy.ran)
    np.testing.assert_array_equal(plain.mask.voxels, of_numpy.mask.voxels)
