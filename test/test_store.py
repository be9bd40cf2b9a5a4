"""The store of preprocessed cases."""

import json

import numpy as np
import pytest

from ichseg.errors import DatasetError, PlansError
from training import store
from training.store import is_complete, list_cases, open_case, sample_foreground, write_case


def example(seed=0, shape=(4, 6, 5)):
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(2, *shape)).astype(np.float32)
    target = rng.integers(-1, 3, shape).astype(np.int8)
    return data, target


def test_what_is_written_is_read(tmp_path):
    data, target = example()
    write_case(tmp_path / "store", "case_1", data, target)
    case = open_case(tmp_path / "store", "case_1")
    np.testing.assert_array_equal(case.data, data)
    np.testing.assert_array_equal(case.target, target)
    assert case.data.dtype == np.float32
    assert case.target.dtype == np.int8
    assert isinstance(case.data, np.memmap)  # voxels are read only where they are indexed
    assert isinstance(case.target, np.memmap)
    assert sorted(case.foreground) == [1, 2]
    for label, found in case.foreground.items():
        np.testing.assert_array_equal(found, np.argwhere(target == label))
    meta = store.load_meta(tmp_path / "store", "case_1")
    assert meta.shape == (2, 4, 6, 5)
    assert dict(zip(meta.labels, meta.voxels, strict=True)) == {
        label: int((target == label).sum()) for label in (1, 2)
    }


def test_a_case_without_foreground(tmp_path):
    data, target = example()
    write_case(tmp_path, "negative", data, np.zeros_like(target))
    assert open_case(tmp_path, "negative").foreground == {}


def test_the_same_case_gives_the_same_bytes(tmp_path):
    data, target = example()
    for folder in ("one", "two"):
        write_case(tmp_path / folder, "a", data, target)
    for suffix in (".data.npy", ".target.npy", ".json"):
        one, two = (tmp_path / folder / f"a{suffix}" for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_no_temporary_file_is_left(tmp_path):
    write_case(tmp_path, "a", *example())
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a.data.npy", "a.target.npy", "a.foreground.npz", "a.json"}


@pytest.mark.parametrize("suffix", [".data.npy", ".target.npy", ".foreground.npz", ".json"])
def test_a_case_counts_only_when_whole(tmp_path, suffix):
    write_case(tmp_path, "a", *example())
    write_case(tmp_path, "b", *example(1))
    assert list_cases(tmp_path) == ("a", "b")
    (tmp_path / f"a{suffix}").unlink()
    assert not is_complete(tmp_path, "a")
    assert list_cases(tmp_path) == ("b",)
    with pytest.raises(DatasetError, match="no finished case a"):
        open_case(tmp_path, "a")


def test_an_interrupted_rewrite_is_not_a_finished_case(tmp_path, monkeypatch):
    write_case(tmp_path, "a", *example())

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(KeyboardInterrupt):
        write_case(tmp_path, "a", *example(1))
    assert not is_complete(tmp_path, "a")


def test_other_files_are_no_cases(tmp_path):
    write_case(tmp_path, "a", *example())
    (tmp_path / ".preprocessing.json").write_text("{}")
    (tmp_path / "b.json").write_text("{}")
    assert list_cases(tmp_path) == ("a",)
    assert list_cases(tmp_path / "missing") == ()


def test_all_of_a_small_label_and_a_sample_of_a_large_one():
    target = np.zeros((20, 60, 60), np.int8)
    target[:8] = 1  # 28 800 voxels: 10 000 are kept
    target[9, :5, :5] = 2  # 25 voxels: all
    foreground, counts = sample_foreground(target)
    assert counts == {1: 28_800, 2: 25}
    assert foreground[1].shape == (10_000, 3)
    assert len(np.unique(foreground[1], axis=0)) == 10_000  # without replacement
    assert (target[tuple(foreground[1].T)] == 1).all()
    np.testing.assert_array_equal(foreground[2], np.argwhere(target == 2))
    assert foreground[1].dtype == np.int16


def test_one_percent_of_a_very_large_label():
    target = np.ones((1, 1_000, 1_050), np.int8)
    foreground, _ = sample_foreground(target)
    assert len(foreground[1]) == 10_500


def test_coordinates_beyond_int16():
    target = np.zeros((1, 1, 40_000), np.int8)
    target[0, 0, 39_999] = 1
    foreground, _ = sample_foreground(target)
    np.testing.assert_array_equal(foreground[1], [[0, 0, 39_999]])


@pytest.mark.parametrize(
    ("data", "target", "message"),
    [
        (np.zeros((1, 2, 2, 2)), np.zeros((2, 2, 2), np.int8), "data is float64"),
        (np.zeros((2, 2, 2), np.float32), np.zeros((2, 2, 2), np.int8), r"expected float32 \(C,"),
        (np.zeros((1, 2, 2, 2), np.float32), np.zeros((2, 2, 2)), "target is float64"),
        (np.zeros((1, 2, 2, 2), np.float32), np.zeros((2, 2, 3), np.int8), r"int8 \(2, 2, 2\)"),
    ],
)
def test_write_refuses(tmp_path, data, target, message):
    with pytest.raises(DatasetError, match=message):
        write_case(tmp_path, "a", data, target)
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named(tmp_path):
    data, target = example()
    write_case(tmp_path, "a", data, target)
    (tmp_path / "a.data.npy").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match="case a is damaged"):
        open_case(tmp_path, "a")
    write_case(tmp_path, "a", data, target)
    np.save(tmp_path / "a.target.npy", target[:2])
    with pytest.raises(DatasetError, match=r"case a has shapes .* expected \(2, 4, 6, 5\)"):
        open_case(tmp_path, "a")
    meta = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps({**meta, "schema_version": 7}))
    with pytest.raises(PlansError, match="store schema 7, this code reads 1"):
        open_case(tmp_path, "a")
