import dataclasses

import pytest
from helpers.batches import spec_of
from helpers.workspaces import make_workspace

from ichseg.errors import TrainingError
from training.batches import hard_examples
from training.batches.augmentation import NO_AUGMENTATION
from training.batches.hard_examples import HardExample
from training.batches.sampling import BatchKey, draw_batch

SIZE = (8, 24, 24)
EXAMPLES = (
    HardExample("case_0", "false", (1, 3, 20), SIZE, 0.25),
    HardExample("case_2", "missed", (5, 9, 4), SIZE, 1.5),
    HardExample("case_2", "false", (0, 23, 23), SIZE, 0.05),
)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "hard_examples.csv"
    hard_examples.write(path, EXAMPLES)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("hard")) / "preprocessed" / "3d_fullres"


@pytest.fixture
def spec(folder, table):
    return spec_of(
        folder,
        train=("case_0", "case_1", "case_2"),
        patch=(2, 4, 4),
        augmentation=NO_AUGMENTATION,
        hard_fraction=1.0,
        hard_examples=table,
    )


def draws(spec, sample, *, validation=False, count=300):
    keys = [BatchKey(0, number, validation) for number in range(count)]
    return [draw_batch(spec, key)[sample] for key in keys]


def holds(spec, draw, voxel):
    return all(
        low <= at < low + size for low, at, size in zip(draw.lower, voxel, spec.tile, strict=True)
    )


def test_what_is_written_is_read(table):
    found = hard_examples.read(table)
    assert found == {"case_0": EXAMPLES[:1], "case_2": EXAMPLES[1:]}


def test_every_other_patch_holds_an_error_and_cases_are_as_likely_as_another(spec):
    found = draws(spec, 0)
    cases = [draw.name for draw in found]
    assert set(cases) == {"case_0", "case_2"}
    assert cases.count("case_0") == pytest.approx(150, abs=30)
    for draw in found:
        assert any(e.case == draw.name and holds(spec, draw, e.voxel) for e in EXAMPLES)
    for example in EXAMPLES[1:]:  # both of the second case
        assert any(d.name == "case_2" and holds(spec, d, example.voxel) for d in found)


def test_jitter_moves_the_error_about_in_its_patch(spec):
    wide = dataclasses.replace(spec, patch=(4, 8, 8))
    fixed = {draw.lower for draw in draws(wide, 0) if draw.name == "case_0"}
    moved = {
        d.lower for d in draws(dataclasses.replace(wide, centre_jitter=1.0), 0)
        if d.name == "case_0"
    }  # fmt: skip
    assert len(fixed) == 1
    assert len(moved) > 10


def test_patches_on_foreground_and_for_validation_stay_as_they_are(spec):
    plain = dataclasses.replace(spec, hard_fraction=0.0, hard_examples=None)
    for sample, validation in ((1, False), (0, True), (1, True)):
        ours, usual = (
            [(d.name, d.lower) for d in draws(s, sample, validation=validation)]
            for s in (spec, plain)
        )
        assert ours == usual


def test_a_third_of_the_patches_are_drawn_on_errors(spec):
    third = dataclasses.replace(spec, hard_fraction=1 / 3, train=("case_1",))
    cases = [draw.name for draw in draws(third, 0)]
    assert 1 - cases.count("case_1") / 300 == pytest.approx(1 / 3, abs=0.09)


def test_a_network_without_errors_trains_as_usual(spec, tmp_path):
    hard_examples.write(tmp_path / "none.csv", ())
    none = dataclasses.replace(spec, hard_examples=tmp_path / "none.csv", train=("case_1",))
    assert {draw.name for draw in draws(none, 0, count=20)} == {"case_1"}


def test_other_tables_are_refused(table, tmp_path):
    sizes = {"case_0": SIZE, "case_2": SIZE}
    hard_examples.require(table, ("case_0", "case_2", "case_3"), sizes.get)
    with pytest.raises(TrainingError, match=r"lists case case_2, which the fold does not train on"):
        hard_examples.require(table, ("case_0",), sizes.get)
    sizes["case_2"] = (8, 20, 24)  # of plans with another voxel size
    with pytest.raises(TrainingError, match="case_2 of 8x24x24 voxels, which is stored with 8x20x"):
        hard_examples.require(table, ("case_0", "case_2"), sizes.get)
    with pytest.raises(TrainingError, match=r"missing; train the fold without --hard-fraction"):
        hard_examples.read(tmp_path / "none.csv")
    text = table.read_text()
    for number, (before, after) in enumerate(
        (("kind", "sort"), ("false", "wrong"), (",3,", ",x,"), (",1.500", ""))
    ):
        damaged = tmp_path / f"damaged{number}.csv"
        damaged.write_text(text.replace(before, after, 1))
        with pytest.raises(TrainingError, match=rf"^{damaged}: "):
            hard_examples.read(damaged)
