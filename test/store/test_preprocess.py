"""Preprocessing a dataset into the store."""

import argparse
import functools
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.planning import plan

from ichseg.engine import machine
from ichseg.errors import DatasetError, PlansError
from ichseg.model import strict_json
from ichseg.predict import prepare as inference
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from training.data.dataset import Case, Dataset, save_dataset
from training.data.sources import digest_sources
from training.data.workspace import preprocessed_folder
from training.fit.configuration import TrainingConfig
from training.jobs.train import run_fold
from training.planning.fingerprint import compute_fingerprint
from training.planning.overrides import Overrides
from training.store import chunks, preprocess
from training.store.preprocess import preprocess_dataset

SPACING = (5.0, 1.0, 1.0)
NAMES = ("case_0", "case_1", "case_2")


@pytest.fixture
def work(tmp_path):
    """A workspace with three cases, zero-padded, two of them on another grid."""
    rng = np.random.default_rng(3)
    cases = []
    for index in range(3):
        shape = (8, 20 + 2 * index, 24)
        voxels = rng.integers(1, 100, shape).astype(np.int16)
        voxels[:, :3] = 0
        label = np.zeros(shape, np.uint8)
        label[2:5, 6:12, 8:15] = 1
        spacing = (5.0, 1.0, 1.0 if index else 0.8)
        name = f"case_{index}"
        volume.write(Volume(voxels, spacing), tmp_path / f"raw/{name}_0000.mha")
        volume.write(Volume(label, spacing), tmp_path / f"raw/{name}.mha")
        cases.append(Case(name, (tmp_path / f"raw/{name}_0000.mha",), tmp_path / f"raw/{name}.mha"))
    dataset = Dataset("Tiny", ("CT",), ("background", "bleed"), tuple(cases))
    save_dataset(dataset, tmp_path)
    plans = plan(
        compute_fingerprint(dataset, 1),
        dataset,
        recipe="msd2018",
        overrides=Overrides(spacing_mm=SPACING, patch=(8, 16, 16), batch=2),
    )
    (tmp_path / "plans.json").write_text(strict_json.dumps(plans))
    return tmp_path, dataset, plans


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_stores_what_inference_prepares(work):
    workspace, dataset, plans = work
    assert preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1) == 3
    folder = preprocessed_folder(workspace, "3d_fullres")
    assert folder == workspace / "preprocessed" / "3d_fullres"
    assert chunks.list_cases(folder) == ("case_0", "case_1", "case_2")
    for case in dataset.cases:
        images = [volume.read(path) for path in case.images]
        expected = inference.prepare(images, plans, plans.configuration("3d_fullres"))
        found = chunks.open_case(folder, case.name)
        half_a_step = chunks.HU_STEP / 2 / plans.normalisations[0].deviation
        np.testing.assert_allclose(found.data[:], expected.data, rtol=0, atol=1.01 * half_a_step)
        label = inference.prepare_labels(volume.read(case.label), expected.placement, plans)
        np.testing.assert_array_equal(np.maximum(found.target[:], 0), label)


def test_the_command_adds_up_in_one_thread(work):
    """A resampled head differs in the last bits where two threads share its sums."""
    code = (
        "import sys, threadpoolctl; from training.__main__ import main\n"
        "main(['preprocess', '--workspace', sys.argv[1], '--workers', '1'])\n"
        "pools = threadpoolctl.threadpool_info()\n"
        "print({pool['num_threads'] for pool in pools if pool['user_api'] == 'blas'})"
    )
    own = {key: value for key, value in os.environ.items() if not key.endswith("NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(work[0])], env=own, cwd=Path(__file__).parents[2],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "{1}"


def test_the_largest_case_is_begun_first(work, monkeypatch):
    workspace, dataset, plans = work
    sizes = {"case_0": 100, "case_1": 300, "case_2": 200}
    for case in dataset.cases:
        case.images[0].write_bytes(bytes(sizes[case.name]))
    begun = []
    monkeypatch.setattr(preprocess, "_preprocess_case", lambda job, *_: begun.append(job.case.name))
    preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1)
    assert begun == ["case_1", "case_2", "case_0"]


def test_zeros_within_the_crop_are_marked(work):
    workspace, dataset, plans = work
    image = volume.read(dataset.cases[1].images[0])
    corner = image.voxels.copy()
    corner[:, :10, :6] = 0
    volume.write(image.with_voxels(corner), dataset.cases[1].images[0])
    preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1)
    target = chunks.open_case(preprocessed_folder(workspace, "3d_fullres"), "case_1").target[:]
    expected = np.zeros((8, 22, 24), np.int8)
    expected[2:5, 6:12, 8:15] = 1
    expected[:, :10, :6] = -1
    np.testing.assert_array_equal(target, expected[:, 3:])


