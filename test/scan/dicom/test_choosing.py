"""Which series is taken where there are several, and what is left out beside it."""

import re

import numpy as np
import pytest
from helpers.dicom_files import SERIES, make_slice, save, write_stack
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit

from ichseg.errors import InputError
from ichseg.scan.dicom.series import find_series
from ichseg.scan.dicom.sorting import ENHANCED_CT
from ichseg.scan.reader import read_scan

WHOLE = tuple(np.arange(0, 150, 5.0))
THIN = tuple(np.arange(0, 150, 1.5))
TILTED = (1.0, 0.0, 0.0, 0.0, 0.951057, -0.309017)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)


def brain(at):
    return np.where(np.hypot(at[..., 0] - 7, at[..., 1] - 6) < 5, 35.0, 900.0)


def series(folder, number, heights=WHOLE, noise=0.0, values=brain, orientation=None, **changes):
    rng = np.random.default_rng(number)
    places = [(0.0, 0.0, z) if orientation is None else (0.0, z, 0.0) for z in heights]
    write_stack(
        folder / str(100 - number), places,
        lambda at: values(at) + rng.normal(0, noise, at.shape[:2]),
        SeriesInstanceUID=f"{SERIES}.{number}", SeriesNumber=str(number),
        **({"orientation": orientation} if orientation else {}), **changes,
    )  # fmt: skip


def taken(folder):
    return int(find_series(folder).slices[0].text("SeriesNumber"))


