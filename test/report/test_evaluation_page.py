"""The page of an evaluation: its figures by hand, its charts' places, its order."""

from __future__ import annotations

import csv
import dataclasses
import re

import numpy as np
import pytest
from conftest import PLANS
from helpers.pages import page_in
from helpers.workspaces import make_workspace

from ichseg.errors import DatasetError, TrainingError
from ichseg.files import replacing
from ichseg.model import strict_json
from ichseg.scan import volume
from training.__main__ import main
from training.crossval import merge, selection
from training.data import dataset
from training.data.workspace import (
    LATEST_CHECKPOINT,
    evaluation_folder,
    mask_file,
    run_folder,
)
from training.fit import history
from training.fit.history import EpochRow
from training.report import charts, command, cross_validation, draw, evaluation_page
from training.report.charts import Point
from training.scoring import evaluate, statistics, summary


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """Five cases of which the last is missed and the second found in part."""
    make_workspace(tmp_path, cases=5)
    folder = run_folder(tmp_path, "3d_fullres", "0")
    masks = {}
    for number, case in enumerate(dataset.load_dataset(tmp_path).labelled):
        reference = volume.read(case.label)
        found = reference.voxels.copy()
        if number == 1:
            found[found.nonzero()[0].min()] = 0
        if number == 4:
            found[:] = 0
        masks[case.name] = mask_file(folder, case.name)
        volume.write(reference.with_voxels(found), masks[case.name])
    (folder / LATEST_CHECKPOINT).touch()
    monkeypatch.setattr(merge, "validated_masks", lambda *_: masks)
    monkeypatch.setattr(merge, "digest_of_folds", lambda *_: "")
    rows = [
        EpochRow(e, -0.1 * e, 0.2, 0.1 * e if e > 1 else None, 1e-3, 2.0, 0.5) for e in (1, 2, 3)
    ]
    history.write_csv(
        rows,
        folder / "progress.csv",
    )
    merge.cross_validate(tmp_path, "3d_fullres", workers=1)
    return tmp_path


def test_command_writes_a_page_with_the_worst_first(workspace, capsys):
    assert main(["report", str(workspace), "--workers", "1"]) == 0
    assert str(workspace / "report" / "index.html") in capsys.readouterr().out
    found = page_in(workspace / "report")
    rows = [dict(zip(found.rows[0], row, strict=True)) for row in found.rows if len(row) == 12][1:]
    assert [row["Case"] for row in rows[:2]] == ["case_4", "case_1"]
    assert [card["data-name"] for card in found.cards[:2]] == ["case_4", "case_1"]
    assert rows[0]["Dice"] == "0.000"
    assert rows[0]["HD, mm"] == "–"  # noqa: RUF001
    assert (rows[0]["Lesions"], rows[0]["Hit"], rows[0]["False"]) == ("1", "0", "0")
    assert found.cards[0]["data-masks"] == "reference prediction"
    for name in ("case_0", "case_4"):
        assert (workspace / "report" / "cases" / f"{name}.js").is_file()


def test_summary_says_means_with_intervals_and_misses(workspace):
    main(["report", str(workspace), "--workers", "1"])
    evaluation = summary.load(evaluation_folder(workspace, "3d_fullres"))
    dice = evaluation.summaries[0].measures[0]
    text = page_in(workspace / "report").words
    assert f"Mean Dice {dice.mean:.3f} 95 %: {dice.low:.3f} to {dice.high:.3f}" in text
    assert "Missed completely 1 of 5" in text
    assert "Lesions found 80 % 4 of 5" in text
    assert "Fold 03 epochs, best Dice 0.300" in text


def test_dots_stand_where_the_values_are(workspace):
    main(["report", str(workspace), "--workers", "1"])
    found = page_in(workspace / "report")
    dots = [a for a in found.with_tag("circle") if "dot" in a["class"].split()]
    assert {a["data-slug"] for a in dots} == {f"case_{i}" for i in range(5)}
    missed = [a for a in dots if "bad" in a["class"]]
    assert {a["data-slug"] for a in missed} == {"case_4"}


