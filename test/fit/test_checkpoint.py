"""Checkpoints know their cases, and show when they are damaged."""

import contextlib
import dataclasses
import os
import random
import resource
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIGURATION, PLANS
from helpers.epochs import ROWS
from helpers.workspaces import QUICK, leaves, make_workspace, planned

from ichseg.errors import OutputError, TrainingError
from ichseg.model import strict_json
from training.__main__ import main as command
from training.bundle.export import export
from training.crossval import merge
from training.crossval.validate import validate
from training.data import dataset, splits
from training.data.splits import Split
from training.data.workspace import BEST_CHECKPOINT, LATEST_CHECKPOINT, run_folder
from training.fit import loop
from training.fit import saver as files
from training.fit.checkpoint import (
    load_checkpoint,
    read_checkpoint,
    require_cases,
    resume,
    weights_digest,
)
from training.fit.fold_run import open_run
from training.fit.saver import Saver
from training.fit.step import begin
from training.jobs.train import is_finished, run_fold

SEEN = Split(("a", "b", "c"), ("d", "e"))


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (
            Split(("b", "c", "d", "e"), ("a",)),
            r"trained on 1 of the 1 cases .* such as a; ",
        ),
        (Split(("a", "b"), ("c", "d", "e")), "trained on 1 of the 3 cases .* such as c"),
        (Split(("a", "b", "c", "f"), ("d", "e")), "trained on 3 cases, of which 3 are among the 4"),
        (Split(("a", "b"), ("d", "e")), "trained on 3 cases, of which 2 are among the 2"),
        (Split(("a", "b", "c"), ("d",)), "validated on 2 cases, of which 1 are among the 1"),
    ],
)
def test_refuses_other_cases(tmp_path, now, message):
    require_cases(tmp_path, SEEN, SEEN)
    require_cases(tmp_path, SEEN, Split(("c", "b", "a"), ("e", "d")))
    everything = Split(("a", "b"), ("a", "b"))  # the fold `all`
    require_cases(tmp_path, everything, everything)
    with pytest.raises(TrainingError, match=message):
        require_cases(tmp_path, SEEN, now)


def test_nothing_uses_a_fold_whose_cases_have_changed(fresh):
    """Trained, then the user gives other folds: cases that the network knows are held out."""
    names = [case.name for case in dataset.load_dataset(fresh).labelled]
    before = splits.load_or_make_splits(fresh, names)[0]
    assert run_fold(fresh, "3d_fullres", "0", QUICK)
    run = open_run(fresh, "3d_fullres", "0", QUICK)
    path = run.folder / LATEST_CHECKPOINT
    assert load_checkpoint(path, PLANS, CONFIGURATION, before)["cases"] == {
        "train": before.train,
        "validation": before.validation,
    }
    *first, last = splits.load_or_make_splits(fresh, names)
    folds = [dataclasses.asdict(split) for split in (last, *first)]
    text = strict_json.dumps({"schema_version": 1, "folds": folds})
    (fresh / "splits.json").write_text(text)
    run = open_run(fresh, "3d_fullres", "0", QUICK)
    assert set(run.cases.validation) & set(before.train)  # this would be the leak
    for use in (
        lambda: run_fold(fresh, "3d_fullres", "0", QUICK),
        lambda: is_finished(fresh, run),
        lambda: validate(fresh, run),
        lambda: merge.validated_masks(fresh, "3d_fullres"),
        lambda: export(fresh, ["3d_fullres"], ["0"], fresh / "bundle"),
    ):
        with pytest.raises(TrainingError, match=r"checkpoint_latest.pt: was trained on .* cases"):
            use()
    assert run_fold(fresh, "3d_fullres", "0", QUICK, restart=True)
    assert is_finished(fresh, run)


