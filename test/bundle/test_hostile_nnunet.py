"""nnU-Net folders that hold what no training leaves: each is refused in one line with its file."""

from __future__ import annotations

import copy
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from helpers import nnunet_folders as theirs

from ichseg.errors import IchsegError, WeightsError
from ichseg.model import bundle
from training.bundle.import_nnunet import import_folders

DESCRIBED = json.loads(
    (Path(__file__).parents[1] / "helpers" / "nnunetv2_networks.json").read_text()
)["networks"]
SMALL = next(d for d in DESCRIBED if d["name"] == "residual_2d") | {"input": [1, 1, 16, 24]}
FIRST = "encoder.stem.convs.0.conv.weight"
NAN, INFINITY = float("nan"), float("inf")


def refusal(folder, out):
    """The text of the refusal: one line, not too long, and nothing is left behind."""
    with pytest.raises(IchsegError) as caught:
        import_folders([folder], out)
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert len(text) < len(str(folder)) + 300
    assert not (out / bundle.MODEL_FILE).exists()
    assert not list(out.glob("*.safetensors"))
    return text


def set_in(kind, key, value):
    """Change one value of ``plans.json``, of its configuration, its network, or the dataset."""

    def change(planned, dataset):
        configuration = planned["configurations"]["2d"]
        {
            "plans": planned,
            "configuration": configuration,
            "network": configuration["architecture"]["arch_kwargs"],
            "intensities": planned["foreground_intensity_properties_per_channel"]["0"],
            "dataset": dataset,
        }[kind][key] = value

    return change


@pytest.mark.parametrize("value", [NAN, INFINITY, -1.0, 0.0, 1e308, 10**400, True, "5", None])
def test_a_spacing_that_is_none(tmp_path, value):
    text = refused_by_plans(tmp_path, set_in("configuration", "spacing", [value, 0.5]))
    assert "plans.json: spacing" in text


@pytest.mark.parametrize("value", [NAN, INFINITY, -4, 0, 2**40, 1e30, 10**400, 4.5, True, "16"])
def test_a_patch_that_is_none(tmp_path, value):
    text = refused_by_plans(tmp_path, set_in("configuration", "patch_size", [value, 24]))
    assert "plans.json: patch_size" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("features_per_stage", [10**9] * 3),
        ("features_per_stage", [-4, 8, 8]),
        ("features_per_stage", [NAN, 8, 8]),
        ("n_blocks_per_stage", [10**9, 1, 1]),
        ("n_blocks_per_stage", [-1, 1, 1]),
        ("n_conv_per_stage_decoder", [10**9, 1]),
        ("kernel_sizes", [[10**9 + 1, 3]] * 3),
        ("kernel_sizes", [[-3, 3]] * 3),
        ("kernel_sizes", [[3, 3]] * 10**5),
        ("strides", [[1, 1], [0, 2], [2, 2]]),
        ("strides", [[1, 1], [10**9, 2], [2, 2]]),
    ],
)
def test_a_network_that_no_machine_could_build(tmp_path, key, value):
    assert "plans.json: " in refused_by_plans(tmp_path, set_in("network", key, value))


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("plans", "transpose_forward", [NAN, 1, 2]),
        ("plans", "transpose_forward", [False, True, 2]),
        ("plans", "original_median_spacing_after_transp", [NAN, 1, 1]),
        ("plans", "configurations", [1]),
        ("plans", "configurations", {"2d": [1]}),
        ("plans", "dataset_name", 5),
        ("plans", "label_manager", "x" * 10_000),
        ("plans", "image_reader_writer", "a\nb"),
        ("plans", "dataset_name", "a\nb\0"),
        ("configuration", "inherits_from", [5]),
        ("configuration", "median_image_size_in_voxels", [NAN, 3]),
        ("configuration", "previous_stage", 5),
        ("intensities", "mean", NAN),
        ("intensities", "std", INFINITY),
        ("intensities", "percentile_00_5", NAN),
        ("dataset", "labels", {"background": 0, "a": 10**400}),
        ("dataset", "labels", {"background": 0, "a": NAN}),
        ("dataset", "labels", {"background": 0, "a": [[1]]}),
        ("dataset", "channel_names", ["CT"]),
        ("dataset", "channel_names", {"x": "CT"}),
        ("dataset", "channel_names", {"0": 5}),
    ],
)
def test_other_values_that_are_none(tmp_path, kind, key, value):
    file = "dataset.json" if kind == "dataset" else "plans.json"
    assert f"{file}: " in refused_by_plans(tmp_path, set_in(kind, key, value))


