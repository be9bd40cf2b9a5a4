"""What is read of a bundle before anything else: hostile ones are refused in one line."""

import hashlib
import json
import os

import pytest
from conftest import make_bundle

from ichseg.app import weights
from ichseg.errors import WeightsError


def test_what_a_bundle_says_of_itself(tmp_path):
    make_bundle(tmp_path)
    found = weights.describe(tmp_path)
    assert (found.input_slug, found.output_slug) == ("head-ct", "bleed")
    assert found.sha256 == hashlib.sha256((tmp_path / "model.json").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        (str(10**400), "too large"),
        ("[]", "socket None"),
        (json.dumps({"input_slug": "head-ct"}), "socket None"),
        (json.dumps({"input_slug": ["head-ct"], "output_slug": "x"}), "socket \\['head-ct'\\]"),
        (json.dumps({"input_slug": "../..", "output_slug": "x"}), "socket '../..'"),
        (json.dumps({"input_slug": "a\0", "output_slug": "x"}), "has a NUL"),
    ],
)
def test_a_description_that_is_none(tmp_path, content, message):
    (tmp_path / "model.json").write_text(content)
    with pytest.raises(WeightsError, match=f"^{tmp_path / 'model.json'}: .*{message}"):
        weights.describe(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.json")
    with pytest.raises(WeightsError, match="not a plain file"):
        weights.describe(tmp_path)


def test_a_folder_without_a_bundle(tmp_path):
    with pytest.raises(WeightsError, match="expected a weights bundle in"):
        weights.describe(tmp_path)
