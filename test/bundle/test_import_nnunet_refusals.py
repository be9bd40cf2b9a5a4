"""Model folders of nnU-Net that are damaged, hostile, or ask for what this code does otherwise."""

import copy
import os
import re

import numpy as np
import pytest
import torch
from helpers import nnunet_folders as theirs
from helpers.nnunet_folders import DATASET, SMALL

from ichseg.errors import OutputError, PlansError, WeightsError
from training.__main__ import main
from training.bundle.import_nnunet import import_folders


class _Malicious:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.mkdir, "mkdir"), (os.system, "system"), (eval, "eval"), (np.load, "numpy.*load")],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(tmp_path, function, name):
    made = tmp_path / "made"
    argument = {
        os.mkdir: str(made),
        os.system: f"touch {made}",
        eval: f"__import__('os').mkdir({str(made)!r})",
        np.load: str(made),
    }[function]
    trap = _Malicious(function, argument)
    folder = theirs.write(tmp_path, SMALL, "2d", _best_ema=trap)
    with pytest.raises(WeightsError, match=f"asks for .*{name}, expected .* nothing in it was run"):
        import_folders([folder], tmp_path / "bundle")
    assert not made.exists()
    if function is not np.load:  # the trap works where it is let
        torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)
        assert made.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "cannot read|damaged"), (b"PK\x03\x04 no archive", "cannot read|damaged")],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, content, message):
    folder = theirs.write(tmp_path, SMALL, "2d")
    (folder / "fold_0" / "checkpoint_final.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        import_folders([folder], tmp_path / "bundle")


def test_what_is_no_checkpoint_of_nnunet_is_refused(tmp_path):
    folder = theirs.write(tmp_path, SMALL, "2d")
    torch.save({"state_dict": {}}, folder / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(WeightsError, match=r"not a checkpoint of nnU-Net v2, .*init_args"):
        import_folders([folder], tmp_path / "bundle")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("decoder.stages.0.convs.0.norm.bias"), "no tensor decoder.stages.0.convs"),
        (
            lambda w: w.update({"encoder.stem.convs.0.norm.running_mean": torch.zeros(4)}),
            "1 tensors that the plans have no place for, such as encoder.stem.*running_mean",
        ),
        (
            lambda w: w.update({"encoder.stem.convs.0.conv.weight": torch.zeros(4, 2, 3, 3)}),
            "encoder.stem.convs.0.conv.weight is 4x2x3x3, expected 4x1x3x3",
        ),
    ],
    ids=["missing", "left over", "shape"],
)
def test_tensors_match_one_to_one(tmp_path, change, message):
    weights = theirs.weights(SMALL)
    change(weights)
    folder = theirs.write(tmp_path, SMALL, "2d", network_weights=weights)
    with pytest.raises(WeightsError, match=message):
        import_folders([folder], tmp_path / "bundle")


def in_plans(key, value):
    return lambda planned, dataset: planned.__setitem__(key, value)


def in_configuration(key, value):
    return lambda planned, dataset: planned["configurations"]["2d"].__setitem__(key, value)


def in_network(key, value):
    return lambda planned, dataset: planned["configurations"]["2d"]["architecture"][
        "arch_kwargs"
    ].__setitem__(key, value)


def with_class(name):
    return lambda planned, dataset: planned["configurations"]["2d"]["architecture"].__setitem__(
        "network_class_name", name
    )


