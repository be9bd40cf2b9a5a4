"""Folds of the cross-validation."""

import json

import numpy as np
import pytest
from sklearn.model_selection import GroupKFold, KFold

from ichseg.errors import DatasetError, PlansError
from training.data.splits import Split, find_splits, load_or_make_splits, make_splits, read_groups


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


@pytest.mark.parametrize("count", [5, 23, 100])
def test_groups_of_one_case_change_nothing(count):
    names = [f"case_{i:03d}" for i in range(count)]
    groups = {name: f"patient_{name[::-1]}" for name in names}
    assert make_splits(names, groups) == make_splits(names)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_groups_equal_to_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    names = [f"case_{i:03d}" for i in range(60)]
    numbers = rng.integers(0, 25, 60)
    groups = {name: f"p{number}" for name, number in zip(names, numbers, strict=True)}
    order = list(dict.fromkeys(numbers.tolist()))  # numbered by first appearance
    codes = [order.index(number) for number in numbers.tolist()]
    folds = GroupKFold(5, shuffle=True, random_state=12345).split(names, groups=codes)
    expected = [
        Split(tuple(names[i] for i in train), tuple(names[i] for i in validation))
        for train, validation in folds
    ]
    assert list(make_splits(names[::-1], groups)) == expected


def test_a_group_stays_together():
    names = [f"c{i}" for i in range(9)]
    groups = dict(zip(names, "aabbccdde", strict=True))
    for split in make_splits(names, groups):
        assert not {groups[n] for n in split.train} & {groups[n] for n in split.validation}
        assert sorted(split.train + split.validation) == names


def test_too_few_groups():
    names = [f"c{i}" for i in range(9)]
    with pytest.raises(DatasetError, match="3 groups of 9 cases cannot make 5 folds"):
        make_splits(names, dict(zip(names, "aaabbbccc", strict=True)))


def write_table(path, *rows):
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


def test_table_of_groups_decides_the_folds(tmp_path):
    names = [f"c{i}" for i in range(10)]
    rows = [f"c{i},p{i // 2}" for i in range(10)]
    write_table(tmp_path / "groups.csv", "case,group", *rows)
    made = load_or_make_splits(tmp_path, names)
    assert made == make_splits(names, {f"c{i}": f"p{i // 2}" for i in range(10)})
    assert made != make_splits(names)
    assert load_or_make_splits(tmp_path, names) == made


def test_the_users_file_wins_over_groups_but_is_remarked_upon(tmp_path, caplog):
    write_table(tmp_path / "groups.csv", "case,group", "a,p", "b,p", "c,q")
    write(tmp_path, (["a"], ["c"]), (["a"], ["b"]))
    assert load_or_make_splits(tmp_path, ["a", "b", "c"])[1] == Split(("a",), ("b",))
    (record,) = caplog.records
    assert record.getMessage().endswith("fold 1 trains and validates on cases of p")


def test_cases_that_several_folds_validate_are_told_before_anything_is_trained(tmp_path, caplog):
    """`cross-validate` refuses them, after all folds have been trained."""
    folds = [{"train": ["a"], "validation": ["b", "c"]}, {"train": ["b"], "validation": ["c"]}]
    (tmp_path / "splits.json").write_text(json.dumps({"schema_version": 1, "folds": folds}))
    assert len(find_splits(tmp_path, ["a", "b", "c"])) == 2
    assert "several folds validate on 1 cases, such as c" in caplog.text


def test_find_writes_nothing(tmp_path):
    names = [f"c{i}" for i in range(10)]
    assert find_splits(tmp_path, names) == make_splits(names)
    assert list(tmp_path.iterdir()) == []


def test_read_groups(tmp_path):
    path = write_table(
        tmp_path / "g.csv", "\ufeffcase, group", 'a, "p 1"', "", "b,p2", "other,p2", "b,p2"
    )
    assert read_groups(path, ["b", "a"]) == {"a": "p 1", "b": "p2"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"begins with 'nothing', expected the header 'case,group'"),
        (["case;group", "a;p"], "begins with 'case;group', expected the header 'case,group'"),
        (["case,group", "a"], r"row 2 is 'a', expected case,group"),
        (["case,group", "a,p", "b,"], r"row 3 is 'b,', expected case,group"),
        (["case,group", "a,p,q"], r"row 2 is 'a,p,q', expected case,group"),
        (["case,group", "a,p", "a,q", "b,q"], "row 3 puts case a into q, an earlier one into p"),
        (["case,group", "a,p"], "1 of 2 cases have no group: b"),
    ],
)
def test_read_groups_refuses(tmp_path, rows, message):
    with pytest.raises(DatasetError, match=message):
        read_groups(write_table(tmp_path / "g.csv", *rows), ["a", "b"])


