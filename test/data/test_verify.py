"""Checking whole datasets, and mending headers in a copy."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from helpers.datasets import SPACING_MM, contents, make_voxels, write_msd, write_v2

from ichseg.errors import DatasetError
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from training.__main__ import main
from training.data import examine, verify
from training.data.convert import convert
from training.data.dataset import load_dataset, read_case
from training.data.examine import Grid, compare
from training.data.verify import fix_headers, verify_dataset
from training.planning import fingerprint

SAMPLE = Path(__file__).parents[1] / "sample" / "input" / "ge_negative.mha"
IMAGE, LABEL = "raw/images/a_0000.mha", "raw/labels/a.mha"


def make_workspace(folder, names="abcde"):
    """Five converted cases, the first as ``.mha``, which keeps geometry in float64."""
    source = write_msd(folder / "source", names)
    listed = json.loads((source / "dataset.json").read_text())
    for key, sub in (("image", "imagesTr"), ("label", "labelsTr")):
        old = source / sub / "a.nii.gz"
        volume.write(volume.read(old), old.with_name("a.mha"))
        old.unlink()
        listed["training"][0][key] = f"{sub}/a.mha"
    (source / "dataset.json").write_text(json.dumps(listed))
    convert(source, folder / "work")
    return folder / "work"


@pytest.fixture
def work(tmp_path):
    return make_workspace(tmp_path)


def change(path, **fields):
    """Replace a file (not the linked source's) by one with other fields."""
    found = volume.read_channels(path)[0]
    path.unlink()
    volume.write(dataclasses.replace(found, nifti_header=None, **fields), path)


def found_in(work, workers=1):
    return [
        (f.severity, f.case, f.file, f.text, f.repairable)
        for f in verify_dataset(work, load_dataset(work), workers)
    ]


def test_a_question_writes_nothing(work):
    before = contents(work)
    assert main(["verify", "--workspace", str(work), "--workers", "1"]) == 0
    assert contents(work) == before
    change(work / LABEL, voxels=3 * LABELS.astype(np.uint8))
    before = contents(work)
    assert main(["verify", "--workspace", str(work), "--workers", "1"]) == 1
    assert contents(work) == before


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_wrong(work, workers, capsys):
    assert found_in(work, workers) == []
    assert main(["verify", "--workspace", str(work), "--workers", str(workers)]) == 0
    assert capsys.readouterr().out.startswith("Tiny: 5 cases in ")


LABELS = make_voxels(0) > 50
MANY = np.arange(1200, dtype=np.float32).reshape(3, 20, 20)


@pytest.mark.parametrize(
    ("file", "fields", "text"),
    [
        (LABEL, {"voxels": LABELS[:, :, :4].astype(np.uint8)}, "size 3x4x4, expected 3x4x5 as"),
        (LABEL, {"spacing_mm": (5, 0.5, 0.6)}, "spacing 5, 0.5, 0.6, expected 5, 0.5, 0.5 as"),
        (LABEL, {"origin_mm": (0, 0, 0.3)}, "origin 0, 0, 0.3, expected 0, 0, 0 as"),
        (
            LABEL,
            {"direction": (1, 0, 0, 0, -1, 0, 0, 0, -1)},
            "direction 1, 0, 0, 0, -1, 0, 0, 0, -1, expected 1, 0, 0, 0, 1, 0, 0, 0, 1 as",
        ),
        (
            IMAGE,
            {"voxels": np.where(LABELS, np.nan, 1.0)},
            f"NaN or infinite in {LABELS.sum()} voxels",
        ),
        (
            LABEL,
            {"voxels": np.where(LABELS, np.inf, 0.0)},
            f"NaN or infinite in {LABELS.sum()} voxels",
        ),
        (
            LABEL,
            {"voxels": LABELS * np.uint8(3)},
            f"{LABELS.sum()} voxels have values 3, expected whole labels 0..1",
        ),
        (LABEL, {"voxels": LABELS * 0.5}, f"{LABELS.sum()} voxels have values 0.5, expected whole"),
        (LABEL, {"voxels": -LABELS.astype(np.int16)}, "voxels have values -1, expected"),
        (LABEL, {"voxels": MANY}, "more than 1000 different values, expected whole labels 0..1"),
        (LABEL, {"voxels": make_voxels(0)}, f"the same voxels as {IMAGE} of case a"),
        (IMAGE, {"spacing_mm": (5000, 500, 500)}, "spacing 5000, 500, 500 mm, expected 0.05 to 20"),
    ],
)
def test_errors(work, file, fields, text):
    change(work / file, **fields)
    found = [f for f in found_in(work) if f[3].startswith(text) or text in f[3]]
    assert [f[:3] for f in found] == [("error", "a", file)]
    assert not found[0][4]
    assert main(["verify", "--workspace", str(work), "--workers", "1"]) == 1


@pytest.mark.parametrize(
    ("changes", "file", "text"),
    [
        (
            {LABEL: {"voxels": np.zeros((3, 4, 5), np.uint8)}},
            LABEL,
            "empty: no voxel but background",
        ),
        ({IMAGE: {"voxels": np.full((3, 4, 5), -7, np.int16)}}, IMAGE, "all voxels are -7"),
        (
            {name: {"spacing_mm": (0.9, 0.5, 0.5)} for name in (IMAGE, LABEL)},
            IMAGE,
            "spacing 0.5, 0.5, 0.9 mm (in order of size), the dataset's median is 0.5, 0.5, 5",
        ),
    ],
)
def test_warnings_do_not_fail(work, changes, file, text):
    for changed, fields in changes.items():
        change(work / changed, **fields)
    assert found_in(work) == [("warning", "a", file, text, False)]
    assert main(["verify", "--workspace", str(work), "--workers", "1"]) == 0


def test_a_permuted_case_has_no_odd_spacing(work):
    for name in (IMAGE, LABEL):
        change(work / name, spacing_mm=(0.5, 0.5, 5.0))
    assert found_in(work) == []


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(b"nothing"), "damaged or not a .mha volume"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "damaged or not a .mha volume"),
    ],
)
@pytest.mark.parametrize("file", [IMAGE, LABEL])
def test_files_that_cannot_be_read(work, file, spoil, text):
    content = (work / file).read_bytes()
    (work / file).unlink()  # a link to the source's
    (work / file).write_bytes(content)
    spoil(work / file)
    ((severity, case, where, found, _),) = found_in(work)
    assert (severity, case, where) == ("error", "a", file)
    assert found.startswith(text)


