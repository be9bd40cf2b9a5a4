import dataclasses

import numpy as np
import pytest
import torch
from conftest import CONFIGURATION, PLANS, make_bundle

from ichseg import bundle, engine, preprocess, sliding_window
from ichseg.errors import DeviceError, InputError, WeightsError
from ichseg.network import build_network
from ichseg.predict import Ensemble


def test_full_is_the_mean_softmax_over_folds_and_mirrors(tmp_path, scan):
    """The whole chain again, written out with the bricks."""
    model = make_bundle(tmp_path, folds=2)
    case = preprocess.prepare([scan], PLANS, CONFIGURATION)
    total = 0
    for member in model.members:
        network = build_network(CONFIGURATION.architecture, 1, 2).eval()
        network.load_state_dict(bundle.load_state(tmp_path, member))
        with torch.inference_mode():
            total = total + sliding_window.predict_tiled(
                lambda x, n=network: n(x).softmax(1),
                torch.from_numpy(case.data),
                CONFIGURATION.tile,
                mirror_axes=(0, 1, 2),
            )
    expected = preprocess.restore([(total / 2, case.placement)], PLANS)
    result = Ensemble.load(tmp_path, "cpu").segment(scan, "full")
    assert 0.05 < expected.mean() < 0.99  # or nothing would be compared
    assert np.mean(result.mask.voxels != expected) < 1e-3
    assert result.mask.direction == scan.direction
    assert result.volume_ml == pytest.approx(result.mask.voxels.sum() * 5 * 0.8 * 0.9 / 1000)


def test_presets_run_what_they_say(tmp_path, scan):
    make_bundle(tmp_path, folds=3)
    ensemble = Ensemble.load(tmp_path, "cpu")
    tiles = sliding_window.tile_count((7, 17, 27), CONFIGURATION.tile)
    for preset, passes in (("full", 3 * 8), ("balanced", 3), ("fast", 1)):
        seen = []
        result = ensemble.segment(
            scan, preset, lambda done, total, seen=seen: seen.append((done, total))
        )
        assert seen[-1] == (passes * tiles, passes * tiles)
        assert seen == sorted(set(seen))
        assert result.ran["forward_passes"] == passes * tiles
    with pytest.raises(InputError, match="preset 'best', expected one of full, balanced, fast"):
        ensemble.segment(scan, "best")


def test_the_same_input_gives_the_same_bytes(tmp_path, scan):
    make_bundle(tmp_path)
    ensemble = Ensemble.load(tmp_path, "cpu")
    first, second = (ensemble.segment(scan, "full").mask.voxels.tobytes() for _ in range(2))
    assert first == second


def test_a_2d_network_runs_slice_by_slice(tmp_path, scan):
    flat = dataclasses.replace(
        CONFIGURATION.architecture, kernels=((3, 3), (3, 3)), strides=((1, 1), (2, 2))
    )
    configuration = dataclasses.replace(CONFIGURATION, name="2d", patch=(16, 16), architecture=flat)
    make_bundle(tmp_path, plans=dataclasses.replace(PLANS, configurations=(configuration,)))
    ensemble = Ensemble.load(tmp_path, "cpu")
    result = ensemble.segment(scan, "full")
    # 7 slices, 17 x 27 voxels: 2 x 3 tiles of 16, 4 mirrorings, 2 folds
    assert result.ran["forward_passes"] == 7 * 2 * 3 * 4 * 2
    other = scan.voxels.copy()
    other[3:] = 0
    again = ensemble.segment(scan.with_voxels(other), "full").mask.voxels
    np.testing.assert_array_equal(again[:3], result.mask.voxels[:3])


def test_weights_of_another_shape_are_refused(tmp_path, scan):
    model = make_bundle(tmp_path)
    wide = build_network(dataclasses.replace(CONFIGURATION.architecture, features=(6, 8)), 1, 2)
    member = bundle.save_member(tmp_path, "3d_fullres", "0", wide.state_dict())
    bundle.save_model(tmp_path, dataclasses.replace(model, members=(member, *model.members[1:])))
    with pytest.raises(WeightsError, match=r"fold_0\.safetensors: does not fit its plan"):
        Ensemble.load(tmp_path, "cpu").segment(scan, "fast")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said(tmp_path):
    make_bundle(tmp_path)
    with pytest.raises(DeviceError, match="no usable GPU"):
        Ensemble.load(tmp_path, "cuda")
    assert Ensemble.load(tmp_path, "auto").device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees_with_cpu(tmp_path, scan):
    make_bundle(tmp_path)
    masks = [
        Ensemble.load(tmp_path, device).segment(scan).mask.voxels for device in ("cpu", "cuda")
    ]
    assert np.mean(masks[0] != masks[1]) < 0.01


def test_cgroup_quota_limits_threads(tmp_path):
    assert engine.cgroup_cpus(tmp_path) > 1000
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert engine.cgroup_cpus(tmp_path) > 1000
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert engine.cgroup_cpus(tmp_path) == 2
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("300000")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert engine.cgroup_cpus(tmp_path) == 3


def test_logits_or_probabilities():
    network = build_network(CONFIGURATION.architecture, 1, 2)
    tile = torch.randn(1, 1, *CONFIGURATION.tile)
    device = torch.device("cpu")
    logits = engine.torch_engine(network, device, average="logits")(tile)
    probabilities = engine.torch_engine(network, device, average="probabilities")(tile)
    torch.testing.assert_close(logits.softmax(1), probabilities)
    assert probabilities.sum(1).allclose(torch.ones(1))
