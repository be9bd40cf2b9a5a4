import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURE, PLANS
from helpers.workspaces import QUICK, make_workspace, planned

from ichseg.errors import DatasetError, TrainingError
from ichseg.model import strict_json
from ichseg.model.network import build_network
from ichseg.scan import volume
from training.__main__ import main
from training.batches import hard_examples
from training.batches.hard_examples import HardExample
from training.crossval import mining
from training.data.workspace import LATEST_CHECKPOINT, hard_examples_file
from training.fit.checkpoint import SCHEMA_VERSION
from training.fit.fold_run import open_run

SHAPE = (6, 20, 20)


def box(lower, upper, shape=SHAPE):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(lower, upper, strict=True))] = True
    return mask


def errors(target, found, *, ignore_label=None, voxel_ml=0.01, smallest_ml=0.05):
    case = SimpleNamespace(name="a", target=target)
    run = SimpleNamespace(plans=PLANS, ignore_label=ignore_label)
    return mining.errors_of(case, [found], run, voxel_ml, smallest_ml)


def test_errors_are_whole_lesions():
    """One found in part is none; one missed, one made up and a speck are by themselves."""
    target = np.zeros(SHAPE, np.int8)
    target[box((0, 0, 0), (2, 5, 5))] = 1  # found in part
    target[box((3, 0, 10), (4, 3, 13))] = 1  # missed: 9 voxels
    found = box((1, 0, 0), (3, 5, 5)) | box((2, 10, 10), (5, 13, 15)) | box((5, 19, 0), (6, 20, 2))
    assert errors(target, found) == [
        HardExample("a", "false", (3, 11, 12), SHAPE, pytest.approx(0.45)),
        HardExample("a", "missed", (3, 1, 11), SHAPE, pytest.approx(0.09)),
    ]
    kinds = [each.kind for each in errors(target, found, smallest_ml=0.1)]
    assert kinds == ["false"]
    assert len(errors(target, found, smallest_ml=0.02)) == 3  # the speck too


def test_lesions_that_touch_untold_voxels_are_no_errors():
    target = np.zeros(SHAPE, np.int8)
    target[box((0, 0, 0), (6, 20, 5))] = 2
    beside, away = box((2, 5, 3), (4, 8, 8)), box((2, 5, 10), (4, 8, 13))
    assert [e.voxel for e in errors(target, beside | away, ignore_label=2)] == [(2, 6, 11)]


def test_the_voxel_lies_in_the_lesion_though_its_middle_does_not():
    ring = box((2, 4, 4), (3, 15, 15)) & ~box((2, 5, 5), (3, 14, 14))
    (example,) = errors(np.zeros(SHAPE, np.int8), ring)
    assert ring[example.voxel]


def write_weights(run):
    """A checkpoint of a network that has not learned anything."""
    run.folder.mkdir(parents=True)
    torch.save(
        {
            "schema_version": SCHEMA_VERSION,
            "configuration": strict_json.dumps(run.configuration),
            "cases": {"train": run.cases.train, "validation": run.cases.validation},
            "network": build_network(run.configuration.architecture, 1, 2).state_dict(),
        },
        run.folder / LATEST_CHECKPOINT,
    )


@pytest.fixture
def workspace(tmp_path):
    """Fold 0 has weights, and validates two of seven cases."""
    folder = make_workspace(tmp_path / "work", cases=7)
    write_weights(open_run(folder, "3d_fullres", "0", QUICK))
    return folder


@pytest.fixture
def blind(monkeypatch):
    """A network that finds nothing."""

    def network(tiles):
        for tile in tiles:
            scores = torch.zeros(1, 2, *tile.shape[1:])
            scores[:, 0] = 1
            yield scores

    monkeypatch.setattr(mining, "load_network", lambda *_: network)


@pytest.mark.parametrize(("flag", "value"), [("--device", "gpu"), ("--threads", "-1")])
def test_settings_out_of_range_are_refused_in_words(workspace, capsys, flag, value):
    of_fold = ["3d_fullres", "--workspace", str(workspace), "--fold", "0"]
    assert main(["hard-examples", *of_fold, flag, value]) == 1
    assert f"{flag[2:]} is" in capsys.readouterr().err


