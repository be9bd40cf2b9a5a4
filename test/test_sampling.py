import dataclasses
import itertools
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from workspaces import BUSY, make_workspace

from ichseg.errors import DatasetError
from ichseg.plans import Normalisation
from training.augment import NO_AUGMENTATION
from training.sampling import (
    BatchKey,
    BatchSpec,
    BatchStream,
    centred,
    draw_lower,
    is_forced,
    make_batch,
    read_patch,
)
from training.store import StoredCase, write_case

KEYS = [BatchKey(0, 0), BatchKey(0, 1), BatchKey(0, 0, validation=True), BatchKey(1, 0)]


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    workspace = make_workspace(tmp_path_factory.mktemp("sampling"))
    return BatchSpec(
        folder=workspace / "preprocessed" / "3d_fullres",
        train=("case_0", "case_1", "case_2", "case_3"),
        validation=("case_4", "case_5"),
        patch=(4, 16, 16),
        batch=2,
        in_plane=True,
        masked=(False,),
        foreground_fraction=0.33,
        augmentation=BUSY,
        seed=3,
        fold=1,
    )


def raw(batch):
    return batch.data.tobytes() + batch.target.tobytes()


def test_the_last_third_of_a_batch_is_forced():
    """Of 2 the second, of 3 the last, of 12 the last four."""
    for batch, forced in ((2, [1]), (3, [2]), (12, [8, 9, 10, 11]), (1, [])):
        assert [i for i in range(batch) if is_forced(i, batch, 0.33)] == forced


def test_unforced_patches_lie_anywhere_inside():
    rng = np.random.default_rng(0)
    lowers = {draw_lower(rng, (5, 9, 16), {}, (4, 8, 16), forced=False) for _ in range(100)}
    assert lowers == {(z, y, 0) for z in (0, 1) for y in (0, 1)}


def test_a_case_smaller_than_the_patch_is_centred():
    rng = np.random.default_rng(0)
    foreground = {1: np.array([[0, 1, 3]])}
    for forced in (False, True):
        lower = draw_lower(rng, (3, 9, 8), foreground, (8, 16, 8), forced=forced)
        assert lower == (-3, -4, 0)  # along z 3 voxels of padding before, 2 after


def test_forced_patches_are_centred_on_foreground_and_stay_inside():
    rng = np.random.default_rng(1)
    one = {1: np.array([[10, 10, 10]])}
    assert draw_lower(rng, (20, 20, 20), one, (4, 6, 8), forced=True) == (8, 7, 6)
    corner = {1: np.array([[0, 19, 1]])}
    assert draw_lower(rng, (20, 20, 20), corner, (4, 6, 8), forced=True) == (0, 14, 0)


def test_classes_are_drawn_alike_however_large():
    rng = np.random.default_rng(2)
    foreground = {
        1: np.full((1000, 3), 5),
        2: np.full((1, 3), 15),
        3: np.empty((0, 3), int),
        -1: np.full((9, 3), 9),
    }
    lowers = [draw_lower(rng, (20,) * 3, foreground, (2,) * 3, forced=True) for _ in range(400)]
    assert set(lowers) == {(4, 4, 4), (14, 14, 14)}
    assert np.mean([lower == (4, 4, 4) for lower in lowers]) == pytest.approx(0.5, abs=0.08)


def test_a_2d_patch_draws_its_slice_first():
    """Slice 2 has 999 voxels of the class, slice 7 one: either is as likely."""
    rng = np.random.default_rng(3)
    voxels = np.array([[2, 5, 5]] * 999 + [[7, 5, 5]])
    lowers = [draw_lower(rng, (9, 20, 20), {1: voxels}, (1, 4, 4), forced=True) for _ in range(400)]
    assert set(lowers) == {(2, 3, 3), (7, 3, 3)}
    assert np.mean([lower[0] == 2 for lower in lowers]) == pytest.approx(0.5, abs=0.08)


def test_a_larger_region_keeps_the_centre():
    assert centred((3, 5, 7), (4, 16, 16), (4, 20, 22)) == (3, 3, 4)


def test_outside_the_case_is_padding():
    data = np.arange(1, 9, dtype=np.float32).reshape(1, 2, 2, 2)
    target = np.ones((2, 2, 2), np.int8)
    case = StoredCase("c", data, target, {})
    region, labels = read_patch(case, (-1, 1, 0), (2, 2, 3))
    np.testing.assert_array_equal(region[0], [[[0, 0, 0], [0, 0, 0]], [[3, 4, 0], [0, 0, 0]]])
    expected = [[[-1, -1, -1], [-1, -1, -1]], [[1, 1, -1], [-1, -1, -1]]]
    np.testing.assert_array_equal(labels, expected)
    far, nothing = read_patch(case, (5, 0, 0), (2, 2, 2))
    assert not far.any()
    assert (nothing == -1).all()


