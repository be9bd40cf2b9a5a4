"""Bundles of several configurations: cascades, and means of configurations."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import CONFIGURATION, PLANS

from ichseg.engine import torch_engine
from ichseg.engine.engine import in_batches
from ichseg.errors import WeightsError
from ichseg.model import bundle
from ichseg.model.bundle import Model
from ichseg.model.network import build_network
from ichseg.model.rules import ComponentRule
from ichseg.predict import prepare, sliding_window
from ichseg.predict.ensemble import Ensemble
from ichseg.predict.restore import one_hot, regrid, restore

LOW = dataclasses.replace(CONFIGURATION, name="3d_lowres", spacing_mm=(5.0, 1.7, 1.7))
SECOND = dataclasses.replace(CONFIGURATION, name="3d_cascade_fullres", previous_stage="3d_lowres")
THREE = dataclasses.replace(PLANS, configurations=(LOW, SECOND, CONFIGURATION))


def make(folder, names, *, plans=THREE, average="probabilities", **changes):
    """A bundle of two untrained networks of each of these configurations."""
    torch.manual_seed(3)
    members = []
    for name in names:
        configuration = plans.configuration(name)
        for fold in "01":
            network = build_network(
                configuration.architecture, plans.input_channels(configuration), plans.scores
            )
            members.append(bundle.save_member(folder, name, fold, network.state_dict()))
    model = Model(
        schema_version=1,
        name="tiny",
        version="0",
        description="untrained",
        input_slug="head-ct",
        output_slug="bleed",
        average=average,
        mirror_axes=(0, 2),
        plans=plans,
        members=tuple(members),
        provenance={},
        **changes,
    )
    bundle.save_model(folder, model)
    return model


def scores_of(folder, model, name, data):
    """Mean scores by the bricks, in one go."""
    configuration, total = model.plans.configuration(name), 0
    for member in model.members_of(name):
        network = build_network(configuration.architecture, len(data), model.plans.scores).eval()
        network.load_state_dict(torch_engine.tensors(bundle.load_state(folder, member)))
        with torch.inference_mode():
            total = total + sliding_window.predict_tiled(
                in_batches(
                    lambda x, n=network: (
                        n(x).softmax(1) if model.average == "probabilities" else n(x)
                    ),
                    4,
                ),
                torch.from_numpy(data),
                configuration.tile,
                mirror_axes=(0, 2),
            )
    return total / 2


@pytest.mark.parametrize("way", ["scores", "labels"])
def test_a_cascades_second_stage_sees_what_the_first_found(tmp_path, scan, way):
    model = make(tmp_path, ["3d_cascade_fullres", "3d_lowres"], cascade=way)
    low = prepare.prepare([scan], THREE, LOW)
    high = prepare.prepare([scan], THREE, SECOND)
    first = (scores_of(tmp_path, model, "3d_lowres", low.data), low.placement)
    if way == "scores":
        previous = regrid(*first, high.placement, THREE)
    else:
        labels = restore([first], THREE)
        previous = prepare.prepare_labels(
            scan.with_voxels(labels), high.placement, THREE,
            prepare.outside_nonzero([scan], high.placement),
        )  # fmt: skip
    assert 0.02 < (previous == 1).mean() < 0.98
    data = np.concatenate((high.data, one_hot(previous, 1)))
    scores = scores_of(tmp_path, model, "3d_cascade_fullres", data)
    expected = restore([(scores, high.placement)], THREE)
    ensemble = Ensemble.load(tmp_path, "cpu", "float32")
    assert ensemble.model.averaged == ("3d_cascade_fullres",)
    found = ensemble.segment(scan, "full")
    assert 0.02 < expected.mean() < 0.98
    assert np.mean(found.mask.voxels != expected) < 2e-3
    assert found.ran["networks"] == [
        f"{name} fold {fold}" for name in ("3d_lowres", "3d_cascade_fullres") for fold in "01"
    ]
    blind = np.concatenate((high.data, np.zeros_like(data[1:])))
    unseen = scores_of(tmp_path, model, "3d_cascade_fullres", blind)
    other = restore([(unseen, high.placement)], THREE)
    assert np.mean(other != expected) > 0.01  # or the second stage would not listen


def test_configurations_are_averaged_in_the_volumes_grid(tmp_path, scan):
    model = make(tmp_path, ["3d_fullres", "3d_lowres"])
    parts = []
    for configuration in (CONFIGURATION, LOW):
        case = prepare.prepare([scan], THREE, configuration)
        scores = scores_of(tmp_path, model, configuration.name, case.data)
        parts.append((scores, case.placement))
    expected = restore(parts, THREE)
    alone = [restore([part], THREE) for part in parts]
    assert min(np.mean(one != expected) for one in alone) > 0.01
    found = Ensemble.load(tmp_path, "cpu", "float32").segment(scan, "full")
    assert np.mean(found.mask.voxels != expected) < 2e-3


def test_a_first_stage_can_be_averaged_too(tmp_path, scan):
    names = ("3d_lowres", "3d_cascade_fullres")
    make(tmp_path, names, averages=names)
    ensemble = Ensemble.load(tmp_path, "cpu", "float32")
    assert ensemble.model.in_order == names
    predicted = ensemble.predict(ensemble.prepare(ensemble.plan(scan, "fast")))
    assert [placement.grid_spacing_mm for _, placement in predicted.parts] == [
        LOW.spacing_mm,
        SECOND.spacing_mm,
    ]


def test_two_cascades_share_a_first_stage(tmp_path, scan):
    third = dataclasses.replace(SECOND, name="3d_cascade_other", spacing_mm=(5.0, 1.3, 1.3))
    plans = dataclasses.replace(PLANS, configurations=(LOW, SECOND, third))
    model = make(tmp_path, ["3d_lowres", SECOND.name, third.name], plans=plans)
    ensemble = Ensemble.load(tmp_path, "cpu", "float32")
    assert ensemble.model.averaged == (SECOND.name, third.name)
    both = ensemble.predict(ensemble.prepare(ensemble.plan(scan, "fast")))
    bundle.save_model(tmp_path, dataclasses.replace(model, averages=(third.name,)))
    ensemble = Ensemble.load(tmp_path, "cpu", "float32")
    alone = ensemble.predict(ensemble.prepare(ensemble.plan(scan, "fast")))
    assert both.ran["networks"] == [f"{name} fold 0" for name in model.in_order]
    assert alone.ran["networks"] == ["3d_lowres fold 0", f"{third.name} fold 0"]
    np.testing.assert_array_equal(both.parts[1][0], alone.parts[0][0])


def test_logits_of_configurations_are_averaged_as_probabilities(scan):
    """A sure network outvotes two unsure ones as a logit, not as a probability.

    Leads of 9, -1 and -1: as probabilities 1.000, -0.462 and -0.462, still more; of 9, -2 and -2:
    1.000, -0.762 and -0.762.
    """
    cases = [prepare.prepare([scan], PLANS, c) for c in (LOW, CONFIGURATION, CONFIGURATION)]

    def labels(*leads):
        parts = []
        for case, lead in zip(cases, leads, strict=False):
            scores = np.zeros((2, *case.data.shape[1:]), np.float32)
            scores[1] = lead
            parts.append((scores, case.placement))
        return np.unique(restore(parts, PLANS, average="logits")).tolist()

    assert labels(9.0, -1.0, -1.0) == [1]
    assert labels(9.0, -2.0, -2.0) == [0]
    assert labels(1.0, -0.9) == [1]
    assert labels(0.9, -1.0) == [0]


def test_regions_run_through_the_ensemble(tmp_path, scan):
    plans = dataclasses.replace(THREE, labels=("background", "oedema", "core"), regions=(1, 2))
    model = make(tmp_path, ["3d_fullres"], plans=plans, average="logits")
    case = prepare.prepare([scan], plans, CONFIGURATION)
    scores = scores_of(tmp_path, model, "3d_fullres", case.data)
    expected = restore([(scores, case.placement)], plans, average="logits")
    found = Ensemble.load(tmp_path, "cpu", "float32").segment(scan, "full")
    assert len(np.unique(expected)) == 3
    assert np.mean(found.mask.voxels != expected) < 2e-3


def test_the_bundles_rules_are_applied(tmp_path, scan):
    model = make(tmp_path, ["3d_fullres"])
    plain = Ensemble.load(tmp_path, "cpu", "float32").segment(scan, "fast")
    rules = (ComponentRule(1, drop_below_ml=plain.volume_ml + 1),)
    ruled = dataclasses.replace(model, rules=rules)
    bundle.save_model(tmp_path, ruled)
    kept = Ensemble.load(tmp_path, "cpu", "float32").segment(scan, "fast")
    assert plain.volume_ml > kept.volume_ml == 0
    assert not kept.mask.voxels.any()


def test_a_second_stage_without_its_first_is_refused(tmp_path):
    with pytest.raises(ValueError, match="3d_cascade_fullres needs the segmentation of 3d_lowres"):
        make(tmp_path, ["3d_cascade_fullres"])
    make(tmp_path, ["3d_lowres", "3d_cascade_fullres"])
    path = tmp_path / "model.json"
    path.write_text(
        path.read_text().replace('"configuration": "3d_lowres"', '"configuration": "3d_fullres"')
    )
    with pytest.raises(WeightsError, match="needs the segmentation of 3d_lowres"):
        Ensemble.load(tmp_path, "cpu", "float32")
