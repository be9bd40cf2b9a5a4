"""Overlay pictures: the right pixels, the right way round."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from ichseg.errors import InputError, OutputError
from ichseg.report.framing import Framed, frame
from ichseg.report.pictures import (
    BRAIN,
    COLOURS,
    OUTLINE_RGB,
    PANEL_PX,
    STRIP_PANEL_PX,
    TEXT_RGB,
    TITLE_PX,
    _choose_slices,
    draw_slice,
    fitting_window,
    write_overlay,
    write_strip,
)
from ichseg.scan.volume import Volume


def picture_of(folder: Path, image: Volume, mask: Volume, title: str = "") -> npt.NDArray[np.uint8]:
    path = folder / "overlay.png"
    write_overlay(image, mask, path, title=title)
    return np.asarray(Image.open(path))


def outline_in(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    return (picture == OUTLINE_RGB).all(axis=-1)


def ramp(spacing_mm: tuple[float, float, float] = (5.0, 1.0, 1.0)) -> Volume:
    """An 8 x 8 x 8 head that differs in every direction: darker below, in front, on the right."""
    z, y, x = np.indices((8, 8, 8))
    return Volume((4 * z + 3 * y + 2 * x).astype(np.int16), spacing_mm)


def some_mask(image: Volume) -> Volume:
    voxels = np.zeros(image.voxels.shape, dtype=np.uint8)
    voxels[6, 1:3, 4:7] = 1
    voxels[2, 5, 5] = 1
    return image.with_voxels(voxels)


def test_outline_surrounds_the_mask_and_nothing_else(tmp_path: Path) -> None:
    image = Volume(np.full((1, 8, 8), 30, dtype=np.int16), (5.0, 1.0, 1.0))
    voxels = np.zeros((1, 8, 8), dtype=np.uint8)
    voxels[0, 2:4, 4:6] = 1

    found = outline_in(picture_of(tmp_path, image, image.with_voxels(voxels)))

    assert PANEL_PX == 256  # so each of the 8 voxels is 32 pixels wide
    expected = np.zeros((TITLE_PX + 256, 256), dtype=bool)
    expected[TITLE_PX + 64 - 2 : TITLE_PX + 128 + 2, 128 - 2 : 192 + 2] = True
    expected[TITLE_PX + 64 : TITLE_PX + 128, 128:192] = False
    np.testing.assert_array_equal(found, expected)


def test_window_runs_from_0_to_80_hu(tmp_path: Path) -> None:
    voxels = np.zeros((1, 8, 8), dtype=np.int16)
    voxels[0, :, :] = [-20, -20, 20, 20, 40, 40, 100, 100]
    image = Volume(voxels, (5.0, 1.0, 1.0))
    picture = picture_of(tmp_path, image, image.with_voxels(voxels * 0))
    centres = picture[TITLE_PX + 200, 32::64]  # between two equal voxels, clear of the text
    np.testing.assert_array_equal(centres, np.repeat([[0], [64], [128], [255]], 3, axis=1))


def test_pixels_are_square_millimetres(tmp_path: Path) -> None:
    image = Volume(np.full((1, 20, 40), 30, dtype=np.int16), (5.0, 2.0, 0.5))  # 40 mm by 20 mm
    picture = picture_of(tmp_path, image, image.with_voxels(image.voxels * 0))
    assert picture.shape == (TITLE_PX + 256, 128, 3)


@pytest.mark.parametrize("flips", [(1,), (2,), (0, 2), (0, 1, 2)])
def test_flipped_volume_gives_the_same_picture(tmp_path: Path, flips: tuple[int, ...]) -> None:
    image = ramp()
    mask = some_mask(image)
    signs = [-1.0 if axis in flips else 1.0 for axis in range(3)]
    direction = tuple(float(v) for v in np.diag(signs).ravel())
    flipped = Volume(np.flip(image.voxels, flips), image.spacing_mm, direction=direction)
    flipped_mask = flipped.with_voxels(np.flip(mask.voxels, flips))

    np.testing.assert_array_equal(
        picture_of(tmp_path, flipped, flipped_mask), picture_of(tmp_path, image, mask)
    )


def test_sagittal_and_tilted_storage_gives_the_same_picture(tmp_path: Path) -> None:
    image = ramp()
    mask = some_mask(image)
    axes = (2, 0, 1)  # slices run to the left, rows up, columns back
    cosine, sine = np.cos(0.3), np.sin(0.3)
    tilt = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    stored = Volume(
        image.voxels.transpose(axes),
        (1.0, 5.0, 1.0),
        direction=tuple(float(v) for v in tilt[:, axes].ravel()),
    )
    stored_mask = stored.with_voxels(mask.voxels.transpose(axes))

    np.testing.assert_array_equal(
        picture_of(tmp_path, stored, stored_mask), picture_of(tmp_path, image, mask)
    )


def test_front_is_up_and_patients_right_is_left(tmp_path: Path) -> None:
    image = ramp()  # intensity grows to the back and to the left
    picture = picture_of(tmp_path, image, image.with_voxels(image.voxels * 0))
    panel = picture[TITLE_PX : TITLE_PX + 256, :256, 0].astype(int)
    assert panel[250, 128] > panel[5, 128] + 30
    assert panel[128, 250] > panel[128, 5] + 30
    assert (panel[24:39, 4:13] == TEXT_RGB[0]).any()  # R


def test_negative_has_no_outline(tmp_path: Path) -> None:
    image = ramp()
    picture = picture_of(
        tmp_path, image, image.with_voxels(np.zeros((8, 8, 8), np.uint8)), "negative 0.0 mL"
    )
    assert not outline_in(picture).any()
    assert picture[:TITLE_PX].any()


def test_a_single_voxel_of_a_large_slice_is_outlined(tmp_path: Path) -> None:
    image = Volume(np.full((1, 512, 512), 30, dtype=np.int16), (5.0, 0.45, 0.45))
    for column in (300, 301, 302):
        voxels = np.zeros((1, 512, 512), dtype=np.uint8)
        voxels[0, 301, column] = 1
        assert outline_in(picture_of(tmp_path, image, image.with_voxels(voxels))).sum() == 5 * 5 - 1


def test_air_around_the_head_is_cut_off(tmp_path: Path) -> None:
    voxels = np.full((4, 200, 200), -1000, dtype=np.int16)
    voxels[:, 60:160, 80:160] = 30
    voxels[:, 190:192, 40:160] = 200  # headrest
    voxels[:, 160:190, 119:121] = 30  # a fold of the sheet between
    image = Volume(voxels, (5.0, 1.0, 1.0))
    picture = picture_of(tmp_path, image, image.with_voxels(np.zeros(voxels.shape, np.uint8)))
    height, width = picture.shape[0] - TITLE_PX, picture.shape[1] / 4
    assert height == PANEL_PX
    assert width / height == pytest.approx((80 + 12) / (100 + 12), abs=0.03)


def test_mask_beside_the_head_is_shown(tmp_path: Path) -> None:
    voxels = np.full((1, 100, 100), -1000, dtype=np.int16)
    voxels[:, 10:60, 10:60] = 30
    image = Volume(voxels, (5.0, 1.0, 1.0))
    mask = np.zeros(voxels.shape, np.uint8)
    mask[0, 90, 90] = 1
    assert outline_in(picture_of(tmp_path, image, image.with_voxels(mask))).any()


def test_slices_with_the_mask_come_first() -> None:
    chosen = _choose_slices(np.array([7, 50, 51, 90]), 100)
    assert len(chosen) == len(set(chosen)) == 20
    assert {7, 50, 51, 90, 0, 99} <= set(chosen)
    assert chosen == sorted(chosen)
    assert sum(i < 45 for i in _choose_slices(np.arange(45), 100)) == 15
    assert len(_choose_slices(np.arange(100), 100)) == 20
    assert _choose_slices(np.array([], dtype=int), 3) == [0, 1, 2]


def test_other_shape_is_refused(tmp_path: Path) -> None:
    image = ramp()
    with pytest.raises(InputError, match=r"shape \(8, 8, 8\), its mask \(8, 8, 7\)"):
        write_overlay(image, Volume(image.voxels[..., :7], (1, 1, 1)), tmp_path / "overlay.png")


def test_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    image = ramp()
    with pytest.raises(OutputError, match=r"overlay\.png: cannot write"):
        write_overlay(image, some_mask(image), tmp_path / "file" / "overlay.png")


def test_failure_to_encode_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("encoder error -2")

    monkeypatch.setattr(Image.Image, "save", fail)
    image = ramp()
    with pytest.raises(OutputError, match=r"overlay\.png: cannot write \(encoder error -2\)"):
        write_overlay(image, some_mask(image), tmp_path / "overlay.png")
    assert list(tmp_path.iterdir()) == []


def test_title_of_any_letters_is_drawn(tmp_path: Path) -> None:
    image = ramp()
    empty = image.with_voxels(np.zeros((8, 8, 8), np.uint8))
    titles = ("", "scan", "skän", "頭")
    drawn = [picture_of(tmp_path, image, empty, title)[:TITLE_PX] for title in titles]
    assert not drawn[0].any()
    for shown in drawn[1:]:
        assert (shown == TEXT_RGB).all(axis=-1).any()


def framed_of(masks: dict[str, npt.NDArray[np.uint8]]) -> Framed:
    """A flat scan of 30 HU around masks ``(z, y, x)``."""
    shape = next(iter(masks.values())).shape
    image = Volume(np.full(shape, 30, np.int16), (5.0, 1.0, 1.0))
    return frame(image, {name: image.with_voxels(mask) for name, mask in masks.items()})


def colour(picture: npt.NDArray[np.uint8], name: str, label: int = 1) -> npt.NDArray[np.bool_]:
    return (picture == COLOURS[name][label - 1]).all(axis=-1)


def test_where_both_outlines_coincide_both_show() -> None:
    mask = np.zeros((1, 40, 40), np.uint8)
    mask[0, 12:28, 12:28] = 1
    panel = draw_slice(framed_of({"reference": mask, "prediction": mask}), 0, BRAIN, 400)
    alone = colour(draw_slice(framed_of({"prediction": mask}), 0, BRAIN, 400), "prediction")
    found, reference = colour(panel, "prediction"), colour(panel, "reference")
    np.testing.assert_array_equal(found | reference, alone)  # one line, in two colours
    assert reference.sum() == pytest.approx(2 / 3 * alone.sum(), rel=0.15)
    for side in (alone[:200], alone[200:]):  # dashes go all the way around
        assert side.any()
    for rows in (slice(0, 200), slice(200, 400)):
        for columns in (slice(0, 200), slice(200, 400)):
            assert reference[rows, columns].any()
            assert found[rows, columns].any()


def test_a_single_voxel_of_the_reference_keeps_most_of_its_outline() -> None:
    mask = np.zeros((1, 400, 400), np.uint8)
    mask[0, 200, 200] = 1
    panel = draw_slice(framed_of({"reference": mask}), 0, BRAIN, 400)
    assert 12 <= colour(panel, "reference").sum() <= 5 * 5 - 1


def test_labels_that_touch_are_outlined_each_in_its_colour() -> None:
    mask = np.zeros((1, 40, 40), np.uint8)
    mask[0, 10:20, 10:20], mask[0, 20:30, 10:20] = 1, 2
    panel = draw_slice(framed_of({"prediction": mask}), 0, BRAIN, 400)
    assert colour(panel, "prediction", 1)[100:198, 98].all()
    assert colour(panel, "prediction", 2)[205:300, 98].all()


def test_strip_has_the_slices_one_below_another(tmp_path: Path) -> None:
    mask = np.zeros((12, 40, 20), np.uint8)
    mask[[3, 9], 15:25, 5:15] = 1
    framed = framed_of({"prediction": mask})
    slices, (width, height) = write_strip(framed, tmp_path / "strip.jpg", window=BRAIN)
    picture = np.asarray(Image.open(tmp_path / "strip.jpg")).astype(int)
    assert (height, width) == (STRIP_PANEL_PX, STRIP_PANEL_PX // 2)
    assert picture.shape == (8 * height, width, 3)
    assert len(slices) == 8
    assert {3, 9, 0, 11} <= set(slices)
    orange = picture[..., 0] - picture[..., 2] > 80
    coloured = [s for i, s in enumerate(slices) if orange[i * height : (i + 1) * height].any()]
    assert coloured == [3, 9]


def test_fitting_window_leaves_out_what_is_far_off() -> None:
    voxels = np.tile(np.arange(1000, dtype=np.float32), 10).reshape(10, 100, 10)
    voxels[0, 0, 0] = 1e6
    framed = frame(Volume(voxels, (1.0, 1.0, 1.0)), {}, is_ct=False)
    assert fitting_window(framed) == pytest.approx((990, 500), abs=6)


def test_what_is_no_ct_is_shown_whole_in_a_window_that_fits(tmp_path: Path) -> None:
    """Intensities of thousands: at brain window all would be white, or cut off as no head."""
    steps = np.linspace(1000, 9000, 16).astype(np.int16)
    image = Volume(np.broadcast_to(steps, (3, 16, 16)).copy(), (5.0, 1.0, 1.0))
    mask = image.with_voxels(np.zeros((3, 16, 16), np.uint8))
    write_overlay(image, mask, tmp_path / "mr.png", is_ct=False)
    picture = np.asarray(Image.open(tmp_path / "mr.png"))
    assert len(np.unique(picture[..., 0])) > 12


def test_overlay_shows_the_reference_beside_what_was_found(tmp_path: Path) -> None:
    image = Volume(np.full((1, 40, 40), 30, np.int16), (5.0, 1.0, 1.0))
    found, reference = np.zeros((2, 1, 40, 40), np.uint8)
    found[0, 5:15, 5:15], reference[0, 25:35, 25:35] = 1, 2
    masks = image.with_voxels(found), image.with_voxels(reference)
    write_overlay(image, masks[0], tmp_path / "both.png", reference=masks[1])
    picture = np.asarray(Image.open(tmp_path / "both.png"))[TITLE_PX:]
    rows, _ = np.nonzero(colour(picture, "prediction"))
    assert 0 < rows.max() < 128
    rows, _ = np.nonzero(colour(picture, "reference", 2))
    assert rows.min() > 128
