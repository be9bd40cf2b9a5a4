"""Batches on the training device: both engines, workers, shares, previous labels."""

import dataclasses
import functools
import itertools
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.batches import CPU, KEYS, VALIDATION, made, opened, raw, spec_of
from helpers.workspaces import BUSY, make_workspace

from ichseg.errors import DatasetError, TrainingError
from ichseg.model.plans import Normalisation
from training.batches import reading
from training.batches.augmentation import NO_AUGMENTATION
from training.batches.reading import begin_worker, read_regions
from training.batches.sampling import BatchKey, BatchSpec
from training.batches.stream import Batch, BatchStream, StreamOptions, choose_engine, open_batches
from training.store.chunks import open_case, write_case, write_previous

ENGINES = ("host", "device")
# everything but what spoils previous labels
WARPED = dataclasses.replace(BUSY, morphology_probability=0, removal_probability=0)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """A cascade's second stage whose first stage was always right."""
    workspace = make_workspace(tmp_path_factory.mktemp("batches"))
    folder = workspace / "preprocessed" / "3d_fullres"
    names = tuple(f"case_{index}" for index in range(6))
    for name in names:
        write_previous(folder, name, np.maximum(open_case(folder, name).target[...], 0), "")
    return spec_of(
        folder,
        augmentation=dataclasses.replace(BUSY, morphology_probability=0.5),
        previous_labels=1,
    )


def test_auto_lets_the_gpu_augment():
    assert choose_engine("auto", torch.device("cuda")) == "device"
    assert choose_engine("auto", CPU) == "host"
    assert choose_engine("device", CPU) == "device"


