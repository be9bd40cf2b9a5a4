import argparse
import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURE, CONFIGURATION
from workspaces import QUICK, make_workspace, planned

from ichseg import schema, volume
from ichseg.errors import TrainingError
from training import log, train
from training.__main__ import main as command
from training.augment import NO_AUGMENTATION
from training.config import RECIPES, TrainingConfig, config_from
from training.fold import BEST, LATEST, load_checkpoint, open_run
from training.log import EpochRow
from training.metrics import dice
from training.sampling import BatchKey, make_batch
from training.train import begin, train_fold, train_step
from training.validate import validate


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("train"))


@pytest.fixture
def fresh(workspace, tmp_path):
    """A workspace of its own runs over the shared cases."""
    for entry in workspace.iterdir():
        if entry.name != "runs":
            (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


def fold_folder(workspace, fold="0"):
    return workspace / "runs" / "3d_fullres" / f"fold_{fold}"


def checkpoint(workspace, name=LATEST):
    return load_checkpoint(fold_folder(workspace) / name, CONFIGURATION)


def same_run(first, second):
    """Weights, optimiser, schedule and logged losses are equal to the bit."""
    for part in ("network", "optimiser"):
        assert leaves(first[part]) == leaves(second[part])
    assert first["schedule"] == second["schedule"]
    timing = {"seconds", "data_wait_s"}
    rows = [
        [{k: v for k, v in row.items() if k not in timing} for row in run["history"]]
        for run in (first, second)
    ]
    assert rows[0] == rows[1]


def leaves(tree):
    if isinstance(tree, dict):
        return {key: leaves(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [leaves(value) for value in tree]
    return tree.numpy().tobytes() if isinstance(tree, torch.Tensor) else tree


def send_at_step(monkeypatch, number, step):
    """Send this process a signal during the training step of that count."""
    real, count = train.train_step, 0

    def step_and_signal(*args):
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(train, "train_step", step_and_signal)


@pytest.mark.slow
@pytest.mark.parametrize(("dimensions", "batch", "steps"), [(3, 1, 50), (2, 4, 100)])
def test_a_tiny_network_overfits_one_case(tmp_path, dimensions, batch, steps):
    architecture = dataclasses.replace(
        ARCHITECTURE,
        features=(8, 16),
        encoder_convs=(2, 2),
        decoder_convs=(2,),
        kernels=tuple(k[3 - dimensions :] for k in ARCHITECTURE.kernels),
        strides=tuple(s[3 - dimensions :] for s in ARCHITECTURE.strides),
    )
    patch = (16, 32, 32)[3 - dimensions :]
    plans = planned(patch=patch, batch=batch, batch_dice=dimensions == 2, architecture=architecture)
    make_workspace(tmp_path, cases=1, shape=(16, 32, 32), plans=plans)
    config = dataclasses.replace(
        QUICK,
        epochs=3,
        batches_per_epoch=steps,
        learning_rate=1e-2,
        lr_schedule="poly",
        precision="bf16",
        augmentation=NO_AUGMENTATION,
    )
    assert train_fold(tmp_path, "3d_fullres", "all", config)
    run = open_run(tmp_path, "3d_fullres", "all", config)
    assert validate(tmp_path, run)
    scores = json.loads((run.folder / "validation.json").read_text())
    assert scores["dice"]["case_0"]["hemorrhage"] > 0.95
    mask = volume.read(run.folder / "validation" / "case_0.nii.gz")
    reference = volume.read(tmp_path / "raw" / "case_0_l.nii.gz")
    assert dice(mask.voxels == 1, reference.voxels == 1) > 0.95
    assert mask.spacing_mm == pytest.approx(reference.spacing_mm)
    history = load_checkpoint(run.folder / LATEST, run.configuration)["history"]
    assert history[-1]["train_loss"] < min(-0.7, history[0]["train_loss"])


def test_a_deeply_supervised_network_trains(fresh, monkeypatch):
    architecture = dataclasses.replace(
        ARCHITECTURE,
        features=(4, 8, 8),
        kernels=((1, 3, 3),) * 3,
        strides=((1, 1, 1), (1, 2, 2), (1, 2, 2)),
        encoder_convs=(1, 1, 1),
        decoder_convs=(1, 1),
        deep_supervision=True,
    )
    (fresh / "plans.json").unlink()
    (fresh / "plans.json").write_text(schema.dumps(planned(architecture=architecture)))
    heads = []
    real = train.dice_cross_entropy

    def loss(logits, target, **options):
        heads.append(len(logits) if isinstance(logits, list) else 1)
        return real(logits, target, **options)

    monkeypatch.setattr(train, "dice_cross_entropy", loss)
    assert train_fold(fresh, "3d_fullres", "0", dataclasses.replace(QUICK, precision="bf16"))
    assert heads == [2, 2, 2, 1, 1] * 2  # training and validation steps of two epochs


@pytest.mark.parametrize(("step", "number"), [(2, signal.SIGTERM), (6, signal.SIGINT)])
def test_an_interrupted_run_ends_as_an_unbroken_one(fresh, tmp_path, monkeypatch, step, number):
    """Stopped in the middle of an epoch or at its very end; workers and augmentation on."""
    config = dataclasses.replace(QUICK, workers=1)
    assert train_fold(fresh, "3d_fullres", "0", config)
    unbroken = checkpoint(fresh)
    assert train_fold(fresh, "3d_fullres", "0", config, restart=True)
    same_run(checkpoint(fresh), unbroken)

    with monkeypatch.context() as patch:
        send_at_step(patch, number, step)
        assert not train_fold(fresh, "3d_fullres", "0", config, restart=True)
    cut = checkpoint(fresh)
    assert cut["finished"] is None
    assert cut["schedule"]["epoch"] * config.batches_per_epoch + len(cut["losses"]) == step
    assert train_fold(fresh, "3d_fullres", "0", config)
    same_run(checkpoint(fresh), unbroken)
    with (fold_folder(fresh) / "progress.csv").open() as stream:
        assert [row["epoch"] for row in csv.DictReader(stream)] == ["1", "2"]


def test_a_longer_run_goes_on_where_a_shorter_one_ended(fresh):
    short = dataclasses.replace(QUICK, epochs=1)
    assert train_fold(fresh, "3d_fullres", "0", short)
    assert checkpoint(fresh)["finished"] == "all 1 epochs done"
    assert train_fold(fresh, "3d_fullres", "0", QUICK)
    extended = checkpoint(fresh)
    assert train_fold(fresh, "3d_fullres", "0", QUICK, restart=True)
    same_run(checkpoint(fresh), extended)


def test_resuming_names_the_settings_that_changed(fresh, caplog):
    assert train_fold(fresh, "3d_fullres", "0", dataclasses.replace(QUICK, epochs=1))
    caplog.clear()
    train_fold(fresh, "3d_fullres", "0", QUICK)
    assert "going on with epochs 2, so far it was 1" in caplog.text
    assert schema.load(TrainingConfig, fold_folder(fresh) / "config.json") == QUICK


def test_seed_and_fold_decide_the_network(fresh):
    def weights(fold, seed):
        run = open_run(fresh, "3d_fullres", fold, dataclasses.replace(QUICK, seed=seed))
        return leaves(begin(run).network.state_dict())

    assert weights("0", 0) == weights("0", 0)
    assert weights("0", 0) != weights("0", 1)
    assert weights("0", 0) != weights("1", 0)


def test_a_loss_that_is_not_finite_stops_with_advice(fresh, monkeypatch):
    assert train_fold(fresh, "3d_fullres", "0", dataclasses.replace(QUICK, epochs=1))
    good = leaves(checkpoint(fresh)["network"])
    monkeypatch.setattr(
        train, "dice_cross_entropy", lambda logits, *_, **__: logits.sum() * float("nan")
    )
    with pytest.raises(
        TrainingError, match=r"loss is nan in epoch 2, step 1; .* --learning-rate below 0.001"
    ):
        train_fold(fresh, "3d_fullres", "0", QUICK)
    assert leaves(checkpoint(fresh)["network"]) == good


def test_a_loss_that_is_not_finite_does_not_reach_the_weights(fresh, monkeypatch):
    run = open_run(fresh, "3d_fullres", "0", QUICK)
    state = begin(run)
    before = leaves(state.network.state_dict())
    monkeypatch.setattr(
        train, "dice_cross_entropy", lambda logits, *_, **__: logits.sum() * float("inf")
    )
    batch = train.Batch(np.ones((2, 1, 4, 16, 16), np.float32), np.zeros((2, 4, 16, 16), np.int8))
    assert not math.isfinite(train_step(run, state, batch))
    assert leaves(state.network.state_dict()) == before


def test_minutes_end_the_training_within_the_epoch(fresh, monkeypatch):
    config = dataclasses.replace(
        QUICK, epochs=1000, batches_per_epoch=100_000, minutes=0.005, lr_schedule="poly", workers=1
    )
    validated = []
    real = train._validation_step

    def step(run, state, batch):
        validated.append(batch.data.tobytes())
        return real(run, state, batch)

    monkeypatch.setattr(train, "_validation_step", step)
    assert train_fold(fresh, "3d_fullres", "0", config)
    spec = open_run(fresh, "3d_fullres", "0", config).spec
    keys = [BatchKey(0, number, validation=True) for number in range(2)]
    assert validated == [make_batch(spec, key).data.tobytes() for key in keys]
    end = checkpoint(fresh)
    assert end["finished"] == "0.005 minutes have passed"
    assert end["schedule"]["epoch"] == 1
    assert end["schedule"]["learning_rate"] == 0
    assert end["history"][0]["validation_loss"] > -1


def test_poly_decay_reaches_the_optimiser(fresh):
    config = dataclasses.replace(QUICK, lr_schedule="poly")
    train_fold(fresh, "3d_fullres", "0", config)
    end = checkpoint(fresh)
    assert [row["lr"] for row in end["history"]] == pytest.approx([1e-3, 1e-3 * 0.5**0.9])
    assert end["optimiser"]["param_groups"][0]["lr"] == pytest.approx(1e-3 * 0.5**0.9)
    assert end["optimiser"]["param_groups"][0]["amsgrad"] is True


def test_best_checkpoint_is_where_the_average_dice_was_highest(fresh, monkeypatch):
    scores = iter([0.2, 0.6, 0.1, None])
    monkeypatch.setattr(train, "_pseudo_dice", lambda _: next(scores))
    train_fold(fresh, "3d_fullres", "0", dataclasses.replace(QUICK, epochs=4))
    end, best = checkpoint(fresh), checkpoint(fresh, BEST)
    assert best["schedule"]["epoch"] == 2
    assert best["best_dice"] == pytest.approx(0.9 * 0.2 + 0.1 * 0.6)
    assert end["average_dice"] == pytest.approx(0.9 * (0.9 * 0.2 + 0.1 * 0.6) + 0.1 * 0.1)
    assert end["best_dice"] == best["best_dice"]
    assert [row["pseudo_dice"] for row in end["history"]] == [0.2, 0.6, 0.1, None]


def test_pseudo_dice_by_hand(fresh):
    # two classes: 2 * 3 hits of 4 + 6 voxels, and 0 of 5; a third class that does not occur
    counts = torch.tensor([[6, 10], [0, 5], [0, 0]])
    assert train._pseudo_dice(counts) == pytest.approx((0.6 + 0) / 2)
    assert train._pseudo_dice(torch.zeros(2, 2, dtype=torch.int64)) is None


def test_validation_counts_by_hand(fresh):
    run = open_run(fresh, "3d_fullres", "0", QUICK)
    state = begin(run)
    state.network = torch.nn.Conv3d(1, 2, 1)
    with torch.no_grad():
        state.network.weight.copy_(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1, 1))
        state.network.bias.zero_()  # foreground where the image is above 0
    data = np.array([1, 1, -1, -1, 1], np.float32).reshape(1, 1, 1, 1, 5)
    target = np.array([1, 0, 1, 0, 1], np.int8).reshape(1, 1, 1, 5)
    _, counts = train._validation_step(run, state, train.Batch(data, target))
    assert counts.tolist() == [[4, 6]]


def test_refuses_a_checkpoint_of_other_plans(fresh):
    train_fold(fresh, "3d_fullres", "0", QUICK)
    (fresh / "plans.json").unlink()
    (fresh / "plans.json").write_text(schema.dumps(planned(patch=(4, 24, 24))))
    with pytest.raises(TrainingError, match=r"of other plans .*begin anew with --restart"):
        train_fold(fresh, "3d_fullres", "0", QUICK)


def test_refuses_a_damaged_checkpoint(tmp_path):
    path = tmp_path / LATEST
    with pytest.raises(TrainingError, match="no such file; run `train` first"):
        load_checkpoint(path, CONFIGURATION)
    path.write_bytes(b"half a file")
    with pytest.raises(TrainingError, match="damaged or not a checkpoint"):
        load_checkpoint(path, CONFIGURATION)
    torch.save({"configuration": "", "schema_version": 99}, path)
    with pytest.raises(TrainingError, match="checkpoint schema 99, this code reads 1"):
        load_checkpoint(path, CONFIGURATION)


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "run",))

    torch.save({"configuration": Evil(), "schema_version": 1}, tmp_path / LATEST)
    with pytest.raises(TrainingError, match="damaged or not a checkpoint"):
        load_checkpoint(tmp_path / LATEST, CONFIGURATION)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fold", ["5", "-1", "first"])
