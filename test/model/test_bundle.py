import dataclasses
import json
import resource

import pytest
import torch
from conftest import ARCHITECTURE, make_bundle

from ichseg.engine import torch_engine
from ichseg.errors import OutputError, WeightsError
from ichseg.model import bundle
from ichseg.model.network import build_network


def test_a_bundle_survives_the_disk_rounded_to_fp16(tmp_path):
    model = make_bundle(tmp_path)
    assert bundle.load_model(tmp_path) == model
    torch.manual_seed(0)
    original = build_network(ARCHITECTURE, 1, 2).state_dict()
    loaded = torch_engine.tensors(bundle.load_state(tmp_path, model.members[0]))
    assert loaded.keys() == original.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, original[name].half().float())


def test_checksums_are_for_sha256sum(tmp_path):
    model = make_bundle(tmp_path)
    lines = (tmp_path / "SHA256SUMS").read_text().splitlines()
    assert f"{model.members[0].sha256}  {model.members[0].file}" in lines
    assert [line.split("  ")[1] for line in lines][-1] == "model.json"


def test_one_flipped_byte_is_noticed(tmp_path):
    model = make_bundle(tmp_path)
    path = tmp_path / model.members[1].file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"{path}: altered, sha256 is"):
        bundle.load_model(tmp_path)


def test_missing_files_and_lfs_pointers_are_named(tmp_path):
    with pytest.raises(WeightsError, match="expected a weights bundle"):
        bundle.load_model(tmp_path)
    model = make_bundle(tmp_path)
    path = tmp_path / model.members[0].file
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(WeightsError, match="a Git LFS pointer"):
        bundle.load_model(tmp_path)
    path.unlink()
    with pytest.raises(WeightsError, match=f"{path}: no such file, which model.json names"):
        bundle.load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(schema_version=7), "model schema 7"),
        (lambda raw: raw.update(licence="free; rm"), "licence 'free; rm', expected one such as"),
        (lambda raw: raw.update(members=[]), "no members"),
        (lambda raw: raw.update(average="votes"), "average 'votes'"),
        (lambda raw: raw["plans"].update(regions=[1]), "average 'probabilities' of regions"),
        (lambda raw: raw.update(cascade="masks"), "cascade 'masks', expected scores or labels"),
        (lambda raw: raw.update(mirror_axes=[3]), r"mirror axes \(3,\)"),
        (lambda raw: raw["members"][0].update(file="../x.safetensors"), "a plain"),
        (lambda raw: raw["members"][0].update(configuration="2d"), "no configuration '2d'"),
        (lambda raw: raw["plans"].pop("labels"), r"missing keys \['labels'\]"),
    ],
)
def test_a_wrong_description_is_refused(tmp_path, change, message):
    make_bundle(tmp_path)
    path = tmp_path / "model.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(WeightsError, match=message):
        bundle.load_model(tmp_path)


def test_a_file_that_is_not_safetensors_is_refused(tmp_path):
    model = make_bundle(tmp_path)
    (tmp_path / "3d_fullres_fold_0.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(WeightsError, match="cannot read the weights"):
        bundle.load_state(tmp_path, model.members[0])


def test_a_failed_write_leaves_the_old_file(tmp_path):
    model = make_bundle(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    content = (tmp_path / "model.json").read_bytes()
    broken = dataclasses.replace(model, provenance={"score": float("nan")})
    with pytest.raises(ValueError, match="Out of range float"):
        bundle.save_model(tmp_path, broken)
    assert (tmp_path / "model.json").read_bytes() == content
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_weights_that_cannot_be_written_are_told_in_words(tmp_path):
    """As on a full disk, which safetensors reports as an error of its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OutputError, match=r"3d_fold_0.safetensors: cannot write \(File too"):
            bundle.save_member(tmp_path, "3d", "0", {"weight": torch.zeros(4000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["fold", "configuration"])
def test_a_member_named_as_a_path_is_refused(field):
    names = {"configuration": "3d_fullres", "fold": "0"} | {field: "/etc/passwd"}
    with pytest.raises(ValueError, match="'/etc/passwd' in the name of a member"):
        bundle.Member(**names, file="a.safetensors", sha256="0" * 64)
