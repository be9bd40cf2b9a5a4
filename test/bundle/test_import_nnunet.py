"""Model folders of nnU-Net become bundles that do the same."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from helpers import nnunet_folders as theirs
from helpers.nnunet_folders import DATASET, NETWORKS, SMALL, VOLUME

from ichseg.engine import torch_engine
from ichseg.engine.engine import in_batches
from ichseg.errors import OutputError, PlansError, WeightsError
from ichseg.model import bundle
from ichseg.model.network import build_network
from ichseg.model.plans import Normalisation
from ichseg.predict import prepare, sliding_window
from ichseg.predict.ensemble import Ensemble
from ichseg.predict.prepare import place, plan_axes
from ichseg.predict.restore import restore
from ichseg.scan.volume import Volume
from training.__main__ import main
from training.bundle.identity import Identity
from training.bundle.import_nnunet import import_folders

NAMES = {"plain_3d": "3d_fullres", "residual_3d": "3d_lowres", "residual_2d": "2d"}


def labels_for(described):
    return {"background": 0} | {f"kind {i}": i for i in range(1, described["classes"])}


def dataset_for(described):
    channels = {str(i): "CT" for i in range(described["input"][1])}
    return DATASET | {"labels": labels_for(described), "channel_names": channels}


def plans_for(described, name):
    count = described["input"][1]
    planned = theirs.plans({name: theirs.configuration(described)})
    key = "foreground_intensity_properties_per_channel"
    planned[key] = {str(i): planned[key]["0"] for i in range(count)}
    own = planned["configurations"][name]
    own["normalization_schemes"] *= count
    own["use_mask_for_norm"] *= count
    return planned


@pytest.mark.parametrize("described", NETWORKS.values(), ids=NETWORKS)
def test_logits_are_nnunetv2s(tmp_path, described, caplog):
    """By way of nnU-Net's names in a checkpoint and ours in a bundle; rounded to fp32 only."""
    name = NAMES[described["name"]]
    folder = theirs.write(
        tmp_path, described, name,
        planned=plans_for(described, name), dataset=dataset_for(described),
    )  # fmt: skip
    model = import_folders([folder], tmp_path / "bundle")
    told = "process.py refuses it, as it is given one scan a case" in caplog.text
    assert told == (described["input"][1] > 1)
    plans = bundle.load_model(tmp_path / "bundle").plans
    configuration = plans.configuration(name)
    network = build_network(
        configuration.architecture, plans.input_channels(configuration), plans.scores
    )
    state = bundle.load_state(tmp_path / "bundle", model.members[0])
    network.load_state_dict(torch_engine.tensors(state))
    count = torch.Size(described["input"]).numel()
    x = torch.arange(count, dtype=torch.float64).cos().reshape(described["input"])
    heads = network.double().train()(x)
    for ours, expected in zip(heads, described["logits"], strict=True):
        found = ours.flatten()[:: described["stride"]][: len(expected)].tolist()
        assert found == pytest.approx(expected, abs=2e-5)


def test_a_shortcut_may_change_features_without_pooling(tmp_path):
    described = SMALL | {"strides": [[1, 1], [1, 1], [2, 2]]}
    folder = theirs.write(tmp_path, described, "2d")
    assert "encoder.stages.1.blocks.0.skip.0.conv.weight" in theirs.weights(described)
    assert "encoder.stages.1.blocks.0.skip.1.conv.weight" in theirs.weights(SMALL)
    assert import_folders([folder], tmp_path / "bundle").configurations == ("2d",)


def test_weights_are_kept_in_full(tmp_path):
    folder = theirs.write(tmp_path, VOLUME)
    model = import_folders([folder], tmp_path / "bundle")
    state = torch_engine.tensors(bundle.load_state(tmp_path / "bundle", model.members[0]))
    expected = theirs.weights(VOLUME)["decoder.stages.2.convs.0.conv.weight"].float()
    assert torch.equal(state["decoder.0.0.weight"], expected)
    assert not torch.equal(expected, expected.half().float())