def test_channels_are_compared_and_have_to_be_apart(tmp_path):
    work = tmp_path / "work"
    convert(write_v2(tmp_path / "source", "abcde"), work)
    assert found_in(work) == []
    second = work / "raw/images/c_0001.nii.gz"
    change(second, spacing_mm=(5, 0.5, 0.7))
    assert found_in(work) == [
        (
            "error",
            "c",
            "raw/images/c_0001.nii.gz",
            "spacing 5, 0.5, 0.7, expected 5, 0.5, 0.5 as raw/images/c_0000.nii.gz",
            False,
        )
    ]
    change(second, spacing_mm=SPACING_MM, voxels=make_voxels(2).astype(np.float32))
    ((severity, _, _, text, _),) = found_in(work)  # whatever the type of the same voxels
    assert (severity, text) == (
        "error",
        "the same voxels as raw/images/c_0000.nii.gz of case c",
    )
    image = sitk.ReadImage(str(work / "raw/images/c_0000.nii.gz"))
    second.unlink()
    sitk.WriteImage(sitk.JoinSeries([image, image]), str(second))
    ((_, _, _, text, _),) = found_in(work)
    assert text == "2 channels in one file, expected one"


def test_duplicates(work):
    """The same scan under two names is an error, the same reference alone a warning."""
    change(work / "raw/images/d_0000.nii.gz", voxels=make_voxels(1).astype(np.float32))
    change(work / "raw/labels/e.nii.gz", voxels=(make_voxels(2) > 50).astype(np.uint8))
    assert found_in(work) == [
        (
            "error",
            "d",
            "raw/images/d_0000.nii.gz",
            "the same voxels as raw/images/b_0000.nii.gz of case b",
            False,
        ),
        (
            "warning",
            "e",
            "raw/labels/e.nii.gz",
            "the same voxels as raw/labels/c.nii.gz of case c",
            False,
        ),
    ]


