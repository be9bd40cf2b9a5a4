import json
import os

import numpy as np
import pytest
from helpers.dicom_files import make_slice, save

from ichseg.app import contents
from ichseg.app.cases import (
    InputCase,
    find_cases,
    find_challenge_cases,
    say_passed_over,
)
from ichseg.errors import InputError
from ichseg.scan.dicom import files


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def find(folder, out):
    return find_cases(folder, out, input_slug="head-ct", output_slug="bleed")


def write_inputs(folder, sockets):
    entries = [
        {"image": {"name": "a"}, "interface": {"slug": slug, "relative_path": path}}
        for slug, path in sockets.items()
    ]
    entries.append({"value": 1, "interface": {"slug": "age", "relative_path": "age.json"}})
    (folder / "inputs.json").write_text(json.dumps(entries))


def test_flat_folder_keeps_names(tmp_path):
    for name in ("b.nii.gz", "a.mha", "c.nii", "notes.txt", ".hidden.mha"):
        touch(tmp_path / name)
    job = find(tmp_path, tmp_path / "out")
    assert not job.platform
    assert [(c.name, c.output.name) for c in job.cases] == [
        ("a.mha", "a.mha"),
        ("b.nii.gz", "b.nii.gz"),
        ("c.nii", "c.nii"),
    ]


def test_inputs_json_names_the_folder_even_where_it_differs_from_the_slug(tmp_path):
    image = touch(tmp_path / "images" / "ct-head" / "1-2-3.mha")
    write_inputs(tmp_path, {"anything": "images/ct-head"})
    job = find(tmp_path, tmp_path / "out")
    assert job.platform
    mask = tmp_path / "out" / "images" / "bleed" / "1-2-3.mha"
    assert job.cases == (
        InputCase("1-2-3.mha", image, mask, picture="1-2-3.png", probabilities="1-2-3"),
    )


def test_images_folder_without_inputs_json(tmp_path):
    touch(tmp_path / "images" / "other" / "x.nii.gz")
    job = find(tmp_path, tmp_path / "out")
    assert [c.output.name for c in job.cases] == ["x.mha"]  # the platform rejects NIfTI


def test_of_several_sockets_the_named_one_is_taken(tmp_path):
    touch(tmp_path / "images" / "mr" / "x.mha")
    image = touch(tmp_path / "images" / "head-ct" / "y.mha")
    assert find(tmp_path, tmp_path).cases[0].image == image
    write_inputs(tmp_path, {"mr": "images/mr", "head-ct": "images/head-ct"})
    assert find(tmp_path, tmp_path).cases[0].image == image


def test_several_sockets_without_a_match_are_listed(tmp_path):
    touch(tmp_path / "images" / "mr" / "x.mha")
    touch(tmp_path / "images" / "pet" / "x.mha")
    with pytest.raises(InputError, match="image sockets are mr, pet; expected exactly one"):
        find(tmp_path, tmp_path)


