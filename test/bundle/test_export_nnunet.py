"""Bundles back to nnU-Net's folders; that nnunetv2 takes them, ``benchmarks/parity.py`` shows."""

import dataclasses
import json
import logging
import resource

import numpy as np
import pytest
import torch
from helpers import nnunet_folders as theirs
from helpers.nnunet_folders import DATASET

from ichseg.errors import OutputError, PlansError, WeightsError
from ichseg.model import bundle
from ichseg.model.network import build_network
from ichseg.model.plans import Normalisation, Resampling
from ichseg.model.rules import ComponentRule
from training.__main__ import main
from training.bundle.export_nnunet import export_folders, lost
from training.bundle.import_nnunet import import_folders

FLAT, VOLUME = theirs.SMALL, theirs.VOLUME
PLAIN = theirs.NETWORKS["plain_3d"] | {"input": [1, 1, 8, 16, 16], "classes": 2}
REGIONS = DATASET | {
    "labels": {"background": 0, "whole": [1, 2], "core": 2},
    "regions_class_order": [1, 2],
}


def written(folder):
    """All of nnU-Net's keys of a checkpoint, with their tensors."""
    found = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=True)
    return found["network_weights"]


def same(one, two):
    """Whether two bundles differ in their names and in where they come from alone."""
    free = {"provenance": {}, "name": "", "description": ""}
    return dataclasses.replace(one, **free) == dataclasses.replace(two, **free)


def as_plans(described, name="3d_fullres"):
    count = described["input"][1]
    own = theirs.configuration(described)
    own["normalization_schemes"] *= count
    own["use_mask_for_norm"] *= count
    planned = theirs.plans({name: own})
    key = "foreground_intensity_properties_per_channel"
    planned[key] = {str(i): planned[key]["0"] for i in range(count)}
    labels = {"background": 0} | {f"kind {i}": i for i in range(1, described["classes"])}
    channels = {str(i): "CT" for i in range(count)}
    return planned, DATASET | {"labels": labels, "channel_names": channels}


@pytest.mark.parametrize(
    ("described", "name"),
    [(FLAT, "2d"), (PLAIN, "3d_fullres"), (VOLUME, "3d_lowres")],
    ids=["residual 2d", "plain 3d", "residual 3d"],
)
def test_there_and_back_is_the_same_bundle(tmp_path, described, name):
    planned, dataset = as_plans(described, name)
    first = theirs.write(
        tmp_path, described, name, planned=planned, dataset=dataset, folds=("0", "all")
    )
    was = import_folders([first], tmp_path / "was", folds=["0", "all"])
    (folder,) = export_folders(tmp_path / "was", tmp_path / "out")
    assert folder == tmp_path / "out" / f"nnUNetTrainer__nnUNetPlans__{name}"
    now = import_folders([folder], tmp_path / "now", folds=["0", "all"])
    assert same(was, now)  # with the checksums of the weights
    before = theirs.weights(described)
    assert {k: t.shape for k, t in written(folder).items()} == {
        k: t.shape for k, t in before.items()
    }
    for key, tensor in written(folder).items():
        assert torch.equal(tensor, before[key].float()), key


def test_a_checkpoint_that_cannot_be_written_is_told_in_words(tmp_path):
    """As on a full disk, which torch reports as an error of its own."""
    import_folders([theirs.write(tmp_path, VOLUME)], tmp_path / "bundle")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OutputError, match=r"out: cannot write \(File too large"):
            export_folders(tmp_path / "bundle", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "out").iterdir())


