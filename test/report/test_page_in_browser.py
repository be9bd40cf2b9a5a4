"""The pages in a real browser, from ``file://``: Debian's Chromium, without a network."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.browser import Browser
from helpers.viewer import BLUE, ORANGE, SPACING_MM, near, open_case, scan, settled

from ichseg.report import case_files, inference_page
from training.fit.history import EpochRow
from training.report import evaluation_page
from training.scoring import summary
from training.scoring.scores import CaseScore, score_labels

pytestmark = pytest.mark.browser

EVIL = "<img src=x onerror=hacked=1>"
# What stands in results.json of two pieces; the second lies in the lowest slices, back and right.
LESIONS = [
    {
        "label": 1,
        "volume_ml": volume_ml,
        "centroid_mm": centroid_mm,
        "box_mm": [[100, 70, 10], [150, 120, 30]],
        "mean_hu": 60.0,
        "mean_probability": 0.9,
        "max_probability": 1.0,
    }
    for volume_ml, centroid_mm in ((20.0, [139.0, 99.0, 20.0]), (4.0, [30.0, 160.0, 5.0]))
]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of twelve cases, the higher their number the better; one has an odd name."""
    out = tmp_path_factory.mktemp("evaluation")
    image, reference, prediction = scan()
    cases = []
    for number in range(12):
        name = EVIL if number == 11 else f"case_{number}"
        found = prediction.voxels.copy()
        if number:
            found[3:6, 40 : 40 + number, 20:40] = 1
        case_files.write_case(
            out, name, image, {"reference": reference, "prediction": image.with_voxels(found)}
        )
        labels = score_labels(
            found, reference.voxels, SPACING_MM, names=("blood",), empty="instance"
        )
        cases.append(CaseScore(name, "p", "r", labels))
    evaluation = summary.make_evaluation(cases, ("blood",), "instance")
    curves = {"0": [EpochRow(e, -e / 5, -e / 6, e / 5, 1e-3, 1, 0) for e in (1, 2)]}
    return evaluation_page.write(
        out, evaluation, evaluation_page.Context("Evaluation", "s", curves)
    )