def edit(work, change):
    content = json.loads((work / "dataset.json").read_text())
    change(content)
    (work / "dataset.json").write_text(json.dumps(content))


def test_every_image_has_a_label_and_the_reverse(work):
    edit(work, lambda content: content["cases"][1].update(label=None))
    edit(work, lambda content: content["cases"].pop(4))
    edit(work, lambda content: content["labels"].append("clot"))
    assert [f[:4] for f in found_in(work)] == [
        ("warning", "-", "dataset.json", "label 2 (clot) occurs in no reference"),
        (
            "error",
            "-",
            "raw/images/e_0000.nii.gz",
            "dataset.json does not list it, so it has no label",
        ),
        ("error", "-", "raw/labels/b.nii.gz", "dataset.json does not list it, so it has no image"),
        ("error", "-", "raw/labels/e.nii.gz", "dataset.json does not list it, so it has no image"),
        ("error", "-", "-", "3 cases cannot make 5 folds, expected at least one a fold"),
        ("warning", "b", "-", "no reference segmentation: the case is not trained on"),
    ]


def test_table_of_groups_is_checked(work):
    (work / "groups.csv").write_text("case,group\na,p\n")
    ((severity, _, _, text, _),) = found_in(work)
    assert severity == "error"
    assert text.endswith("groups.csv: 4 of 5 cases have no group: b, c, d, e")


def test_a_failure_of_the_check_itself_is_a_finding(work, monkeypatch):
    monkeypatch.setattr(examine, "_scan", lambda _: 1 / 0)
    found = found_in(work)
    assert [f[1] for f in found] == ["-", *"abcde"]  # the first: no label was seen
    assert found[1][3] == "ZeroDivisionError: division by zero"


def test_all_findings_are_in_the_table(work, capsys):
    change(work / LABEL, voxels=LABELS * np.uint8(2), origin_mm=(9, 0, 0))
    change(work / "raw/labels/b.nii.gz", voxels=np.zeros((3, 4, 5), np.uint8))
    assert main(["verify", "--workspace", str(work), "--workers", "1"]) == 1
    table, count = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert table.split("\n") == [
        "         case  file                 finding",
        "error    a     raw/labels/a.mha     origin 9, 0, 0, expected 0, 0, 0 as " + IMAGE,
        f"error    a     raw/labels/a.mha     {LABELS.sum()} voxels have values 2, "
        "expected whole labels 0..1",
        "warning  b     raw/labels/b.nii.gz  empty: no voxel but background",
    ]
    assert count.endswith(": 2 errors, 1 warning")


GRID = Grid((3, 4, 5), (5.0, 0.5, 0.5), (10.0, 20.0, 30.0), (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))


@pytest.mark.parametrize(
    ("field", "index", "offset", "expected"),
    [
        # spacing: 1e-4 and 1e-2 of 0.5; of 5
        ("spacing_mm", 2, 0.99e-4 * 0.5, None),
        ("spacing_mm", 2, 1.01e-4 * 0.5, True),
        ("spacing_mm", 0, -0.99e-2 * 5, True),
        ("spacing_mm", 0, -1.01e-2 * 5, False),
        # origin: 0.01 and 0.1 of the finest spacing, 0.5
        ("origin_mm", 0, 0.0049, None),
        ("origin_mm", 0, -0.0051, True),
        ("origin_mm", 1, 0.049, True),
        ("origin_mm", 1, 0.051, False),
        # direction cosines: 1e-3 and 1e-2
        ("direction", 1, 0.9e-3, None),
        ("direction", 1, 1.1e-3, True),
        ("direction", 8, -0.9e-2, True),
        ("direction", 8, -1.1e-2, False),
        ("direction", 8, np.nan, False),
    ],
)
def test_tolerances(field, index, offset, expected):
    values = list(getattr(GRID, field))
    values[index] += offset
    found = list(compare(dataclasses.replace(GRID, **{field: tuple(values)}), GRID))
    assert [repairable for _, repairable in found] == ([] if expected is None else [expected])