def test_refusals(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        find(tmp_path / "nowhere", tmp_path)
    with pytest.raises(InputError, match=r"found no scan, expected \.mha, \.nii\.gz, \.nii"):
        find(tmp_path, tmp_path)
    (tmp_path / "inputs.json").write_text("{")
    with pytest.raises(InputError, match=r"inputs\.json: not the platform's list"):
        find(tmp_path, tmp_path)
    write_inputs(tmp_path, {})
    with pytest.raises(InputError, match="image sockets are none"):
        find(tmp_path, tmp_path)
    write_inputs(tmp_path, {"head-ct": "images/head-ct"})
    with pytest.raises(InputError, match="head-ct: found no scan"):
        find(tmp_path, tmp_path)


@pytest.mark.parametrize(
    "named",
    ["/etc", "../other", "images/../../other", "images/\0", "", None, 7, ["images"], "n" * 300],
)
def test_relative_path_is_a_path_inside(tmp_path, named):
    folder = tmp_path / "input"
    touch(tmp_path / "other" / "x.mha")
    touch(folder / "images" / "ct" / "x.mha")
    write_inputs(folder, {"ct": named})
    with pytest.raises(InputError) as refused:
        find(folder, tmp_path / "out")
    assert "expected a path inside" in str(refused.value) or "File name too long" in str(
        refused.value
    )
    assert len(str(refused.value)) < 600
    assert "\n" not in str(refused.value)


def refused(job):
    return {case.name: case.refusal for case in job.cases if case.refusal}


def test_a_link_that_leads_out_is_a_case_that_failed_and_stops_no_other(tmp_path):
    folder = tmp_path / "input"
    secret = touch(tmp_path / "secret" / "x.mha")
    touch(tmp_path / "secret" / "y.nii.gz")
    touch(folder / "good.nii.gz")
    (folder / "scan.mha").symlink_to(secret)
    (folder / "scan.nii.gz").symlink_to("../secret/y.nii.gz")
    (folder / "slices").symlink_to(secret.parent)
    why = (
        f"a link that leads out of {folder}; expected the file itself (cp -L makes one), or "
        "--follow-links"
    )
    job = find(folder, tmp_path)
    assert refused(job) == dict.fromkeys(("scan.mha", "scan.nii.gz", "slices"), why)
    assert [case.name for case in job.cases if not case.refusal] == ["good.nii.gz"]
    batch = find_challenge_cases(folder, tmp_path)
    assert refused(batch) == {"scan.nii.gz": why}
    assert [case.name for case in batch.cases if not case.refusal] == ["good.nii.gz"]


def test_a_socket_outside_the_input_is_refused(tmp_path):
    folder = tmp_path / "input"
    secret = touch(tmp_path / "secret" / "x.mha")
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "ct").symlink_to(secret.parent)
    with pytest.raises(InputError, match="ct: a link that leads out"):
        find(folder, tmp_path)
    write_inputs(folder, {"ct": "images/ct"})
    with pytest.raises(InputError, match="ct: a link that leads out"):
        find(folder, tmp_path)
    (folder / "inputs.json").rename(secret.parent / "inputs.json")
    (folder / "inputs.json").symlink_to(secret.parent / "inputs.json")
    with pytest.raises(InputError, match=r"inputs\.json: a link that leads out"):
        find(folder, tmp_path)


def test_links_that_stay_inside_and_a_folder_that_is_one(tmp_path):
    folder = tmp_path / "data"
    touch(folder / "store" / "1")
    (folder / "a.mha").symlink_to("store/1")
    (tmp_path / "input").symlink_to(folder)
    job = find(tmp_path / "input", tmp_path)
    assert [(c.name, c.refusal) for c in job.cases] == [("a.mha", "")]


def test_what_looks_like_a_scan_and_is_none_has_failed(tmp_path):
    touch(tmp_path / "good.mha")
    (tmp_path / "circle.mha").symlink_to("circle.mha")
    (tmp_path / "broken.nii").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.nii.gz")
    touch(tmp_path / "folder.mha" / "notes.txt")
    touch(tmp_path / "other.NHDR")
    touch(tmp_path / "other.mgz")
    job = find(tmp_path, tmp_path / "out")
    assert refused(job) == {
        "circle.mha": "a link that leads in a circle, expected the file itself",
        "broken.nii": "a link to nothing, expected a scan",
        "pipe.nii.gz": "neither a file nor a folder, expected a scan",
        "folder.mha": "a folder, expected a file",
        "other.NHDR": "not read, expected .mha, .nii.gz, .nii, .nrrd, .mhd or DICOM",
        "other.mgz": "not read, expected .mha, .nii.gz, .nii, .nrrd, .mhd or DICOM",
    }
    assert job.passed_over == ()


def test_everything_else_is_named_with_the_reason(tmp_path, capsys):
    touch(tmp_path / "good.mha")
    for number in range(7):
        touch(tmp_path / f"notes{number}.txt")
    touch(tmp_path / "._good.mha")
    touch(tmp_path / ".DS_Store")
    touch(tmp_path / "later" / "deep" / "x.mha")
    touch(tmp_path / "later" / "y.nii.gz")
    touch(tmp_path / "papers" / "a.pdf")
    touch(tmp_path / "out" / "earlier.mha")
    job = find(tmp_path, tmp_path / "out")
    assert [case.name for case in job.cases] == ["good.mha"]
    say_passed_over(job)
    assert capsys.readouterr().err.splitlines() == [
        "passed over, hidden: ._good.mha",
        "passed over, no scan by its name or content: notes0.txt, notes1.txt, notes2.txt, "
        "notes3.txt, notes4.txt and 2 more",
        "passed over, holds 2 scans, expected directly in the input; --recursive looks into "
        "folders: later/",
        "passed over, a folder without a scan: papers/",
    ]