def test_a_cascade_goes_back_with_both_stages(tmp_path):
    second = VOLUME | {"input": [2, 2, 4, 16, 16]}
    planned = theirs.plans(
        {
            "3d_lowres": theirs.configuration(VOLUME) | {"spacing": [5.0, 1.0, 1.0]},
            "3d_fullres": theirs.configuration(VOLUME),
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        }
    )
    folders = [
        theirs.write(tmp_path, described, name, planned=planned)
        for described, name in ((VOLUME, "3d_lowres"), (second, "3d_cascade_fullres"))
    ]
    was = import_folders(folders, tmp_path / "was")
    back = export_folders(tmp_path / "was", tmp_path / "out")
    assert [f.name.rpartition("__")[2] for f in back] == ["3d_lowres", "3d_cascade_fullres"]
    plans = json.loads((back[0] / "plans.json").read_text())
    assert plans["configurations"]["3d_lowres"]["next_stage"] == "3d_cascade_fullres"
    assert same(was, import_folders(back, tmp_path / "now"))
    (sentence,) = lost(was)
    assert "-prev_stage_predictions" in sentence


def test_each_condition_of_a_rule_is_named(tmp_path):
    was = import_folders([theirs.write(tmp_path, FLAT, "2d")], tmp_path / "was")
    rules = (ComponentRule(1, drop_below_probability=0.6), ComponentRule(1, True, 0.05, 0.7))
    first, second = lost(dataclasses.replace(was, rules=rules))
    name = was.plans.labels[1]
    assert first == (
        f"nnU-Net keeps components of a mean probability below 0.6 of {name}, which this bundle "
        "drops"
    )
    assert "all components but the largest and components below 0.05 mL and components of" in second