@pytest.fixture(scope="module")
def inferred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of an inference: one case, one failure."""
    out = tmp_path_factory.mktemp("inference")
    image, _, prediction = scan()
    case_files.write_case(out, "one.mha", image, {"prediction": prediction})
    entries = [
        inference_page.Entry(
            "one.mha",
            "",
            {
                "volume_ml": 24.0,
                "lesions": LESIONS,
                "case_score": 0.9,
                "ran": {"preset": "fast"},
                "warnings": [EVIL],
            },
        ),
        inference_page.Entry(EVIL, EVIL, {}),
    ]
    return inference_page.write(out, entries, title="Inference", subtitle=EVIL)


@pytest.fixture(scope="module")
def browser():
    with Browser.start() as started:
        yield started


def names(browser: Browser) -> list[str]:
    rows = "Array.from(document.querySelectorAll('#table tbody tr')).filter(r => !r.hidden)"
    return browser.evaluate(f"{rows}.map(r => r.dataset.name)")


def shown_cards(browser: Browser) -> list[str]:
    cards = "Array.from(document.querySelectorAll('.card')).filter(c => !c.hidden)"
    return browser.evaluate(f"{cards}.map(c => c.dataset.name)")


def click(browser: Browser, selector: str) -> None:
    browser.evaluate(f"document.querySelector({selector!r}).click()")


@pytest.mark.parametrize("page", ["evaluated", "inferred"])
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_page_loads_without_an_error(page, width, dark, browser, request):
    path = request.getfixturevalue(page)
    browser.open(path, width=width, dark=dark)
    browser.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    browser.wait_for("Array.from(document.images).some(i => i.complete && i.naturalWidth > 0)")
    assert browser.errors == []
    assert browser.requests
    assert all(url.startswith(path.parent.as_uri()) or url == "data:," for url in browser.requests)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate("typeof hacked") == "undefined"
    browser.evaluate("window.scrollTo(0, 0)")
    background = browser.pixels("body")[:5].mean()
    assert background < 60 if dark else background > 200


OUTSIDE = """
Array.from(document.querySelectorAll('.chart svg')).flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  const labels = Array.from(svg.querySelectorAll('text'), text => [text.textContent, text.getBoundingClientRect()]);
  const cut = labels.filter(([, box]) => box.left < frame.left - 0.5 || box.right > frame.right + 0.5
    || box.top < frame.top - 0.5 || box.bottom > frame.bottom + 0.5);
  const covered = labels.filter(([, a], i) => labels.slice(i + 1).some(([, b]) => a.left < b.right - 1
    && b.left < a.right - 1 && a.top < b.bottom - 4 && b.top < a.bottom - 4));
  return [...cut, ...covered].map(([text]) => `${svg.getAttribute('aria-label')}: ${text}`);
})
"""  # noqa: E501


@pytest.mark.parametrize("width", [390, 1400])
def test_no_label_of_a_chart_is_cut_off_or_covered(width, browser, evaluated):
    browser.open(evaluated, width=width)
    assert browser.evaluate("document.querySelectorAll('.chart svg text').length") > 50
    assert browser.evaluate(OUTSIDE) == []


def test_the_printed_table_fits_on_paper(browser, evaluated):
    browser.open(evaluated, width=720)  # A4 within its margins
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        edge = browser.evaluate("document.querySelector('#table').getBoundingClientRect().right")
        assert edge <= 720
        assert browser.evaluate("document.documentElement.scrollWidth") == 720
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")


def test_network_is_out_of_reach_of_the_page(browser, evaluated):
    browser.open(evaluated)
    said = browser.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', e => e.message)")
    assert said != "sent"
    assert "violates" in " ".join(browser.errors)


def test_table_sorts_and_pictures_follow(browser, evaluated):
    browser.open(evaluated)
    worst_first = [f"case_{i}" for i in range(11)] + [EVIL]
    assert names(browser) == worst_first
    assert shown_cards(browser) == worst_first[:8]
    heading = "#table th:nth-child(2) button"
    click(browser, heading)
    assert names(browser) == worst_first
    click(browser, heading)
    assert names(browser) == worst_first[::-1]
    assert shown_cards(browser) == worst_first[::-1][:8]
    click(browser, "#table th:nth-child(1) button")
    assert names(browser)[:4] == [EVIL, "case_0", "case_1", "case_2"]  # 2 before 10
    assert names(browser)[-1] == "case_10"
    click(browser, "#more")
    assert len(shown_cards(browser)) == 12
    assert browser.errors == []


def test_table_filters(browser, evaluated):
    browser.open(evaluated)
    click(browser, ".chip[data-flag=missed]")
    assert names(browser) == shown_cards(browser) == ["case_0"]
    click(browser, ".chip[data-flag=missed]")
    browser.evaluate("document.querySelector('#filter').focus()")
    for key in "case_1":
        browser.press(key)
    assert names(browser) == ["case_1", "case_10"]
    assert browser.evaluate("document.querySelector('#count').textContent") == "2 of 12 cases"


def test_viewer_shows_the_scan_and_both_masks(browser, evaluated):
    browser.open(evaluated)
    open_case(browser, "case_0")
    pixels = settled(browser)
    height, width, _ = pixels.shape
    grey = (abs(pixels.astype(int) - 112) < 15).all(axis=-1)  # 35 HU at 80/40 is 112 of 255
    assert grey.mean() > 0.1
    orange, blue = (np.argwhere(near(pixels, c)) for c in (ORANGE, BLUE))
    assert len(orange) > 50
    assert len(blue) > 50
    assert blue[:, 1].mean() < width / 2 < orange[:, 1].mean()  # the patient's right is on the left
    white = np.argwhere((pixels > 240).all(axis=-1))
    assert white[:, 0].mean() < height / 2  # the front is up
    assert white[:, 1].mean() > width / 2
    assert browser.errors == []


def test_keys_of_the_viewer(browser, evaluated):
    browser.open(evaluated)
    open_case(browser, "case_0")

    def slice_number():
        return browser.evaluate("document.querySelector('#slice-number').textContent")

    def seen(colour):
        return near(settled(browser), colour).sum() > 50

    assert slice_number() == "Slice 4 of 9"  # the first of those with most of the reference
    browser.press("ArrowUp")
    assert slice_number() == "Slice 5 of 9"
    browser.press("r")
    assert (seen(BLUE), seen(ORANGE)) == (False, True)
    browser.press("p")
    assert not seen(ORANGE)
    browser.press("r")
    assert seen(BLUE)
    browser.press("p")
    for _ in range(3):
        browser.press("ArrowDown")
    assert slice_number() == "Slice 2 of 9"
    assert not seen(ORANGE)
    soft = settled(browser)
    browser.press("3")  # bone: soft tissue is darker than in the brain's window
    assert settled(browser).mean() < soft.mean()
    browser.press("j")
    browser.wait_for("document.querySelector('#viewer').dataset.shown === 'case_1'")
    browser.press("k")
    browser.wait_for("document.querySelector('#viewer').dataset.shown === 'case_0'")
    browser.press("m")
    assert (settled(browser) > 30).any(axis=-1).mean() > 0.1
    browser.press("Escape")
    browser.wait_for("!document.querySelector('#viewer').open")
    assert browser.errors == []


def test_slices_and_dots_open_their_case(browser, evaluated):
    browser.open(evaluated)
    click(browser, ".card[data-slug=case_2] .panel:nth-child(2)")
    browser.wait_for("document.querySelector('#viewer').dataset.shown === 'case_2'")
    wanted = browser.evaluate(
        "document.querySelector('.card[data-slug=case_2] .panel:nth-child(2)').dataset.slice"
    )
    said = browser.evaluate("document.querySelector('#slice-number').textContent")
    assert said == f"Slice {int(wanted) + 1} of 9"
    click(browser, "#close")
    browser.evaluate(
        "document.querySelector('.dot[data-slug=case_5]').dispatchEvent("
        "new MouseEvent('click', {bubbles: true}))"
    )
    browser.wait_for("document.querySelector('#viewer').dataset.shown === 'case_5'")


def test_odd_name_opens_and_runs_nothing(browser, evaluated):
    browser.open(evaluated)
    open_case(browser, case_files.slug_of(EVIL))
    assert browser.evaluate("document.querySelector('#viewer-name').textContent") == EVIL
    assert browser.evaluate("typeof hacked") == "undefined"
    assert browser.errors == []


def test_viewer_on_a_phone(browser, inferred):
    browser.open(inferred, width=390, height=844)
    click(browser, ".card[data-slug] .card-head .open")
    browser.wait_for("document.querySelector('#viewer').dataset.shown")
    pixels = settled(browser)
    assert near(pixels, ORANGE).sum() > 30
    assert browser.evaluate("document.querySelector('#viewer').scrollWidth") == 390
    assert browser.evaluate("document.querySelector('[data-mask=reference]').hidden")
    assert browser.errors == []


def test_case_that_is_lost_is_said(browser, inferred, tmp_path):
    copy = shutil.copytree(inferred.parent, tmp_path / "copy")
    (copy / "cases" / "one.mha.js").unlink()
    browser.open(copy / "index.html")
    click(browser, ".card[data-slug] .card-head .open")
    browser.wait_for("document.querySelector('#viewer-message').textContent.includes('cannot')")


def test_page_prints_whole_and_without_its_buttons(browser, evaluated):
    browser.open(evaluated)
    browser.call("Emulation.setEmulatedMedia", media="print")
    try:
        hidden = "getComputedStyle(document.querySelector('{}')).display === 'none'"
        for selector in ("nav", ".filters", ".card-head .open"):
            assert browser.evaluate(hidden.format(selector))
        assert (
            browser.evaluate("getComputedStyle(document.querySelector('.tall')).maxHeight")
            == "none"
        )
    finally:
        browser.call("Emulation.setEmulatedMedia", media="")
