"""Bundles that no export leaves: each is refused in one line that names the bundle's file."""

import dataclasses
import json
import os
import re

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from conftest import CONFIGURATION, PLANS, make_bundle

from ichseg.errors import InputError, PredictionError, WeightsError
from ichseg.model import bundle
from ichseg.predict.ensemble import Ensemble


def refusal(folder):
    """The message, which is one line of a bearable length."""
    with pytest.raises(WeightsError) as caught:
        bundle.load_model(folder)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 700
    return text


def of_plans(**changes):
    return lambda raw: raw["plans"].update(changes)


def of_configuration(**changes):
    return lambda raw: raw["plans"]["configurations"][0].update(changes)


def of_architecture(**changes):
    return lambda raw: raw["plans"]["configurations"][0]["architecture"].update(changes)


def of_resampling(**changes):
    return lambda raw: raw["plans"]["resampling"].update(changes)


def stages(*previous):
    """Configurations ``3d_fullres``, ``1``, ``2``..., each after the one that is named."""

    def change(raw):
        first = raw["plans"]["configurations"][0]
        names = [first["name"], *map(str, range(1, len(previous)))]
        raw["plans"]["configurations"] = [
            {**first, "name": name, "previous_stage": before}
            for name, before in zip(names, previous, strict=True)
        ]

    return change


