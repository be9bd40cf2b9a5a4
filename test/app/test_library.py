"""The documented example from Python; and that masks depend on the scan and the bundle alone."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_bundle

from ichseg.scan import volume

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "test" / "sample" / "input"


EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.DOTALL)


def test_the_documented_example_runs(tmp_path, scan, monkeypatch, capsys):
    model = make_bundle(tmp_path / "weights")
    volume.write(scan, tmp_path / "scan.mha")
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[0], "docs/library.md", "exec"), {})
    mask = volume.read(tmp_path / "mask.mha")
    assert mask.spacing_mm == scan.spacing_mm
    volume_ml, disagreement, ran = capsys.readouterr().out.split(maxsplit=2)
    assert float(volume_ml) == pytest.approx(np.count_nonzero(mask.voxels) * 0.0036)
    assert disagreement == "None"  # one network
    assert model.name in ran


def test_the_documented_example_of_a_volume_runs(capsys):
    exec(compile(EXAMPLES[1], "docs/library.md", "exec"), {})
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
