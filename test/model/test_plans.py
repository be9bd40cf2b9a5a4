import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURE, CONFIGURATION, PLANS

from ichseg.errors import PlansError
from ichseg.model import plans, strict_json
from ichseg.model.plans import Override, Region


def test_plans_survive_json(tmp_path):
    path = tmp_path / "plans.json"
    path.write_text(strict_json.dumps(PLANS))
    assert plans.load(path) == PLANS


def test_what_came_later_survives_json(tmp_path):
    residual = dataclasses.replace(ARCHITECTURE, block="residual")
    changed = dataclasses.replace(
        PLANS,
        recipe="nnunetv2",
        architecture="resenc_l",
        overrides=(Override("patch", "16,320,320", "16,96,96"),),
        regions=(1,),
        crop="head",
        configurations=(dataclasses.replace(CONFIGURATION, architecture=residual),),
    )
    path = tmp_path / "plans.json"
    path.write_text(strict_json.dumps(changed))
    assert plans.load(path) == changed
    assert json.loads(path.read_text())["preset"] == "resenc_l"  # as files have always called it


def test_what_came_later_may_be_absent():
    raw = strict_json.to_json(PLANS)
    assert not {"preset", "overrides", "regions", "crop"} & raw.keys()
    assert "block" not in raw["configurations"][0]["architecture"]
    assert strict_json.from_json(plans.Plans, raw, where="here") == PLANS


def test_plans_of_the_default_weights_are_written_as_they_were():
    path = Path(__file__).parents[2] / "weights" / "model.json"
    raw = json.loads(path.read_text())["plans"]
    assert strict_json.to_json(strict_json.from_json(plans.Plans, raw, where=str(path))) == raw


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.pop("recipe"), r"missing keys \['recipe'\]"),
        (lambda raw: raw.update(typo=1), r"unknown keys \['typo'\]"),
        (lambda raw: raw.update(schema_version=99), "plans schema 99, this code reads 1"),
        (lambda raw: raw.update(transpose=[0, 0, 1]), "not an order of three axes"),
        (lambda raw: raw.update(transpose=[0, 1]), "found 2 values, expected 3"),
        (lambda raw: raw.update(recipe="v3"), "recipe 'v3'"),
        (lambda raw: raw.update(preset="resenc"), "architecture 'resenc', expected one of"),
        (lambda raw: raw.update(crop="body"), "crop 'body', expected one of"),
        (
            lambda raw: (raw.update(crop="head"), raw["normalisations"][0].update(scheme="zscore")),
            "crop 'head' is found in HU, but not every channel is CT",
        ),
        (lambda raw: raw.update(overrides=[{"name": "batch"}]), "missing keys .*'chosen'"),
        (
            lambda raw: raw["configurations"][0]["architecture"].update(block="dense"),
            "block 'dense', expected one of",
        ),
        (lambda raw: raw.update(orientation="SPL"), "orientation 'SPL', expected one of"),
        (lambda raw: raw.update(regions=[2]), r"regions write the labels \(2,\), expected 1 to 1"),
        (lambda raw: raw.update(regions=[0]), r"regions write the labels \(0,\), expected 1 to 1"),
        (lambda raw: raw.update(labels=["background"]), "expected a background and at least one"),
        (lambda raw: raw.update(channels=["CT", "CT"]), "2 channels, 1 normalisations"),
        (lambda raw: raw.update(normalise_first=1), "found 1, expected bool"),
        (lambda raw: raw["configurations"][0].update(batch=True), "found True, expected int"),
        (lambda raw: raw["configurations"][0].update(patch=[4, 15, 16]), "not a multiple of"),
        (lambda raw: raw["normalisations"][0].update(deviation=0), "with|deviation 0"),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_name(tmp_path, change, message):
    raw = strict_json.to_json(PLANS)
    change(raw)
    path = tmp_path / "plans.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(PlansError, match=message) as caught:
        plans.load(path)
    assert str(path) in str(caught.value)