def test_refuses_an_unknown_fold(fresh, fold):
    with pytest.raises(TrainingError, match=f"fold '{fold}', expected 0 to 4, or all"):
        open_run(fresh, "3d_fullres", fold, QUICK)


def test_refuses_a_cascade(fresh):
    (fresh / "plans.json").unlink()
    (fresh / "plans.json").write_text(schema.dumps(planned(previous_stage="3d_lowres")))
    with pytest.raises(TrainingError, match="second stage is not possible yet"):
        open_run(fresh, "3d_fullres", "0", QUICK)


def test_validation_segments_the_held_out_cases_only(fresh):
    config = dataclasses.replace(QUICK, epochs=1, validation=True)
    assert train_fold(fresh, "3d_fullres", "0", config)
    run = open_run(fresh, "3d_fullres", "0", config)
    found = json.loads((run.folder / "validation.json").read_text())
    masks = sorted(path.name for path in (run.folder / "validation").iterdir())
    assert sorted(found["dice"]) == sorted(run.spec.validation)
    assert masks == sorted(f"{name}.nii.gz" for name in run.spec.validation)
    assert not validate(fresh, run, interrupted=lambda: True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected at least 1"),
        ({"workers": -1}, "workers is -1, expected at least 0"),
        ({"learning_rate": 0}, "learning_rate 0, minutes None, expected more than 0"),
        ({"minutes": -1}, "minutes -1, expected more than 0"),
        ({"foreground_fraction": 2}, "foreground_fraction is 2"),
        ({"precision": "int4"}, "precision is 'int4', expected one of fp32, bf16"),
        ({"schema_version": 7}, "config schema 7, this code reads 1"),
    ],
)
def test_refuses_impossible_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**changes)


