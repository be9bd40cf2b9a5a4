import dataclasses

import pytest
import torch
from conftest import ARCHITECTURE, CONFIGURATION, PLANS, make_bundle
from helpers import nnunet_folders
from helpers.workspaces import QUICK, make_workspace

from ichseg.engine import torch_engine
from ichseg.errors import TrainingError, WeightsError
from ichseg.model import bundle
from ichseg.model.network import build_network
from training.bundle.export import export
from training.bundle.pretrained import choose_member, read_pretrained, require_unseen
from training.data.workspace import LATEST_CHECKPOINT, run_folder
from training.fit.checkpoint import read_checkpoint
from training.fit.fold_run import open_run
from training.fit.pretrained import begin_with
from training.jobs import train
from training.jobs.train import run_fold


@pytest.fixture
def folder(tmp_path):
    """A bundle of two folds whose weights differ."""
    path = tmp_path / "bundle"
    make_bundle(path)
    return path


def weights(folder, fold):
    member = bundle.load_model(folder).members[fold]
    return torch_engine.tensors(bundle.load_state(folder, member))


def load_pretrained(network, folder, configuration, fold):
    begin_with(network, read_pretrained(folder, configuration, fold), configuration)


def fill(network, value):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(value)


@pytest.mark.parametrize(("wanted", "taken"), [("0", 0), ("1", 1), ("4", 0), ("all", 0)])
def test_the_same_fold_or_else_the_first(folder, wanted, taken, caplog):
    caplog.set_level("INFO")
    network = build_network(ARCHITECTURE, 1, 2)
    load_pretrained(network, folder, "3d_fullres", wanted)
    for name, tensor in weights(folder, taken).items():
        torch.testing.assert_close(network.state_dict()[name], tensor, rtol=0, atol=0)
    assert f"beginning with 3d_fullres fold {taken} of {folder}: 14 of 14 tensors" in caplog.text
    assert "from scratch" not in caplog.text


def test_the_same_configuration_or_else_the_first_of_all(folder):
    model = bundle.load_model(folder)
    flat = dataclasses.replace(CONFIGURATION, name="3d_lowres")
    plans = dataclasses.replace(PLANS, configurations=(CONFIGURATION, flat))
    lowres = dataclasses.replace(model.members[0], configuration="3d_lowres")
    both = dataclasses.replace(model, plans=plans, members=(*model.members, lowres))
    assert choose_member(both, "3d_lowres", "1") == lowres
    assert choose_member(both, "3d_fullres", "1") == model.members[1]
    assert choose_member(both, "2d", "1") == model.members[1]
    assert choose_member(both, "2d", "4") == model.members[0]


def test_what_does_not_fit_stays_and_is_named(folder, caplog):
    """One more channel and one more class: the first convolution and the head."""
    caplog.set_level("INFO")
    network = build_network(ARCHITECTURE, 2, 3)
    fill(network, 7.0)
    load_pretrained(network, folder, "3d_fullres", "0")
    theirs = weights(folder, 0)
    for name, tensor in network.state_dict().items():
        if name in ("encoder.0.0.weight", "heads.0.weight"):
            assert (tensor == 7).all()
        else:
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)
    assert "12 of 14 tensors" in caplog.text
    assert (
        "trained from scratch: encoder.0.0.weight (4x2x1x3x3, in the file 4x1x1x3x3), "
        "heads.0.weight (3x4x1x1x1, in the file 2x4x1x1x1)"
    ) in caplog.text


def test_a_long_list_is_cut_short(folder, caplog):
    deep = dataclasses.replace(ARCHITECTURE, encoder_convs=(3, 1))
    load_pretrained(build_network(deep, 1, 2), folder, "3d_fullres", "0")
    line = next(text for text in caplog.text.splitlines() if "from scratch" in text)
    assert "encoder.0.3.weight (4x4x1x3x3, in the file missing)" in line
    assert line.endswith(" and 4 more")


def test_nothing_that_fits_is_refused(folder):
    wide = build_network(dataclasses.replace(ARCHITECTURE, features=(6, 10)), 1, 2)
    with pytest.raises(
        TrainingError, match=r"3d_fullres_fold_0.safetensors: none of its 14 tensors has the name"
    ):
        load_pretrained(wide, folder, "3d_fullres", "0")
    with pytest.raises(WeightsError, match="expected a weights bundle"):
        load_pretrained(wide, folder / "nowhere", "3d_fullres", "0")


def test_training_begins_with_them_but_a_resumed_run_does_not(folder, tmp_path, monkeypatch):
    workspace = make_workspace(tmp_path / "ws", cases=5)
    config = dataclasses.replace(QUICK, epochs=1, learning_rate=1e-9, pretrained=str(folder))
    path = run_folder(workspace, "3d_fullres", "1") / LATEST_CHECKPOINT
    assert run_fold(workspace, "3d_fullres", "1", config)
    trained, given = read_checkpoint(path, CONFIGURATION)["network"], weights(folder, 1)
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, given[name], rtol=0, atol=1e-7)
    loaded = []
    real = train.read_pretrained
    monkeypatch.setattr(train, "read_pretrained", lambda *args: loaded.append(args) or real(*args))
    longer = dataclasses.replace(config, epochs=2)
    assert run_fold(workspace, "3d_fullres", "1", longer)
    assert loaded == []
    assert run_fold(workspace, "3d_fullres", "1", config, restart=True)
    assert len(loaded) == 1


def test_no_fold_begins_with_a_network_that_knows_the_cases_it_validates(fresh, caplog):
    """Fold 0's network has been trained on the cases of which fold 1 is validated."""
    once = dataclasses.replace(QUICK, epochs=1)
    assert run_fold(fresh, "3d_fullres", "0", once)
    out = fresh / "bundle"
    model = export(fresh, ["3d_fullres"], ["0"], out, check_cases=0)
    begun = dataclasses.replace(once, pretrained=str(out))
    with pytest.raises(TrainingError, match=r"fold_0\.safetensors: was trained on other cases"):
        run_fold(fresh, "3d_fullres", "1", begun)
    assert run_fold(fresh, "3d_fullres", "0", begun, restart=True)
    assert run_fold(fresh, "3d_fullres", "all", begun)
    bundle.save_model(out, dataclasses.replace(model, provenance={}))
    assert run_fold(fresh, "3d_fullres", "1", begun)
    told = "if it knows cases that fold 1 validates, their scores are too good"
    assert f"bundle: does not say on which cases it was trained; {told}" in caplog.text
    others = dataclasses.replace(model, plans=dataclasses.replace(model.plans, dataset="other"))
    bundle.save_model(out, others)
    assert run_fold(fresh, "3d_fullres", "1", begun, restart=True)
    assert f"bundle: was trained on other; {told}" in caplog.text


def test_nnunets_folders_do_not_say_which_cases_their_networks_know(fresh, tmp_path, caplog):
    folder = nnunet_folders.write(tmp_path / "results", nnunet_folders.VOLUME)
    require_unseen(folder, open_run(fresh, "3d_fullres", "all", QUICK))
    assert not caplog.records
    require_unseen(folder, open_run(fresh, "3d_fullres", "1", QUICK))
    assert f"{folder}: does not say on which cases it was trained; if it" in caplog.text