def test_not_json_and_not_there(tmp_path):
    with pytest.raises(PlansError, match="cannot read"):
        plans.load(tmp_path / "plans.json")
    (tmp_path / "plans.json").write_text("{")
    with pytest.raises(PlansError, match="not JSON"):
        plans.load(tmp_path / "plans.json")


def test_unknown_configuration_lists_the_known():
    with pytest.raises(
        PlansError, match="no configuration '2d' in the plans, which have 3d_fullres"
    ):
        PLANS.configuration("2d")


def test_total_stride_is_the_product_over_levels():
    deep = dataclasses.replace(
        ARCHITECTURE,
        features=(4, 8, 16),
        kernels=((3, 3, 3),) * 3,
        strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        encoder_convs=(2, 2, 2),
        decoder_convs=(2, 2),
    )
    assert deep.total_stride == (2, 4, 4)


def test_architecture_lists_must_agree():
    with pytest.raises(ValueError, match="2 levels, but"):
        dataclasses.replace(ARCHITECTURE, encoder_convs=(1,))
    with pytest.raises(ValueError, match="expected ones"):
        dataclasses.replace(ARCHITECTURE, strides=((1, 2, 2), (1, 2, 2)))


def test_a_2d_patch_is_a_tile_of_one_slice():
    flat = dataclasses.replace(ARCHITECTURE, kernels=((3, 3), (3, 3)), strides=((1, 1), (2, 2)))
    assert dataclasses.replace(CONFIGURATION, patch=(16, 8), architecture=flat).tile == (1, 16, 8)
    with pytest.raises(ValueError, match="for a 3D network"):
        dataclasses.replace(CONFIGURATION, patch=(16, 8))


def test_a_cascade_has_no_label_that_its_first_stage_cannot_hand_on():
    """Between the stages labels are int8; a mask alone can have more of them."""
    many = ("background", *(f"l{i}" for i in range(1, 129)))
    low = dataclasses.replace(CONFIGURATION, name="low")
    second = dataclasses.replace(CONFIGURATION, name="second", previous_stage="low")
    dataclasses.replace(PLANS, labels=many)
    dataclasses.replace(PLANS, labels=many[:128], configurations=(low, second))
    with pytest.raises(ValueError, match="129 labels, expected at most 128 for a cascade such as"):
        dataclasses.replace(PLANS, labels=many, configurations=(low, second))


def test_first_stages_come_before_their_second_and_once():
    low = dataclasses.replace(CONFIGURATION, name="low")
    second = dataclasses.replace(CONFIGURATION, name="second", previous_stage="low")
    planned = dataclasses.replace(PLANS, configurations=(CONFIGURATION, low, second))
    full = CONFIGURATION.name
    assert planned.with_first_stages(["second", full]) == ("low", "second", full)
    assert planned.with_first_stages([full, "low", "second"]) == (full, "low", "second")
    with pytest.raises(PlansError, match="no configuration 'other'"):
        planned.with_first_stages(["other"])


def test_foreground_is_each_label_or_each_region():
    """A region has the name of the label that it writes, and a mask of all that it holds."""
    three = dataclasses.replace(PLANS, labels=("background", "bleed", "core"))
    assert three.foreground == (Region("bleed", 1, (1,)), Region("core", 2, (2,)))
    nested = dataclasses.replace(three, regions=(1, 2), region_labels=((1, 2), (2,)))
    assert nested.foreground == (Region("bleed", 1, (1, 2)), Region("core", 2, (2,)))
    labels = np.array([0, 1, 2, 3])
    assert nested.foreground[0].mask(labels).tolist() == [False, True, True, False]
    core = nested.foreground[1].mask(torch.from_numpy(labels))
    assert core.tolist() == [False, False, True, False]
    unknown = dataclasses.replace(three, regions=(1, 2))
    with pytest.raises(PlansError, match="do not say which labels its regions hold"):
        unknown.foreground  # noqa: B018
