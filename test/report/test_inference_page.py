"""The page of an inference: what it says, and that names cannot become markup."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os

import numpy as np
import pytest
from helpers.pages import page_in

from ichseg.errors import OutputError
from ichseg.report import case_files, inference_page
from ichseg.scan.volume import Volume, read

EVIL = '"><img src=x onerror=alert(1)>.mha'


def scan():
    voxels = np.full((11, 60, 60), -1000, np.int16)
    voxels[4:, 10:50, 10:50] = 30
    image = Volume(voxels, (5.0, 2.0, 2.0))
    mask = np.zeros(voxels.shape, np.uint8)
    mask[6:8, 20:30, 20:30] = 1
    mask[7, 25:30, 30:40] = 1
    return image, image.with_voxels(mask)


def facts(volume_ml, **changes):
    lesion = {
        "label": 1, "volume_ml": volume_ml, "centroid_mm": [1.0, -2.0, 3.0],
        "box_mm": [[0, -10, 0], [20, 10, 15]], "mean_hu": 61.2, "mean_probability": 0.87,
    }  # fmt: skip
    return {
        "volume_ml": volume_ml,
        "lesions": [lesion] if volume_ml else [],
        "disagreement": 0.25,
        "warnings": [],
        "case_score": 0.96,
        "ran": {"networks": ["3d_fullres fold 0"], "tiles": 4, "preset": "balanced"},
        "seconds": {"total": 2.5, "compile": 0.5},
        **changes,
    }


def entries():
    return [
        inference_page.Entry("small.mha", "", facts(1.5)),
        inference_page.Entry(EVIL, "", facts(20.0, warnings=["<script>alert(2)</script> & more"])),
        inference_page.Entry("none.mha", "", facts(0.0)),
        inference_page.Entry("</script>broken", "</script><b>cannot be read", {}),
    ]


def test_lesions_that_are_not_listed_are_counted():
    assert inference_page.Entry("noise.mha", "", facts(9.0, lesion_count=3000)).lesion_count == 3000
    assert inference_page.Entry("older.mha", "", facts(9.0)).lesion_count == 1
    assert inference_page.Entry("failed.mha", "cannot be read", {}).lesion_count is None


def test_a_card_counts_the_lesions_that_are_not_listed(tmp_path):
    listed = facts(9.0)["lesions"] * 100
    entry = inference_page.Entry("noise.mha", "", facts(9.0, lesions=listed, lesion_count=3000))
    inference_page.write(tmp_path, [entry], title="t", subtitle="s")
    text = page_in(tmp_path).words
    assert "Lesions3000 Case score" in text
    assert "and 2988 smaller ones" in text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A page of three cases and a failure."""
    out = tmp_path_factory.mktemp("report")
    image, mask = scan()
    for entry in entries():
        if not entry.error:
            case_files.write_case(out, entry.name, image, {"prediction": mask})
    inference_page.write(out, entries(), title="A <title>", subtitle="with & without")
    return out


def test_a_name_that_is_not_utf8_does_not_take_the_others_pages_away(tmp_path):
    names = [os.fsdecode(b"a\xff.mha"), "b.mha"]
    image, mask = scan()
    for name in names:
        case_files.write_case(tmp_path, name, image, {"prediction": mask})
    shown = [inference_page.Entry(name, "", facts(1.5)) for name in names]
    inference_page.write(tmp_path, shown, title="t", subtitle="s")
    assert [card["data-name"] for card in page_in(tmp_path).cards] == ["a\\udcff.mha", "b.mha"]


def test_failures_come_first_then_the_largest(folder):
    found = page_in(folder)
    rows = [row for row in found.rows if len(row) == 8][1:]
    assert [row[0] for row in rows] == ["</script>broken", EVIL, "small.mha", "none.mha"]
    assert [row[1] for row in rows] == ["–", "20.00", "1.50", "0.00"]  # noqa: RUF001
    assert [card["data-name"] for card in found.cards] == [row[0] for row in rows]


def test_no_name_becomes_markup(folder):
    """Elements and their attributes are those of harmless names, but for the text in them."""
    found = page_in(folder)
    assert {tag for tag, _ in found.elements} <= {
        "html", "head", "meta", "title", "link", "body", "header", "div", "h1", "h2", "h3", "p",
        "nav", "a", "button", "strong", "main", "section", "ul", "li", "input", "span", "table",
        "thead", "tbody", "tr", "th", "td", "article", "dl", "dt", "dd", "img", "details",
        "summary", "footer", "dialog", "canvas", "label", "script", "i", "select",
    }  # fmt: skip
    scripts = [a["src"] for a in found.with_tag("script")]
    assert scripts == ["assets/pane.js", "assets/viewer.js", "assets/report.js"]
    assert not any(key.startswith("on") for _, a in found.elements for key in a)
    assert all(a["src"].startswith("cases/") for a in found.with_tag("img"))
    assert EVIL in found.text
    assert "<script>alert(2)</script> & more" in found.text


def test_nothing_is_asked_of_a_network(folder):
    found = page_in(folder)
    for _, attributes in found.elements:
        for key in ("src", "href"):
            address = attributes.get(key, "")
            assert "//" not in address
            if address.startswith(("cases/", "assets/")):
                assert (folder / address).is_file()
    policy = next(a["content"] for a in found.with_tag("meta") if "http-equiv" in a)
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert "http" not in policy