CHANGES = {
    "mirror axis thrice": (lambda raw: raw.update(mirror_axes=[0, 0, 0]), "each once"),
    "negative patch": (of_configuration(patch=[4, -4, 16]), "patch"),
    "patch of no size": (of_configuration(patch=[0, 16, 16]), "patch"),
    "patch of a kilometre": (of_configuration(patch=[4, 2**30, 2**30]), "patch"),
    "spacing of nothing": (of_configuration(spacing_mm=[5, 1e-300, 1]), "spacing"),
    "spacing of a kilometre": (of_configuration(spacing_mm=[5, 1e6, 1]), "spacing"),
    "features": (of_architecture(features=[6, -8]), "features from -8"),
    "convolutions": (of_architecture(encoder_convs=[2, 10**9]), "convolutions"),
    "strides": (of_architecture(strides=[[1, 1, 1], [1, 0, 2]]), "strides"),
    "kernels": (of_architecture(kernels=[[1, 4, 3], [3, 3, 3]]), "expected odd"),
    "slug of another type": (lambda raw: raw.update(input_slug=["head-ct"]), "input_slug: found"),
    "slug of a number": (lambda raw: raw.update(output_slug=7), "output_slug: found 7"),
    "slug that leads out": (lambda raw: raw.update(output_slug="../../root"), "socket"),
    "slug of nothing": (lambda raw: raw.update(output_slug=""), "socket ''"),
    "NUL in a name": (lambda raw: raw.update(name="a\0b"), "has a NUL"),
    "NUL in a file": (lambda raw: raw["members"][0].update(file="a\0.safetensors"), "has a NUL"),
    "half a character": (lambda raw: raw.update(description="\ud800"), "half a character"),
    "a line in a name": (lambda raw: raw.update(name="a\n[1/1] b"), "cannot be printed"),
    "a line in a label": (of_plans(labels=["background", "a\rb"]), "cannot be printed"),
    "provenance of another type": (lambda raw: raw.update(provenance=[1]), "expected an object"),
    "labels beyond uint8": (of_plans(labels=[str(i) for i in range(300)]), "at most 256"),
    "two of one name": (
        lambda raw: raw["plans"]["configurations"].append(raw["plans"]["configurations"][0]),
        "of one name",
    ),
    "a stage after itself": (stages("3d_fullres"), "a second stage itself"),
    "three stages": (stages(None, "3d_fullres", "1"), "a second stage itself"),
    "anisotropy": (of_resampling(anisotropy=-1.0), "anisotropy"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_description_that_no_export_writes(tmp_path, name):
    make_bundle(tmp_path)
    path = tmp_path / "model.json"
    raw = json.loads(path.read_text())
    change, message = CHANGES[name]
    change(raw)
    path.write_text(json.dumps(raw))
    text = refusal(tmp_path)
    assert text.startswith(f"{path}: ")
    assert message in text


def places(raw, path=()):
    """Where there is a value in nested objects and lists."""
    if path:
        yield path
    for key in range(len(raw)) if isinstance(raw, list) else raw if isinstance(raw, dict) else ():
        yield from places(raw[key], (*path, key))


@pytest.mark.parametrize(
    "value",
    [None, True, -4, 0, 2**62, 1e300, -0.5, "", "../x", "x" * 5000, [], [[]], {"a": 1}, [-1, 0, 7]],
    ids=lambda value: str(value)[:20],
)
def test_one_odd_value_anywhere_is_refused_in_one_line_or_taken(tmp_path, value):
    make_bundle(tmp_path, folds=1)
    path = tmp_path / "model.json"
    good, texts = path.read_text(), []
    for *way, last in places(json.loads(good)):
        raw = json.loads(good)
        holder = raw
        for key in way:
            holder = holder[key]
        holder[last] = value
        path.write_text(json.dumps(raw))
        try:
            bundle.load_model(tmp_path)
        except WeightsError as error:
            texts.append(str(error))
    assert len(texts) > 50
    assert [text for text in texts if not text.startswith(f"{tmp_path}/")] == []
    assert [text for text in texts if not text.isprintable() or len(text) > 700] == []


TEXTS = {
    "nested lists": ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "nested objects": ('{"a":' * 100_000, "nested too deeply"),
    "a number of 400 digits": ('{"schema_version": ' + str(10**400) + "}", "too large"),
    "a number of 5000 digits": ('{"schema_version": 1' + "0" * 5000 + "}", "too large"),
    "a float beyond floats": ('{"schema_version": 1e400}', "too large"),
    "NaN": ('{"schema_version": NaN}', "NaN is not a number"),
    "infinity": ('{"schema_version": -Infinity}', "-Infinity is not a number"),
    "no text": ("\ufeff\0\0", "not JSON"),
    "nothing": ("", "not JSON"),
    "a list": ("[]", "expected an object"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_json_that_no_program_writes(tmp_path, name):
    make_bundle(tmp_path)
    content, message = TEXTS[name]
    (tmp_path / "model.json").write_text(content)
    text = refusal(tmp_path)
    assert text.startswith(f"{tmp_path / 'model.json'}: ")
    assert message in text


@pytest.mark.parametrize("name", ["model.json", "3d_fullres_fold_1.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link out", "circle", "nowhere"])
def test_files_that_are_none(tmp_path, name, kind):
    folder = tmp_path / "weights"
    make_bundle(folder)
    path = folder / name
    outside = tmp_path / "outside"
    path.rename(outside)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        to = {"device": "/dev/zero", "link out": outside, "circle": path, "nowhere": tmp_path / "-"}
        path.symlink_to(to[kind])
    expected = {
        "pipe": "not a plain file", "device": "not a plain file", "folder": "not a plain file",
        "link out": "a link that leads out", "circle": "", "nowhere": "no such file",
    }  # fmt: skip
    text = refusal(folder)
    assert text.startswith(f"{path}: ")
    assert expected[kind] in text


def test_links_within_the_bundle_and_to_it_are_followed(tmp_path):
    folder = tmp_path / "weights"
    model = make_bundle(folder)
    path = folder / "model.json"
    path.rename(folder / "kept.json")
    path.symlink_to("kept.json")
    (tmp_path / "link").symlink_to(folder)
    assert bundle.load_model(tmp_path / "link") == model


def replace_member(folder, content):
    """The first member's file with other bytes, of which the description knows."""
    model = make_bundle(folder, folds=2)
    path = folder / model.members[0].file
    path.write_bytes(content)
    changed = dataclasses.replace(model.members[0], sha256=bundle.sha256(path))
    bundle.save_model(folder, dataclasses.replace(model, members=(changed, model.members[1])))
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read the weights"),
        (bytes(8), "cannot read the weights"),
        (safetensors.numpy.save({}), "no tensors"),
        ((2**63).to_bytes(8, "little") + b"{}", "cannot read the weights"),
        (b"\x80\x04pickle" * 9, "cannot read the weights"),
        (safetensors.numpy.save({"a": np.zeros(3, np.int8)}), "a is of type I8, expected one of"),
        (safetensors.torch.save({"a": torch.zeros(3).bfloat16()}), "of type BF16"),
        (safetensors.torch.save({"a": torch.zeros(3).to(torch.float8_e4m3fn)}), "of type F8_E4M3"),
        (safetensors.numpy.save({"a\nb": np.zeros(3, np.float32)}), "cannot be printed"),
    ],
    ids=["empty", "zeros", "no tensors", "long header", "pickle", "int", "half", "byte", "a line"],
)
def test_a_network_that_is_none(tmp_path, content, message):
    path = replace_member(tmp_path, content)
    text = refusal(tmp_path)
    assert text.startswith(f"{path}: ")
    assert message in text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_weight_that_is_not_finite_ends_the_run(tmp_path, scan, value):
    """In one tensor of one of two folds; before, every mask came out empty."""
    state = bundle.load_state(tmp_path, make_bundle(tmp_path).members[0])
    name = "decoder.0.0.weight"
    state[name] = state[name].copy()
    state[name].flat[3] = value
    path = replace_member(tmp_path, safetensors.numpy.save(state))
    with pytest.raises(WeightsError, match=rf"{re.escape(str(path))}: 1 of \d+ values of {name}"):
        Ensemble.load(tmp_path, "cpu").segment(scan, "full")


def test_a_weight_beyond_floats_is_not_taken_for_infinity(tmp_path):
    state = bundle.load_state(tmp_path, make_bundle(tmp_path).members[0])
    state = {name: array.astype(np.float64) for name, array in state.items()}
    state["heads.0.weight"] = np.full_like(state["heads.0.weight"], 1e300)
    replace_member(tmp_path, safetensors.numpy.save(state))
    member = bundle.load_model(tmp_path).members[0]
    with pytest.raises(WeightsError, match="not finite"):
        bundle.load_state(tmp_path, member)


@pytest.mark.parametrize("device", ["cpu", "torch-cpu"])
def test_a_score_that_is_not_finite_is_an_error(tmp_path, scan, device):
    """Finite weights, whose sums are not."""
    state = bundle.load_state(tmp_path, make_bundle(tmp_path).members[0])
    state["decoder.0.1.weight"] = np.full_like(state["decoder.0.1.weight"], 3e38)
    state["heads.0.weight"] = np.full_like(state["heads.0.weight"], 3e38)
    replace_member(tmp_path, safetensors.numpy.save(state))
    with pytest.raises(PredictionError, match="scores that are not finite"):
        Ensemble.load(tmp_path, device).segment(scan, "full")


def test_a_grid_of_more_tiles_than_can_be_predicted(tmp_path, scan):
    fine = dataclasses.replace(CONFIGURATION, spacing_mm=(0.001, 0.001, 0.001))
    make_bundle(tmp_path, plans=dataclasses.replace(PLANS, configurations=(fine,)))
    with pytest.raises(InputError, match="the voxel sizes of the scan or of the plan"):
        Ensemble.load(tmp_path, "cpu").plan(scan, "fast")