def test_the_plan_is_read_as_it_stands(tmp_path):
    planned = theirs.plans({"3d_fullres": theirs.configuration(VOLUME)})
    planned["transpose_forward"] = [2, 0, 1]
    folder = theirs.write(tmp_path, VOLUME, planned=planned)
    model = import_folders(
        [folder], tmp_path / "bundle", identity=Identity(name="bleeds", input_slug="ct")
    )
    assert (model.name, model.input_slug, model.average, model.cascade) == (
        "bleeds", "ct", "logits", "labels",
    )  # fmt: skip
    plans = model.plans
    assert (plans.recipe, plans.dataset) == ("nnunetv2", "Dataset001_Bleeds")
    assert (plans.orientation, plans.transpose) == ("as_stored", (2, 0, 1))
    assert (plans.labels, plans.regions) == (("background", "hemorrhage"), ())
    assert plans.normalise_first
    assert plans.normalisations == (
        Normalisation("ct", clip_low=9.5, clip_high=88.5, mean=52.25, deviation=13.75),
    )
    r = plans.resampling
    assert (r.image_order, r.label_order, r.score_order, r.anisotropy) == (3, 1, 1, 3.0)
    assert set(r.separate_z) == {"image", "label", "score"}
    (own,) = plans.configurations
    assert (own.spacing_mm, own.median_shape, own.patch) == (
        (5.0, 0.5, 0.5), (30, 250, 260), (4, 16, 16),
    )  # fmt: skip
    assert own.dummy_2d
    assert own.architecture.decoder_convs == (2, 1, 1)  # theirs are listed coarsest first
    assert bundle.load_model(tmp_path / "bundle") == model


def test_a_2d_configuration_lacks_the_first_axis(tmp_path):
    folder = theirs.write(tmp_path, SMALL | {"input": [1, 1, 16, 64]}, "2d")
    model = import_folders([folder], tmp_path / "bundle")
    (own,) = model.plans.configurations
    assert (own.spacing_mm, own.median_shape) == ((5.0, 0.5, 0.5), (30, 250, 260))
    assert (own.patch, own.tile, own.dummy_2d) == ((16, 64), (1, 16, 64), False)
    assert model.mirror_axes == (1, 2)


def test_plans_from_before_version_2_2_are_the_same(tmp_path):
    new = theirs.configuration(VOLUME)
    old = theirs.with_old_architecture(new, first=4, most=16)
    assert "architecture" not in old
    planned = theirs.plans({"3d_fullres": old})
    key = "foreground_intensity_properties_per_channel"
    planned["foreground_intensity_properties_by_modality"] = planned.pop(key)
    dataset = {k: v for k, v in DATASET.items() if k != "channel_names"} | {"modality": {"0": "CT"}}
    folder = theirs.write(tmp_path / "old", VOLUME, planned=planned, dataset=dataset)
    was = import_folders([folder], tmp_path / "a")
    now = import_folders([theirs.write(tmp_path / "new", VOLUME)], tmp_path / "b")
    assert was.plans == now.plans
    assert was.members == now.members


def test_an_inherited_configuration_is_resolved(tmp_path):
    base = theirs.configuration(VOLUME)
    child = {"inherits_from": "3d_fullres", "batch_size": 7}
    planned = theirs.plans({"3d_fullres": base, "3d_fullres_bs7": child})
    folder = theirs.write(tmp_path, VOLUME, "3d_fullres_bs7", planned=planned)
    (own,) = import_folders([folder], tmp_path / "bundle").plans.configurations
    assert (own.name, own.batch, own.patch) == ("3d_fullres_bs7", 7, (4, 16, 16))
    child["inherits_from"] = "3d_fullres_bs7"
    folder = theirs.write(tmp_path, VOLUME, "3d_fullres_bs7", planned=planned)
    with pytest.raises(PlansError, match="inherits from itself"):
        import_folders([folder], tmp_path / "other")


@pytest.fixture
def cascade(tmp_path):
    """Model folders of both stages; the second one's network has a channel more."""
    second = VOLUME | {"input": [2, 2, 4, 16, 16]}
    planned = theirs.plans(
        {
            "3d_lowres": theirs.configuration(VOLUME) | {"spacing": [5.0, 1.0, 1.0]},
            "3d_fullres": theirs.configuration(VOLUME),
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        }
    )
    return [
        theirs.write(tmp_path, described, name, planned=planned)
        for described, name in ((VOLUME, "3d_lowres"), (second, "3d_cascade_fullres"))
    ]


