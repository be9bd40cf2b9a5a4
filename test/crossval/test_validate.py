import dataclasses
import json
import threading

import numpy as np
import pytest
import torch
from conftest import CONFIGURATION
from helpers import card
from helpers.workspaces import QUICK, make_workspace

from ichseg.model import strict_json
from ichseg.model.network import build_network
from ichseg.predict.dice import dice_of_masks
from ichseg.scan import volume
from training.crossval import record as records
from training.crossval import validate as module
from training.crossval.validate import is_validated, validate
from training.data import dataset
from training.data.workspace import LATEST_CHECKPOINT, mask_file, probabilities_file
from training.fit.checkpoint import SCHEMA_VERSION
from training.fit.fold_run import open_run
from training.fit.process_group import ProcessGroup

CONFIG = dataclasses.replace(QUICK, validation_mirrors=False)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("validate"), cases=7)


@pytest.fixture
def workspace(shared, tmp_path):
    """Runs of its own over the shared cases; fold 0 validates two."""
    for entry in shared.iterdir():
        if entry.name != "runs":
            (tmp_path / entry.name).symlink_to(entry)
    save_weights(tmp_path)
    return tmp_path


def run_of(workspace, config=CONFIG):
    return open_run(workspace, "3d_fullres", "0", config)


def save_weights(workspace, seed=0):
    """A checkpoint as ``train`` leaves it, as far as validation looks."""
    torch.manual_seed(seed)
    run = run_of(workspace)
    network = build_network(CONFIGURATION.architecture, 1, 2)
    run.folder.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "schema_version": SCHEMA_VERSION,
            "configuration": strict_json.dumps(run.configuration),
            "cases": {"train": run.cases.train, "validation": run.cases.validation},
            "network": network.state_dict(),
        },
        run.folder / LATEST_CHECKPOINT,
    )
    return network.state_dict()


@pytest.fixture
def segmented(monkeypatch):
    """Names of the cases that are segmented from now on."""
    names, real = [], module.predict_case

    def predict(given, *args):
        names.append(given.name)
        return real(given, *args)

    monkeypatch.setattr(module, "predict_case", predict)
    return names


def record(run):
    return json.loads((run.folder / "validation.json").read_text())


def masks(run):
    return {path.name: path.read_bytes() for path in (run.folder / "validation").iterdir()}


def test_the_same_weights_segment_no_case_twice(workspace, segmented, caplog):
    caplog.set_level("INFO")
    run = run_of(workspace)
    assert len(run.spec.validation) == 2
    assert validate(workspace, run)
    assert segmented == list(run.spec.validation)
    assert "validation 2/2  " in caplog.text
    assert "ETA 0:00:0" in caplog.text
    found = record(run)
    assert found["complete"] is True
    assert validate(workspace, run)
    assert len(segmented) == 2
    assert "2 of 2 cases are done already" in caplog.text
    assert record(run) == found
    # a mask that has gone is made again, the others are not
    (run.folder / "validation" / f"{run.spec.validation[1]}.nii.gz").unlink()
    assert validate(workspace, run)
    assert segmented[2:] == [run.spec.validation[1]]
    assert record(run) == found


def test_interrupted_between_cases_it_goes_on_and_ends_the_same(workspace, segmented):
    run = run_of(workspace)
    assert validate(workspace, run)
    whole, found = masks(run), record(run)
    (run.folder / "validation.json").unlink()
    segmented.clear()
    assert not validate(workspace, run, interrupted=lambda: len(segmented) == 2)
    first, second = run.spec.validation
    assert record(run)["complete"] is False
    assert record(run)["dice"].keys() == {first}
    assert masks(run).keys() == {f"{first}.nii.gz"}
    segmented.clear()
    assert validate(workspace, run)
    assert segmented == [second]
    assert (masks(run), record(run)) == (whole, found)


