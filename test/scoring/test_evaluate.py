"""The command from folders to files, and evalutils' part in it."""

import csv
import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
import SimpleITK as sitk
from evalutils.evalutils import ClassificationEvaluation
from evalutils.io import SimpleITKLoader
from evalutils.validators import NumberOfCasesValidator

from ichseg.errors import DatasetError, InputError, TrainingError
from ichseg.scan import volume
from ichseg.scan.volume import Volume
from training.__main__ import main
from training.scoring import compare, summary
from training.scoring.evaluate import evaluate, write_metrics
from training.scoring.measures import score_masks

SPACING_MM = (5.0, 0.5, 0.5)
SHAPE = (3, 12, 12)
STEP = np.s_[1:3, 2:6, 2:6]  # 32 voxels, 0.04 mL

# Fig. 3 of the INSTANCE paper that this project follows: the validation phase, 30 cases.
FIGURE = """"DiceCoefficient": {
  "max": 0.9452558923199176,
  "min": 1.1086474378198733e-08,
  "std": 0.27383900290640034,
  "25pc": 0.7051770403409132,
  "50pc": 0.870306999339498,
  "75pc": 0.9006122723416847,
  "mean": 0.7338595817137015,
  "count": 30.0
}"""


def strict_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def mask(*boxes, values=None):
    voxels = np.zeros(SHAPE, np.uint8)
    for value, box in enumerate(boxes, start=1):
        voxels[box] = values[value - 1] if values else 1
    return voxels


def put(folder, name, voxels, **place):
    volume.write(Volume(voxels, **({"spacing_mm": SPACING_MM} | place)), folder / name)


@pytest.fixture
def folders(tmp_path):
    """Four cases: equal, shifted by a voxel, missed, and without a bleed but with a false one."""
    predictions, references = tmp_path / "predictions", tmp_path / "references"
    shifted = np.s_[1:3, 2:6, 3:7]
    for name, found, present in (
        ("equal_1.nii.gz", mask(STEP), mask(STEP)),
        ("shifted_1.nii.gz", mask(shifted), mask(STEP)),
        ("missed_1.nii.gz", mask(), mask(STEP)),
        ("healthy_1.nii.gz", mask(np.s_[0, 0, 0]), mask()),
    ):
        put(predictions, name, found)
        put(references, name.replace(".nii.gz", ".mha"), present)
    (predictions / "notes.txt").write_text("no volume")
    return predictions, references, tmp_path / "out"


