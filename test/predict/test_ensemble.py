import dataclasses

import numpy as np
import pytest
import torch
from conftest import CONFIGURATION, PLANS, make_bundle
from scipy import ndimage

from ichseg.engine import machine, openvino_engine, torch_engine
from ichseg.engine.engine import in_batches
from ichseg.errors import DeviceError, DeviceFullError, InputError, WeightsError
from ichseg.model import bundle
from ichseg.model.network import build_network
from ichseg.predict import components, prepare, presets, sliding_window
from ichseg.predict.ensemble import Ensemble
from ichseg.predict.passes import Pass
from ichseg.predict.presets import budget_record
from ichseg.predict.restore import restore
from ichseg.scan.volume import Volume


def test_full_is_the_mean_softmax_over_folds_and_mirrors(tmp_path, scan):
    """The whole chain again, written out with the bricks."""
    model = make_bundle(tmp_path, folds=2)
    case = prepare.prepare([scan], PLANS, CONFIGURATION)
    total = 0
    for member in model.members:
        network = build_network(CONFIGURATION.architecture, 1, 2).eval()
        network.load_state_dict(torch_engine.tensors(bundle.load_state(tmp_path, member)))
        with torch.inference_mode():
            total = total + sliding_window.predict_tiled(
                in_batches(lambda x, n=network: n(x).softmax(1), 4),
                torch.from_numpy(case.data),
                CONFIGURATION.tile,
                mirror_axes=(0, 1, 2),
            )
    expected = restore([(total / 2, case.placement)], PLANS)
    result = Ensemble.load(tmp_path, "cpu", "float32").segment(scan, "full")
    assert 0.05 < expected.mean() < 0.99  # or nothing would be compared
    assert np.mean(result.mask.voxels != expected) < 1e-3
    assert result.mask.direction == scan.direction
    assert result.volume_ml == pytest.approx(result.mask.voxels.sum() * 5 * 0.8 * 0.9 / 1000)


def test_a_scan_thinner_than_the_tile_is_padded_as_the_plan_says(tmp_path):
    """With the nearest voxels it is the scan whose outer slices were repeated by hand."""
    thin = np.random.default_rng(0).normal(50, 25, (2, 16, 16)).astype(np.float32)
    spacing, found = CONFIGURATION.spacing_mm, {}
    for padding in ("zero", "nearest"):
        folder = tmp_path / padding
        folder.mkdir()
        make_bundle(folder, plans=dataclasses.replace(PLANS, padding=padding))
        ensemble = Ensemble.load(folder, "cpu")
        for name, voxels in (("thin", thin), ("whole", thin[[0, 0, 1, 1]])):
            result = ensemble.segment(Volume(voxels, spacing), probabilities=True)
            found[padding, name] = np.asarray(result.probabilities, np.float64)
    np.testing.assert_array_equal(found["zero", "whole"], found["nearest", "whole"])
    whole = found["nearest", "whole"][:, 1:3]
    np.testing.assert_allclose(found["nearest", "thin"], whole, atol=1e-3)
    assert abs(found["zero", "thin"] - whole).max() > 0.01


def test_presets_run_what_they_say(tmp_path, scan):
    make_bundle(tmp_path, folds=3)
    ensemble = Ensemble.load(tmp_path, "cpu")
    tiles = sliding_window.cover((7, 17, 27), CONFIGURATION.tile).total
    for preset, passes in (("full", 3 * 8), ("balanced", 3), ("fast", 1)):
        seen = []
        result = ensemble.segment(
            scan, preset, lambda done, total, seen=seen: seen.append((done, total))
        )
        assert seen[-1] == (passes * tiles, passes * tiles)
        assert seen == sorted(set(seen))
        assert result.ran["forward_passes"] == passes * tiles
        threads, network = machine.cpu_threads(), CONFIGURATION.architecture
        at_once = openvino_engine.streams(threads, network, CONFIGURATION.tile)
        assert result.ran["tiles_at_once"] == {"3d_fullres": at_once}  # by OpenVINO
    with pytest.raises(InputError, match="preset 'best', expected one of full, balanced, fast"):
        ensemble.segment(scan, "best")


def test_specks_are_a_warning_of_the_segmentation(tmp_path, scan, monkeypatch):
    make_bundle(tmp_path)
    seen = []

    def told(labels, volume, foreground, lesions):
        assert len(lesions) > 0
        seen.append((labels.shape, volume.voxels.shape, foreground.dtype))
        return "specks"

    monkeypatch.setattr(components, "speck_warning", told)
    found = Ensemble.load(tmp_path, "cpu").segment(scan, "fast")
    assert "specks" in found.warnings
    assert seen == [(scan.voxels.shape, scan.voxels.shape, np.uint8)]


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
    assert "on the CPU" in Ensemble.load(tmp_path, "auto").engine.name