def test_the_training_cases_are_looked_at_and_no_others(workspace, blind, caplog):
    caplog.set_level("INFO")
    assert main(["hard-examples", "3d_fullres", "--workspace", str(workspace), "--fold", "0"]) == 0
    run = open_run(workspace, "3d_fullres", "0", QUICK)
    found = hard_examples.read(hard_examples_file(run.folder))
    assert found.keys() == set(run.spec.train)  # each has a bleed, which nobody finds
    assert {e.kind for examples in found.values() for e in examples} == {"missed"}
    assert "missed: 5 lesions in 5 cases" in caplog.text
    for examples in found.values():
        (example,) = examples  # 3 x 8 x 8 voxels of 5 mm3
        assert example.volume_ml == pytest.approx(0.96)


def test_only_cases_of_the_names_given(workspace, blind):
    run = open_run(workspace, "3d_fullres", "0", QUICK)
    wanted = run.spec.train[1]
    found = mining.find_hard_examples(workspace, run, patterns=(wanted, "other_*"))
    assert {example.case for example in found} == {wanted}
    with pytest.raises(TrainingError, match=r"no training case of fold 0 is named other_\*"):
        mining.find_hard_examples(workspace, run, patterns=("other_*",))


def test_slices_of_a_2d_configuration_are_as_thick_as_the_case_s(tmp_path, blind):
    """They stay as they are, whatever the plans say of the third axis."""
    network = dataclasses.replace(ARCHITECTURE, kernels=((3, 3), (3, 3)), strides=((1, 1), (2, 2)))
    flat = planned(name="2d", patch=(16, 16), dummy_2d=False, architecture=network)
    folder = make_workspace(tmp_path / "work", plans=flat)  # of slices of 5 mm
    thin = dataclasses.replace(flat.configurations[0], spacing_mm=(1.0, 1.0, 1.0))
    thin = dataclasses.replace(flat, configurations=(thin,))
    (folder / "plans.json").write_text(strict_json.dumps(thin))
    run = open_run(folder, "2d", "0", QUICK)
    write_weights(run)
    found = mining.find_hard_examples(folder, run, smallest_ml=0.5)
    assert [example.volume_ml for example in found] == [pytest.approx(0.96)] * len(run.spec.train)


def test_a_case_that_was_corrected_has_to_be_preprocessed_first(workspace):
    run = open_run(workspace, "3d_fullres", "0", QUICK)
    label = workspace / "raw" / f"{run.spec.train[0]}_l.nii.gz"
    corrected = volume.read(label)
    volume.write(corrected.with_voxels(np.zeros_like(corrected.voxels)), label)
    with pytest.raises(DatasetError, match="has changed since it was stored; run `preprocess"):
        mining.find_hard_examples(workspace, run)


def test_what_was_found_is_trained_on(workspace, blind, capsys):
    """Train, look, train on: by the commands, which say what is missing."""
    of_fold = ["3d_fullres", "--workspace", str(workspace), "--fold", "0"]
    train = [
        "train", *of_fold, "--restart", "--hard-fraction", "0.5", "--epochs", "1",
        "--batches-per-epoch", "2", "--validation-batches", "1", "--device", "cpu", "--threads",
        "1", "--workers", "0", "--no-validation",
    ]  # fmt: skip
    assert main(train) == 1
    error = capsys.readouterr().err
    assert "hard_examples.csv: missing; train the fold without --hard-fraction first" in error
    assert main(["hard-examples", *of_fold]) == 0
    assert main(train) == 0
    run = open_run(workspace, "3d_fullres", "0", dataclasses.replace(QUICK, hard_fraction=0.5))
    assert '"hard_fraction": 0.5' in (run.folder / "config.json").read_text()
    # of another fold, whose training cases are others
    table = hard_examples_file(run.folder)
    other = open_run(workspace, "3d_fullres", "1", QUICK).folder
    other.mkdir(parents=True)
    hard_examples_file(other).write_bytes(table.read_bytes())
    train[train.index("--fold") + 1] = "1"
    assert main(train) == 1
    assert "which the fold does not train on" in capsys.readouterr().err
