"""Many scans through one ensemble: as one by one, with errors, progress and an end on demand."""

import threading

import numpy as np
import pytest
from conftest import make_bundle

from ichseg.engine import machine
from ichseg.engine.machine import MemoryLimit
from ichseg.errors import InputError, WeightsError
from ichseg.predict.ensemble import Ensemble
from ichseg.predict.many import segment_many
from ichseg.scan import volume


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


def test_volumes_and_paths_go_together(ensemble, paths, scan):
    first, second = segment_many(ensemble, [scan, paths[0]], "fast")
    np.testing.assert_array_equal(first.found.mask.voxels, second.found.mask.voxels)


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
