"""Two evaluations of the same cases against each other."""

import dataclasses
import json
import math

import pytest

from ichseg.errors import TrainingError
from training.__main__ import main
from training.scoring import summary
from training.scoring.compare import compare
from training.scoring.lesions import Lesion
from training.scoring.measures import Scores
from training.scoring.scores import CaseScore, LabelScore


def evaluation(dice, *, hausdorff=10.0, reference_ml=4.0, empty="instance"):
    """One case for each Dice; all else is the same, but the first case's Hausdorff distance."""
    lesions = (Lesion(reference_ml, 1.0),)
    cases = [
        CaseScore(
            f"case_{i}",
            f"case_{i}.mha",
            f"case_{i}.mha",
            (
                LabelScore(
                    "1",
                    Scores(value, 0.1, 0.5, hausdorff if i == 0 else 10.0, 5.0),
                    reference_ml, 3.0, 1.0, lesions, lesions,
                ),
            ),
        )
        for i, value in enumerate(dice)
    ]  # fmt: skip
    return summary.make_evaluation(cases, ("1",), empty)


def test_paired_differences():
    a = evaluation([0.5, 0.6, 0.7, 0.8, 0.9, 0.4])
    b = evaluation([0.6, 0.8, 1.0, 0.4, 0.9, 0.9], hausdorff=7.0)
    found = {difference.measure: difference for difference in compare(a, b)}
    dice = found["dice"]
    assert (dice.pairs, dice.better, dice.equal, dice.worse) == (6, 4, 1, 1)
    assert dice.mean == pytest.approx((0.1 + 0.2 + 0.3 - 0.4 + 0.5) / 6)
    assert dice.mean_b - dice.mean_a == pytest.approx(dice.mean)
    assert dice.low < dice.mean < dice.high
    # Ranks 1, 2, 3, 5 against rank 4: of 32 ways to give signs 7 have a rank sum up to 4.
    assert dice.p == pytest.approx(2 * 7 / 32)
    far = found["hausdorff_mm"]
    assert (far.better, far.worse, far.mean) == (1, 0, -0.5)  # a smaller distance is better
    assert (found["surface_dice"].p, found["surface_dice"].equal) == (None, 6)


def test_what_is_not_finite_is_left_out_and_counted():
    a = evaluation([0.5, 0.6, 0.7], hausdorff=math.inf)
    b = evaluation([0.5, 0.6, None], hausdorff=7.0)
    found = {difference.measure: difference for difference in compare(a, b)}
    assert (found["hausdorff_mm"].pairs, found["hausdorff_mm"].left_out) == (2, 1)
    assert (found["dice"].pairs, found["dice"].left_out, found["dice"].mean) == (2, 1, 0.0)


def test_command(tmp_path, capsys):
    summary.save(evaluation([0.5, 0.61, 0.7]), tmp_path / "a")
    summary.save(evaluation([0.5, 0.65, 0.2], hausdorff=math.inf), tmp_path / "b")
    arguments = ["compare", str(tmp_path / "a"), str(tmp_path / "b")]
    assert main([*arguments, "--out", str(tmp_path / "c.json")]) == 0
    printed = capsys.readouterr().out
    assert "case_2  0.7000 to 0.2000\n  case_1  0.6100 to 0.6500\n" in printed
    assert "1/1/1" in printed
    assert "0/2/0, 1 left out" in printed
    written = json.loads((tmp_path / "c.json").read_text())["differences"]
    assert written[0]["mean"] == pytest.approx((0.04 - 0.5) / 3)


def test_what_cannot_be_compared():
    a = evaluation([0.5, 0.6])
    with pytest.raises(TrainingError, match="empty masks by instance, B by null"):
        compare(a, evaluation([0.5, 0.6], empty="null"))
    with pytest.raises(TrainingError, match="1 cases are in one evaluation only, such as case_2"):
        compare(a, evaluation([0.5, 0.6, 0.7]))
    with pytest.raises(TrainingError, match="case_0: its reference has 4 mL in A and 5 mL in B"):
        compare(a, evaluation([0.5, 0.6], reference_ml=5.0))
    with pytest.raises(TrainingError, match="A has the labels"):
        compare(a, dataclasses.replace(a, labels=("ich",)))


def test_the_command_says_which_cannot_be_compared(tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    summary.save(evaluation([0.5]), a)
    summary.save(dataclasses.replace(evaluation([0.5]), labels=("ich",)), b)
    assert main(["compare", str(a), str(b), "--out", str(tmp_path / "c.json")]) == 1
    said = capsys.readouterr()
    assert said.err == (
        f"error: A, {a}, and B, {b}: A has the labels 1, B ich, expected the same; "
        "`evaluate --labels` names them\n"
    )
    assert said.out == ""
    assert not (tmp_path / "c.json").exists()


def test_no_evaluation(tmp_path, capsys):
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 1
    assert "evaluation.json: no such file; make it with" in capsys.readouterr().err
