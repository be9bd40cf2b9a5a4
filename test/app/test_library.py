"""The documented examples from Python; and that masks depend on the scan and the bundle alone."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import dicom_slices
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import make_bundle

from ichseg.predict import ensemble
from ichseg.report import pictures
from ichseg.scan import volume

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "test" / "sample" / "input"


EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.DOTALL)
(
    FOR_NOTEBOOK,
    FOR_ARRAYS,
    FOR_ITK,
    FOR_NIBABEL,
    FOR_RESULTS,
    FOR_MANY,
    FOR_MANY_KINDS,
    FOR_VOLUMES,
) = EXAMPLES


@pytest.fixture
def desk(tmp_path, scan, monkeypatch):
    """A folder with what the page's snippets read; ``Ensemble.load()`` loads a tiny bundle."""
    make_bundle(tmp_path / "weights")
    volume.write(scan, tmp_path / "scan.mha")
    volume.write(scan, tmp_path / "scan.nii.gz")
    for name in "ab":
        volume.write(scan, tmp_path / "scans" / f"{name}.mha")
    (tmp_path / "scans" / "c.mha").write_bytes(b"no scan")
    dicom_slices.write(tmp_path / "scan.mha", tmp_path / "dicom_folder")
    monkeypatch.setattr(ensemble, "default_weights", lambda: tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(snippet):
    """Its names afterwards, and the value of its last line, as in a cell of a notebook."""
    names = {}
    *before, last = ast.parse(snippet).body
    exec(compile(ast.Module(before, []), "docs/library.md", "exec"), names)
    if isinstance(last, ast.Expr):
        return names, eval(compile(ast.Expression(last.value), "docs/library.md", "eval"), names)
    exec(compile(ast.Module([last], []), "docs/library.md", "exec"), names)
    return names, None


def files_in(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_dicom_folder_in_a_notebook_without_a_file_being_written(desk, scan, capsys):
    before = files_in(desk)
    names, picture = run(FOR_NOTEBOOK)
    assert files_in(desk) == before
    assert len([line for line in FOR_NOTEBOOK.splitlines() if line.strip()]) <= 20
    found = names["found"]
    np.testing.assert_array_equal(names["scan"].voxels.shape, scan.voxels.shape)
    assert found.lesions
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "7x21x30 voxels of 5x0.8x0.9 mm"
    assert said[1].startswith(f"{found.volume_ml:.1f} mL, case score 0.")
    assert len([line for line in said if " HU at (" in line]) == len(found.lesions)
    assert any("less than a head" in line for line in said if line.startswith("warning: "))
    # a picture that a notebook shows, with the outline in it
    assert picture._repr_png_().startswith(b"\x89PNG")
    colours = np.array(picture).reshape(-1, 3)
    assert (colours == pictures.OUTLINE_RGB).all(axis=1).sum() > 100
    # the same as the program's figures, measured on the slices
    assert found.volume_ml == pytest.approx(np.count_nonzero(found.mask.voxels) * 0.0036)


def test_arrays(desk, capsys):
    run(FOR_ARRAYS)
    assert "of 7x21x30 voxels of 0.9x0.9x5 mm" in capsys.readouterr().out


@pytest.mark.parametrize("snippet", [FOR_ITK, FOR_NIBABEL], ids=["SimpleITK", "nibabel"])
def test_images_of_other_libraries_get_masks_that_fit(desk, scan, snippet):
    mask = run(snippet)[0]["mask"]
    expected = ensemble.Ensemble.load().segment("scan.mha", "fast").mask
    assert 0.05 < expected.voxels.mean() < 0.99
    if isinstance(mask, sitk.Image):
        sitk.WriteImage(mask, "mask.mha")
    else:
        nibabel.save(mask, "mask.nii.gz")
    (written,) = desk.glob("mask*")
    found = volume.read(written)
    np.testing.assert_array_equal(found.voxels, expected.voxels)
    np.testing.assert_allclose(found.origin_mm, scan.origin_mm, atol=1e-4)
    np.testing.assert_allclose(found.direction, scan.direction, atol=1e-6)


def test_what_comes_out(desk, scan, capsys):
    found = run(FOR_RESULTS)[0]["found"]
    mask = volume.read(desk / "mask.mha")
    assert mask.spacing_mm == scan.spacing_mm
    shape, kind, volume_ml = capsys.readouterr().out.rsplit(maxsplit=2)
    assert (shape, kind) == ("(1, 7, 21, 30)", "float16")
    assert float(volume_ml) == pytest.approx(np.count_nonzero(mask.voxels) * 0.0036)
    assert found.volume_ml > ensemble.Ensemble.load().segment("scan.mha", "fast").volume_ml
    steps = abs(found.probabilities[0].astype(np.float32) * 255 - found.foreground)
    assert steps.max() < 0.7  # a half, and what float16 rounds


def test_many(desk, capsys):
    run(FOR_MANY)
    assert [path.name for path in files_in(desk / "masks")] == ["a.mha", "b.mha"]
    said = capsys.readouterr().out
    assert "scan 1: " in said
    assert "c.mha: damaged" in said


def test_many_kinds(desk, scan):
    networks = ensemble.Ensemble.load()
    folder, itk, nifti, array, thinner = run(FOR_MANY_KINDS)[0]["found"]
    assert folder == pytest.approx(networks.segment("dicom_folder", "fast").volume_ml)
    assert [itk, nifti] == pytest.approx([networks.segment(scan, "fast").volume_ml] * 2)
    of_arrays = [
        networks.segment(scan.voxels, "fast", spacing_mm=(step, 0.8, 0.9)).volume_ml
        for step in (5, 4)
    ]
    assert [array, thinner] == pytest.approx(of_arrays)
    assert thinner < array


def test_volumes(capsys):
    run(FOR_VOLUMES)
    assert capsys.readouterr().out == "11\n"  # of 0 to 23 those above 12


@pytest.mark.slow
def test_default_masks_are_the_same_bytes_run_after_run(tmp_path):
    """In processes of their own, with none and with two cases before the one that is compared."""
    last = SAMPLES / "synthetic_subdural.nii.gz"
    found = []
    for number, before in enumerate(("", "", "ge_negative.mha")):
        folder = tmp_path / str(number)
        (folder / "in").mkdir(parents=True)
        shutil.copy(last, folder / "in")
        if before:
            for name in ("a.mha", "b.mha"):
                shutil.copy(SAMPLES / before, folder / "in" / name)
        subprocess.run(
            [sys.executable, str(ROOT / "process.py"), "--input", str(folder / "in"), "--output",
             str(folder / "out"), "--preset", "fast", "--device", "cpu"],
            check=True,
        )  # fmt: skip
        found.append((folder / "out" / last.name).read_bytes())
    assert volume.read(tmp_path / "0" / "out" / last.name).voxels.any()
    assert len(set(found)) == 1


WITHOUT = """
import sys
sys.modules |= {"SimpleITK": None, "openvino": None}
import numpy as np
from ichseg import Ensemble
import training.jobs.train, training.store.chunks, training.crossval.validate
found = Ensemble.load(sys.argv[1], "cpu").segment(np.load(sys.argv[2]), spacing_mm=(5, 0.8, 0.9))
np.save(sys.argv[3], found.mask.voxels)
"""


def test_arrays_need_neither_simpleitk_nor_openvino(tmp_path, scan):
    """A machine that has neither trains from the store, and segments what is in memory."""
    make_bundle(tmp_path / "weights")
    np.save(tmp_path / "scan.npy", scan.voxels)
    paths = [str(tmp_path / name) for name in ("weights", "scan.npy", "mask.npy")]
    subprocess.run([sys.executable, "-c", WITHOUT, *paths], cwd=ROOT, check=True)
    expected = ensemble.Ensemble.load(tmp_path / "weights", "torch-cpu").segment(
        scan.voxels, spacing_mm=(5, 0.8, 0.9)
    )
    np.testing.assert_array_equal(np.load(paths[2]), expected.mask.voxels)
    assert expected.mask.voxels.any()