def test_every_field_is_a_flag():
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    line = "3d_fullres --workspace w --fold 0"
    assert config_from(parser.parse_args(line.split()), "msd2018") == RECIPES["msd2018"]
    assert config_from(parser.parse_args(line.split()), "compact") == RECIPES["compact"]
    line += " --epochs 5 --minutes 1.5 --no-amsgrad --gamma 0.8 1.2 --image-order 1 --no-validation"
    config = config_from(parser.parse_args(line.split()), "msd2018")
    assert (config.epochs, config.minutes, config.amsgrad) == (5, 1.5, False)
    assert (config.augmentation.gamma, config.augmentation.image_order) == ((0.8, 1.2), 1)
    assert schema.from_json(TrainingConfig, schema.to_json(config), where="") == config
    bad = parser.parse_args([*line.split(), "--epochs", "0"])
    with pytest.raises(TrainingError, match="epochs is 0"):
        config_from(bad, "msd2018")
    with pytest.raises(TrainingError, match="no training recipe 'nnunetv2' yet"):
        config_from(bad, "nnunetv2")


def test_the_recipe_of_the_paper():
    """P18, the paper."""
    paper = RECIPES["msd2018"]
    assert (paper.epochs, paper.batches_per_epoch, paper.validation_batches) == (1000, 250, 50)
    assert (paper.learning_rate, paper.weight_decay, paper.lr_schedule) == (3e-4, 3e-5, "plateau")
    assert (paper.loss_momentum, paper.loss_threshold) == (0.93, 5e-3)
    assert (paper.drop_patience, paper.drop_factor, paper.stop_patience) == (30, 0.2, 60)
    assert (paper.lowest_rate, paper.foreground_fraction) == (1e-6, 0.33)


