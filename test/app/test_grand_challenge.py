"""Grand Challenge's inputs.json as it is since December 2025, and as it was before."""

import json

import numpy as np
import pytest
from helpers.dicom_files import make_slice, save

from ichseg.app.cases import find_cases
from ichseg.errors import InputError

SOCKET = {"slug": "head-ct", "kind": "Image", "super_kind": "Image", "relative_path": "images/ct"}
AGE = {"slug": "age", "kind": "Integer", "super_kind": "Value", "relative_path": "age.json"}


def lay_out(folder, *entries):
    (folder / "images" / "ct").mkdir(parents=True, exist_ok=True)
    (folder / "images" / "ct" / "1-2.mha").touch()
    (folder / "inputs.json").write_text(json.dumps(list(entries)))


def find(folder):
    return find_cases(folder, folder / "out", input_slug="head-ct", output_slug="bleed")


@pytest.mark.parametrize(
    "keys", [("socket",), ("interface",), ("socket", "interface"), ("interface", "socket")]
)
@pytest.mark.parametrize("image", [{"pk": "1-2", "name": "scan.mha"}, None])
def test_the_socket_is_read_under_its_new_name_and_its_old_one(tmp_path, keys, image):
    lay_out(
        tmp_path,
        {"pk": 2, "value": 71, "file": None, "image": None} | dict.fromkeys(keys, AGE),
        {"pk": 1, "value": None, "file": None, "image": image} | dict.fromkeys(keys, SOCKET),
    )
    job = find(tmp_path)
    assert job.platform
    assert [(c.name, str(c.output.relative_to(tmp_path))) for c in job.cases] == [
        ("1-2.mha", "out/images/bleed/1-2.mha")
    ]


def test_of_both_the_new_one_counts(tmp_path):
    lay_out(tmp_path, {"image": None, "socket": SOCKET, "interface": AGE})
    assert len(find(tmp_path).cases) == 1
    lay_out(tmp_path, {"image": None, "socket": None, "interface": SOCKET})
    assert len(find(tmp_path).cases) == 1


@pytest.mark.parametrize("entry", [{"image": None}, {"socket": 7}, {"socket": {"kind": "Image"}}])
def test_an_entry_without_a_socket_is_not_the_platforms(tmp_path, entry):
    lay_out(tmp_path, {"image": {"name": "a"}} | entry)
    with pytest.raises(InputError, match=r"inputs\.json: not the platform's list of inputs"):
        find(tmp_path)


@pytest.mark.parametrize("listed", [True, False])
def test_a_socket_of_dicom_slices_is_one_case(tmp_path, listed):
    folder = tmp_path / "images" / "ct-series"
    for number, z in enumerate((5.0, 0.0, 10.0)):
        save(make_slice(np.zeros((4, 4)), (0.0, 0.0, z)), folder / f"{number}.dcm")
    if listed:
        socket = SOCKET | {"kind": "DICOM Image Set", "relative_path": "images/ct-series"}
        (tmp_path / "inputs.json").write_text(json.dumps([{"image": None, "socket": socket}]))
    job = find(tmp_path)
    assert job.platform
    assert [(c.name, c.image, str(c.output.relative_to(tmp_path))) for c in job.cases] == [
        ("ct-series", folder, "out/images/bleed/ct-series.mha")
    ]
