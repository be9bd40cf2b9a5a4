"""What ``verify`` notes in a workspace, and what it takes along into a new one."""

import pytest
from helpers.datasets import write_msd

from ichseg.scan import volume
from training.__main__ import main
from training.data import verify
from training.data.convert import convert
from training.data.dataset import load_dataset


@pytest.fixture
def work(tmp_path):
    convert(write_msd(tmp_path / "source", "abcde"), tmp_path / "work")
    return tmp_path / "work"


def test_a_file_that_changes_while_others_are_read_is_not_noted_as_verified(work, monkeypatch):
    data = load_dataset(work)
    line = ["verify", "--workspace", str(work), "--workers", "1", "--note"]
    assert main(line) == 0
    assert verify.is_verified(work, data)
    real = verify.verify_dataset

    def verified_and_changed(*given):
        found = real(*given)
        path = data.cases[0].reference
        label = volume.read(path)
        path.unlink()
        volume.write(label.with_voxels(3 * label.voxels), path)
        return found

    monkeypatch.setattr(verify, "verify_dataset", verified_and_changed)
    assert main(line) == 0
    assert not verify.is_verified(work, data)


def test_folds_and_groups_of_the_new_workspace_may_be_edited_in_place(work, tmp_path):
    for name in ("splits.json", "groups.csv"):
        (work / name).write_text("as it was")
    verify.fix_headers(work, load_dataset(work), [], tmp_path / "new", 1)
    for name in ("splits.json", "groups.csv"):
        with (tmp_path / "new" / name).open("a") as stream:
            stream.write(", edited")
        assert (work / name).read_text() == "as it was"