def test_interrupted_within_a_case_leaves_nothing_of_it(workspace, segmented, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr("ichseg.engine.engine.BATCH_VOXELS", 1)  # tiles one by one
    asked = iter([False, True])
    run = run_of(workspace)
    assert not validate(workspace, run, interrupted=lambda: next(asked))
    assert segmented == [run.spec.validation[0]]
    assert not (run.folder / "validation.json").exists()
    assert not (run.folder / "validation").exists()
    assert f"stopped at case {run.spec.validation[0]}" in caplog.text


def test_processes_share_the_cases_and_the_leading_one_joins_what_they_found(
    workspace, segmented, monkeypatch
):
    """One after the other here: process 1 first, then the leading one."""
    alone = run_of(workspace)
    assert validate(workspace, alone)
    whole, expected = masks(alone), record(alone)
    (alone.folder / "validation.json").unlink()
    segmented.clear()
    monkeypatch.setattr(ProcessGroup, "all_done", lambda _, done: done)
    first, second = alone.spec.validation
    part = alone.folder / "validation.part1.json"
    assert validate(workspace, dataclasses.replace(alone, group=ProcessGroup(1, 2)))
    assert segmented == [second]
    assert part.exists()
    assert not (alone.folder / "validation.json").exists()
    assert validate(workspace, dataclasses.replace(alone, group=ProcessGroup(0, 2)))
    assert segmented == [second, first]
    assert not part.exists()
    assert (masks(alone), record(alone)) == (whole, expected)


def test_what_other_processes_found_counts_when_fewer_go_on(workspace, segmented, monkeypatch):
    monkeypatch.setattr(ProcessGroup, "all_done", lambda _, done: done)
    alone = run_of(workspace)
    assert validate(workspace, dataclasses.replace(alone, group=ProcessGroup(1, 2)))
    assert validate(workspace, alone)
    assert segmented == [alone.spec.validation[1], alone.spec.validation[0]]
    assert record(alone)["complete"] is True
    save_weights(workspace, seed=1)
    segmented.clear()
    assert validate(workspace, alone)
    assert len(segmented) == 2  # of other weights nothing counts


def test_the_next_case_is_read_and_the_last_one_stored_while_the_network_runs(
    workspace, monkeypatch
):
    """Each waits for the other: in sequence, they would wait for ever."""
    run = run_of(workspace)
    first, second = run.spec.validation
    reads, stores = ({name: threading.Event() for name in (first, second)} for _ in range(2))
    real_read, real_predict = module.prepare_case, module.predict_case
    real_write = module._write_case

    def read(case, *args):
        reads[case.name].set()
        return real_read(case, *args)

    def predict(given, *args):
        if given.name == first:
            assert reads[second].wait(20)
        else:
            assert stores[first].wait(20)
        return real_predict(given, *args)

    def write(workspace, run, given, *args):
        stores[given.name].set()
        return real_write(workspace, run, given, *args)

    for name, stand_in in (
        ("prepare_case", read),
        ("predict_case", predict),
        ("_write_case", write),
    ):
        monkeypatch.setattr(module, name, stand_in)
    assert validate(workspace, run)


def test_further_training_makes_all_masks_anew(workspace, segmented):
    run = run_of(workspace)
    assert validate(workspace, run)
    before = record(run)
    (run.folder / "validation" / "gone.nii.gz").write_bytes(b"of other splits")
    save_weights(workspace, seed=1)
    segmented.clear()
    assert not validate(workspace, run, interrupted=lambda: len(segmented) == 2)
    # what is there is of the new weights only
    assert masks(run).keys() == {f"{run.spec.validation[0]}.nii.gz"}
    assert validate(workspace, run)
    assert segmented == [*run.spec.validation, run.spec.validation[1]]
    assert record(run)["weights"] != before["weights"]


def test_mirrors_make_all_masks_anew(workspace, segmented):
    assert validate(workspace, run_of(workspace))
    segmented.clear()
    mirrored = run_of(workspace, dataclasses.replace(CONFIG, validation_mirrors=True))
    assert validate(workspace, mirrored)
    assert len(segmented) == 2
    assert record(mirrored)["mirrored"] is True


@pytest.mark.parametrize("text", ["{", '{"mean_dice": {}, "dice": {}}'])
def test_a_record_that_cannot_be_read_counts_for_nothing(workspace, segmented, text):
    run = run_of(workspace)
    (run.folder / "validation.json").write_text(text)
    assert validate(workspace, run)
    assert len(segmented) == 2


def test_what_is_recorded_is_the_dice_of_the_mask(workspace):
    run = run_of(workspace)
    assert validate(workspace, run)
    scores = record(run)["dice"]
    for name in run.spec.validation:
        mask = volume.read(run.folder / "validation" / f"{name}.nii.gz").voxels
        reference = volume.read(workspace / "raw" / f"{name}_l.nii.gz").voxels
        assert 0 < mask.sum() < mask.size
        assert scores[name]["hemorrhage"] == pytest.approx(dice_of_masks(mask == 1, reference == 1))
    mean = np.mean([score["hemorrhage"] for score in scores.values()])
    assert record(run)["mean_dice"]["hemorrhage"] == pytest.approx(mean, abs=5e-5)


def test_voxels_to_ignore_do_not_count_in_the_record(tmp_path):
    """Half of the background and of the bleed is hidden: the Dice is of the other half."""
    workspace = make_workspace(tmp_path, cases=7)
    data = dataset.load_dataset(workspace)
    run = run_of(workspace)
    for case in data.labelled:
        reference = volume.read(case.reference)
        hidden = np.array(reference.voxels)
        hidden[:, ::2] = 2
        volume.write(reference.with_voxels(hidden), case.reference)
    dataset.save_dataset(dataclasses.replace(data, ignore_label=2), workspace)
    save_weights(workspace)
    assert validate(workspace, run)
    for case in data.labelled:
        if case.name in run.spec.validation:
            mask = volume.read(mask_file(run.folder, case.name)).voxels[:, 1::2]
            told = volume.read(case.reference).voxels[:, 1::2]
            expected = dice_of_masks(mask == 1, told == 1)
            assert record(run)["dice"][case.name]["hemorrhage"] == pytest.approx(expected)


def test_means_pass_over_cases_without_the_label(workspace):
    run = run_of(workspace)
    first, second = run.spec.validation
    empty = records.continued(run, "weights")
    half = records.extended(run, empty, {second: {"hemorrhage": 0.5}})
    assert (half.complete, half.mean_dice) == (False, {"hemorrhage": 0.5})
    whole = records.extended(run, half, {first: {"hemorrhage": None}})
    assert (whole.complete, whole.mean_dice) == (True, {"hemorrhage": 0.5})
    assert list(whole.dice) == [first, second]


def test_a_fold_counts_as_validated_with_these_weights_and_all_masks(workspace):
    run, weights = run_of(workspace), save_weights(workspace)
    assert not is_validated(workspace, run, weights)
    assert validate(workspace, run)
    assert is_validated(workspace, run, weights)
    other = {name: tensor + 1 for name, tensor in weights.items()}
    assert not is_validated(workspace, run, other)
    (run.folder / "validation" / f"{run.spec.validation[0]}.nii.gz").unlink()
    assert not is_validated(workspace, run, weights)


def test_on_the_cpu_the_engine_of_inference_runs_with_the_threads_of_the_fold(
    workspace, monkeypatch
):
    engines, real = [], module.choose_engine

    def choose(*args, **options):
        engines.append(real(*args, **options))
        return engines[-1]

    monkeypatch.setattr(module, "choose_engine", choose)
    run = run_of(workspace, dataclasses.replace(CONFIG, threads=1))
    weights = save_weights(workspace, seed=4)
    network = module.load_network(run, weights)
    (engine,) = engines
    assert engine.kind == "openvino"
    assert "1 thread," in engine.name
    tile = torch.randn(1, *run.configuration.tile, generator=torch.Generator().manual_seed(1))
    reference = build_network(CONFIGURATION.architecture, 1, 2).eval()
    reference.load_state_dict(weights)
    with torch.no_grad():
        expected = torch.softmax(reference(tile[None]).float(), 1)
    (found,) = (scores.clone() for scores in network(iter([tile])))
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-4 if engine.precision == "float32" else 0.02)


