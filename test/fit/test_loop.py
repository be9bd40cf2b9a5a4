import csv
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURE, CONFIGURATION
from helpers.workspaces import QUICK, leaves, make_workspace, planned, same_run

from ichseg.errors import TrainingError
from ichseg.model import strict_json
from ichseg.predict.dice import dice_of_masks
from ichseg.scan import volume
from training.__main__ import main as command
from training.batches.augmentation import NO_AUGMENTATION
from training.batches.sampling import BatchKey
from training.batches.stream import open_batches
from training.crossval.validate import validate
from training.data.workspace import LATEST_CHECKPOINT
from training.fit import loop, step
from training.fit.checkpoint import read_checkpoint
from training.fit.configuration import TRAINING_RECIPES, TrainingConfig
from training.fit.fold_run import open_run
from training.fit.saver import Saver
from training.jobs.train import is_finished, run_fold


def fold_folder(workspace, fold="0"):
    return workspace / "runs" / "3d_fullres" / f"fold_{fold}"


def checkpoint(workspace, name=LATEST_CHECKPOINT):
    return read_checkpoint(fold_folder(workspace) / name, CONFIGURATION)


def send_at_step(monkeypatch, number, step, of="train_step"):
    """Send this process a signal during the training or validation step of that count."""
    real, count = getattr(loop, of), 0

    def step_and_signal(*args):
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(loop, of, step_and_signal)


@pytest.mark.slow
@pytest.mark.parametrize(("dimensions", "batch", "steps"), [(3, 1, 50), (2, 4, 100)])
@pytest.mark.parametrize("recipe", ["msd2018", "nnunetv2"])
def test_a_tiny_network_overfits_one_case(tmp_path, recipe, dimensions, batch, steps):
    kernels, strides = (*ARCHITECTURE.kernels, (3, 3, 3)), (*ARCHITECTURE.strides, (2, 2, 2))
    levels = 3 if recipe == "nnunetv2" else 2  # two heads count under deep supervision
    architecture = dataclasses.replace(
        ARCHITECTURE,
        features=(8, 16, 16)[:levels],
        encoder_convs=(2,) * levels,
        decoder_convs=(2,) * (levels - 1),
        kernels=tuple(k[3 - dimensions :] for k in kernels[:levels]),
        strides=tuple(s[3 - dimensions :] for s in strides[:levels]),
        deep_supervision=recipe == "nnunetv2",
    )
    patch = (16, 32, 32)[3 - dimensions :]
    plans = planned(patch=patch, batch=batch, batch_dice=dimensions == 2, architecture=architecture)
    make_workspace(tmp_path, cases=1, shape=(16, 32, 32), plans=plans)
    config = dataclasses.replace(
        TRAINING_RECIPES[recipe],
        epochs=3,
        batches_per_epoch=steps,
        validation_batches=2,
        learning_rate=1e-2,
        lr_schedule="poly",
        augmentation=NO_AUGMENTATION,
        device="cpu",
        threads=1,
        workers=0,
        validation=False,
    )
    assert run_fold(tmp_path, "3d_fullres", "all", config)
    run = open_run(tmp_path, "3d_fullres", "all", config)
    assert validate(tmp_path, run)
    scores = json.loads((run.folder / "validation.json").read_text())
    assert scores["dice"]["case_0"]["hemorrhage"] > 0.95
    mask = volume.read(run.folder / "validation" / "case_0.nii.gz")
    reference = volume.read(tmp_path / "raw" / "case_0_l.nii.gz")
    assert dice_of_masks(mask.voxels == 1, reference.voxels == 1) > 0.95
    assert mask.spacing_mm == pytest.approx(reference.spacing_mm)
    history = read_checkpoint(run.folder / LATEST_CHECKPOINT, run.configuration)["history"]
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
    (fresh / "plans.json").write_text(strict_json.dumps(planned(architecture=architecture)))
    heads = []
    real = step.dice_cross_entropy

    def loss(logits, target, **options):
        heads.append(len(logits) if isinstance(logits, list) else 1)
        return real(logits, target, **options)

    monkeypatch.setattr(step, "dice_cross_entropy", loss)
    assert run_fold(fresh, "3d_fullres", "0", dataclasses.replace(QUICK, precision="bf16"))
    assert heads == [2, 2, 2, 1, 1] * 2  # training and validation steps of two epochs