@pytest.mark.parametrize(
    "change",
    [
        {"normalisations": (dataclasses.replace(PLANS.normalisations[0], mean=41.0),)},
        {"crop": "head"},
        {"orientation": "RAS"},
    ],
)
def test_nothing_uses_a_fold_whose_scans_would_be_prepared_otherwise(tmp_path, change):
    """Trained, then planned anew with the same network: its input would be another."""
    fresh = make_workspace(tmp_path)
    assert run_fold(fresh, "3d_fullres", "0", QUICK)
    run = open_run(fresh, "3d_fullres", "0", QUICK)
    (fresh / "plans.json").write_text(strict_json.dumps(dataclasses.replace(PLANS, **change)))
    shutil.rmtree(run.spec.folder)  # the store was made by the old plans
    assert command(["preprocess", "--workspace", str(fresh), "--workers", "1"]) == 0
    later = open_run(fresh, "3d_fullres", "0", QUICK)
    (name,) = change
    assert later.configuration == run.configuration
    for use in (
        lambda: run_fold(fresh, "3d_fullres", "0", QUICK),
        lambda: is_finished(fresh, later),
        lambda: validate(fresh, later),
        lambda: merge.validated_masks(fresh, "3d_fullres"),
        lambda: merge.digest_of_folds(fresh, "3d_fullres"),
        lambda: export(fresh, ["3d_fullres"], ["0"], fresh / "bundle"),
    ):
        with pytest.raises(TrainingError, match=f"pt: trained by plans with other {name} than"):
            use()
    assert run_fold(fresh, "3d_fullres", "0", QUICK, restart=True)
    assert is_finished(fresh, later)


def test_checkpoints_that_do_not_note_their_plans_are_read(fresh):
    assert run_fold(fresh, "3d_fullres", "0", QUICK)
    run = open_run(fresh, "3d_fullres", "0", QUICK)
    path = run.folder / LATEST_CHECKPOINT
    raw = read_checkpoint(path, CONFIGURATION)
    del raw["plans"]
    torch.save(raw, path)
    assert is_finished(fresh, run)


def test_a_flipped_bit_is_seen_or_changes_nothing(fresh):
    """Of 300 flipped bits each is refused, or lies where nothing is read."""
    assert run_fold(fresh, "3d_fullres", "0", QUICK)
    path = run_folder(fresh, "3d_fullres", "0") / LATEST_CHECKPOINT
    whole, good = path.read_bytes(), leaves(read_checkpoint(path, CONFIGURATION))
    rng, refusals = random.Random(0), []
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            found = read_checkpoint(path, CONFIGURATION)
        except TrainingError as error:
            refusals.append(str(error))
        else:
            assert leaves(found) == good
    assert len(refusals) > 200
    for text in refusals:
        assert text.startswith(f"{path}: damaged or not a checkpoint (")
        assert text.endswith("or begin anew with --restart")
    path.write_bytes(whole)
    assert leaves(read_checkpoint(path, CONFIGURATION)) == good


def test_a_damaged_checkpoint_is_refused_by_the_command_in_one_line(fresh, capsys):
    assert run_fold(fresh, "3d_fullres", "0", QUICK)
    path = run_folder(fresh, "3d_fullres", "0") / LATEST_CHECKPOINT
    path.write_bytes(path.read_bytes()[:-1000])
    line = f"train 3d_fullres --workspace {fresh} --fold 0 --device cpu --threads 1 --workers 0"
    assert command(line.split()) == 1
    (last,) = [text for text in capsys.readouterr().err.splitlines() if "error:" in text]
    assert last.startswith(f"error: {path}: damaged or not a checkpoint (")