def test_the_reference_gives_the_same_mask(tmp_path, scan):
    make_bundle(tmp_path)
    ensembles = [Ensemble.load(tmp_path, device, "float32") for device in ("cpu", "torch-cpu")]
    assert [ensemble.engine.name.split()[0] for ensemble in ensembles] == ["OpenVINO", "torch"]
    masks = [ensemble.segment(scan, "fast").mask.voxels for ensemble in ensembles]
    assert 0.05 < masks[0].mean() < 0.99
    assert np.mean(masks[0] != masks[1]) < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees_with_cpu(tmp_path, scan):
    make_bundle(tmp_path)
    masks = [
        Ensemble.load(tmp_path, device).segment(scan).mask.voxels for device in ("cpu", "cuda")
    ]
    assert np.mean(masks[0] != masks[1]) < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_second_case_is_computed_as_the_first_one_was(tmp_path, scan):
    make_bundle(tmp_path)
    ensemble = Ensemble.load(tmp_path, "cuda")
    ensemble.segment(scan, "fast")  # what libraries take of the memory is taken by then
    allowed = ensemble.engine.device_bytes()
    first, second = (ensemble.segment(scan) for _ in range(2))
    assert "scores_on_host" not in first.ran | second.ran
    assert first.ran == second.ran
    np.testing.assert_array_equal(first.mask.voxels, second.mask.voxels)
    assert second.seconds["compile"] < 0.01  # the networks have stayed
    # other tests may run on the card meanwhile
    assert ensemble.engine.device_bytes() == pytest.approx(allowed, rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("spare", [12 * 2**20, 6 * 2**20])
def test_on_a_gpu_that_is_all_but_full_batches_are_smaller_and_the_mask_is_the_same(
    tmp_path, scan, spare
):
    """Room for some tiles of hundreds, or for so few that the scores go to the host."""
    make_bundle(tmp_path)
    expected = Ensemble.load(tmp_path, "cuda").segment(scan)
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare) / total)
    try:
        found = Ensemble.load(tmp_path, "cuda").segment(scan)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert np.mean(found.mask.voxels != expected.mask.voxels) < 0.01
    at_once = "tiles_at_once"
    assert found.ran[at_once]["3d_fullres"] < expected.ran[at_once]["3d_fullres"]


def test_a_budget_that_suffices_runs_all_and_says_what_ran(tmp_path, scan):
    model = make_bundle(tmp_path)
    ensemble = Ensemble.load(tmp_path, "cpu")
    expected, found = (ensemble.segment(scan, "full", budget_s=b) for b in (None, 600))
    assert 0.05 < expected.mask.voxels.mean() < 0.99
    assert np.mean(found.mask.voxels != expected.mask.voxels) < 1e-3
    axes = ["plain", "z", "y", "x", "zy", "zx", "yx", "zyx"]
    networks = ["3d_fullres fold 0", "3d_fullres fold 1"]
    assert found.ran.pop("time_budget_s") == pytest.approx(600, abs=60)
    assert found.ran == expected.ran | {
        "units": 16,
        "units_planned": 16,
        "mirrorings": dict.fromkeys(networks, axes),
    }
    some = [Pass(model.members[0], ()), Pass(model.members[1], ()), Pass(model.members[1], (1, 2))]
    (part,) = ensemble.plan(scan, "full").parts
    assert budget_record([part], [some], 8.0) == {
        "time_budget_s": 8.0,
        "units": 3,
        "units_planned": 16,
        "mirrorings": {networks[0]: ["plain"], networks[1]: ["plain", "yx"]},
    }


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("full"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        DeviceFullError("full"),
    ],
)
def test_where_a_gpus_memory_is_full_scores_are_added_up_on_the_host(tmp_path, scan, error):
    """A device that is full after 100 tiles of those that were placed on it."""
    make_bundle(tmp_path)
    ensemble = Ensemble.load(tmp_path, "torch-cpu")
    expected = ensemble.segment(scan, "full")
    assert "scores_on_host" not in expected.ran
    seen, calls = [], []

    def load(spec, state):
        loaded = ensemble.engine.load(spec, state)

        def network(tiles):
            for scores in loaded(tiles):
                calls.append(len(scores))
                if not kept and sum(calls) > 100:
                    raise error
                yield scores

        return network

    def keep(data):
        kept.append(data.shape)
        return ensemble.engine.keep(data)

    kept = []
    limited = dataclasses.replace(
        ensemble, engine=dataclasses.replace(ensemble.engine, load=load, keep=keep)
    )
    found = limited.segment(scan, "full", lambda done, total: seen.append((done, total)))
    assert len(kept) == 1
    assert found.mask.voxels.tobytes() == expected.mask.voxels.tobytes()
    assert found.ran == expected.ran | {"scores_on_host": True}
    assert found.disagreement == expected.disagreement
    assert seen[-1] == (expected.ran["forward_passes"],) * 2
    assert sum(calls) > expected.ran["forward_passes"] + 50