def test_finished_cases_are_not_done_again(work):
    workspace, dataset, plans = work
    preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1)
    before = contents(preprocessed_folder(workspace, "3d_fullres"))
    for case in dataset.cases:
        case.images[0].unlink()  # reading any would fail
    assert preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1) == 0
    assert contents(preprocessed_folder(workspace, "3d_fullres")) == before


def test_shares_are_all_cases_each_once_and_the_same_as_without(work, tmp_path_factory):
    workspace, dataset, plans = work
    folder = preprocessed_folder(workspace, "3d_fullres")
    assert preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1) == 3
    whole = contents(folder)
    shutil.rmtree(folder)
    done = functools.partial(preprocess.is_preprocessed, dataset, plans, "3d_fullres", workspace)
    assert preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1, (2, 2)) == 1
    assert chunks.list_cases(folder) == ("case_1",)
    assert (done((2, 2)), done((1, 2)), done()) == (True, False, False)
    unfinished = folder / ".writing-of-another-share.b2nd"
    unfinished.write_bytes(b"half")
    assert preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1, (1, 2)) == 2
    assert done()
    assert unfinished.exists()
    unfinished.unlink()
    assert contents(folder) == whole


def test_a_share_is_a_number_of_as_many():
    assert preprocess.parse_share("2/3") == (2, 3)
    for text in ("0/3", "4/3", "1", "1/", "a/b", "-1/3"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a share such as 1/3"):
            preprocess.parse_share(text)


def test_a_corrected_label_arrives(work, caplog):
    workspace, dataset, plans = work
    folder = preprocessed_folder(workspace, "3d_fullres")
    preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1)
    assert preprocess.is_preprocessed(dataset, plans, "3d_fullres", workspace)
    before = contents(folder)
    corrected = dataset.cases[1].label
    label = volume.read(corrected)
    voxels = np.zeros_like(label.voxels)
    voxels[5:7, 6:12, 8:15] = 1
    volume.write(label.with_voxels(voxels), corrected)
    assert not preprocess.is_preprocessed(dataset, plans, "3d_fullres", workspace)
    with pytest.raises(DatasetError, match=r"1 of 3 .* such as case_1, which has changed since"):
        preprocess.require_current(workspace, dataset, plans, "3d_fullres", NAMES)
    assert preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1) == 1
    assert "case case_1 has changed since it was stored; it is done again" in caplog.text
    np.testing.assert_array_equal(chunks.open_case(folder, "case_1").target[:], voxels[:, 3:])
    changed = {name for name, content in contents(folder).items() if content != before[name]}
    assert changed == {"case_1.target.b2nd", "case_1.foreground.npz", "case_1.json"}
    preprocess.require_current(workspace, dataset, plans, "3d_fullres", NAMES)


def test_plans_for_other_labels_are_refused(work):
    workspace, dataset, plans = work
    more = replace(dataset, labels=("background", "bleed", "oedema"))
    with pytest.raises(PlansError, match="and labels background, bleed, but the dataset has"):
        preprocess_dataset(more, plans, "3d_fullres", workspace, 1)
    assert not (workspace / "preprocessed").exists()
    preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1)
    with pytest.raises(PlansError, match="and labels background, bleed, but the dataset has"):
        preprocess.require_current(workspace, more, plans, "3d_fullres", NAMES)


def test_a_store_of_other_plans_is_refused_by_who_trains_on_it(work):
    """Planned, preprocessed, planned anew, and then trained."""
    workspace, dataset, plans = work
    preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1)
    other = replace(plans.normalisations[0], clip_high=plans.normalisations[0].clip_high + 1)
    for now, data in (
        (replace(plans, normalisations=(other,)), dataset),
        (plans, replace(dataset, ignore_label=2)),
    ):
        with pytest.raises(DatasetError, match="3d_fullres: was preprocessed with other plans"):
            preprocess.require_current(workspace, data, now, "3d_fullres", NAMES)
    config = TrainingConfig(device="cpu", workers=0, validation=False)
    finer = replace(plans.configuration("3d_fullres"), spacing_mm=(5.0, 1.0, 0.5))
    changed = replace(plans, configurations=(finer,))
    (workspace / "plans.json").write_text(strict_json.dumps(changed))
    with pytest.raises(DatasetError, match="3d_fullres: was preprocessed with other plans"):
        run_fold(workspace, "3d_fullres", "all", config)