def in_resampling(which, **values):
    return lambda planned, dataset: planned["configurations"]["2d"][
        f"resampling_fn_{which}_kwargs"
    ].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_class("dynamic_network_architectures.architectures.primus.Primus"), "class .*Primus"),
        (with_class("mine.PlainConvUNet"), "network class mine.PlainConvUNet"),
        (in_network("block", "BottleneckD"), "network argument block"),
        (in_network("conv_bias", False), "conv_bias False"),
        (in_network("norm_op", "torch.nn.BatchNorm2d"), "norm_op BatchNorm2d"),
        (in_network("nonlin", "torch.nn.GELU"), "nonlin GELU"),
        (in_network("nonlin_kwargs", {"negative_slope": 0.2}), "negative_slope 0.2"),
        (in_network("kernel_sizes", [[3, 3], [2, 3], [3, 3]]), "expected odd sizes"),
        (in_network("features_per_stage", [4, 8]), "2 levels, but kernels"),
        (in_configuration("preprocessor_name", "Mine"), "preprocessor_name Mine"),
        (
            in_configuration("normalization_schemes", ["RescaleTo01Normalization"]),
            "normalisation RescaleTo01Normalization",
        ),
        (in_configuration("normalization_schemes", []), "of 1 channels"),
        (
            in_configuration("resampling_fn_seg", "resample_torch_fornnunet"),
            "resampling_fn_seg resample_torch_fornnunet",
        ),
        (in_resampling("data", order=2), "resampling_fn_data order 2"),
        (in_resampling("probabilities", order=3), "resampling_fn_probabilities order 3"),
        (in_resampling("seg", order_z=1), "order_z 1"),
        (in_resampling("data", force_separate_z=True), "force_separate_z True"),
        (in_resampling("data", separate_z_anisotropy_threshold=5), "anisotropy_threshold"),
        (in_plans("label_manager", "Mine"), "label_manager Mine"),
        (in_plans("image_reader_writer", "Tiff3DIO"), "image_reader_writer Tiff3DIO"),
        (in_plans("transpose_forward", [0, 1]), "not as nnU-Net writes it"),
        (lambda planned, dataset: planned.pop("dataset_name"), "'dataset_name' is missing"),
        (lambda planned, dataset: dataset.pop("labels"), "'labels' is missing"),
        (
            lambda planned, dataset: dataset.update(labels={"background": 0, "a": 2}),
            "expected background 0",
        ),
        (
            lambda planned, dataset: dataset.update(
                labels={"background": 0, "a": [1, 2], "b": 2}, regions_class_order=[1]
            ),
            "regions_class_order",
        ),
        (in_plans("configurations", {"3d_fullres": {}}), "no configuration '2d', found 3d_fullres"),
    ],
)
def test_what_we_would_do_otherwise_is_refused_by_name(tmp_path, change, message):
    planned = copy.deepcopy(theirs.plans({"2d": theirs.configuration(SMALL)}))
    dataset = copy.deepcopy(DATASET)
    change(planned, dataset)
    folder = theirs.write(tmp_path, SMALL, "2d", planned=planned, dataset=dataset)
    with pytest.raises(PlansError, match=message) as refusal:
        import_folders([folder], tmp_path / "bundle")
    assert str(refusal.value).startswith(str(folder))
    assert ".json: " in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_resampling_without_separate_z(tmp_path):
    planned = theirs.plans({"2d": theirs.configuration(SMALL)})
    in_resampling("data", force_separate_z=False)(planned, None)
    folder = theirs.write(tmp_path, SMALL, "2d", planned=planned)
    model = import_folders([folder], tmp_path / "bundle")
    assert set(model.plans.resampling.separate_z) == {"label", "score"}


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    assert main(["import-nnunet", str(tmp_path / "no"), "--out", str(tmp_path / "bundle")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"error: {tmp_path / 'no'}: no fold_0")
    assert lines[-1].endswith("; there is no such folder")
    assert not (tmp_path / "bundle").exists()


def test_the_folder_around_and_the_one_inside_name_the_right_one(tmp_path):
    folder = theirs.write(tmp_path / "Dataset001", SMALL, "2d")
    for given, hint in (
        (folder.parent, f"give a folder in it, such as {folder.name}"),
        (folder / "fold_0", f"give the folder around it, {folder}"),
    ):
        with pytest.raises(WeightsError, match=re.escape(hint)):
            import_folders([given], tmp_path / "bundle")


def test_only_a_new_or_empty_folder_becomes_a_bundle(tmp_path, capsys):
    folder = theirs.write(tmp_path, SMALL, "2d")
    out = tmp_path / "workspace"
    out.mkdir()
    (out / "dataset.json").touch()
    with pytest.raises(OutputError, match="holds other files, expected a new or empty folder"):
        import_folders([folder], out)
    assert [path.name for path in out.iterdir()] == ["dataset.json"]
    (out / "dataset.json").rename(tmp_path / "file")
    (out / ".writing-killed").mkdir()  # by an import that was killed
    import_folders([folder], out)
    assert (out / "model.json").exists()
    assert main(["import-nnunet", str(folder), "--out", str(tmp_path / "file")]) == 1
    file = tmp_path / "file"
    said = f"error: {file}: no folder to write in ({file} is a file, expected a folder)\n"
    assert capsys.readouterr().err.endswith(said)
    assert main(["export-nnunet", str(out), "--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err == said
