"""The card of a bundle: what its table says, and that no name breaks it."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from ichseg.model import bundle
from training.bundle import model_card

FOLD = {"epochs": 50, "minutes": 20.4, "checked_cases": 4}


@pytest.fixture
def model():
    shipped = bundle.load_model(Path(__file__).parents[2] / "weights")
    provenance = {
        "dataset": "a|b <c> & {{ d }}", "cases": 7, "recipe": "compact", "checkpoint": "latest",
        "folds": {"0": FOLD, "1": FOLD | {"epochs": 100, "checked_cases": 3}},
        "torch": "2.13.0", "date": "2026-11-25",
    }  # fmt: skip
    plans = dataclasses.replace(shipped.plans, labels=("background", "a|b"))
    return dataclasses.replace(
        shipped, plans=plans, provenance=provenance, rules=(), licence="",
        members=tuple(member for member in shipped.members if member.fold in ("0", "1")),
    )  # fmt: skip


def write(model, folder, notes=""):
    model_card.write(model, folder / "workspace", folder, notes)
    return (folder / "MODEL_CARD.md").read_text().splitlines()


def test_table_by_hand(model, tmp_path):
    lines = write(model, tmp_path)
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    table = dict(row for row in cells if len(row) == 2)
    assert table["3d_fullres"] == (
        "folds 0, 1; 16 x 160 x 144 voxels at 5 x 1.2 x 1.2 mm, 8 to 128 features"
    )
    assert table["training"] == (
        "recipe compact, 50 or 100 epochs, 41 min in all, latest checkpoint"
    )
    assert table["storage"] == (
        "fp16; checked on 3 to 4 validation cases of each fold to change no mean Dice by over 0.001"
    )
    assert lines[-5:-1] == ["None.", "", "## What is not known", ""]


def test_no_name_breaks_the_table_or_is_taken_for_a_template(model, tmp_path):
    lines = write(model, tmp_path)
    assert r"| labels | 0 background, 1 a\|b |" in lines
    assert r"| trained on | a\|b <c> & {{ d }}, 7 cases |" in lines


def test_nothing_is_said_without_an_end(model, tmp_path):
    """One blank line between all parts, none at the end, and no line that ends in a blank."""
    text = "\n".join(write(model, tmp_path)) + "\n"
    assert "\n\n\n" not in text
    assert text.endswith("there.\n")
    assert " \n" not in text


def test_notes_end_the_card_in_place_of_the_general_word(model, tmp_path):
    lines = write(model, tmp_path, "\n## Sources\n\n{{ model.name }} & <b>\n\n")
    assert lines[-5:] == ["None.", "", "## Sources", "", "{{ model.name }} & <b>"]


@pytest.mark.parametrize(
    ("trials", "said"),
    [((), "None."), (("a rule",), "None. No rule that was tried gained anything.")],
)
def test_rules_are_said_to_gain_nothing_where_some_were_tried(
    model, tmp_path, monkeypatch, trials, said
):
    """Of regions none is."""
    chosen = SimpleNamespace(cases=7, mean_dice=0.5, trials=trials)
    monkeypatch.setattr(model_card, "_selection", lambda workspace, model: chosen)
    lines = write(model, tmp_path)
    assert lines[lines.index("## Post-processing") + 2] == said


def test_a_licence_is_told_where_there_is_one(model, tmp_path):
    licensed = dataclasses.replace(model, licence="CC-BY-4.0")
    assert "| licence | CC-BY-4.0 |" in write(licensed, tmp_path)
    assert "licence" not in "\n".join(write(model, tmp_path))
