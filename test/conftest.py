"""Small things that several test modules need: a tiny plan, a tiny bundle, a tiny scan."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ichseg.model import bundle
from ichseg.model.architecture import Architecture
from ichseg.model.bundle import Model
from ichseg.model.network import build_network
from ichseg.model.plans import Configuration, Normalisation, Plans, Resampling
from ichseg.scan.volume import Volume

ARCHITECTURE = Architecture(
    features=(4, 8),
    kernels=((1, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (1, 2, 2)),
    encoder_convs=(1, 1),
    decoder_convs=(1,),
    upsampling_bias=False,
    head_bias=False,
    deep_supervision=False,
)
CONFIGURATION = Configuration(
    name="3d_fullres",
    spacing_mm=(5.0, 1.0, 1.0),
    median_shape=(8, 24, 24),
    patch=(4, 16, 16),
    batch=2,
    batch_dice=False,
    dummy_2d=True,
    previous_stage=None,
    architecture=ARCHITECTURE,
)
PLANS = Plans(
    schema_version=1,
    recipe="msd2018",
    dataset="tiny",
    channels=("CT",),
    labels=("background", "hemorrhage"),
    orientation="LPS",
    transpose=(0, 1, 2),
    normalise_first=False,
    normalisations=(Normalisation("ct", clip_low=0, clip_high=100, mean=50, deviation=20),),
    resampling=Resampling(),
    configurations=(CONFIGURATION,),
)


def make_bundle(folder: Path, *, folds: int = 2, plans: Plans = PLANS) -> Model:
    """A weights bundle of untrained networks."""
    torch.manual_seed(0)
    name = plans.configurations[0].name
    members = tuple(
        bundle.save_member(
            folder,
            name,
            str(fold),
            build_network(plans.configurations[0].architecture, 1, 2).state_dict(),
        )
        for fold in range(folds)
    )
    model = Model(
        schema_version=1,
        name="tiny",
        version="0",
        description="untrained",
        input_slug="head-ct",
        output_slug="bleed",
        average="probabilities",
        mirror_axes=(0, 1, 2),
        plans=plans,
        members=members,
        provenance={},
    )
    bundle.save_model(folder, model)
    return model


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, unless it is asked for: `-m gpu` has to tell."""
    if torch.cuda.is_available() or config.getoption("markexpr") == "gpu":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="module")
def one_core() -> Iterator[None]:
    """No worker processes: they would take longer to begin than the work of a tiny task takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "sched_getaffinity", lambda _: {0})
        yield


@pytest.fixture
def scan() -> Volume:
    """Noise, a third of it like brain, of odd size and flipped direction, the first axis coarse."""
    rng = np.random.default_rng(0)
    voxels = rng.integers(-1000, 1000, (7, 21, 30)).astype(np.int16)
    voxels[rng.random(voxels.shape) < 0.3] = 31
    voxels += rng.integers(-9, 10, voxels.shape, np.int16)
    return dataclasses.replace(
        Volume(voxels, (5.0, 0.8, 0.9), (-12.5, 3.25, 40.0)),
        direction=(1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, -1.0),
    )


@pytest.fixture(scope="session")
def shared_workspace(tmp_path_factory):
    """Of which ``fresh`` shows the cases."""
    from helpers.workspaces import make_workspace

    return make_workspace(tmp_path_factory.mktemp("train"))


@pytest.fixture
def fresh(shared_workspace, tmp_path):
    """A workspace of its own runs over shared cases."""
    for entry in shared_workspace.iterdir():
        if entry.name != "runs":
            (tmp_path / entry.name).symlink_to(entry)
    return tmp_path