def test_a_single_file_is_a_case(tmp_path):
    touch(tmp_path / "beside.mha")
    for name, mask in (
        ("a.nii.gz", "a.nii.gz"), ("b.MHA", "b.MHA"), ("c.nrrd", "c.nrrd"), ("d.mhd", "d.mha"),
    ):  # fmt: skip
        (case,) = find(touch(tmp_path / name), tmp_path / "out").cases
        assert (case.name, case.image.name, case.refusal) == (name, name, "")
        assert case.output == tmp_path / "out" / mask
        assert case.picture == f"{name[0]}.png"
    (tmp_path / "link.mha").symlink_to(touch(tmp_path / "elsewhere" / "x.mha"))
    assert find(tmp_path / "link.mha", tmp_path).cases[0].refusal == ""  # it was named
    with pytest.raises(InputError, match=r"notes\.txt: not named as a scan, expected \.mha"):
        find(touch(tmp_path / "notes.txt"), tmp_path)
    (tmp_path / "slice").write_bytes(bytes(128) + b"DICM")
    with pytest.raises(InputError, match="slice: one DICOM file, of which a scan has many"):
        find(tmp_path / "slice", tmp_path)
    with pytest.raises(InputError, match="a file, expected a folder of the scans"):
        find_challenge_cases(tmp_path / "beside.mha", tmp_path)


def test_the_voxels_of_an_mhd_are_no_other_file(tmp_path):
    header = "NDims = 3\nDimSize = 2 2 2\nElementSpacing = 1 1 1\nElementType = MET_SHORT\n"
    header += "ElementDataFile = "
    (tmp_path / "a.mhd").write_text(header + "voxels of a.raw\n")
    (tmp_path / "b.MHD").write_text(header + "b.zraw\n")
    for name in ("voxels of a.raw", "b.zraw", "c.raw"):
        touch(tmp_path / name)
    job = find(tmp_path, tmp_path / "out")
    assert [(case.name, case.output.name) for case in job.cases] == [
        ("a.mhd", "a.mha"), ("b.MHD", "b.mha"),
    ]  # fmt: skip
    assert job.passed_over == (("c.raw", "no scan by its name or content"),)


def test_an_mhd_and_an_mha_of_one_name_have_one_mask(tmp_path):
    for name in ("a.mhd", "a.mha"):
        touch(tmp_path / name)
    why = "2 scans whose masks would be a.mha"
    assert refused(find(tmp_path, tmp_path / "out")) == {"a.mha": why, "a.mhd": why}


def search(folder, out, **options):
    return find_cases(folder, out, input_slug="head-ct", output_slug="bleed", **options)


def test_links_are_followed_where_that_is_asked_for(tmp_path):
    folder = tmp_path / "input"
    elsewhere = touch(tmp_path / "elsewhere" / "x.mha")
    folder.mkdir()
    (folder / "a.mha").symlink_to(elsewhere)
    (folder / "circle.mha").symlink_to("circle.mha")
    (folder / "more").symlink_to(elsewhere.parent)
    job = search(folder, tmp_path / "out", follow_links=True)
    assert [(case.name, case.image) for case in job.cases if not case.refusal] == [
        ("a.mha", folder / "a.mha")
    ]
    assert "circle.mha" in refused(job)
    assert "--recursive" in dict(job.passed_over)["more/"]
    both = search(folder, tmp_path / "out", follow_links=True, recursive=True)
    assert [case.name for case in both.cases if not case.refusal] == ["a.mha", "more/x.mha"]