def test_a_cascade_needs_both_folders(tmp_path, cascade):
    model = import_folders(cascade, tmp_path / "bundle")
    assert model.configurations == ("3d_lowres", "3d_cascade_fullres")
    second = model.plans.configuration("3d_cascade_fullres")
    assert second.previous_stage == "3d_lowres"
    state = bundle.load_state(tmp_path / "bundle", model.members[1])
    assert state["stem.0.weight"].shape[1] == model.plans.input_channels(second) == 2
    with pytest.raises(WeightsError, match="needs its first stage: give 3d_lowres's folder"):
        import_folders(cascade[1:], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_imported_cascade_runs_as_nnunet_predicts(tmp_path, cascade):
    """The second stage sees the first one's mask of the scan, resampled as a label map is."""
    folder, folds = tmp_path / "bundle", []
    model = import_folders(cascade, folder)
    for member, lead in zip(model.members, (-2.8, -2.3), strict=True):  # else all is foreground
        state = {k: torch.from_numpy(v) for k, v in bundle.load_state(folder, member).items()}
        state["heads.0.bias"] += torch.tensor([-lead / 2, lead / 2])
        folds.append(bundle.save_member(folder, member.configuration, "0", state, dtype=np.float32))
    model = dataclasses.replace(model, members=tuple(folds))
    bundle.save_model(folder, model)
    voxels = np.random.default_rng(0).integers(-200, 300, (6, 20, 22)).astype(np.int16)
    voxels[voxels > 100] //= 6  # as dense as brain
    scan = Volume(voxels, (4.0, 0.8, 0.9))
    ensemble = Ensemble.load(folder, "cpu", "float32")
    lowres = dataclasses.replace(model, members=model.members[:1])
    first = dataclasses.replace(ensemble, model=lowres).segment(scan).mask
    assert 0.1 < first.voxels.mean() < 0.9
    second = model.plans.configuration("3d_cascade_fullres")
    case = prepare.prepare([scan], model.plans, second)
    labels = prepare.prepare_labels(first, case.placement, model.plans)
    network = build_network(second.architecture, 2, 2).eval()
    network.load_state_dict(torch_engine.tensors(bundle.load_state(folder, folds[1])))

    def mask(previous):
        data = torch.from_numpy(np.concatenate((case.data, previous[None])).astype(np.float32))
        with torch.inference_mode():
            scores = sliding_window.predict_tiled(
                in_batches(network, 4), data, second.tile, mirror_axes=model.mirror_axes
            )
        return restore([(scores, case.placement)], model.plans, average="logits")

    expected, found = mask(labels == 1), ensemble.segment(scan).mask.voxels
    assert 0.1 < expected.mean() < 0.9
    assert np.mean(found != expected) < 1e-3
    assert np.mean(mask(labels > 1) != expected) > 0.01  # or the second stage would not listen


def test_folders_that_do_not_belong_together_are_refused(tmp_path, cascade):
    with pytest.raises(WeightsError, match="a second 3d_lowres"):
        import_folders(cascade[:1] * 2, tmp_path / "bundle")
    path = cascade[1] / "plans.json"
    path.write_text(path.read_text().replace("88.5", "88.25"))
    with pytest.raises(WeightsError, match=r"normalisations .*88.25.* unlike .*88.5"):
        import_folders(cascade, tmp_path / "bundle")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrapped_networks_have_prefixes(tmp_path, prefix):
    wrapped = {prefix + key: value for key, value in theirs.weights(SMALL).items()}
    folder = theirs.write(tmp_path / "wrapped", SMALL, "2d", network_weights=wrapped)
    plain = theirs.write(tmp_path / "plain", SMALL, "2d")
    found = import_folders([folder], tmp_path / "a").members
    assert found == import_folders([plain], tmp_path / "b").members


def test_fold_all_is_taken_if_wanted_or_alone(tmp_path):
    folder = theirs.write(tmp_path, SMALL, "2d", folds=("all",))

    def found(out, **options):
        return [m.fold for m in import_folders([folder], tmp_path / out, **options).members]

    assert found("a") == ["all"]
    theirs.write(tmp_path, SMALL, "2d", folds=("0", "3"))
    assert found("b") == ["0", "3"]
    assert found("c", folds=["all"]) == ["all"]
    with pytest.raises(WeightsError, match=r"no fold_1/checkpoint_final\.pth"):
        found("d", folds=["0", "1"])


def test_a_fold_without_the_checkpoint_is_left_out_with_a_word(tmp_path, caplog):
    theirs.write(tmp_path, SMALL, "2d", folds=("1", "4"), file="checkpoint_best.pth")
    folder = theirs.write(tmp_path, SMALL, "2d", folds=("0", "2"))
    model = import_folders([folder], tmp_path / "bundle")
    assert [member.fold for member in model.members] == ["0", "2"]
    assert f"{folder}: no checkpoint_final.pth in fold_1, fold_4; left out" in caplog.messages
    caplog.clear()
    import_folders([folder], tmp_path / "named", folds=["0"])
    assert "left out" not in caplog.text


def test_the_best_checkpoint_is_taken_only_if_wanted(tmp_path):
    folder = theirs.write(tmp_path, SMALL, "2d", file="checkpoint_best.pth")
    message = r"no fold_0, fold_1, \.\.\./checkpoint_final.pth; there is a checkpoint_best.pth"
    with pytest.raises(WeightsError, match=message):
        import_folders([folder], tmp_path / "bundle")
    model = import_folders([folder], tmp_path / "bundle", checkpoint="best")
    assert model.provenance["imported"][0]["checkpoint"] == "checkpoint_best.pth"
    with pytest.raises(OutputError, match="holds a bundle already"):
        import_folders([folder], tmp_path / "bundle", checkpoint="best")


def test_the_ignore_label_is_for_training_alone(tmp_path):
    labels = {"background": 0, "hemorrhage": 1, "ignore": 2}
    folder = theirs.write(tmp_path, SMALL, "2d", dataset=DATASET | {"labels": labels})
    model = import_folders([folder], tmp_path / "bundle")
    assert model.plans.labels == ("background", "hemorrhage")


REGIONS = DATASET | {
    "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3], "ignore": 4},
    "regions_class_order": [1, 2, 3],
}


def test_regions_write_in_their_order(tmp_path):
    """Three outputs for four labels; the last region that is found decides."""
    described = SMALL | {"classes": 3}
    folder = theirs.write(tmp_path, described, "2d", dataset=REGIONS)
    plans = import_folders([folder], tmp_path / "bundle").plans
    assert plans.labels == ("background", "whole", "core", "enhancing")
    assert (plans.regions, plans.scores) == ((1, 2, 3), 3)
    scan = Volume(np.ones((1, 1, 5), np.float32), (5.0, 0.5, 0.5))
    placement = place([scan], plans, plans.configurations[0])
    scores = torch.tensor(
        [[-1.0, 9.0, 0.5, -1.0, 0.0], [-1.0, 8.0, -2.0, 0.1, 0.0], [-9.0, 1.0, -3.0, -1.0, 0.0]]
    ).reshape(3, 1, 1, 5)
    labels = restore([(scores, placement)], plans)
    assert labels.ravel().tolist() == [0, 3, 1, 2, 0]
    low = restore([(scores, placement), (scores - 4, placement)], plans)
    assert low.ravel().tolist() == [0, 2, 0, 0, 0]
    again = restore([(scores, placement)], plans)
    assert again.ravel().tolist() == [0, 3, 1, 2, 0]


@pytest.mark.parametrize("reader", ["NibabelIOWithReorient", "SimpleITKIOWithReorient"])
def test_reorienting_readers_turn_to_ras(tmp_path, reader):
    planned = theirs.plans({"2d": theirs.configuration(SMALL)}) | {"image_reader_writer": reader}
    folder = theirs.write(tmp_path, SMALL, "2d", planned=planned)
    plans = import_folders([folder], tmp_path / "bundle").plans
    scan = Volume(np.arange(24, dtype=np.float32).reshape(2, 3, 4) + 1, (5.0, 0.5, 0.5))  # LPS
    axes = plan_axes(scan, plans)
    turned = axes.apply(scan.voxels)
    assert np.array_equal(turned, scan.voxels[:, ::-1, ::-1])
    assert np.array_equal(axes.undo(turned), scan.voxels)


def test_mirror_axes_are_the_checkpoints(tmp_path):
    for axes, expected in (((0, 1), (0, 1)), ((), ()), (None, ())):
        folder = theirs.write(tmp_path / str(axes), VOLUME, inference_allowed_mirroring_axes=axes)
        assert import_folders([folder], tmp_path / f"out {axes}").mirror_axes == expected
    folder = theirs.write(tmp_path, SMALL, "2d", inference_allowed_mirroring_axes=(0, 1, 2))
    with pytest.raises(WeightsError, match=r"mirrors axes \(0, 1, 2\) of a 2D network"):
        import_folders([folder], tmp_path / "bundle")


def test_an_ensemble_has_one_set_of_mirror_axes(tmp_path):
    planned = theirs.plans(
        {"2d": theirs.configuration(SMALL), "3d_fullres": theirs.configuration(VOLUME)}
    )
    flat = theirs.write(tmp_path, SMALL, "2d", planned=planned)
    full = theirs.write(tmp_path, VOLUME, planned=planned)
    assert import_folders([flat, full], tmp_path / "bundle").mirror_axes == (0, 1, 2)
    full = theirs.write(tmp_path, VOLUME, planned=planned, inference_allowed_mirroring_axes=(0, 1))
    with pytest.raises(WeightsError, match=r"mirrors axes \(0, 1\), all together \(0, 1, 2\)"):
        import_folders([flat, full], tmp_path / "other")


def test_the_command_writes_a_bundle_and_says_what_it_took(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = theirs.write(tmp_path, SMALL, "2d", folds=("0", "1"), trainer_name="nnUNetTrainer_x")
    out = tmp_path / "bundle"
    assert main(["import-nnunet", str(folder), "--out", str(out), "--folds", "0, 1"]) == 0
    assert [member.fold for member in bundle.load_model(out).members] == ["0", "1"]
    assert f"{out}: 2d, folds 0, 1" in caplog.messages
    assert any("nnUNetTrainer_x is taken to differ" in message for message in caplog.messages)
