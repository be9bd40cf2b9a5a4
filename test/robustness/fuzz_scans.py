"""Scans that are sound files and yet not what they seem, with what is true of them.

Beside each lies ``truth.npz``; ``is_wrong`` says whether what was read differs from it in silence.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
from helpers.dicom_files import make_slice, save
from pydicom.uid import DeflatedExplicitVRLittleEndian, generate_uid

from ichseg.scan.reader import Scan
from ichseg.scan.volume import Volume, write

SPACING_MM = (6.0, 2.2, 2.2)
TRUTH = "truth.npz"


def head(rng: random.Random) -> npt.NDArray[np.float64]:
    """A head of 24 x 80 x 80 voxels in HU: brain within bone, fat around it, air with noise."""
    noise = np.random.default_rng(rng.randrange(2**32))
    z, y, x = np.moveaxis(np.indices((24, 80, 80)), 0, -1).reshape(-1, 3).T - [[12], [40], [40]]
    r = np.sqrt((z / 13) ** 2 + (y / 38) ** 2 + (x / 32) ** 2)
    hu = np.select([r < 0.82, r < 0.92, r < 1], [noise.normal(33, 6, r.size), 900, -90], -1000)
    hu += noise.normal(0, rng.choice((2, 6, 15)), r.size)
    return hu.reshape(24, 80, 80)


def tricked(home: Path, rng: random.Random) -> Path:
    """A head whose values may be shifted, scaled, normalised, clipped or padded."""
    hu = np.clip(np.rint(head(rng)), -1024, 3071)
    pad = rng.choice((None, -2000, -3024, -1024, 0))
    seen = hu.copy()
    factor, offset = rng.choice(((1, 0), (1, 1024), (1, 1024), (1, 1000), (1, 2048), (10, 0),
        (2, 0), (0.5, 0), (-1, 0), (0.02, 20), (0.0002, 0.2), (0.001, 1), (1 / 15, -2), (1, 300),
        (0.5, 512), (rng.uniform(-3, 3), rng.uniform(-3000, 3000))))  # fmt: skip
    seen = seen * factor + offset
    if pad is not None and rng.random() < 0.6:
        seen[:, :12] = seen[:, -12:] = pad
    if rng.random() < 0.3:
        seen[rng.randrange(24), 40, 40] = rng.choice((-1, 30_000, -32_768))
    if rng.random() < 0.2:
        seen = np.clip(seen, *rng.choice(((-20, 100), (0, 4095), (-1000, 1000), (0, 255))))
    whole = bool((seen == np.rint(seen)).all()) and abs(seen).max() < 32_768
    path = home / "case.mha"
    write(Volume(seen.astype(np.int16 if whole else np.float32), SPACING_MM), path)
    middle = (slice(None), slice(12, -12), slice(None))
    np.savez(home / TRUTH, hu=hu[middle][hu[middle] > 0], at=np.argwhere(hu > 0))
    return path


def framed(home: Path, rng: random.Random) -> Path:
    """A NIfTI file in a unit of its choice, of which one number of a frame may be another."""
    units, factor = rng.choice(((0, 1.0), (2, 1.0), (1, 1e-3), (3, 1e3)))
    steps = np.array(SPACING_MM[::-1]) * factor
    affine = np.diag([*(steps * [rng.choice((-1, 1)) for _ in range(3)]), 1.0])
    affine[:3, 3] = [rng.uniform(-200, 200) * factor for _ in range(3)]
    image = nib.Nifti1Image(np.rint(head(rng)).astype(np.int16).T, affine)
    image.set_sform(affine, rng.choice((0, 1, 2)))
    image.set_qform(affine, rng.choice((0, 1)))
    image.header["xyzt_units"] = units
    path = home / "case.nii"
    image.to_filename(path)
    content = bytearray(path.read_bytes())
    if rng.random() < 0.6:
        where = rng.choice((80, 84, 88, *range(280, 328, 4), 256, 260, 264, 268))
        (value,) = np.frombuffer(content[where : where + 4], "<f4")
        changed = np.float32(
            value * rng.choice((0.5, 0.75, 1.001, 1.02, 3, -1)) + rng.choice((0, 1))
        )
        content[where : where + 4] = changed.tobytes()
        path.write_bytes(content)
    np.savez(home / TRUTH, spacing_mm=SPACING_MM, scode=image.header["sform_code"])
    return path


def mixture(home: Path, rng: random.Random) -> Path:
    """Several patients, studies and series, in one folder or in several, and odd objects."""
    for number in range(rng.randint(1, 4)):
        patient, study = rng.randint(1, 2), rng.choice(("1.1", "1.2", None))
        folder = home / rng.choice(("", "a", "a/b", "c", f"d{number}"))
        series = generate_uid() if rng.random() < 0.8 else "1.5"
        changes = {"Modality": "MR"} if rng.random() < 0.1 else {}
        for z in range(rng.choice((1, 3, 5))):
            made = make_slice(
                np.full((24, 20), 30 + z), (0.0, 0.0, 5.0 * z), PatientID=str(patient),
                StudyInstanceUID=study, SeriesInstanceUID=series, SeriesNumber=str(number),
                ConvolutionKernel=rng.choice(("H30s", "H70h", "", "x")), **changes,
            )  # fmt: skip
            save(made, folder / f"{number}-{z}.dcm")
    for path in list(home.rglob("*.dcm")):
        if rng.random() < 0.1:
            content = path.read_bytes()
            path.write_bytes(content[: rng.randrange(len(content))])
    if rng.random() < 0.5:
        (home / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + rng.randbytes(rng.randrange(60)))
    if rng.random() < 0.3:
        odd = make_slice(np.zeros((4, 4)), (0, 0, 0))
        save(odd, home / "report", DeflatedExplicitVRLittleEndian)
    return home


def is_wrong(path: Path, scan: Scan) -> str:
    """What is wrong about a scan that was read without a warning about it; empty if nothing is."""
    if scan.series is not None:
        for key in ("PatientID", "StudyInstanceUID"):
            if len({file.text(key) for file in scan.series.slices} - {""}) > 1:
                return f"slices of several {key}"
        return ""
    truth = np.load(path.parent / TRUTH)
    if "spacing_mm" in truth:
        same = np.allclose(scan.spacing_mm, truth["spacing_mm"], rtol=0.03)
        return "" if same or not truth["scode"] or scan.warnings else "voxels of another size"
    return _wrong_hu(scan, truth["hu"], truth["at"], scan.warnings)


def _wrong_hu(
    volume: Volume, hu: npt.NDArray[np.float64], at: npt.NDArray[np.intp], warnings: Sequence[str]
) -> str:
    """Tissue that lies 20 HU and more from where it should."""
    at = at[(at[:, 1] >= 12) & (at[:, 1] < volume.voxels.shape[1] - 12)]
    brain = hu < 90
    apart = np.median(abs(volume.voxels[tuple(at.T)][brain] - hu[brain]))
    told = any("is it in HU" in warning for warning in warnings)
    return "" if apart < 20 or told else f"tissue {apart:.0f} HU from the truth"
