"""Choosing configurations and rules by cross-validation, on masks and probabilities made here."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from conftest import CONFIGURATION, PLANS
from helpers.workspaces import make_workspace

from ichseg.errors import TrainingError
from ichseg.model import strict_json
from ichseg.model.rules import ComponentRule
from ichseg.predict.prepare import place
from ichseg.predict.restore import restore
from ichseg.scan import volume
from training.crossval import merge, probabilities, selection, unseen
from training.data import dataset
from training.data.workspace import (
    LATEST_CHECKPOINT,
    mask_file,
    probabilities_file,
    probabilities_folder,
    run_folder,
    runs_folder,
)

LOW = dataclasses.replace(CONFIGURATION, name="3d_lowres", spacing_mm=(5.0, 2.0, 2.0))
PLANNED = dataclasses.replace(PLANS, configurations=(CONFIGURATION, LOW))
NAMES = ("3d_fullres", "3d_lowres")


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """Four cases; what a configuration finds in one is put there by ``put``."""
    make_workspace(tmp_path, cases=4, plans=PLANNED)
    monkeypatch.setattr(
        merge,
        "validated_masks",
        lambda folder, name: {
            case.name: mask_file(run_folder(folder, name, "0"), case.name)
            for case in dataset.load_dataset(folder).labelled
        },
    )
    monkeypatch.setattr(merge, "digest_of_folds", lambda folder, name: f"weights of {name}")
    return tmp_path


def references(workspace):
    for case in dataset.load_dataset(workspace).labelled:
        yield case, volume.read(case.images[0]), volume.read(case.label).voxels.astype(bool)


def put(workspace, configuration, case, image, lead):
    """Store a configuration's probabilities for blood, given in the image's grid, and its mask."""
    wanted = place([image], PLANNED, configuration)
    steps = [(np.arange(n) * m // n) for n, m in zip(wanted.grid_shape, lead.shape, strict=True)]
    share = np.clip(lead[np.ix_(*steps)], 0, 1).astype(np.float32)
    scores = torch.from_numpy(np.stack((1 - share, share)))
    folder = run_folder(workspace, configuration.name, "0")
    probabilities.save(probabilities_file(folder, case.name), scores, regions=False)
    labels = restore([(scores.numpy(), wanted)], PLANNED)
    volume.write(image.with_voxels(labels), mask_file(folder, case.name))
    (folder / LATEST_CHECKPOINT).touch()
    return scores, wanted


def halves(blood):
    """The lower and the upper half of the slices that have blood."""
    slices = np.flatnonzero(blood.any(axis=(1, 2)))
    lower = np.zeros_like(blood)
    lower[: slices[len(slices) // 2]] = True
    return blood & lower, blood & ~lower


def test_cases_that_no_fold_validates_are_left_out(workspace, monkeypatch):
    """As of folds that a user wrote, or where cases came later."""
    for case, image, blood in references(workspace):
        put(workspace, CONFIGURATION, case, image, blood.astype(float))
    every = merge.validated_masks(workspace, "3d_fullres")
    some = {name: path for name, path in every.items() if name != min(every)}
    monkeypatch.setattr(merge, "validated_masks", lambda *_: some)
    assert selection.select(workspace, ("3d_fullres",), workers=1).cases == len(every) - 1


def test_two_that_complete_each_other_are_selected_together(workspace):
    """Each is sure of one half and nearly sure of the other: only their mean finds both."""
    for case, image, blood in references(workspace):
        lower, upper = halves(blood)
        for configuration, sure, unsure in (
            (CONFIGURATION, lower, upper),
            (LOW, upper, lower),
        ):
            put(workspace, configuration, case, image, 0.95 * sure + 0.45 * unsure)
    found = selection.select(workspace, NAMES, workers=1)
    assert found.configurations == NAMES
    assert [c.configurations for c in found.candidates] == [NAMES[:1], NAMES[1:], NAMES]
    single = found.candidates[0].mean_dice
    assert found.mean_dice > single + 0.1
    assert selection.load(workspace) == found


def test_of_equals_the_simpler_is_selected(workspace):
    for case, image, blood in references(workspace):
        for configuration in (CONFIGURATION, LOW):
            put(workspace, configuration, case, image, 1.0 * blood)
    masks = [mask_file(run_folder(workspace, n, "0"), "case_0").parent for n in NAMES]
    for path in masks[0].iterdir():  # the same to the voxel
        (masks[1] / path.name).write_bytes(path.read_bytes())
    assert selection.select(workspace, NAMES, workers=1).configurations == NAMES[:1]


def test_a_pair_decides_as_its_unrounded_mean_but_for_ties(workspace):
    rng = np.random.default_rng(5)
    for case, image, blood in references(workspace):
        parts = [
            put(workspace, c, case, image, rng.random(blood.shape)) for c in (CONFIGURATION, LOW)
        ]
        exact = restore([(s.numpy(), p) for s, p in parts], PLANNED)
        task = unseen.UnseenCase(case, "0", {})
        kept = unseen.found_labels(task, [image], workspace, PLANNED, NAMES)
        different = kept != exact
        assert 0.2 < exact.mean() < 0.8
        assert different.mean() < 0.01  # as the lead is off by at most 2 / 255 of a range of 2


def test_a_rule_that_drops_false_specks_is_adopted_and_keeping_the_largest_is_not(workspace):
    """Specks of 4 voxels, 0.02 mL, in each case; two cases have a second, smaller bleed."""
    for number, (case, image, blood) in enumerate(references(workspace)):
        reference = blood.copy()
        if number < 2:
            reference[5, 15:23, 15:23] = True  # 64 voxels: 0.32 mL
            volume.write(image.with_voxels(reference.astype(np.uint8)), case.label)
        found = reference.copy()
        found[0, 21:23, :2] = True
        put(workspace, CONFIGURATION, case, image, 1.0 * found)
    chosen = selection.select(workspace, NAMES[:1], workers=1)
    assert chosen.rules == (ComponentRule(1, drop_below_ml=0.05),)
    assert chosen.mean_dice == pytest.approx(1, abs=1e-6)
    tried = {trial.rule: trial for trial in chosen.trials}
    kept = tried[ComponentRule(1, keep_largest=True)]
    assert (kept.better, kept.worse, kept.adopted) == (2, 2, False)
    assert "not adopted" in kept.reason
    large = tried[ComponentRule(1, drop_below_ml=0.5)]
    assert large.worse == 2
    same = tried[ComponentRule(1, drop_below_ml=0.1)]
    assert same.dice == pytest.approx(1)
    assert same.reason.startswith("not adopted, another gains more")
    assert "* 1.0000  hemorrhage: drop parts under 0.05 mL" in selection.describe(chosen)
    spared = selection.select(workspace, NAMES[:1], most_ml=0.1, workers=1)
    assert spared.rules == chosen.rules
    wanted = [ComponentRule(1, drop_below_ml=most_ml) for most_ml in (0.05, 0.1)]
    assert [trial.rule for trial in spared.trials] == wanted
    none = selection.select(workspace, NAMES[:1], most_ml=0.01, workers=1)
    assert (none.rules, none.trials) == ((), ())


def test_a_false_alarm_in_a_case_without_blood_costs_a_whole_case(workspace):
    """One of four has none, and a speck: Dice 1, 1, 1 and 0, with the rule 1 in all."""
    for number, (case, image, blood) in enumerate(references(workspace)):
        found = blood.copy()
        if number == 0:
            volume.write(image.with_voxels(np.zeros_like(blood, np.uint8)), case.label)
            found[:] = False
            found[0, 21:23, :2] = True
        put(workspace, CONFIGURATION, case, image, 1.0 * found)
    chosen = selection.select(workspace, NAMES[:1], workers=1)
    assert chosen.candidates[0].mean_dice == pytest.approx(0.75, abs=1e-4)
    assert chosen.mean_dice == pytest.approx(1, abs=1e-6)


def test_a_selection_is_of_the_weights_that_it_was_made_from(workspace, monkeypatch):
    for case, image, blood in references(workspace):
        put(workspace, CONFIGURATION, case, image, 1.0 * blood)
    chosen = selection.select(workspace, NAMES[:1], workers=1)
    selection.require_current(workspace, selection.load(workspace))
    monkeypatch.setattr(merge, "digest_of_folds", lambda folder, name: "others")
    with pytest.raises(
        TrainingError, match=r"from other weights, images or labels than .* 3d_fullres"
    ):
        selection.require_current(workspace, chosen)
    with pytest.raises(TrainingError, match="run `cross-validate` and `select` again"):
        selection.require_current(workspace, dataclasses.replace(chosen, made_from=None))


def test_a_fold_that_changes_while_cases_are_judged_is_noticed(workspace, monkeypatch):
    for case, image, blood in references(workspace):
        put(workspace, CONFIGURATION, case, image, 1.0 * blood)
    real, weights = selection._each, ["before"]

    def judge(*given, **named):
        weights.append("after")
        return real(*given, **named)

    monkeypatch.setattr(selection, "_each", judge)
    monkeypatch.setattr(merge, "digest_of_folds", lambda folder, name: weights[-1])
    chosen = selection.select(workspace, NAMES[:1], workers=1)
    assert chosen.made_from == {"3d_fullres": "before"}
    with pytest.raises(TrainingError, match="run `cross-validate` and `select` again"):
        selection.require_current(workspace, chosen)


def test_the_weights_of_what_was_not_chosen_count_while_they_are_there(workspace, monkeypatch):
    for case, image, blood in references(workspace):
        put(workspace, CONFIGURATION, case, image, 1.0 * blood)
        put(workspace, LOW, case, image, 0.0 * blood)
    chosen = selection.select(workspace, NAMES, workers=1)
    assert chosen.configurations == NAMES[:1]
    others = {"3d_fullres": "weights of 3d_fullres", "3d_lowres": "trained further"}
    monkeypatch.setattr(merge, "digest_of_folds", lambda folder, name: others[name])
    with pytest.raises(TrainingError, match=r"labels than the folds of 3d_lowres have now"):
        selection.require_current(workspace, chosen)
    shutil.rmtree(runs_folder(workspace, "3d_lowres"))
    selection.require_current(workspace, chosen)


def test_probabilities_stay_unless_dropped_and_are_then_missed(workspace):
    for case, image, blood in references(workspace):
        for configuration in (CONFIGURATION, LOW):
            put(workspace, configuration, case, image, 1.0 * blood)
    folders = [probabilities_folder(run_folder(workspace, n, "0")) for n in NAMES]
    selection.select(workspace, NAMES[:1], workers=1)
    assert len(selection.select(workspace, NAMES, workers=1).candidates) == 3
    assert all(folder.is_dir() for folder in folders)
    selection.select(workspace, NAMES, drop_probabilities=True, workers=1)
    assert not any(folder.exists() for folder in folders)
    with pytest.raises(TrainingError, match=r"run `train 3d_fullres --fold 0`"):
        selection.select(workspace, NAMES, workers=1)
    assert len(selection.select(workspace, NAMES[:1], workers=1).candidates) == 1  # needs none


def test_voxels_to_ignore_do_not_decide(workspace):
    """What one finds too much lies where nobody could tell: it is as good as the other."""
    data = dataset.load_dataset(workspace)
    for case, image, blood in references(workspace):
        hidden = blood.astype(np.uint8)
        hidden[:, :, -3:] = 2
        volume.write(image.with_voxels(hidden), case.reference)
        told = blood.copy()
        told[:, :, -3:] = False
        too_much = told.copy()
        too_much[:, :, -3:] = True
        put(workspace, CONFIGURATION, case, image, 1.0 * too_much)
        put(workspace, LOW, case, image, 0.0 * told)
    dataset.save_dataset(dataclasses.replace(data, ignore_label=2), workspace)
    chosen = selection.select(workspace, NAMES[:1], workers=1)
    assert chosen.mean_dice == pytest.approx(1, abs=1e-6)


def test_each_region_is_decided_by_its_own_mean(workspace):
    """Of the bleed 0.88 and 0.27, of its core 0.73 and 0.12: the means are above and below a half.

    Stored are logits, as a network of regions gives them.
    """
    planned = dataclasses.replace(
        PLANNED,
        labels=("background", "bleed", "core"),
        regions=(1, 2),
        region_labels=((1, 2), (2,)),
    )
    case, image, _ = next(references(workspace))
    for configuration, logits in ((CONFIGURATION, (2.0, 1.0)), (LOW, (-1.0, -2.0))):
        shape = place([image], planned, configuration).grid_shape
        scores = torch.tensor(logits).reshape(2, 1, 1, 1).expand(2, *shape)
        path = probabilities_file(run_folder(workspace, configuration.name, "0"), case.name)
        probabilities.save(path, scores, regions=True)
    task = unseen.UnseenCase(case, "0", {})
    assert (unseen.found_labels(task, [image], workspace, planned, NAMES) == 1).all()


def test_a_pair_of_regions_decides_as_the_ensemble_does(workspace):
    """Which brings logits to the volume's grid: steep ones, as of a lesion of a few voxels."""
    planned = dataclasses.replace(
        PLANNED, labels=("background", "bleed"), regions=(1,), region_labels=((1,),)
    )
    rng = np.random.default_rng(6)
    case, image, _ = next(references(workspace))
    parts = []
    for configuration in (CONFIGURATION, LOW):
        wanted = place([image], planned, configuration)
        scores = torch.from_numpy(rng.normal(-2, 5, (1, *wanted.grid_shape)).astype(np.float32))
        path = probabilities_file(run_folder(workspace, configuration.name, "0"), case.name)
        probabilities.save(path, scores, regions=True)
        parts.append((scores.numpy(), wanted))
    exact = restore(parts, planned, average="logits")
    found = unseen.found_labels(
        unseen.UnseenCase(case, "0", {}), [image], workspace, planned, NAMES
    )
    assert 0.1 < exact.mean() < 0.9
    assert np.mean(found != exact) < 0.02


def test_cases_of_two_channels_are_judged(workspace):
    """Both channels say where a case lies in the network's grid: the first one alone has a border
    of zeros, which would be cut off.
    """
    planned = dataclasses.replace(
        PLANNED, channels=("CT", "MR"), normalisations=PLANS.normalisations * 2
    )
    data = dataset.load_dataset(workspace)
    cases = []
    for case, image, blood in references(workspace):
        voxels = image.voxels.copy()
        voxels[:, :8] = 0
        volume.write(image.with_voxels(voxels), case.images[0])
        second = case.images[0].with_name(f"{case.name}_mr.nii.gz")
        volume.write(image, second)
        for configuration in (CONFIGURATION, LOW):
            put(workspace, configuration, case, image, 1.0 * blood)
        cases.append(dataclasses.replace(case, images=(case.images[0], second)))
    dataset.save_dataset(
        dataclasses.replace(data, channels=planned.channels, cases=tuple(cases)), workspace
    )
    (workspace / "plans.json").write_text(strict_json.dumps(planned))
    found = selection.select(workspace, NAMES, workers=1)
    fine, _, both = (candidate.mean_dice for candidate in found.candidates)
    assert (fine, both) == (1, 1)