def test_files_of_four_cases(folders, capsys):
    predictions, references, out = folders
    arguments = ["evaluate", "--predictions", str(predictions), "--references", str(references)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of pandas, at what evalutils does
        assert main([*arguments, "--out", str(out), "--workers", "1"]) == 0
    metrics = strict_json(out / "metrics.json")
    cases = metrics["case"]
    names = [cases["pred_fname"][str(i)].split("_")[0] for i in range(4)]
    assert names == ["equal", "healthy", "missed", "shifted"]
    dice = [cases["DiceCoefficient"][str(i)] for i in range(4)]
    assert dice == pytest.approx([1.0, 1e-5, 1e-5 / 32, 48 / 64], rel=1e-5)
    assert [cases["HausdorffDistance"][str(i)] for i in range(4)] == [0.0, None, None, 0.5]
    # evalutils' mean of an infinite value is infinite, which strict JSON cannot say
    assert metrics["aggregates"]["HausdorffDistance"]["mean"] is None
    assert metrics["aggregates"]["HausdorffDistance"]["count"] == 4.0
    assert metrics["aggregates"]["DiceCoefficient"]["mean"] == pytest.approx(np.mean(dice))
    assert metrics["counts"] == {
        "empty": "instance",
        "labels": {
            "1": {
                "cases": 4,
                "empty_references": 1,
                "empty_predictions": 1,
                "both_empty": 0,
                "missed": ["missed_1"],
                "finite": {
                    "DiceCoefficient": 4,
                    "RelativeVolumeDifference": 3,
                    "SurfaceDice": 4,
                    "HausdorffDistance": 2,
                    "HausdorffDistance95": 2,
                },
            }
        },
    }
    with (out / "cases.csv").open() as stream:
        rows = {row["case"]: row for row in csv.DictReader(stream)}
    assert rows["healthy_1"]["hausdorff_mm"] == "inf"
    assert rows["healthy_1"]["relative_volume_difference"] == ""
    assert rows["healthy_1"]["false_lesions"] == "1"
    assert (rows["missed_1"]["missed"], rows["shifted_1"]["missed"]) == ("1", "0")
    assert float(rows["shifted_1"]["overlap_ml"]) == pytest.approx(24 * 1.25e-3)
    printed = capsys.readouterr().out
    assert "missed completely: 1 of 3: missed_1" in printed
    assert "2 of 4, 2 infinite and not in the mean" in printed


@pytest.mark.parametrize(
    ("empty", "distance"), [("diagonal", math.hypot(15, 6, 6)), ("null", None)]
)
def test_policies_for_empty_masks(folders, empty, distance):
    found = evaluate(*folders, empty=empty, workers=1)
    by_name = {case.name: case.labels[0].scores for case in found.cases}
    assert by_name["healthy_1"].hausdorff_mm == distance
    assert by_name["missed_1"].hausdorff_95_mm == distance
    metrics = strict_json(folders[2] / "metrics.json")["aggregates"]["HausdorffDistance"]
    finite = [0.0, 0.5] if distance is None else [0.0, 0.5, distance, distance]
    assert metrics["mean"] == pytest.approx(np.mean(finite))
    assert metrics["count"] == len(finite)


def test_workers_change_nothing(folders):
    predictions, references, out = folders
    one = evaluate(predictions, references, out / "one", workers=1)
    assert evaluate(predictions, references, out / "two", workers=2) == one


def test_evaluation_is_read_back(folders):
    found = evaluate(*folders, empty="null", workers=1)
    assert summary.load(folders[2]) == found
    strict_json(folders[2] / "evaluation.json")


class Plain(ClassificationEvaluation):
    """An evaluation as evalutils' documentation has it: all is evalutils' own but the scores."""

    def score_case(self, *, idx, case):
        paths = case["path_ground_truth"], case["path_prediction"]
        reference, prediction = (sitk.ReadImage(str(path)) for path in paths)
        scores = score_masks(
            *(sitk.GetArrayFromImage(image) > 0 for image in (prediction, reference)),
            SPACING_MM,
            empty="instance",
            diagonal_mm=math.nan,
        )
        dice, volumes, surface, far, far_95 = dataclasses.astuple(scores)
        return {
            "DiceCoefficient": dice,
            "RelativeVolumeDifference": volumes,
            "SurfaceDice": surface,
            "HausdorffDistance": far,
            "HausdorffDistance95": far_95,
            "pred_fname": paths[1].name,
            "gt_fname": paths[0].name,
        }


def test_metrics_are_what_evalutils_itself_writes(tmp_path):
    predictions, references, out = (tmp_path / name for name in ("p", "r", "out"))
    random = np.random.default_rng(5)
    for i in range(1, 8):
        for folder in (predictions, references):
            voxels = random.random(SHAPE) > 0.5
            put(folder, f"case_{i:03}.mha", voxels.astype(np.uint8))
    evaluate(predictions, references, out, workers=1)
    ours = strict_json(out / "metrics.json")
    Plain(
        ground_truth_path=references,
        predictions_path=predictions,
        file_loader=SimpleITKLoader(),
        validators=(NumberOfCasesValidator(num_cases=7),),
        output_file=tmp_path / "theirs.json",
    ).evaluate()
    assert {key: ours[key] for key in ("case", "aggregates")} == strict_json(
        tmp_path / "theirs.json"
    )


def test_figure_of_the_paper_to_the_character(tmp_path):
    values = json.loads("{" + FIGURE + "}")["DiceCoefficient"]
    shuffled = dict(sorted(values.items()))
    assert list(shuffled) != list(values)
    write_metrics({"case": {}, "aggregates": {"DiceCoefficient": shuffled}}, tmp_path / "m.json")
    lines = (tmp_path / "m.json").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if "DiceCoefficient" in line)
    margin = len(lines[first]) - len(lines[first].lstrip())
    assert "\n".join(line[margin:] for line in lines[first : first + 10]) == FIGURE


def test_several_labels(tmp_path):
    predictions, references, out = (tmp_path / name for name in ("p", "r", "out"))
    far = np.s_[0, 8:12, 8:12]
    put(predictions, "a.mha", mask(STEP, far, values=[1, 2]))
    put(references, "a.mha", mask(STEP, far, values=[1, 3]))
    put(predictions, "b.mha", mask(STEP, values=[3]))
    put(references, "b.mha", mask(STEP, values=[3]))
    found = evaluate(predictions, references, out, empty="null", workers=1)
    assert found.labels == ("1", "2", "3")
    dice = {c.name: [s.scores.dice for s in c.labels] for c in found.cases}
    assert dice["a"] == [1.0, pytest.approx(0, abs=1e-5), pytest.approx(0, abs=1e-5)]
    assert dice["b"] == [None, None, 1.0]
    cases = strict_json(out / "metrics.json")["case"]
    assert cases["DiceCoefficient_3"]["1"] == 1.0
    assert cases["DiceCoefficient"]["0"] == pytest.approx(1 / 3, abs=1e-5)
    assert cases["DiceCoefficient"]["1"] == 1.0  # of the labels that are defined
    named = evaluate(predictions, references, out, names=("ich", "oedema", "csf"), workers=1)
    assert [s.label for s in named.summaries] == ["ich", "oedema", "csf"]
    assert named.summaries[2].missed == ("a",)