def test_what_does_not_fit_the_gpu_either_way_is_said(tmp_path, scan):
    make_bundle(tmp_path)
    ensemble = Ensemble.load(tmp_path, "torch-cpu")

    def load(spec, state):
        raise DeviceError("too small")

    hopeless = dataclasses.replace(ensemble, engine=dataclasses.replace(ensemble.engine, load=load))
    with pytest.raises(DeviceError, match="too small"):
        hopeless.segment(scan, "fast")


def test_scores_are_restored_on_the_host_where_a_gpus_memory_is_full(tmp_path, scan, monkeypatch):
    make_bundle(tmp_path)
    ensemble = Ensemble.load(tmp_path, "torch-cpu")
    expected = ensemble.segment(scan, "fast").mask.voxels
    real, tried = restore, []

    def full_at_first(*args, **kwargs):
        tried.append(1)
        if len(tried) == 1:
            raise torch.cuda.OutOfMemoryError
        return real(*args, **kwargs)

    monkeypatch.setattr("ichseg.predict.ensemble.restore", full_at_first)
    np.testing.assert_array_equal(ensemble.segment(scan, "fast").mask.voxels, expected)
    assert len(tried) == 2


def test_a_volume_of_air_needs_no_network(tmp_path, scan):
    make_bundle(tmp_path)
    ensemble = Ensemble.load(tmp_path, "cpu")
    air = scan.with_voxels(np.full_like(scan.voxels, -1000))
    result = ensemble.finish(ensemble.predict(ensemble.prepare(ensemble.plan(air, "full"))))
    assert not result.mask.voxels.any()
    assert result.ran["forward_passes"] == 0
    assert result.ran["tiles_skipped"] == result.ran["tiles"] > 0


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_what_is_skipped_changes_nothing_elsewhere(tmp_path, scan, monkeypatch, kind):
    """A head in a corner; networks that find a lot, also in air."""
    model = make_bundle(tmp_path)
    bundle.save_model(tmp_path, dataclasses.replace(model, average=kind))
    voxels = np.full((14, 60, 70), -1000, np.int16)
    voxels[:7, :21, :30] = scan.voxels
    scan = Volume(voxels, scan.spacing_mm)
    ensemble = Ensemble.load(tmp_path, "cpu")
    found = ensemble.segment(scan, "balanced")
    assert 0 < found.ran["tiles_skipped"] < found.ran["tiles"]
    assert found.ran["forward_passes"] == 2 * (found.ran["tiles"] - found.ran["tiles_skipped"])
    (part,) = ensemble.plan(scan, "balanced").parts
    tiles = part.passes.tiles
    background = np.zeros(tiles.shape, bool)
    for corner in tiles.skipped:
        background[tiles.where(corner)[1:]] = True
    with monkeypatch.context() as patch:
        patch.setattr(presets, "skip_air", lambda tiles, *_: tiles)
        plain = ensemble.segment(scan, "balanced")
    assert plain.ran["tiles_skipped"] == 0
    # the grid's cells in the volume, and the slices and voxels between, which interpolate
    z, y, x = (np.arange(n) * m // n for n, m in zip(voxels.shape, background.shape, strict=True))
    skipped = background[np.ix_(z, y, x)]
    inside = ndimage.binary_erosion(skipped, np.ones((1, 5, 5)))
    outside = ~ndimage.binary_dilation(skipped, np.ones((1, 5, 5)))
    assert not found.mask.voxels[inside].any()
    assert plain.mask.voxels[inside].any()  # or there was nothing to leave out
    assert plain.mask.voxels[outside].any()
    np.testing.assert_array_equal(found.mask.voxels[outside], plain.mask.voxels[outside])


def test_what_is_no_head_ct_in_hu_is_mended_or_refused_from_python_too(tmp_path, scan):
    make_bundle(tmp_path)
    ensemble = Ensemble.load(tmp_path, "cpu")
    expected = ensemble.segment(scan, "fast")
    raised = scan.with_voxels(scan.voxels + np.int16(1024))
    found = ensemble.segment(raised, "fast")
    np.testing.assert_array_equal(found.mask.voxels, expected.mask.voxels)
    assert "stored with 1024 added to HU, which was taken off" in found.warnings
    with pytest.raises(InputError, match=r"the scan: .*expected a head CT in HU"):
        ensemble.segment(scan.with_voxels(-scan.voxels), "fast")


def test_networks_of_several_channels_are_refused(tmp_path):
    """A case is one scan: every one of them would fail, and only after it has been read."""
    plans = dataclasses.replace(
        PLANS, channels=("CT", "MR"), normalisations=PLANS.normalisations * 2
    )
    make_bundle(tmp_path, plans=plans)
    with pytest.raises(WeightsError, match="networks of 2 channels, CT, MR; expected one"):
        Ensemble.load(tmp_path, "cpu")
