"""The command that makes a dataset of phantoms: the same bytes each time, whole or not at all."""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from ichseg.errors import DatasetError, OutputError
from ichseg.files import UNFINISHED
from ichseg.scan.volume import Volume, read, write
from phantom import check, synthesize
from phantom.cases import SynthesisConfig, make_case
from phantom.synthesize import write_dataset

SHRINK = 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two cases by one worker: a bleed and, in a second folder, the same by two workers."""
    folder = tmp_path_factory.mktemp("synthesized")
    config = SynthesisConfig(cases=2, seed=5, negatives=0.0, balanced=True, shrink=SHRINK)
    write_dataset(config, folder / "one", workers=1)
    write_dataset(config, folder / "two", workers=2)
    return folder


def test_workers_and_runs_give_the_same_bytes(dataset):
    names = sorted(
        path.relative_to(dataset / "one") for path in (dataset / "one").rglob("*") if path.is_file()
    )
    assert len(names) == 6  # two images, two labels, dataset.json, cases.csv
    for name in names:
        assert (dataset / "one" / name).read_bytes() == (dataset / "two" / name).read_bytes(), name


def test_dataset_json_lists_files_that_fit_each_other(dataset):
    folder = dataset / "one"
    listed = json.loads((folder / "dataset.json").read_text())
    assert (listed["numTraining"], listed["numTest"], listed["test"]) == (2, 0, [])
    assert listed["labels"] == {"0": "background", "1": "hemorrhage"}
    for pair in listed["training"]:
        image, label = read(folder / pair["image"]), read(folder / pair["label"])
        assert (image.spacing_mm, image.origin_mm, image.direction) == (
            label.spacing_mm, label.origin_mm, label.direction,
        )  # fmt: skip
        assert image.voxels.shape == label.voxels.shape
        assert (image.voxels.dtype, label.voxels.dtype) == (np.int16, np.uint8)
        assert set(np.unique(label.voxels)) == {0, 1}


def test_table_gives_the_labelled_volumes(dataset):
    with (dataset / "one" / "cases.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["kinds"] for row in rows] == ["intraparenchymal", "intraventricular"]
    for row in rows:
        label = read(dataset / "one" / "labelsTr" / f"{row['case']}.nii.gz")
        volume = float(row["volume_ml"].split("=")[1])
        assert volume == pytest.approx(label.voxels.sum() * label.voxel_ml, rel=1e-2, abs=1e-3)


def test_another_seed_gives_another_scan(dataset):
    first = read(dataset / "one" / "imagesTr" / "ICH_0001.nii.gz")
    other = make_case(
        SynthesisConfig(cases=1, seed=6, negatives=0.0, balanced=True, shrink=SHRINK), 0
    )
    assert other.voxels.shape != first.voxels.shape or (other.voxels != first.voxels).mean() > 0.2


def test_existing_folder_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DatasetError, match="exists already"):
        write_dataset(SynthesisConfig(1, 0), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_place_that_cannot_be_written_is_an_error_in_words(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=r"file: no folder to write in \(.*file is a file, "):
        write_dataset(SynthesisConfig(1, 0), tmp_path / "file" / "out")

    def denied(_: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(synthesize, "unfinished_folder", denied)  # root may write anywhere
    with pytest.raises(OutputError, match=r"out: cannot be made \(Permission denied\)"):
        write_dataset(SynthesisConfig(1, 0), tmp_path / "out")


def test_what_a_killed_run_has_left_goes(tmp_path):
    """Its folder is no longer locked."""
    left = tmp_path / f"{UNFINISHED}killed" / "out" / "imagesTr"
    left.mkdir(parents=True)
    write_dataset(SynthesisConfig(1, 5, shrink=SHRINK), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_scan_without_a_head_is_no_measure_for_phantoms(tmp_path):
    write(Volume(np.full((4, 32, 32), -1000, np.int16), (5.0, 5.0, 5.0)), tmp_path / "air.mha")
    with pytest.raises(DatasetError, match=r"air\.mha: no brain found"):
        check.check(tmp_path / "air.mha", seed=1)


def test_settings_out_of_range_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="negatives"):
        write_dataset(SynthesisConfig(1, 0, negatives=1.5), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_set_has_a_name_of_its_own_and_the_same_heads(dataset, tmp_path):
    config = SynthesisConfig(1, 5, negatives=0.0, balanced=True, shrink=SHRINK, name="MORE")
    write_dataset(config, tmp_path / "out")
    named = (tmp_path / "out" / "imagesTr" / "MORE_0001.nii.gz").read_bytes()
    assert named == (dataset / "one" / "imagesTr" / "ICH_0001.nii.gz").read_bytes()
    with pytest.raises(DatasetError, match=r"--name is '\.\./a', expected up to 40 letters"):
        write_dataset(SynthesisConfig(1, 5, name="../a"), tmp_path / "bad")


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(job):
        raise RuntimeError("disk full")

    monkeypatch.setattr(synthesize, "_write_case", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        write_dataset(SynthesisConfig(1, 0), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_out_the_command_says_what_it_needs():
    parser = argparse.ArgumentParser()
    synthesize.add_arguments(parser)
    with pytest.raises(DatasetError, match="--out"):
        synthesize.main(parser.parse_args([]))


def test_a_killed_worker_is_said_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(synthesize, "_write_case", _die)
    with pytest.raises(DatasetError, match="a worker process was killed"):
        write_dataset(SynthesisConfig(2, 0), tmp_path / "out", workers=2)
    assert list(tmp_path.iterdir()) == []


def test_workers_end_with_a_killed_parent(tmp_path):
    code = (
        "import multiprocessing, os, signal; from concurrent.futures import ProcessPoolExecutor; "
        "from phantom import synthesize\n"
        "if __name__ == '__main__':\n"
        "  pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn'), "
        "initializer=synthesize._begin_worker)\n"
        "  print(pool.submit(os.getpid).result(), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [sys.executable, script], stdout=subprocess.PIPE, env=environment, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    worker = int(done.stdout)
    deadline = time.monotonic() + 20
    while _runs(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(worker)


def _die(job):
    os.kill(os.getpid(), signal.SIGKILL)


def _runs(process):
    """Whether it runs, and is not merely waiting to be reaped."""
    try:
        with Path(f"/proc/{process}/stat").open() as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_scan_that_a_full_disk_cut_is_refused(tmp_path, monkeypatch):
    write = sitk.WriteImage

    def cut(image, name, **options):
        write(image, name, **options)
        Path(name).write_bytes(Path(name).read_bytes()[:-1])

    monkeypatch.setattr(sitk, "WriteImage", cut)
    config = SynthesisConfig(cases=1, seed=5, negatives=1.0, shrink=SHRINK)
    with pytest.raises(OutputError, match=r"ICH_0001\.nii\.gz: cannot write \(only a part"):
        write_dataset(config, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