def test_notice_stands_on_the_page(folder):
    assert "For research, not for diagnosis." in page_in(folder).text


def test_card_has_lesions_disagreement_and_what_ran(folder):
    text = page_in(folder).text
    for part in ("20 × 20 × 15", "61", "1, −2, 3", "0.250", "3d_fullres fold 0", "total 2.5"):  # noqa: RUF001
        assert part in text


def test_card_says_how_sure_it_is_by_which_preset_and_where_each_lesion_is(folder):
    found = page_in(folder)
    for part in ("Case score", "0.96", "Confidence", "0.87", "Preset", "balanced"):
        assert part in found.text
    places = [a["data-mm"] for a in found.with_tag("button") if "data-mm" in a]
    assert places == ["1.0 -2.0 3.0"] * 2  # of the two cases with a lesion


def test_what_an_older_run_does_not_know_is_left_out(folder, tmp_path):
    older = facts(2.0)
    del older["case_score"], older["ran"]["preset"], older["lesions"][0]["mean_probability"]
    inference_page.write(
        tmp_path, [inference_page.Entry("a.mha", "", older)], title="t", subtitle="s"
    )
    text = page_in(tmp_path).text
    assert "Preset" not in text
    assert "2.00" in text


def test_the_mask_lies_beside_the_page_in_the_grid_of_the_scan(folder):
    image, mask = scan()
    found = read(folder / "cases" / "small.mha_prediction.nii.gz")
    np.testing.assert_array_equal(found.voxels, mask.voxels)
    assert found.spacing_mm == image.spacing_mm


def test_slices_with_the_mask_are_marked_and_the_largest_opens(folder):
    shown = case_files.read_case(folder, "small.mha")
    assert shown is not None
    marked = [at for at, present in zip(shown.slices, shown.present, strict=True) if present]
    assert marked == [6, 7]
    assert shown.largest_slice == 7
    assert shown.first_slice == 2
    assert case_files.read_case(folder, "other.mha") is None


def test_files_of_a_case_have_harmless_names(folder):
    names = {path.name for path in (folder / "cases").iterdir()}
    assert {"small.mha.js", "small.mha.jpg", "small.mha.json"} <= names
    assert all(set(name) <= set(case_files.slug_of(name)) for name in names)
    for name in (EVIL, "../../etc", ".hidden", "ä.mha", "a b", "x" * 300, ""):
        slug = case_files.slug_of(name)
        assert not slug.startswith(".")
        assert len(slug) < 100
        assert slug.replace("-", "").replace("_", "").replace(".", "").isalnum()
        assert slug.isascii()
    assert case_files.slug_of("a b") != case_files.slug_of("a_b") == "a_b"
    assert case_files.slug_of("a/b") != case_files.slug_of("a b")


def test_case_without_pictures_is_listed(tmp_path):
    inference_page.write(tmp_path, entries()[:1], title="t", subtitle="s")
    found = page_in(tmp_path)
    assert found.cards[0]["data-name"] == "small.mha"
    assert not found.with_tag("img")


def test_viewer_script_is_the_one_that_its_licence_file_names(folder):
    script = (folder / "assets" / "niivue.umd.js").read_bytes()
    licences = (folder / "assets" / "niivue-LICENSES.txt").read_text()
    assert hashlib.sha256(script).hexdigest() in licences


def test_case_whose_name_is_not_utf_8_is_listed(tmp_path):
    inference_page.write(
        tmp_path, [inference_page.Entry("a\udcff.mha", "broken", {})], title="t", subtitle="s"
    )
    assert page_in(tmp_path).cards[0]["data-name"] == r"a\udcff.mha"


def test_a_case_that_could_not_be_drawn_again_has_no_pictures(tmp_path, monkeypatch):
    """A strip of today beside what is known of yesterday's would be shown with wrong numbers."""
    image, mask = scan()
    case_files.write_case(tmp_path, "a.mha", image, {"prediction": mask})
    assert case_files.read_case(tmp_path, "a.mha") is not None

    def fail(*_, **__):
        raise OutputError("a full disk")

    monkeypatch.setattr(case_files.viewer, "make_script", fail)
    with pytest.raises(OutputError, match="a full disk"):
        case_files.write_case(tmp_path, "a.mha", image, {"prediction": mask})
    assert case_files.read_case(tmp_path, "a.mha") is None


def test_a_page_that_fails_leaves_the_one_before(tmp_path):
    inference_page.write(tmp_path, entries()[:1], title="t", subtitle="s")
    before = (tmp_path / "index.html").read_bytes()
    broken = dataclasses.replace(entries()[0], facts={"volume_ml": 1, "lesions": [{"label": 1}]})
    with pytest.raises(LookupError):
        inference_page.write(tmp_path, [broken], title="t", subtitle="s")
    assert (tmp_path / "index.html").read_bytes() == before
    assert not list(tmp_path.rglob(".writing-*"))


def test_what_write_case_left_is_strict(folder):
    path = folder / "cases" / "none.mha.json"
    content = json.loads(path.read_text())
    assert set(content) == {field.name for field in dataclasses.fields(case_files.Shown)}