@contextlib.contextmanager
def files_of_at_most(size):
    """Within, no file grows beyond so many bytes: what a full disk does to whoever writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_checkpoint_before_it_and_says_so_in_one_line(fresh):
    assert run_fold(fresh, "3d_fullres", "0", dataclasses.replace(QUICK, epochs=1))
    path = run_folder(fresh, "3d_fullres", "0") / LATEST_CHECKPOINT
    before = path.read_bytes()
    with (
        files_of_at_most(len(before) // 2),
        pytest.raises(OutputError, match=rf"{path}: cannot write \(File too large\); make room"),
    ):
        save(*resumed(fresh, QUICK))
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".writing-*"))


def test_a_checkpoint_is_on_the_disk_before_it_replaces_another(fresh, monkeypatch):
    run, state = resumed(fresh, QUICK)
    done, sync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("sync"), sync(handle)))
    monkeypatch.setattr(Path, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    save(run, state)
    assert done == ["sync", "replace", "sync"]  # the file, its name, the folder


def save(run, state):
    """Write the latest checkpoint, and wait for it."""
    with Saver(run) as saver:
        saver.save(state)


def resumed(workspace, config):
    """A run and its state as its latest checkpoint has it, or from the beginning."""
    run = open_run(workspace, "3d_fullres", "0", config)
    state = begin(run)
    if (run.folder / LATEST_CHECKPOINT).exists():
        resume(run, state)
    return run, state


def test_what_is_saved_is_the_state_of_that_moment(fresh, monkeypatch):
    """Training goes on while a thread writes."""
    run, state = resumed(fresh, QUICK)
    real, go_on = files.write, threading.Event()

    def slowly(*args):
        assert go_on.wait(10)
        real(*args)

    monkeypatch.setattr(files, "write", slowly)
    expected = leaves({name: tensor.clone() for name, tensor in state.network.state_dict().items()})
    with Saver(run) as saver:
        saver.save(state)
        for parameter in state.network.parameters():
            parameter.data += 1
        go_on.set()
    assert (
        leaves(read_checkpoint(run.folder / LATEST_CHECKPOINT, CONFIGURATION)["network"])
        == expected
    )


def test_checkpoints_are_written_every_few_minutes_and_at_the_end(fresh, monkeypatch):
    """Epochs of 70 s: the first is saved, the fourth, and the last; the best of them before it."""
    run, state = resumed(fresh, QUICK)
    written, now = [], [0.0]

    def note(_, checkpoint, name):
        written.append((name, checkpoint["elapsed_s"]))

    monkeypatch.setattr(files, "write", note)
    monkeypatch.setattr(files, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with Saver(run) as saver:
        for epoch, dice in enumerate([0.1, 0.3, 0.2, 0.25, 0.28], start=1):
            now[0] = state.elapsed_s = 70.0 * epoch
            state.average_dice = dice
            state.best_dice = max(dice, state.best_dice or 0.0)
            state.history.append(dataclasses.replace(ROWS[1], epoch=epoch, pseudo_dice=dice))
            saver.epoch(state, last=epoch == 5)
    assert written == [
        (BEST_CHECKPOINT, 70.0), (LATEST_CHECKPOINT, 70.0),
        (BEST_CHECKPOINT, 140.0), (LATEST_CHECKPOINT, 280.0),
        (LATEST_CHECKPOINT, 350.0),
    ]  # fmt: skip


def test_a_disk_that_is_full_while_training_goes_on_ends_it_in_words(fresh, monkeypatch):
    def full(*_):
        raise OutputError("no room")

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(OutputError, match="no room"):
        run_fold(fresh, "3d_fullres", "0", QUICK)
    run, state = resumed(fresh, QUICK)
    with pytest.raises(ZeroDivisionError), Saver(run) as saver:  # noqa: PT012
        saver.save(state)
        raise ZeroDivisionError  # what comes first is what has to be said


def test_another_optimiser_is_refused_when_a_run_goes_on(fresh):
    assert run_fold(fresh, "3d_fullres", "0", dataclasses.replace(QUICK, epochs=1))
    config = dataclasses.replace(QUICK, optimiser="sgd")
    with pytest.raises(
        TrainingError, match=r"with adam so far, but --optimiser is sgd; .*--restart"
    ):
        run_fold(fresh, "3d_fullres", "0", config)
    assert run_fold(fresh, "3d_fullres", "0", config, restart=True)


def test_other_settings_of_the_optimiser_count_when_a_run_goes_on(fresh):
    first = dataclasses.replace(QUICK, epochs=1, amsgrad=False)
    assert run_fold(fresh, "3d_fullres", "0", first)
    config = dataclasses.replace(QUICK, amsgrad=True, weight_decay=0.125)
    assert run_fold(fresh, "3d_fullres", "0", config)
    path = run_folder(fresh, "3d_fullres", "0") / LATEST_CHECKPOINT
    saved = read_checkpoint(path, CONFIGURATION)["optimiser"]
    (group,) = saved["param_groups"]
    assert (group["amsgrad"], group["weight_decay"]) == (True, 0.125)
    assert all("max_exp_avg_sq" in moments for moments in saved["state"].values())


def stored(workspace, name=LATEST_CHECKPOINT):
    return read_checkpoint(run_folder(workspace, "3d_fullres", "0") / name, CONFIGURATION)


def test_a_checkpoint_that_does_not_say_its_schedule_is_read(fresh):
    """As earlier versions wrote it."""
    assert run_fold(fresh, "3d_fullres", "0", dataclasses.replace(QUICK, epochs=1))
    path = run_folder(fresh, "3d_fullres", "0") / LATEST_CHECKPOINT
    raw = stored(fresh)
    assert raw["schedule"].pop("kind") == "plateau"
    torch.save(raw, path)
    run = open_run(fresh, "3d_fullres", "0", dataclasses.replace(QUICK, epochs=1))
    assert is_finished(fresh, run)
    assert run_fold(fresh, "3d_fullres", "0", QUICK)
    assert stored(fresh)["schedule"]["kind"] == "plateau"


def test_best_checkpoint_is_where_the_average_dice_was_highest(fresh, monkeypatch):
    scores = iter([0.2, 0.6, 0.1, None])
    monkeypatch.setattr(loop, "pseudo_dice", lambda _: (next(scores),))
    run_fold(fresh, "3d_fullres", "0", dataclasses.replace(QUICK, epochs=4))
    end, best = stored(fresh), stored(fresh, BEST_CHECKPOINT)
    assert best["schedule"]["epoch"] == 2
    assert best["best_dice"] == pytest.approx(0.9 * 0.2 + 0.1 * 0.6)
    assert end["average_dice"] == pytest.approx(0.9 * (0.9 * 0.2 + 0.1 * 0.6) + 0.1 * 0.1)
    assert end["best_dice"] == best["best_dice"]
    assert [row["pseudo_dice"] for row in end["history"]] == [0.2, 0.6, 0.1, None]


def test_an_epoch_without_dice_is_not_the_best(fresh, monkeypatch):
    """As where none of its validation patches has foreground: the average stays what it was."""
    scores = iter([0.5, None, None])
    monkeypatch.setattr(loop, "pseudo_dice", lambda _: (next(scores),))
    monkeypatch.setattr(files, "EVERY_S", 0.0)
    run_fold(fresh, "3d_fullres", "0", dataclasses.replace(QUICK, epochs=3))
    assert stored(fresh)["schedule"]["epoch"] == 3
    assert stored(fresh, BEST_CHECKPOINT)["schedule"]["epoch"] == 1


def test_refuses_a_checkpoint_of_other_plans(fresh):
    run_fold(fresh, "3d_fullres", "0", QUICK)
    (fresh / "plans.json").unlink()
    (fresh / "plans.json").write_text(strict_json.dumps(planned(patch=(4, 24, 24))))
    with pytest.raises(TrainingError, match=r"of other plans .*begin anew with --restart"):
        run_fold(fresh, "3d_fullres", "0", QUICK)


def test_refuses_a_damaged_checkpoint(tmp_path):
    path = tmp_path / LATEST_CHECKPOINT
    with pytest.raises(TrainingError, match="no such file; run `train` first"):
        read_checkpoint(path, CONFIGURATION)
    path.write_bytes(b"half a file")
    with pytest.raises(TrainingError, match="damaged or not a checkpoint"):
        read_checkpoint(path, CONFIGURATION)
    torch.save({"configuration": "", "schema_version": 99}, path)
    with pytest.raises(TrainingError, match="checkpoint schema 99, this code reads 3"):
        read_checkpoint(path, CONFIGURATION)


def test_a_checkpoint_with_code_in_it_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "run",))

    torch.save({"configuration": Evil(), "schema_version": 3}, tmp_path / LATEST_CHECKPOINT)
    with pytest.raises(TrainingError, match="damaged or not a checkpoint"):
        read_checkpoint(tmp_path / LATEST_CHECKPOINT, CONFIGURATION)
    assert not (tmp_path / "run").exists()


def test_the_digest_is_of_names_and_values():
    weights = {"a": torch.arange(4.0).reshape(2, 2), "b": torch.zeros(1)}
    digest = weights_digest(weights)
    assert weights_digest(dict(reversed(weights.items()))) == digest
    assert weights_digest({"a": weights["a"].clone(), "b": weights["b"]}) == digest
    assert weights_digest({"a": weights["a"].T, "b": weights["b"]}) != digest
    assert weights_digest({"a": weights["a"], "c": weights["b"]}) != digest