@pytest.mark.parametrize(("at", "number"), [(2, signal.SIGTERM), (6, signal.SIGINT)])
def test_an_interrupted_run_ends_as_an_unbroken_one(fresh, monkeypatch, at, number):
    """Stopped in the middle of an epoch or at its very end; augmentation on."""
    config = QUICK
    assert run_fold(fresh, "3d_fullres", "0", config)
    unbroken = checkpoint(fresh)
    assert run_fold(fresh, "3d_fullres", "0", config, restart=True)
    same_run(checkpoint(fresh), unbroken)

    with monkeypatch.context() as patch:
        send_at_step(patch, number, at)
        assert not run_fold(fresh, "3d_fullres", "0", config, restart=True)
    cut = checkpoint(fresh)
    assert cut["finished"] is None
    assert cut["schedule"]["epoch"] * config.batches_per_epoch + len(cut["losses"]) == at
    assert run_fold(fresh, "3d_fullres", "0", config)
    same_run(checkpoint(fresh), unbroken)
    with (fold_folder(fresh) / "progress.csv").open() as stream:
        assert [row["epoch"] for row in csv.DictReader(stream)] == ["1", "2"]


def test_a_longer_run_goes_on_where_a_shorter_one_ended(fresh):
    short = dataclasses.replace(QUICK, epochs=1)
    assert run_fold(fresh, "3d_fullres", "0", short)
    assert checkpoint(fresh)["finished"] == "all 1 epochs done"
    assert run_fold(fresh, "3d_fullres", "0", QUICK)
    extended = checkpoint(fresh)
    assert run_fold(fresh, "3d_fullres", "0", QUICK, restart=True)
    same_run(checkpoint(fresh), extended)


def test_a_restart_that_ends_before_its_first_checkpoint_leaves_nothing_to_go_on_from(
    fresh, monkeypatch
):
    """The old weights would pass for trained with the new settings."""
    assert run_fold(fresh, "3d_fullres", "0", QUICK)
    monkeypatch.setattr(loop, "train_step", lambda *_: torch.tensor(math.nan))
    anew = dataclasses.replace(QUICK, learning_rate=0.5)
    with pytest.raises(TrainingError, match="the loss is nan in epoch 1, step 1"):
        run_fold(fresh, "3d_fullres", "0", anew, restart=True)
    assert strict_json.load(TrainingConfig, fold_folder(fresh) / "config.json") == anew
    assert not list(fold_folder(fresh).glob("*.pt"))


def test_resuming_names_the_settings_that_changed(fresh, caplog):
    assert run_fold(fresh, "3d_fullres", "0", dataclasses.replace(QUICK, epochs=1))
    caplog.clear()
    run_fold(fresh, "3d_fullres", "0", QUICK)
    assert "going on with epochs 2, so far it was 1" in caplog.text
    assert strict_json.load(TrainingConfig, fold_folder(fresh) / "config.json") == QUICK


def test_a_run_that_goes_on_does_not_begin_with_other_weights(fresh, caplog):
    assert run_fold(fresh, "3d_fullres", "0", dataclasses.replace(QUICK, epochs=1))
    run_fold(fresh, "3d_fullres", "0", dataclasses.replace(QUICK, pretrained="elsewhere"))
    assert "--pretrained elsewhere is not used: to begin with it takes --restart" in caplog.text
    assert "going on with pretrained" not in caplog.text


