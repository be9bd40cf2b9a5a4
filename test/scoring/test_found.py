"""Which files of a folder are masks."""

import pytest

from ichseg.errors import DatasetError
from training.scoring.found import masks_below


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
    )  # fmt: skip
    assert masks_below(out) == [out / "a.mha", out / "sub/b.nii.gz"]


def test_names_alone_leave_nothing_out(tmp_path):
    kept = [
        "c_probability.nii.gz",  # of no case
        "d.mha", "d_probability.mha",  # no file of probabilities
        "e.mha", "sub/e_probability.nii.gz",  # of another folder's case
        "report/f.mha",  # no page there
        "reports/g.mha",
    ]  # fmt: skip
    touch(tmp_path, *kept, "reports/index.html")
    assert masks_below(tmp_path) == [tmp_path / name for name in sorted(kept)]


def test_folders_without_masks(tmp_path):
    with pytest.raises(DatasetError, match="none: no such folder"):
        masks_below(tmp_path / "none")
    touch(tmp_path, "report/index.html", "report/cases/a_prediction.nii.gz", "notes.txt")
    with pytest.raises(DatasetError, match=r"no volumes, expected files \.mha, "):
        masks_below(tmp_path)
