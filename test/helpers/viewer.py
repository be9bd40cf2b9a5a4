"""A head for the viewer, and what tests of it ask for: a case opened, pixels at rest."""

from __future__ import annotations

import time

import numpy as np
import pytest
from helpers.browser import Browser

from ichseg.scan.volume import Volume

ORANGE, BLUE = (230, 159, 0), (86, 180, 233)
SHAPE, SPACING_MM = (9, 100, 100), (5.0, 2.0, 2.0)


def scan() -> tuple[Volume, Volume, Volume]:
    """A head with a bright block in the patient's front left, and a reference and a prediction."""
    voxels = np.full(SHAPE, -1000, np.int16)
    voxels[:, 10:90, 10:90] = 35
    voxels[:, 15:25, 70:85] = 1000  # front: low y; left: high x
    masks = [np.zeros(SHAPE, np.uint8) for _ in range(2)]
    masks[0][3:6, 40:60, 20:40] = 1  # the reference, on the patient's right
    masks[1][3:6, 40:60, 60:80] = 1  # what was found, on the left
    image = Volume(voxels, SPACING_MM)
    return image, image.with_voxels(masks[0]), image.with_voxels(masks[1])


def open_case(browser: Browser, slug: str) -> None:
    opener = f".card[data-slug={slug}] .card-head .open"
    browser.evaluate(f"document.querySelector({opener!r}).click()")
    browser.wait_for(f"document.querySelector('#viewer').dataset.shown === {slug!r}")


def settled(browser: Browser) -> np.ndarray:
    """Pixels ``(row, column, 3)`` of the canvas once they stay as they are."""
    before = browser.pixels(".stage")
    for _ in range(50):
        time.sleep(0.1)
        now = browser.pixels(".stage")
        if np.array_equal(now, before):
            return now
        before = now
    pytest.fail("the canvas does not come to rest")


def near(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (abs(pixels.astype(int) - colour) < 30).all(axis=-1)