def test_a_loss_that_is_not_finite_stops_with_advice(fresh, monkeypatch):
    assert run_fold(fresh, "3d_fullres", "0", dataclasses.replace(QUICK, epochs=1))
    good = leaves(checkpoint(fresh)["network"])
    monkeypatch.setattr(
        step, "dice_cross_entropy", lambda logits, *_, **__: logits.sum() * float("nan")
    )
    with pytest.raises(
        TrainingError, match=r"loss is nan in epoch 2, step 1; .* --learning-rate below 0.001"
    ):
        run_fold(fresh, "3d_fullres", "0", QUICK)
    assert leaves(checkpoint(fresh)["network"]) == good


def overflowing(monkeypatch, workspace, at):
    """As fp16 does: a scaler of the loss, which is not finite in these steps; the state."""
    real_begin, real_loss, states, count = step.begin, step.dice_cross_entropy, [], 0

    def begin(run):
        states.append(real_begin(run))
        states[-1].scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        return states[-1]

    def loss(logits, *args, **options):
        nonlocal count
        count += logits.requires_grad
        factor = math.inf if logits.requires_grad and at(count) else 1.0
        return real_loss(logits, *args, **options) * factor

    monkeypatch.setattr(loop, "begin", begin)
    monkeypatch.setattr(step, "dice_cross_entropy", loss)
    return states


def test_under_fp16_a_step_whose_loss_overflows_is_left_out(fresh, monkeypatch):
    states = overflowing(monkeypatch, fresh, lambda count: count == 2)
    assert run_fold(fresh, "3d_fullres", "0", QUICK)
    assert states[0].scaler.get_scale() == 2.0**9
    assert all(bool(p.isfinite().all()) for p in states[0].network.parameters())
    history = checkpoint(fresh)["history"]
    assert len(history) == 2
    assert all(math.isfinite(row["train_loss"]) for row in history)
    moments = checkpoint(fresh)["optimiser"]["state"][0]
    assert moments["step"] == 2 * QUICK.batches_per_epoch - 1


def test_under_fp16_losses_that_all_overflow_end_the_training(fresh, monkeypatch):
    overflowing(monkeypatch, fresh, lambda _: True)
    with pytest.raises(
        TrainingError, match=r"no loss of epoch 1 is finite; .* --learning-rate below"
    ):
        run_fold(fresh, "3d_fullres", "0", QUICK)


@pytest.mark.parametrize(
    ("signalled", "message"),
    [(False, "validation loss is nan after epoch 2"), (True, "weights are no longer finite")],
)
def test_broken_weights_do_not_replace_the_last_good_ones(fresh, monkeypatch, signalled, message):
    """A loss may be finite and its gradient not: the last step of an epoch, or before a signal."""
    assert run_fold(fresh, "3d_fullres", "0", dataclasses.replace(QUICK, epochs=1))
    good = leaves(checkpoint(fresh)["network"])
    real = loop.train_step

    def breaking(run, state, batch):
        loss = real(run, state, batch)
        if len(state.losses) == QUICK.batches_per_epoch - 1:
            next(state.network.parameters()).data.fill_(math.nan)
            if signalled:
                os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(loop, "train_step", breaking)
    with pytest.raises(TrainingError, match=message):
        run_fold(fresh, "3d_fullres", "0", QUICK)
    assert leaves(checkpoint(fresh)["network"]) == good


@pytest.mark.parametrize("stop_at", [None, 2, 4])
def test_reading_losses_a_step_late_changes_nothing(fresh, monkeypatch, stop_at):
    """As on a GPU; a signal within an epoch, whose steps are all kept."""
    monkeypatch.setattr(loop, "_steps_ahead", lambda _: 1)
    if stop_at is not None:
        with monkeypatch.context() as patch:
            send_at_step(patch, signal.SIGTERM, stop_at)
            assert not run_fold(fresh, "3d_fullres", "0", QUICK)
        assert len(checkpoint(fresh)["losses"]) == stop_at % QUICK.batches_per_epoch
    assert run_fold(fresh, "3d_fullres", "0", QUICK)
    late = checkpoint(fresh)
    monkeypatch.undo()
    assert run_fold(fresh, "3d_fullres", "0", QUICK, restart=True)
    same_run(late, checkpoint(fresh))


