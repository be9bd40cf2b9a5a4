"""Scripts for the viewer, read back by an independent NIfTI library."""

import base64
import gzip
import json
import tracemalloc

import nibabel
import numpy as np
import pytest

from ichseg.report import case_files, pictures, viewer
from ichseg.report.framing import frame
from ichseg.scan.volume import Volume


def read_back(text):
    """Slug and volumes of a script, as nibabel reads them, ``(z, y, x)``."""
    assert text.startswith("ichsegCase(")
    assert text.endswith(");\n")
    slug, volumes = json.loads("[" + text.removeprefix("ichsegCase(").removesuffix(");\n") + "]")
    images = {
        name: nibabel.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(content)))
        for name, content in volumes.items()
    }
    return slug, images


def voxels_of(image):
    return np.asarray(image.dataobj).T


def scan(shape=(5, 30, 40), low=-100, high=200):
    rng = np.random.default_rng(1)
    return Volume(rng.integers(low, high, shape).astype(np.int16), (5.0, 0.5, 0.5), (3.0, 2.0, 1.0))


def test_soft_tissue_comes_back_as_it_was_and_where_it_was():
    image = scan()
    mask = image.with_voxels((image.voxels > 100).astype(np.uint8))
    framed = frame(image, {"prediction": mask})
    script = viewer.make_script(framed, "a", is_ct=True)
    slug, images = read_back(script.text)
    assert slug == "a"
    assert script.merged == (1, 1, 1)
    np.testing.assert_array_equal(voxels_of(images["image"]), framed.image)
    np.testing.assert_array_equal(voxels_of(images["prediction"]), framed.masks["prediction"])
    for found in images.values():
        np.testing.assert_allclose(found.affine, framed.affine, atol=1e-5)
    assert images["image"].get_data_dtype() == np.int16
    assert images["prediction"].get_data_dtype() == np.uint8


def test_air_and_bone_are_kept_to_within_half_a_step():
    framed = frame(scan(low=-1500, high=3500), {})
    _, images = read_back(viewer.make_script(framed, "a", is_ct=True).text)
    found, wanted = voxels_of(images["image"]), np.clip(framed.image, -1024, 3071)
    assert abs(found - wanted).max() == 4
    soft = (wanted >= -200) & (wanted <= 300)
    np.testing.assert_array_equal(found[soft], wanted[soft])


def test_other_intensities_are_scaled():
    voxels = np.random.default_rng(0).uniform(0, 1e6, (4, 10, 10)).astype(np.float32)
    framed = frame(Volume(voxels, (1.0, 1.0, 1.0)), {}, is_ct=False)
    _, images = read_back(viewer.make_script(framed, "a", is_ct=False).text)
    np.testing.assert_allclose(voxels_of(images["image"]), framed.image, atol=1e6 / 4095)
    flat = frame(Volume(np.full((2, 3, 3), 7.0), (1.0, 1.0, 1.0)), {}, is_ct=False)
    _, images = read_back(viewer.make_script(flat, "a", is_ct=False).text)
    np.testing.assert_allclose(voxels_of(images["image"]), 7.0)


def test_too_large_a_case_is_merged_in_its_slices_and_loses_no_voxel_of_a_mask(monkeypatch):
    monkeypatch.setattr(viewer, "MOST_BYTES", 6000)
    image = scan((5, 31, 40))  # an odd number: the last row is merged with none
    labels = np.zeros(image.voxels.shape, np.uint8)
    labels[2, 30, 7] = 2
    framed = frame(image, {"reference": image.with_voxels(labels)}, is_ct=True)
    script = viewer.make_script(framed, "a", is_ct=True)
    assert len(script.text) <= 6000
    assert script.merged == (1, 2, 2)
    _, images = read_back(script.text)
    found = voxels_of(images["reference"])
    assert found.shape == (5, 16, 20)
    assert found[2, 15, 3] == 2
    assert found.sum() == 2
    shown = voxels_of(images["image"])
    blocks = framed.image[:, :30].reshape(5, 15, 2, 20, 2).mean(axis=(2, 4))
    np.testing.assert_array_equal(shown[:, :15], np.rint(blocks))
    np.testing.assert_array_equal(
        shown[:, 15], np.rint(framed.image[:, 30].reshape(5, 20, 2).mean(axis=2))
    )
    # the middle of the first block, in mm
    np.testing.assert_allclose(
        images["image"].affine @ [0, 0, 0, 1], framed.affine @ [0.5, 0.5, 0, 1], atol=1e-5
    )


def test_same_case_gives_the_same_bytes():
    framed = frame(scan(), {})
    first, again = (viewer.make_script(framed, "a", is_ct=True).text for _ in range(2))
    assert first == again


@pytest.mark.parametrize(("is_ct", "shape"), [(True, (64, 256, 256)), (False, (64, 128, 256))])
def test_drawing_takes_the_memory_that_is_said(tmp_path, monkeypatch, is_ct, shape):
    """Also of a scan of many more voxels than the viewer gets."""
    monkeypatch.setattr(viewer, "MOST_VOXELS", 600_000)
    image = scan(shape)
    mask = image.with_voxels((image.voxels > 190).astype(np.uint8))

    def draw():
        pictures.write_overlay(image, mask, tmp_path / "a.png", is_ct=is_ct)
        case_files.write_case(tmp_path, "a", image, {"prediction": mask}, is_ct=is_ct)

    draw()  # which also imports what it needs
    tracemalloc.start()
    draw()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    said = case_files.memory_bytes(image, is_ct=is_ct)
    assert said / 4 < peak < said