def test_a_header_is_mended_as_a_whole_or_not_at_all():
    found = dataclasses.replace(GRID, spacing_mm=(5.0, 0.5, 0.501), origin_mm=(10.0, 20.0, 31.0))
    assert [repairable for _, repairable in compare(found, GRID)] == [False, False]


def test_fix_headers(tmp_path, work, capsys):
    (work / "groups.csv").write_text("case,group\n" + "".join(f"{n},{n}\n" for n in "abcde"))
    for label in (LABEL, "raw/labels/b.nii.gz"):
        change(work / label, origin_mm=(0.0, 0.02, 0.0), spacing_mm=(5.0, 0.501, 0.5))
    change(work / "raw/labels/c.nii.gz", voxels=(make_voxels(2) > 50).astype(np.float32))
    change(work / "raw/labels/c.nii.gz", origin_mm=(0.0, 0.02, 0.0))
    before = contents(work)
    assert main(["verify", "--workspace", str(work), "--workers", "1"]) == 1
    assert "mends 5 of the errors, small differences between headers" in capsys.readouterr().out
    new = tmp_path / "new"
    command = ["verify", "--workspace", str(work), "--workers", "1", "--fix-headers", str(new)]
    assert main(command) == 0
    assert "3 files with a mended header, 0 errors left" in capsys.readouterr().out
    assert contents(work) == before
    assert found_in(new) == []
    assert (new / "groups.csv").exists()
    fixed = load_dataset(new)
    for case, old in zip(fixed.cases, load_dataset(work).cases, strict=True):
        (image,), label = read_case(case, fixed.labels)
        assert label.origin_mm == image.origin_mm
        assert label.spacing_mm == image.spacing_mm
        voxels = volume.read(old.label).voxels
        np.testing.assert_array_equal(label.voxels, voxels)
        assert label.voxels.dtype == voxels.dtype
        assert case.images[0].samefile(old.images[0])
        assert case.label.samefile(old.label) == (case.name in "de")


def test_fix_headers_leaves_what_is_not_small(tmp_path, work, capsys):
    change(work / LABEL, origin_mm=(0.0, 0.02, 0.0))
    change(work / "raw/labels/b.nii.gz", origin_mm=(0.0, 2.0, 0.0))
    new = tmp_path / "new"
    command = ["verify", "--workspace", str(work), "--workers", "1", "--fix-headers", str(new)]
    assert main(command) == 1
    assert "1 file with a mended header, 1 error left" in capsys.readouterr().out
    assert [f[1:3] for f in found_in(new)] == [("b", "raw/labels/b.nii.gz")]


def test_fix_headers_without_any_to_fix(tmp_path, work, capsys):
    command = ["verify", "--workspace", str(work), "--fix-headers", str(tmp_path / "new")]
    assert main([*command, "--workers", "1"]) == 0
    assert "no header to mend" in capsys.readouterr().out
    assert not (tmp_path / "new").exists()


def test_no_header_is_mended_by_one_that_cannot_be_read(tmp_path):
    work = tmp_path / "work"
    convert(write_v2(tmp_path / "source", "abcde"), work)
    change(work / "raw/labels/c.nii.gz", origin_mm=(0.0, 0.02, 0.0))
    (work / "raw/images/c_0000.nii.gz").unlink()
    found = found_in(work)
    assert [(f[2], f[4]) for f in found] == [
        ("raw/images/c_0000.nii.gz", False),
        ("raw/labels/c.nii.gz", False),
    ]
    assert found[1][3].endswith("as raw/images/c_0001.nii.gz")


