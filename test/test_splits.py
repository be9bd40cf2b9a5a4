"""Folds of the cross-validation."""

import json

import pytest
from sklearn.model_selection import KFold

from ichseg.errors import DatasetError, PlansError
from training.splits import Split, load_or_make_splits, make_splits


@pytest.mark.parametrize("count", [5, 6, 9, 100, 203])
def test_equal_to_scikit_learn(count):
    names = [f"case_{i:03d}" for i in range(count)]
    expected = [
        Split(tuple(names[i] for i in train), tuple(names[i] for i in validation))
        for train, validation in KFold(5, shuffle=True, random_state=12345).split(names)
    ]
    assert list(make_splits(names[::-1])) == expected  # order of names does not matter


def test_each_case_validates_once():
    names = [f"c{i}" for i in range(13)]
    splits = make_splits(names)
    assert sorted(name for split in splits for name in split.validation) == sorted(names)
    for split in splits:
        assert sorted(split.train + split.validation) == sorted(names)


def test_too_few_cases():
    with pytest.raises(DatasetError, match="4 cases cannot make 5 folds"):
        make_splits(["a", "b", "c", "d"])


def test_made_once_then_read(tmp_path):
    names = [f"c{i}" for i in range(10)]
    made = load_or_make_splits(tmp_path, names)
    assert made == make_splits(names)
    before = (tmp_path / "splits.json").read_bytes()
    assert load_or_make_splits(tmp_path, names) == made
    assert (tmp_path / "splits.json").read_bytes() == before


def write(folder, *folds):
    content = {
        "schema_version": 1,
        "folds": [{"train": train, "validation": validation} for train, validation in folds],
    }
    (folder / "splits.json").write_text(json.dumps(content))


def test_the_users_file_wins(tmp_path):
    write(tmp_path, (["a"], ["b"]))
    assert load_or_make_splits(tmp_path, ["a", "b", "c"]) == (Split(("a",), ("b",)),)


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        ([], "no folds"),
        ([(["a"], ["z"])], r"fold 0 names cases the dataset lacks: \['z'\]"),
        (
            [(["a"], ["b"]), (["a", "b"], ["b"])],
            r"fold 1 trains on its own validation cases \['b'\]",
        ),
        ([(["a"], [])], "fold 0 has no cases"),
    ],
)
def test_refusals(tmp_path, folds, message):
    write(tmp_path, *folds)
    with pytest.raises(DatasetError, match=message):
        load_or_make_splits(tmp_path, ["a", "b"])


def test_another_schema_is_refused(tmp_path):
    (tmp_path / "splits.json").write_text('{"schema_version": 2, "folds": []}')
    with pytest.raises(PlansError, match="splits schema 2, this code reads 1"):
        load_or_make_splits(tmp_path, ["a", "b"])