def test_all_masks_empty(tmp_path):
    for folder in ("p", "r"):
        put(tmp_path / folder, "a.mha", mask())
        put(tmp_path / folder, "b.mha", mask())  # two equal images, as evalutils may refuse
    found = evaluate(tmp_path / "p", tmp_path / "r", tmp_path / "out", workers=1)
    assert [case.labels[0].scores.dice for case in found.cases] == [1.0, 1.0]
    assert found.summaries[0].both_empty == 2


def refused(folders, **options):
    with pytest.raises((DatasetError, InputError)) as caught:
        evaluate(*folders, workers=1, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_cases_without_a_partner(folders):
    predictions, references, _ = folders
    (predictions / "equal_1.nii.gz").unlink()
    text = refused(folders)
    assert text == f"{predictions}: no prediction for equal_1 (1 of 4 cases)"
    put(predictions, "equal_1.nii.gz", mask(STEP))
    (references / "healthy_1.mha").unlink()
    text = refused(folders)
    assert text.endswith(f"predictions without a reference in {references}: healthy_1")


def test_a_case_twice(folders):
    put(folders[0] / "more", "missed_1.mha", mask())
    assert f"missed_1.mha: the same case as {folders[0]}/missed_1.nii.gz" in refused(folders)


def test_folders_without_volumes(folders):
    predictions, references, out = folders
    assert refused((predictions / "none", references, out)).endswith("none: no such folder")
    (out / "bare").mkdir(parents=True)
    assert "no volumes, expected files .mha, .nii.gz" in refused((predictions, out / "bare", out))


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ({"spacing_mm": (5.0, 0.5, 0.6)}, "spacing 5, 0.5, 0.6, expected 5, 0.5, 0.5 as"),
        ({"origin_mm": (0.0, 3.0, 0.0)}, "origin 0, 3, 0, expected 0, 0, 0 as"),
        ({"direction": (1, 0, 0, 0, -1, 0, 0, 0, -1)}, "direction 1, 0, 0, 0, -1"),
    ],
)
def test_places_that_differ(folders, place, text):
    put(folders[0], "missed_1.nii.gz", mask(), **place)
    assert f"missed_1.nii.gz: {text}" in refused(folders)


def test_sizes_that_differ(folders):
    put(folders[0], "missed_1.nii.gz", mask()[:2])
    put(folders[0], "shifted_1.nii.gz", mask()[:2])
    text = refused(folders)
    assert "missed_1.nii.gz: size 2x12x12, expected 3x12x12 as" in text
    assert text.endswith("(and 1 more cases)")


@pytest.mark.parametrize(
    ("voxels", "names", "text"),
    [
        (np.full(SHAPE, 255, np.uint8), None, "values 255..255, expected whole labels 0..63"),
        (np.full(SHAPE, 2, np.uint8), ("ich",), "values 2..2, expected whole labels 0..1"),
        (np.full(SHAPE, -1, np.int16), None, "values -1..-1, expected whole labels 0..63"),
        (np.full(SHAPE, 0.5, np.float32), None, "values 0.5..0.5 that are not all whole"),
    ],
)
def test_values_that_are_no_labels(folders, voxels, names, text):
    put(folders[0], "equal_1.nii.gz", voxels)
    assert text in refused(folders, names=names)


def test_label_names_that_are_none(folders, capsys):
    predictions, references, out = folders
    arguments = ["evaluate", "--predictions", str(predictions), "--references", str(references)]
    assert main([*arguments, "--out", str(out), "--labels", "a,,b"]) == 1
    assert "--labels a,,b: expected different names" in capsys.readouterr().err


def test_merging_evaluations(folders):
    found = evaluate(*folders, workers=1)
    halves = [summary.make_evaluation(found.cases[i::2], None, "instance") for i in (0, 1)]
    merged = [case for half in halves for case in half.cases]
    assert summary.make_evaluation(merged, None, "instance") == found
    with pytest.raises(TrainingError, match="cases scored twice: equal_1"):
        summary.make_evaluation([*merged, found.cases[0]], None, "instance")
    with pytest.raises(TrainingError, match="no cases"):
        summary.make_evaluation([], None, "instance")