def test_bland_altman_by_hand():
    agreement = statistics.volume_agreement([3.0, 5.0], [1.0, 5.0])  # bias 1, deviation sqrt(2)
    assert (agreement.bias_ml, agreement.high_ml) == (1.0, pytest.approx(1 + 1.959964 * 2**0.5))
    chart = charts.bland_altman([Point(None, "a", 2, 2), Point(None, "b", 5, 0)], agreement)
    dots = [tuple(map(float, m)) for m in re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="4.2"', chart)]
    (bias,) = re.findall(r'y1="([\d.]+)"[^>]*class="bias"', chart)
    limits = [float(y) for y in re.findall(r'y1="([\d.]+)"[^>]*class="limit"', chart)]
    # heights are linear in mL: the bias lies half-way between both dots, and between its limits
    assert float(bias) == pytest.approx((dots[0][1] + dots[1][1]) / 2, abs=0.1)
    assert float(bias) == pytest.approx(sum(limits) / 2, abs=0.1)
    assert (limits[1] - limits[0]) / (dots[1][1] - dots[0][1]) == pytest.approx(
        2 * 1.959964 * 2**0.5 / 2, rel=0.01
    )
    assert (dots[1][0] - 48) / (dots[0][0] - 48) == pytest.approx(5 / 2, rel=0.01)


def test_volumes_stand_by_their_logarithm():
    points = [Point(None, "", v, d) for v, d in ((0.1, 0.0), (1, 0.5), (10, 1.0))]
    chart = charts.dice_by_volume(points)
    dots = [tuple(map(float, m)) for m in re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="4.2"', chart)]
    np.testing.assert_allclose(np.diff([x for x, _ in dots]), (420 - 60) / 2, atol=0.1)
    assert [y for _, y in dots] == [250, 131, 12]


def test_wilson_interval():
    """5 of 20: 0.112 to 0.469, as in Newcombe's formula worked by hand; sure ends stay in 0..1."""
    low, high = statistics.wilson(5, 20)
    z2 = 1.959964**2
    centre, reach = (5 + z2 / 2) / (20 + z2), 1.959964 * (5 * 15 / 20 + z2 / 4) ** 0.5 / (20 + z2)
    assert (low, high) == (pytest.approx(centre - reach), pytest.approx(centre + reach))
    assert (low, high) == (pytest.approx(0.1119, abs=1e-4), pytest.approx(0.4687, abs=1e-4))
    assert statistics.wilson(0, 10)[0] == 0
    assert statistics.wilson(10, 10)[1] == pytest.approx(1)
    assert statistics.wilson(0, 0) == (0, 1)


def texts(chart):
    """Each text of a chart with the places from which to which it reaches, across the picture."""
    letter_px = 7.2  # of a digit in the sheet's 12 px, wider than in most fonts
    found = []
    for x, anchor, text in re.findall(
        r'<text x="([\d.-]+)" y="[^"]*" text-anchor="(\w+)">([^<]*)', chart
    ):
        long = letter_px * len(text)
        left = float(x) - {"start": 0, "middle": long / 2, "end": long}[anchor]
        found.append((text, left, left + long))
    return found


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1, 1e3, 1e5])
def test_no_number_is_cut_off_or_lies_on_another_text(size):
    volumes = [0.9 * size, size]
    agreement = statistics.volume_agreement(volumes, volumes[::-1])
    points = [Point(None, "", v, d * size) for v, d in zip(volumes, (-0.2, 0.3), strict=True)]
    rows = [EpochRow(e, -size / 2 * e, size, 0.5, 1e-3, 1.0, 0.0) for e in (1, 2)]
    drawn = [
        charts.bland_altman(points, agreement),
        charts.dice_by_volume([Point(None, "", v, 0.5) for v in (0.1 * size, size)]),
        charts.curves(rows, "Fold 0"),
    ]
    for chart in drawn:
        for text, left, right in texts(chart):
            assert left >= 0, text
            assert right <= 420, text
    beside = 12 + 4  # half of the height of the text that runs up
    number = re.compile(r"[\N{MINUS SIGN}\d.e+]+")
    numbers = [left for text, left, _ in texts(drawn[0]) if number.fullmatch(text)]
    assert min(numbers) >= beside


def test_curve_is_interrupted_where_there_is_no_dice():
    rows = [
        EpochRow(e, 0.0, 0.0, d, 1e-3, 1.0, 0.0)
        for e, d in enumerate((0.1, None, 0.3, 0.4), start=1)
    ]
    chart = charts.curves(rows, "Fold 0")
    (path,) = re.findall(r'd="([^"]*)" class="line green"', chart)
    assert re.findall(r"[MhL]", path) == ["M", "h", "M", "L"]  # a dash, a gap and a line


