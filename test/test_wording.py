import numpy as np
import pytest

from ichseg import wording


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.2, "0.2 s"), (9.94, "9.9 s"), (9.96, "10 s"), (99.4, "99 s"), (99.6, "2 min"),
        (3600, "60 min"), (5969, "99 min"), (5999, "1 h 40 min"), (7500, "2 h 05 min"),
    ],
)  # fmt: skip
def test_duration(seconds, expected):
    assert wording.duration(seconds) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (-3, "0:00:00"),
        (0.1, "0:00:01"),
        (59.5, "0:01:00"),
        (3661, "1:01:01"),
        (360000, "100:00:00"),
    ],
)
def test_clock(seconds, expected):
    assert wording.clock(seconds) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0.0 kB"), (1234, "1.2 kB"), (12_340_000, "12.3 MB"), (610_000_000, "0.61 GB")],
)
def test_byte_size(count, expected):
    assert wording.byte_size(count) == expected


def test_counted():
    assert wording.counted(1, "lesion") == "1 lesion"
    assert wording.counted(0, "lesion") == "0 lesions"
    assert wording.counted(2, "series", "series") == "2 series"


def test_times():
    assert wording.times((64, 512, 512)) == "64x512x512"
    assert wording.times((5.0, 0.9, 0.123456), digits=3) == "5x0.9x0.123"
    assert wording.times((1_048_576,), digits=4) == "1048576"
    assert wording.times(np.array([12, 34])) == "12x34"


def test_repeated():
    assert wording.repeated(iter("cabacca")) == ["a", "c"]
    assert wording.repeated(["a", "b"]) == []
