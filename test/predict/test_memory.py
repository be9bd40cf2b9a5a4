"""What a case needs, against sums by hand and a peak that is measured."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CONFIGURATION, PLANS, make_bundle

from ichseg.engine import machine
from ichseg.engine.machine import MemoryLimit
from ichseg.model import bundle
from ichseg.predict import memory
from ichseg.predict.ensemble import Ensemble
from ichseg.predict.memory import Part
from ichseg.predict.prepare import place
from ichseg.scan import volume
from ichseg.scan.volume import Volume

ROOT = Path(__file__).parents[2]
MB = 1024**2


def test_bytes_of_weights_are_those_of_fp32(tmp_path):
    model = make_bundle(tmp_path, folds=1)
    state = bundle.load_state(tmp_path, model.members[0])
    assert bundle.weights_bytes(tmp_path, model.members[0]) == sum(
        array.nbytes for array in state.values()
    )


def part(shape, *, sums=1, networks=1):
    """The tiny configuration, tile 4x16x16, on a scan whose grid has this shape."""
    scan = Volume(np.zeros(shape, np.uint8), (5.0, 1.0, 1.0))
    placement = place([scan], PLANS, CONFIGURATION)
    assert placement.grid_shape == shape
    return Part(CONFIGURATION, placement, weights=100 * MB, sums=sums, networks=networks)


def needed(*parts, kind="openvino", on_host=False):
    return memory.estimate(
        kind, PLANS, parts, file_bytes=7 * MB, scan_bytes=20 * MB, on_host=on_host
    )


def test_what_a_case_needs_by_hand():
    """Of 100x128x256 voxels, 3 276 800: 12.5 MB a float32 channel; two labels, 25 MB of scores."""
    found = needed(part((100, 128, 256)))
    assert found.opening == (20 + max(2 * 7 + 20, 12.5 + 30)) * MB
    assert found.predicting == (20 + 12.5 + 25) * MB
    assert found.writing == (20 + 25 + 9.375 + 40) * MB
    assert found.network == (3.05 * 100 + 55) * MB
    assert found.alone == found.network + found.writing
    assert found.device == 0


def test_several_networks_need_a_second_sum_and_what_each_found():
    one, five = needed(part((100, 128, 256))), needed(part((100, 128, 256), sums=2, networks=5))
    assert five.predicting - one.predicting == (25 + 5 * 3.125) * MB


def test_networks_that_stay_are_all_counted():
    many = (part((100, 128, 256), sums=2, networks=3), part((100, 128, 256)))
    kept = memory.estimate("openvino", PLANS, many, file_bytes=0, scan_bytes=0, keeps_networks=True)
    assert kept.keeps_networks
    assert kept.network == 4 * int(3.05 * 100 * MB) + 55 * MB
    alone = memory.estimate("openvino", PLANS, many, file_bytes=0, scan_bytes=0)
    assert (alone.network, alone.keeps_networks) == (int((3.05 * 100 + 55) * MB), False)
    assert (alone.opening, alone.predicting) == (kept.opening, kept.predicting)


def test_networks_that_stay_on_a_gpu_are_counted_there():
    many = (part((100, 128, 256), sums=2, networks=3), part((100, 128, 256)))
    alone, kept = (
        memory.estimate("cuda", PLANS, many, file_bytes=0, scan_bytes=0, keeps_networks=keeps)
        for keeps in (False, True)
    )
    assert kept.device - alone.device == 4 * 100 * MB
    assert kept.network == alone.network == 2 * 100 * MB  # one after another passes the host
    assert kept.keeps_networks


def test_what_is_smaller_than_a_tile_is_padded():
    found = needed(part((2, 10, 16)))  # to 4x16x16
    assert found.predicting - 20 * MB == 4 * (2 * 10 * 16 + 4 * 16 * 16 + 2 * 4 * 16 * 16)


def test_scores_lie_where_the_networks_run_unless_the_gpu_does_not_hold_them():
    on_gpu = needed(part((100, 128, 256)), kind="cuda")
    on_host = needed(part((100, 128, 256)), kind="cuda", on_host=True)
    assert on_gpu.device - on_host.device == (12.5 + 25) * MB
    assert on_host.predicting - on_gpu.predicting == 25 * MB
    assert on_gpu.predicting == (20 + 12.5) * MB


def test_networks_are_there_while_a_case_is_opened():
    assert memory.Need(opening=100, predicting=20, writing=30, network=5).alone == 105
    assert memory.Need(opening=10, predicting=20, writing=30, network=5).alone == 35


@pytest.mark.parametrize(("share", "kept"), [(2.1, True), (1.9, False)])
def test_all_networks_stay_where_that_leaves_half_of_the_memory(tmp_path, monkeypatch, share, kept):
    make_bundle(tmp_path)
    ensemble = Ensemble.load(tmp_path, "cpu")
    plan = ensemble.plan(Volume(np.zeros((12, 40, 40), np.int16), (5.0, 1.0, 1.0)), "balanced")
    limit = [None]
    monkeypatch.setattr(machine, "memory_limit", lambda: limit[0])
    every = ensemble.need(plan, file_bytes=1000, singly=False)
    assert every.keeps_networks
    limit[0] = MemoryLimit(int(share * every.alone), "a test")
    found = ensemble.need(plan, file_bytes=1000, singly=False)
    assert found.keeps_networks == kept
    assert (found.network == every.network) == kept
    assert found.network < every.network or kept


def test_tiles_side_by_side_are_counted():
    """Of 4x16x16 voxels, with 4 first features: 17 float32 maps of 1024 voxels a tile."""
    grid = dataclasses.replace(part((100, 128, 256)), weights=0)
    one, four = (needed(dataclasses.replace(grid, at_once=n)).network for n in (1, 4))
    assert four - one == 3 * 17 * 4096


def test_probabilities_that_are_kept_are_counted():
    """Of one label, two bytes a voxel."""
    grid = part((100, 128, 256))
    plain, kept = (
        memory.estimate("openvino", PLANS, [grid], file_bytes=0, scan_bytes=0, bytes_kept=n)
        for n in (0, 2)
    )
    assert kept.writing - plain.writing == 2 * 3.125 * MB
    assert (kept.opening, kept.predicting) == (plain.opening, plain.predicting)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_estimate_of_a_run_is_near_its_peak(tmp_path):
    """30 MB of scan, in a process of its own; smooth, lest there be a lesion for each voxel."""
    make_bundle(tmp_path / "weights")
    voxels = np.random.default_rng(0).integers(-1000, 1000, (6, 5, 5)).astype(np.int16)
    voxels[2:4] //= 50  # as dense as tissue
    voxels = voxels.repeat(10, 0).repeat(100, 1).repeat(100, 2)
    volume.write(Volume(voxels, (5.0, 0.2, 0.2)), tmp_path / "input" / "scan.mha")
    flags = ["--preset", "fast", "--device", "cpu"]
    for name in ("input", "output", "weights"):
        flags += [f"--{name}", str(tmp_path / name)]
    code = (
        "import pathlib, process; process.main();"
        "print(pathlib.Path('/proc/self/status').read_text())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], capture_output=True, text=True, check=True, cwd=ROOT
    )
    (peak_kb,) = re.findall(r"VmHWM:\s+(\d+) kB", done.stdout)
    (estimate_gb,) = re.findall(r"about ([\d.]+) GB of memory", done.stderr)
    assert float(estimate_gb) == pytest.approx(int(peak_kb) / 1e6 * 1.024, rel=0.25)


@pytest.mark.parametrize(
    ("limit", "sizes", "behind", "fits"),
    [
        (1100 + 20 + 30 + 10, (50, 50), False, True),  # program, networks, this one, the next one
        (1100 + 20 + 30 + 10 - 1, (50, 50), False, False),
        (1100 + 20 + 30 + 15, (50, 75), False, True),  # by its files half as large again
        (1100 + 20 + 30 + 15 - 1, (50, 75), False, False),
        (1100 + 20 + 30 + 10, (None, 75), False, True),  # one of them is no file
        (1100 + 20 + 30 + 10, (0, 75), False, True),
        (1100 + 20 + 30 + 10 + 7 - 1, (50, 50), True, False),  # one is being written
        (1100 + 20 + 30 + 10 + 7, (50, 50), True, True),
    ],
)
def test_the_next_case_is_opened_where_both_fit(monkeypatch, limit, sizes, behind, fits):
    monkeypatch.setattr(machine, "memory_limit", lambda: MemoryLimit(limit, "a test"))
    need = memory.Need(opening=10, predicting=30, writing=7, network=20)
    now, following = sizes
    found = memory.may_open(
        need, need if behind else None, 1100, file_bytes=now, next_bytes=following
    )
    assert found == fits
    assert memory.may_open(None, None, 1100, file_bytes=now, next_bytes=following)
