"""Digests of the cases' content, and which files have to be read for them."""

import os

import pytest

from training.data import sources
from training.data.dataset import Case, Dataset
from training.data.sources import digest_cases, digest_sources


@pytest.fixture
def cases(tmp_path):
    for name, text in (("a_0", "one"), ("a_1", "two"), ("a", "label"), ("b_0", "one"), ("b", "x")):
        (tmp_path / name).write_text(text)
    files = {name: tmp_path / name for name in ("a_0", "a_1", "a", "b_0", "b")}
    return (
        Case("a", (files["a_0"], files["a_1"]), files["a"]),
        Case("b", (files["b_0"],), files["b"]),
    )


def test_content_alone_decides(tmp_path, cases):
    before = digest_cases(tmp_path, cases)
    os.utime(cases[0].label, ns=(1, 1))
    assert digest_cases(tmp_path, cases) == before
    cases[0].label.write_text("LABEL")
    os.utime(cases[0].label, ns=(2, 2))
    after = digest_cases(tmp_path, cases)
    assert after["a"] != before["a"]
    assert after["b"] == before["b"]
    (tmp_path / "sources.json").unlink()
    assert digest_cases(tmp_path, cases) == after


def test_files_that_were_exchanged_are_seen(tmp_path, cases):
    """Unpacked together, they have one date, and not compressed, one size."""
    first, second = cases[0].images
    for path in (first, second):
        os.utime(path, ns=(5, 5))
    before = digest_cases(tmp_path, cases)
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    after = digest_cases(tmp_path, cases)
    assert after["a"] != before["a"]
    assert after["b"] == before["b"]


def test_images_in_another_order_are_another_case(tmp_path, cases):
    first, second = cases[0].images
    swapped = Case("a", (second, first), cases[0].label)
    unlabelled = Case("a", (first, second), None)
    found = {digest_cases(tmp_path, [case])["a"] for case in (cases[0], swapped, unlabelled)}
    assert len(found) == 3


def test_only_what_looks_changed_is_read(tmp_path, cases, monkeypatch):
    read = []
    whole = sources.sha256
    monkeypatch.setattr(sources, "sha256", lambda path: read.append(path.name) or whole(path))
    first = digest_cases(tmp_path, cases)
    assert sorted(read) == ["a", "a_0", "a_1", "b", "b_0"]
    read.clear()
    assert digest_cases(tmp_path, cases) == first
    assert read == []
    cases[1].label.write_text("longer")
    digest_cases(tmp_path, cases, remember=False)
    digest_cases(tmp_path, cases)
    digest_cases(tmp_path, cases)
    assert read == ["b", "b"]  # what was not to be remembered is read again


def test_a_file_that_is_gone_gives_no_digest(tmp_path, cases):
    cases[1].label.unlink()
    found = digest_cases(tmp_path, cases)
    assert found["b"] == ""
    assert len(found["a"]) == 64


def test_nothing_is_written_where_nothing_may_be(tmp_path, cases):
    digest_cases(tmp_path, cases, remember=False)
    assert not (tmp_path / "sources.json").exists()


def test_a_damaged_memory_is_made_again(tmp_path, cases):
    before = digest_cases(tmp_path, cases)
    (tmp_path / "sources.json").write_text("{")
    assert digest_cases(tmp_path, cases) == before
    assert (tmp_path / "sources.json").read_text().startswith("{\n")


def test_a_dataset_is_its_labelled_cases_by_name(tmp_path, cases):
    def digest(*listed):
        return digest_sources(tmp_path, Dataset("x", ("CT",), ("background", "bleed"), listed))

    one = Case("a", cases[0].images[:1], cases[0].label)
    renamed = Case("c", cases[0].images[:1], cases[0].label)
    unlabelled = Case("z", cases[0].images[1:], None)
    assert digest(one, cases[1]) == digest(one, cases[1], unlabelled)
    assert digest(one, cases[1]) != digest(renamed, cases[1])