def refused_by_plans(tmp_path, change):
    planned = copy.deepcopy(theirs.plans({"2d": theirs.configuration(SMALL)}))
    dataset = copy.deepcopy(theirs.DATASET)
    change(planned, dataset)
    folder = theirs.write(tmp_path, SMALL, "2d", planned=planned, dataset=dataset)
    text = refusal(folder, tmp_path / "bundle")
    assert text.startswith(str(folder))
    return text


@pytest.mark.parametrize("file", ["plans.json", "dataset.json"])
@pytest.mark.parametrize(
    "content",
    [b"[" * 200_000, b'{"a":' * 100_000, b"[1]", b"3", b'"x"', b"\0", b"\xff\xfe{", b"1" * 5000],
    ids=["lists", "objects", "list", "number", "text", "NUL", "not UTF-8", "digits"],
)
def test_files_that_are_no_such_json(tmp_path, file, content):
    folder = theirs.write(tmp_path, SMALL, "2d")
    (folder / file).write_bytes(content)
    assert f"{folder / file}: " in refusal(folder, tmp_path / "bundle")


@pytest.mark.parametrize("file", ["plans.json", "dataset.json", "fold_0/checkpoint_final.pth"])
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_pipes_folders_and_devices_are_not_read(tmp_path, file, make):
    folder = theirs.write(tmp_path, SMALL, "2d")
    (folder / file).unlink()
    make(folder / file)
    assert f"{folder / file}: not a plain file" in refusal(folder, tmp_path / "bundle")


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.to_sparse(),
        lambda w: w.reshape(4, -1).to_sparse_csr(),
        lambda w: torch.quantize_per_tensor(w.float(), 0.1, 0, torch.qint8),
        lambda w: w.to("meta"),
        lambda w: w.to(torch.complex64),
        lambda w: w.to(torch.int8),
        lambda w: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        lambda w: torch.zeros(1).expand(10**6, 10**6),
        lambda w: w * NAN,
        lambda w: w.double() * 1e300,
        lambda w: 1.0,
    ],
    ids=[
        "sparse", "sparse rows", "quantised", "meta", "complex", "whole", "nested", "expanded",
        "NaN", "beyond fp32", "no tensor",
    ],
)  # fmt: skip
def test_tensors_that_hold_no_weights(tmp_path, change):
    weights = theirs.weights(SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of kinds of tensors that are new or old
        weights[FIRST] = change(weights[FIRST])
        folder = theirs.write(tmp_path, SMALL, "2d", network_weights=weights)
        text = refusal(folder, tmp_path / "bundle")
    assert text.startswith(f"{folder / 'fold_0' / 'checkpoint_final.pth'}: ")
    assert FIRST in text


@pytest.mark.parametrize(
    "changes",
    [
        {"inference_allowed_mirroring_axes": axes}
        for axes in ((NAN,), (INFINITY,), (0, 0), (-1,), (0.5,), 1, torch.tensor([0, 1]))
    ]
    + [
        {"network_weights": [1, 2]},
        {"network_weights": {1: torch.zeros(1)}},
        {"trainer_name": 5},
        {"trainer_name": "a\nb"},
        {"init_args": {"configuration": ["2d"]}},
        {"init_args": torch.zeros(2)},
        {"init_args": {"configuration": "a\n"}},
    ],
    ids=str,
)
def test_checkpoints_with_other_contents(tmp_path, changes):
    folder = theirs.write(tmp_path, SMALL, "2d", **changes)
    assert "checkpoint_final.pth: " in refusal(folder, tmp_path / "bundle")


def test_a_configuration_cannot_name_a_file_elsewhere(tmp_path):
    name = "../../elsewhere"
    planned = theirs.plans({name: theirs.configuration(SMALL)})
    folder = theirs.write(tmp_path, SMALL, "2d", planned=planned, init_args={"configuration": name})
    assert "letters, digits" in refusal(folder, tmp_path / "a" / "b" / "bundle")
    assert not list(tmp_path.rglob("*elsewhere*"))


def test_weights_that_fp16_cannot_hold_are_not_written(tmp_path):
    """65,520 rounds to infinity there; as fp32 it is a weight like any other."""
    state = {"a.weight": torch.tensor([1.0, 65520.0])}
    with pytest.raises(WeightsError, match=r"2d fold 0: 1 of 2 values of a\.weight are not finite"):
        bundle.save_member(tmp_path, "2d", "0", state)
    assert not list(tmp_path.iterdir())
    bundle.save_member(tmp_path, "2d", "0", state, dtype="float32")
