"""Files beside a mask have names of their own, and an odd name concerns its own scan alone."""

import re

import pytest

from ichseg.app.cases import InputCase, Job, check_output, find_cases, probability_paths
from ichseg.errors import OutputError


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
