"""Inference on a GPU from tiles to masks, by a pretended one: see ``helpers.card``."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURE, CONFIGURATION, PLANS, make_bundle
from helpers import card

from ichseg.engine import torch_engine
from ichseg.engine.choose import choose_engine
from ichseg.engine.engine import NetworkSpec
from ichseg.errors import DeviceError
from ichseg.model import bundle
from ichseg.model.network import build_network
from ichseg.model.plans import Resampling
from ichseg.predict.ensemble import Ensemble
from ichseg.predict.many import segment_many
from ichseg.predict.memory import Need

FLAT = dataclasses.replace(ARCHITECTURE, kernels=((3, 3),) * 2, strides=((1, 1), (2, 2)))


def made(folder, kind):
    """A bundle whose scores are of this kind."""
    configuration, plans = CONFIGURATION, PLANS
    if kind == "2D":
        configuration = dataclasses.replace(
            CONFIGURATION, name="2d", patch=(16, 16), architecture=FLAT
        )
    if kind == "cubic":
        plans = dataclasses.replace(PLANS, resampling=Resampling(score_order=3))
    plans = dataclasses.replace(plans, configurations=(configuration,))
    model = make_bundle(folder, plans=plans)
    average = "logits" if kind in ("logits", "regions") else "probabilities"
    if kind == "regions":
        plans = dataclasses.replace(
            plans, labels=("background", "a", "b"), regions=(1, 2), region_labels=((1, 2), (2,))
        )
    model = dataclasses.replace(model, mirror_axes=(2,), average=average, plans=plans)
    bundle.save_model(folder, model)
    return model


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Several of them, of which the last one is not full."""
    monkeypatch.setattr(torch_engine, "MOST_GPU_VOXELS", 40 * 4 * 16 * 16)


@pytest.mark.parametrize("kind", ["probabilities", "logits", "regions", "2D", "cubic"])
def test_masks_of_the_card_are_those_of_the_cpu(tmp_path, scan, monkeypatch, kind):
    made(tmp_path, kind)
    usual = Ensemble.load(tmp_path, "torch-cpu")
    for options in ({}, {"threshold": 0.4, "probabilities": True}):
        expected = usual.segment(scan, **options)
        with card.pretended(monkeypatch):
            found = Ensemble.load(tmp_path, "cuda").segment(scan, **options)
        assert found.ran["engine"].startswith("torch 2.")
        assert "a pretended card, float16" in found.ran["engine"]
        assert found.foreground.std() > 1
        assert np.mean(found.mask.voxels != expected.mask.voxels) < 0.01
        np.testing.assert_allclose(
            found.foreground.astype(float), expected.foreground.astype(float), atol=3
        )
        if found.probabilities is not None:
            np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=0.01)


@pytest.mark.parametrize("kind", ["plain", "residual", "2D"])
def test_a_large_batch_takes_no_more_kernels_than_one_tile(monkeypatch, kind):
    """Else the card waits for the host where tiles are small and many."""
    architecture = FLAT
    if kind != "2D":
        architecture = dataclasses.replace(ARCHITECTURE, block=kind)
    spec = NetworkSpec(architecture, 1, 2, (1 if kind == "2D" else 4, 16, 16), "logits")
    state = {k: v.numpy() for k, v in build_network(architecture, 1, 2).state_dict().items()}
    counts = []
    with card.pretended(monkeypatch) as there:
        engine = torch_engine.engine_on(torch.device("cuda"))
        network = engine.load(spec, state)
        for count in (1, 7):
            before = len(there.ran)
            tiles = engine.place(np.ones((count, 1, *spec.tile), np.float32))
            (scores,) = network(iter(tiles))
            assert len(scores) == count
            counts.append(len(there.ran) - before)
    assert counts[1] == counts[0]


def test_bfloat16_is_refused_where_the_card_does_not_compute_in_it(monkeypatch):
    """torch itself would take it, and compute by something else."""
    with card.pretended(monkeypatch):
        assert choose_engine("cuda", "bfloat16").precision == "bfloat16"
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
        with pytest.raises(DeviceError, match=r"bfloat16: a pretended card does not .* float16, "):
            choose_engine("cuda", "bfloat16")
        assert choose_engine("cuda").precision == "float16"


def test_tiles_from_the_host_give_the_same_mask(tmp_path, scan, monkeypatch):
    """They are copied there and back in the background, and nothing is read before it is there."""
    made(tmp_path, "probabilities")
    with card.pretended(monkeypatch) as there:
        ensemble = Ensemble.load(tmp_path, "cuda")
        expected = ensemble.segment(scan)
        prepared = ensemble.prepare(ensemble.plan(scan))
        found = ensemble.finish(ensemble.predict(prepared, need=Need(0, 0, 0, 0, on_host=True)))
        assert len(there.streams) > 2
    assert found.ran["scores_on_host"] is True
    np.testing.assert_array_equal(found.foreground, expected.foreground)


def test_a_tile_that_overflows_is_redone_in_full(tmp_path, scan, monkeypatch):
    made(tmp_path, "logits")
    real, calls = torch_engine.forward, []

    def overflowing(module, tiles, device, half):
        calls.append(half)
        found = real(module, tiles, device, half)
        return found if half is None else found.index_fill(0, tiles.new_zeros(1).long(), torch.inf)

    with card.pretended(monkeypatch):
        expected = Ensemble.load(tmp_path, "cuda").segment(scan)
        monkeypatch.setattr(torch_engine, "forward", overflowing)
        found = Ensemble.load(tmp_path, "cuda").segment(scan)
    assert calls.count(None) == calls.count(torch.float16) > 1
    np.testing.assert_allclose(
        found.foreground.astype(float), expected.foreground.astype(float), atol=3
    )


def test_a_case_is_finished_while_the_next_one_is_computed(tmp_path, scan, monkeypatch):
    made(tmp_path, "probabilities")
    with card.pretended(monkeypatch):
        ensemble = Ensemble.load(tmp_path, "cuda")
        expected = ensemble.segment(scan, "fast").mask.voxels
        outcomes = list(segment_many(ensemble, [scan] * 3, "fast"))
    for outcome in outcomes:
        np.testing.assert_array_equal(outcome.found.mask.voxels, expected)
