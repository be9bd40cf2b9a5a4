"""Coverage-guided fuzzing of the readers of volumes and DICOM slices.

By atheris, which `make fuzz` installs.

    PYTHONPATH=.:test .venv/bin/python test/robustness/fuzz_coverage.py -max_total_time=60

Arguments are libFuzzer's. Whatever is raised but a clear refusal ends it with status 77.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(
    include=[
        "ichseg.scan.headers",
        "ichseg.scan.metaimage",
        "ichseg.scan.nifti",
        "ichseg.scan.stored",
        "ichseg.scan.dicom.elements",
        "ichseg.scan.dicom.pixels",
    ]
):
    from ichseg.scan import headers, nifti
    from ichseg.scan.dicom import elements, pixels
from helpers.dicom_files import make_slice, save

from ichseg.errors import InputError
from ichseg.scan.volume import Volume, write

SUFFIXES = (".mha", ".nii", ".nii.gz", ".dcm")


def read(data: bytes) -> None:
    """Read the bytes as a file, whose kind the first byte says."""
    suffix = SUFFIXES[data[0] % len(SUFFIXES)] if data else ".mha"
    path = FOLDER / f"case{suffix}"
    path.write_bytes(data[1:])
    try:
        if suffix == ".dcm":
            _read_slice(path)
            return
        header = headers.read_header(path, suffix)
        if header.nbytes < 1 << 24:
            headers.read_voxels(path, suffix, header)
        if suffix != ".mha":
            nifti.frames_differ(header.raw)
    except InputError as error:
        if str(path) not in str(error) or "\n" in str(error):
            raise RuntimeError("not one line that names the file") from error


def _read_slice(path: Path) -> None:
    """Compressed pixels are not decoded: the decoder has a process of its own."""
    file = elements.read_elements(path)
    if file.syntax in elements.COMPRESSED:
        elements.fragments(file, 100_000)
    else:
        pixels.hounsfield(file, lambda _: None)


def sound_files(folder: Path) -> None:
    """What the fuzzer begins with."""
    scan = Volume(np.arange(60, dtype=np.int16).reshape(3, 4, 5), (5.0, 0.5, 0.5))
    for number, suffix in enumerate(SUFFIXES):
        path = folder / f"sound{suffix}"
        if suffix == ".dcm":
            save(make_slice(np.arange(20).reshape(4, 5), (1.0, 2.0, 3.0)), path)
        else:
            write(scan, path)
        path.write_bytes(bytes([number]) + path.read_bytes())


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        FOLDER = Path(name)
        (FOLDER / "corpus").mkdir()
        sound_files(FOLDER / "corpus")
        atheris.Setup([*sys.argv, str(FOLDER / "corpus")], read)
        atheris.Fuzz()
