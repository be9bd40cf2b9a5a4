"""Each control of the viewer in a real browser: by mouse, by typing, by keys and by touch."""

from __future__ import annotations

import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
from helpers.browser import Browser
from helpers.viewer import BLUE, ORANGE, near, open_case, scan, settled
from PIL import Image

from ichseg.report import case_files, inference_page
from ichseg.scan.volume import Volume

pytestmark = pytest.mark.browser

# (x, y, z) in mm: the middles of voxels; the second is on the patient's right, in the back, low.
PLACES_MM = ((139.0, 99.0, 20.0), (31.0, 161.0, 5.0))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of one scan with two pieces, each voxel beyond x = 50 with its own HU."""
    out = tmp_path_factory.mktemp("viewer")
    image, reference, prediction = scan()
    image.voxels[4, 50:60, 60:80] = 71
    case_files.write_case(out, "one", image, {"reference": reference, "prediction": prediction})
    lesions = [
        {
            "label": 1,
            "volume_ml": 20.0,
            "centroid_mm": place,
            "box_mm": [[0.0, 0.0, 0.0], [10.0, 10.0, 10.0]],
            "mean_hu": 60.0,
            "mean_probability": 0.9,
        }
        for place in PLACES_MM
    ]
    facts = {
        "volume_ml": 24.0,
        "lesions": lesions,
        "case_score": 0.87,
        "ran": {"preset": "balanced"},
    }
    entries = [inference_page.Entry("one", "", facts)]
    return inference_page.write(out, entries, title="Inference", subtitle="s")


@pytest.fixture(scope="module")
def browser():
    with Browser.start() as started:
        yield started


@pytest.fixture(scope="module")
def opened(browser: Browser, page: Path) -> Browser:
    """The viewer of the scan."""
    browser.open(page)
    open_case(browser, "one")
    return browser


@pytest.fixture
def viewer(opened: Browser) -> Browser:
    """The viewer as it was at first."""
    opened.evaluate("document.activeElement.blur()")
    click(opened, "#reset")
    leave(opened)
    return opened


def text(browser: Browser, selector: str) -> str:
    return browser.evaluate(f"document.querySelector({selector!r}).textContent")


def is_pressed(browser: Browser, selector: str) -> bool:
    return browser.evaluate(
        f"document.querySelector({selector!r}).getAttribute('aria-pressed') === 'true'"
    )


def click(browser: Browser, selector: str) -> None:
    browser.evaluate(f"document.querySelector({selector!r}).click()")


def stage(browser: Browser) -> tuple[float, float, float, float]:
    """Left, top, width and height of the scan on the screen."""
    return browser.evaluate(
        "(r => [r.x, r.y, r.width, r.height])"
        "(document.querySelector('.stage').getBoundingClientRect())"
    )


def mouse(browser: Browser, kind: str, x: float, y: float, **more: object) -> None:
    browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)


def leave(browser: Browser) -> None:
    """The pointer goes beside the scan."""
    mouse(browser, "mouseMoved", 5, 5)


def drag(browser: Browser, start: tuple[float, float], end: tuple[float, float]) -> None:
    """From one point to another with the left button."""
    mouse(browser, "mousePressed", *start, button="left", clickCount=1)
    for share in (0.5, 1.0):
        at = [a + share * (b - a) for a, b in zip(start, end, strict=True)]
        mouse(browser, "mouseMoved", *at, button="left", buttons=1)
    mouse(browser, "mouseReleased", *end, button="left", clickCount=1)


def on_screen(browser: Browser, x: float, y: float) -> tuple[float, float]:
    """Where the voxel ``(x, y)`` of the axial slice is seen.

    The head, voxels 10 to 89 along both axes, and 10 mm around it fill the stage's height.
    """
    left, top, width, height = stage(browser)
    size = min(width, height) / 90
    middle_x, middle_y = left + width / 2, top + height / 2
    return middle_x + (x + 0.5 - 50) * size, middle_y + (y + 0.5 - 50) * size


def window(browser: Browser) -> tuple[float, float]:
    fields = "['#width', '#level'].map(s => document.querySelector(s).valueAsNumber)"
    return tuple(browser.evaluate(fields))


def type_into(browser: Browser, selector: str, value: str) -> None:
    browser.evaluate(
        f"(f => {{ f.value = {value!r}; f.dispatchEvent(new Event('input', {{bubbles: true}}));"
        f"f.dispatchEvent(new Event('change', {{bubbles: true}})); }})"
        f"(document.querySelector({selector!r}))"
    )


def test_facts_stand_beside_the_name(viewer):
    facts = text(viewer, "#viewer-facts")
    for fact in ("Volume 24.00 mL", "Case score 0.87", "Preset balanced"):
        assert fact in facts


def test_a_click_on_a_lesion_of_the_card_opens_its_slice(viewer):
    viewer.press("Escape")
    viewer.wait_for("!document.querySelector('#viewer').open")
    click(viewer, ".card tbody tr:nth-child(2) [data-mm]")
    viewer.wait_for("document.querySelector('#viewer').dataset.shown === 'one'")
    assert text(viewer, "#slice-number") == "Slice 2 of 9"  # z of 5 mm


def test_lesions_are_gone_to_from_the_list_and_by_keys(viewer):
    assert viewer.evaluate("document.querySelector('#lesion').options.length") == 3
    type_into(viewer, "#lesion", "31.0 161.0 5.0")
    assert text(viewer, "#slice-number") == "Slice 2 of 9"
    viewer.press("n")  # the first comes after the last
    assert text(viewer, "#slice-number") == "Slice 5 of 9"
    viewer.press("b")
    assert text(viewer, "#slice-number") == "Slice 2 of 9"


def test_the_pointer_shows_hu_place_and_mask(viewer):
    viewer.press("ArrowUp")
    assert text(viewer, "#slice-number") == "Slice 5 of 9"
    for (x, y), said in (
        ((70, 55), "71 HU · 140.0, 110.0, 20.0 mm LPS · found"),
        ((30, 50), "35 HU · 60.0, 100.0, 20.0 mm LPS · reference"),
        ((77, 20), "1000 HU · 154.0, 40.0, 20.0 mm LPS"),
    ):
        mouse(viewer, "mouseMoved", *on_screen(viewer, x, y))
        shown = text(viewer, "#under")
        assert shown.split(" · ")[0] == said.split(" · ")[0]
        assert shown.split(" · ")[2:] == said.split(" · ")[2:]
        mm, wanted = (
            [float(v) for v in s.split(" · ")[1].removesuffix(" mm LPS").split(", ")]
            for s in (shown, said)
        )
        np.testing.assert_allclose(mm, wanted, atol=1.0)  # half a voxel
    left, top, _, _ = stage(viewer)
    mouse(viewer, "mouseMoved", left + 2, top + 40)  # beside the scan
    assert text(viewer, "#under") == ""
    mouse(viewer, "mouseMoved", *on_screen(viewer, 30, 50))
    leave(viewer)
    assert text(viewer, "#under") == ""


def test_window_is_typed(viewer):
    assert window(viewer) == (80, 40)
    assert is_pressed(viewer, 'button[data-window="80 40"]')
    before = settled(viewer)
    type_into(viewer, "#width", "40")
    type_into(viewer, "#level", "60")
    assert window(viewer) == (40, 60)
    assert not is_pressed(viewer, 'button[data-window="80 40"]')
    assert settled(viewer).mean() < before.mean()  # 35 HU is now below the window
    type_into(viewer, "#width", "-5")
    assert window(viewer) == (40, 60)


def test_keys_are_letters_while_a_number_is_typed(viewer):
    viewer.evaluate("document.querySelector('#level').focus()")
    viewer.press("3")  # else the bone window
    assert not is_pressed(viewer, 'button[data-window="2500 480"]')


def test_window_by_dragging(viewer):
    viewer.press("w")
    assert is_pressed(viewer, "[data-tool=window]")
    x, y = on_screen(viewer, 50, 50)
    drag(viewer, (x, y), (x + 150, y - 75))  # 150 px are half the width, 75 a quarter
    assert window(viewer) == (120, 60)
    drag(viewer, (x, y), (x - 5000, y))
    assert window(viewer)[0] == 1
    viewer.press("v")
    drag(viewer, (x, y), (x + 100, y))
    assert window(viewer) == (1, 60)


def test_opacity_of_outlines_and_of_filled_masks(viewer):
    solid = near(settled(viewer), ORANGE).sum()
    assert solid > 50
    type_into(viewer, "#opacity", "0.1")
    assert near(settled(viewer), ORANGE).sum() < solid / 10
    viewer.press("o")
    assert viewer.evaluate("document.querySelector('#opacity').value") == "0.45"
    type_into(viewer, "#opacity", "1")
    assert near(settled(viewer), ORANGE).sum() > 3 * solid


def test_outlines_in_every_plane(viewer):
    viewer.press("m")
    pixels = settled(viewer)
    height, width, _ = pixels.shape
    found = near(pixels, ORANGE) | near(pixels, BLUE)
    rows, columns = slice(0, height // 2), slice(0, width // 2)
    quarters = [found[rows, columns], found[rows, width // 2 :], found[height // 2 :, columns]]
    assert [bool(quarter.sum() > 20) for quarter in quarters] == [True] * 3
    # A filled block has far more pixels than its outline.
    viewer.press("o")
    type_into(viewer, "#opacity", "1")
    pixels = settled(viewer)
    filled = near(pixels, ORANGE) | near(pixels, BLUE)
    assert filled.sum() > 3 * found.sum()


def test_letters_on_all_four_sides(viewer):
    """Grey letters on black, in the middle of each side of the stage, whole and off its edge."""
    pixels = settled(viewer)
    for side in sides(pixels):
        assert (side.min(axis=-1) > 120).any()
    edge = np.ones(pixels.shape[:2], bool)
    edge[5:-5, 5:-5] = False
    assert not pixels[edge].any()


def sides(pixels: np.ndarray) -> list[np.ndarray]:
    """Where the letters stand: the middles of the four sides."""
    height, width, _ = pixels.shape
    x, y = width // 2, height // 2
    return [
        pixels[y - 15 : y + 15, :30],
        pixels[:30, x - 15 : x + 15],
        pixels[y - 15 : y + 15, -30:],
        pixels[-30:, x - 15 : x + 15],
    ]


def length_mm(browser: Browser) -> float:
    """What the viewer says of the line that was drawn last."""
    return float(text(browser, "#under").removesuffix(" mm"))


def test_ruler_measures_millimetres(viewer):
    viewer.press("l")
    assert is_pressed(viewer, "[data-tool=ruler]")
    before = settled(viewer)
    drag(viewer, on_screen(viewer, 30, 40), on_screen(viewer, 60, 80))  # 3-4-5: 50 voxels of 2 mm
    assert length_mm(viewer) == pytest.approx(100, abs=2)
    leave(viewer)
    drawn = settled(viewer)
    line = (drawn != before).any(axis=-1)
    assert line.sum() > 100
    viewer.press("ArrowUp")
    viewer.press("ArrowDown")  # a line stays on its slice
    np.testing.assert_array_equal(settled(viewer), drawn)
    drag(viewer, on_screen(viewer, 20, 20), on_screen(viewer, 40, 20))
    assert length_mm(viewer) == pytest.approx(40, abs=2)
    leave(viewer)
    both = (settled(viewer) != before).any(axis=-1)
    assert both[line].mean() > 0.95
    assert both.sum() > line.sum() + 50
    viewer.press("0")
    np.testing.assert_array_equal(settled(viewer), before)


def test_zoom_and_reset(viewer):
    first = settled(viewer)
    viewer.press("+")
    assert (settled(viewer) != first).any()
    left, top, width, height = stage(viewer)
    mouse(viewer, "mouseWheel", left + width / 2, top + height / 2,
          deltaX=0, deltaY=-100, modifiers=2)  # with Ctrl  # fmt: skip
    for key in ("3", "p", "o", "m", "w"):
        viewer.press(key)
    type_into(viewer, "#width", "500")
    viewer.press("0")
    leave(viewer)
    np.testing.assert_array_equal(settled(viewer), first)
    assert window(viewer) == (80, 40)
    for button in ("[data-view=axial]", "[data-tool=look]", "#outline", "[data-mask=prediction]"):
        assert is_pressed(viewer, button)


def test_wheel_scrolls(viewer):
    left, top, width, height = stage(viewer)
    at = text(viewer, "#slice-number")
    mouse(viewer, "mouseWheel", left + width / 2, top + height / 2, deltaX=0, deltaY=-100)
    viewer.wait_for(f"document.querySelector('#slice-number').textContent !== {at!r}")
    assert text(viewer, "#slice-number") == "Slice 5 of 9"


def downloaded(browser: Browser, folder: Path, name: str) -> Path:
    path = folder / name
    for _ in range(100):
        if path.is_file() and path.stat().st_size:
            return path
        time.sleep(0.1)
    pytest.fail(f"{name} is not among {sorted(p.name for p in folder.iterdir())}")


def test_picture_and_mask_are_saved(viewer, page, tmp_path):
    viewer.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    seen = near(settled(viewer), ORANGE).sum()
    click(viewer, "#picture")
    picture = Image.open(downloaded(viewer, tmp_path, "one_slice_4.png")).convert("RGB")
    _, _, width, height = stage(viewer)
    assert picture.size == (round(width), round(height))
    assert near(np.asarray(picture), ORANGE).sum() == pytest.approx(seen, rel=0.1)
    click(viewer, "#mask")
    mask = nibabel.load(downloaded(viewer, tmp_path, "one_prediction.nii.gz"))
    _, _, prediction = scan()
    np.testing.assert_array_equal(np.asarray(mask.dataobj).T, prediction.voxels)
    np.testing.assert_allclose(mask.header.get_zooms(), (2.0, 2.0, 5.0))


def test_fingers_window_and_measure(browser, page):
    browser.open(page, width=390, height=844)
    browser.call("Emulation.setTouchEmulationEnabled", enabled=True)
    try:
        open_case(browser, "one")
        left, top, width, height = stage(browser)
        x, y = left + width / 2, top + height / 2
        click(browser, "[data-tool=window]")
        swipe(browser, (x, y), (x + 75, y))
        assert window(browser) == (100, 40)
        click(browser, "[data-tool=ruler]")
        swipe(browser, (x, y), (x + 60, y))
        assert length_mm(browser) > 20
        click(browser, "[data-tool=look]")
        swipe(browser, (x + 60, y), (x + 60, y))
        assert "HU" in text(browser, "#under")
    finally:
        browser.call("Emulation.setTouchEmulationEnabled", enabled=False)


def swipe(browser: Browser, start: tuple[float, float], end: tuple[float, float]) -> None:
    points = [[{"x": x, "y": y}] for x, y in (start, end)]
    browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=points[0])
    browser.call("Input.dispatchTouchEvent", type="touchMove", touchPoints=points[1])
    browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])


def test_tables_fit_a_phone(browser, page):
    browser.open(page, width=390, height=844)
    for table in ("#table", ".card table"):
        box = browser.evaluate(
            f"(t => [t.scrollWidth, t.parentElement.clientWidth])"
            f"(document.querySelector({table!r}))"
        )
        assert box[0] <= box[1]
    cells = browser.evaluate(
        "Array.from(document.querySelectorAll('.card tbody tr:first-child td'), c =>"
        " getComputedStyle(c, '::before').content)"
    )
    assert '"Confidence"' in cells


def test_a_scan_that_is_no_ct_has_a_window_of_its_own(browser, tmp_path):
    rng = np.random.default_rng(0)
    image = Volume(rng.uniform(0, 1, (5, 40, 40)).astype(np.float32), (5.0, 2.0, 2.0))
    mask = image.with_voxels((image.voxels > 0.99).astype(np.uint8))
    case_files.write_case(tmp_path, "mr", image, {"prediction": mask}, is_ct=False)
    page = inference_page.write(
        tmp_path, [inference_page.Entry("mr", "", {})], title="t", subtitle="s"
    )
    browser.open(page)
    open_case(browser, "mr")
    width, _ = window(browser)
    assert 0.9 < width < 1.0
    assert browser.evaluate("document.querySelector('button[data-window]').hidden")
    left, top, w, h = stage(browser)
    mouse(browser, "mouseMoved", left + w / 2, top + h / 2)
    assert "HU" not in text(browser, "#under")
    assert browser.errors == []