def test_fix_headers_refuses(tmp_path, work, capsys):
    change(work / LABEL, origin_mm=(0.0, 0.02, 0.0))
    data = load_dataset(work)
    findings = verify_dataset(work, data, 1)
    with pytest.raises(DatasetError, match="lies in the workspace"):
        fix_headers(work, data, findings, work / "new", 1)
    (tmp_path / "taken/runs").mkdir(parents=True)
    with pytest.raises(DatasetError, match="runs: exists; expected a workspace that holds no"):
        fix_headers(work, data, findings, tmp_path / "taken", 1)
    assert main(["verify", "--workspace", str(work), "--fix-headers", str(work)]) == 1
    said = capsys.readouterr()
    assert "dataset.json: exists" in said.err
    assert said.out == ""  # before any file is read
    (work / "raw/images/b_0000.nii.gz").unlink()
    with pytest.raises(DatasetError, match=r"1 of 5 cases failed, the first: case b: .*no such"):
        fix_headers(work, data, findings, tmp_path / "new", 1)
    assert not (tmp_path / "new/dataset.json").exists()


def test_every_file_is_read_once(work, monkeypatch):
    reads = []
    read = volume.read_channels
    monkeypatch.setattr(volume, "read_channels", lambda path: reads.append(path) or read(path))
    found_in(work)
    assert len(reads) == len(set(reads)) == 10


def test_nothing_in_the_table_without_findings():
    assert verify.table([]) == ""


def test_memory_limits_the_workers(work, monkeypatch):
    used = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(verify.parallel.machine, "free_memory_bytes", lambda: 1_000_000_000)
    monkeypatch.setattr(verify, "verify_dataset", lambda *args: used.append(args[2]) or [])
    assert main(["verify", "--workspace", str(work)]) == 0
    assert used == [3]  # 200 MB each, and 20 % kept free


def test_a_label_to_ignore_is_no_error_and_no_label(work):
    listed = json.loads((work / "dataset.json").read_text())
    (work / "dataset.json").write_text(json.dumps(listed | {"ignore_label": 2}))
    doubted = np.where(LABELS, 1, 2).astype(np.uint8)
    change(work / LABEL, voxels=doubted)
    assert found_in(work) == []
    change(work / LABEL, voxels=doubted + LABELS.astype(np.uint8))
    everything = "all voxels are 2, which is left out: nothing is learnt from the case"
    assert found_in(work) == [("warning", "a", LABEL, everything, False)]
    change(work / LABEL, voxels=np.where(LABELS, 0, 2).astype(np.uint8))
    rest = "no voxel but background and 2, which is left out"
    assert found_in(work) == [("warning", "a", LABEL, rest, False)]
    change(work / LABEL, voxels=np.where(LABELS, 1, 3).astype(np.uint8))
    text = f"{(~LABELS).sum()} voxels have values 3, expected whole labels 0..2"
    assert found_in(work) == [("error", "a", LABEL, text, False)]


def test_hu_with_an_offset_is_an_error_and_is_not_planned_for(work):
    """Inference takes the offset off; networks that learned on it would see another scan."""
    sample = volume.read(SAMPLE)
    z_mm, y_mm, x_mm = sample.spacing_mm
    voxels = sample.voxels[:, ::3, ::3].astype(np.int16)
    scan = Volume(voxels, (z_mm, 3 * y_mm, 3 * x_mm))
    label = scan.with_voxels(np.full(voxels.shape, 1, np.uint8))
    for path, found in ((IMAGE, scan), (LABEL, label)):
        (work / path).unlink()
        volume.write(found, work / path)
    said = "1024 is added to HU, which inference would take off"
    assert not any(said in text for _, _, _, text, _ in found_in(work))
    assert fingerprint.compute_fingerprint(load_dataset(work), 1).names == tuple("abcde")
    (work / IMAGE).unlink()
    volume.write(scan.with_voxels(voxels + 1024), work / IMAGE)
    assert ("error", "a", IMAGE, f"{said}; expected HU", False) in found_in(work)
    with pytest.raises(DatasetError, match=r"case a: .* 1024 is added to HU"):
        fingerprint.compute_fingerprint(load_dataset(work), 1)