def test_a_loss_that_is_read_late_is_named_by_its_own_step(fresh, monkeypatch):
    monkeypatch.setattr(loop, "_steps_ahead", lambda _: 1)
    real, losses = loop.train_step, iter([0.5, math.nan, 0.5])

    def spoilt(*args):
        return real(*args) * 0 + next(losses)

    monkeypatch.setattr(loop, "train_step", spoilt)
    with pytest.raises(TrainingError, match="the loss is nan in epoch 1, step 2"):
        run_fold(fresh, "3d_fullres", "0", QUICK)


def test_a_scale_that_finds_no_end_is_not_saved(fresh):
    run = open_run(fresh, "3d_fullres", "0", QUICK)
    state = step.begin(run)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-17)
    with (
        Saver(run) as saver,
        pytest.raises(TrainingError, match=r"every step's gradient overflows fp16; .*below 0.001"),
    ):
        saver.save(state)
    assert not (run.folder / LATEST_CHECKPOINT).exists()


@pytest.mark.parametrize("kind", ["plateau", "poly"])
def test_a_lower_learning_rate_counts_from_the_next_epoch_on(fresh, kind):
    config = dataclasses.replace(QUICK, epochs=4, lr_schedule=kind)
    first = dataclasses.replace(config, epochs=1, lr_schedule="plateau")
    assert run_fold(fresh, "3d_fullres", "0", first)
    assert run_fold(fresh, "3d_fullres", "0", dataclasses.replace(config, learning_rate=1e-4))
    rates = [row["lr"] for row in checkpoint(fresh)["history"]]
    later = [1, 1, 1] if kind == "plateau" else [0.75**0.9, 0.5**0.9, 0.25**0.9]
    assert rates == pytest.approx([1e-3, *(1e-4 * share for share in later)])


def test_another_schedule_is_taken_up_where_a_run_goes_on(fresh):
    config = dataclasses.replace(QUICK, lr_schedule="poly")
    assert run_fold(fresh, "3d_fullres", "0", config)
    longer = dataclasses.replace(config, epochs=3, lr_schedule="plateau")
    assert not is_finished(fresh, open_run(fresh, "3d_fullres", "0", longer))
    assert run_fold(fresh, "3d_fullres", "0", longer)
    rates = [row["lr"] for row in checkpoint(fresh)["history"]]
    assert rates == pytest.approx([1e-3, 1e-3 * 0.5**0.9, 1e-3])


def test_minutes_end_the_training_within_the_epoch(fresh, monkeypatch):
    config = dataclasses.replace(
        QUICK, epochs=1000, batches_per_epoch=100_000, minutes=0.005, lr_schedule="poly", workers=1
    )
    validated = []
    real = loop.validation_step

    def noted(run, state, batch):
        validated.append(batch.data.numpy().tobytes())
        return real(run, state, batch)

    monkeypatch.setattr(loop, "validation_step", noted)
    assert run_fold(fresh, "3d_fullres", "0", config)
    spec = open_run(fresh, "3d_fullres", "0", config).spec
    keys = [BatchKey(0, number, validation=True) for number in range(2)]
    with open_batches(spec, iter(keys), QUICK.stream, torch.device("cpu")) as expected:
        assert validated == [batch.data.numpy().tobytes() for batch in expected]
    end = checkpoint(fresh)
    assert end["finished"] == "0.005 minutes have passed"
    assert end["schedule"]["epoch"] == 1
    assert end["schedule"]["learning_rate"] == 0
    assert end["history"][0]["validation_loss"] > -1


def test_an_epoch_that_begins_when_the_time_is_up_takes_one_step(fresh, monkeypatch):
    monkeypatch.setattr(loop, "_is_over", lambda config, state: True)
    assert run_fold(fresh, "3d_fullres", "0", dataclasses.replace(QUICK, epochs=2))
    end = checkpoint(fresh)
    assert all(math.isfinite(row["train_loss"]) for row in end["history"])
    assert math.isfinite(end["schedule"]["train_average"])