def test_the_only_epoch_of_a_training_is_seen():
    chart = charts.curves([EpochRow(1, 0.3, 0.5, 0.4, 1e-3, 1.0, 0.0)], "Fold 0")
    for colour in ("blue", "red", "green"):
        (path,) = re.findall(f'd="([^"]*)" class="line {colour}"', chart)
        x, y = map(float, re.fullmatch(r"M([\d.]+) ([\d.]+)h8", path).groups())
        assert 26 <= y <= 196
    assert re.search(rf'<text x="{x + 4:g}"[^>]*>1<', chart)  # below it
    assert "1 epoch," in chart


def test_curves_are_read_back(workspace):
    rows = cross_validation.read_curves(workspace, "3d_fullres")["0"]
    assert [row.pseudo_dice for row in rows] == [None, 0.2, 0.3]
    assert [row.train_loss for row in rows] == [-0.1, -0.2, -0.3]
    path = run_folder(workspace, "3d_fullres", "0") / "progress.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([["epoch"], ["1"]])
    with pytest.raises(TrainingError, match=r"progress\.csv: not the table of a training"):
        cross_validation.read_curves(workspace, "3d_fullres")


def test_two_labels_have_a_row_and_charts_each(tmp_path):
    image = volume.Volume(np.zeros((4, 20, 20), np.float32), (5.0, 1.0, 1.0))
    labels = np.zeros(image.voxels.shape, np.uint8)
    labels[1, 2:8, 2:8], labels[2, 12:18, 12:18] = 1, 2
    for folder in ("images", "predictions", "references"):
        content = image if folder == "images" else image.with_voxels(labels)
        volume.write(content, tmp_path / folder / "a.nii.gz")
    evaluate.evaluate(tmp_path / "predictions", tmp_path / "references", tmp_path / "evaluation",
                      names=("head", "tail"), workers=1)  # fmt: skip
    words = ["report", "--out", str(tmp_path / "page"), "--not-ct", "--workers", "1"]
    for name in ("evaluation", "images", "predictions", "references"):
        words += [f"--{name}", str(tmp_path / name)]
    assert main(words) == 0
    found = page_in(tmp_path / "page")
    rows = [dict(zip(found.rows[0], row, strict=True)) for row in found.rows if len(row) == 12][1:]
    assert [(row["Label"], row["Dice"]) for row in rows] == [("head", "1.000"), ("tail", "1.000")]
    assert len(found.cards) == 1
    assert found.cards[0]["data-ct"] == "0"


def test_evaluation_of_other_cases_is_refused(workspace):
    (workspace / "report").mkdir()
    label = dataset.load_dataset(workspace).labelled[0].label
    evaluation = summary.load(evaluation_folder(workspace, "3d_fullres"))
    files = [draw.CaseVolumes(f"case_{i}", label, label, label) for i in range(4)]
    context = evaluation_page.Context("t", "s")
    with pytest.raises(TrainingError, match="case_4 is only in the evaluation"):
        draw.write(evaluation, files, workspace / "report", context, is_ct=True, workers=1)


def test_evaluation_of_other_weights_is_refused(workspace, monkeypatch, capsys):
    monkeypatch.setattr(merge, "digest_of_folds", lambda *_: "a digest")
    merge.cross_validate(workspace, "3d_fullres", workers=1)
    assert main(["report", str(workspace), "--workers", "1"]) == 0
    monkeypatch.setattr(merge, "digest_of_folds", lambda *_: "another")
    capsys.readouterr()
    assert main(["report", str(workspace), "--workers", "1"]) == 1
    assert "run `cross-validate --configurations 3d_fullres` again" in capsys.readouterr().err


def test_what_nobody_could_tell_is_not_drawn(workspace, monkeypatch):
    drawn = []
    monkeypatch.setattr(draw, "write_case", lambda *given, **_: drawn.append(given[3]["reference"]))
    case = dataset.load_dataset(workspace).labelled[0]
    reference = volume.read(case.label)
    labels = reference.voxels.copy()
    labels[0, 0, 0] = 2
    volume.write(reference.with_voxels(labels), case.label)
    files = draw.CaseVolumes(case.name, case.images[0], case.label, case.label, ignore_label=2)
    scored_ml = np.count_nonzero(labels == 1) * reference.voxel_ml
    draw.draw_case(files, workspace, True, {case.name: (scored_ml, scored_ml)})
    np.testing.assert_array_equal(drawn[0].voxels, np.where(labels == 2, 0, labels))