def test_batches_have_the_right_shape_and_labels(spec):
    batch = make_batch(spec, KEYS[0])
    assert batch.data.shape == (2, 1, 4, 16, 16)
    assert batch.data.dtype == np.float32
    assert batch.target.shape == (2, 4, 16, 16)
    for index in range(10):
        batch = make_batch(spec, BatchKey(0, index))
        assert set(np.unique(batch.target)) <= {0, 1}
        assert batch.target[1].any()  # the forced sample
    flat = make_batch(dataclasses.replace(spec, patch=(16, 16), in_plane=False), KEYS[0])
    assert flat.data.shape == (2, 1, 16, 16)
    assert flat.target.shape == (2, 16, 16)


def test_a_batch_depends_on_its_numbers_only(spec):
    first = [raw(make_batch(spec, key)) for key in KEYS]
    assert [raw(make_batch(spec, key)) for key in reversed(KEYS)] == first[::-1]
    assert len(set(first)) == len(KEYS)
    for changed in (dataclasses.replace(spec, seed=4), dataclasses.replace(spec, fold=2)):
        assert raw(make_batch(changed, KEYS[0])) != first[0]


def test_validation_batches_are_not_augmented(spec):
    changed = dataclasses.replace(spec, augmentation=dataclasses.replace(BUSY, gamma=(2.0, 3.0)))
    assert raw(make_batch(changed, KEYS[2])) == raw(make_batch(spec, KEYS[2]))
    assert raw(make_batch(changed, KEYS[0])) != raw(make_batch(spec, KEYS[0]))


def test_validation_draws_differ_from_training_draws(spec):
    same = dataclasses.replace(spec, validation=spec.train, augmentation=NO_AUGMENTATION)
    assert raw(make_batch(same, KEYS[0])) != raw(make_batch(same, KEYS[2]))


def test_masked_channels_are_zero_outside(tmp_path):
    data = np.full((2, 4, 16, 16), 5, np.float32)
    target = np.zeros((4, 16, 16), np.int8)
    target[..., :8] = -1
    write_case(tmp_path, "c", data, target, (Normalisation("zscore"),) * 2)
    spec = BatchSpec(
        tmp_path, ("c",), ("c",), (4, 16, 16), 1, True, (True, False), 0.33, BUSY, 0, 0
    )
    batch = make_batch(spec, KEYS[2])
    assert not batch.data[0, 0, ..., :8].any()
    assert (batch.data[0, 0, ..., 8:] == 5).all()
    assert (batch.data[0, 1] == 5).all()
    assert not batch.target.any()


def test_the_number_of_workers_changes_no_byte(spec):
    keys = [BatchKey(0, index) for index in range(5)] + KEYS
    found = []
    for workers in (0, 1, 2):
        with BatchStream(spec, iter(keys), workers=workers, prefetch=3) as stream:
            found.append([raw(batch) for batch in stream])
    assert len(found[0]) == len(keys)
    assert found[1] == found[0]
    assert found[2] == found[0]
    assert found[0] == [raw(make_batch(spec, key)) for key in keys]


def test_a_stream_can_change_its_mind(spec):
    endless = (BatchKey(0, number) for number in itertools.count())
    with BatchStream(spec, endless, workers=1, prefetch=4) as stream:
        first = raw(next(stream))
        stream.restart(iter([KEYS[2]]))
        assert raw(next(stream)) == raw(make_batch(spec, KEYS[2]))
        with pytest.raises(StopIteration):
            next(stream)
    assert first == raw(make_batch(spec, BatchKey(0, 0)))


def test_an_error_in_a_worker_reaches_the_trainer(spec):
    broken = dataclasses.replace(spec, train=("nobody",))
    with (
        BatchStream(broken, iter(KEYS), workers=1, prefetch=2) as stream,
        pytest.raises(DatasetError, match="no finished case nobody"),
    ):
        next(stream)


def test_workers_end_when_the_trainer_is_killed(spec, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(
        "import os, pickle, signal, sys\n"
        "from training.sampling import BatchKey, BatchStream\n"
        "if __name__ == '__main__':\n"
        "    spec = pickle.loads(open(sys.argv[1], 'rb').read())\n"
        "    stream = BatchStream(spec, iter([BatchKey(0, 0)]), workers=1, prefetch=1)\n"
        "    next(stream)\n"
        "    print(*stream._pool._processes, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "spec").write_bytes(pickle.dumps(spec))
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "spec")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=60,
        check=False,
    )
    assert done.returncode == -9
    worker = Path("/proc") / done.stdout.decode().strip()
    assert worker.name.isdecimal()
    deadline = time.monotonic() + 10
    while worker.exists() and "zombie" not in (worker / "status").read_text():
        assert time.monotonic() < deadline, "the worker outlives its trainer"
        time.sleep(0.05)