def test_regions_go_back(tmp_path):
    folder = theirs.write(tmp_path, FLAT, "2d", dataset=REGIONS | {"numTraining": 3})
    was = import_folders([folder], tmp_path / "was")
    assert was.plans.region_labels == ((1, 2), (2,))
    (back,) = export_folders(tmp_path / "was", tmp_path / "out")
    dataset = json.loads((back / "dataset.json").read_text())
    assert dataset["labels"] == {"background": 0, "whole": [1, 2], "core": [2]}
    assert dataset["regions_class_order"] == [1, 2]
    assert same(was, import_folders([back], tmp_path / "now"))
    older = dataclasses.replace(was, plans=dataclasses.replace(was.plans, region_labels=()))
    bundle.save_model(tmp_path / "was", older)
    with pytest.raises(PlansError, match="do not say which labels its regions hold"):
        export_folders(tmp_path / "was", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.fixture
def ours(tmp_path):
    """A bundle as the 2018 recipe trains it: no biases, one head, plans that nnU-Net has not."""
    folder = theirs.write(tmp_path, PLAIN, planned=as_plans(PLAIN)[0])
    model = import_folders([folder], tmp_path / "imported")
    own = model.plans.configurations[0]
    architecture = dataclasses.replace(
        own.architecture, upsampling_bias=False, head_bias=False, deep_supervision=False
    )
    plans = dataclasses.replace(
        model.plans,
        recipe="msd2018",
        orientation="LPS",
        transpose=(1, 2, 0),
        normalise_first=False,
        normalisations=(Normalisation("ct", -50.0, 130.0, 59.0, 9.5),),
        resampling=Resampling(1, 0, 1, ("image", "score"), 2.5),
        configurations=(dataclasses.replace(own, architecture=architecture),),
        crop="head",
    )
    torch.manual_seed(0)
    network = build_network(architecture, 1, plans.scores)
    out = tmp_path / "bundle"
    out.mkdir()
    member = bundle.save_member(out, own.name, "0", network.state_dict(), dtype=np.float32)
    model = dataclasses.replace(
        model,
        plans=plans,
        members=(member,),
        average="probabilities",
        rules=(ComponentRule(1, keep_largest=True),),
    )
    bundle.save_model(out, model)
    return out, network.eval()


def test_what_nnunet_has_and_ours_has_not_is_zero(tmp_path, ours):
    """The complete network that nnU-Net builds gives the same scores."""
    source, network = ours
    (folder,) = export_folders(source, tmp_path / "out")
    weights = written(folder)
    assert weights["decoder.seg_layers.0.weight"].abs().sum() == 0  # a head that was not trained
    assert weights["decoder.transpconvs.0.bias"].abs().sum() == 0
    model = import_folders([folder], tmp_path / "again")
    own = model.plans.configurations[0]
    assert own.architecture.deep_supervision
    assert own.architecture.head_bias
    complete = build_network(own.architecture, 1, model.plans.scores).eval()
    state = bundle.load_state(tmp_path / "again", model.members[0])
    complete.load_state_dict({key: torch.from_numpy(array) for key, array in state.items()})
    x = torch.randn(1, 1, 8, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(network(x), complete(x))


def test_plans_go_over_as_far_as_nnunet_has_words_for_them(tmp_path, ours):
    source, _ = ours
    (folder,) = export_folders(source, tmp_path / "out")
    plans = json.loads((folder / "plans.json").read_text())
    assert plans["transpose_forward"] == [1, 2, 0]
    assert plans["transpose_backward"] == [2, 0, 1]
    assert plans["image_reader_writer"] == "SimpleITKIO"
    assert plans["foreground_intensity_properties_per_channel"] == {
        "0": {"mean": 59.0, "std": 9.5, "percentile_00_5": -50.0, "percentile_99_5": 130.0}
    }
    found = import_folders([folder], tmp_path / "again").plans
    was = bundle.load_model(source).plans
    assert found.normalisations == was.normalisations
    assert found.resampling == was.resampling
    (own,), (theirs_now,) = was.configurations, found.configurations
    assert theirs_now == dataclasses.replace(own, architecture=theirs_now.architecture)


def test_what_is_lost_is_said(tmp_path, ours, caplog):
    caplog.set_level(logging.INFO)
    source, _ = ours
    assert main(["export-nnunet", str(source), "--out", str(tmp_path / "out")]) == 0
    said = "\n".join(caplog.messages)
    for words in ("LPS", "probabilities", "normalises before", "cut to the head", "largest"):
        assert words in said
    assert str(tmp_path / "out" / "nnUNetTrainer__nnUNetPlans__3d_fullres") in said


def test_nothing_is_said_of_an_imported_bundle(tmp_path):
    folder = theirs.write(tmp_path, FLAT, "2d")
    assert [*lost(import_folders([folder], tmp_path / "bundle"))] == []


@pytest.mark.parametrize("axes", [(), (1,), (0, 2)])
def test_mirror_axes_go_back(tmp_path, axes):
    folder = theirs.write(tmp_path, PLAIN, inference_allowed_mirroring_axes=axes)
    was = import_folders([folder], tmp_path / "was")
    assert was.mirror_axes == axes
    back = export_folders(tmp_path / "was", tmp_path / "out")
    assert import_folders(back, tmp_path / "now").mirror_axes == axes
    written = torch.load(next(back[0].rglob("checkpoint_final.pth")), weights_only=False)
    theirs_says = written["inference_allowed_mirroring_axes"]
    assert theirs_says == (axes or None)  # nnU-Net takes the largest of a tuple, so of one at least


def test_a_folder_that_is_there_stays(tmp_path, ours):
    source, _ = ours
    export_folders(source, tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        export_folders(source, tmp_path / "out")


def test_labels_that_nnunet_would_take_for_others_are_refused(tmp_path, ours):
    source, _ = ours
    model = bundle.load_model(source)
    for labels in (("background", "ignore"), ("background", "a", "a")):
        plans = dataclasses.replace(model.plans, labels=labels)
        bundle.save_model(source, dataclasses.replace(model, plans=plans))
        with pytest.raises(PlansError, match="expected names that differ"):
            export_folders(source, tmp_path / "out")


def test_weights_of_other_plans_are_refused_and_nothing_is_left(tmp_path, ours):
    source, _ = ours
    model = bundle.load_model(source)
    plans = dataclasses.replace(model.plans, labels=("background", "a", "b"))
    bundle.save_model(source, dataclasses.replace(model, plans=plans, rules=()))
    with pytest.raises(WeightsError, match=r"safetensors: tensor heads.0.weight is not that of"):
        export_folders(source, tmp_path / "out")
    assert not [*(tmp_path / "out").iterdir()]
