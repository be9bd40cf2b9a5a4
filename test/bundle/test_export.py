import dataclasses
import hashlib
import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from conftest import CONFIGURATION
from helpers.workspaces import BUSY, QUICK, make_workspace

from ichseg.engine import torch_engine
from ichseg.errors import TrainingError
from ichseg.model import bundle
from ichseg.scan import volume
from training.__main__ import main as command
from training.bundle import export as exporter
from training.bundle import model_card, rounding
from training.bundle.export import export
from training.data import dataset, splits
from training.data.workspace import BEST_CHECKPOINT, CONFIG_FILE, LATEST_CHECKPOINT, run_folder
from training.fit.checkpoint import read_checkpoint
from training.fit.fold_run import open_run
from training.jobs.train import run_fold
from training.scoring import summary
from training.scoring.scores import CaseScore, score_labels

SHORT = dataclasses.replace(QUICK, epochs=1)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Folds 0 and 1 have finished, fold 2 has been cut off."""
    folder = make_workspace(tmp_path_factory.mktemp("export"))
    for fold in ("0", "1", "2"):
        run_fold(folder, "3d_fullres", fold, SHORT)
    path = run_folder(folder, "3d_fullres", "2") / LATEST_CHECKPOINT
    torch.save({**torch.load(path, weights_only=True), "finished": None}, path)
    return folder


def weights(workspace, fold, name=LATEST_CHECKPOINT):
    path = run_folder(workspace, "3d_fullres", fold) / name
    return read_checkpoint(path, CONFIGURATION)["network"]


def test_what_is_loaded_is_what_was_trained_rounded(workspace, tmp_path):
    export(workspace, ("3d_fullres",), ("0", "1", "2", "3"), tmp_path, check_cases=0)
    model = bundle.load_model(tmp_path)
    assert [(m.configuration, m.fold) for m in model.members] == [
        ("3d_fullres", "0"),
        ("3d_fullres", "1"),
    ]
    for member in model.members:
        loaded = torch_engine.tensors(bundle.load_state(tmp_path, member))
        trained = weights(workspace, member.fold)
        assert loaded.keys() == trained.keys()
        for name, tensor in trained.items():
            torch.testing.assert_close(loaded[name], tensor.half().float(), rtol=0, atol=0)
    assert model.plans.configurations == (CONFIGURATION,)
    assert (model.average, model.mirror_axes) == ("probabilities", (0, 1, 2))
    provenance = model.provenance
    assert (provenance["dataset"], provenance["cases"]) == ("tiny", 6)
    assert provenance["recipe"] == "msd2018"
    assert provenance["folds"]["3d_fullres fold 1"]["epochs"] == 1
    assert provenance["folds"]["3d_fullres fold 1"]["config"]["learning_rate"] == 1e-3


def test_the_card_counts_the_cases_that_trained(workspace, tmp_path):
    """One fold leaves out what it validates; together the folds have seen all."""
    model = export(workspace, ("3d_fullres",), ("0",), tmp_path, check_cases=0)
    assert model.provenance["cases"] == len(
        open_run(workspace, "3d_fullres", "0", QUICK).cases.train
    )
    assert "| trained on | tiny, 4 cases |" in (tmp_path / model_card.FILE).read_text()


def test_axes_that_training_did_not_mirror_are_not_mirrored_later(workspace):
    """Neither by validation nor by inference; a 2D network has no say on the first."""
    mirrored = open_run(workspace, "3d_fullres", "0", QUICK)
    plain = dataclasses.replace(QUICK, augmentation=dataclasses.replace(BUSY, mirror_probability=0))
    never = dataclasses.replace(mirrored, config=plain)
    architecture = dataclasses.replace(
        CONFIGURATION.architecture,
        kernels=tuple(kernel[1:] for kernel in CONFIGURATION.architecture.kernels),
        strides=tuple(stride[1:] for stride in CONFIGURATION.architecture.strides),
    )
    flat = dataclasses.replace(
        mirrored,
        configuration=dataclasses.replace(
            CONFIGURATION, patch=CONFIGURATION.patch[1:], architecture=architecture
        ),
    )
    for runs, axes in (
        ([mirrored], (0, 1, 2)),
        ([never], ()),
        ([flat], (1, 2)),
        ([mirrored, flat], (0, 1, 2)),
        ([mirrored, never], ()),
    ):
        assert exporter._mirror_axes([exporter.Trained(run, "0", {}) for run in runs]) == axes
    assert (mirrored.validation_mirror_axes, never.validation_mirror_axes) == ((0, 1, 2), ())


def test_checksums_hold(workspace, tmp_path):
    export(workspace, ("3d_fullres",), ("0",), tmp_path, check_cases=0)
    lines = (tmp_path / "SHA256SUMS").read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        digest, name = line.split("  ")
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    assert {p.name for p in tmp_path.iterdir()} == {
        "3d_fullres_fold_0.safetensors",
        "model.json",
        "MODEL_CARD.md",
        "SHA256SUMS",
    }


def test_the_bundle_says_what_it_is_under_and_what_it_was_trained_on(workspace, tmp_path):
    (tmp_path / "notes.md").write_text("## Sources\n\nSix boxes.\n")
    line = ["export", "--workspace", str(workspace), "--configuration", "3d_fullres"]
    line += ["--folds", "0,1", "--check-cases", "0", "--licence", "CC0-1.0"]
    line += ["--card-notes", str(tmp_path / "notes.md"), "--out", str(tmp_path / "bundle")]
    assert command(line) == 0
    model = bundle.load_model(tmp_path / "bundle")
    assert model.licence == "CC0-1.0"
    card = (tmp_path / "bundle" / "MODEL_CARD.md").read_text()
    assert card.endswith("## Sources\n\nSix boxes.\n")
    assert "| licence | CC0-1.0 |" in card
    folds = splits.find_splits(workspace, [f"case_{i}" for i in range(6)])
    for number in (0, 1):
        names = "\n".join(folds[number].train)  # sorted
        trained_on = model.provenance["folds"][f"3d_fullres fold {number}"]["trained_on"]
        assert trained_on == hashlib.sha256(names.encode()).hexdigest()


def test_notes_that_cannot_be_read_are_named_before_anything_is_written(workspace, tmp_path):
    line = ["export", "--workspace", str(workspace), "--configuration", "3d_fullres"]
    line += ["--card-notes", str(tmp_path / "none.md"), "--out", str(tmp_path / "bundle")]
    assert command(line) == 1
    assert not (tmp_path / "bundle").exists()


def test_the_best_checkpoint_on_request(workspace, tmp_path):
    path = run_folder(workspace, "3d_fullres", "0")
    raw = torch.load(path / LATEST_CHECKPOINT, weights_only=True)
    raw["network"] = {name: tensor + 1 for name, tensor in raw["network"].items()}
    torch.save(raw, path / BEST_CHECKPOINT)
    model = export(workspace, ("3d_fullres",), ("0",), tmp_path, checkpoint="best", check_cases=0)
    loaded = torch_engine.tensors(bundle.load_state(tmp_path, model.members[0]))
    for name, tensor in weights(workspace, "0").items():
        torch.testing.assert_close(loaded[name], (tensor + 1).half().float(), rtol=0, atol=0)
    assert model.provenance["checkpoint"] == "best"


def test_nothing_finished_is_an_error(workspace, tmp_path):
    with pytest.raises(TrainingError, match="none of the folds 2, 4 has finished"):
        export(workspace, ("3d_fullres",), ("2", "4"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_all_folds_of_the_workspace_are_wanted_unless_some_are_named(tmp_path, capsys):
    folder = make_workspace(tmp_path / "work")
    names = [f"case_{number}" for number in range(6)]
    folds = [{"train": [n for n in names if n != name], "validation": [name]} for name in names]
    (folder / "splits.json").write_text(json.dumps({"schema_version": 1, "folds": folds}))
    line = ["export", "--workspace", str(folder), "--configuration", "3d_fullres", "--out", "out"]
    assert command(line) == 1
    assert "none of the folds 0, 1, 2, 3, 4, 5 has finished" in capsys.readouterr().err
    assert command([*line, "--folds", "0, 5"]) == 1
    assert "none of the folds 0, 5 has finished" in capsys.readouterr().err
    assert command([*line, "--folds", "0,6"]) == 1
    assert "--folds 6, expected 0 to 5, or all" in capsys.readouterr().err
    assert command([*line, "--folds", "0,0"]) == 1
    assert "--folds 0,0 names a fold twice" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"device": "cuda"}, {"precision": "fp16"}])
def test_what_was_trained_on_a_gpu_is_exported_without_one(workspace, tmp_path, change):
    path = run_folder(workspace, "3d_fullres", "0") / CONFIG_FILE
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | change))
    try:
        made = export(workspace, ("3d_fullres",), ("0",), tmp_path / "out", check_cases=1)
    finally:
        path.write_text(before)
    (fold,) = made.provenance["folds"].values()
    assert change.items() <= fold["config"].items()


def test_refuses_weights_that_rounding_changes(workspace, tmp_path, monkeypatch, capsys):
    """As trained the mask is empty, from rounded weights it is full."""
    trained = weights(workspace, "0")

    def segment(given, run, state):
        same = all(torch.equal(state[name], trained[name]) for name in trained)
        return np.full((6, 24, 24), 0 if same else 1, np.uint8)

    monkeypatch.setattr(rounding, "load_network", lambda _, state: state)
    monkeypatch.setattr(rounding, "segment_case", segment)
    with pytest.raises(
        TrainingError, match=r"Dice of hemorrhage in \d cases is 0\.0000 as trained, 0\.\d+ in fp"
    ):
        export(workspace, ("3d_fullres",), ("0",), tmp_path)
    assert not list(tmp_path.iterdir())
    line = ["export", "--workspace", str(workspace), "--configuration", "3d_fullres"]
    assert command([*line, "--folds", "0", "--out", str(tmp_path / "a bundle")]) == 1
    (regardless,) = re.findall("`(export .*)`", capsys.readouterr().err)
    assert command(shlex.split(regardless)) == 0  # what the error says, `run` having no such flag
    assert [m.fold for m in bundle.load_model(tmp_path / "a bundle").members] == ["0"]


@pytest.mark.parametrize(("voxels", "passes"), [(10, True), (11, False)])
def test_a_few_voxels_that_rounding_changes_are_let_pass(
    workspace, tmp_path, monkeypatch, voxels, passes
):
    trained = weights(workspace, "0")
    cases = {case.name: case for case in dataset.load_dataset(workspace).labelled}

    def segment(given, run, state):
        blood = volume.read(cases[given.name].reference).voxels
        labels = np.zeros(blood.shape, np.uint8)
        if not all(torch.equal(state[name], trained[name]) for name in trained):
            labels[tuple(np.argwhere(blood)[:voxels].T)] = 1
        return labels

    monkeypatch.setattr(rounding, "load_network", lambda _, state: state)
    monkeypatch.setattr(rounding, "segment_case", segment)
    if passes:
        export(workspace, ("3d_fullres",), ("0",), tmp_path)
    else:
        with pytest.raises(TrainingError, match="expected a change of at most"):
            export(workspace, ("3d_fullres",), ("0",), tmp_path)


def test_of_several_channels_it_is_said_who_takes_the_bundle(
    workspace, tmp_path, monkeypatch, caplog
):
    found = dataset.load_dataset(workspace)
    cases = tuple(dataclasses.replace(case, images=case.images * 2) for case in found.cases)
    two = dataclasses.replace(found, channels=("CT", "MR"), cases=cases)
    monkeypatch.setattr(dataset, "load_dataset", lambda _: two)
    export(workspace, ("3d_fullres",), ("0",), tmp_path / "out", check_cases=0)
    assert "2 channels, CT, MR: this bundle is for `export-nnunet`" in caplog.text


def test_each_fold_is_checked_once(workspace, tmp_path, monkeypatch):
    checked = []

    def check(cases, run, state, most_cases):
        checked.append(run.fold)
        return most_cases

    monkeypatch.setattr(exporter, "check_rounding", check)
    export(workspace, ("3d_fullres",), ("0",), tmp_path)
    before = (tmp_path / "3d_fullres_fold_0.safetensors").read_bytes()
    export(workspace, ("3d_fullres",), ("0", "1"), tmp_path)
    assert checked == ["0", "1"]
    assert (tmp_path / "3d_fullres_fold_0.safetensors").read_bytes() == before


def test_a_fold_no_longer_wanted_goes(workspace, tmp_path):
    export(workspace, ("3d_fullres",), ("0", "1"), tmp_path, check_cases=0)
    export(workspace, ("3d_fullres",), ("1",), tmp_path, check_cases=0)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["3d_fullres_fold_1.safetensors"]
    assert [m.fold for m in bundle.load_model(tmp_path).members] == ["1"]


def test_the_real_check_passes_and_is_told(workspace, tmp_path, caplog):
    caplog.set_level("INFO")
    line = ["export", "--workspace", str(workspace), "--folds", "1", "--out", str(tmp_path)]
    assert command(line) == 1  # nothing has been selected
    line += ["--configuration", "3d_fullres"]
    assert command([*line, "--check-cases", "1", "--threads", "1"]) == 0
    score = r"hemorrhage \d\.\d{4}"
    said = rf"3d_fullres fold 1, case case_\d: Dice {score} as trained, {score} in fp16"
    assert re.search(said, caplog.text)
    model = bundle.load_model(tmp_path)
    assert model.name == "tiny-3d_fullres"
    assert model.description == (
        "Segments hemorrhage. Trained on tiny. For research, not for diagnosis."
    )
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert card.startswith("# tiny-3d_fullres, version 1\n\nSegments hemorrhage.")
    assert "Not measured: `cross-validate` this workspace first." in card


def test_a_check_that_was_left_out_is_not_claimed_and_is_made_up_for(
    workspace, tmp_path, monkeypatch
):
    """Without cases nothing is checked, and an export that wants the check later does it."""
    export(workspace, ("3d_fullres",), ("0",), tmp_path, check_cases=0)
    assert "not checked against the weights as trained" in card(tmp_path)
    checked = []
    monkeypatch.setattr(
        exporter, "check_rounding", lambda cases, run, state, most: checked.append(run.fold) or most
    )
    export(workspace, ("3d_fullres",), ("0", "1"), tmp_path, check_cases=1)
    assert checked == ["0", "1"]
    assert "checked on 1 validation case of each fold" in card(tmp_path)


def test_the_card_of_the_best_checkpoint_has_no_scores_of_the_latest(
    workspace, tmp_path, monkeypatch
):
    """Only the latest weights have been validated."""
    scored = dataclasses.replace(evaluation_of(workspace), made_from="latest")
    monkeypatch.setattr(model_card.summary, "load", lambda folder: scored)
    monkeypatch.setattr(model_card.merge, "digest_of_folds", lambda *_: "latest")
    path = run_folder(workspace, "3d_fullres", "1")
    shutil.copy(path / LATEST_CHECKPOINT, path / BEST_CHECKPOINT)
    for checkpoint, claimed in (("latest", True), ("best", False)):
        out = tmp_path / checkpoint
        export(workspace, ("3d_fullres",), ("1",), out, checkpoint=checkpoint, check_cases=0)
        assert ("sensitivity" in card(out)) == claimed
        assert ("this bundle holds the best" in card(out)) != claimed
    monkeypatch.setattr(model_card.merge, "digest_of_folds", lambda *_: "trained further since")
    export(workspace, ("3d_fullres",), ("1",), tmp_path, check_cases=0)
    assert "Not measured: `cross-validate` this workspace first." in card(tmp_path)


def card(folder):
    return (folder / "MODEL_CARD.md").read_text()


def evaluation_of(workspace):
    """An evaluation of one case that was found exactly."""
    mask = np.zeros((2, 4, 4), np.uint8)
    mask[0, 0] = 1
    labels = score_labels(mask, mask, (5.0, 1.0, 1.0), names=["hemorrhage"], empty="instance")
    case = CaseScore("case_0", "case_0.nii.gz", "case_0.nii.gz", labels)
    return summary.make_evaluation([case], ["hemorrhage"], "instance")