def test_plans_for_other_regions_are_refused(work):
    workspace, dataset, plans = work
    two = {"labels": ("background", "bleed", "core"), "regions": (1, 2)}
    planned = replace(plans, region_labels=((1, 2), (2,)), **two)
    with pytest.raises(PlansError, match=r"hold \(\(1, 2\), \(2,\)\), but those of the dataset"):
        preprocess_dataset(
            replace(dataset, region_labels=((1,), (2,)), **two), planned, "3d_fullres", workspace, 1
        )


def test_a_touched_file_is_not_done_again(work):
    workspace, dataset, plans = work
    preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1)
    os.utime(dataset.cases[1].label, ns=(1, 1))
    assert preprocess.is_preprocessed(dataset, plans, "3d_fullres", workspace)
    assert preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1) == 0


def test_a_store_without_digests_is_made_again(work, caplog):
    workspace, dataset, plans = work
    folder = preprocessed_folder(workspace, "3d_fullres")
    preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1)
    before = contents(folder)
    path = folder / "case_2.json"
    raw = json.loads(path.read_text())
    del raw["source"]
    path.write_text(json.dumps(raw))
    with pytest.raises(DatasetError, match="a version that did not note what it was made from"):
        preprocess.require_current(workspace, dataset, plans, "3d_fullres", NAMES)
    assert preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1) == 1
    assert "case case_2 was stored by a version that did not note" in caplog.text
    assert contents(folder) == before


def test_plans_of_changed_cases_are_remarked_upon(work, caplog):
    workspace, dataset, plans = work
    plans = replace(plans, sources=digest_sources(workspace, dataset))
    preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1)
    assert "since they were planned for" not in caplog.text
    label = volume.read(dataset.cases[0].label)
    volume.write(label.with_voxels(1 - label.voxels), dataset.cases[0].label)
    preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1)
    assert "plans.json: cases have changed since they were planned for" in caplog.text


def test_voxels_to_ignore_come_into_the_store(work):
    workspace, dataset, plans = work
    label = volume.read(dataset.cases[1].label)
    doubted = label.voxels.copy()
    doubted[:2] = 2
    volume.write(label.with_voxels(doubted), dataset.cases[1].label)
    ignoring = replace(dataset, ignore_label=2)
    folder = preprocessed_folder(workspace, "3d_fullres")
    preprocess_dataset(ignoring, plans, "3d_fullres", workspace, 1)
    case = chunks.open_case(folder, "case_1")
    np.testing.assert_array_equal(case.target[:], doubted[:, 3:])
    assert case.ignore_label == 2
    assert set(case.foreground) == {1}
    with pytest.raises(DatasetError, match="another label to ignore"):
        preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1)


def test_a_killed_run_is_finished_by_the_next(work):
    workspace, dataset, plans = work
    folder = preprocessed_folder(workspace, "3d_fullres")
    preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1)
    before = contents(folder)
    (folder / "case_1.json").unlink()  # killed just before the case was whole
    (folder / "case_1.target.b2nd").write_bytes(b"half")
    (folder / ".writing-abc.b2nd").write_bytes(b"half")
    assert preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1) == 1
    assert contents(folder) == before


