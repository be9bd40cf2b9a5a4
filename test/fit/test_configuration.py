import argparse
import dataclasses
import json

import pytest

from ichseg.errors import TrainingError
from ichseg.model import strict_json
from training.batches.augmentation import NNUNETV2
from training.fit.configuration import (
    TRAINING_RECIPES,
    TrainingConfig,
    differences,
    load_settings,
    settings_from,
)
from training.jobs import train


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs is 0, expected at least 1"),
        ({"workers": -1}, "workers is -1, expected at least 0"),
        ({"learning_rate": 0}, "learning_rate 0, minutes None, expected more than 0"),
        ({"minutes": -1}, "minutes -1, expected more than 0"),
        ({"foreground_fraction": 2}, "foreground_fraction is 2"),
        ({"centre_jitter": 1.5}, "centre_jitter is 1.5, expected 0 to 1"),
        ({"augmentation_engine": "gpu"}, "is 'gpu', expected one of auto, host, device"),
        ({"gpu_cache": "maybe"}, "gpu_cache is 'maybe', expected one of auto, yes, no"),
        ({"precision": "int4"}, "precision is 'int4', expected one of auto, fp32, bf16, fp16"),
        ({"optimiser": "lion"}, "optimiser is 'lion', expected one of adam, sgd"),
        ({"momentum": 1.0}, "momentum is 1.0, expected 0 to less than 1"),
        ({"optimiser": "sgd", "momentum": 0.0}, "momentum is 0.0, .* 0 without nesterov"),
        ({"gradient_clip": -1}, "gradient_clip is -1, expected at least 0"),
        ({"schema_version": 7}, "config schema 7, this code reads 2"),
    ],
)
def test_refuses_impossible_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**changes)


def test_the_settings_of_a_run_of_0_1_can_still_be_read(tmp_path):
    raw = strict_json.to_json(TrainingConfig(gpu_cache="no"))
    raw["resident"] = raw.pop("gpu_cache")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert load_settings(tmp_path / "config.json") == TrainingConfig(gpu_cache="no")


def test_every_field_is_a_flag():
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    line = "3d_fullres --workspace w --fold 0"
    nothing = settings_from(parser.parse_args(line.split()))
    for recipe in ("msd2018", "compact"):
        assert nothing.over(recipe) == TRAINING_RECIPES[recipe]
    line += " --epochs 5 --minutes 1.5 --no-amsgrad --gamma 0.8 1.2 --image-order 1 --no-validation"
    config = settings_from(parser.parse_args(line.split())).over("msd2018")
    assert (config.epochs, config.minutes, config.amsgrad) == (5, 1.5, False)
    assert (config.augmentation.gamma, config.augmentation.image_order) == ((0.8, 1.2), 1)
    assert strict_json.from_json(TrainingConfig, strict_json.to_json(config), where="") == config
    bad = parser.parse_args([*line.split(), "--epochs", "0"])
    with pytest.raises(TrainingError, match="epochs is 0"):
        settings_from(bad).over("msd2018")
    with pytest.raises(TrainingError, match="no training recipe 'nnunetv1' yet"):
        settings_from(bad).over("nnunetv1")


def test_settings_that_differ_are_told_one_by_one():
    before = TrainingConfig(epochs=2)
    after = TrainingConfig(
        epochs=3, augmentation=dataclasses.replace(before.augmentation, gamma=(0.9, 1.1))
    )
    assert list(differences(before, before)) == []
    assert list(differences(after, before)) == [
        ("epochs", 3, 2),
        ("gamma", (0.9, 1.1), (0.7, 1.5)),
    ]


def test_help_shows_where_recipes_differ():
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    text = " ".join(parser.format_help().split())
    assert "adam or sgd [adam; nnunetv2: sgd]" in text
    assert "all looks smaller [0.85 1.25; nnunetv2: 0.7 1.4]" in text
    assert "average over mirrorings in that [yes; compact: no]" in text


def test_the_recipe_of_the_paper():
    """P18, the paper."""
    paper = TRAINING_RECIPES["msd2018"]
    assert (paper.epochs, paper.batches_per_epoch, paper.validation_batches) == (1000, 250, 50)
    assert (paper.learning_rate, paper.weight_decay, paper.lr_schedule) == (3e-4, 3e-5, "plateau")
    assert (paper.loss_momentum, paper.loss_threshold) == (0.93, 5e-3)
    assert (paper.drop_patience, paper.drop_factor, paper.stop_patience) == (30, 0.2, 60)
    assert (paper.lowest_rate, paper.foreground_fraction) == (1e-6, 0.33)
    assert (paper.optimiser, paper.gradient_clip, paper.precision) == ("adam", 0, "fp32")


def test_the_recipe_of_nnunet_v2():
    """V2, section 11 of the reference."""
    v2 = TRAINING_RECIPES["nnunetv2"]
    assert (v2.epochs, v2.batches_per_epoch, v2.validation_batches) == (1000, 250, 50)
    assert (v2.optimiser, v2.learning_rate, v2.momentum, v2.nesterov) == ("sgd", 0.01, 0.99, True)
    assert (v2.weight_decay, v2.gradient_clip, v2.foreground_fraction) == (3e-5, 12, 0.33)
    assert (v2.lr_schedule, v2.poly_exponent, v2.precision) == ("poly", 0.9, "auto")
    assert v2.augmentation == NNUNETV2
