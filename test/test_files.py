"""Names of scans, files that are written whole or not at all, checksums."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ichseg.errors import OutputError
from ichseg.files import (
    is_named_as_scan,
    make_folder,
    remove_unfinished,
    replacing,
    require_writable,
    sha256,
    stem_of,
    suffix_of,
)


def test_suffix_and_stem():
    assert suffix_of(Path("a.b/001.NII.gz")) == ".nii.gz"
    assert stem_of(Path("a.b/001.NII.gz")) == "001"
    assert stem_of(Path("001.v2.mha")) == "001.v2"
    assert suffix_of(Path("001.dcm")) == ""
    assert stem_of(Path("001.dcm")) == "001.dcm"


def test_hidden_files_and_other_types_are_no_scans():
    named = ["a.nii", "a.NII.GZ", "b/a.mha", "a.nrrd", "a.MHD", ".a.nii", "a.nii.txt", "nii"]
    assert [is_named_as_scan(Path(name)) for name in named] == [True] * 5 + [False] * 3


def test_sha256_of_the_standards_example(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, B.1
    assert sha256(tmp_path / "abc").startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")


def test_a_failure_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    text = f"{path}: cannot write (No space left on device)"
    with pytest.raises(OutputError, match=re.escape(text)):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_is_readable_by_others(tmp_path):
    path = tmp_path / "new" / "folder" / "results.json"
    with replacing(path, suffix=".json") as temporary:
        assert temporary.suffix == ".json"
        temporary.write_text("{}")
    assert path.stat().st_mode & 0o777 == 0o644


ROOT = Path(__file__).parents[1]
WRITES = """
import pathlib, sys, time
from ichseg.files import replacing, unfinished_folder

with replacing(pathlib.Path(sys.argv[1]) / "a") as half:
    with unfinished_folder(half.parent) as several:
        (several / "b").touch()
        print("writing", flush=True)
        time.sleep(600)
"""


def test_what_a_run_has_left_is_removed_once_that_has_been_killed(tmp_path):
    (tmp_path / "b").touch()
    (tmp_path / ".writing-of-an-older-version").touch()
    command = [sys.executable, "-c", WRITES, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "writing\n"
        try:
            remove_unfinished(tmp_path)
            left = {path.name for path in tmp_path.glob(".writing-*")}
            assert len(left) == 2
            assert [path.name for path in tmp_path.glob(".writing-*/*")] == ["b"]
        finally:
            run.kill()
    assert {path.name for path in tmp_path.iterdir()} == {*left, "b"}
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_file_that_was_removed_before_it_could_be_locked_is_made_again(tmp_path, monkeypatch):
    make, made = tempfile.mkstemp, []

    def mkstemp(**where):
        made.append(make(**where)[1])
        if len(made) == 1:
            handle = os.open(made[0], os.O_RDWR)
            Path(made[0]).unlink()
            return handle, made[0]
        return os.open(made[1], os.O_RDWR), made[1]

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    with replacing(tmp_path / "a") as temporary:
        temporary.write_text("whole")
    assert len(made) == 2
    assert (tmp_path / "a").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("prepare", [make_folder, require_writable])
def test_what_is_in_a_folder_s_place_is_named(tmp_path, prepare):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere/at/all")
    for place, what in (("file", "a file"), ("link", "a link to nothing")):
        for folder in (tmp_path / place, tmp_path / place / "deeper"):
            with pytest.raises(OutputError) as refused:
                prepare(folder)
            said = f"({tmp_path / place} is {what}, expected a folder)"
            assert str(refused.value).startswith(f"{folder}: ")
            assert str(refused.value).endswith(said)
