"""Files beside a mask have names of their own, and an odd name concerns its own scan alone."""

import re

import numpy as np
import pytest

from ichseg.app.cases import InputCase, Job, check_output, find_cases, probability_paths
from ichseg.errors import OutputError
from ichseg.scan import volume
from ichseg.scan.volume import Volume


def touch(path):
    path.touch()
    return path


def find(folder, out):
    return find_cases(folder, out, input_slug="head-ct", output_slug="bleed")


def refused(job):
    return {case.name: case.refusal for case in job.cases if case.refusal}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.mha", "b.mha"], ["a", "b"]),
        (["a.mha", "a.nii.gz", "b.nii"], ["a.mha", "a.nii.gz", "b"]),
        (["a.nii.gz", "a_0000.nii.gz"], ["a.nii.gz", "a_0000.nii.gz"]),  # nnU-Net's a.npz
        (["a.nii.gz", "a_probability.nii.gz"], ["a.nii.gz", "a_probability"]),
    ],
)
def test_probabilities_of_each_scan_have_names_of_their_own(tmp_path, names, expected):
    for name in names:
        touch(tmp_path / name)
    cases = find(tmp_path, tmp_path / "out").cases
    assert [case.probabilities for case in cases] == expected
    paths = [p for case in cases for p in probability_paths(case.output, case.probabilities)]
    paths += [case.output for case in cases]
    assert len(set(paths)) == 4 * len(names)
    assert not any(case.refusal for case in cases)


def test_a_scan_whose_probabilities_have_no_free_name_is_refused(tmp_path):
    for name in ("a.mha", "a.nii.gz", "a.mha_probability.nii.gz"):
        touch(tmp_path / name)
    why = "its probabilities would be a.mha_probability.nii.gz, the name of another scan's file"
    assert refused(find(tmp_path, tmp_path / "out")) == {"a.mha": why}


def test_a_mask_whose_name_is_too_long_stops_no_other(tmp_path):
    """The name of a folder of slices can have 255 letters, and its mask's has more."""
    image = touch(tmp_path / "a.mha")
    long = InputCase("long", image, tmp_path / "out" / ("x" * 300 + ".mha"))
    check_output(Job((long,), platform=False), tmp_path / "out")


def test_no_mask_replaces_the_scan_of_another_case(tmp_path):
    """Where folders in folders have the same names as the input."""
    scans = tmp_path / "x"
    (scans / "x").mkdir(parents=True)
    first, second = touch(scans / "a.mha"), touch(scans / "x" / "a.mha")
    job = find_cases(scans, tmp_path, input_slug="ct", output_slug="bleed", recursive=True)
    assert [case.output for case in job.cases] == [tmp_path / "a.mha", first]
    said = f"{first}: the mask of x/a.mha would replace it; name another --output"
    with pytest.raises(OutputError, match=re.escape(said)):
        check_output(job, tmp_path)
    second.unlink()
    check_output(find(scans, tmp_path), tmp_path)


@pytest.mark.parametrize("name", ["a.mha", "a.nii.gz", "a.nrrd"])
def test_no_mask_replaces_a_scan_that_lies_in_the_output_folder(tmp_path, name):
    """As where by mistake another folder of scans is named, with scans of the same names."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    job = find(touch(tmp_path / "in" / name).parent, tmp_path / "out")
    there = tmp_path / "out" / name
    for voxels in (np.zeros((3, 4, 5), np.uint8), np.zeros((3, 4, 5), np.int16)):
        check_output(job, tmp_path / "out")
        volume.write(Volume(voxels, (5.0, 1.0, 1.0)), there)
    with pytest.raises(OutputError, match=f"{re.escape(str(there))}: holds int16, so it is no"):
        check_output(job, tmp_path / "out")
    there.write_bytes(b"of an earlier run")
    check_output(job, tmp_path / "out")