def test_folders_are_mirrored(tmp_path):
    """A BIDS dataset keeps its names; an earlier run's masks are none of its scans."""
    folder, out = tmp_path / "input", tmp_path / "input" / "out"
    names = [
        "sub-01/ses-1/ct/sub-01_ses-1_ct.nii.gz",
        "sub-01/ses-2/ct/sub-01_ses-2_ct.nii.gz",
        "sub-02/ct/sub-02_ct.nii.gz",
        "top.mha",
    ]
    for name in names:
        touch(folder / name)
    touch(folder / "sub-01" / "ses-1" / "ct" / "sub-01_ses-1_ct.json")
    touch(folder / "dataset_description.json")
    touch(out / "sub-02" / "ct" / "sub-02_ct.nii.gz")
    touch(folder / ".git" / "x.mha")
    job = search(folder, out, recursive=True)
    assert [case.name for case in job.cases] == names
    assert [case.output for case in job.cases] == [out / name for name in names]
    assert [case.image for case in job.cases] == [folder / name for name in names]
    assert job.cases[2].picture == "sub-02/ct/sub-02_ct.png"
    assert [name for name, _ in job.passed_over] == [
        "dataset_description.json", "sub-01/ses-1/ct/sub-01_ses-1_ct.json",
    ]  # fmt: skip
    assert [case.name for case in find(folder, out).cases] == ["top.mha"]


def test_equal_names_in_different_folders_are_different_cases(tmp_path):
    for name in ("a/ct.nii.gz", "b/ct.nii.gz", "b/ct.mha"):
        touch(tmp_path / name)
    job = search(tmp_path, tmp_path / "out", recursive=True)
    assert refused(job) == {}
    assert [case.picture for case in job.cases] == [
        "a/ct.png", "b/ct.mha.png", "b/ct.nii.gz.png",
    ]  # fmt: skip


def test_folders_that_run_in_a_circle_end(tmp_path):
    touch(tmp_path / "input" / "a" / "x.mha")
    (tmp_path / "input" / "a" / "up").symlink_to(tmp_path / "input")
    job = search(tmp_path / "input", tmp_path / "out", recursive=True)
    assert [case.name for case in job.cases] == ["a/x.mha"]
    assert ("a/up/", "a link to a folder above") in job.passed_over


def write_study(folder, uid, series="1"):
    for number in range(2):
        made = make_slice(
            np.zeros((4, 4)),
            (0, 0, 5 * number),
            StudyInstanceUID=uid,
            SeriesInstanceUID=f"{uid}.{series}",
        )
        save(made, folder / f"{number}.dcm")


def test_dicom_is_found_in_folders_and_mirrored(tmp_path):
    """Slices of one study in two folders are one case, named after the folder around them."""
    write_study(tmp_path / "in" / "p1" / "first" / "ser1", "1.5")
    write_study(tmp_path / "in" / "p1" / "first" / "ser2", "1.5", "2")
    write_study(tmp_path / "in" / "p2", "1.6")
    touch(tmp_path / "in" / "p1" / "x.mha")
    job = search(tmp_path / "in", tmp_path / "out", recursive=True)
    masks = [case.output.relative_to(tmp_path / "out").as_posix() for case in job.cases]
    assert list(zip([case.name for case in job.cases], masks, strict=True)) == [
        ("p1/first/first", "p1/first/first_straight.mha"),
        ("p1/x.mha", "p1/x.mha"),
        ("p2", "p2_straight.mha"),
    ]  # fmt: skip


def test_what_a_folder_has_beside_slices_is_named(tmp_path):
    """As where a converter has written a volume beside them."""
    folder = tmp_path / "in" / "p1"
    folder.mkdir(parents=True)
    save(make_slice(np.zeros((4, 4)), (0, 0, 0)), folder / "1.dcm")
    touch(folder / "converted.nii.gz")
    job = find(tmp_path / "in", tmp_path / "out")
    assert [case.name for case in job.cases] == ["p1"]
    why = "holds 1 scan beside slices, expected directly in the input"
    assert job.passed_over == (("p1/", why),)


def test_slices_that_are_links_are_followed_where_that_is_asked_for(tmp_path):
    write_study(tmp_path / "store", "1.5")
    (tmp_path / "in" / "scan").mkdir(parents=True)
    for file in (tmp_path / "store").iterdir():
        (tmp_path / "in" / "scan" / file.name).symlink_to(file)
    assert "a link that leads out" in refused(find(tmp_path / "in", tmp_path / "out"))["scan"]
    (case,) = search(tmp_path / "in", tmp_path / "out", follow_links=True).cases
    assert (case.name, case.refusal, case.follow_links) == ("scan", "", True)
    assert len(files.walk(case.image, follow_links=True).files) == 2
    assert contents.stamp_of(case.image, follow_links=True)["bytes"] > 0