def test_a_signal_while_the_last_epoch_is_validated_does_not_lose_it(fresh, monkeypatch):
    """Its time ran out in that epoch, which the same command goes on to validate."""
    config = dataclasses.replace(QUICK, epochs=1000, batches_per_epoch=100_000, minutes=0.005)
    with monkeypatch.context() as patch:
        send_at_step(patch, signal.SIGTERM, 1, of="validation_step")
        assert not run_fold(fresh, "3d_fullres", "0", config)
    cut = checkpoint(fresh)
    assert (cut["finished"], cut["schedule"]["epoch"]) == (None, 0)
    assert cut["elapsed_s"] >= 0.3
    monkeypatch.setattr(loop, "train_step", None)  # there is no time for one
    assert run_fold(fresh, "3d_fullres", "0", config)
    end = checkpoint(fresh)
    assert end["finished"] == "0.005 minutes have passed"
    assert (end["schedule"]["epoch"], end["losses"]) == (1, [])
    assert end["history"][0]["train_loss"] == pytest.approx(sum(cut["losses"]) / len(cut["losses"]))


def test_an_epoch_in_hand_is_validated_where_fewer_are_wanted_now(fresh, monkeypatch):
    with monkeypatch.context() as patch:
        send_at_step(patch, signal.SIGTERM, QUICK.batches_per_epoch + 1)
        assert not run_fold(fresh, "3d_fullres", "0", QUICK)
    monkeypatch.setattr(loop, "train_step", None)
    assert run_fold(fresh, "3d_fullres", "0", dataclasses.replace(QUICK, epochs=1))
    end = checkpoint(fresh)
    assert end["finished"] == "all 1 epochs done"
    assert (end["schedule"]["epoch"], len(end["history"]), end["losses"]) == (2, 2, [])


def test_poly_decay_reaches_the_optimiser(fresh):
    config = dataclasses.replace(QUICK, lr_schedule="poly")
    run_fold(fresh, "3d_fullres", "0", config)
    end = checkpoint(fresh)
    assert [row["lr"] for row in end["history"]] == pytest.approx([1e-3, 1e-3 * 0.5**0.9])
    assert end["optimiser"]["param_groups"][0]["lr"] == pytest.approx(1e-3 * 0.5**0.9)
    assert end["optimiser"]["param_groups"][0]["amsgrad"] is True


@pytest.mark.parametrize("fold", ["5", "-1", "first", "01"])
def test_refuses_an_unknown_fold(fresh, fold):
    with pytest.raises(TrainingError, match=f"fold '{fold}', expected 0 to 4, or all"):
        open_run(fresh, "3d_fullres", fold, QUICK)


def test_validation_segments_the_held_out_cases_only(fresh):
    config = dataclasses.replace(QUICK, epochs=1, validation=True)
    assert run_fold(fresh, "3d_fullres", "0", config)
    run = open_run(fresh, "3d_fullres", "0", config)
    found = json.loads((run.folder / "validation.json").read_text())
    masks = sorted(path.name for path in (run.folder / "validation").iterdir())
    assert sorted(found["dice"]) == sorted(run.spec.validation)
    assert masks == sorted(f"{name}.nii.gz" for name in run.spec.validation)


def test_command_line_says_what_is_wrong_in_one_line(tmp_path, capsys):
    assert command(["train", "3d_fullres", "--workspace", str(tmp_path), "--fold", "0"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'plans.json'}: no such file; make it with `plan ")
    assert said.count("\n") == 1
    with pytest.raises(SystemExit):
        command(["trian"])
    assert "invalid choice: 'trian'" in capsys.readouterr().err


def test_help_loads_no_torch():
    code = "import sys; from training.__main__ import main\n"
    code += "try: main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        check=True,
    )
    text = done.stdout.decode()
    assert text.endswith("False\n")
    assert "python -m training train 3d_fullres --workspace work --fold 0" in text
