"""The page of two scans in a real browser: both side by side, moving together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from helpers.browser import Browser
from helpers.viewer import settled
from scipy import ndimage

from ichseg.app.follow_up import page
from ichseg.app.follow_up.growth import Change, LesionChange
from ichseg.report import case_files
from ichseg.scan.register import Alignment
from ichseg.scan.volume import Volume

pytestmark = pytest.mark.browser

ORANGE = (230, 159, 0)
SHAPE, SPACING_MM = (9, 100, 100), (5.0, 2.0, 2.0)


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bleed of 10 x 10 voxels that becomes 30 x 30, on the patient's left."""
    out = tmp_path_factory.mktemp("follow_up")
    voxels = np.full(SHAPE, -1000, np.int16)
    voxels[:, 10:90, 10:90] = 35
    image = Volume(voxels, SPACING_MM)
    small, large = (np.zeros(SHAPE, np.uint8) for _ in range(2))
    small[3:6, 50:60, 60:70] = 1
    large[3:6, 40:70, 50:80] = 1
    studies = [(image, image.with_voxels(mask)) for mask in (small, large)]
    for name, (scan, mask), other in zip(("before", "after"), studies, studies[::-1], strict=True):
        case_files.write_case(out, name, scan, {"prediction": mask}, beside=other)
    change = Change(6.0, 54.0)
    place = (129.0, 109.0, 25.0)  # x, y, z: slice 6
    lesion = LesionChange((1,), (1,), change, place, in_both=True)
    alignment = Alignment(sitk.Euler3DTransform(), 3.0, 4.0, 0.95)
    found = page.FollowUp(("a.mha", "b.mha"), change, (lesion,), alignment, ())
    return page.write(out, found)


@pytest.fixture(scope="module")
def browser():
    with Browser.start() as started:
        yield started


def text(browser: Browser, selector: str) -> str:
    return browser.evaluate(f"document.querySelector({selector!r}).textContent")


def panes(browser: Browser) -> list[np.ndarray]:
    """Pixels ``(row, column, 3)`` of the left and the right scan, once they stay as they are."""
    now = settled(browser)
    middle = now.shape[1] // 2
    return [now[:, : middle - 2], now[:, middle + 2 :]]


def is_orange(pixels: np.ndarray) -> np.ndarray:
    return (abs(pixels.astype(int) - ORANGE) < 30).all(axis=-1)


def orange(pixels: np.ndarray) -> int:
    return int(is_orange(pixels).sum())


@pytest.fixture(scope="module")
def opened(followed: Path, browser: Browser) -> Browser:
    """Both scans in the viewer."""
    open_pair(browser, followed)
    return browser


@pytest.fixture
def viewer(opened: Browser) -> Browser:
    """Both scans in the viewer, as at first."""
    opened.press("0")
    return opened


def open_pair(browser: Browser, followed: Path, **window: int) -> None:
    browser.open(followed, **window)
    browser.evaluate("document.querySelector('.card[data-slug=after] .card-head .open').click()")
    browser.wait_for("document.querySelector('#viewer').dataset.shown === 'after'")


def test_both_scans_are_seen_side_by_side(viewer):
    left, right = panes(viewer)
    assert 2 < orange(right) / orange(left) < 4  # outlines of 30 and of 10 voxels a side
    names = "Array.from(document.querySelectorAll('.pane-name'), name => name.textContent)"
    assert viewer.evaluate(names) == ["before", "after"]
    assert text(viewer, "#viewer-name") == "before, after"
    assert text(viewer, "#viewer-facts") == (
        "Scan a.mha · Volume 6.00 mL → Scan b.mha · Volume 54.00 mL"
    )
    assert viewer.errors == []


def test_both_move_together(viewer):
    assert text(viewer, "#slice-number") == "Slice 4 of 9"
    for _ in range(3):
        viewer.press("ArrowUp")
    assert text(viewer, "#slice-number") == "Slice 7 of 9"
    assert [orange(pixels) for pixels in panes(viewer)] == [0, 0]
    viewer.press("3")  # bone: both are darker
    for pixels in panes(viewer):
        assert np.median(pixels[pixels.shape[0] // 2]) < 100
    viewer.press("0")
    unzoomed = [orange(pixels) for pixels in panes(viewer)]
    viewer.press("+")
    viewer.press("+")
    for now, before in zip(panes(viewer), unzoomed, strict=True):
        assert orange(now) > 1.2 * before


def test_a_lesion_is_gone_to_in_both(viewer):
    viewer.press("Escape")
    viewer.evaluate("document.querySelector('#lesions [data-mm]').click()")
    viewer.wait_for("document.querySelector('#viewer').dataset.shown === 'before'")
    assert text(viewer, "#slice-number") == "Slice 6 of 9"
    assert all(orange(pixels) > 30 for pixels in panes(viewer))
    assert "6.00 → 54.00 mL" in text(viewer, "#lesion")


@pytest.mark.parametrize("size", [(1026, 777), (963, 777)])
def test_outlines_lie_on_what_they_outline_in_every_plane(followed, browser, size):
    """In windows whose planes have corners that rounding puts beside them."""
    open_pair(browser, followed, width=size[0], height=size[1])
    browser.press("m")
    outlined = [is_orange(pixels) for pixels in panes(browser)]
    browser.press("o")
    browser.evaluate(
        "(range => { range.value = 1; range.dispatchEvent(new Event('input')); })"
        "(document.querySelector('#opacity'))"
    )
    for line, filled in zip(outlined, map(is_orange, panes(browser)), strict=True):
        assert ndimage.label(ndimage.binary_dilation(line, iterations=4))[1] == 3
        away_px = ndimage.distance_transform_edt(~filled)  # between slices fillings fade
        assert away_px[line].max() < 12


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (390, True)])
def test_page_loads_without_an_error(followed, browser, width, dark):
    browser.open(followed, width=width, dark=dark)
    assert browser.errors == []
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert "+48.0 mL" in text(browser, "#summary")
    assert "800 % are more than 33 %" in text(browser, "#summary")


def test_one_below_the_other_on_a_phone(followed, browser):
    open_pair(browser, followed, width=390, height=844)
    boxes = browser.evaluate(
        "Array.from(document.querySelectorAll('.pane'), p => p.getBoundingClientRect())"
        ".map(r => [r.top, r.bottom, r.width])"
    )
    assert boxes[0][1] <= boxes[1][0]
    assert boxes[0][2] == boxes[1][2] == 390