def test_read_groups_refuses_what_is_no_table(tmp_path):
    with pytest.raises(DatasetError, match=r"g\.csv: cannot read as a table"):
        read_groups(tmp_path / "g.csv", [])
    (tmp_path / "g.csv").write_bytes(b"case,group\n\xff\xfe,p\n")
    with pytest.raises(DatasetError, match=r"g\.csv: cannot read as a table"):
        read_groups(tmp_path / "g.csv", [])


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
        ([(["a", "a"], ["b"])], r"fold 0 trains on \['a'\] more than once"),
        ([(["a"], ["b", "b"])], r"fold 0 validates on \['b'\] more than once"),
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


def test_folds_as_nnunet_writes_them_are_refused_by_the_keys_that_are_expected(tmp_path):
    (tmp_path / "splits.json").write_text('[{"train": ["a"], "val": ["b"]}]')
    message = r"splits\.json: found list, expected an object with folds, schema_version$"
    with pytest.raises(PlansError, match=message):
        load_or_make_splits(tmp_path, ["a", "b"])


NAMES = [f"c{i}" for i in range(10)]
PAIRS = ["case,group", *(f"c{i},p{i // 2}" for i in range(10))]


def train(folder, fold="0"):
    """What is left of a training."""
    path = folder / "runs" / "3d_fullres" / f"fold_{fold}" / "checkpoint_latest.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"weights")


def test_lost_folds_of_trained_networks_are_not_made_anew(tmp_path):
    """Else ``groups.csv`` would deal the cases out otherwise, and networks meet them again."""
    load_or_make_splits(tmp_path, NAMES)
    kept = (tmp_path / "splits.json").read_bytes()
    train(tmp_path)
    write_table(tmp_path / "groups.csv", *PAIRS)
    (tmp_path / "splits.json").unlink()
    for find in (load_or_make_splits, find_splits):
        with pytest.raises(DatasetError, match=r"splits\.json: missing, but .*fold_0 was trained"):
            find(tmp_path, NAMES)
    assert not (tmp_path / "splits.json").exists()
    (tmp_path / "groups.csv").unlink()
    (tmp_path / "splits.json").write_bytes(kept)
    assert load_or_make_splits(tmp_path, NAMES) == make_splits(NAMES)


def test_a_network_trained_on_all_cases_needs_no_folds(tmp_path):
    train(tmp_path, "all")
    assert load_or_make_splits(tmp_path, NAMES) == make_splits(NAMES)


def test_folds_are_made_anew_for_new_groups_and_cases_while_nothing_is_trained(tmp_path, caplog):
    load_or_make_splits(tmp_path, NAMES)
    write_table(tmp_path / "groups.csv", *PAIRS)
    groups = {f"c{i}": f"p{i // 2}" for i in range(10)}
    before = (tmp_path / "splits.json").read_bytes()
    assert find_splits(tmp_path, NAMES) == make_splits(NAMES, groups)
    assert (tmp_path / "splits.json").read_bytes() == before
    assert load_or_make_splits(tmp_path, NAMES) == make_splits(NAMES, groups)
    assert "cases or groups have changed since; the folds are made anew" in caplog.text
    caplog.clear()
    assert load_or_make_splits(tmp_path, NAMES) == make_splits(NAMES, groups)
    assert caplog.text == ""
    (tmp_path / "groups.csv").unlink()
    assert load_or_make_splits(tmp_path, NAMES[:7]) == make_splits(NAMES[:7])


def test_groups_that_come_after_a_training_must_not_be_torn(tmp_path):
    load_or_make_splits(tmp_path, NAMES)
    train(tmp_path)
    write_table(tmp_path / "groups.csv", *PAIRS)
    with pytest.raises(DatasetError, match=r"fold_0 was trained by it: fold 0 trains and valid"):
        load_or_make_splits(tmp_path, NAMES)
    write_table(tmp_path / "groups.csv", "case,group", *(f"c{i},p{i}" for i in range(10)))
    assert load_or_make_splits(tmp_path, NAMES) == make_splits(NAMES)


def test_cases_that_come_after_a_training_are_in_no_fold(tmp_path, caplog):
    load_or_make_splits(tmp_path, NAMES)
    train(tmp_path)
    assert load_or_make_splits(tmp_path, [*NAMES, "d", "e"]) == make_splits(NAMES)
    assert "2 cases came after the folds were made, such as d" in caplog.text


def test_folds_that_a_user_has_altered_are_the_users(tmp_path):
    load_or_make_splits(tmp_path, NAMES)
    raw = json.loads((tmp_path / "splits.json").read_text())
    raw["folds"] = raw["folds"][:2]
    (tmp_path / "splits.json").write_text(json.dumps(raw))
    assert load_or_make_splits(tmp_path, [*NAMES, "d"]) == make_splits(NAMES)[:2]
