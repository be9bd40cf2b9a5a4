"""Which files of a folder are masks."""

import pytest

from ichseg.errors import DatasetError
from training.scoring.found import masks_below, masks_by_name


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_what_the_program_writes_beside_its_masks_is_left_out(tmp_path):
    out = tmp_path / "report"  # its own name does not count, nor does a page in it
    touch(
        out, "a.mha", "sub/b.nii.gz", "a.mha.png", "results.json", "index.html", ".c.mha",
        "a_probability.nii.gz", "sub/b_probability.nii.gz", "a.npz",
        "report/index.html", "report/cases/a.mha_prediction.nii.gz",
        "page/index.html", "page/cases/a_prediction.nii.gz", "cases/a_prediction.nii.gz",
    )  # fmt: skip
    assert masks_below(out) == [out / "a.mha", out / "sub/b.nii.gz"]


def test_names_alone_leave_nothing_out(tmp_path):
    kept = [
        "c_probability.nii.gz",  # of no case
        "d.mha", "d_probability.mha",  # no file of probabilities
        "e.mha", "sub/e_probability.nii.gz",  # of another folder's case
        "cases/f.mha",  # no page there
        "reports/g.mha",  # not the copies of the page
    ]  # fmt: skip
    touch(tmp_path, *kept, "reports/index.html")
    assert masks_below(tmp_path) == [tmp_path / name for name in sorted(kept)]


def test_a_name_twice(tmp_path):
    touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz")
    with pytest.raises(DatasetError, match=r"labelsTr/a.nii.gz: the same case as .*imagesTr/a.nii"):
        masks_by_name(tmp_path)
    assert masks_by_name(tmp_path / "labelsTr") == {"a": tmp_path / "labelsTr" / "a.nii.gz"}


def test_folders_without_masks(tmp_path):
    with pytest.raises(DatasetError, match="none: no such folder"):
        masks_below(tmp_path / "none")
    touch(tmp_path, "report/index.html", "report/cases/a_prediction.nii.gz", "notes.txt")
    with pytest.raises(DatasetError, match=r"no volumes, expected files \.mha, "):
        masks_below(tmp_path)