@pytest.mark.parametrize(
    ("better", "worse", "why"),
    [
        ({"heights": WHOLE[:20]}, {"ContrastBolusAgent": "Iomeron"}, "with contrast agent"),
        ({}, {"heights": THIN, "SeriesDescription": "CTA head"}, "with contrast agent"),
        ({"ContrastBolusAgent": "NONE"}, {"heights": THIN, "SeriesDescription": "Perfusion"}, "ag"),
        ({"SeriesDescription": "W/O CONTRAST"}, {"SeriesDescription": "+C"}, "with contrast"),
        ({"ConvolutionKernel": "H30s"}, {"heights": THIN, "ConvolutionKernel": "H70h"}, "sharp"),
        ({"ConvolutionKernel": "Hr36"}, {"heights": THIN, "ConvolutionKernel": "Hr64"}, "sharp"),
        ({"ConvolutionKernel": "STANDARD"}, {"heights": THIN, "ConvolutionKernel": "BONE"}, "sha"),
        ({"ConvolutionKernel": "FC26"}, {"heights": THIN, "ConvolutionKernel": "FC35"}, "sharp"),
        ({"ConvolutionKernel": "UB"}, {"heights": THIN, "ConvolutionKernel": "YB"}, "sharp"),
        ({"noise": 8.0}, {"noise": 60.0, "heights": THIN, "ConvolutionKernel": "odd"}, "sharp"),
        ({"heights": WHOLE[:28]}, {"heights": WHOLE, "orientation": CORONAL}, "not axial"),
        ({}, {"heights": THIN, "ImageType": ["DERIVED", "PRIMARY"]}, "computed from others"),
        ({"BodyPartExamined": "HEAD"}, {"heights": THIN, "BodyPartExamined": "CHEST"}, "no head"),
        (
            {"BodyPartExamined": "IAC EAR"},
            {"heights": THIN, "BodyPartExamined": "HEART"},
            "no head",
        ),
        ({"BodyPartExamined": "INNEREAR"}, {"BodyPartExamined": "FOREARM"}, "no head"),
        ({"heights": THIN, "BodyPartExamined": "KOPF"}, {"BodyPartExamined": "HALS"}, "no head"),
        ({"heights": THIN, "BodyPartExamined": "CRANEO"}, {"BodyPartExamined": "TORAX"}, "no head"),
        ({}, {"heights": WHOLE[:15]}, "covering less"),
        ({"heights": WHOLE[:28]}, {"heights": THIN}, "less like 5 mm"),
        ({"heights": WHOLE}, {"heights": tuple(np.arange(0, 300, 3.0))}, "less like 5 mm"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_the_series_that_the_networks_know_is_taken(tmp_path, better, worse, why, first):
    """In either order of numbers and of file names."""
    series(tmp_path, 2 if first else 3, **better)
    series(tmp_path, 3 if first else 2, **worse)
    found = find_series(tmp_path)
    assert found.slices[0].text("SeriesNumber") == ("2" if first else "3")
    assert why in found.words
    assert any(w.startswith("left out: 1 other series") and why in w for w in found.warnings)


def test_series_that_are_alike_are_told_apart_by_number(tmp_path):
    for number in (12, 9, 30):
        series(tmp_path, number)
    assert taken(tmp_path) == 9


def test_a_head_is_known_by_its_cross_section(tmp_path):
    """A disc of 160 mm with bone around it, against one of 300 mm."""

    def disc(radius):
        def values(at):
            r = np.hypot(at[..., 0] - 160, at[..., 1] - 160)
            return np.where(r < radius - 8, 35.0, np.where(r < radius, 900.0, -1000.0))

        return values

    for number, radius, heights in ((5, 80, WHOLE), (4, 155, THIN)):
        series(tmp_path, number, heights[:20], values=disc(radius), shape=(640, 430))
    assert taken(tmp_path) == 5
    assert "no head" in find_series(tmp_path).words


def test_a_perfusion_series_costs_nothing(tmp_path):
    """Its slices lie at the same places again and again."""
    series(tmp_path, 2)
    for turn in range(3):
        for z in range(0, 100, 5):
            made = make_slice(np.full((24, 20), turn), (0, 0, z), SeriesInstanceUID=SERIES + ".8")
            save(made, tmp_path / "perfusion" / f"{turn}-{z}.dcm")
    found = find_series(tmp_path)
    assert len(found.slices) == len(WHOLE)
    assert any("60 slices that are no volume" in w for w in found.warnings)


def test_a_short_rest_does_not_stand_for_a_series_that_is_no_volume(tmp_path):
    series(tmp_path, 2, (0.0, 5.0, 10.0, 40.0, 45.0))
    series(tmp_path, 3, (0.0, 5.0))
    with pytest.raises(InputError, match="30 mm between"):
        find_series(tmp_path)


def zeros(**changes):
    return make_slice(np.zeros((24, 20)), (0, 0, 99), **changes)


def odd_objects(folder):
    """What lies beside slices on the media of hospitals."""
    save(zeros(), folder / "deflated.dcm", DeflatedExplicitVRLittleEndian)
    capture = zeros(SOPClassUID="1.2.840.10008.5.1.4.1.1.7", Modality="OT")
    capture.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    capture.PixelData = b"\xfe\xff\x00\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0"
    capture["PixelData"].is_undefined_length = True
    capture.save_as(folder / "capture.dcm", enforce_file_format=True)
    save(zeros(SOPClassUID=ENHANCED_CT), folder / "enhanced.dcm")
    save(zeros(ImagePositionPatient=None), folder / "protocol.dcm")
    plan = save(zeros(SOPClassUID="1.2.840.10008.5.1.4.1.1.481.5", Modality="RTPLAN"), folder / "p")
    plan.write_bytes(plan.read_bytes()[:500])
    (folder / "structures.dcm").write_bytes(plan.read_bytes()[132:])
    (folder / "DICOMDIR").write_bytes(plan.read_bytes()[:140])


def test_odd_objects_are_left_out_one_by_one_and_together(tmp_path):
    odd_objects(tmp_path)
    odd = sorted(tmp_path.iterdir())
    for path in odd:
        folder = tmp_path / f"with-{path.name}"
        series(folder, 2)
        (folder / path.name).write_bytes(path.read_bytes())
        scan = read_scan(folder)
        assert len(scan.voxels) == len(WHOLE)
        (warning,) = scan.warnings
        assert re.match(rf"left out: 1 (file|entry).*{path.name} \(.+\)", warning)
    series(tmp_path / "all", 2)
    odd_objects(tmp_path / "all")
    (warning,) = read_scan(tmp_path / "all").warnings
    assert "left out: 7 entries that cannot be read as a slice" in warning
    assert warning.endswith("and 4 more")


def test_rounding_does_not_split_a_series(tmp_path):
    """A tilted orientation, written with two to six decimals."""
    exact = np.array([1.0, 0.0, 0.0, 0.0, 0.9455, -0.3256])
    for number in range(12):
        turned = [float(v) for v in np.round(exact, 3 + number % 4)]
        made = make_slice(
            np.full((24, 20), number), (0, 0, 5.0 * number), ImageOrientationPatient=turned,
            PixelSpacing=[0.48828, 0.48828 + 1e-6 * (number % 2)],
        )  # fmt: skip
        save(made, tmp_path / f"{number}.dcm")
    found = find_series(tmp_path)
    assert len(found.slices) == 12
    assert not any("left out" in w for w in found.warnings)


@pytest.mark.parametrize(
    ("above", "changes", "said"),
    [
        (WHOLE[14:], {}, True),
        (WHOLE[13:], {}, True),  # a slice is in both
        (np.arange(70, 150, 8.0), {"orientation": TILTED}, True),
        (WHOLE[14:], {"BodyPartExamined": "CHEST"}, False),
        (WHOLE[14:], {"FrameOfReferenceUID": "1.2.5"}, False),  # nobody knows where that is
        (WHOLE, {}, False),
        (WHOLE[20:], {}, False),
    ],
)
def test_a_head_in_two_series_is_said_to_go_on(tmp_path, above, changes, said):
    series(tmp_path, 2, heights=WHOLE[:14], BodyPartExamined="HEAD")
    series(tmp_path, 3, heights=above, **({"BodyPartExamined": "HEAD"} | changes))
    warnings = " ".join(find_series(tmp_path).warnings)
    assert ("goes on where it ends, and is in no mask" in warnings) == said