@pytest.mark.parametrize("full_in", ["restore", "probabilities"])
def test_a_case_that_a_gpu_has_no_room_to_restore_is_restored_on_the_host(
    workspace, monkeypatch, full_in
):
    run = open_run(workspace, "3d_fullres", "0", QUICK)
    name = run.spec.validation[0]
    case = next(c for c in dataset.load_dataset(workspace).cases if c.name == name)
    given = module.prepare_case(case, run)
    scores = torch.randn(2, *given.data.shape[1:], generator=torch.Generator().manual_seed(1))
    expected = module._write_case(workspace, run, given, scores, (), "")
    path = probabilities_file(run.folder, name)
    stored = path.read_bytes()
    path.unlink()
    owner, function = {
        "restore": (module, "restore"),
        "probabilities": (module.probabilities, "save"),
    }[full_in]
    real, places = getattr(owner, function), []

    def full(*args, **more):
        device = (args[0][0][0] if full_in == "restore" else args[1]).device.type
        places.append(device)
        if device == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **more)

    monkeypatch.setattr(owner, function, full)
    with card.pretended(monkeypatch):
        found = module._write_case(workspace, run, given, scores.to("cuda"), (), "")
    assert places == ["cuda", "cpu"]
    np.testing.assert_array_equal(found, expected)
    assert path.read_bytes() == stored


def test_scores_that_a_gpu_does_not_hold_are_added_up_on_the_host(workspace, monkeypatch):
    run = open_run(workspace, "3d_fullres", "0", QUICK)
    data = np.random.default_rng(3).normal(size=(1, 6, 24, 24)).astype(np.float32)
    network = module.load_network(run, save_weights(workspace))
    expected = module.predict_scores(data, run, network, run.mirror_axes)
    real, places = module.sliding_window.predict_tiled, []

    def full(network, given, *args, **more):
        places.append(given.device.type)
        if given.device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(network, given, *args, **more)

    monkeypatch.setattr(module.sliding_window, "predict_tiled", full)
    with card.pretended(monkeypatch):
        on_card = dataclasses.replace(run, device=torch.device("cuda"))
        found = module.predict_scores(data, on_card, network, run.mirror_axes)
    assert places == ["cuda", "cpu"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