def test_where_nothing_is_a_scan_the_error_says_what_is_there(tmp_path):
    touch(tmp_path / "sub" / "x.mha")
    with pytest.raises(InputError, match=r"passed over: sub/ \(holds 1 scan, expected directly"):
        find(tmp_path, tmp_path / "out")


def test_scans_beside_the_platforms_folder_and_other_sockets_are_named(tmp_path):
    touch(tmp_path / "images" / "head-ct" / "x.mha")
    touch(tmp_path / "images" / "mr" / "y.mha")
    touch(tmp_path / "beside.nii.gz")
    job = find(tmp_path, tmp_path / "out")
    assert [case.name for case in job.cases] == ["x.mha"]
    assert job.passed_over == (
        ("beside.nii.gz", "not in the socket's folder, images/head-ct"),
        ("images/mr", "of another socket"),
    )


def test_no_two_scans_have_one_picture(tmp_path):
    for name in ("a.mha", "a.nii", "b.mha", "c.mha", "c.mha.nii", "c.nii"):
        touch(tmp_path / name)
    assert [case.picture for case in find(tmp_path, tmp_path / "out").cases] == [
        "a.mha.png", "a.nii.png", "b.png", "c.mha.png", "c.mha.nii.png", "c.nii.png",
    ]  # fmt: skip


TWO_SHAPES = '[{"image": {}, "interface": {"slug": ["a"], "relative_path": "b"}}, {"image": 1}]'


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "{}", "7", '"text"', "[7]", "\ufeff[]", "[1" + "0" * 9999, TWO_SHAPES],
)
def test_inputs_json_of_any_other_shape(tmp_path, text):
    (tmp_path / "inputs.json").write_text(text)
    with pytest.raises(InputError, match=r"not the platform's list|sockets are none") as refused:
        find(tmp_path, tmp_path)
    assert len(str(refused.value)) < 400


def test_an_inputs_json_of_gigabytes_is_not_read(tmp_path):
    with (tmp_path / "inputs.json").open("wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(InputError, match=r"2147483648 bytes, expected at most 16777216"):
        find(tmp_path, tmp_path)


@pytest.mark.parametrize("slug", ["../../etc", "a/b", "", ".", "a\n", "ä"])
def test_a_bundle_cannot_name_a_folder(tmp_path, slug):
    touch(tmp_path / "a.mha")
    with pytest.raises(InputError, match=r"--output-slug: socket .*expected letters"):
        find_cases(tmp_path, tmp_path, input_slug="ct", output_slug=slug)


def test_scans_whose_masks_would_be_one_file(tmp_path):
    for name in ("x.mha", "x.nii.gz", "y.mha"):
        touch(tmp_path / "images" / "ct" / name)
    job = find(tmp_path, tmp_path)
    why = "2 scans whose masks would be x.mha"
    assert refused(job) == {"x.mha": why, "x.nii.gz": why}


def test_challenge_batch_takes_nifti_only_and_keeps_names(tmp_path):
    for name in ("002.nii.gz", "001.nii.gz", "003.nii", "004.mha", "notes.txt"):
        touch(tmp_path / name)
    job = find_challenge_cases(tmp_path, tmp_path / "predict")
    assert (job.challenge, job.platform) == (True, False)
    assert [c.output for c in job.cases] == [
        tmp_path / "predict" / "001.nii.gz", tmp_path / "predict" / "002.nii.gz",
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"found no scan, expected \.nii\.gz"):
        find_challenge_cases(touch(tmp_path / "empty" / "x.mha").parent, tmp_path)


@pytest.mark.parametrize("recursive", [False, True])
def test_a_folder_of_packed_slices_has_failed(tmp_path, recursive):
    """Somebody expects a mask of it."""
    touch(tmp_path / "in" / "a.mha")
    touch(tmp_path / "in" / "packed" / "1.dcm.gz")
    touch(tmp_path / "in" / "packed" / "2.dcm.gz")
    job = search(tmp_path / "in", tmp_path / "out", recursive=recursive)
    assert {case.name: case.refusal for case in job.cases} == {
        "a.mha": "",
        "packed": "holds 2 packed DICOM slices, expected the slices themselves",
    }
