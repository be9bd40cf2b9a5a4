"""A training begins with the weights of a trained nnU-Net folder."""

import logging

import pytest
import torch
from helpers import nnunet_folders as theirs
from helpers.nnunet_folders import VOLUME

from ichseg.errors import WeightsError
from ichseg.model.network import build_network
from training.bundle.nnunet_checkpoint import read_checkpoint, rename
from training.bundle.nnunet_plans import read_plans
from training.bundle.pretrained import read_pretrained
from training.fit.pretrained import begin_with


def network_of(folder):
    plans = read_plans(folder, "3d_fullres")
    own = plans.configurations[0]
    return build_network(own.architecture, plans.input_channels(own), plans.scores)


def tensors(folder, path):
    return rename(read_checkpoint(path), read_plans(folder, "3d_fullres"))


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_a_network_like_it_takes_every_tensor(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = theirs.write(tmp_path, VOLUME)
    network = network_of(folder)
    begin_with(network, read_pretrained(folder, "3d_fullres", "3"), "3d_fullres")
    same(network.state_dict(), tensors(folder, folder / "fold_0" / "checkpoint_final.pth"))
    count = len(network.state_dict())
    said = f"beginning with nnU-Net's 3d_fullres fold 0 of {folder / 'fold_0'}: {count} of {count}"
    assert said in caplog.text
    assert "from scratch" not in caplog.text


def test_the_same_fold_or_the_one_that_is_named(tmp_path):
    folder = theirs.write(tmp_path, VOLUME, folds=("0", "1"))
    for given, wanted, taken in (
        (folder, "1", "1"),
        (folder, "4", "0"),
        (folder / "fold_1", "0", "1"),
    ):
        found = read_pretrained(given, "3d_fullres", wanted)
        assert found.file == folder / f"fold_{taken}" / "checkpoint_final.pth"
        assert found.name == f"nnU-Net's 3d_fullres fold {taken}"


def test_the_best_checkpoint_where_there_is_no_final_one(tmp_path):
    folder = theirs.write(tmp_path, VOLUME, file="checkpoint_best.pth")
    found = read_pretrained(folder, "3d_fullres", "0")
    assert found.file.name == "checkpoint_best.pth"


def test_another_folder_is_refused_with_both_kinds(tmp_path):
    with pytest.raises(WeightsError, match=r"expected a weights bundle, with model\.json, or a"):
        read_pretrained(tmp_path, "3d_fullres", "0")
    folder = theirs.write(tmp_path, VOLUME, folds=())
    with pytest.raises(WeightsError, match=r"no fold_0, fold_1, \.\.\./checkpoint_final.pth"):
        read_pretrained(folder, "3d_fullres", "0")
