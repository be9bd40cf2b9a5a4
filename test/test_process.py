"""The entry point, run as a user runs it: another process, files in, files out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import make_bundle

from ichseg import volume
from ichseg.volume import Volume

PROCESS = Path(__file__).parent.parent / "process.py"


@pytest.fixture
def place(tmp_path, scan):
    make_bundle(tmp_path / "weights")
    volume.write(scan, tmp_path / "input" / "scan.mha")
    return tmp_path


def run(place, *flags, expect=0):
    done = subprocess.run(
        [
            sys.executable, str(PROCESS), "--input", str(place / "input"), "--output",
            str(place / "output"), "--weights", str(place / "weights"), "--device", "cpu",
            "--preset", "fast", *flags,
        ],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == expect, done.stderr
    return done.stderr.strip().splitlines()


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_flat_folder(place, scan):
    (place / "input" / "again.nii.gz").write_bytes(b"")
    volume.write(scan, place / "input" / "again.nii.gz")
    run(place, "--report")
    assert files(place / "output") == [
        "again.nii.gz", "again.png", "results.json", "scan.mha", "scan.png",
    ]  # fmt: skip
    mask = volume.read(place / "output" / "scan.mha")
    assert mask.voxels.dtype == np.uint8
    assert (mask.spacing_mm, mask.origin_mm, mask.direction) == (
        scan.spacing_mm, scan.origin_mm, scan.direction,
    )  # fmt: skip
    results = json.loads((place / "output" / "results.json").read_text())
    assert [r["outputs"] for r in results] == [
        [{"type": "metaio_image", "filename": "again.nii.gz"}],
        [{"type": "metaio_image", "filename": "scan.mha"}],
    ]
    report = results[1]["report"]
    expected_ml = np.count_nonzero(mask.voxels) * 5 * 0.8 * 0.9 / 1000
    assert report["volume_ml"] == pytest.approx(expected_ml, abs=1e-3)
    assert report["ran"]["networks"] == ["3d_fullres fold 0"]
    assert results[1]["error_messages"] == []


def test_platform_layout_gets_one_mha_and_no_pictures(place):
    folder = place / "input" / "images" / "head-ct"
    folder.mkdir(parents=True)
    (place / "input" / "scan.mha").rename(folder / "1-2.mha")
    entry = {"image": {"name": "x"}, "interface": {"slug": "s", "relative_path": "images/head-ct"}}
    (place / "input" / "inputs.json").write_text(json.dumps([entry]))
    run(place, "--report")
    assert files(place / "output") == ["images/bleed/1-2.mha", "results.json"]


def test_one_bad_scan_does_not_stop_the_others(place, scan):
    whole = (place / "input" / "scan.mha").read_bytes()
    (place / "input" / "a_truncated.mha").write_bytes(whole[: len(whole) // 2])
    nan = scan.voxels.astype(np.float32)
    nan[0, 0, 0] = np.nan
    volume.write(scan.with_voxels(nan), place / "input" / "b_nan.mha")
    sitk.WriteImage(sitk.Image(8, 8, sitk.sitkInt16), str(place / "input" / "c_flat.mha"))
    lines = run(place, expect=1)
    assert lines[-1].startswith("error: 3 of 4 cases failed: ")
    for reason in ("a_truncated.mha: damaged", "b_nan.mha: 1 voxels are NaN", "c_flat.mha: 2D"):
        assert reason in lines[-1]
    assert files(place / "output") == ["results.json", "scan.mha"]
    results = json.loads((place / "output" / "results.json").read_text())
    assert [bool(r["error_messages"]) for r in results] == [True, True, True, False]
    assert results[0]["outputs"] == []


def test_missing_and_altered_weights(place):
    path = place / "weights" / "3d_fullres_fold_1.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert "fold_1.safetensors: altered" in run(place, expect=1)[-1]
    path.unlink()
    assert "fold_1.safetensors: cannot read the weights" in run(place, expect=1)[-1]
    (place / "weights" / "model.json").unlink()
    assert "model.json: cannot read" in run(place, expect=1)[-1]
    assert files(place / "output") == []


def test_unwritable_output(place):
    (place / "output").write_text("a file where the folder should be")
    assert run(place, expect=1)[-1] == (
        f"error: {place / 'output'}: cannot write results there (File exists)"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_output(place):
    (place / "output").mkdir(mode=0o500)
    assert "cannot write results there (Permission denied)" in run(place, expect=1)[-1]


def test_rotated_geometry_comes_back_bit_for_bit(place, scan):
    angle = 0.3
    tilted = Volume(
        scan.voxels,
        (5.000001, 0.1 + 0.2, 1 / 3),
        (-1 / 3, 1e-7, 123456.789),
        (
            np.cos(angle), -np.sin(angle), 0.0, np.sin(angle), np.cos(angle), 0.0, 0.0, 0.0, 1.0,
        ),
    )  # fmt: skip
    volume.write(tilted, place / "input" / "scan.mha")
    run(place)
    mask, image = (volume.read(place / f / "scan.mha") for f in ("output", "input"))
    assert (mask.spacing_mm, mask.origin_mm, mask.direction) == (
        image.spacing_mm, image.origin_mm, image.direction,
    )  # fmt: skip
    assert image.origin_mm == tilted.origin_mm
