import pytest

from ichseg.engine import gpus
from ichseg.errors import DeviceError


def test_gpus_are_those_that_are_there(monkeypatch):
    monkeypatch.setattr(gpus, "count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus.find("1,0") == ("1", "0")
    for text, message in (
        ("0,2", "no GPU 2; this machine has 2, counted from 0"),
        ("0,0", "names a GPU twice"),
        ("0;1", "expected numbers separated by commas"),
        ("", "expected numbers separated by commas"),
    ):
        with pytest.raises(DeviceError, match=message):
            gpus.find(text)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6, 4")
    assert gpus.find("1") == ("4",)
    monkeypatch.setattr(gpus, "count", lambda: 0)
    with pytest.raises(DeviceError, match="no GPU 0; no GPU works here"):
        gpus.find("0")