@pytest.mark.parametrize("engine", ENGINES)
def test_the_number_of_workers_changes_no_byte(spec, engine):
    keys = [BatchKey(0, index) for index in range(5)] + KEYS
    found = [raw(made(spec, keys, engine, workers=count, prefetch=3)) for count in (0, 1, 3)]
    assert len(found[0]) == len(keys)
    assert len(set(found[0])) == len(keys) - 2  # two keys are there twice
    assert found[1] == found[0]
    assert found[2] == found[0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("patch", [(4, 16, 16), (16, 16)])
def test_shares_join_to_the_batch_of_one_process(spec, engine, patch):
    spec = dataclasses.replace(spec, batch=7, patch=patch)
    for whole, *parts in zip(
        made(spec, KEYS, engine),
        *(made(dataclasses.replace(spec, share=(rank, 3)), KEYS, engine) for rank in range(3)),
        strict=True,
    ):
        assert [len(part.data) for part in parts] == [2, 2, 3]
        joined = Batch(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        assert raw([joined]) == raw([whole])


def test_both_engines_make_the_same_of_a_batch_that_is_not_augmented(spec):
    plain = dataclasses.replace(spec, augmentation=NO_AUGMENTATION)
    assert raw(made(plain, KEYS, "device")) == raw(made(plain, KEYS, "host"))
    assert raw(made(spec, [VALIDATION], "device")) == raw(made(plain, [VALIDATION], "host"))


def test_both_engines_read_the_same_of_large_and_small_numbers(tmp_path):
    """A case with one value far out is stored in 32 bits, the other in 16; both are padded."""
    rng = np.random.default_rng(0)
    for name, peak in (("a", 1e6), ("b", 5.0)):
        data = rng.normal(size=(1, 3, 15, 18)).astype(np.float32)
        data[0, 1, 2, 3] = peak
        write_case(tmp_path, name, data, np.ones((3, 15, 18), np.int8), (Normalisation("zscore"),))
    wide = [open_case(tmp_path, name).data.multiples(...).dtype for name in "ab"]
    assert wide == [np.int32, np.int16]
    spec = BatchSpec(
        tmp_path, ("a", "b"), ("a", "b"), (4, 16, 16), 4, True, (False,), 0, NO_AUGMENTATION, 0, 0
    )
    host, device = (made(spec, [VALIDATION], engine)[0] for engine in ENGINES)
    assert host.data.max() == pytest.approx(1e6)
    assert raw([device]) == raw([host])


@pytest.mark.parametrize("engine", ENGINES)
def test_masked_channels_are_zero_outside(tmp_path, engine):
    data = np.full((2, 4, 16, 16), 5, np.float32)
    target = np.zeros((4, 16, 16), np.int8)
    target[..., :8] = -1
    write_case(tmp_path, "c", data, target, (Normalisation("zscore"),) * 2)
    spec = BatchSpec(
        tmp_path, ("c",), ("c",), (4, 16, 16), 1, True, (True, False), 0.33, BUSY, 0, 0
    )
    (batch,) = made(spec, [VALIDATION], engine)
    assert not batch.data[0, 0, ..., :8].any()
    assert (batch.data[0, 0, ..., 8:] == 5).all()
    assert (batch.data[0, 1] == 5).all()
    assert not batch.target.any()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("patch", "layout"), [((4, 16, 16), "_3d"), ((16, 16), "")])
def test_previous_labels_follow_the_target_through_the_warp(spec, engine, patch, layout):
    """The first stage was right, so its channel is the target, whatever has happened to both."""
    spec = dataclasses.replace(spec, patch=patch, augmentation=WARPED)
    options = StreamOptions(engine, workers=0)
    wanted = getattr(torch, f"channels_last{layout}")
    keys = [BatchKey(0, number) for number in range(10)] + [VALIDATION]
    foreground = 0
    for batch in open_batches(spec, iter(keys), options, CPU, wanted):
        assert batch.data.shape == (2, 2, *patch)
        assert batch.data.is_contiguous(memory_format=wanted)
        assert batch.target.min() == 0
        assert torch.equal(batch.data[:, 1], batch.target.float())
        foreground += int(batch.target.sum())
    assert foreground > 500


def test_each_previous_label_has_its_channel(tmp_path):
    data = np.zeros((1, 4, 16, 16), np.float32)
    previous = np.zeros((4, 16, 16), np.int8)
    previous[:, :5], previous[:, 9:, :8] = 2, 3
    write_case(tmp_path, "c", data, np.zeros_like(previous), (Normalisation("none"),))
    write_previous(tmp_path, "c", previous, "")
    spec = BatchSpec(
        tmp_path, ("c",), ("c",), (6, 16, 16), 1, True, (False,), 0, BUSY, 0, 0, previous_labels=3
    )
    for engine in ENGINES:
        (batch,) = made(spec, [VALIDATION], engine)
        inside = batch.data[0, 1:, 1:5].numpy()  # the case is two slices thinner than the patch
        for label in (1, 2, 3):
            np.testing.assert_array_equal(inside[label - 1], previous == label)
        assert not batch.data[0, :, [0, 5]].any()


@pytest.mark.parametrize("engine", ENGINES)
def test_only_training_batches_have_their_previous_labels_spoiled(spec, engine, monkeypatch):
    seen = []

    def erase(previous, classes, rng, config, *, patch_voxels):
        seen.append((classes, patch_voxels, rng.random()))
        return np.zeros_like(previous)

    monkeypatch.setattr(reading, "corrupt", erase)
    training, validation = made(spec, [KEYS[0], VALIDATION], engine)
    assert not training.data[:, 1].any()
    assert training.target.any()
    assert validation.data[:, 1].any()
    assert [call[:2] for call in seen] == [(1, 4 * 16 * 16)] * 2
    assert seen[0][2] != seen[1][2]


@pytest.mark.parametrize("engine", ENGINES)
def test_says_when_the_first_stage_is_missing(tmp_path, engine):
    folder = make_workspace(tmp_path, cases=1) / "preprocessed" / "3d_fullres"
    spec = BatchSpec(
        folder,
        ("case_0",),
        ("case_0",),
        (4, 16, 16),
        1,
        True,
        (False,),
        0,
        BUSY,
        0,
        0,
        previous_labels=1,
    )
    with pytest.raises(DatasetError, match="case case_0 has no labels of the first stage"):
        made(spec, [VALIDATION], engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stream_can_change_its_mind(spec, engine):
    endless = (BatchKey(0, number) for number in itertools.count())
    with opened(spec, endless, engine, workers=1, prefetch=4) as stream:
        first = next(stream)
        stream.restart(iter([VALIDATION]))
        second = next(stream)
        with pytest.raises(StopIteration):
            next(stream)
    assert raw([first, second]) == raw(made(spec, [BatchKey(0, 0), VALIDATION], engine))


def test_waiting_is_only_what_next_takes():
    """A batch takes a quarter of a second; a worker makes the second while the first is used."""

    def slowly(_):
        time.sleep(0.25)
        return Batch(torch.zeros(1), torch.zeros(1))

    for workers in (0, 1):
        with BatchStream(str, slowly, iter("abc"), CPU, workers=workers, prefetch=1) as stream:
            next(stream)
            first = stream.waited_s
            time.sleep(0.75)
            next(stream)
            second = stream.waited_s - first
        assert first >= 0.25
        assert second < 0.1 if workers else second >= 0.25


def test_an_error_in_a_worker_reaches_the_trainer(spec):
    broken = dataclasses.replace(spec, train=("nobody",))
    with (
        opened(broken, KEYS, workers=1, prefetch=2) as stream,
        pytest.raises(DatasetError, match="no finished case nobody"),
    ):
        next(stream)


def test_refuses_to_keep_cases_where_nothing_is_augmented(spec):
    with pytest.raises(TrainingError, match="on cpu the workers augment; add --augmentation-engin"):
        opened(spec, KEYS, "auto", gpu_cache="yes")


def test_workers_end_when_the_trainer_is_killed(spec, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(
        "import os, pickle, signal, sys\n"
        "import torch\n"
        "from training.batches.stream import StreamOptions, open_batches\n"
        "from training.batches.sampling import BatchKey\n"
        "if __name__ == '__main__':\n"
        "    spec = pickle.loads(open(sys.argv[1], 'rb').read())\n"
        "    options = StreamOptions(workers=1, prefetch=1)\n"
        "    stream = open_batches(spec, iter([BatchKey(0, 0)]), options, torch.device('cpu'))\n"
        "    next(stream)\n"
        "    print(*stream._pool._processes, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "spec").write_bytes(pickle.dumps(spec))
    root = Path(__file__).parents[2]
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


@pytest.mark.parametrize("engine", ENGINES)
def test_voxels_to_ignore_come_through_both_engines(tmp_path, engine):
    """The right half is to be ignored: so it is in patches, however they are warped."""
    rng = np.random.default_rng(0)
    target = np.zeros((6, 30, 30), np.int8)
    target[2:4, 10:20, 4:10] = 1
    target[..., 15:] = 2
    data = rng.normal(size=(1, *target.shape)).astype(np.float32)
    write_case(tmp_path, "a", data, target, (Normalisation("zscore"),), ignore_label=2)
    augmentation = dataclasses.replace(WARPED, mirror_probability=0)
    spec = BatchSpec(
        tmp_path, ("a",), ("a",), (4, 16, 16), 2, True, (False,), 0.5, augmentation, 0, 0
    )
    batches = made(spec, [BatchKey(0, number) for number in range(10)], engine)
    labels = torch.stack([batch.target for batch in batches])
    assert set(labels.unique().tolist()) == {0, 1, 2}
    assert 0.1 < (labels == 2).float().mean() < 0.6
    (plain,) = made(dataclasses.replace(spec, augmentation=NO_AUGMENTATION), KEYS[:1], engine)
    assert ((plain.target == 2).diff(dim=3) >= 0).all()  # to the right it stays ignored


@pytest.mark.gpu
@pytest.mark.parametrize("cached", ["yes", "no"])
def test_batches_come_to_the_gpu_as_to_the_cpu(spec, cached):
    """What is not augmented has the same bytes there, made ahead on a stream of its own."""
    plain = dataclasses.replace(spec, augmentation=NO_AUGMENTATION)
    options = StreamOptions(workers=1, gpu_cache=cached)
    with open_batches(plain, iter(KEYS), options, torch.device("cuda")) as stream:
        found = [Batch(batch.data.cpu(), batch.target.cpu()) for batch in stream]
    assert raw(found) == raw(made(plain, KEYS, "host"))


def test_workers_that_only_draw_do_not_load_torch(spec):
    """Where all cases are on the GPU; what a worker unpickles and calls."""
    code = (
        "import pickle, sys;"
        "begin, make, key = pickle.loads(sys.stdin.buffer.read());"
        "made = make(key);"
        "print(len(made.names), 'torch' in sys.modules)"
    )
    work = (begin_worker, functools.partial(read_regions, spec, cached=True), KEYS[0])
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(work), capture_output=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.split() == [str(spec.batch).encode(), b"False"]