def test_no_evaluation_says_which_command_makes_it(tmp_path, capsys):
    make_workspace(tmp_path, cases=2)
    assert main(["report", str(tmp_path)]) == 1
    assert "`cross-validate` makes it" in capsys.readouterr().err


def test_mask_of_another_size_is_refused(workspace, capsys):
    mask = merge.validated_masks(workspace, "3d_fullres")["case_2"]
    found = volume.read(mask)
    volume.write(volume.Volume(found.voxels[1:], found.spacing_mm), mask)
    assert main(["report", str(workspace), "--workers", "1"]) == 1
    assert re.search(r"case_2\S*: shape", capsys.readouterr().err)


def test_masks_that_were_not_scored_are_refused(workspace, capsys):
    """The page of any evaluation, with the voxels to ignore that it was told of."""
    cases = dataset.load_dataset(workspace).labelled
    found, references = workspace / "found", workspace / "references"
    for case in cases:
        reference = volume.read(case.label)
        labels = reference.voxels.copy()
        labels[labels.nonzero()[0].max()] = 0
        volume.write(reference.with_voxels(labels), found / f"{case.name}.mha")
        labels[:] = reference.voxels
        labels[0, 0, :2] = 2
        volume.write(reference.with_voxels(labels), references / f"{case.name}.mha")
    evaluate.evaluate(found, references, workspace / "scores", ignore_label=2, workers=1)
    words = ["report", "--evaluation", str(workspace / "scores"), "--workers", "1", "--images",
             str(cases[0].images[0].parent), "--references", str(references),
             "--predictions"]  # fmt: skip
    assert main([*words, str(found), "--out", str(workspace / "page")]) == 0
    capsys.readouterr()
    assert main([*words, str(references), "--out", str(workspace / "other")]) == 1
    said = capsys.readouterr().err
    assert f"{references}/case_0.mha: " in said
    assert "expected the mask that was scored" in said
    assert not (workspace / "other" / "index.html").exists()


@pytest.mark.parametrize(
    "words",
    [["report"], ["report", "ws", "--evaluation", "e"], ["report", "ws", "--title", "t"],
     ["report", "--evaluation", "e", "--images", "i", "--out", "o"]],
)  # fmt: skip
def test_flags_that_do_not_go_together_are_refused(words, capsys):
    assert main(words) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_missing_image_is_named(tmp_path):
    (tmp_path / "a_0000.nii.gz").touch()
    assert command.find_volumes(tmp_path, ["a"]) == {"a": tmp_path / "a_0000.nii.gz"}
    with pytest.raises(DatasetError, match="no volume of case b"):
        command.find_volumes(tmp_path, ["a", "b"])


def test_selection_stands_on_the_page_while_it_is_of_these_weights(workspace, caplog):
    selected = selection.Selection(
        schema_version=1, cases=5, labels=PLANS.labels[1:], configurations=("3d_fullres",),
        rules=(), mean_dice=0.7, trials=(),
        candidates=(
            selection.Candidate(("2d",), 0.61234, (0.61234,)),
            selection.Candidate(("3d_fullres",), 0.7, (0.7,)),
        ),
        made_from={"3d_fullres": merge.digest_of_folds(workspace, "3d_fullres")},
    )  # fmt: skip
    with replacing(workspace / "selection.json") as temporary:
        temporary.write_text(strict_json.dumps(selected))
    main(["report", str(workspace), "--workers", "1"])
    found = page_in(workspace / "report")
    assert ["3d_fullres", "0.7000", "0.7000", "chosen"] in found.rows
    assert ["2d", "0.6123", "0.6123", ""] in found.rows
    assert not caplog.records
    former = dataclasses.replace(selected, made_from={"3d_fullres": "former weights"})
    (workspace / "selection.json").write_text(strict_json.dumps(former))
    main(["report", str(workspace), "--workers", "1"])
    assert not any("chosen" in row for row in page_in(workspace / "report").rows)
    assert "selection.json: made from other weights, images or labels" in caplog.text
