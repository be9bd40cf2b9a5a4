"""What a user may choose on the command line: inputs, time, threshold, probabilities."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import make_bundle

from ichseg.app import main
from ichseg.app.arguments import parse_arguments
from ichseg.scan import volume

PROCESS = Path(__file__).parents[2] / "process.py"


@pytest.fixture
def place(tmp_path, scan):
    make_bundle(tmp_path / "weights")
    volume.write(scan, tmp_path / "input" / "scan.mha")
    return tmp_path


def run(place, *flags, given="input"):
    """The exit status of a run on what lies in the place under this name."""
    flags = ["--preset", "fast", "--device", "cpu", "--weights", str(place / "weights"), *flags]
    return main.main(["--input", str(place / given), "--output", str(place / "output"), *flags])


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def entries(place):
    return json.loads((place / "output" / "results.json").read_text())


@pytest.mark.parametrize("time", ["0", "-1", "nan", "inf", "soon", "5x", "1m2h", "", "1.2.3s"])
def test_a_time_budget_is_a_time(time, capsys):
    with pytest.raises(SystemExit):
        parse_arguments([f"--time-budget={time}"])
    assert "--time-budget" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("600", 600), ("90s", 90), ("5m", 300), ("1h30m", 5400), ("1.5H", 5400), ("1h2m3.5s", 3723.5)],
)
def test_a_time_budget_in_hours_minutes_and_seconds(time, seconds):
    assert parse_arguments(["--time-budget", time]).time_budget == seconds


@pytest.mark.parametrize("threshold", ["0", "1", "nan", "half"])
def test_a_threshold_is_a_probability(threshold, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--threshold", threshold])
    assert "--threshold" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(Path("/input").exists(), reason="this is a container")
def test_without_arguments_and_outside_a_container_it_says_how_it_is_used():
    done = subprocess.run([sys.executable, PROCESS], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--input scans --output out" in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == "error: no --input is given, and there is no /input"


def test_probabilities_lie_beside_the_mask_and_a_threshold_moves_it(place):
    assert run(place, "--probabilities") == 0
    assert files(place / "output") == ["results.json", "scan.mha", "scan_probability.nii.gz"]
    mask = volume.read(place / "output" / "scan.mha")
    chance = volume.read(place / "output" / "scan_probability.nii.gz")
    np.testing.assert_allclose(chance.spacing_mm, mask.spacing_mm, rtol=1e-6)
    clear = abs(chance.voxels - 0.5) > 0.6 / 255
    np.testing.assert_array_equal((chance.voxels > 0.5)[clear], mask.voxels[clear] == 1)
    (entry,) = entries(place)
    assert entry["report"]["probabilities"] == "scan_probability.nii.gz"
    inode = (place / "output" / "scan.mha").stat().st_ino
    run(place, "--resume")  # what is not asked for now may be there
    assert (place / "output" / "scan.mha").stat().st_ino == inode
    run(place, "--resume", "--probabilities", "nnunet", "--threshold", "0.3")
    assert (place / "output" / "scan.mha").stat().st_ino != inode
    assert files(place / "output") == ["results.json", "scan.mha", "scan.npz", "scan.pkl"]
    lower = volume.read(place / "output" / "scan.mha")
    assert lower.voxels.sum() > mask.voxels.sum()
    theirs = np.load(place / "output" / "scan.npz")["probabilities"]
    np.testing.assert_allclose(theirs[1], chance.voxels, atol=0.6 / 255)
    assert entries(place)[0]["report"]["ran"]["threshold"] == 0.3


def test_probabilities_that_cannot_be_written_cost_no_mask(place, capsys):
    (place / "output" / "scan_probability.nii.gz").mkdir(parents=True)
    assert run(place, "--probabilities", "float16") == 0
    assert "warning: no probabilities (" in capsys.readouterr().err
    assert (place / "output" / "scan.mha").is_file()


def test_of_a_scan_that_fails_no_earlier_probabilities_stay(place):
    run(place, "--probabilities")
    (place / "input" / "scan.mha").write_bytes(b"no scan")
    assert run(place, "--probabilities") == 1
    assert files(place / "output") == ["results.json"]


def test_on_the_platform_nothing_lies_beside_the_masks_and_that_is_said(place, capsys):
    (place / "input" / "images" / "ct").mkdir(parents=True)
    (place / "input" / "scan.mha").rename(place / "input" / "images" / "ct" / "scan.mha")
    assert run(place, "--probabilities", "--report") == 0
    said = capsys.readouterr().err
    assert "no probabilities are written: on the platform" in said
    assert "no pictures and no page are made: on the platform" in said
    assert files(place / "output") == ["images/bleed/scan.mha", "results.json"]


@pytest.mark.parametrize("suffix", [".nrrd", ".mhd", ".nii.gz"])
def test_a_single_file_of_another_format_gives_the_same_mask(place, suffix):
    image = sitk.ReadImage(str(place / "input" / "scan.mha"))
    (place / "one").mkdir()
    sitk.WriteImage(image, str(place / "one" / f"scan{suffix}"))
    assert run(place) == 0
    expected = volume.read(place / "output" / "scan.mha")
    assert run(place, given=f"one/scan{suffix}") == 0
    mask = "scan.mha" if suffix == ".mhd" else f"scan{suffix}"
    assert files(place / "output") == sorted({"scan.mha", mask, "results.json"})
    found = volume.read(place / "output" / mask)
    np.testing.assert_array_equal(found.voxels, expected.voxels)
    np.testing.assert_allclose(found.origin_mm, expected.origin_mm, atol=1e-4)
    np.testing.assert_allclose(found.direction, expected.direction, atol=1e-6)


def test_folders_are_mirrored_with_pictures_and_gone_on_with(place):
    for name in ("sub-1/ct", "sub-2/ct"):
        (place / "input" / name).mkdir(parents=True)
        (place / "input" / name / "scan.mha").hardlink_to(place / "input" / "scan.mha")
    assert run(place, "--recursive", "--report", "--probabilities") == 0
    made = ("scan.mha", "scan.png", "scan_probability.nii.gz")
    expected = {f"{folder}{name}" for folder in ("", "sub-1/ct/", "sub-2/ct/") for name in made}
    found = {name for name in files(place / "output") if not name.startswith("report/")}
    assert found == {*expected, "results.json"}
    named = [entry["outputs"][0]["filename"] for entry in entries(place)]
    assert named == ["scan.mha", "sub-1/ct/scan.mha", "sub-2/ct/scan.mha"]
    page = (place / "output" / "report" / "index.html").read_text()
    assert "sub-2/ct/scan.mha" in page
    inode = (place / "output" / named[1]).stat().st_ino
    assert run(place, "--recursive", "--resume") == 0
    assert (place / "output" / named[1]).stat().st_ino == inode


@pytest.mark.parametrize("flag", ["--input", "--output", "--weights", "--predict_dir"])
def test_an_empty_path_is_not_this_folder(flag, capsys):
    """As where a variable of the shell is not set."""
    with pytest.raises(SystemExit):
        parse_arguments([flag, ""])
    assert "an empty name, expected a path" in capsys.readouterr().err