def test_a_run_ended_by_sigkill_is_finished_by_the_next(work):
    workspace, dataset, plans = work
    many = replace(  # enough cases, linked to the same files, for the end to come in between
        dataset,
        cases=tuple(
            replace(case, name=f"{case.name}_{copy:02d}")
            for case in dataset.cases
            for copy in range(20)
        ),
    )
    preprocess_dataset(many, plans, "3d_fullres", workspace, 1)
    folder = preprocessed_folder(workspace, "3d_fullres")
    expected = contents(folder)
    shutil.rmtree(folder)
    save_dataset(many, workspace)
    command = [sys.executable, "-m", "training", "preprocess", "--workspace", str(workspace)]
    with subprocess.Popen([*command, "--workers", "1"], stderr=subprocess.PIPE) as running:
        while len(chunks.list_cases(folder)) < 3 and running.poll() is None:
            time.sleep(0.001)
        running.kill()
    assert running.returncode == -signal.SIGKILL
    done = chunks.list_cases(folder)
    assert 3 <= len(done) < len(many.cases)
    times = {name: (folder / f"{name}.json").stat().st_mtime_ns for name in done}
    assert preprocess_dataset(many, plans, "3d_fullres", workspace, 1) == 60 - len(done)
    assert contents(folder) == expected
    assert times == {name: (folder / f"{name}.json").stat().st_mtime_ns for name in done}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failing_case_is_named_and_stops_no_other(work, caplog, workers):
    workspace, dataset, plans = work
    dataset.cases[0].images[0].write_bytes(b"no image")
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(
            DatasetError, match=r"1 of 3 cases failed, the first: case case_0: .*damaged"
        ),
    ):
        preprocess_dataset(dataset, plans, "3d_fullres", workspace, workers)
    assert chunks.list_cases(preprocessed_folder(workspace, "3d_fullres")) == ("case_1", "case_2")
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "case case_0" in errors[0]


def test_other_plans_are_refused(work):
    workspace, dataset, plans = work
    preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1)
    scheme = replace(plans.normalisations[0], mean=0.0)
    other = replace(plans, normalisations=(scheme,))
    with pytest.raises(DatasetError, match="preprocessed with other plans"):
        preprocess_dataset(dataset, other, "3d_fullres", workspace, 1)
    # what does not touch the voxels may change
    batch = replace(plans.configuration("3d_fullres"), batch=7)
    assert (
        preprocess_dataset(
            dataset, replace(plans, configurations=(batch,)), "3d_fullres", workspace, 1
        )
        == 0
    )


def test_a_store_of_another_version_is_refused(work):
    workspace, dataset, plans = work
    preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1)
    path = preprocessed_folder(workspace, "3d_fullres") / ".preprocessing.json"
    record = json.loads(path.read_text())
    for other in ({**record, "store_version": 1}, {"spacing_mm": record["spacing_mm"]}):
        path.write_text(json.dumps(other))
        with pytest.raises(DatasetError, match="by another version; delete the folder"):
            preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1)


def test_workers_are_limited_by_memory(work, monkeypatch):
    """Of 10 GB free four fifths are used; 500 million voxels take 9.4 GB, 200 million 4."""
    _, dataset, _ = work
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 10 * 10**9)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(16))
    for voxels, workers in ((500_000_000, 1), (200_000_000, 2), (1_000_000, 3)):
        monkeypatch.setattr(volume, "stored_shape", lambda _, found=voxels: (1, 1, found))
        assert preprocess.default_workers(dataset) == workers


def test_a_folder_of_unknown_origin_is_refused(work):
    workspace, dataset, plans = work
    folder = preprocessed_folder(workspace, "3d_fullres")
    data, target = np.zeros((1, 2, 2, 2), np.float32), np.zeros((2, 2, 2), np.int8)
    chunks.write_case(folder, "x", data, target, plans.normalisations)
    with pytest.raises(DatasetError, match="files of unknown origin"):
        preprocess_dataset(dataset, plans, "3d_fullres", workspace, 1)


def test_an_unknown_configuration_is_refused(work):
    workspace, dataset, plans = work
    with pytest.raises(PlansError, match="no configuration '4d'"):
        preprocess_dataset(dataset, plans, "4d", workspace, 1)
    assert not (workspace / "preprocessed").exists()


def test_command(work, capsys):
    workspace, *_ = work
    parser = argparse.ArgumentParser()
    preprocess.add_arguments(parser)
    args = parser.parse_args(["--workspace", str(workspace), "--workers", "1"])
    assert args.configuration == "3d_fullres"
    assert preprocess.main(args) == 0
    assert "3 cases preprocessed" in capsys.readouterr().out
    record = json.loads(
        (Path(workspace) / "preprocessed/3d_fullres/.preprocessing.json").read_text()
    )
    assert record["spacing_mm"] == [5.0, 1.0, 1.0]


def test_needs_no_torch():
    """Loading it would take as long as preprocessing five cases."""
    code = "import sys, training.store.preprocess; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