def test_progress_files(tmp_path):
    rows = [
        EpochRow(1, 0.5, 0.25, None, 3e-4, 12.5, 0.5),
        EpochRow(2, 0.25, 0.125, 0.75, 3e-4, 12.0, 0.0),
    ]
    log.write_csv(rows, tmp_path / "progress.csv")
    assert (tmp_path / "progress.csv").read_text() == (
        "epoch,train_loss,validation_loss,pseudo_dice,lr,seconds,data_wait_s\n"
        "1,0.5,0.25,,0.0003,12.5,0.5\n"
        "2,0.25,0.125,0.75,0.0003,12,0\n"
    )
    log.draw(rows, tmp_path / "progress.png", title="tiny")
    assert (tmp_path / "progress.png").read_bytes().startswith(b"\x89PNG")
    assert log.describe(rows[1], 1000, 3725.2) == (
        "epoch 2/1000  train +0.2500  validation +0.1250  dice 0.750  lr 3.00e-04  "
        "12.0 s (data wait 0.0 s)  ETA 1:02:06"
    )


def test_dice_corner_cases():
    empty, one = np.zeros((2, 2), bool), np.eye(2, dtype=bool)
    assert math.isnan(dice(empty, empty))
    assert dice(empty, one) == dice(one, empty) == 0
    assert dice(one, np.ones((2, 2), bool)) == pytest.approx(2 * 2 / 6)
    with pytest.raises(ValueError, match="masks of shapes"):
        dice(empty, np.zeros(2, bool))


def test_command_line_says_what_is_wrong_in_one_line(tmp_path, capsys):
    assert command(["train", "3d_fullres", "--workspace", str(tmp_path), "--fold", "0"]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'plans.json'}: cannot read")
    with pytest.raises(SystemExit):
        command(["trian"])
    assert "invalid choice: 'trian'" in capsys.readouterr().err


def test_help_loads_no_torch():
    code = "import sys; from training.__main__ import main\n"
    code += "try: main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        check=True,
    )
    text = done.stdout.decode()
    assert text.endswith("False\n")
    assert "python -m training train 3d_fullres --workspace work --fold 0" in text