def test_voxels_that_nobody_could_tell_count_nowhere(tmp_path):
    """Of the reference's 32 voxels 8 are hidden; found are 12 of the other 24, and hidden ones."""
    predictions, references = tmp_path / "predictions", tmp_path / "references"
    present = mask(STEP)
    present[2, 2:6, 2:4] = 2  # 8 of the 32 voxels
    present[0, :4, :4] = 2  # and 16 of the background
    found = mask(np.s_[1, 2:6, 2:5])  # 12 of the 16 in that slice
    found[present == 2] = 1
    put(predictions, "a.nii.gz", found)
    put(references, "a.nii.gz", present)
    scored = evaluate(
        predictions, references, tmp_path / "out", names=("bleed",), ignore_label=2, workers=1
    )
    (label,) = scored.cases[0].labels
    assert label.scores.dice == pytest.approx((2 * 12 + 1e-5) / (12 + 24 + 1e-5))
    assert label.scores.relative_volume_difference == pytest.approx(0.5)
    assert (label.reference_ml, label.predicted_ml) == pytest.approx((24 * 1.25e-3, 12 * 1.25e-3))
    assert len(label.predicted_lesions) == 1
    same = evaluate(predictions, references, tmp_path / "all", ignore_label=2, workers=1)
    assert same.labels == ("1",)
    assert same.cases[0].labels[0].scores == label.scores
    assert summary.load(tmp_path / "out").ignore_label == 2
    with pytest.raises(TrainingError, match="A leaves out the voxels of label 2, B those of None"):
        compare.compare(same, dataclasses.replace(same, ignore_label=None))


@pytest.mark.parametrize(("names", "ignored"), [(("bleed",), 3), (("bleed",), 1), (None, 1)])
def test_the_label_to_ignore_is_the_highest(folders, names, ignored):
    predictions, references, out = folders
    with pytest.raises(TrainingError, match="expected the one above all labels"):
        evaluate(predictions, references, out, names=names, ignore_label=ignored)


def test_a_prediction_may_not_have_the_label_to_ignore(tmp_path):
    put(tmp_path / "predictions", "a.nii.gz", mask(STEP, values=[2]))
    put(tmp_path / "references", "a.nii.gz", mask(STEP, values=[2]))
    with pytest.raises(
        InputError, match=r"predictions.*values 0\.\.2, expected whole labels 0\.\.1"
    ):
        evaluate(
            tmp_path / "predictions", tmp_path / "references", tmp_path / "out",
            ignore_label=2, workers=1,
        )  # fmt: skip


def test_regions_are_scored_by_the_labels_that_they_hold(tmp_path, capsys):
    """The core is called bleed: the bleed, both labels, is found whole, and the core not at all."""
    core = np.s_[1, 2:4, 2:4]  # 4 of the 32 voxels
    put(tmp_path / "p", "a.nii.gz", mask(STEP))
    put(tmp_path / "r", "a.nii.gz", mask(STEP, core, values=[1, 2]))
    arguments = ["evaluate", "--predictions", tmp_path / "p", "--references", tmp_path / "r"]
    arguments += ["--out", tmp_path / "out", "--labels", "bleed=1+2,core=2", "--workers", 1]
    assert main(list(map(str, arguments))) == 0
    found = summary.load(tmp_path / "out")
    assert found.labels == ("bleed", "core")
    bleed, core_score = found.cases[0].labels
    assert bleed.scores.dice == 1.0
    assert bleed.reference_ml == pytest.approx(32 * 1.25e-3)
    assert (core_score.predicted_ml, core_score.reference_ml) == (0, pytest.approx(4 * 1.25e-3))
    assert core_score.missed
    with pytest.raises(InputError, match=r"values 0\.\.2, expected whole labels 0\.\.1"):
        evaluate(
            tmp_path / "p", tmp_path / "r", tmp_path / "out", names=("bleed",), held=((1,),),
            workers=1,
        )  # fmt: skip


def test_a_label_that_is_nowhere_is_not_shown_as_perfect(folders, capsys):
    predictions, references, out = folders
    arguments = ["evaluate", "--predictions", predictions, "--references", references]
    arguments += ["--out", out, "--labels", "bleed,oedema", "--workers", 1]
    assert main(list(map(str, arguments))) == 0
    bleed, oedema = capsys.readouterr().out.split("\n\nlabel oedema")
    assert "label bleed: 4 cases, 3 with it" in bleed
    assert oedema.startswith(
        ": in none of the 4 references and nowhere found, which scores as --empty instance has it"
    )
    assert "1.0000" not in oedema


@pytest.mark.parametrize("text", ["a=1+x,b=2", "a=1,b", "a=0,b=1", "a=,b=1", "a=1+,b=2"])
def test_regions_without_their_labels(folders, capsys, text):
    predictions, references, out = folders
    arguments = ["evaluate", "--predictions", str(predictions), "--references", str(references)]
    assert main([*arguments, "--out", str(out), "--labels", text]) == 1
    assert f"--labels {text}: expected the labels that each region holds" in capsys.readouterr().err
