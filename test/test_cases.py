import json

import pytest

from ichseg.cases import InputCase, find_cases
from ichseg.errors import InputError


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
    assert job.cases == (
        InputCase("1-2-3.mha", image, tmp_path / "out" / "images" / "bleed" / "1-2-3.mha"),
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
